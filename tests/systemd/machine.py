"""A small Debian with a systemd of its own, booted in a container that shares nothing with this machine but the kernel.

It is built once (debootstrap, about a minute) and kept in the user's cache; every boot writes to memory only. It has a
network of its own with a loopback and nothing else, so ports collide with nobody's, and a package that is not in the
wheelhouse cannot be had. Tests reach its loopback from a thread that has moved into that network (``Inside``).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "routerd-tests"
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
PACKAGES = "systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,python3,python3-venv,make"
PYTHON = "3.11"  # of that suite
TOOLS = ("debootstrap", "systemd-nspawn", "nsenter")
BOOT_S = 60.0
COMMAND_S = 180.0
CLONE_NEWNET = 0x40000000
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd")
PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")


class CannotBoot(Exception):
    """There is no machine to be had here: no network to build it from, or a kernel that does not let it run."""


def why_not() -> str:
    """Why no machine can be booted here; empty if one can."""
    if os.geteuid() != 0:
        return "booting a systemd needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"there is no {' and no '.join(missing)} here: apt-get install systemd-container debootstrap" * bool(missing)


# --- what is made once ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _once(path: Path) -> Iterator[Path | None]:
    """Give a folder to build in, which becomes ``path`` if all goes well; None if that is there already."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            yield None
            return
        building = path.with_name(path.name + ".new")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        yield building
        building.rename(path)


def image() -> Path:
    """The root folder of the machine, built if need be. CannotBoot if that fails."""
    path = CACHE / f"{SUITE}-{_digest(PACKAGES)}"
    with _once(path) as building:
        if building is not None:
            _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(building), MIRROR)
    return path


def wheelhouse() -> Path:
    """A folder with every package that ``make install`` asks for, as the machine's Python wants them."""
    lock = ROOT / ".lock" / "run.txt"
    path = CACHE / f"wheels-{_digest(lock.read_text())}"
    with _once(path) as building:
        if building is not None:
            architecture = os.uname().machine
            options = [f"--platform={platform}_{architecture}" for platform in PLATFORMS]
            options += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
            options += [f"--abi={abi}" for abi in ("cp" + PYTHON.replace(".", ""), "abi3", "none")]
            pip = (sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(building))
            _run(*pip, *options, "--requirement", str(lock))
            _run(*pip, "--only-binary=:all:", "setuptools>=77")
    return path


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CannotBoot(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")


# --- the machine ----------------------------------------------------------------------------------------------------


class Machine:
    """Runs while the context lasts."""

    def __enter__(self) -> Self:
        self._leader = 0
        command = _nspawn(image(), wheelhouse())
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said)
        try:
            self._leader = self._find_leader()
            self._inside = Inside(self._leader)
            self.run("systemctl", "is-system-running", "--wait", check=False)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._inside.close()
        self._kill()

    def _kill(self) -> None:
        """The machine's first process, with which all others end; its own orderly end would take a while."""
        if self._leader:
            os.kill(self._leader, signal.SIGKILL)
        else:
            self._process.terminate()
        self._process.wait()
        self._said.close()

    def _find_leader(self) -> int:
        """The process id of the machine's systemd, seen from outside, once it takes commands."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            for child in children.read_text().split():
                if Path(f"/proc/{child}/root/run/systemd/private").exists():
                    return int(child)
            time.sleep(0.05)
        self._said.seek(0)
        raise CannotBoot(f"the machine does not boot: {self._said.read()[-2000:]}")

    def path(self, path: str) -> Path:
        """A file of the machine's, from outside."""
        return Path(f"/proc/{self._leader}/root") / path.lstrip("/")

    def run(self, *command: str, check: bool = True, environ: Mapping[str, str] | None = None) -> str:
        """Run a command in the machine as root; its output, both streams. AssertionError if it fails."""
        base = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        done = subprocess.run(
            ("nsenter", f"--target={self._leader}", *NAMESPACES, "--", *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=base | {"LANG": "C.UTF-8"} | dict(environ or {}),
            timeout=COMMAND_S,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run this on the machine's loopback, and wait for it."""
        return self.begin(work).result()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Let this run on the machine's loopback."""
        return asyncio.run_coroutine_threadsafe(work, self._inside.loop)


class Inside:
    """A thread with an event loop whose sockets belong to the machine's network."""

    def __init__(self, leader: int) -> None:
        self.loop = uvloop.new_event_loop()
        self._error: OSError | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(leader,), daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def _run(self, leader: int) -> None:
        with Path(f"/proc/{leader}/ns/net").open() as network:
            # A network belongs to a thread, so this one can leave while the others stay.
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
                self._error = OSError(ctypes.get_errno(), "setns")
        self._ready.set()
        if self._error is None:
            asyncio.set_event_loop(self.loop)
            self.loop.run_forever()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _nspawn(root: Path, wheels: Path) -> list[str]:
    command = ["systemd-nspawn", "--quiet", "--boot", f"--directory={root}", "--volatile=overlay", "--private-network"]
    command += ["--register=no", "--console=pipe", f"--bind-ro={ROOT}:/src", f"--bind-ro={wheels}:/wheels"]
    if not Path("/run/systemd/system").exists():
        command.append("--keep-unit")  # there is no systemd out here that could be asked for a unit
    return command
