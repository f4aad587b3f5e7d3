"""OpenRouter: one account in front of many providers, so a refusal has to say whose it is.

* 402 (docs, "Limits", 2026-11): ``limit_source`` tells an in-flight budget, which frees up by itself, from
  credits. Free models go on working without credits, so an empty balance closes one model and not the account.
* 429: with ``free-models-per-…`` it is the account's own allowance; else a provider behind OpenRouter is at its limit.
* 403: a content rule, or a provider's own refusal passed on; the key is fine in both.
* X-RateLimit-* come on its own 429s only, as headers or inside ``error.metadata.headers``; Reset is epoch milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from routerd.canonical import LimitReport, Period
from routerd.policy.classify import Code, Evidence, effective_status
from routerd.providers.durations import read_number, read_wait, until_midnight_s
from routerd.providers.provider import Provider, child

LIMIT_SOURCES: dict[str, Code] = {
    "openrouter_in_flight_budget": Code.CONCURRENCY,
    "openrouter_free_tier_daily": Code.QUOTA_DAY,
    "openrouter_key_limit": Code.MODEL_BALANCE,
    "openrouter_credits": Code.MODEL_BALANCE,
}
FREE_PERIODS: tuple[tuple[str, Code, Period], ...] = (
    ("free-models-per-day", Code.QUOTA_DAY, "day"),
    ("free-models-per-min", Code.QUOTA_MINUTE, "minute"),
)


class OpenRouter(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        metadata = child(evidence.error, "metadata")
        if metadata.get("reason") == "weight_exceeds_budget":
            return Code.TOO_LARGE  # this one request costs more than may be in flight at all
        source = metadata.get("limit_source")
        if isinstance(source, str) and source in LIMIT_SOURCES:
            return LIMIT_SOURCES[source]
        status = effective_status(evidence)
        if status == 402:
            return Code.MODEL_BALANCE
        if status == 429:
            return _read_429(evidence, metadata)
        if status == 403:
            return _read_403(evidence, metadata)
        return super().restate(evidence)

    def body_reports(self, evidence: Evidence, wall: float) -> tuple[LimitReport, ...]:
        per = _free_period(evidence)
        if per is None:
            return ()
        headers = _limit_headers(evidence)
        limit = read_number(headers.get("x-ratelimit-limit"))
        remaining = read_number(headers.get("x-ratelimit-remaining"))
        reset_s = read_wait(headers.get("x-ratelimit-reset"), wall)
        if reset_s is None and per == "day":
            reset_s = until_midnight_s("UTC", wall)
        return (LimitReport("requests", per, limit, remaining or 0.0, reset_s),)


def _read_429(evidence: Evidence, metadata: Mapping[str, Any]) -> Code:
    for mark, code, _ in FREE_PERIODS:
        if mark in evidence.text:
            return code
    theirs = ("provider_code", "provider_name", "raw", "previous_errors")
    passed_on = any(metadata.get(key) for key in theirs) or "upstream" in evidence.text
    return Code.OVERLOADED if passed_on else Code.QUOTA_MINUTE


def _read_403(evidence: Evidence, metadata: Mapping[str, Any]) -> Code | None:
    if any(key in metadata for key in ("reasons", "flagged_input", "patterns")) or "blocked" in evidence.text:
        return Code.MODERATION
    return Code.SERVER_ERROR if metadata.get("provider_name") else None


def _free_period(evidence: Evidence) -> Period | None:
    if child(evidence.error, "metadata").get("limit_source") == "openrouter_free_tier_daily":
        return "day"
    return next((per for mark, _, per in FREE_PERIODS if mark in evidence.text), None)


def _limit_headers(evidence: Evidence) -> Mapping[str, str]:
    """The response's own, or the copy older responses keep in the body."""
    if "x-ratelimit-reset" in evidence.headers:
        return evidence.headers
    copied = child(child(evidence.error, "metadata"), "headers")
    return {name.lower(): value for name, value in copied.items() if isinstance(value, str)}


PROVIDER = OpenRouter(names=("openrouter",), hosts=("openrouter.ai",), rows=())
