"""Calendars and the three kinds of meter: which bound each of them holds."""

from __future__ import annotations

import datetime as dt
import math
import zoneinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import Limit, Period
from routerd.policy.meters import GUARD_S, PERIOD_S, Bucket, Meter, Sliding, Window, calendar, meter_for

WALL = dt.datetime(2026, 11, 21, 12, 0, tzinfo=dt.UTC).timestamp()


def local(zone: str, *clock: int) -> float:
    """Unix seconds of a local time."""
    return dt.datetime(*clock, tzinfo=zoneinfo.ZoneInfo(zone)).timestamp()  # type: ignore[misc, arg-type]


def admit(meter: Meter, need: float, at: float) -> float | None:
    """Take it if it is there; the mark, or None."""
    return meter.take(need, at) if need <= meter.available(at) + meter.slack else None


class TestCalendar:
    @pytest.mark.parametrize(
        ("zone", "day", "hours"),
        [
            ("America/Los_Angeles", (2026, 3, 8), 23),
            ("America/Los_Angeles", (2026, 11, 1), 25),
            ("America/Los_Angeles", (2026, 7, 1), 24),
            ("Europe/Berlin", (2026, 3, 29), 23),
            ("Europe/Berlin", (2026, 10, 25), 25),
            ("UTC", (2026, 3, 29), 24),
        ],
    )
    def test_a_day_lasts_from_midnight_to_midnight(self, zone: str, day: tuple[int, int, int], hours: int) -> None:
        """Days on which the clocks change have 23 or 25 hours, and every moment of them has the same window."""
        windows = calendar(Limit(1, "requests", "day", zone))
        start = local(zone, *day)

        assert (start, start + hours * 3600) == windows(start)
        assert (start, start + hours * 3600) == windows(start + hours * 3600 - 1)
        assert start + hours * 3600 == windows(start + hours * 3600)[0]

    def test_midnight_pacific_is_not_midnight_utc(self) -> None:
        """A window of a Pacific day ends at 8:00 UTC in winter and at 7:00 UTC in summer."""
        windows = calendar(Limit(1, "requests", "day", "America/Los_Angeles"))

        winter = windows(local("UTC", 2026, 1, 15, 12))[1]
        summer = windows(local("UTC", 2026, 7, 15, 12))[1]

        assert tuple(dt.datetime.fromtimestamp(end, dt.UTC).hour for end in (winter, summer)) == (8, 7)

    def test_a_month_ends_where_the_next_begins(self) -> None:
        """Months have their own lengths, leap days and daylight saving time included."""
        windows = calendar(Limit(1, "requests", "month", "Europe/Berlin"))

        assert local("Europe/Berlin", 2028, 3, 1) == windows(local("Europe/Berlin", 2028, 2, 29, 23))[1]
        assert local("Europe/Berlin", 2027, 1, 1) == windows(local("Europe/Berlin", 2026, 12, 31, 23))[1]

    def test_an_hour_is_the_zone_s_own(self) -> None:
        """Where the zone is half an hour off, so are its hours."""
        windows = calendar(Limit(1, "requests", "hour", "Asia/Kolkata"))

        assert windows(WALL) == (WALL - 1800, WALL + 1800)

    @given(
        st.floats(1.5e9, 2.2e9),
        st.sampled_from(["America/Los_Angeles", "Europe/Berlin", "Australia/Lord_Howe", "Africa/Cairo", "UTC"]),
        st.sampled_from(["minute", "hour", "day", "month"]),
    )
    def test_a_window_holds_the_moment_it_was_asked_for(self, wall: float, zone: str, per: Period) -> None:
        """Whatever the clocks of a zone do, the window around a moment contains it and is about as long as it says."""
        start, end = calendar(Limit(1, "requests", per, zone))(wall)

        assert start <= wall < end
        assert 0.89 * PERIOD_S[per] <= end - start <= 25 / 24 * PERIOD_S[per]

    @pytest.mark.parametrize(
        ("limit", "complaint"),
        [
            (Limit(1, "requests", "day", "Mars/Olympus"), "unknown time zone"),
            (Limit(1, "requests", "day", "../passwd"), "unknown time zone"),
            (Limit(1, "requests", "day", "minute"), "goes with per"),
            (Limit(0, "requests", "day"), "above zero"),
            (Limit(math.inf, "requests", "day"), "above zero"),
        ],
    )
    def test_nonsense_is_refused(self, limit: Limit, complaint: str) -> None:
        """A limit that cannot be metered is named, not guessed at."""
        with pytest.raises(ValueError, match=complaint):
            meter_for(limit)


gaps = st.lists(st.floats(0, 40) | st.sampled_from([0.0, 0.4999, 0.5, 59.9, 60.0, 60.5]), max_size=120)


