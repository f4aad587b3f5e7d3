"""``python -m tests.bench``: measure, print one table, say which goals were missed."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import bench
from tests.bench import instruments, machine, planning, relaying, scenarios
from tests.bench.front import Upstream
from tests.bench.report import OURS, Report
from tests.bench.rounds import FULL, QUICK, Pace, Rounds
from tests.bench.scenarios import Scenario
from tests.bench.targets import Direct, Given, LiteLLM, Nginx, Routerd, Target

TARGETS: dict[str, Target] = {target.name: target for target in (Direct(), Nginx(), Routerd(), LiteLLM())}
SLOW_TARGETS = {"litellm"}
PLAN, RELAY = "plan", "relay"
TIMED_HERE = {PLAN: planning.measure, RELAY: relaying.measure}
NOT_ASKED = "not asked for"
TOLERABLE_PERCENT = 15
INTERRUPTED = 130  # as a shell says it


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured, whatever the figures; 1: routerd, or anything at all, could not be measured; 2: usage."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        try:
            report = measure(options, Path(directory))
        except instruments.Unavailable as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return INTERRUPTED
    print(report.table())
    if options.json:
        Path(options.json).write_bytes(report.json())
    return 0 if report.skipped.get(OURS, NOT_ASKED) == NOT_ASKED else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [scenario.name for scenario in every_scenario(FULL, sys.maxsize)]
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="about two minutes: shorter, fewer rounds, without LiteLLM")
    known = [*names, *TIMED_HERE]
    add("--only", type=among(known), default=set(), metavar="A,B", help=f"some of {', '.join(known)}")
    add("--targets", type=among([*TARGETS]), default=set(), metavar="A,B", help=f"some of {', '.join(TARGETS)}")
    add("--target", type=given, action="append", default=[], metavar="NAME=URL[,model=M][,token=T]",
        help="also measure this running server; its upstream must be http://127.0.0.1:UPSTREAM_PORT/v1")  # fmt: skip
    add("--upstream-port", type=int, default=0, help="port of the bench's upstream (default: any free one)")
    add("--rounds", type=int, help="how often the closed loops are measured")
    add("--json", metavar="FILE", help="also write all that was measured, round by round")
    return parser.parse_args(arguments)


def among(known: Sequence[str]) -> Callable[[str], set[str]]:
    def some_of(text: str) -> set[str]:
        names = set(text.split(","))
        unknown = sorted(names - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return some_of


def given(text: str) -> Given:
    try:
        return Given.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def every_scenario(pace: Pace, most_streams: int) -> list[Scenario]:
    steady = [*scenarios.steady(pace.seconds), *scenarios.crossing(pace.seconds), *scenarios.recovery(pace.seconds)]
    return [scenarios.COLD, *scenarios.streams(pace.open_s, most_streams), *steady]


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """The whole run. Raises Unavailable where the instruments themselves cannot be had."""
    pace = pace_of(options)
    cores, most_streams = machine.pick_cores(), machine.raise_descriptor_limit()
    chosen = [one for one in every_scenario(pace, most_streams) if not options.only or one.name in options.only]
    targets, skipped = choose_targets(options)
    os.sched_setaffinity(0, {cores.load})
    others = machine.Others.watch()
    tools = instruments.build(directory, cores.load)
    with tools.upstream(options.upstream_port) as port:
        rounds = Rounds(tools, cores, pace, Upstream("127.0.0.1", port), targets, skipped=skipped)
        rounds.run(chosen)
    for name, timed in TIMED_HERE.items():
        if name in (options.only or TIMED_HERE):
            rounds.samples.update(timed())
    versions = {one.name: one.version() for one in targets}
    place = describe(cores, most_streams, others.percent())
    return Report(place, versions, dataclasses.asdict(pace), rounds.samples, skipped)


def pace_of(options: argparse.Namespace) -> Pace:
    pace = QUICK if options.quick else FULL
    return dataclasses.replace(pace, rounds=options.rounds) if options.rounds else pace


def choose_targets(options: argparse.Namespace) -> tuple[list[Target], dict[str, str]]:
    """Those asked for that can run here, and why the others cannot."""
    wanted = options.targets or {name for name in TARGETS if not (options.quick and name in SLOW_TARGETS)}
    reasons = {name: target.why_not() for name, target in TARGETS.items() if name in wanted}
    found = [TARGETS[name] for name, reason in reasons.items() if not reason]
    skipped = {name: reason for name, reason in reasons.items() if reason}
    skipped |= {name: NOT_ASKED for name in TARGETS if name not in wanted}
    return [*found, *options.target], skipped


def describe(cores: machine.Cores, most_streams: int, others_percent: float) -> str:
    """What the figures were taken on, with whatever makes them weaker."""
    found = f"{machine.describe()}; other programs took {others_percent:.0f} % of a core"
    if others_percent > TOLERABLE_PERCENT:
        found += " (a BUSY machine: read the ratios, not the figures)"
    if not cores.apart:
        found += "; ONE core for server, upstream and load together: rates and latencies say little"
    if most_streams < scenarios.MANY_STREAMS:
        found += f"; the limit of open files allows only {most_streams} streams"
    return found


if __name__ == "__main__":
    sys.exit(main())
