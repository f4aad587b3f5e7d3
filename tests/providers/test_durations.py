"""Waits, in every form upstreams write them in."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.providers.durations import (
    MAX_WAIT_S,
    find_wait,
    read_number,
    read_wait,
    until_midnight_s,
    until_minute_s,
    until_month_s,
)

NOON = dt.datetime(2026, 11, 21, 12, 0, tzinfo=dt.UTC).timestamp()

FORMS = [
    ("0", 0.0),
    ("7", 7.0),
    ("60.5", 60.5),
    ("33011.382867", 33011.382867),
    (" 12 ", 12.0),
    ("12ms", 0.012),
    ("1s", 1.0),
    ("37s", 37.0),
    ("6m0s", 360.0),
    ("2m59.56s", 179.56),
    ("1h2m", 3_720.0),
    ("4h17m", 15_420.0),
    ("20h17m16.2s", 73_036.2),
    ("1 day", 86_400.0),
    ("1h, 5 minutes", 3_900.0),
    ("500 milliseconds", 0.5),
    ("Sat, 21 Nov 2026 12:01:00 GMT", 60.0),
    ("2026-11-21T12:00:30Z", 30.0),
    ("2026-11-21T13:00:30+01:00", 30.0),
    ("2026-11-21 12:00:30", 30.0),
    (str(int(NOON) + 90), 90.0),
    (str(int(NOON * 1000) + 90_000), 90.0),
]


@pytest.mark.parametrize(("text", "expected"), FORMS)
def test_each_form_is_read(text: str, expected: float) -> None:
    """Numbers, Go durations, dates and epochs all come out as seconds from now."""
    assert read_wait(text, NOON) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "soon", "1e999", "nan", "inf", "-inf", "5 parsecs", "1x", "2026-13-45T99:00:00Z", "%"]
)
def test_what_is_no_wait_is_none(text: str) -> None:
    """Unreadable is not the same as now."""
    assert read_wait(text, NOON) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-5", 0.0),
        ("99999999", MAX_WAIT_S),
        ("9999d", MAX_WAIT_S),
        ("1000000001", 0.0),
        ("9" * 60, MAX_WAIT_S),
        ("Sat, 21 Nov 2020 12:00:00 GMT", 0.0),
        ("9999-12-31T00:00:00Z", MAX_WAIT_S),
    ],
)
def test_absurd_waits_are_clamped(text: str, expected: float) -> None:
    """The past is now; anything beyond a month is a month."""
    assert read_wait(text, NOON) == expected


PROSE = [
    ("rate limit reached. please try again in 9m38.016s. need more tokens?", 578.016),
    ("please try again in 1.984999999s", 1.984999999),
    ("please retry in 20h17m16.2s", 73_036.2),
    ("please retry in 45.578569677s.", 45.578569677),
    ("max rpm: 3, please try again after 1 seconds", 1.0),
    ("quota exceeded. resets in 1 day", 86_400.0),
    ("all accounts limited. wait 698s.", 698.0),
    ("you have hit your usage limit. try again in ~7670 min.", 460_200.0),
    ("try again in 1 hour and 5 minutes", 3_900.0),
    ("try again in 12 ms", 0.012),
    ("retry after 30 seconds", 30.0),
]


@pytest.mark.parametrize(("text", "expected"), PROSE)
def test_a_wait_is_found_in_a_sentence(text: str, expected: float) -> None:
    """Where only the message states it, the message is read."""
    assert find_wait(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "please try again later", "retry your request", "limit 20 per day", "in 5 models"]
)
def test_other_numbers_are_not_waits(text: str) -> None:
    """A number without "try again" or its like is not taken for one."""
    assert find_wait(text) is None


@given(st.text(max_size=200), st.floats(0, 4e9))
def test_no_text_raises(text: str, wall: float) -> None:
    """Any text gives None or a wait within the bounds."""
    for seconds in (read_wait(text, wall), find_wait(text.lower())):
        assert seconds is None or 0 <= seconds <= MAX_WAIT_S


@pytest.mark.parametrize(("text", "expected"), [("20", 20.0), ("0", 0.0), ("-1", None), ("nan", None), ("x", None)])
def test_counts_are_finite_and_not_negative(text: str, expected: float | None) -> None:
    """A count that is none is left out rather than guessed."""
    assert read_number(text) == expected


def test_a_missing_header_is_none() -> None:
    """Readers take what ``headers.get`` returns."""
    assert read_number(None) is None
    assert read_wait(None, NOON) is None


# --- calendars --------------------------------------------------------------------------------------------------------


def unix(*moment: int, hours: int = 0) -> float:
    return dt.datetime(*moment, tzinfo=dt.timezone(dt.timedelta(hours=hours))).timestamp()  # type: ignore[misc,arg-type]


def test_a_minute_ends_on_the_wall_clock() -> None:
    """At 12:00:15 it has 45 s to go."""
    assert until_minute_s(NOON + 15) == 45.0


@pytest.mark.parametrize(
    ("wall", "expected_h"),
    [
        (unix(2026, 8, 21, 7, 7, hours=-7), 16 + 53 / 60),  # daylight saving time
        (unix(2026, 11, 21, 7, 7, hours=-8), 16 + 53 / 60),  # standard time
        (unix(2026, 3, 8, 0, 0, hours=-8), 23),  # the day the clock goes forward
        (unix(2026, 11, 1, 0, 0, hours=-7), 25),  # the day it goes back
    ],
)
def test_midnight_knows_daylight_saving_time(wall: float, expected_h: float) -> None:
    """A calendar day has 23, 24 or 25 hours."""
    assert until_midnight_s("America/Los_Angeles", wall) == pytest.approx(expected_h * 3600)


@pytest.mark.parametrize(
    ("wall", "expected_d"), [(unix(2026, 11, 21), 10), (unix(2026, 12, 31), 1), (unix(2028, 2, 1), 29)]
)
def test_a_month_ends_on_its_first_successor(wall: float, expected_d: int) -> None:
    """Months of every length, over a year's end too."""
    assert until_month_s("UTC", wall) == expected_d * 86_400
