"""A whole daemon inside the test's own loop: real config text, real sockets, real store; log and metrics in reach."""

from __future__ import annotations

import io
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry

from routerd.config import load
from routerd.proxy.service import running
from routerd.state import open_store
from routerd.telemetry import Telemetry
from tests.fakes import ScriptedUpstream

TOKEN = "local-token"
KEY = "sk-upstream-key-never-to-be-seen"
MODEL = "model"
HELLO = {"model": "auto", "messages": [{"role": "user", "content": "Hello."}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Daemon:
    """A running daemon: where it listens, what it logged, what it counted."""

    def __init__(self, url: str, telemetry: Telemetry, log: io.BytesIO) -> None:
        self.url = url
        self.registry: CollectorRegistry = telemetry.registry
        self._log = log

    @property
    def log_text(self) -> str:
        return self._log.getvalue().decode()

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_text.splitlines()]

    @property
    def exchanges(self) -> list[dict[str, Any]]:
        """The log lines of ended exchanges, oldest first."""
        return [line for line in self.log if line["event"] == "exchange"]

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 if there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def total(self, name: str) -> float:
        """A metric's samples of this very name, added up over all labels."""
        return sum(
            sample.value for family in self.registry.collect() for sample in family.samples if sample.name == name
        )


def provider(
    name: str,
    base_url: str,
    *,
    extra: str = "",
    model: str = MODEL,
    price: str = "input = 1, output = 2",
    dialect: str = "chat",
) -> str:
    """TOML for one provider with one model."""
    return f"""
[providers.{name}]
base_url = "{base_url}"
dialect = "{dialect}"
api_key = "{KEY}"
{extra}
[providers.{name}.models]
"{model}" = {{ context = 131072, max_output = 8192, images = true, {price} }}
"""


def config_text(
    upstreams: Mapping[str, ScriptedUpstream], *, defaults: str = "", more: str = "", extra: str = ""
) -> str:
    """TOML for a daemon over these upstreams; ``auto`` tries them in order. ``extra`` goes into every provider."""
    providers = "".join(
        provider(name, upstream.base_url, extra=extra, dialect=upstream.dialect) for name, upstream in upstreams.items()
    )
    tiers = ", ".join(f'"{name}/{MODEL}"' for name in upstreams)
    return f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "memory:"
[defaults]
{defaults}
[routes.auto]
models = [{tiers}]
{more}
{providers}
"""


@asynccontextmanager
async def daemon(text: str, tmp_path: Path) -> AsyncIterator[Daemon]:
    """Serve this configuration while the context lasts."""
    path = tmp_path / f"routerd-{time.monotonic_ns()}.toml"
    path.write_text(text)
    config = load(path, {})
    log = io.BytesIO()
    telemetry = Telemetry(log)
    async with running(config, open_store(config.state_url, tmp_path), telemetry) as urls:
        yield Daemon(urls[0], telemetry, log)


async def post(url: str, body: Any, **options: Any) -> tuple[int, dict[str, str], bytes]:
    """One chat request on a connection of its own: status, headers, and the body as far as it came."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=body, **options) as reply,
    ):
        return reply.status, dict(reply.headers), await reply.read()
