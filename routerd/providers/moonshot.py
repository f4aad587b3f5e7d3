"""Moonshot (Kimi): the error's type says more than its status (docs, "Errors").

An empty balance is a 403 or a 429, and a 429 can be the engine's own load. The X-RateLimit-* headers its help page
mentions have no documented format and are not read.
"""

from __future__ import annotations

from routerd.policy.classify import Code, Evidence
from routerd.providers.provider import Provider

LIMITS: tuple[tuple[str, Code], ...] = (
    ("concurrency", Code.CONCURRENCY),
    ("tpd", Code.QUOTA_DAY),
)


class Moonshot(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        if "rate_limit_reached_error" in (evidence.code, evidence.kind):
            return next((code for mark, code in LIMITS if mark in evidence.text), Code.QUOTA_MINUTE)
        return super().restate(evidence)


PROVIDER = Moonshot(
    names=("moonshot",),
    hosts=("api.moonshot.ai", "api.moonshot.cn"),
    codes={
        "exceeded_current_quota_error": Code.BALANCE,
        "engine_overloaded_error": Code.OVERLOADED,
        "resource_not_found_error": Code.MODEL_NOT_FOUND,
        "permission_denied_error": Code.NO_PERMISSION,
    },
    phrases=(("exceeded current quota", Code.BALANCE),),
    rows=(),
)
