"""A daemon as its users start it: a process of its own, ended by signals, with nothing of this machine's settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAIT_S = 30.0  # for a start or a stop; only a daemon that hangs takes so long


class Process:
    """A daemon's process. ``url`` is where it listens, known once it serves."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._stderr: list[bytes] = []
        self.url = ""

    @property
    def stderr(self) -> str:
        """What it said so far."""
        return b"".join(self._stderr).decode()

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of its log so far."""
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]

    async def serving(self) -> None:
        """Wait until it says where it serves. AssertionError if it ends instead."""
        async with asyncio.timeout(WAIT_S):
            while not self.url:
                line = await self._read()
                assert line, f"it ended before it served:\n{self.stderr}"
                self.url = json.loads(line)["listen"][0] if b'"serving"' in line else ""

    async def ended(self) -> int:
        """Wait until it has ended, and return its exit code."""
        async with asyncio.timeout(WAIT_S):
            while await self._read():
                pass
            return await self._process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and wait for the end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        return await self.ended()

    async def _read(self) -> bytes:
        assert self._process.stderr is not None
        line = await self._process.stderr.readline()
        self._stderr.append(line)
        return line


async def start(
    *arguments: str, folder: Path, environ: Mapping[str, str] | None = None, listen: bool = True
) -> Process:
    """Start ``routerd serve`` with ``folder`` as its home and working directory, and nothing in its environment.

    ``listen``: at a free port, whatever the configuration says. Returns at once; see ``Process.serving``.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "routerd", "serve", *arguments),
        *(("--listen", "127.0.0.1:0") if listen else ()),
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), **(environ or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    return Process(process)


@asynccontextmanager
async def serving(
    *arguments: str, folder: Path, environ: Mapping[str, str] | None = None, listen: bool = True
) -> AsyncIterator[Process]:
    """A daemon that serves while the context lasts; killed at its end if it still runs."""
    process = await start(*arguments, folder=folder, environ=environ, listen=listen)
    try:
        await process.serving()
        yield process
    finally:
        await process.stop(signal.SIGKILL)
