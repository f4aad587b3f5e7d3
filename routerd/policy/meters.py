"""Meters: how much of one limit is left. Three kinds, since upstreams limit in three ways.

What holds
----------
``Window`` (``resets`` is ``minute`` or a time zone) counts what was spent in the calendar minute, hour, day or month.
A day runs from local midnight to local midnight, so it may last 23 or 25 hours. Our clock and the upstream's differ a
little, and a request needs time to travel: what leaves within ``GUARD_S`` of a boundary counts in both windows. So
for every calendar window, as either side measures it: admitted <= amount.

``Sliding`` (``rolling`` requests and dollars): a token bucket of 20 that refills 20 a minute lets 39 through in some
spans of 60 s, and upstreams that measure a sliding or a fixed minute punish that. So the period is cut into
``SLICES`` counters, and a counter is forgotten only when all of it is older than the period and one slice (the slice
is margin for travel time). Any span of one period therefore contains <= amount, exactly, at any size, in O(1); the
price is that room returns up to two slices late (1 s of a minute).

``Bucket`` (``rolling`` tokens): token limits of real upstreams refill evenly, and requests differ a hundredfold in
size, so a strict span would leave much unused. Any span of ``t`` seconds contains <= amount * (1 + t / period)
tokens. Reservations in flight are held beside the level and debited when settled, so neither an estimate that was too
high nor one released late can lift the bucket above what a bucket of real usage would hold.

All three bounds hold for estimates that were high enough. An answer that used more than was reserved is charged in
full, may take a meter below zero, and then everybody waits until that is paid off.

Time never refills by accident: ``Sliding`` and ``Bucket`` run on the monotonic clock; ``Window`` runs on the wall
clock but only ever rolls forward, so a clock set back keeps the window and what was spent in it.

What is ugly
------------
Meters change their own state while being asked: they roll and refill lazily, so nothing ever has to tick.
"""

from __future__ import annotations

import datetime as dt
import math
import operator
import zoneinfo
from collections.abc import Callable

import msgspec

from routerd.canonical import Limit, LimitReport, Period

PERIOD_S: dict[Period, float] = {"minute": 60.0, "hour": 3600.0, "day": 86_400.0, "month": 31 * 86_400.0}
SLICES = 120  # counters a sliding period is cut into: a minute returns its room at most 1 s late
GUARD_S = 1.0  # clocks differ and requests travel: this close to a boundary, spending counts on both sides
LEARNED_MAX_S = PERIOD_S["month"]  # a stated reset further away than this is not believed
SETTLING_S = 1e-4  # added to computed waits, so that rounding never wakes anybody a hair too early


class Amount(msgspec.Struct, frozen=True, gc=False):
    """What one attempt takes, estimated or real."""

    requests: float = 1.0
    tokens: float = 0.0
    usd: float = 0.0


class Saved(msgspec.Struct, frozen=True, omit_defaults=True):
    """A meter or a block on disk. All times are Unix seconds: monotonic time means nothing to the next process."""

    used: float = 0.0
    late: float = 0.0  # the part of ``used`` that the next window counts too
    start: float = 0.0
    end: float = 0.0
    level: float = 0.0
    at: float = 0.0
    slices: tuple[tuple[float, float], ...] = ()  # (end of the slice, spent in it), oldest first
    strikes: int = 0
    stated: bool = False


# --- calendars ------------------------------------------------------------------------------------------------------

Calendar = Callable[[float], tuple[float, float]]


def calendar(limit: Limit) -> Calendar:
    """Unix seconds -> (start, end) of the window around them. ValueError: no such zone, or a minute that is a day."""
    if limit.resets == "minute" and limit.per != "minute":
        raise ValueError(f'resets = "minute" goes with per = "minute", not "{limit.per}"')
    if limit.per == "minute":
        return _minute
    try:
        zone = zoneinfo.ZoneInfo(limit.resets)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f'unknown time zone "{limit.resets}"') from None
    by_period: dict[str, Calendar] = {
        "hour": lambda wall: _hour(wall, zone),
        "day": lambda wall: _day(wall, zone),
        "month": lambda wall: _month(wall, zone),
    }
    return by_period[limit.per]