class TestSliding:
    @given(st.integers(1, 20), gaps, st.floats(0, 1e6))
    def test_no_span_of_a_minute_holds_more_than_the_amount(
        self, amount: int, gaps_s: list[float], start: float
    ) -> None:
        """However requests arrive, any 60 seconds contain at most the amount of admitted ones."""
        meter = Sliding(Limit(amount, "requests", "minute"))
        now, admitted = start, []
        for gap_s in gaps_s:
            now += gap_s
            while admit(meter, 1, now) is not None:
                admitted.append(now)

        for first, later in zip(admitted, admitted[amount:], strict=False):
            assert later - first > 60.0

    @given(st.lists(st.tuples(st.floats(0, 30), st.floats(0.001, 1), st.floats(0, 1)), max_size=80))
    def test_the_bound_holds_for_fractions_and_settled_amounts(self, steps: list[tuple[float, float, float]]) -> None:
        """Dollars settled at less than was reserved free the difference, and never more than that."""
        meter = Sliding(Limit(2, "usd", "minute"))
        now, spent = 1000.0, []
        for gap_s, need, share in steps:
            now += gap_s
            mark = admit(meter, need, now)
            if mark is not None:
                meter.settle(mark, need, need * share)
                spent.append((now, need * share))
            assert sum(usd for at, usd in spent if now - at < 60.0) <= 2 + 1e-6

    def test_all_of_it_is_there_again_after_a_minute(self) -> None:
        """The price of the bound is at most a second: the full amount is available 61 s later."""
        meter = Sliding(Limit(20, "requests", "minute"))
        for _ in range(20):
            assert admit(meter, 1, 1000.2) is not None

        assert admit(meter, 1, 1060.2) is None
        assert 0 < meter.wait_s(1, 1060.2) <= 1.0
        assert meter.available(1061.2) == 20

    def test_the_wait_is_for_as_much_as_is_needed(self) -> None:
        """One request waits for the oldest to be forgotten, five for the fifth."""
        meter = Sliding(Limit(5, "requests", "minute"))
        for second in range(5):
            meter.take(1, 100.0 + 10 * second)

        assert 18 < meter.wait_s(1, 142.0) < 20
        assert 58 < meter.wait_s(5, 142.0) < 60
        assert math.inf == meter.wait_s(6, 142.0)

    def test_memory_does_not_grow_with_the_amount(self) -> None:
        """A million requests a minute are counted in a bounded number of slices."""
        meter = Sliding(Limit(1e9, "requests", "minute"))
        for tick in range(5000):
            meter.available(tick * 0.1)
            meter.take(100, tick * 0.1)

        assert len(meter.slices) <= 123

    def test_state_survives_a_change_of_both_clocks(self) -> None:
        """The next process counts what was spent in the last period, at its own monotonic time."""
        limit = Limit(10, "requests", "hour")
        meter = Sliding(limit)
        meter.take(4, 5000.0)
        meter.take(3, 8000.0)
        restored = Sliding(limit)

        restored.load(meter.save(8100.0, WALL - 8100.0), 20.0, WALL - 20.0)

        assert restored.available(20.0) == 3
        assert restored.available(20.0 + 600) == 7
        assert restored.available(20.0 + 3600) == 10

    def test_a_clock_set_back_between_two_processes_makes_nothing_older(self) -> None:
        """What seems to have been spent in the future counts as spent just now."""
        limit = Limit(10, "requests", "hour")
        meter = Sliding(limit)
        meter.take(4, 5000.0)
        restored = Sliding(limit)

        restored.load(meter.save(5000.0, WALL - 5000.0), 0.0, WALL - 7200.0)

        assert restored.available(3600.0) == 6
        assert restored.available(3700.0) == 10


