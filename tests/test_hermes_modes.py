"""Real Hermes in its other wire modes: over upstreams of its own dialect and of another, and in spite of their faults.

In these modes Hermes is easily hurt: it executes half a call with no arguments if the stream ends without a word, and
takes an answer that breaks off for a whole one. So each fault stands in the middle of an answer, and the task must be
done exactly once, in exactly as many calls as over an upstream that works.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from routerd.proxy.simulated import Answer, Turn
from tests.fakes import ScriptedUpstream, call
from tests.hermes_rig import HermesResult, run_hermes
from tests.messages_fake import MessagesUpstream, Said, after_tools, agent, going_on, mixed_config
from tests.rig import Daemon, daemon

pytestmark = [pytest.mark.hermes, pytest.mark.xdist_group("hermes"), pytest.mark.timeout(240)]

PROMPT = "Write the report with the terminal tool."
DONE = "The report is written and complete."
SENT = "The report "  # of the final answer, when a fault in the middle of a text strikes
ARGUMENTS = '{"command": "echo written >> report.txt"}'
TEXT = "I will write it now."
TURNS = 2
PAUSE_S = 9.0
PATIENCE_S = 4.0
PATIENCE = 'first_token_timeout = "2s"\nstall_timeout = "1s"\nkeepalive = "300ms"\nmax_wait = "0s"\n'
HEALTHY = agent("terminal", ARGUMENTS, DONE, text=TEXT)


def at_fault(how: Any, place: Any, *, in_answer: bool = False) -> Any:
    """The agent's model, dying at that place of the turn with the call, or of the final answer."""

    def step(body: dict[str, Any]) -> Said:
        said = HEALTHY(body)
        return msgspec.structs.replace(said, how=how, place=place) if after_tools(body) is in_answer else said

    return step


def behind(body: dict[str, Any]) -> Said:
    """The agent's model, which also goes on where the final answer broke off."""
    called = "tool_result" in str(body["messages"])
    return Said(text=DONE.removeprefix(SENT)) if called and going_on(body) else HEALTHY(body)


MID_CALL = {f"{how} in a call": at_fault(how, "mid_call") for how in ("tear", "eof", "stall", "error")}
MID_TEXT = {f"{how} in text": at_fault(how, "mid_text") for how in ("tear", "eof", "error")}
MID_ANSWER = {f"{how} in the answer": at_fault(how, "mid_text", in_answer=True) for how in ("tear", "eof", "stall")}
FIRST = {"silent from the first": at_fault("stall", "first"), "503": lambda _: Said(status=503)}
FAULTS = MID_CALL | MID_TEXT | MID_ANSWER | FIRST


@asynccontextmanager
async def over_messages(folder: Path, *steps: Any) -> AsyncIterator[Daemon]:
    """A daemon over one Messages upstream for each step."""
    first = MessagesUpstream(steps[0])
    second = MessagesUpstream(steps[-1])
    async with first, second:
        names = {"first": ("messages", first.base_url), "second": ("messages", second.base_url)}
        async with daemon(mixed_config(names, defaults=PATIENCE), folder) as served:
            yield served


async def hermes(served: Daemon, folder: Path, env: dict[str, str] | None = None) -> HermesResult:
    home = folder / "home"
    return await run_hermes(f"{served.url}/v1", PROMPT, hermes_home=home, api_mode="anthropic_messages", env=env)


def assert_done(result: HermesResult, folder: Path) -> None:
    """The task is done, once, and Hermes has noticed nothing."""
    assert result.completed, result.log
    assert result.final_text == DONE
    assert (folder / "home" / "report.txt").read_text() == "written\n"
    assert result.usage["api_calls"] == TURNS, result.log
    assert [turn["role"] for turn in result.history] == ["user", "assistant", "tool", "assistant"]


async def test_over_messages(tmp_path: Path) -> None:
    """The whole task in one dialect."""
    async with over_messages(tmp_path, HEALTHY) as served:
        assert_done(await hermes(served, tmp_path), tmp_path)


async def test_over_chat(tmp_path: Path) -> None:
    """The whole task with every request and answer written anew."""
    turn = Turn(Answer(text=TEXT, calls=(call("terminal", command="echo written >> report.txt"),), final_text=DONE))
    async with ScriptedUpstream(turn) as upstream:
        text = mixed_config({"one": ("chat", upstream.base_url)}, defaults=PATIENCE)
        async with daemon(text, tmp_path) as served:
            assert_done(await hermes(served, tmp_path), tmp_path)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_fault_in_the_middle(fault: Any, tmp_path: Path) -> None:
    """The provider behind makes it good."""
    async with over_messages(tmp_path, fault, behind) as served:
        assert_done(await hermes(served, tmp_path), tmp_path)


@pytest.mark.parametrize("place", ["first", "mid_text", "mid_call"])
async def test_silence_is_bridged(place: Any, tmp_path: Path) -> None:
    """Hermes, whose patience is shorter than the upstream's pause, takes the keep-alives for life and asks once."""

    def paused(body: dict[str, Any]) -> Said:
        said = HEALTHY(body)
        return said if after_tools(body) else msgspec.structs.replace(said, how="pause", place=place, pause_s=PAUSE_S)

    upstream = MessagesUpstream(paused)
    async with upstream:
        text = mixed_config({"one": ("messages", upstream.base_url)}, defaults='keepalive = "500ms"')
        async with daemon(text, tmp_path) as served:
            result = await hermes(served, tmp_path, {"HERMES_LOCAL_STREAM_STALE_TIMEOUT": str(PATIENCE_S)})

    assert_done(result, tmp_path)
    assert len(upstream.talks) == TURNS
