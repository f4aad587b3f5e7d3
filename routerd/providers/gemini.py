"""Google Gemini, through its OpenAI-compatible path.

No headers; a 429 body tells by ``quotaId`` which limit is spent. A daily one resets at midnight Pacific time even
when the same body asks to retry in two seconds (seen in 2026-08 bodies), and every retry before that counts
against the next day's twenty. A limit of 0 means the model is not in the free tier at all. A bad key is a 400.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from routerd.canonical import LimitReport, Period
from routerd.policy.classify import Code, Evidence, effective_status
from routerd.providers.durations import read_number, until_midnight_s
from routerd.providers.provider import Provider, details, stated_wait_s

ZONE = "America/Los_Angeles"
LONGEST_MINUTE_WAIT_S = 120.0  # a longer stated wait can only be the daily limit's
MAX_VIOLATIONS = 16


class Gemini(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        if any(detail.get("reason") == "API_KEY_INVALID" for detail in details(evidence)):
            return Code.INVALID_KEY
        if effective_status(evidence) != 429:
            return super().restate(evidence)
        if _not_in_tier(evidence):
            return Code.MODEL_NOT_ALLOWED
        return Code.QUOTA_DAY if _is_daily(evidence) else None

    def retry_after_s(self, evidence: Evidence, code: Code, wall: float) -> float | None:
        if code is Code.QUOTA_DAY:
            return until_midnight_s(ZONE, wall)
        return super().retry_after_s(evidence, code, wall)

    def body_reports(self, evidence: Evidence, wall: float) -> tuple[LimitReport, ...]:
        return tuple(_report(violation, evidence, wall) for violation in _violations(evidence) if _quota_id(violation))


def _violations(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for detail in details(evidence):
        violations = detail.get("violations")
        if isinstance(violations, list):
            yield from (item for item in violations[:MAX_VIOLATIONS] if isinstance(item, dict))


def _quota_id(violation: dict[str, Any]) -> str:
    return str(violation.get("quotaId") or "").lower()


def _value(violation: dict[str, Any]) -> float | None:
    return read_number(str(violation.get("quotaValue")))


def _is_daily(evidence: Evidence) -> bool:
    quota_ids = [_quota_id(violation) for violation in _violations(evidence)]
    if quota_ids:
        return any("perday" in quota_id for quota_id in quota_ids)
    return (stated_wait_s(evidence, 0.0) or 0.0) > LONGEST_MINUTE_WAIT_S


def _not_in_tier(evidence: Evidence) -> bool:
    values = [_value(violation) for violation in _violations(evidence)]
    return 0.0 in values or "limit: 0," in evidence.text


def _report(violation: dict[str, Any], evidence: Evidence, wall: float) -> LimitReport:
    """A violated limit has nothing left."""
    quota_id = _quota_id(violation)
    per: Period = "day" if "perday" in quota_id else "minute"
    reset_s = until_midnight_s(ZONE, wall) if per == "day" else stated_wait_s(evidence, wall)
    return LimitReport("tokens" if "token" in quota_id else "requests", per, _value(violation), 0.0, reset_s)


PROVIDER = Gemini(names=("gemini",), hosts=("generativelanguage.googleapis.com",), rows=())
