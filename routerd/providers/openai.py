"""OpenAI.

Its limit headers do not say in which period they count (requests per minute in most tiers, per day in the smallest),
but the buckets refill evenly, so the period follows from the reset time. ``insufficient_quota`` in a 429 is about
money (see the general table), and "Request too large" in a 429 never fits, however long one waits.
"""

from __future__ import annotations

from collections.abc import Mapping

from routerd.canonical import LimitReport
from routerd.providers.limit_headers import deduce_period
from routerd.providers.provider import Provider


class OpenAI(Provider, frozen=True):
    def limit_reports(self, status: int, headers: Mapping[str, str], wall: float) -> tuple[LimitReport, ...]:
        return tuple(map(deduce_period, super().limit_reports(status, headers, wall)))


PROVIDER = OpenAI(names=("openai",), hosts=("api.openai.com",))
