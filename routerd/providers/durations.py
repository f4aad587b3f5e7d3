"""How long to wait, out of every form upstreams write it in.

Theory of operation
-------------------
One value can be a number of seconds, a Go duration, an HTTP date, an RFC 3339 time, or an epoch in seconds or in
milliseconds. ``read_wait`` tells them apart by looks: a bare number above ``EPOCH_MS`` is milliseconds since 1970,
above ``EPOCH_S`` seconds since 1970, and otherwise a wait. ``find_wait`` looks for a wait in a sentence.

Every result is seconds from now, at least 0 and at most ``MAX_WAIT_S``: an upstream with a broken clock may cost a
month, never for ever. What cannot be read is None, never an exception.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import zoneinfo
from email.utils import parsedate_to_datetime

MAX_WAIT_S = 31 * 86_400.0
MAX_VALUE_CHARS = 64  # of a header or field; the longest date has 37
MAX_PROSE_CHARS = 2_048

EPOCH_S = 1e9  # 2001; as a wait it would be 31 years
EPOCH_MS = 1e11

UNITS_S: dict[str, float] = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3_600.0,
    "d": 86_400.0,
}

# A Go duration runs its units together ("2m59.56s"), so a unit may be followed by a digit but not by a letter.
_UNIT = r"(?:ns|us|µs|ms|milliseconds?|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)(?![a-zµ])"
_AMOUNT = rf"\d{{1,12}}(?:\.\d{{1,12}})?\s?{_UNIT}"
_TOKEN = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)\s?([a-zµ]+)")
_DURATION = re.compile(rf"(?:{_AMOUNT}[\s,]{{0,2}})+", re.IGNORECASE)
_PROSE = re.compile(
    r"(?:try again|retry|wait|resets?|available)(?: again)?(?: in| after| for)?[ ~:]{1,3}"
    rf"((?:{_AMOUNT}(?:[\s,]|and){{0,5}})+)"
)


def read_number(text: str | None) -> float | None:
    """A finite number, 0 or more."""
    if text is None or len(text) > MAX_VALUE_CHARS:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def clamp_wait(seconds: float) -> float:
    return min(max(seconds, 0.0), MAX_WAIT_S)


def read_wait(text: str | None, wall: float) -> float | None:
    """Seconds from ``wall`` (Unix time), out of one header or field. 0 means now; the past too."""
    if text is None:
        return None
    text = text.strip()[:MAX_VALUE_CHARS]
    first = _from_number if text[-1:].isdigit() else _from_duration  # a duration ends in its unit
    for form in (first, _from_date):
        seconds = form(text, wall)
        if seconds is not None:
            return clamp_wait(seconds)
    return None


def find_wait(prose: str) -> float | None:
    """Seconds, out of a lower-cased sentence such as "please try again in 2m59.56s" or "resets in 1 day"."""
    found = _PROSE.search(prose[:MAX_PROSE_CHARS])
    return None if found is None else clamp_wait(_sum_units(found.group(1)))


def _from_number(text: str, wall: float) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if number > EPOCH_MS:
        return number / 1e3 - wall
    return number - wall if number > EPOCH_S else number


def _from_duration(text: str, _wall: float) -> float | None:
    return _sum_units(text.lower()) if _DURATION.fullmatch(text) else None


def _sum_units(text: str) -> float:
    return sum(float(amount) * _unit_s(unit) for amount, unit in _TOKEN.findall(text))


def _unit_s(unit: str) -> float:
    """``minutes`` and ``mins`` are ``m``, but ``milliseconds`` is not."""
    return UNITS_S["ms"] if unit.startswith("milli") else UNITS_S.get(unit) or UNITS_S[unit[0]]


def _from_date(text: str, wall: float) -> float | None:
    for read in (dt.datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = read(text)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=dt.UTC)
            return moment.timestamp() - wall
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None


# --- calendars --------------------------------------------------------------------------------------------------------


def until_minute_s(wall: float) -> float:
    """Seconds until the wall-clock minute ends."""
    return 60.0 - wall % 60.0


def until_midnight_s(zone: str, wall: float) -> float:
    """Seconds until the day ends in ``zone``, also on the days that have 23 or 25 hours."""
    local = dt.datetime.fromtimestamp(wall, zoneinfo.ZoneInfo(zone))
    return _until_date_s(local.date() + dt.timedelta(days=1), local, wall)


def until_month_s(zone: str, wall: float) -> float:
    """Seconds until the month ends in ``zone``."""
    local = dt.datetime.fromtimestamp(wall, zoneinfo.ZoneInfo(zone))
    first = (local.date().replace(day=1) + dt.timedelta(days=32)).replace(day=1)
    return _until_date_s(first, local, wall)


def _until_date_s(date: dt.date, local: dt.datetime, wall: float) -> float:
    midnight = dt.datetime.combine(date, dt.time(), tzinfo=local.tzinfo)
    return clamp_wait(midnight.timestamp() - wall)
