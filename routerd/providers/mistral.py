"""Mistral: fixed wall-clock minutes, and never a Retry-After (none in 163 measured 429s, 2026-07-26).

Limits come in headers of non-streaming answers and of 429s. What is spent comes back when the minute turns.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from routerd.canonical import LimitReport
from routerd.policy.classify import Code, Evidence, effective_status
from routerd.providers.durations import read_number, until_minute_s, until_month_s
from routerd.providers.limit_headers import row
from routerd.providers.provider import Provider

CAPACITY_CODES = ("3505", "service_tier_capacity_exceeded")
MONTH_LEFT = "x-ratelimit-remaining-tokens-month"


class Mistral(Provider, frozen=True):
    def limit_reports(self, status: int, headers: Mapping[str, str], wall: float) -> tuple[LimitReport, ...]:
        reports = super().limit_reports(status, headers, wall)
        return tuple(_with_reset(report, wall) for report in reports)

    def restate(self, evidence: Evidence) -> Code | None:
        spent = effective_status(evidence) == 429 and read_number(evidence.headers.get(MONTH_LEFT)) == 0
        return Code.QUOTA_MONTH if spent else super().restate(evidence)

    def retry_after_s(self, evidence: Evidence, code: Code, wall: float) -> float | None:
        if code is Code.QUOTA_MONTH:
            return until_month_s("UTC", wall)
        stated = super().retry_after_s(evidence, code, wall)
        return until_minute_s(wall) if stated is None and code is Code.QUOTA_MINUTE else stated


def _with_reset(report: LimitReport, wall: float) -> LimitReport:
    reset_s = until_minute_s(wall) if report.per == "minute" else until_month_s("UTC", wall)
    return msgspec.structs.replace(report, reset_s=reset_s)


PROVIDER = Mistral(
    names=("mistral",),
    hosts=("api.mistral.ai",),
    codes=dict.fromkeys(CAPACITY_CODES, Code.OVERLOADED),
    rows=(
        row("requests", "minute", "req-minute"),
        row("tokens", "minute", "tokens-minute"),
        row("tokens", "month", "tokens-month"),
    ),
)
