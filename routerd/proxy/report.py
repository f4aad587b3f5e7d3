"""What a drill has shown, in figures. Nothing here does anything: what was heard goes in, the report comes out.

The added seconds of a turn in which something went wrong are those beyond the median of the turns of its kind in which
nothing did.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import msgspec

from routerd.proxy.laws import Verdict
from routerd.proxy.spending import Spending
from routerd.proxy.stage import Done
from routerd.proxy.tasks import TURNS

WATCHDOGS = 2  # a turn may wait for so many: that of the faulty upstream, and on a busy machine one more
SPARE_S = 3.0  # what its recovery may take beyond that
BROKEN_MAX = 50  # sentences about what went wrong
TAIL_BYTES = 400  # of an answer in them


class Share(msgspec.Struct):
    """Turns delivered, of those that the tasks have."""

    delivered: int = 0
    of: int = 0

    def add(self, done: Sequence[Done]) -> None:
        """One task's. Turns behind one that was lost are lost with it."""
        self.delivered += sum(turn.verdict.delivered for turn in done)
        self.of += TURNS


class Added(msgspec.Struct, frozen=True):
    """Seconds that a fault adds to a turn."""

    median_s: float = 0.0
    p99_s: float = 0.0
    worst_s: float = 0.0


class Row(msgspec.Struct):
    """One fault, at all its places. ``ways``: by delivery and whether it streams; ``direct``: without routerd."""

    fault: str
    ways: dict[str, Share]
    direct: Share
    added: Added = Added()


class Invariant(msgspec.Struct, frozen=True):
    """Something that has to hold, and the figure that shows it. ``direct``: the figure without routerd, if any."""

    name: str
    figure: str
    held: bool
    direct: str = ""


class Report(msgspec.Struct):
    """What came of a drill. ``broken``: what each answer looked like that should not have been."""

    seed: int
    dialects: tuple[str, ...]
    tasks: int
    limit_s: float
    seconds: float
    rows: list[Row]
    invariants: list[Invariant]
    broken: list[str]

    @property
    def held(self) -> bool:
        return all(invariant.held for invariant in self.invariants)


class Leftovers(msgspec.Struct):
    """What was still there when all was over. ``unfinished``: exchanges, and reservations at upstreams."""

    tasks: int = 0
    connections: int = 0
    unfinished: int = 0


class Tally(msgspec.Struct):
    """What is added up on the way."""

    routed: list[list[Done]] = []
    direct: list[list[Done]] = []
    attempts: int = 0  # and exchanges
    unsettled: int = 0
    left: Leftovers = msgspec.field(default_factory=Leftovers)
    limit_s: float = 0.0  # of the watchdogs
    seconds: float = 0.0


# --- the whole ------------------------------------------------------------------------------------------------------


def report(seed: int, dialects: tuple[str, ...], tally: Tally, spent: Spending) -> Report:
    """All of it. What the part about money has left unsettled counts with the rest."""
    tally.unsettled += spent.unsettled
    tally.left.unfinished += spent.leaked
    rows = _rows(tally)
    worst_s = max((row.added.worst_s for row in rows), default=0.0)
    done = [turn for task in tally.routed for turn in task]
    broken = [_sentence(turn) for turn in done if not (turn.verdict.delivered and turn.verdict.honest)]
    invariants = [*delivery(tally.routed, tally.direct), *spending(spent), *order(tally, worst_s)]
    return Report(
        seed, dialects, len(tally.routed), tally.limit_s, tally.seconds, rows, invariants, broken[:BROKEN_MAX]
    )


def _share(tasks: Sequence[Sequence[Done]]) -> Share:
    share = Share()
    for task in tasks:
        share.add(task)
    return share


def _rows(tally: Tally) -> list[Row]:
    """By fault, in the order of the tasks."""
    rows: dict[str, Row] = {}
    added = _added(tally.routed)
    for task in sorted(tally.routed, key=lambda task: task[0].case.number):
        case = task[0].case
        row = rows.setdefault(case.trouble.name, Row(case.trouble.name, {}, Share()))
        row.ways.setdefault(way_name(case.delivery, stream=case.stream), Share()).add(task)
    for task in tally.direct:
        rows[task[0].case.trouble.name].direct.add(task)
    for name, row in rows.items():
        row.added = _figures(added[name])
    return list(rows.values())


