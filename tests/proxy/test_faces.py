"""One provider in several dialects: where a request goes, with which key header, and what is demanded of it there."""

from __future__ import annotations

from pathlib import Path

import pytest

from routerd.config import load
from routerd.dialects import DIALECTS
from routerd.proxy.live import LiveUpstream
from routerd.proxy.pool import Pool
from routerd.state import open_store
from routerd.telemetry import Telemetry
from tests.rig import KEY

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
