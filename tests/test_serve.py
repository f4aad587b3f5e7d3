"""``routerd serve`` as a user meets it: a process started with much, little or nothing configured."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from routerd import cli
from routerd.proxy.simulated import Fault, Turn
from tests.fakes import Upstreams
from tests.process_rig import ROOT, serving, start
from tests.rig import HELLO, KEY, TOKEN, WEATHER, config_text, post

BAD = """
[server]
listen = "127.0.0.1"
[defaults]
prefer = "cheep"
max_attempts = 0
[providers.lab]
base_url = "http://127.0.0.1:9/v1"
api_key = ["sk-misplaced-secret"]
modells = {}
"""


async def refused(*arguments: str, folder: Path, listen: bool = True) -> tuple[int, str]:
    """Start it where it cannot serve: the exit code, and what it said."""
    process = await start(*arguments, folder=folder, listen=listen)
    return await process.ended(), process.stderr


class TestWithNothingConfigured:
    async def test_it_serves_simulated_providers_and_says_so_loudly(self, tmp_path: Path) -> None:
        """A warning of its own at start, and a mark on every answer."""
        async with serving(folder=tmp_path) as process:
            status, headers, body = await post(process.url, HELLO)
            await process.stop()

        loud = [line for line in process.log if "SIMULATED" in line["event"]]
        assert [line["level"] for line in loud] == ["warning"]
        assert "OPENROUTER_API_KEY" in loud[0]["event"]
        assert process.log[0]["providers"] == ["simulated-a", "simulated-b"]
        assert (status, headers["x-routerd-provider"]) == (200, "simulated-a")
        assert json.loads(body)["model"].endswith("-simulated")
        assert "simulated" in json.loads(body)["choices"][0]["message"]["content"]

    async def test_a_simulated_model_calls_a_tool_it_is_offered(self, tmp_path: Path) -> None:
        """With arguments the tool's schema accepts, so an agent can be tried without any key."""
        async with serving(folder=tmp_path) as process:
            _, _, body = await post(process.url, HELLO | {"tools": [WEATHER]})

        choice = json.loads(body)["choices"][0]
        (called,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert called["function"]["name"] == "weather"
        assert list(json.loads(called["function"]["arguments"])) == ["city"]

    async def test_it_streams_and_lists_its_models(self, tmp_path: Path) -> None:
        """The marked names, as clients ask for them."""
        async with serving(folder=tmp_path) as process:
            _, _, stream = await post(process.url, HELLO | {"stream": True})
            async with aiohttp.ClientSession() as session, session.get(f"{process.url}/v1/models") as reply:
                cards = (await reply.json())["data"]

        assert stream.endswith(b"data: [DONE]\n\n")
        assert b'-simulated"' in stream
        assert [card["id"] for card in cards] == ["auto", "model-simulated"]


class TestWithTheEnvironmentAlone:
    async def test_a_key_is_a_provider(self, tmp_path: Path) -> None:
        """By the name its vendor's documentation gives it; nothing is simulated then."""
        environ = {"OPENROUTER_API_KEY": KEY}
        async with serving(folder=tmp_path, environ=environ) as process:
            await process.stop()

        assert process.log[0]["providers"] == ["openrouter"]
        assert process.log[0]["config"] == "environment"
        assert "SIMULATED" not in process.stderr
        assert KEY not in process.stderr

    async def test_its_state_is_in_its_own_folder(self, tmp_path: Path) -> None:
        """Where the desktop's convention puts state, unless systemd names a folder."""
        async with serving(folder=tmp_path):
            assert (tmp_path / ".local/state/routerd/routerd.db").exists()
        async with serving(folder=tmp_path, environ={"STATE_DIRECTORY": str(tmp_path / "given")}):
            assert (tmp_path / "given" / "routerd.db").exists()


class TestWhereItCannotServe:
    async def test_a_bad_config_ends_it_with_78_and_every_problem(self, tmp_path: Path) -> None:
        """So that systemd does not try again, and the user does not have to."""
        path = tmp_path / "bad.toml"
        path.write_text(BAD)

        code, said = await refused("--config", str(path), folder=tmp_path, listen=False)

        assert code == cli.EXIT_CONFIG
        for place in ("server.listen", "defaults.prefer", "defaults.max_attempts", "lab.api_key", "lab.modells"):
            assert f"{place}: " in said
        assert "balanced" in said  # the suggestion
        assert "sk-misplaced-secret" not in said
        assert "Traceback" not in said

    async def test_a_missing_config_ends_it_with_78(self, tmp_path: Path) -> None:
        """A file that was named must be there."""
        code, said = await refused("--config", "gone.toml", folder=tmp_path)

        assert code == cli.EXIT_CONFIG
        assert "gone.toml" in said

    async def test_a_second_daemon_on_the_same_state_is_turned_away(self, tmp_path: Path) -> None:
        """With the process that holds it, and with what to do."""
        async with serving(folder=tmp_path) as process:
            code, said = await refused(folder=tmp_path)
            await post(process.url, HELLO)

        assert code == cli.EXIT_WRONG
        assert "in use by another routerd" in said
        assert "Traceback" not in said

    async def test_a_port_in_use_ends_it_with_1(self, tmp_path: Path, taken_port: int) -> None:
        """With the address, so that the user knows which."""
        code, said = await refused("--listen", f"127.0.0.1:{taken_port}", folder=tmp_path, listen=False)

        assert code == cli.EXIT_WRONG
        assert str(taken_port) in said
        assert "address already in use" in said.lower()
        assert "Traceback" not in said


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_no_secret_is_ever_said(tmp_path: Path, upstreams: Upstreams) -> None:
    """Neither a key nor a token nor what the user wrote, whatever fails, and though the provider repeats the key."""
    leak = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}})
    leaky = await upstreams(Turn(fault=Fault("status", status=401, body=leak.encode())))
    path = tmp_path / "routerd.toml"
    path.write_text(
        config_text({"leaky": leaky}, defaults='max_wait = "1s"').replace("[state]", f'tokens = ["{TOKEN}"]\n[state]')
    )

    async with serving("--config", str(path), folder=tmp_path) as process:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        refused_status, _, _ = await post(process.url, HELLO, headers={"Authorization": "Bearer sk-wrong-token"})
        status, headers, body = await post(process.url, HELLO, headers=bearer)
        await process.stop()

    assert (refused_status, status) == (401, 503)
    assert len([line for line in process.log if line["event"] == "exchange"]) == 2
    said = process.stderr + body.decode() + str(headers)
    for secret in (KEY, TOKEN, "sk-wrong-token", "Hello."):
        assert secret not in said


async def test_a_cold_start_is_quick(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """From nothing to the first answer; the figure is for reading, the limit only catches a start gone wrong."""
    began = time.monotonic()
    async with serving(folder=tmp_path) as process:
        serving_s = time.monotonic() - began
        status, _, _ = await post(process.url, HELLO)
        answered_s = time.monotonic() - began

    record_property("seconds", f"serving {serving_s:.2f}  first answer {answered_s:.2f}")
    assert status == 200
    assert answered_s < 10


@pytest.mark.parametrize("package", ["rich", "ruamel"])
def test_the_daemon_does_not_import_what_only_commands_need(package: str) -> None:
    """It would hold the memory for as long as it runs."""
    code = f"import sys, routerd.__main__, routerd.cli.serve; sys.exit({package!r} in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