def _minute(wall: float) -> tuple[float, float]:
    start = wall // 60.0 * 60.0
    return start, start + 60.0


def _hour(wall: float, zone: zoneinfo.ZoneInfo) -> tuple[float, float]:
    # Not every zone is whole hours from UTC.
    offset = dt.datetime.fromtimestamp(wall, zone).utcoffset() or dt.timedelta()
    shift_s = offset.total_seconds()
    start = (wall + shift_s) // 3600.0 * 3600.0 - shift_s
    return start, start + 3600.0


def _day(wall: float, zone: zoneinfo.ZoneInfo) -> tuple[float, float]:
    today = dt.datetime.fromtimestamp(wall, zone).date()
    return _midnight(today, zone), _midnight(today + dt.timedelta(days=1), zone)


def _month(wall: float, zone: zoneinfo.ZoneInfo) -> tuple[float, float]:
    first = dt.datetime.fromtimestamp(wall, zone).date().replace(day=1)
    following = (first + dt.timedelta(days=31)).replace(day=1)
    return _midnight(first, zone), _midnight(following, zone)


def _midnight(date: dt.date, zone: zoneinfo.ZoneInfo) -> float:
    return dt.datetime(date.year, date.month, date.day, tzinfo=zone).timestamp()


# --- meters ---------------------------------------------------------------------------------------------------------

MONOTONIC, WALL = 0, 1  # a meter's ``clock``: its place in a pair (now, wall)


