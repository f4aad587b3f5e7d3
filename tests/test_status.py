"""``routerd status``: what the running daemon says, in a terminal or for a program; and what if none answers."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from routerd import cli
from routerd.__main__ import main
from routerd.proxy.simulated import Fault, Turn
from tests.fakes import Upstreams
from tests.process_rig import ROOT
from tests.rig import HELLO, MODEL, TOKEN, config_text, daemon, post, provider

WAIT_S = 30.0
DOWN = Turn(fault=Fault("status", status=503))
TOUCHY = 'breaker = { failures = 1, open = "300s" }'
ENVIRON = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", "COLUMNS": "160"}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no config of this machine takes part."""
    for name in list(os.environ):
        if name.endswith("_KEY") or name.startswith(("XDG_", "ROUTERD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


async def run(folder: Path, *arguments: str, **options: Any) -> tuple[int, str, str]:
    """The command in a process of its own, since the daemon has this loop: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "routerd", "status", *arguments),
        cwd=folder,
        env=ENVIRON,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **options,
    )
    async with asyncio.timeout(WAIT_S):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def configure(folder: Path, listen: str, *, more: str = "") -> None:
    """A config whose daemon is the one that listens there."""
    text = f'[server]\nlisten = "{listen}"\n{more}\n' + provider("a", "http://127.0.0.1:9/v1")
    (folder / "routerd.toml").write_text(text)


class TestWhatItShows:
    async def test_it_is_asked_at_the_address_of_the_config(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Routes, upstreams with the reason they are left out, spend and failovers, in plain columns when piped."""
        both = {"a": await upstreams(DOWN), "b": await upstreams()}
        extra = 'limits = [{ requests = 9, per = "day" }]'
        async with daemon(config_text(both, defaults=TOUCHY, extra=extra), tmp_path) as served:
            await post(served.url, HELLO)
            configure(tmp_path, served.url.removeprefix("http://"))
            code, out, err = await run(tmp_path)

        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert (code, err) == (0, "")
        assert lines[0].startswith("routerd ")
        assert f"auto ▲ fallback (a/{MODEL}) > b/{MODEL}" in lines
        assert any(line.startswith(f"a/{MODEL} ✕ breaker open, ") for line in lines)
        assert any(line.startswith(f"b/{MODEL} ● ready ") for line in lines)
        assert any(line.startswith("b requests/day 8 9 ") for line in lines)
        assert any(line.endswith(f"auto a/{MODEL} unavailable, HTTP 503, overloaded b/{MODEL}") for line in lines)
        assert "\x1b" not in out

    async def test_json_is_what_the_daemon_says(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """For programs; the same as ``GET /status``."""
        async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
            code, out, _ = await run(tmp_path, "--json", "--url", served.url)

        assert code == 0
        assert [route["name"] for route in json.loads(out)["routes"]] == ["auto"]

    async def test_unix_sockets_and_tokens(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Both are taken from the config."""
        listen, more = f"unix:{tmp_path}/r.sock", f'tokens = ["{TOKEN}"]'
        text = config_text({"a": await upstreams()}).replace('"127.0.0.1:0"', f'"{listen}"\n{more}')
        async with daemon(text, tmp_path):
            configure(tmp_path, listen, more=more)
            code, out, err = await run(tmp_path)
            by_url = await run(tmp_path, "--url", listen)

        assert (code, err) == (0, "")
        assert "Upstreams" in out
        assert by_url[0] == 0

    async def test_a_terminal_gets_colours_and_lines(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """The same, drawn for people."""
        async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
            shown = await asyncio.to_thread(_on_a_terminal, tmp_path, "--url", served.url)

        assert "\x1b[" in shown
        assert "● ready" in shown

    async def test_watching_goes_on_until_it_is_interrupted(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """And that is a good end."""
        async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "routerd", "status", "--watch", "--json", "--url", served.url),
                cwd=tmp_path,
                env=ENVIRON,
                stdout=asyncio.subprocess.PIPE,
                limit=2**20,
            )
            assert process.stdout is not None
            async with asyncio.timeout(WAIT_S):
                seen = [json.loads(await process.stdout.readline()) for _ in range(2)]
                process.send_signal(signal.SIGINT)
                await process.communicate()

        assert seen[0]["at"] < seen[1]["at"]
        assert process.returncode == 0


def _on_a_terminal(folder: Path, *arguments: str) -> str:
    """What a terminal gets to see."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "routerd", "status", *arguments]
    with subprocess.Popen(command, cwd=folder, env=ENVIRON | {"TERM": "xterm"}, stdout=theirs, stderr=theirs):
        os.close(theirs)
        shown = _read_all(ours)
    os.close(ours)
    return shown


def _read_all(descriptor: int) -> str:
    said = b""
    while True:
        try:
            piece = os.read(descriptor, 65_536)
        except OSError:  # the other end is closed
            piece = b""
        if not piece:
            return said.decode()
        said += piece


@asynccontextmanager
async def _other_server(status: int, body: str, content_type: str) -> AsyncIterator[str]:
    """Some server that is no routerd."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text=body, content_type=content_type)

    app = web.Application()
    app.router.add_get("/status", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class TestNoAnswer:
    def test_nobody_is_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Says where it asked, and ends with 1."""
        configure(tmp_path, "127.0.0.1:1")

        assert main(["status"]) == cli.EXIT_WRONG
        assert "no daemon answers at 127.0.0.1:1: " in capsys.readouterr().err

    def test_no_socket_is_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A unix socket that is missing is told by its path."""
        assert main(["status", "--url", f"unix:{tmp_path}/none"]) == cli.EXIT_WRONG
        assert f"no daemon answers at unix:{tmp_path}/none: " in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("status", "body", "content_type", "says"),
        [
            (404, "no", "text/plain", "no routerd: 404"),
            (200, "<html>", "text/html", "no routerd: 200"),
            (200, '{"version": 1}', "application/json", "another version"),
            (401, '{"error": {"message": "send a token"}}', "application/json", "refuses: send a token"),
            (403, "no", "text/plain", "refuses: it does not say why"),
        ],
    )
    async def test_somebody_else_is_there(
        self, status: int, body: str, content_type: str, says: str, tmp_path: Path
    ) -> None:
        """Whatever it says, the sentence tells what to do next."""
        async with _other_server(status, body, content_type) as address:
            code, out, err = await run(tmp_path, "--url", f"http://{address}")

        assert (code, out) == (cli.EXIT_WRONG, "")
        assert says in err
        assert len(err.splitlines()) == 1

    @pytest.mark.parametrize("url", ["https://h:1", "ftp://h", "http://", "http://h:x"])
    def test_a_wrong_url_is_wrong_usage(self, url: str) -> None:
        """Not the same as nobody answering."""
        with pytest.raises(SystemExit) as end:
            main(["status", "--url", url])

        assert end.value.code == cli.EXIT_USAGE
