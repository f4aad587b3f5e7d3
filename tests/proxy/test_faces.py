"""One provider in several dialects: where a request goes, with which key header, and what is demanded of it there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from routerd.canonical import Message, Request, Text
from routerd.config import load
from routerd.dialects import DIALECTS
from routerd.proxy.live import LiveUpstream
from routerd.proxy.pool import Pool
from routerd.proxy.simulated import TEXT
from routerd.state import open_store
from routerd.telemetry import Telemetry
from tests.fakes import Upstreams
from tests.proxy.wire import hear
from tests.rig import KEY, config_text, daemon

VERSION = "anthropic-version: 2023-06-01"
BEARER = f"Authorization: Bearer {KEY}"
KEY_HEADER = f"x-api-key: {KEY}"


def upstream(folder: Path, provider: str) -> LiveUpstream:
    """The first upstream of a provider as it comes out of the box."""
    path = folder / "routerd.toml"
    path.write_text(f'[state]\nurl = "memory:"\n[providers.{provider}]\napi_key = "{KEY}"\n')
    config = load(path, {})
    pool = Pool(config, open_store(config.state_url, folder), Telemetry())
    route = pool.route("auto")
    assert route is not None
    return next(route.upstreams())


@pytest.mark.parametrize(
    ("provider", "client", "line", "headers"),
    [
        ("anthropic", "messages", "POST /v1/messages HTTP/1.1", {KEY_HEADER, VERSION}),
        ("anthropic", "chat", "POST /v1/chat/completions HTTP/1.1", {BEARER}),
        ("mimo", "messages", "POST /anthropic/v1/messages HTTP/1.1", {KEY_HEADER, VERSION}),
        ("mimo", "chat", "POST /v1/chat/completions HTTP/1.1", {BEARER}),
        ("openrouter", "messages", "POST /api/v1/messages HTTP/1.1", {BEARER, VERSION}),
        ("mixroute", "messages", "POST /v1/messages HTTP/1.1", {BEARER, VERSION}),
        ("groq", "messages", "POST /openai/v1/chat/completions HTTP/1.1", {BEARER}),
    ],
)
def test_face(provider: str, client: str, line: str, headers: set[str], tmp_path: Path) -> None:
    """In the client's dialect if the provider speaks it, else in chat; the key goes where it is looked for there."""
    head = upstream(tmp_path, provider).face(client).target.head.decode()

    lines = head.split("\r\n")
    assert lines[0] == line
    assert {one for one in lines if one in {BEARER, KEY_HEADER, VERSION}} == headers


def test_demands_differ_by_dialect(tmp_path: Path) -> None:
    """Marks for the cache exist only in the dialect of the vendor that wants them."""
    live = upstream(tmp_path, "anthropic")

    assert {name: live.face(name).upstream.fix.cache_markers for name in ("chat", "messages")} == {
        "chat": False,
        "messages": True,
    }


def test_prefix_marks_are_chats_own(tmp_path: Path) -> None:
    """Where a broken-off answer is taken up by a mark that chat alone has, another dialect asks in words."""
    live = upstream(tmp_path, "deepseek")

    assert live.face("chat").prefills
    assert all(not live.face(name).prefills for name in DIALECTS if name != "chat" and name in live.faces)


@pytest.mark.parametrize(("client", "stream"), [(name, stream) for name in DIALECTS for stream in (True, False)])
async def test_a_face_that_is_refused_is_exchanged(
    client: str, stream: bool, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Who claims to speak a dialect and does not know the path, or the request's fields, is asked in another one."""
    server = await upstreams()  # knows chat alone
    text = config_text({"a": server}).replace('dialect = "chat"', f"dialect = {json.dumps(sorted(DIALECTS))}")
    request = Request("auto", stream=stream, messages=(Message("user", (Text("Hello."),)),), max_output_tokens=100)
    dialect = DIALECTS[client]
    async with daemon(text, tmp_path) as served:
        heard = await hear(served.url, dialect.encode_request(request), path=dialect.paths[0])

        assert heard.status == 200
        assert TEXT.split()[0].encode() in heard.data
        assert not heard.torn
        assert [one["outcome"] for one in served.exchanges[0]["attempts"]][-1] == "success"
        assert len(served.exchanges[0]["attempts"]) == (1 if client == "chat" else 2)


@pytest.mark.parametrize(
    ("provider", "kept", "rejected"),
    [("openai", "keep", ()), ("xai", "keep", ()), ("deepseek", "require", ("store", "include"))],
)
def test_thinking_in_the_dialect_that_seals_it(
    provider: str, kept: str, rejected: tuple[str, ...], tmp_path: Path
) -> None:
    """Chat at these vendors has no field for sealed thinking, or refuses to hear that nothing is to be stored."""
    live = upstream(tmp_path, provider)
    fix = live.face("responses").upstream.fix

    assert (fix.reasoning_content, fix.rejected_fields) == (kept, rejected)
    assert fix != live.face("chat").upstream.fix
