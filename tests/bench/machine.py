"""The machine under the bench: which core belongs to whom, what a process has used, how one is started and ended."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CPUCLOCK_SCHED = 2  # linux/include/uapi: the clock that counts a process's time on a CPU, in nanoseconds
TCP_LISTEN = "0A"
STOP_S = 5.0
DESCRIPTORS_BESIDE_STREAMS = 500
WANTED_DESCRIPTORS = 16_384


@dataclass(frozen=True)
class Cores:
    """The core of the server under test and that of everything else; the same one twice on a machine of one core."""

    server: int
    load: int

    @property
    def apart(self) -> bool:
        return self.server != self.load


def pick_cores() -> Cores:
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(allowed[0], allowed[-1])


def raise_descriptor_limit() -> int:
    """Raise the soft limit for this process and its children; return how many streams a proxy can hold open with it.

    A proxied stream takes two descriptors.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, WANTED_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(1, (limit - DESCRIPTORS_BESIDE_STREAMS) // 2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Whatever is spawned inside inherits the core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def spawn(
    command: Sequence[str], core: int, log: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program on one core, its output in a real file, its working directory that of the log."""
    with log.open("ab") as sink, on_core(core):
        return subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program we started, kindly, and after a while whatever is left of its own family."""
    family = descendants(process.pid)
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def descendants(pid: int) -> list[int]:
    """The process and all below it, parents first."""
    family = [pid]
    for parent in family:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                family += [int(child) for child in task.read_text().split()]
    return family


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants: ended threads and children already waited for included."""
    total = 0.0
    for member in descendants(pid):
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~member << 3) | CPUCLOCK_SCHED)
            total += reaped_children_s(member)
    return total


def reaped_children_s(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[13]) + int(after_name[14])) / TICKS_PER_S


def pss_kb(pid: int) -> float:
    """Proportional set size of a process and its descendants; 0 where we may not look."""
    total = 0
    for member in descendants(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return float(total)


def listener_of(port: int) -> int | None:
    """The oldest process that listens on a port, None if there is none or we may not look."""
    sockets = {f"socket:[{inode}]" for inode in listening_inodes(port)}
    owners = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if sockets & open_sockets(pid)]
    return min(owners, default=None)


def listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def open_sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(descriptor))
    return found


@dataclass(frozen=True)
class Others:
    """What the rest of the machine does meanwhile; judged from the moment this is made."""

    busy_s: float
    own_s: float
    at: float

    @classmethod
    def watch(cls) -> Others:
        return cls(busy_s(), own_s(), time.monotonic())

    def percent(self) -> float:
        """Of one core, on average since then. Right only when all that we started has ended."""
        others_s = (busy_s() - self.busy_s) - (own_s() - self.own_s)
        return max(0.0, 100 * others_s / (time.monotonic() - self.at))


def busy_s() -> float:
    """Seconds all cores were at work, or wanted by us and given to another virtual machine, since the boot."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def own_s() -> float:
    """CPU seconds of this process and of all it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def describe() -> str:
    """One line: processor, cores, kernel."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores, Linux {os.uname().release}"


def wait_for_port(port: int, patience_s: float) -> None:
    """Return when something listens. Raises TimeoutError."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.01)
    msg = f"nothing listens on port {port} after {patience_s:.0f} s"
    raise TimeoutError(msg)
