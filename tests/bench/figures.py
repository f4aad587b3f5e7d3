"""The rows of the table: which figure of which scenario, what is better, and the goal it is held against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.bench.relaying import EVENTS, READS
from tests.bench.scenarios import RECOVERY, Figures
from tests.bench.targets import CHAT, SPOKEN

DIRECT = "direct"
FLAT = 1.5  # times the figure at the smallest size that still counts as not growing

Samples = Mapping[str, Mapping[str, Sequence[Figures]]]  # scenario -> target -> rounds, in order


@dataclass(frozen=True)
class Goal:
    """A bound on routerd's figure."""

    sign: Literal["<=", ">="]
    bound: float

    def met(self, value: float) -> bool:
        return value <= self.bound if self.sign == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.sign == '<=' else '≥'} {self.bound:,g}"


@dataclass(frozen=True)
class Row:
    """One line of the table. ``over``: subtract the same figure of ``direct`` in that scenario, round by round."""

    title: str
    scenario: str
    figure: str
    goal: Goal | None = None
    over: str = ""

    def rounds(self, samples: Samples, target: str) -> list[float]:
        """The figure of each round; empty where the target has none."""
        own = [figures.get(self.figure) for figures in samples.get(self.scenario, {}).get(target, ())]
        if not self.over:
            return [value for value in own if value is not None]
        base = [figures.get(self.figure) for figures in samples.get(self.over, {}).get(DIRECT, ())]
        pairs = zip(own, base, strict=False)
        return [value - less for value, less in pairs if value is not None and less is not None and target != DIRECT]

    def median(self, samples: Samples, target: str) -> float | None:
        values = self.rounds(samples, target)
        return statistics.median(values) if values else None

    def spread_percent(self, samples: Samples, target: str) -> float | None:
        """Half the distance between the best and the worst round, in percent of the median."""
        values = self.rounds(samples, target)
        middle = statistics.median(values) if values else 0.0
        return 50 * (max(values) - min(values)) / abs(middle) if len(values) > 1 and middle else None


def at_most(bound: float) -> Goal:
    return Goal("<=", bound)


def at_least(bound: float) -> Goal:
    return Goal(">=", bound)


def added(title: str, scenario: str, goal: Goal | None = None, *, part: str = "p50", over: str = "") -> Row:
    return Row(f"{title}: added {part}, ms", scenario, f"answer_{part}_ms", goal, over or scenario)


def requests(connections: int, cpu_goal: Goal | None = None) -> list[Row]:
    name, title = f"c{connections}", f"{connections} connection{'s' * (connections > 1)}"
    return [
        Row(f"{title}: requests/s", name, "requests_per_s"),
        Row(f"{title}: CPU µs per request", name, "cpu_us_per_request", cpu_goal),
    ]


def slow_streams(name: str, title: str, cpu: Goal | None, first: Goal | None) -> list[Row]:
    return [
        Row(f"{title}: CPU µs per event, opening included", name, "cpu_us_per_event", cpu),
        Row(f"{title}: first event p99, ms", name, "first_p99_ms", first),
        Row(f"{title}: transit p99, ms", name, "transit_p99_ms"),
        Row(f"{title}: PSS kB per open stream", name, "pss_kb_per_stream", at_most(30)),
        Row(f"{title}: errors", name, "errors", at_most(0)),
    ]


def through_front(way: str, title: str) -> list[Row]:
    return [
        added(title, f"{way}_c1", over="hop_c1"),
        Row(f"{title}: CPU µs per request, 16 connections", f"{way}_c16", "cpu_us_per_request"),
    ]


def crossing(down: str, up: str) -> list[Row]:
    """Streams that come in one dialect and leave in another; beside them those that leave as they came."""
    title = f"{up} upstream, {down} client" if down != up else f"{up}, as it comes"
    goal = at_least(25_000) if down != up else None
    fast = f"fast_{down}_{up}" if (down, up) != (CHAT, CHAT) else "coalesced"
    added_ms = f"{title}: added to the first event p50, ms"
    return [
        Row(f"{title}: events per CPU-second", fast, "events_per_cpu_s", goal),
        Row(added_ms, f"first_{down}_{up}", "first_p50_ms", over=f"first_{up}_{up}"),
    ]


def recovering() -> list[Row]:
    """What recovery costs a stream that needs none."""
    title = "recovery, healthy streams"
    relayed = [(name, reads) for name in SPOKEN for reads in READS]
    return [
        Row(f"{title}, 16 fast: CPU added, %", RECOVERY, "fast_percent", at_most(5)),
        Row(f"{title}, 60 slow: CPU added, %", RECOVERY, "slow_percent", at_most(5)),
        Row(f"{title}, 60 slow: transit p50 added, ms", RECOVERY, "late_ms", at_most(0.05)),
        Row("20 tools offered, 16 fast streams: CPU added, %", RECOVERY, "tools_percent"),
        *(
            Row(f"recovery, {name}, {READS[reads]} a read: own µs per event", f"relay_{name}_{reads}", "us")
            for name, reads in relayed
        ),
        *(
            Row(
                f"recovery, {name}, {READS[reads]} a read: of {EVENTS} texts held",
                f"relay_{name}_{reads}",
                "held",
                at_most(0),
            )
            for name, reads in relayed
        ),
    ]


ROWS = [
    added("1 connection", "c1", at_most(0.35)),
    added("1 connection", "c1", at_most(0.8), part="p99"),
    *requests(1),
    *requests(16, at_most(190)),
    *requests(128),
    *slow_streams("events", "500 slow streams", at_most(55), at_most(20)),
    *slow_streams("events_5000", "5,000 slow streams", None, None),
    Row("16 fast streams, 16 events a write: events per CPU-second", "coalesced", "events_per_cpu_s", at_least(80_000)),
    Row("16 fast streams, 16 events a write: events/s", "coalesced", "events_per_s"),
    *(row for down in SPOKEN for up in SPOKEN for row in crossing(down, up)),
    *recovering(),
    added("100 kB body", "body_100k"),
    added("1 MB body", "body_1m", at_most(3)),
    *through_front("hop", "plain upstream"),
    *through_front("tls", "TLS upstream"),
    Row("cold start to the first proxied 200, s", "cold", "start_s", at_most(0.6)),
    Row("idle PSS, MB", "cold", "idle_pss_mb", at_most(45)),
]
SIZES = (3, 30, 300, 3000)
SERVED = {"few": "3 of them serve the model", "all": "all serve it"}


def planning_rows(samples: Samples) -> list[Row]:
    """Planning must be quick, and for a model of few upstreams not grow with the others."""
    smallest = Row("", f"plan_few_{SIZES[0]}", "plan_us").median(samples, "routerd")
    bound = at_most(30 if smallest is None else round(min(30, FLAT * smallest), 1))
    return [
        Row(
            f"planning, {size} upstreams, {title}: µs",
            f"plan_{name}_{size}",
            "plan_us",
            bound if name == "few" else None,
        )
        for name, title in SERVED.items()
        for size in SIZES
    ]
