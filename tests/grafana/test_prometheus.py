"""What a real Prometheus makes of a daemon that has a bad minute: every panel has something to show."""

from __future__ import annotations

import asyncio
import contextlib
import math
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from routerd.canonical import Usage
from routerd.proxy.simulated import Answer, Fault, Received, Turn
from tests.fakes import ScriptedUpstream
from tests.feeds import Page, ScriptedFeed, tree_body
from tests.grafana import boards
from tests.grafana.prometheus import Prometheus, Series, needs_prometheus, prometheus
from tests.grafana.test_rules import PROMTOOL, needs_promtool
from tests.rig import HELLO, MODEL, Daemon, daemon, post, provider

pytestmark = pytest.mark.real

USAGE = Usage(input_tokens=2000, cached_tokens=1500, output_tokens=300, reasoning_tokens=100)
GOOD = Turn(Answer(usage=USAGE, pace_s=0.005))  # paced, so that it comes in more than one piece
LIMITED = Turn(fault=Fault("status", status=429, headers=(("retry-after", "0.2"),)))
DOWN = Turn(fault=Fault("status", status=503))
STALLED = Turn(fault=Fault("stall", "mid_text"))
ROUNDS = 6


def _fickle(request: Received) -> Turn:
    """A provider that throttles, fails, falls silent, and sometimes answers."""
    return (DOWN, LIMITED, STALLED, GOOD)[request.number % 4]


def _prices(feed: ScriptedFeed) -> str:
    """TOML for a provider that nobody asks, and the list with its prices."""
    known = '[providers.spare]\npreset = "minimax"\napi_key = "unused"\n'
    return f'{known}[prices]\nrefresh = "1h"\nurls = {{ "models.dev" = "{feed.url}" }}\n'


def _text(steady: ScriptedUpstream, fickle: ScriptedUpstream, last: ScriptedUpstream) -> str:
    quotas = """limits = [{ requests = 1000, per = "day", resets = "UTC" }, { tokens = 9000000, per = "minute" }]"""
    dollars = """limits = [{ usd = 5.0, per = "day", resets = "Europe/Berlin" }]"""
    return f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "memory:"
[defaults]
stall_timeout = "200ms"
max_wait = "400ms"
breaker = {{ failures = 2, open = "200ms", open_max = "400ms" }}
[routes.auto]
models = [["steady/{MODEL}", "fickle/{MODEL}"], "last/{MODEL}"]
budget = {{ usd = 3.0, per = "day" }}
{provider("steady", steady.base_url, extra=quotas)}
{provider("fickle", fickle.base_url)}
{provider("last", last.base_url, extra=dollars)}
"""


@asynccontextmanager
async def _served(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with (
        ScriptedUpstream(GOOD) as steady,
        ScriptedUpstream(_fickle) as fickle,
        ScriptedUpstream(GOOD) as last,
        ScriptedFeed(Page(tree_body({}))) as feed,
        daemon(_text(steady, fickle, last) + _prices(feed), tmp_path) as served,
    ):
        yield served


async def _load(url: str) -> None:
    """A few seconds of work: streamed and whole, on the route and pinned to each provider, with mistakes."""
    for _ in range(ROUNDS):
        models = ("auto", f"fickle/{MODEL}", f"last/{MODEL}", "no-such-model")
        bodies = [{**HELLO, "model": model, "stream": stream} for model in models for stream in (True, False)]
        await asyncio.gather(*(_ask(url, body) for body in bodies))


async def _ask(url: str, body: Any) -> None:
    """One request; its answer may well be torn."""
    with contextlib.suppress(aiohttp.ClientPayloadError):
        await post(url, body)


def _numbers(series: list[Series]) -> list[float]:
    """The finite values in an answer, of one moment or of many."""
    values = (float(value) for one in series for _, value in one.get("values") or [one["value"]])
    return [value for value in values if math.isfinite(value)]


async def _empty_panels(server: Prometheus) -> dict[str, Any]:
    """The panels of which any query has nothing to show."""
    empty = {}
    for where, panel in boards.panels().items():
        answers = [await server.ask(query) for query in boards.queries(panel, where)]
        if not all(_numbers(answer) for answer in answers):
            empty[where] = panel
    return empty


@needs_prometheus
async def test_dashboards(tmp_path: Path) -> None:
    """Fresh, a panel shows numbers or says why it has none; after a bad minute every query of every one shows some."""
    async with _served(tmp_path) as served, prometheus(served.url, tmp_path) as server:
        silent = [where for where, panel in (await _empty_panels(server)).items() if not _excuse(panel)]
        await _load(served.url)
        ended = served.total("routerd_exchanges_total")
        await server.until(lambda: _equals(server, "sum(routerd_exchanges_total)", ended))
        await server.until(partial(server.value, "routerd_prices_last_refresh_timestamp_seconds"))

        assert silent == []
        assert list(await _empty_panels(server)) == []
        for series, label in boards.variables().values():
            assert await server.label_values(series, label)
        for expr in boards.annotation_counts().values():
            assert _numbers(await server.over_time(expr))
        assert max(_numbers(await server.over_time(boards.annotation_counts()["Breakers"]))) > 0
        assert [rule["name"] for rule in await server.rules() if rule["health"] != "ok"] == []
        assert await server.label_values("routerd_exchanges_total", "route") == [
            "auto",
            f"fickle/{MODEL}",
            f"last/{MODEL}",
            "other",
        ]


def _excuse(panel: Any) -> str:
    return str(panel["fieldConfig"]["defaults"].get("noValue", ""))


async def _equals(server: Prometheus, expr: str, value: float) -> bool:
    return await server.value(expr) == value


@needs_prometheus
async def test_counts_from_the_first_event_on(tmp_path: Path) -> None:
    """The first turn, failover and rescue after a start are seen as an increase: their counters began at zero."""
    async with ScriptedUpstream(DOWN) as down, ScriptedUpstream(GOOD) as up:
        text = _text(down, down, up)
        async with daemon(text, tmp_path) as served, prometheus(served.url, tmp_path) as server:
            await post(served.url, HELLO)
            await server.until(lambda: server.value("sum(routerd_exchanges_total)"))

            for counter in (
                'routerd_exchanges_total{outcome="success"}',
                'routerd_failovers_total{to_provider="last",outcome="unavailable"}',
                'routerd_recoveries_total{step="retry",result="success"}',
                'routerd_tokens_total{kind="cached"}',
                "routerd_cost_usd_total",
            ):
                await server.until(partial(server.value, f"sum(increase({counter}[1m])) > 0"))


@needs_promtool
async def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    """The exposition passes Prometheus' own lint, with every kind of series in it."""
    async with _served(tmp_path) as served:
        await _load(served.url)
        text = await _metrics(served.url)
    done = await asyncio.to_thread(
        subprocess.run, [PROMTOOL or "", "check", "metrics"], input=text.encode(), capture_output=True, check=False
    )

    assert (done.stdout + done.stderr).decode() == ""
    assert done.returncode == 0


async def _metrics(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as reply:
        assert reply.status == 200
        return await reply.text()
