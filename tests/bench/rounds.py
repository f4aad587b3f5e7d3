"""The order of things: who is measured when, in turns, and what becomes of those who fail."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.bench import front, scenarios, server
from tests.bench.figures import DIRECT
from tests.bench.front import Upstream
from tests.bench.instruments import Instruments, Unavailable
from tests.bench.machine import Cores
from tests.bench.report import OURS
from tests.bench.scenarios import COLD, RECOVERY, Figures, Scenario, Way
from tests.bench.server import Server
from tests.bench.targets import BARE, Target


@dataclass(frozen=True)
class Pace:
    """How long and how often."""

    rounds: int
    fresh_rounds: int
    cold_rounds: int
    seconds: float  # of one closed loop
    open_s: float  # for which slow streams are all open
    warm_s: float  # of each kind of warm-up


QUICK = Pace(rounds=2, fresh_rounds=1, cold_rounds=1, seconds=0.4, open_s=2.0, warm_s=0.3)
FULL = Pace(rounds=5, fresh_rounds=2, cold_rounds=3, seconds=1.0, open_s=8.0, warm_s=1.0)


@dataclass
class Rounds:
    """One run of the bench, filling ``samples`` (scenario -> target -> rounds) and ``skipped``."""

    instruments: Instruments
    cores: Cores
    pace: Pace
    upstream: Upstream
    targets: list[Target]
    samples: dict[str, dict[str, list[Figures]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    skipped: dict[str, str] = field(default_factory=dict)

    def run(self, chosen: Sequence[Scenario]) -> None:
        """Fresh servers first, one at a time and with nothing else up; then those that stay."""
        self._run_fresh([scenario for scenario in chosen if scenario.fresh])
        self._run_steady([one for one in chosen if one.way == "plain" and not one.fresh and not one.of])
        self._run_paired([one for one in chosen if one.of])
        self._run_through_front([scenario for scenario in chosen if scenario.way != "plain"])

    # --- fresh servers ----------------------------------------------------------------------------------------------

    def _run_fresh(self, chosen: Sequence[Scenario]) -> None:
        for scenario in chosen:
            rounds = self.pace.cold_rounds if scenario is COLD else self.pace.fresh_rounds
            for turn in range(rounds):
                for target in self._in_turn(turn, self.targets):
                    self._measure_fresh(turn, target, scenario)

    def _measure_fresh(self, turn: int, target: Target, scenario: Scenario) -> None:
        if scenario is COLD and not target.startable:
            return
        if scenario.streams > target.max_streams:
            self.skipped[f"{target.name}, {scenario.name}"] = f"not asked for more than {target.max_streams} streams"
            return
        with self._forgiving(target), server.running(target, self.upstream, self.cores.server) as running:
            if scenario is COLD:
                self._note(turn, running, scenario, scenarios.measure_cold(running))
                return
            scenarios.warm_up(self.instruments, running, self.pace.warm_s)
            self._note(turn, running, scenario, scenarios.measure(self.instruments, running, scenario))

    # --- servers that stay ------------------------------------------------------------------------------------------

    def _run_steady(self, chosen: Sequence[Scenario]) -> None:
        if chosen:
            self._run_ways(chosen, {"plain": self.upstream}, self.targets)

    def _run_paired(self, chosen: Sequence[Scenario]) -> None:
        """Our daemon and the same without its recovery, and nobody else. The difference is what is noted."""
        ours = [target for target in self.targets if target.name == OURS]
        if chosen and ours:
            self._run_ways(chosen, {"plain": self.upstream}, [*ours, BARE])
            self.samples[RECOVERY][OURS] = scenarios.recovery_figures(self.samples)

    def _run_through_front(self, chosen: Sequence[Scenario]) -> None:
        if not chosen:
            return
        reason = front.why_not()
        if reason:
            self.skipped["TLS upstream"] = reason
            return
        ours = [target for target in self.targets if target.startable or target.name == DIRECT]
        with front.running(self.upstream.port, self.cores.load, self.instruments.directory) as (hop, tls):
            self._run_ways(chosen, {"hop": hop, "tls": tls}, ours)

    def _run_ways(self, chosen: Sequence[Scenario], ways: Mapping[Way, Upstream], targets: Sequence[Target]) -> None:
        with contextlib.ExitStack() as stack:
            servers = {(target.name, way): self._start(stack, target, ways[way]) for target in targets for way in ways}
            for turn in range(self.pace.rounds):
                for scenario in chosen:
                    for target in self._in_turn(turn, targets):
                        if target.takes(scenario.body):
                            self._measure_steady(turn, scenario, servers.get((target.name, scenario.way)))

    def _start(self, stack: contextlib.ExitStack, target: Target, upstream: Upstream) -> Server | None:
        """A warm server, or None: it does not start, or (direct) has nobody to speak TLS for it."""
        if target.name in self.skipped or (target.name == DIRECT and upstream.authority):
            return None
        running = None
        with self._forgiving(target):
            running = stack.enter_context(server.running(target, upstream, self.cores.server))
            scenarios.warm_up(self.instruments, running, self.pace.warm_s)
        return running

    def _measure_steady(self, turn: int, scenario: Scenario, running: Server | None) -> None:
        if running is None:
            return
        with self._forgiving(running.target):
            self._note(turn, running, scenario, scenarios.measure(self.instruments, running, scenario))

    # --- both -------------------------------------------------------------------------------------------------------

    def _in_turn(self, turn: int, targets: Sequence[Target]) -> list[Target]:
        """Everybody still in, beginning with another one each round."""
        here = [target for target in targets if target.name not in self.skipped]
        first = turn % max(1, len(here))
        return here[first:] + here[:first]

    @contextlib.contextmanager
    def _forgiving(self, target: Target) -> Iterator[None]:
        """A target that fails is left out from here on, by name; the others go on."""
        try:
            yield
        except (Unavailable, subprocess.TimeoutExpired) as error:
            self.skipped[target.name] = str(error)
            print(f"# {target.name} is out: {error}", file=sys.stderr, flush=True)

    def _note(self, turn: int, running: Server, scenario: Scenario, figures: Figures) -> None:
        name = running.target.name
        self.samples[scenario.name][name].append(figures)
        text = " ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"# round {turn + 1} {scenario.name} {name}: {text}", file=sys.stderr, flush=True)
