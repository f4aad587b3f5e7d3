"""The fakes do what tests rely on, and the rig runs the real agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from routerd.proxy.simulated import Answer, Fault, Received, Turn, turn_for
from tests import fakes
from tests.fakes import ScriptedUpstream, Upstreams, call
from tests.hermes_rig import HermesMissing, find_hermes, require_hermes, run_hermes

upstreams = fakes.upstreams

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_requests_are_recorded_as_they_came(client: aiohttp.ClientSession) -> None:
    """Headers in lower case, the bytes of the body, and the body parsed."""
    raw = json.dumps(BODY, indent=3).encode()
    async with ScriptedUpstream() as upstream:
        url = f"{upstream.base_url}/chat/completions"
        async with client.post(url, data=raw, headers={"X-Tag": "a"}) as response:
            await response.read()
        (request,) = upstream.requests

    assert raw == request.raw
    assert request.body == BODY
    assert request.headers["x-tag"] == "a"
    assert request.path == "/v1/chat/completions"


async def test_turns_are_played_in_order(client: aiohttp.ClientSession, upstreams: Upstreams) -> None:
    """Turns and functions of the request may be mixed; the last one repeats."""

    def by_number(request: Received) -> Turn:
        return turn_for("503" if request.number == 2 else "500")

    upstream = await upstreams(turn_for("429"), by_number)
    statuses = []
    for _ in range(3):
        async with client.post(f"{upstream.base_url}/chat/completions", json=BODY) as response:
            statuses.append(response.status)

    assert statuses == [429, 503, 500]


async def test_the_models_name_is_left_alone(client: aiohttp.ClientSession, upstreams: Upstreams) -> None:
    """A fake is a real upstream: nothing is marked as simulated unless asked for."""
    upstream = await upstreams()
    async with client.post(f"{upstream.base_url}/chat/completions", json=BODY | {"stream": False}) as response:
        answer = await response.json()

    assert answer["model"] == "m"


async def test_a_hang_up_frees_the_upstream(client: aiohttp.ClientSession) -> None:
    """Tests can wait for a request to arrive, and for the upstream to be rid of it."""
    async with ScriptedUpstream(turn_for("stall")) as upstream:
        async with client.post(f"{upstream.base_url}/chat/completions", json=BODY):
            await upstream.requested(1)
            assert (upstream.answering, upstream.open_connections) == (1, 1)
        await upstream.idle()
        await upstream.until(lambda: not upstream.open_connections)


async def test_waiting_in_vain_fails_with_the_state() -> None:
    """A test that waits for what never comes says what the upstream was doing."""
    async with ScriptedUpstream(wait_s=0.01) as upstream:
        with pytest.raises(AssertionError, match=r"in vain.* listening, 0 requests, 0 answering"):
            await upstream.requested(1)


async def test_several_tests_may_wait_at_once(client: aiohttp.ClientSession) -> None:
    """Every waiter is told of every change."""
    async with ScriptedUpstream() as upstream:
        waiting = [asyncio.ensure_future(upstream.requested(count)) for count in (1, 2, 2)]
        for _ in range(2):
            async with client.post(f"{upstream.base_url}/chat/completions", json=BODY) as response:
                await response.read()
        await asyncio.gather(*waiting)


# --- the real agent -------------------------------------------------------------------------------------------------


def writes(path: Path) -> Turn:
    """The agent is told to write a file with its terminal, and then to say so."""
    command = f"echo written > {path}"
    return Turn(Answer(text="I write it.", calls=(call("terminal", command=command),), final_text="It is written."))


@pytest.mark.hermes
@pytest.mark.timeout(700)  # the first run installs it
async def test_hermes_does_a_task_with_a_healthy_upstream(tmp_path: Path) -> None:
    """The rig proves itself: the agent calls the tool, sees its result, and ends with the model's last words."""
    async with ScriptedUpstream(writes(tmp_path / "out.txt")) as upstream:
        result = await run_hermes(upstream.base_url, "Write the file.", hermes_home=tmp_path / "home")
        first, second = upstream.requests

    assert (tmp_path / "out.txt").read_text() == "written\n", result.log
    assert (result.completed, result.exit_code, result.final_text) == (True, 0, "It is written.")
    assert [message["role"] for message in result.history] == ["user", "assistant", "tool", "assistant"]
    assert {"terminal", "process"} == {tool["function"]["name"] for tool in first.body["tools"]}
    assert second.body["messages"][-1]["role"] == "tool"
    assert result.usage["api_calls"] == 2


@pytest.mark.hermes
@pytest.mark.timeout(700)
async def test_hermes_without_a_router_dies_of_one_401(tmp_path: Path) -> None:
    """The rig tells a dead task from a finished one, though the agent's exit code does not."""
    async with ScriptedUpstream(turn_for("401"), writes(tmp_path / "out.txt")) as upstream:
        result = await run_hermes(upstream.base_url, "Write the file.", hermes_home=tmp_path / "home")

    assert not (tmp_path / "out.txt").exists()
    assert not result.completed
    assert result.exit_code == 0


@pytest.mark.hermes
@pytest.mark.timeout(700)
async def test_a_run_that_is_given_up_is_killed(tmp_path: Path) -> None:
    """A hanging agent leaves neither a process nor an open request behind."""
    require_hermes()  # here, since in a task of its own a skip would go unseen
    async with ScriptedUpstream(Turn(fault=Fault("stall"))) as upstream:
        running = asyncio.ensure_future(run_hermes(upstream.base_url, "Wait.", hermes_home=tmp_path / "home"))
        await upstream.requested(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await upstream.idle()


def test_an_agent_that_cannot_be_installed_is_missing_with_the_reason(tmp_path: Path) -> None:
    """What hinders the installation stands in the message that a skipped test shows."""
    (tmp_path / "file").touch()
    with pytest.raises(HermesMissing, match=r"hermes-agent.* cannot be installed: .*file"):
        find_hermes(tmp_path / "file" / "venv")
