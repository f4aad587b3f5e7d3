"""Limits that are only told in a sentence.

"Rate limit reached for model `m` in organization `o` on tokens per day (TPD): Limit 100000, Used 97050, Requested 3619.
Please try again in 9m38.016s." The period in the sentence can be one that no header mentions.
"""

from __future__ import annotations

import re

from routerd.canonical import LimitReport, Period, Unit
from routerd.providers.limit_headers import PERIOD_S

_COUNT = r"~?([\d,]{1,20})"
_SENTENCE = re.compile(
    r"on (?:input |output )?(requests|tokens) per (min|hour|day)[a-z]{0,3}\b[^:]{0,16}: limit "
    rf"{_COUNT},(?: used {_COUNT},)? requested {_COUNT}"
)
UNITS: dict[str, Unit] = {"requests": "requests", "tokens": "tokens"}
PERIODS: dict[str, Period] = {"min": "minute", "hour": "hour", "day": "day"}


def read_limit_prose(text: str) -> tuple[LimitReport, ...]:
    """The limit a lower-cased sentence tells of. Its bucket refills evenly, so the reset follows from what is used."""
    found = _SENTENCE.search(text)
    if found is None:
        return ()
    unit, per, limit, used = UNITS[found[1]], PERIODS[found[2]], _count(found[3]), _count(found[4])
    if limit <= 0:
        return ()
    reset_s = PERIOD_S[per] * min(used / limit, 1.0)
    return (LimitReport(unit, per, limit, max(limit - used, 0.0), reset_s),)


def _count(text: str | None) -> float:
    digits = (text or "").replace(",", "")
    return float(digits) if digits else 0.0