class TestBucket:
    @given(
        st.lists(
            st.tuples(st.floats(0, 20), st.floats(1, 1000), st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=60
        )
    )
    def test_a_span_holds_the_capacity_and_what_refilled(self, steps: list[tuple[float, float, float, int]]) -> None:
        """In t seconds at most amount * (1 + t / period) real tokens, though estimates are high and settled late."""
        meter = Bucket(Limit(1000, "tokens", "minute"))
        now, spent = 50.0, []
        flying: list[tuple[float, float]] = []
        for gap_s, need, share, settled in steps:
            now += gap_s
            for _ in range(min(settled, len(flying))):
                meter.available(now)
                meter.settle(0.0, *flying.pop(0))
            if admit(meter, need, now) is not None:
                flying.append((need, need * share))
                spent.append((now, need * share))
        for index, (start, _) in enumerate(spent):
            total = 0.0
            for at, tokens in spent[index:]:
                total += tokens
                assert total <= 1000 * (1 + (at - start) / 60) + 1e-6

    @pytest.mark.parametrize(("later_s", "left"), [(-7200.0, 200), (0.0, 200), (360.0, 300), (9000.0, 1000)])
    def test_what_refills_between_two_processes(self, later_s: float, left: float) -> None:
        """As much as the wall clock went on; a clock set back takes nothing away and gives nothing."""
        limit = Limit(1000, "tokens", "hour")
        meter, restored = Bucket(limit), Bucket(limit)
        meter.available(0.0)
        meter.take(800, 0.0)

        restored.load(meter.save(0.0, WALL), 50.0, WALL + later_s - 50.0)

        assert restored.available(50.0) == pytest.approx(left)

    def test_it_refills_evenly(self) -> None:
        """A drained bucket has a tenth of its capacity after a tenth of the period, and never more than all."""
        meter = Bucket(Limit(250_000, "tokens", "minute"))
        meter.available(0.0)
        meter.settle(meter.take(250_000, 0.0), 250_000, 250_000)

        assert meter.available(6.0) == pytest.approx(25_000)
        assert meter.wait_s(50_000, 6.0) == pytest.approx(6.0, abs=0.01)
        assert meter.available(500.0) == 250_000

    def test_an_answer_larger_than_estimated_is_paid_off(self) -> None:
        """The overrun goes below zero, and the wait for anything gets longer by it."""
        meter = Bucket(Limit(60, "tokens", "minute"))
        meter.available(0.0)
        meter.settle(meter.take(60, 0.0), 60, 90)

        assert meter.available(0.0) == -30
        assert meter.wait_s(1, 0.0) == pytest.approx(31.0, abs=0.01)

    def test_more_than_the_capacity_never_fits(self) -> None:
        """A prompt above tokens per minute has no use for waiting."""
        assert math.inf == Bucket(Limit(8000, "tokens", "minute")).wait_s(8001, 0.0)


class TestWindow:
    @given(st.integers(1, 10), gaps)
    def test_no_calendar_minute_holds_more_than_the_amount(self, amount: int, gaps_s: list[float]) -> None:
        """Measured by a clock up to a guard away from ours, every wall minute has at most the amount."""
        meter = Window(
            Limit(amount, "requests", "minute", "minute"), calendar(Limit(1, "requests", "minute", "minute"))
        )
        wall, admitted = WALL, []
        for gap_s in gaps_s:
            wall += gap_s
            while admit(meter, 1, wall) is not None:
                admitted.append(wall)

        for skew_s in (-0.99 * GUARD_S, 0.0, 0.99 * GUARD_S):
            minutes = [(wall + skew_s) // 60 for wall in admitted]
            assert all(minutes.count(minute) <= amount for minute in set(minutes))

    @pytest.mark.parametrize("zone", ["America/Los_Angeles", "Europe/Berlin"])
    @pytest.mark.parametrize("month_day", [(3, 8), (3, 29), (10, 25), (11, 1)])
    def test_a_day_is_whole_again_after_local_midnight(self, zone: str, month_day: tuple[int, int]) -> None:
        """Also on the days on which clocks change, and not an hour before or after it."""
        meter = meter_for(Limit(50, "requests", "day", zone))
        noon, midnight = local(zone, 2026, *month_day, 12), local(zone, 2026, month_day[0], month_day[1] + 1)
        meter.available(noon)
        meter.take(50, noon)

        assert meter.wait_s(1, noon) == pytest.approx(midnight - noon, abs=GUARD_S + 0.01)
        assert meter.available(midnight - 1) == 0
        assert meter.available(midnight + GUARD_S) == 50

    def test_settling_after_the_window_changes_nothing_in_the_next(self) -> None:
        """An answer that ends in the next window was paid for in its own."""
        meter = Window(Limit(100, "tokens", "minute", "minute"), calendar(Limit(1, "tokens", "minute", "minute")))
        meter.available(WALL)
        marks = [meter.take(30, WALL) for _ in range(2)]
        meter.available(WALL + 70)
        meter.take(10, WALL + 70)

        meter.settle(marks[0], 30, 5)
        meter.settle(marks[1], 30, 60)

        assert (meter.available(WALL + 70), meter.in_flight) == (90, 10)

    def test_what_leaves_at_the_boundary_counts_on_both_sides(self) -> None:
        """It may arrive in the next window; its correction follows it there."""
        meter = Window(Limit(100, "tokens", "minute", "minute"), calendar(Limit(1, "tokens", "minute", "minute")))
        meter.available(WALL)
        meter.take(40, WALL + 30)
        mark = meter.take(50, WALL + 59.5)

        assert meter.available(WALL + 62) == 50
        meter.settle(mark, 50, 20)
        assert meter.available(WALL + 62) == 80
        assert meter.available(WALL + 122) == 100

    @given(st.lists(st.floats(-120_000, 90_000), min_size=1, max_size=20))
    def test_a_clock_set_back_refills_nothing(self, offsets_s: list[float]) -> None:
        """What was spent comes back only once the clock has passed the end of its window."""
        meter = meter_for(Limit(5, "requests", "day", "UTC"))
        meter.available(WALL)
        meter.take(5, WALL)
        latest = WALL
        for offset_s in offsets_s:
            latest = max(latest, WALL + offset_s)
            if meter.available(WALL + offset_s) > 0:
                break
        else:
            return

        assert latest >= WALL + 12 * 3600 + GUARD_S

    def test_a_clock_that_was_years_ahead_does_not_close_the_window_for_years(self) -> None:
        """Back in the present, the spending stays until the end of the present window, not until 2038."""
        meter = meter_for(Limit(5, "requests", "day", "UTC"))
        meter.available(WALL + 4e8)
        meter.take(5, WALL + 4e8)

        assert meter.available(WALL) == 0
        assert meter.wait_s(1, WALL) <= 12 * 3600 + GUARD_S + 0.01
        assert meter.available(WALL + 13 * 3600) == 5
