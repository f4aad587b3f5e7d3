"""Rate-limit headers: which header says what, as tables; and the one reader of them all.

A row names the headers of one limit. Only rows whose ``remaining`` header is there are read, so a response without any
costs one lookup per row.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from routerd.canonical import LimitReport, Period, Unit
from routerd.providers.durations import read_number, read_wait

PERIOD_S: dict[Period, float] = {"minute": 60.0, "hour": 3_600.0, "day": 86_400.0}
PERIOD_TOLERANCE = 1.25  # how far a deduced period may be off


class Row(msgspec.Struct, frozen=True):
    """One limit. ``per`` None: the headers do not say. ``reset`` "": there is no such header."""

    unit: Unit
    per: Period | None
    limit: str
    remaining: str
    reset: str = ""


def row(unit: Unit, per: Period | None, suffix: str) -> Row:
    """A row of the common shape ``x-ratelimit-{limit,remaining,reset}-<suffix>``."""
    return Row(unit, per, *(f"x-ratelimit-{what}-{suffix}" for what in ("limit", "remaining", "reset")))


# The shape most servers copied, without saying what period they count in.
COMMON: tuple[Row, ...] = (row("requests", None, "requests"), row("tokens", None, "tokens"))


def read_rows(rows: tuple[Row, ...], headers: Mapping[str, str], wall: float) -> tuple[LimitReport, ...]:
    """The limits these headers speak of. ``headers`` is case-insensitive or has lower-cased names."""
    reports: tuple[LimitReport, ...] = ()
    for entry in rows:
        remaining = headers.get(entry.remaining)
        if remaining is not None:
            reports += _read_row(entry, remaining, headers, wall)
    return reports


def _read_row(entry: Row, remaining: str, headers: Mapping[str, str], wall: float) -> tuple[LimitReport, ...]:
    left = read_number(remaining)
    if left is None:
        return ()
    limit = read_number(headers.get(entry.limit))
    return (LimitReport(entry.unit, entry.per, limit, left, read_wait(headers.get(entry.reset), wall)),)


def deduce_period(report: LimitReport) -> LimitReport:
    """Fill in a missing period for a bucket that refills evenly.

    Such a bucket says how long it takes to refill what is used, so limit x reset / used is its period: 9,999 of 10,000
    left and 8.64 s to go is a day.
    """
    if report.per is not None or not report.limit or report.remaining is None or not report.reset_s:
        return report
    used = report.limit - report.remaining
    if used <= 0:
        return report
    deduced_s = report.limit * report.reset_s / used
    for per, period_s in PERIOD_S.items():
        if period_s / PERIOD_TOLERANCE <= deduced_s <= period_s * PERIOD_TOLERANCE:
            return LimitReport(report.unit, per, report.limit, report.remaining, report.reset_s)
    return report
