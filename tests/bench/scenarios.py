"""What is measured: each scenario asks one thing of one server and gives the figures of one round.

A *steady* scenario runs over and over on servers that are up and warm. A *fresh* one starts the server for itself, for
memory that has been freed to a process's own heap would otherwise hide what the next run takes.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import time
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.bench.bodies import Body
from tests.bench.instruments import Instruments, Result, Shape, finish_load
from tests.bench.server import SMALL, Server
from tests.bench.targets import BARE, CHAT, SPOKEN

Way = Literal["plain", "hop", "tls"]
Figures = Mapping[str, float]  # of one round; names carry their unit

PSS_EVERY_S = 0.5
MANY_STREAMS = 5000
SETTLE_S = 1.0
STREAM_DEADLINE_S = 45.0  # an overloaded server is not waited for longer; what is open then counts as an error
WARM_UP = (SMALL, Body("warm", stream=True, events=64))


@dataclass(frozen=True)
class Scenario:
    """One way of asking. ``way``: what the servers stand in front of; ``fresh``: a new server for each run.

    ``of``: who is asked, if not everybody who takes such a request.
    """

    name: str
    body: Body
    shape: Shape
    way: Way = "plain"
    fresh: bool = False
    of: tuple[str, ...] = ()

    @property
    def streams(self) -> int:
        return self.shape.connections if self.body.stream else 0


COLD = Scenario("cold", SMALL, Shape(1), fresh=True)


def steady(seconds: float) -> list[Scenario]:
    """Closed loops of so many seconds."""
    fast = Body("fast", stream=True, events=1000)
    found = [Scenario(f"c{connections}", SMALL, Shape(connections, seconds)) for connections in (1, 16, 128)]
    found.append(Scenario("coalesced", fast, Shape(16, seconds)))
    for name, size in (("100k", 100_000), ("1m", 1_000_000)):
        found.append(Scenario(f"body_{name}", Body(name, extra_bytes=size), Shape(1, seconds)))
    ways: tuple[Way, ...] = ("hop", "tls")
    for way in ways:
        found += [Scenario(f"{way}_c{connections}", SMALL, Shape(connections, seconds), way) for connections in (1, 16)]
    return found


def crossing(seconds: float) -> list[Scenario]:
    """Streams between each two dialects, and of each as it comes: many fast ones, and one short one after the other."""
    found = []
    for down, up in itertools.product(SPOKEN, repeat=2):
        fast = Body(f"fast_{down}_{up}", stream=True, events=1000, dialect=down, upstream=up)
        short = Body(f"first_{down}_{up}", stream=True, events=4, burst=1, dialect=down, upstream=up)
        if (down, up) != (CHAT, CHAT):  # that one is ``coalesced``
            found.append(Scenario(fast.name, fast, Shape(16, seconds)))
        found.append(Scenario(short.name, short, Shape(1, seconds / 2)))
    return found


RECOVERY = "recovery"
TOOLS = 20
PAIRED = ("routerd", BARE.name)


def recovery(seconds: float) -> list[Scenario]:
    """Healthy streams with tools on offer, of a daemon with its recovery and of one without (``bare``)."""
    fast = Body("recovery_fast", stream=True, events=1000, tools=TOOLS)
    plain = Body("recovery_plain", stream=True, events=1000)
    slow = Body("recovery_slow", stream=True, events=int(50 * seconds), gap_ms=20, burst=1, tools=TOOLS)
    closed, ramped = Shape(16, seconds), Shape(60, ramp_ms=200, deadline_s=STREAM_DEADLINE_S)
    shapes = ((fast, closed), (plain, closed), (slow, ramped))
    return [Scenario(body.name, body, shape, of=PAIRED) for body, shape in shapes]


def recovery_figures(samples: Mapping[str, Mapping[str, Sequence[Figures]]]) -> list[Figures]:
    """What recovery adds, round by round: CPU per event in percent, and time on the way; and what the tools add."""

    def rounds(name: str, target: str = PAIRED[0]) -> Sequence[Figures]:
        return samples.get(f"recovery_{name}", {}).get(target, ())

    parts: tuple[list[Figures], ...] = (
        [{"fast_percent": more_percent(*two)} for two in zip(rounds("fast"), rounds("fast", BARE.name), strict=False)],
        [{"tools_percent": more_percent(*two)} for two in zip(rounds("fast"), rounds("plain"), strict=False)],
        [
            {"slow_percent": more_percent(ours, bare), "late_ms": ours["transit_p50_ms"] - bare["transit_p50_ms"]}
            for ours, bare in zip(rounds("slow"), rounds("slow", BARE.name), strict=False)
        ],
    )
    nothing: Figures = {}
    return [dict(ChainMap(*map(dict, each))) for each in itertools.zip_longest(*parts, fillvalue=nothing)]


def more_percent(one: Figures, other: Figures) -> float:
    return 100 * (one["cpu_us_per_event"] / other["cpu_us_per_event"] - 1)


def streams(open_s: float, most: int) -> list[Scenario]:
    """Slow streams that are all open together for ``open_s`` seconds; ``most`` is what the descriptors allow."""
    found = []
    for name, count, gap_ms, ramp_ms in (("events", 500, 50, 2000), ("events_5000", MANY_STREAMS, 500, 4000)):
        events = int((open_s * 1000 + ramp_ms) / gap_ms)
        body = Body(name, stream=True, events=events, gap_ms=gap_ms, burst=1)
        shape = Shape(min(count, most), ramp_ms=ramp_ms, deadline_s=STREAM_DEADLINE_S)
        found.append(Scenario(name, body, shape, fresh=True))
    return found


def warm_up(instruments: Instruments, server: Server, seconds: float) -> None:
    for body in WARM_UP:
        run(instruments, server, Scenario("warm_up", body, Shape(8, seconds)))


def measure(instruments: Instruments, server: Server, scenario: Scenario) -> Figures:
    """One round of a scenario on a warm server."""
    pss_before_kb = server.pss_kb() if scenario.fresh else 0.0
    cpu_before_s = server.cpu_s()
    result, pss_peak_kb = run(instruments, server, scenario)
    cpu_s = server.cpu_s() - cpu_before_s
    figures = figures_of(result, cpu_s)
    if scenario.fresh and server.pid:
        figures["pss_kb_per_stream"] = (pss_peak_kb - pss_before_kb) / scenario.streams
    return figures


def run(instruments: Instruments, server: Server, scenario: Scenario) -> tuple[Result, float]:
    """Run the load; also gives the server's peak PSS, watched only where it is asked for: looking costs time."""
    body = scenario.body
    events = body.events if body.stream else None
    load = instruments.start_load(server.address(body), scenario.shape, body.mark, events)
    pss_peak_kb = 0.0
    while scenario.fresh and load.poll() is None:
        pss_peak_kb = max(pss_peak_kb, server.pss_kb())
        with contextlib.suppress(subprocess.TimeoutExpired):
            load.wait(PSS_EVERY_S)
    return finish_load(load, scenario.shape), pss_peak_kb


