"""Z.ai (GLM): the status is coarse, a business code inside says what happened (docs, "Errors").

The same codes arrive as ``error.code``, on the Anthropic-style path as ``error.type``, and inside the message as
``[1308][…]``. A plan's reset is written as Beijing time, without saying so.
"""

from __future__ import annotations

import datetime as dt
import re

from routerd.policy.classify import Code, Evidence, read_words
from routerd.providers.durations import clamp_wait
from routerd.providers.provider import Provider

BUSINESS_CODES: dict[str, Code] = {
    "1000": Code.INVALID_KEY,
    "1001": Code.INVALID_KEY,
    "1002": Code.INVALID_KEY,
    "1003": Code.INVALID_KEY,
    "1004": Code.INVALID_KEY,
    "1110": Code.NO_PERMISSION,
    "1111": Code.NO_PERMISSION,
    "1112": Code.NO_PERMISSION,
    "1113": Code.BALANCE,
    "1120": Code.SERVER_ERROR,
    "1121": Code.NO_PERMISSION,
    "1211": Code.MODEL_NOT_FOUND,
    "1212": Code.UNSUPPORTED_FEATURE,
    "1220": Code.MODEL_NOT_ALLOWED,
    "1221": Code.MODEL_NOT_FOUND,
    "1222": Code.MODEL_NOT_FOUND,
    "1230": Code.SERVER_ERROR,
    "1234": Code.SERVER_ERROR,
    "1300": Code.MODERATION,
    "1301": Code.MODERATION,
    "1302": Code.CONCURRENCY,
    "1303": Code.QUOTA_MINUTE,
    "1304": Code.QUOTA_DAY,
    "1305": Code.OVERLOADED,
    "1308": Code.QUOTA_PLAN,
    "1309": Code.BALANCE,
    "1310": Code.QUOTA_PLAN,
}
PARAMETERS_CODE = "1210"  # wrong parameters, a prompt that is too long among them
OVERFLOW_WORDS = frozenset({Code.CONTEXT_OVERFLOW, Code.UNSUPPORTED_FEATURE})
BEIJING = dt.timezone(dt.timedelta(hours=8))

_BRACKETED = re.compile(r"\[(\d{4})\]")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


class Zai(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        bracketed = _BRACKETED.search(evidence.text)
        names = (evidence.code, evidence.kind, bracketed[1] if bracketed else "")
        if PARAMETERS_CODE in names:
            more_than = "more than max tokens allowed" in evidence.text
            return Code.CONTEXT_OVERFLOW if more_than else read_words(evidence.text, OVERFLOW_WORDS)
        return next((self.codes[name] for name in names if name in self.codes), None)

    def retry_after_s(self, evidence: Evidence, code: Code, wall: float) -> float | None:
        found = _MOMENT.search(evidence.text) if code is Code.QUOTA_PLAN else None
        moment_s = None if found is None else _beijing_s(found[0])
        if moment_s is not None:
            return clamp_wait(moment_s - wall)
        return super().retry_after_s(evidence, code, wall)


def _beijing_s(text: str) -> float | None:
    try:
        return dt.datetime.fromisoformat(text).replace(tzinfo=BEIJING).timestamp()
    except (ValueError, OverflowError):
        return None


PROVIDER = Zai(
    names=("zai",),
    hosts=("api.z.ai", "open.bigmodel.cn"),
    codes=BUSINESS_CODES,
    rows=(),
    waits={Code.CONCURRENCY: 2.0, Code.OVERLOADED: 30.0},  # measured: concurrency clears within 5 s
)
