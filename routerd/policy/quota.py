"""How much of each limit is left: one ``Quota`` per provider and key, a ledger over any number of limits.

Rules
-----
* **Reserve, then settle.** An attempt reserves its estimate before it leaves and is corrected to the real usage
  afterwards, exactly once. What is in flight counts as spent. All or nothing: a reservation takes from every limit
  that matches its model, or from none.
* **The upstream's word corrects the ledger, downward at once and upward only on evidence.** A stated ``remaining``
  below ours lowers ours. Above ours it is believed only when it speaks of the same limit (same amount), and after
  taking off everything of ours that the upstream may not have counted yet.
* **A restart forgets nothing that matters.** Limits longer than a minute, and all dollars, go to disk as whole states
  in which reservations in flight are spent already.

Learned limits and blocks
-------------------------
A limit that the upstream states but nobody configured becomes a learned meter for that model: a window that ends when
the upstream said, renewed by every statement. A refusal that states no limit at all becomes a *block*: until the
stated time, else up a ladder. A statement is never shortened by a guess, and one burst of refusals climbs one rung,
because the others were under way before the first was heard.

What is ugly
------------
A meter is shared by all models its glob names, whatever the upstream does: one that counts per model needs one limit
per model. And ``rows`` writes a meter whole each time, though mostly one number in it has changed: that way no write
depends on another having succeeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

from routerd.canonical import Limit, LimitReport, Period, Unit
from routerd.policy.meters import GUARD_S, PERIOD_S, WALL, Amount, Bucket, Learned, Meter, Saved, Take, meter_for

MAX_MODELS = 1024  # models whose matching limits are remembered; above it they are matched anew
MAX_LEARNED = 64  # limits learned from one key's headers; the oldest is forgotten
MAX_BLOCKS = 1024  # models refused at the same time; the one that ends first is forgotten
MAX_BLOCK_S = PERIOD_S["month"]  # no statement of an upstream closes anything for longer

Reason = Literal["rate_limited", "exhausted"]
ACCOUNT = "*"  # the block that stands for every model of the key

# Seconds to wait after the first, second, ... refusal that states no time. None is the next wall-clock minute but not
# sooner than MINUTE_STEP_MIN_S: most unstated limits are per minute, and shorter ladders end before one is over.
RATE_LIMITED_LADDER_S: tuple[float | None, ...] = (1.0, 2.0, None, 30.0, 60.0)
MINUTE_STEP_MIN_S = 15.0
EXHAUSTED_FIRST_S, EXHAUSTED_MAX_S = 3600.0, 86_400.0  # doubles in between
JITTER = 0.2  # of a guessed wait, either way
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Saved).decode


class LimitStatus(msgspec.Struct, frozen=True):
    """One limit as metrics and the status page show it. ``reset_wall``: Unix seconds when it is whole again."""

    name: str
    unit: Unit
    limit: float
    remaining: float
    reset_wall: float


class Reservation:
    """What an attempt holds while in flight: from which meters, how much, and in which window of each."""

    __slots__ = ("amount", "at", "model", "open", "takes")

    def __init__(self, model: str, amount: Amount, at: float, takes: Sequence[Take]) -> None:
        self.model = model
        self.amount = amount
        self.at = at
        self.takes = takes
        self.open = True

    def __repr__(self) -> str:
        return f"<Reservation {self.model} {'open' if self.open else 'closed'} on {len(self.takes)} limits>"

    def close(self) -> Sequence[Take]:
        """End it; a second end is a bug of the caller and would falsify the ledger."""
        if not self.open:
            raise RuntimeError(f"{self!r} was already settled or released")
        self.open = False
        return self.takes

    def take_from(self, meter: Meter) -> Take | None:
        """What it took from ``meter``; once closed, nothing of that is in flight any more."""
        for take in self.takes:
            if take[0] is meter:
                return take if self.open else (meter, 0.0, take[2], take[3])
        return None


# --- blocks ---------------------------------------------------------------------------------------------------------


class Block:
    """Closed for one reason until a time that was stated or guessed."""

    __slots__ = ("since", "stated", "strikes", "until")

    def __init__(self) -> None:
        self.until = -math.inf
        self.since = -math.inf
        self.stated = False
        self.strikes = 0

    def __repr__(self) -> str:
        return f"<Block until {self.until:.1f} {'stated' if self.stated else f'guess {self.strikes}'}>"

    def state(self, until: float, now: float) -> None:
        """The upstream says when. It outweighs a guess; of two statements the longer stands."""
        if not (self.stated and self.until > now):
            self.since = now
        elif until < self.until:
            return
        self.until = min(until, now + MAX_BLOCK_S)
        self.stated = True

    def guess(self, wait_s: float, now: float) -> None:
        self.until = now + wait_s
        self.since = now
        self.stated = False
        self.strikes += 1

    def clear(self, now: float) -> None:
        self.strikes = 0
        if not self.stated or self.until <= now:
            self.until = -math.inf

    def doubt(self, now: float) -> bool:
        """End a guess, so that it can be tested; being wrong about it makes the next one no longer."""
        if self.stated or self.until <= now:
            return False
        self.until = now
        self.strikes -= 1
        return True


def guess_s(reason: Reason, strikes: int, wall: float, draw: float) -> float:
    """Seconds to stay away after ``strikes`` earlier refusals in a row that stated no time."""
    spread = 1.0 + JITTER * (2.0 * draw - 1.0)
    if reason == "exhausted":
        return min(EXHAUSTED_FIRST_S * 2.0 ** min(strikes, 16), EXHAUSTED_MAX_S) * spread
    step = RATE_LIMITED_LADDER_S[min(strikes, len(RATE_LIMITED_LADDER_S) - 1)]
    if step is not None:
        return step * spread
    to_minute_s = 60.0 - wall % 60.0
    if to_minute_s < MINUTE_STEP_MIN_S:
        to_minute_s += 60.0
    return to_minute_s * (1.0 + JITTER * draw)  # only later: before the minute is over nothing has changed


# --- the ledger -----------------------------------------------------------------------------------------------------


class Lane:
    """What concerns one model: the meters that match it, and until when it is blocked."""

    __slots__ = ("blocked_until", "meters", "persistent")

    def __init__(self, meters: tuple[Meter, ...], blocked_until: float) -> None:
        self.meters = meters
        self.blocked_until = blocked_until
        self.persistent = any(meter.persistent for meter in meters)


class Quota:
    """The limits of one provider and key. ``model`` is always the provider's own name for it.

    ``now`` is monotonic, ``wall`` Unix seconds. ``previous`` hands over a ledger when the configuration is replaced:
    limits that stayed the same keep their meters, and with them what is in flight; changed ones keep what was spent.
    ValueError if a limit cannot be metered.
    """

    def __init__(
        self,
        limits: Sequence[Limit],
        *,
        previous: Quota | None = None,
        now: float = 0.0,
        wall: float = 0.0,
    ) -> None:
        self._meters: dict[str, Meter] = {}
        for meter in map(meter_for, limits):
            twin = self._meters.get(meter.key)
            if twin is None or meter.capacity < twin.capacity:
                self._meters[meter.key] = meter
        self._learned: dict[tuple[Unit, Period, str], Learned] = {}
        self._blocks: dict[tuple[str, Reason], Block] = {}
        self._lanes: dict[str, Lane] = {}
        if previous is not None:
            self._inherit(previous, (now, wall))
        self._idle = not (self._meters or self._learned or self._blocks)

    def __repr__(self) -> str:
        return f"<Quota {list(self._meters.values())}, {len(self._learned)} learned, {len(self._blocks)} blocks>"

    def _inherit(self, previous: Quota, times: tuple[float, float]) -> None:
        self._learned = previous._learned
        self._blocks = previous._blocks
        for key, meter in self._meters.items():
            old = previous._meters.get(key)
            if old is None:
                continue
            if old.limit == meter.limit:
                self._meters[key] = old
            else:
                at = times[meter.clock]
                meter.load(old.save(at, times[WALL] - at), at, times[WALL] - at)

    # Admission

    def wait_s(self, model: str, amount: Amount, now: float, wall: float) -> float:
        """0: admissible now. Seconds until it will be. Infinity: more than a limit can ever hold."""
        if self._idle:
            return 0.0
        lane = self._lanes.get(model) or self._lane(model)
        longest = max(lane.blocked_until - now, 0.0)
        times = (now, wall)
        for meter in lane.meters:
            need = meter.amount_of(amount)
            at = times[meter.clock]
            if need and need > meter.available(at):
                longest = max(longest, meter.wait_s(need, at))
        return longest

    def reserve(self, model: str, amount: Amount, now: float, wall: float) -> Reservation | None:
        """Take ``amount`` from every limit that matches, or None and nothing is taken."""
        if self._idle:
            return Reservation(model, amount, now, ())
        lane = self._lanes.get(model) or self._lane(model)
        if lane.blocked_until > now:
            return None
        times = (now, wall)
        for meter in lane.meters:
            need = meter.amount_of(amount)
            # A meter in debt does not stop what takes nothing from it: a free model passes an empty dollar budget.
            if need > meter.available(times[meter.clock]) + meter.slack and need:
                return None
        takes = []
        for meter in lane.meters:
            need = meter.amount_of(amount)
            takes.append((meter, need, meter.take(need, times[meter.clock]), meter.reserved))
        return Reservation(model, amount, now, takes)

    def settle(self, reservation: Reservation, actual: Amount, now: float, wall: float) -> None:
        """Replace the estimate by what was really used, more or less. RuntimeError if it was ended before."""
        times = (now, wall)
        for take in reservation.close():
            meter, need, mark, _ = take
            meter.available(times[meter.clock])
            meter.settle(mark, need, meter.spent(take, actual))

    def release(self, reservation: Reservation, now: float, wall: float) -> None:
        """Give it all back: nothing was spent."""
        self.settle(reservation, Amount(requests=0.0), now, wall)

    def headroom(self, model: str, now: float, wall: float) -> float:
        """The smallest remaining share among the limits that match, 0 to 1; 0 while blocked."""
        if self._idle:
            return 1.0
        lane = self._lanes.get(model) or self._lane(model)
        if lane.blocked_until > now:
            return 0.0
        share = 1.0
        for meter in lane.meters:
            share = min(share, meter.available(wall if meter.clock else now) / meter.capacity)
        return max(share, 0.0)

    def _lane(self, model: str) -> Lane:
        if len(self._lanes) >= MAX_MODELS:
            self._lanes.clear()
        configured = [meter for meter in self._meters.values() if fnmatchcase(model, meter.limit.models)]
        learned = [meter for (_, _, name), meter in self._learned.items() if name == model]
        lane = self._lanes[model] = Lane((*configured, *learned), self._blocked_until(model))
        return lane

    # What the upstream says

    def reconcile(
        self,
        reports: Iterable[LimitReport],
        model: str,
        now: float,
        wall: float,
        *,
        reservation: Reservation | None = None,
    ) -> None:
        """Correct the ledger by headers or an error body.

        ``reservation`` is the one whose answer this is, open or ended: it tells which of ours had left by then. A
        statement about an earlier window than the current one changes nothing.
        """
        for report in reports:
            meter = self._reported(report, model)
            if meter is None:
                continue
            at = wall if meter.clock else now
            take = reservation.take_from(meter) if reservation is not None else None
            meter.available(at)
            if take is None or meter.is_current(take[2]):
                meter.hear(report, take, at)

    def _reported(self, report: LimitReport, model: str) -> Meter | None:
        """The meter a statement is about, learned if need be; None if it says too little."""
        lane = self._lanes.get(model) or self._lane(model)
        candidates = [
            meter for meter in lane.meters if meter.limit.unit == report.unit and report.per in (None, meter.limit.per)
        ]
        if candidates:
            return min(candidates, key=lambda meter: _misfit(meter, report))
        if report.limit is None or not 0 < report.limit < math.inf:
            return None
        return self._learn(report.unit, report.per or _period_of(report.reset_s), report.limit, model)

    def _learn(self, unit: Unit, per: Period, amount: float, model: str) -> Learned:
        if len(self._learned) >= MAX_LEARNED:
            oldest = next(iter(self._learned))
            del self._learned[oldest]
            self._lanes.pop(oldest[2], None)
        meter = Learned(Limit(amount, unit, per, models=model))
        self._learned[unit, per, model] = meter
        self._lanes.pop(model, None)
        self._idle = False
        return meter

    # Refusals

    def block(
        self,
        model: str,
        reason: Reason,
        now: float,
        wall: float,
        *,
        until_now: float | None = None,
        per: Period | None = None,
        account_wide: bool = False,
        draw: float = 0.5,
    ) -> float:
        """The upstream refused. Returns the monotonic time until which ``model`` (or the whole key) is closed.

        ``until_now``: the stated time on the monotonic clock. ``per``: the window that was named as used up; it is
        closed until its own reset. With neither, an exhausted model waits for a long window that the ledger knows to
        be empty. Otherwise both reasons climb a ladder that a success resets.
        """
        if until_now is None and reason == "exhausted":
            reset_s = self._close_windows(model, per, now, wall)
            if reset_s > 0:
                return now + reset_s
        block = self._block(ACCOUNT if account_wide else model, reason)
        if until_now is not None:
            block.state(until_now, now)
        elif block.until <= now:
            block.guess(guess_s(reason, block.strikes, wall, draw), now)
        self._blocks_changed(model, account_wide=account_wide)
        return self._blocked_until(model)

    def clear(self, model: str, now: float, *, since: float | None = None) -> None:
        """A success: what was guessed ends, what was stated stays.

        ``since`` is when the successful attempt left: it proves nothing against a refusal heard after that.
        """
        if not self._blocks:
            return
        for scope in (model, ACCOUNT):
            for reason in ("rate_limited", "exhausted"):
                block = self._blocks.get((scope, reason))
                if block is not None and (since is None or block.since <= since):
                    block.clear(now)
        self._blocks_changed(model, account_wide=True)

    def doubt(self, model: str, now: float) -> bool:
        """End what is only guessed, where nobody else is left to ask. True if there was anything to end."""
        ended = [block.doubt(now) for (scope, _), block in self._blocks.items() if scope in (model, ACCOUNT)]
        if any(ended):
            self._blocks_changed(model, account_wide=True)
        return any(ended)

    def _block(self, scope: str, reason: Reason) -> Block:
        block = self._blocks.get((scope, reason))
        if block is None:
            if len(self._blocks) >= MAX_BLOCKS:
                first = min(self._blocks, key=lambda key: self._blocks[key].until)
                del self._blocks[first]
                self._blocks_changed(first[0], account_wide=first[0] == ACCOUNT)
            block = self._blocks[scope, reason] = Block()
            self._idle = False
        return block

    def _close_windows(self, model: str, per: Period | None, now: float, wall: float) -> float:
        """Close the long windows that are, or are said to be, used up. Seconds until the last opens; 0: none is."""
        lane = self._lanes.get(model) or self._lane(model)
        reset_s = 0.0
        for meter in lane.meters:
            if meter.limit.unit == "usd" or meter.limit.per == "minute" or isinstance(meter, Bucket):
                continue
            at = wall if meter.clock else now
            if meter.limit.per == per or meter.available(at) < 1.0:
                meter.close(at)
                reset_s = max(reset_s, meter.until_s(1.0, at))
        return reset_s

    def _blocked_until(self, model: str) -> float:
        keys: tuple[tuple[str, Reason], ...] = (
            (model, "rate_limited"),
            (model, "exhausted"),
            (ACCOUNT, "rate_limited"),
            (ACCOUNT, "exhausted"),
        )
        return max((self._blocks[key].until for key in keys if key in self._blocks), default=-math.inf)

    def _blocks_changed(self, model: str, *, account_wide: bool) -> None:
        for name in list(self._lanes) if account_wide else [model]:
            lane = self._lanes.get(name)
            if lane is not None:
                lane.blocked_until = self._blocked_until(name)

    # What is shown and what is kept

    def status(self, now: float, wall: float, model: str | None = None) -> list[LimitStatus]:
        """Every limit, or those that match ``model``."""
        meters: Iterable[Meter] = (*self._meters.values(), *self._learned.values())
        if model is not None:
            meters = (self._lanes.get(model) or self._lane(model)).meters
        return [_status(meter, wall if meter.clock else now, wall) for meter in meters]

    def persistent(self, model: str) -> bool:
        """True if a reservation for ``model`` must be on disk before the request leaves."""
        if self._idle:
            return False
        return (self._lanes.get(model) or self._lane(model)).persistent

    def rows(self, now: float, wall: float, reservation: Reservation | None = None) -> list[tuple[str, bytes]]:
        """(key, value) of what must outlive the process: all of it, or the meters ``reservation`` took from.

        Each value is a meter's whole state, reservations in flight as spent, so a later row replaces an earlier one.
        """
        if reservation is not None:
            taken = (take[0] for take in reservation.takes)
            return [_row(meter, now, wall) for meter in taken if meter.persistent]
        rows = [_row(meter, now, wall) for meter in self._meters.values() if meter.persistent]
        for (scope, reason), block in self._blocks.items():
            if reason == "exhausted":
                end = max(block.until - now, 0.0) + wall
                saved = Saved(end=end, strikes=block.strikes, stated=block.stated)
                rows.append((f"exhausted {scope}", _encode(saved)))
        return rows

    def restore(self, rows: Mapping[str, bytes], now: float, wall: float) -> list[str]:
        """Take up what ``rows`` wrote. Returns the keys that could not be read; limits no longer configured are not
        among them, they are passed over.
        """
        unreadable = []
        for key, value in rows.items():
            try:
                saved = _decode(value)
            except msgspec.DecodeError:
                unreadable.append(key)
                continue
            meter = self._meters.get(key)
            if meter is not None:
                at = wall if meter.clock else now
                meter.load(saved, at, wall - at)
            elif key.startswith("exhausted ") and saved.end > wall:
                self._restore_block(key.removeprefix("exhausted "), saved, now, wall)
        return unreadable

    def _restore_block(self, scope: str, saved: Saved, now: float, wall: float) -> None:
        block = self._block(scope, "exhausted")
        block.until = now + min(saved.end - wall, MAX_BLOCK_S)
        block.since = now
        block.stated = saved.stated
        block.strikes = saved.strikes
        self._blocks_changed(scope, account_wide=True)


def _status(meter: Meter, at: float, wall: float) -> LimitStatus:
    remaining = max(meter.available(at), 0.0)
    return LimitStatus(meter.limit.name, meter.limit.unit, meter.capacity, remaining, wall + meter.whole_s(at))


def _row(meter: Meter, now: float, wall: float) -> tuple[str, bytes]:
    at = wall if meter.clock else now
    return meter.key, _encode(meter.save(at, wall - at))


def _misfit(meter: Meter, report: LimitReport) -> tuple[bool, bool, float]:
    """Least for the meter a statement without a clear address is about.

    The one of that amount; else the shortest that can take as long to reset as stated; else the shortest, since what
    is wrongly taken from it comes back soonest.
    """
    other_amount = report.limit is None or abs(report.limit - meter.limit.amount) > meter.slack
    too_short = report.reset_s is not None and report.reset_s > meter.period_s + GUARD_S
    return other_amount, too_short, meter.period_s


def _period_of(reset_s: float | None) -> Period:
    for period, period_s in PERIOD_S.items():
        if reset_s is None or reset_s <= period_s:
            return period
    return "month"
