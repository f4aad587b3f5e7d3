"""Real Hermes in each of its wire modes over upstreams of each dialect, and in spite of faults in the mode most hurt.

In Messages mode Hermes executes half a call with no arguments if the stream ends without a word, and takes an answer
that breaks off for a whole one. So each fault stands in the middle of an answer, and the task must be done exactly
once, in exactly as many calls as over an upstream that works. The other modes' faults are in ``test_hermes_recovery``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.hermes_rig import API_MODES, ApiMode, HermesResult, run_hermes
from tests.messages_fake import MessagesUpstream, Said, after_tools, going_on, mixed_config
from tests.responses_fake import SEAL
from tests.rig import Daemon, daemon
from tests.tongues import KINDS, Kind, bodies, speaking

pytestmark = [pytest.mark.hermes, pytest.mark.xdist_group("hermes"), pytest.mark.timeout(240)]

PROMPT = "Write the report with the terminal tool."
DONE = "The report is written and complete."
SENT = "The report "  # of the final answer, when a fault in the middle of a text strikes
ARGUMENTS = '{"command": "echo written >> report.txt"}'
TEXT = "I will write it now."
THINKING = "The terminal can do that."
TURNS = 2
PAUSE_S = 6.0
PATIENCE_S = 4.0
PATIENCE = 'first_token_timeout = "2s"\nstall_timeout = "1s"\nkeepalive = "300ms"\nmax_wait = "0s"\n'
# Hermes gives up on a silent stream: in Responses mode on any, in the others on a local one only if it is told to.
IMPATIENT = dict.fromkeys(
    ("HERMES_LOCAL_STREAM_STALE_TIMEOUT", "HERMES_CODEX_EVENT_STALE_TIMEOUT_SECONDS"), str(PATIENCE_S)
)
OWN_DIALECTS: dict[ApiMode, Kind] = {
    "chat_completions": "chat",
    "codex_responses": "responses",
    "anthropic_messages": "messages",
}


def healthy(body: dict[str, Any]) -> Said:
    """The agent's model: it thinks, calls the tool once, and closes when it has the result."""
    if after_tools(body):
        return Said(text=DONE)
    return Said(thinking=THINKING, text=TEXT, calls=(("terminal", ARGUMENTS),))


def at_fault(how: Any, place: Any, *, in_answer: bool = False) -> Any:
    """The agent's model, dying at that place of the turn with the call, or of the final answer."""

    def step(body: dict[str, Any]) -> Said:
        said = healthy(body)
        return msgspec.structs.replace(said, how=how, place=place) if after_tools(body) is in_answer else said

    return step


def behind(body: dict[str, Any]) -> Said:
    """The agent's model, which also goes on where the final answer broke off."""
    called = "tool_result" in str(body["messages"])
    return Said(text=DONE.removeprefix(SENT)) if called and going_on(body) else healthy(body)


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


async def hermes(
    served: Daemon, folder: Path, mode: ApiMode = "anthropic_messages", env: dict[str, str] | None = None
) -> HermesResult:
    home = folder / "home"
    return await run_hermes(f"{served.url}/v1", PROMPT, hermes_home=home, api_mode=mode, env=env)


def assert_done(result: HermesResult, folder: Path) -> None:
    """The task is done, once, and Hermes has noticed nothing."""
    assert result.completed, result.log
    assert result.final_text == DONE
    assert (folder / "home" / "report.txt").read_text() == "written\n"
    assert result.usage["api_calls"] == TURNS, result.log
    assert [turn["role"] for turn in result.history] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(("mode", "kind"), list(itertools.product(API_MODES, KINDS)))
async def test_each_mode_over_each_dialect(mode: ApiMode, kind: Kind, tmp_path: Path) -> None:
    """The whole task, with every request and answer written anew where need be.

    A Responses upstream gets its sealed thinking back, whether Hermes keeps it in this mode or not.
    """
    async with speaking(kind, healthy) as upstream:
        text = mixed_config({"one": (kind, upstream.base_url)}, defaults=PATIENCE)
        async with daemon(text, tmp_path) as served:
            assert_done(await hermes(served, tmp_path, mode), tmp_path)
        sent = json.dumps(bodies(upstream)[-1])

    assert (SEAL in sent) is (kind == "responses")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_fault_in_the_middle(fault: Any, tmp_path: Path) -> None:
    """The provider behind makes it good."""
    async with over_messages(tmp_path, fault, behind) as served:
        assert_done(await hermes(served, tmp_path), tmp_path)


@pytest.mark.parametrize(("mode", "kind"), OWN_DIALECTS.items())
async def test_silence_is_bridged(mode: ApiMode, kind: Kind, tmp_path: Path) -> None:
    """Hermes, whose patience is shorter than the upstream's pause, takes the keep-alives for life and asks once."""
    places: tuple[Any, ...] = ("first", "mid_text", "mid_call")
    await asyncio.gather(*(bridge_silence(mode, kind, place, made(tmp_path / place)) for place in places))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


async def bridge_silence(mode: ApiMode, kind: Kind, place: Any, folder: Path) -> None:
    def paused(body: dict[str, Any]) -> Said:
        said = healthy(body)
        return said if after_tools(body) else msgspec.structs.replace(said, how="pause", place=place, pause_s=PAUSE_S)

    async with speaking(kind, paused) as upstream:
        text = mixed_config({"one": (kind, upstream.base_url)}, defaults='keepalive = "500ms"')
        async with daemon(text, folder) as served:
            result = await hermes(served, folder, mode, IMPATIENT)

    assert_done(result, folder)
    assert len(bodies(upstream)) == TURNS
