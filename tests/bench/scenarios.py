"""What is measured: each scenario asks one thing of one server and gives the figures of one round.

A *steady* scenario runs over and over on servers that are up and warm. A *fresh* one starts the server for itself, for
memory that has been freed to a process's own heap would otherwise hide what the next run takes.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tests.bench.bodies import Body
from tests.bench.instruments import Instruments, Result, Shape, finish_load
from tests.bench.server import SMALL, Server

Way = Literal["plain", "hop", "tls"]
Figures = Mapping[str, float]  # of one round; names carry their unit

PSS_EVERY_S = 0.5
MANY_STREAMS = 5000
SETTLE_S = 1.0
STREAM_DEADLINE_S = 45.0  # an overloaded server is not waited for longer; what is open then counts as an error
WARM_UP = (SMALL, Body("warm", stream=True, events=64))


@dataclass(frozen=True)
class Scenario:
    """One way of asking. ``way``: what the servers stand in front of; ``fresh``: a new server for each run."""

    name: str
    body: Body
    shape: Shape
    way: Way = "plain"
    fresh: bool = False

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
    load = instruments.start_load(server.address(body), scenario.shape, body.events if body.stream else None)
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
