"""MiniMax: its own codes, in ``base_resp`` of an HTTP 200 or in brackets in a message (docs, "Error Codes")."""

from __future__ import annotations

import re

from routerd.policy.classify import Code, Evidence
from routerd.providers.provider import Provider

BUSINESS_CODES: dict[str, Code] = {
    "1000": Code.SERVER_ERROR,
    "1001": Code.TIMEOUT,
    "1002": Code.QUOTA_MINUTE,
    "1004": Code.INVALID_KEY,
    "1008": Code.BALANCE,
    "1013": Code.SERVER_ERROR,
    "1024": Code.SERVER_ERROR,
    "1026": Code.MODERATION,
    "1027": Code.MODERATION,
    "1033": Code.SERVER_ERROR,
    "1039": Code.QUOTA_MINUTE,  # tokens per minute
    "1041": Code.CONCURRENCY,
    "2049": Code.INVALID_KEY,
    "2056": Code.QUOTA_PLAN,
}
PARAMETERS_CODE = "2013"

_BRACKETED = re.compile(r"\((\d{4})\)")


class MiniMax(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        bracketed = _BRACKETED.search(evidence.text)
        names = (evidence.code, evidence.kind, bracketed[1] if bracketed else "")
        if PARAMETERS_CODE in names:
            return Code.CONTEXT_OVERFLOW if "context" in evidence.text else Code.BAD_REQUEST
        found = next((self.codes[name] for name in names if name in self.codes), None)
        return Code.MODERATION if found is None and "new_sensitive" in evidence.text else found


PROVIDER = MiniMax(names=("minimax",), hosts=("api.minimax.io", "api.minimaxi.com"), codes=BUSINESS_CODES, rows=())