def figures_of(result: Result, cpu_s: float) -> dict[str, float]:
    """The figures every run has. A server nobody may look into, or none, has no CPU figures."""
    figures = {
        "errors": float(result.errors),
        "requests_per_s": result.ok / result.wall_s,
        "answer_p50_ms": result.answer_p50_ms,
        "answer_p99_ms": result.answer_p99_ms,
    }
    if cpu_s > 0:
        figures["core_percent"] = 100 * cpu_s / result.wall_s
        figures["cpu_us_per_request"] = 1e6 * cpu_s / max(1, result.ok)
    if result.events:
        figures["first_p50_ms"] = result.first_p50_ms
        figures["first_p99_ms"] = result.first_p99_ms
        figures["transit_p50_ms"] = result.transit_p50_ms
        figures["transit_p99_ms"] = result.transit_p99_ms
        figures["events_per_s"] = result.events / result.wall_s
    if result.events and cpu_s > 0:
        figures["cpu_us_per_event"] = 1e6 * cpu_s / result.events
        figures["events_per_cpu_s"] = result.events / cpu_s
    return figures


def measure_cold(server: Server) -> Figures:
    """A server that has just answered for the first time."""
    time.sleep(SETTLE_S)
    return {"start_s": server.start_s, "idle_pss_mb": server.pss_kb() / 1024}