class Meter:
    """What is left of one limit. ``at`` is seconds on the meter's own clock.

    ``available`` brings the meter up to ``at``; every other method expects that it was just called.
    """

    __slots__ = ("amount_of", "answered", "capacity", "heard", "in_flight", "limit", "period_s", "reserved", "slack")

    clock = MONOTONIC

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.capacity = limit.amount
        self.period_s = PERIOD_S[limit.per]
        self.slack = 1e-9 * limit.amount  # sums of fractions are never exact
        self.in_flight = 0.0
        self.reserved = 0.0  # of all time: grows with every take, so a reading of it dates a reservation
        self.heard = self.answered = -math.inf  # readings: up to where, and for which one, the upstream has spoken
        self.amount_of: Callable[[Amount], float] = operator.attrgetter(limit.unit)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.limit.name} of {self.capacity:g}, {self.in_flight:g} in flight>"

    @property
    def key(self) -> str:
        """Names the meter on disk. Without the amount: raising a limit must not forget what was spent."""
        return f"{self.limit.unit}/{self.limit.per} {self.limit.resets} {self.limit.models}"

    @property
    def persistent(self) -> bool:
        """True if the window is long, or costly, enough to outlive the process."""
        return self.limit.per != "minute" or self.limit.unit == "usd"

    def available(self, at: float) -> float:
        """What is left, in-flight reservations taken off; negative after an overrun."""
        raise NotImplementedError

    def take(self, need: float, at: float) -> float:
        """Charge it; returns the mark that tells ``settle`` in which window that was."""
        raise NotImplementedError

    def settle(self, mark: float, need: float, spent: float) -> None:
        """Correct what was taken at ``mark`` from ``need`` to ``spent``; no other window is touched."""
        raise NotImplementedError

    def until_s(self, need: float, at: float) -> float:
        """Seconds until ``need``, more than is left but not more than the capacity, will be there."""
        raise NotImplementedError

    def set_available(self, target: float, reset_s: float | None, at: float) -> None:
        """Overrule the ledger."""
        raise NotImplementedError

    def whole_s(self, at: float) -> float:
        """Seconds until nothing is spent any more."""
        raise NotImplementedError

    def save(self, at: float, ahead_s: float) -> Saved:
        """State for the disk, reservations in flight as spent. ``ahead_s``: wall clock minus the meter's own."""
        raise NotImplementedError

    def load(self, saved: Saved, at: float, ahead_s: float) -> None:
        """State from the disk. A wall clock that was set back since then makes nothing older."""
        raise NotImplementedError

    def is_current(self, mark: float) -> bool:  # noqa: ARG002
        """False if the window of ``mark`` is over, and with it what the upstream said in it."""
        return True

    def spent(self, take: Take, actual: Amount) -> float:
        """What to settle ``take`` for. Savings count no more once the upstream has spoken.

        Its figure holds with or without that reservation: either it was in it and was spent, or it was not and then
        gives nothing back. Extra spending always counts.
        """
        spent = max(self.amount_of(actual), 0.0)
        _, need, _, reading = take
        return need if spent < need and (reading <= self.heard or reading == self.answered) else spent

    def close(self, at: float) -> None:
        """Nothing is left, whatever the ledger says."""
        self.heard = self.reserved
        if self.available(at) > 0:
            self.set_available(0.0, None, at)

    def wait_s(self, need: float, at: float) -> float:
        """0 if ``need`` is there, infinity if it never can be, else the seconds until it will be."""
        if need <= self.available(at) + self.slack:
            return 0.0
        if need > self.capacity + self.slack:
            return math.inf
        return self.until_s(need, at) + SETTLING_S

    def resize(self, stated: float) -> None:
        """The upstream states the limit itself: it may be tighter than configured, never wider."""
        self.capacity = min(self.limit.amount, stated)

    def hear(self, report: LimitReport, take: Take | None, at: float) -> None:
        """Let the upstream's statement correct the ledger; ``take`` is what the request it answers took here."""
        self.available(at)
        if report.limit is not None and 0 < report.limit < math.inf:
            self.resize(report.limit)
        remaining = 0.0 if report.limit == 0 else report.remaining
        if remaining is None or not remaining < math.inf:
            return
        ours = self.available(at)
        stated = max(remaining, 0.0)
        reading = self.reserved if take is None else take[3]
        left_since = self.reserved - reading  # may not have arrived there yet
        if stated <= ours:
            self.heard = reading
            if stated < ours:
                self.set_available(stated - left_since, report.reset_s, at)
        elif report.limit is not None and abs(report.limit - self.capacity) <= self.slack:
            target = min(stated - left_since - self._uncounted(take), self.capacity)
            if target > ours:
                self.answered = reading
                self.set_available(target, report.reset_s, at)

    def _uncounted(self, take: Take | None) -> float:
        """Of what is in flight, what an upstream may not have counted: all but the very request it answers.

        That one only where requests are counted, which happens on arrival; its tokens are known at its end.
        """
        if take is None or self.limit.unit != "requests":
            return self.in_flight
        return max(self.in_flight - take[1], 0.0)


# Meter, amount in flight, mark of the window, reading of ``Meter.reserved`` right after.
Take = tuple[Meter, float, float, float]


class Window(Meter):
    """Counts within calendar windows. Marks: number of the window, and a half if it was near enough to its end."""

    __slots__ = ("_calendar", "_closes", "_floor", "end", "late", "serial", "start", "used")

    clock = WALL

    def __init__(self, limit: Limit, windows: Calendar) -> None:
        super().__init__(limit)
        self._calendar = windows
        self.used = 0.0
        self.late = 0.0  # the part of ``used`` from the last moments, which the next window counts too
        self.serial = 0.0
        self.start = self.end = self._closes = self._floor = -math.inf

    def _span(self, start: float, end: float) -> None:
        self.start = start
        self.end = end
        self._closes = end + GUARD_S
        # A clock set back by more than a window was badly wrong before; then the window moves, its spending stays.
        self._floor = start - (end - start)

    def available(self, at: float) -> float:
        if at >= self._closes or at < self._floor:
            self._roll(at)
        return self.capacity - self.used

    def _roll(self, at: float) -> None:
        start, end = self._calendar(at)
        if at >= self._closes:
            follows = start <= self.end
            self.used = self.late if follows else 0.0
            self.late = 0.0
            self.serial += 1.0 if follows else 2.0
        self._span(start, end)

    def take(self, need: float, at: float) -> float:
        self.used += need
        self.in_flight += need
        self.reserved += need
        if at < self.end - GUARD_S:
            return self.serial
        self.late += need
        return self.serial + 0.5

    def settle(self, mark: float, need: float, spent: float) -> None:
        self.in_flight -= need
        delta = spent - need
        if not delta:
            return
        passed = self.serial - mark  # 0: this window; -0.5: its last moments; 0.5: the last moments before it
        if -0.5 <= passed <= 0.5:
            self.used = max(self.used + delta, 0.0)
        if passed == -0.5:
            self.late = max(self.late + delta, 0.0)

    def is_current(self, mark: float) -> bool:
        return self.serial <= mark

    def until_s(self, need: float, at: float) -> float:  # noqa: ARG002
        return self._closes - at

    def set_available(self, target: float, reset_s: float | None, at: float) -> None:  # noqa: ARG002
        self.used = self.capacity - target

    def whole_s(self, at: float) -> float:
        return max(self.end - at, 0.0)

    def save(self, at: float, ahead_s: float) -> Saved:
        self.available(at)
        return Saved(used=self.used, late=self.late, start=self.start + ahead_s, end=self.end + ahead_s)

    def load(self, saved: Saved, at: float, ahead_s: float) -> None:
        self.used, self.late = saved.used, saved.late
        self._span(saved.start - ahead_s, saved.end - ahead_s)
        self.available(at)


