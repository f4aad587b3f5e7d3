"""Anthropic.

Limits per minute, with RFC 3339 resets. ``anthropic-ratelimit-tokens-*`` already is the most restrictive of its
token limits (docs, "Rate limits"), so the input and output rows are not read. A subscription has windows of five
hours and seven days instead: ``anthropic-ratelimit-unified-status: rejected``, reset in epoch seconds.
"""

from __future__ import annotations

from routerd.policy.classify import Code, Evidence, effective_status
from routerd.providers.durations import read_wait
from routerd.providers.limit_headers import Row
from routerd.providers.provider import Provider


class Anthropic(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        if effective_status(evidence) != 429:
            return super().restate(evidence)
        if "long context" in evidence.text:
            return Code.TOO_LARGE  # the plan leaves out requests of this length; waiting changes nothing
        if evidence.headers.get("anthropic-ratelimit-unified-status") == "rejected":
            return Code.QUOTA_PLAN
        return None

    def retry_after_s(self, evidence: Evidence, code: Code, wall: float) -> float | None:
        stated = super().retry_after_s(evidence, code, wall)
        if stated is None and code is Code.QUOTA_PLAN:
            return read_wait(evidence.headers.get("anthropic-ratelimit-unified-reset"), wall)
        return stated


PROVIDER = Anthropic(
    names=("anthropic",),
    hosts=("api.anthropic.com",),
    rows=(
        Row(
            "requests",
            "minute",
            "anthropic-ratelimit-requests-limit",
            "anthropic-ratelimit-requests-remaining",
            "anthropic-ratelimit-requests-reset",
        ),
        Row(
            "tokens",
            "minute",
            "anthropic-ratelimit-tokens-limit",
            "anthropic-ratelimit-tokens-remaining",
            "anthropic-ratelimit-tokens-reset",
        ),
    ),
)
