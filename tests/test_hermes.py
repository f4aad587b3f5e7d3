"""Real Hermes in front of a real daemon: whatever the first provider does, the task is done, in about the same time.

Each row runs Hermes twice at the same moment: over two healthy providers, and with the first of two at fault. Side by
side both feel the same load of the machine, so the difference is what the fault costs. The tests share an xdist group,
so never more than two Hermes run at once. The seconds of every row stand in the summary at the end of the session.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from routerd.proxy.simulated import Answer, Fault, Turn
from tests.fakes import ScriptedUpstream, call
from tests.hermes_rig import HermesResult, run_hermes
from tests.rig import Daemon, config_text, daemon

pytestmark = [pytest.mark.hermes, pytest.mark.xdist_group("hermes"), pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[1]
PROMPT = "Write the report with the terminal tool."
DONE = "The report is written."
HEALTHY = Turn(Answer(calls=(call("terminal", command="echo written >> report.txt"),), final_text=DONE))
TURNS = 2  # the call, and the final answer
ALLOWED_S = 2.0  # what a faulty provider may cost a task
FIRST_TOKEN_TIMEOUT_S = 1.0
FAILURES = 3  # until the breaker opens
LIMITED_S = 3


def refusal(status: int, retry_after_s: int | None = None) -> Fault:
    headers = () if retry_after_s is None else (("Retry-After", str(retry_after_s)),)
    return Fault("status", status=status, headers=headers)


FAULTS = {
    "401": refusal(401),
    "402": refusal(402),
    "403": refusal(403),
    "404": refusal(404),
    "413": refusal(413),
    "429 for an hour": refusal(429, 3600),
    "500": refusal(500),
    "503": refusal(503),
    "529": refusal(529),
    "refused connection": Fault("refuse"),
    "HTML": Fault("html"),
    "JSON error with 200": Fault("json_error"),
    "empty stream": Fault("empty"),
    "error event first": Fault("error", "before_content"),
}
SILENT = Turn(fault=Fault("stall", "before_headers"))
LIMITED = Turn(fault=refusal(429, LIMITED_S))


class Run(NamedTuple):
    """A Hermes run that has ended."""

    home: Path
    result: HermesResult

    def assert_done(self) -> None:
        """The task is done, once, and Hermes has noticed nothing."""
        result = self.result
        assert result.completed, result.log
        assert result.final_text == DONE
        assert (self.home / "report.txt").read_text() == "written\n"
        assert result.usage["api_calls"] == TURNS, result.log
        assert [turn["role"] for turn in result.history] == ["user", "assistant", "tool", "assistant"]


class Box:
    """A daemon over two providers, and a folder for the homes of the Hermes that run through it."""

    def __init__(self, folder: Path, first: ScriptedUpstream, served: Daemon) -> None:
        self.first = first
        self.daemon = served
        self._folder = folder

    async def run(self) -> Run:
        """One Hermes gets the task."""
        home = self._folder / f"home-{time.monotonic_ns()}"
        return Run(home, await run_hermes(f"{self.daemon.url}/v1", PROMPT, hermes_home=home))


@asynccontextmanager
async def box(folder: Path, first: tuple[Turn, ...], second: tuple[Turn, ...] = (HEALTHY,)) -> AsyncIterator[Box]:
    """``first`` and ``second``: the scripts of the provider that goes first, and of the one behind it."""
    async with ScriptedUpstream(*first) as one, ScriptedUpstream(*second) as two:
        timeout = f'first_token_timeout = "{FIRST_TOKEN_TIMEOUT_S}s"'
        async with daemon(config_text({"first": one, "second": two}, defaults=timeout), folder) as served:
            yield Box(folder, one, served)


@pytest.fixture
async def healthy(tmp_path: Path) -> AsyncIterator[Box]:
    """Where nothing is wrong."""
    async with box(tmp_path, (HEALTHY,)) as opened:
        yield opened


Compare = Callable[[Box, float], Awaitable[None]]


@pytest.fixture
def compare(healthy: Box, record_property: Callable[[str, object], None]) -> Compare:
    """Run Hermes at a healthy box and at a faulty one, side by side: both get it done, the other not much later."""

    async def compared(faulty: Box, allowed_s: float) -> None:
        well, ill = await asyncio.gather(healthy.run(), faulty.run())
        well_s, ill_s = well.result.seconds, ill.result.seconds
        record_property(
            "seconds", f"healthy {well_s:5.2f}  faulty {ill_s:5.2f}  {ill_s - well_s:+5.2f} of {allowed_s:+.2f}"
        )
        well.assert_done()
        ill.assert_done()
        assert ill_s < well_s + allowed_s

    return compared


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_faulty_provider_costs_less_than_2_s(fault: Fault, tmp_path: Path, compare: Compare) -> None:
    """However it is at fault, and though it is so every time."""
    async with box(tmp_path, (Turn(fault=fault),)) as faulty:
        await compare(faulty, ALLOWED_S)

    assert [line["outcome"] for line in faulty.daemon.exchanges] == ["success"] * TURNS
    assert [attempt["provider"] for attempt in faulty.daemon.exchanges[0]["attempts"]] == ["first", "second"]


async def test_a_silent_provider_costs_the_timeout_until_its_breaker_opens(tmp_path: Path, compare: Compare) -> None:
    """Both requests of the first task wait for it, and one of the second; then nobody does."""
    async with box(tmp_path, (SILENT,)) as faulty:
        await compare(faulty, ALLOWED_S + TURNS * FIRST_TOKEN_TIMEOUT_S)
        await compare(faulty, ALLOWED_S + (FAILURES - TURNS) * FIRST_TOKEN_TIMEOUT_S)

    assert len(faulty.first.requests) == FAILURES


async def test_where_everybody_is_limited_hermes_just_waits(tmp_path: Path, compare: Compare) -> None:
    """For the seconds the providers ask for, and hardly longer: no retry of its own, no error, nothing lost."""
    async with box(tmp_path, (LIMITED, HEALTHY), (LIMITED, HEALTHY)) as faulty:
        await compare(faulty, ALLOWED_S + LIMITED_S)

    held = faulty.daemon.exchanges[0]
    refused_s = sum(attempt["duration_s"] for attempt in held["attempts"][:-1])  # the first reset is counted meanwhile
    assert LIMITED_S - 0.1 - refused_s <= held["waited_s"] < LIMITED_S + 0.5
    assert held["duration_s"] >= LIMITED_S


async def test_hermes_runs_with_the_config_that_the_command_writes(tmp_path: Path) -> None:
    """As ``routerd hermes --write`` leaves it in an empty home: the plain ``custom`` provider and nothing else."""
    home = tmp_path / "home"
    async with ScriptedUpstream(HEALTHY) as upstream:
        text = config_text({"first": upstream})
        async with daemon(text, tmp_path) as served:
            address = served.url.removeprefix("http://")
            await asyncio.to_thread(write_config, home, text.replace("127.0.0.1:0", address))
            result = await run_hermes("", PROMPT, hermes_home=home, as_found=True)

    Run(home, result).assert_done()
    assert result.usage["provider"] == "custom"
    assert len(upstream.requests) == TURNS


def write_config(home: Path, text: str) -> None:
    """What a user does who has installed the daemon whose config this is."""
    path = home.with_suffix(".toml")
    path.write_text(text)
    subprocess.run(
        [sys.executable, "-m", "routerd", "hermes", "--write", "--config", str(path)],
        env={"PATH": os.environ["PATH"], "HOME": str(home.parent), "HERMES_HOME": str(home)},
        cwd=ROOT,
        check=True,
    )