class Learned(Window):
    """A limit that only the upstream's own statements tell of; its window ends when they say."""

    __slots__ = ()

    def __init__(self, limit: Limit) -> None:
        period_s = PERIOD_S[limit.per]
        super().__init__(limit, lambda at: (at, at + period_s))

    @property
    def persistent(self) -> bool:
        return False  # the next answer tells it again

    def resize(self, stated: float) -> None:
        self.capacity = stated

    def hear(self, report: LimitReport, take: Take | None, at: float) -> None:
        super().hear(report, take, at)
        if report.reset_s is not None and 0 <= report.reset_s <= LEARNED_MAX_S:
            self._span(at, at + report.reset_s)


class Sliding(Meter):
    """Counts in slices of the period; any span of one period holds at most the amount. Marks: number of the slice."""

    __slots__ = ("_expires", "_slice_s", "slices", "used")

    KEPT = SLICES + 2  # whole slices after which one is older than the period plus a slice, whenever in it that was

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self._slice_s = self.period_s / SLICES
        self.slices: dict[float, float] = {}  # number of the slice -> spent in it, oldest first
        self.used = 0.0
        self._expires = math.inf

    def available(self, at: float) -> float:
        if at >= self._expires:
            self._expire(at)
        return self.capacity - self.used

    def _expire(self, at: float) -> None:
        horizon = at // self._slice_s - self.KEPT
        slices = self.slices
        while slices and (oldest := next(iter(slices))) <= horizon:
            self.used -= slices.pop(oldest)
        self._replace(slices)

    def _replace(self, slices: dict[float, float]) -> None:
        self.slices = slices
        if slices:
            self._expires = self._expiry(next(iter(slices)))
        else:
            self._expires = math.inf
            self.used = 0.0  # what rounding left

    def _expiry(self, number: float) -> float:
        return (number + self.KEPT) * self._slice_s

    def take(self, need: float, at: float) -> float:
        number = at // self._slice_s
        slices = self.slices
        self.used += need
        self.in_flight += need
        self.reserved += need
        if number in slices:
            slices[number] += need
        else:
            slices[number] = need
            if len(slices) == 1:
                self._expires = self._expiry(number)
        return number

    def settle(self, mark: float, need: float, spent: float) -> None:
        self.in_flight -= need
        before = self.slices.get(mark)
        if spent != need and before is not None:
            after = max(before + spent - need, 0.0)
            self.slices[mark] = after
            self.used += after - before

    def until_s(self, need: float, at: float) -> float:
        left = self.capacity - self.used
        expires = at
        for number, spent in self.slices.items():
            left += spent
            expires = self._expiry(number)
            if left + self.slack >= need:
                break
        return max(expires - at, 0.0)

    def set_available(self, target: float, reset_s: float | None, at: float) -> None:
        extra = self.capacity - target - self.used
        if extra > 0:
            self._charge(extra, reset_s, at)
        else:
            self._forget(-extra)

    def _charge(self, extra: float, reset_s: float | None, at: float) -> None:
        """Somebody else spent it: as long ago as its announced end says, else just now."""
        number = newest = at // self._slice_s
        if reset_s is not None and 0 <= reset_s < self.period_s:
            ends = math.ceil((at + reset_s) / self._slice_s) - self.KEPT
            number = min(max(ends, newest - self.KEPT + 1), newest)
        self.used += extra
        merged = {**self.slices, number: self.slices.get(number, 0.0) + extra}
        self._replace(dict(sorted(merged.items())))

    def _forget(self, surplus: float) -> None:
        slices = self.slices
        while surplus > 0 and slices:
            oldest = next(iter(slices))
            gone = min(surplus, slices[oldest])
            surplus -= gone
            self.used -= gone
            slices[oldest] -= gone
            if slices[oldest] <= 0:
                del slices[oldest]
        self._replace(slices)

    def whole_s(self, at: float) -> float:
        if not self.slices:
            return 0.0
        return max(self._expiry(next(reversed(self.slices))) - at, 0.0)

    def save(self, at: float, ahead_s: float) -> Saved:
        self.available(at)
        ends = ((number + 1) * self._slice_s + ahead_s for number in self.slices)
        return Saved(slices=tuple(zip(ends, self.slices.values(), strict=True)))

    def load(self, saved: Saved, at: float, ahead_s: float) -> None:
        slices: dict[float, float] = {}
        for end, spent in saved.slices:
            number = min(end - ahead_s, at) // self._slice_s
            slices[number] = slices.get(number, 0.0) + spent
        self.used = math.fsum(slices.values())
        self._replace(slices)
        self.available(at)


