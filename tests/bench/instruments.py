"""The two C programs the bench measures with: building them, the upstream as a running thing, one run of the load."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.bench import machine

SOURCES = Path(__file__).parent
PROGRAMS = ("upstream", "load")
COMPILERS = ("cc", "gcc", "clang")
GRACE_S = 20.0  # beyond its own deadline the load generator is taken for broken


class Unavailable(Exception):
    """Something the bench needs is not on this machine; the text says what to install."""


class Result(msgspec.Struct, frozen=True):
    """What one run of ``load`` saw. Percentiles are over right answers (``answer``), streams and events."""

    wall_s: float
    ok: int
    errors: int
    timeouts: int
    events: int
    answer_p50_ms: float
    answer_p99_ms: float
    first_p50_ms: float
    first_p99_ms: float
    transit_p50_ms: float
    transit_p99_ms: float
    statuses: dict[str, int]


@dataclass(frozen=True)
class Shape:
    """How a run asks: a closed loop for some seconds, or (with a ramp) one answer on each connection."""

    connections: int
    seconds: float = 0.0
    ramp_ms: int = 0
    deadline_s: float = 60.0

    def options(self) -> list[str]:
        amount = ["-n", str(self.connections), "-r", str(self.ramp_ms)] if self.ramp_ms else ["-d", str(self.seconds)]
        return ["-c", str(self.connections), "-t", str(self.deadline_s), *amount]


@dataclass(frozen=True)
class Instruments:
    """The compiled programs, and the core they run on."""

    directory: Path
    core: int

    @contextlib.contextmanager
    def upstream(self, port: int = 0) -> Iterator[int]:
        """Run the upstream; gives its port."""
        with machine.on_core(self.core):
            process = subprocess.Popen([self.directory / "upstream", str(port)], stdout=subprocess.PIPE)
        try:
            line = process.stdout.readline() if process.stdout else b""
            if not line:
                msg = f"the bench's upstream cannot listen on port {port}"
                raise Unavailable(msg)
            yield int(line)
        finally:
            machine.stop(process)
            if process.stdout:
                process.stdout.close()

    def start_load(self, target: Sequence[str], shape: Shape, mark: str, events: int | None) -> subprocess.Popen[bytes]:
        """Start one run. ``target`` says where to and what (-p -u -b -H), ``mark`` what is in every whole answer,
        ``events`` how many make a whole stream.
        """
        expected = ["-m", mark, *([] if events is None else ["-s", str(events)])]
        command = [str(self.directory / "load"), *target, *shape.options(), *expected]
        with machine.on_core(self.core):
            return subprocess.Popen(command, stdout=subprocess.PIPE)


def finish_load(process: subprocess.Popen[bytes], shape: Shape) -> Result:
    """Wait for a run to end and read what it printed."""
    try:
        printed, _ = process.communicate(timeout=shape.deadline_s + GRACE_S)
    except subprocess.TimeoutExpired:
        machine.stop(process)
        raise
    return msgspec.json.decode(printed, type=Result)


def build(directory: Path, core: int) -> Instruments:
    """Compile the programs. Raises Unavailable where there is no C compiler."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        msg = "no C compiler (cc, gcc or clang) for the load generator: apt-get install gcc libc6-dev"
        raise Unavailable(msg)
    for program in PROGRAMS:
        source = SOURCES / f"{program}.c"
        command = [compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", str(directory / program), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            msg = f"{compiler} cannot compile {source.name}: {done.stderr.strip()}"
            raise Unavailable(msg)
    return Instruments(directory, core)