def way_name(delivery: str, *, stream: bool) -> str:
    return f"{delivery} stream" if stream else delivery


def _added(routed: Sequence[Sequence[Done]]) -> dict[str, list[float]]:
    """Seconds by fault, of the turns that were struck."""
    usual: defaultdict[tuple[object, ...], list[float]] = defaultdict(list)
    for turn in (turn for task in routed for turn in task if not turn.struck):
        usual[_kind_of(turn)].append(turn.seconds)
    medians = {kind: statistics.median(seconds) for kind, seconds in usual.items()}
    added: defaultdict[str, list[float]] = defaultdict(list)
    for turn in (turn for task in routed for turn in task if turn.struck):
        added[turn.case.trouble.name].append(max(0.0, turn.seconds - medians.get(_kind_of(turn), 0.0)))
    return added


def _kind_of(turn: Done) -> tuple[object, ...]:
    return turn.case.dialect, turn.case.delivery, turn.case.stream, turn.turn


def _figures(seconds: Sequence[float]) -> Added:
    if not seconds:
        return Added()
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    return Added(round(statistics.median(ordered), 3), round(p99, 3), round(ordered[-1], 3))


# --- invariants -----------------------------------------------------------------------------------------------------


def delivery(routed: Sequence[Sequence[Done]], direct: Sequence[Sequence[Done]]) -> Iterator[Invariant]:
    """The first promise: no turn is lost, and none is corrupted. The same figures for those who had no router."""
    turns, without = _share(routed), _share(direct)
    figure, direct_figure = (f"{share.delivered:,} of {share.of:,}" for share in (turns, without))
    yield Invariant("turns delivered", figure, turns.delivered == turns.of, direct_figure)
    for name, count in WRONGS.items():
        wrongs, wrongs_direct = (
            sum(count(turn.verdict) for task in tasks for turn in task) for tasks in (routed, direct)
        )
        yield Invariant(name, f"{wrongs:,}", not wrongs, f"{wrongs_direct:,}")


WRONGS: dict[str, Callable[[Verdict], int]] = {
    "bytes said twice": lambda verdict: verdict.duplicated_bytes,
    "calls lost": lambda verdict: verdict.calls_lost,
    "calls doubled": lambda verdict: verdict.calls_doubled,
    "calls said by half": lambda verdict: verdict.calls_half,
    "answers corrupted": lambda verdict: verdict.corrupted,
    "ends invented": lambda verdict: verdict.invented_end,
}


def spending(spent: Spending) -> Iterator[Invariant]:
    """The second: nothing beyond what was allowed."""
    yield Invariant(
        "daily window",
        f"{spent.sent} of {spent.window} requests sent, {spent.window_delivered} of {spent.asked} answered",
        spent.sent <= spent.window and spent.window_delivered == spent.asked,
    )
    yield Invariant(
        "budget",
        f"{spent.billed_usd:.4f} of {spent.budget_usd:g} USD, {spent.told} of {spent.asked} told to come back",
        spent.billed_usd <= spent.budget_usd and spent.told > 0 and not spent.dishonest,
    )


def order(tally: Tally, worst_s: float) -> Iterator[Invariant]:
    """And the house is in order."""
    limit_s = WATCHDOGS * tally.limit_s + SPARE_S
    yield Invariant("slowest recovery", f"{worst_s:.2f} s added, limit {limit_s:g} s", worst_s <= limit_s)
    yield Invariant(
        "settled exactly once",
        f"{tally.attempts - tally.unsettled:,} of {tally.attempts:,} exchanges and attempts",
        not tally.unsettled,
    )
    left = tally.left
    figure = f"{left.tasks} tasks, {left.connections} connections, {left.unfinished} exchanges or reservations"
    yield Invariant("left behind", figure, not (left.tasks or left.connections or left.unfinished))


def _sentence(turn: Done) -> str:
    """What happened to one answer. Its words are the drill's own."""
    verdict, heard = turn.verdict, turn.heard
    wrongs = [name for name in verdict.__struct_fields__ if name != "delivered" and getattr(verdict, name)]
    what = ", ".join(name.replace("_", " ") for name in wrongs) or "lost"
    torn = "" if heard.ended else ", torn"
    how = f"{heard.status}{torn}, {turn.seconds:.2f} s"
    return f"task {turn.case.number}: {turn.case}; turn {turn.turn}: {what} ({how}): {heard.data[-TAIL_BYTES:]!r}"
