"""Process after process behind one address, as a service manager runs them; no root and no systemd needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from routerd.proxy.notify import CONNECTION
from tests.fakes import Upstreams
from tests.manager import FakeManager
from tests.process_rig import ROOT
from tests.rig import config_text
from tests.systemd.traffic import Streams, steady_load, turn

WAIT_S = 30.0
# Descriptors must begin at 3, and the variable with the process's id can only be set by the process itself.
BECOME = """
import os, sys
given = [int(fd) for fd in sys.argv[1].split(",")]
spare = [os.dup(fd) for fd in given]
for place, fd in enumerate(spare, 3):
    os.dup2(fd, place)
    os.set_inheritable(place, True)  # dup2 to itself changes nothing
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "routerd", "serve", "--config", sys.argv[2]])
"""


async def start(manager: FakeManager, config: Path, running: list[asyncio.subprocess.Process]) -> None:
    """One more daemon, with everything the manager holds; it has said that it is ready."""
    manager.hear()
    manager.messages.clear()
    sockets: Sequence[socket.socket] = (manager.listening, *manager.connections)
    names = ["http"] + [CONNECTION] * len(manager.connections)
    fds = [os.dup(sock.fileno()) for sock in sockets]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BECOME, ",".join(map(str, fds)), str(config)),
        cwd=config.parent,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(config.parent),
            "PYTHONPATH": str(ROOT),
            "NOTIFY_SOCKET": manager.address,
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": ":".join(names),
        },
        pass_fds=fds,
        stderr=asyncio.subprocess.DEVNULL,
    )
    running.append(process)
    for fd in fds:
        os.close(fd)
    async with asyncio.timeout(WAIT_S):
        while not manager.said("READY"):
            assert process.returncode is None
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def attended(manager: FakeManager) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """The manager listens to its daemons, which none outlives."""
    loop = asyncio.get_running_loop()
    loop.add_reader(manager.notify_fd, manager.hear)
    running: list[asyncio.subprocess.Process] = []
    try:
        yield running
    finally:
        loop.remove_reader(manager.notify_fd)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def stop(process: asyncio.subprocess.Process) -> int:
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(WAIT_S):
        return await process.wait()


@pytest.mark.timeout(120)
async def test_restarts_under_load_fail_no_request_and_cut_no_stream(upstreams: Upstreams, tmp_path: Path) -> None:
    """Ten streams are open and short requests arrive all the time, on kept and on new connections, at each restart."""
    upstream = await upstreams(turn)
    config = tmp_path / "routerd.toml"
    config.write_text(config_text({"a": upstream}).replace("memory:", f"sqlite:{tmp_path}/state.db"))
    with FakeManager(tmp_path) as manager:
        async with attended(manager) as running:
            await start(manager, config, running)
            streams = Streams(manager.url)
            await streams.open(10)
            async with steady_load(manager.url) as load:
                for _ in range(2):
                    await asyncio.sleep(0.5)
                    assert await stop(running[-1]) == 0
                    await start(manager, config, running)
                await streams.ended()
                await asyncio.sleep(0.3)

    print(f"\n{load}\nstreams: {streams.tally}")
    assert streams.tally.failures == []
    assert load.failures == []
    assert streams.tally.done >= 20
    assert load.done > 20


async def test_a_daemon_that_got_no_sockets_listens_for_itself(tmp_path: Path) -> None:
    """The variables are another process's: they came down from a parent, and mean nothing here."""
    config = tmp_path / "routerd.toml"
    config.write_text('[server]\nlisten = "127.0.0.1:0"\n[state]\nurl = "memory:"\n[providers]\n')
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "routerd", "serve", "--config", str(config)),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LISTEN_PID": "1", "LISTEN_FDS": "1"},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    async with asyncio.timeout(WAIT_S):
        first = await process.stderr.readline()
        process.terminate()
        await process.communicate()

    assert b'"listen":["http://127.0.0.1:' in first