class Bucket(Meter):
    """Refills evenly up to the capacity. No windows, so no marks."""

    __slots__ = ("level", "rate", "refilled")

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self.level = self.capacity
        self.rate = self.capacity / self.period_s
        self.refilled = -math.inf

    def available(self, at: float) -> float:
        if at > self.refilled:
            if self.level < self.capacity:
                self.level = min(self.level + (at - self.refilled) * self.rate, self.capacity)
            self.refilled = at
        return self.level - self.in_flight

    def take(self, need: float, at: float) -> float:  # noqa: ARG002
        self.in_flight += need
        self.reserved += need
        return 0.0

    def settle(self, mark: float, need: float, spent: float) -> None:  # noqa: ARG002
        self.in_flight -= need
        self.level -= spent

    def until_s(self, need: float, at: float) -> float:  # noqa: ARG002
        # As if all that is in flight ended now, as estimated; when it ends nobody knows.
        return (need - self.level + self.in_flight) / self.rate

    def set_available(self, target: float, reset_s: float | None, at: float) -> None:  # noqa: ARG002
        self.level = min(target + self.in_flight, self.capacity)

    def resize(self, stated: float) -> None:
        before = self.capacity
        super().resize(stated)
        self.rate = self.capacity / self.period_s
        self.level -= max(before - self.capacity, 0.0)

    def whole_s(self, at: float) -> float:
        return max(self.capacity - self.available(at), 0.0) / self.rate

    def save(self, at: float, ahead_s: float) -> Saved:
        return Saved(level=self.available(at), at=at + ahead_s)

    def load(self, saved: Saved, at: float, ahead_s: float) -> None:
        passed_s = max(at + ahead_s - saved.at, 0.0)
        self.level = min(saved.level + passed_s * self.rate, self.capacity)
        self.refilled = at


def meter_for(limit: Limit) -> Meter:
    """The meter a limit needs. ValueError if its ``resets`` makes no sense or its amount is not positive."""
    if not 0 < limit.amount < math.inf:
        raise ValueError(f"a limit must be above zero, not {limit.amount:g}")
    if limit.resets != "rolling":
        return Window(limit, calendar(limit))
    return Bucket(limit) if limit.unit == "tokens" else Sliding(limit)
