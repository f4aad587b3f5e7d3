"""A real Prometheus on a free port, scraping one daemon every second, with the rules of the repository loaded."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.grafana import boards

PROGRAM = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(PROGRAM is None, reason="prometheus is not installed (Debian: prometheus)")
START_S = 20.0
POLL_S = 0.1
SHOWN_S = 60  # of the past, in queries over time

Series = dict[str, Any]


class Prometheus:
    """What it can be asked."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def _get(self, path: str, **params: str) -> Any:
        async with self._session.get(f"{self._url}/api/v1/{path}", params=params) as reply:
            body = await reply.json()
        assert body["status"] == "success", (params, body)
        return body["data"]

    async def ready(self) -> bool:
        try:
            async with self._session.get(f"{self._url}/-/ready") as reply:
                return reply.status == 200
        except aiohttp.ClientError:
            return False

    async def now(self, expr: str) -> list[Series]:
        """The series an expression gives at this moment."""
        data = await self._get("query", query=expr)
        return list(data["result"])

    async def value(self, expr: str) -> float:
        """The value of an expression that gives one series, 0 if it gives none."""
        series = await self.now(expr)
        return float(series[0]["value"][1]) if series else 0.0

    async def over_time(self, expr: str) -> list[Series]:
        """The series an expression gives over the last minute."""
        until = await self.value("vector(time())")
        data = await self._get("query_range", query=expr, start=str(until - SHOWN_S), end=str(until), step="1")
        return list(data["result"])

    async def ask(self, query: boards.Query) -> list[Series]:
        return await (self.now(query.expr) if query.instant else self.over_time(query.expr))

    async def label_values(self, series: str, label: str) -> list[str]:
        return list(await self._get(f"label/{label}/values", **{"match[]": series}))

    async def rules(self) -> list[dict[str, Any]]:
        data = await self._get("rules")
        return [rule for group in data["groups"] for rule in group["rules"]]

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait until something awaited is true; fail after a while."""
        async with asyncio.timeout(START_S):
            while not await condition():  # noqa: ASYNC110 - another process can set no event of ours
                await asyncio.sleep(POLL_S)


@asynccontextmanager
async def prometheus(target_url: str, folder: Path) -> AsyncIterator[Prometheus]:
    """A Prometheus that has scraped the daemon at least twice, so that what comes now is an increase."""
    port = _free_port()
    process = await asyncio.create_subprocess_exec(
        *_command(target_url, folder, port), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with aiohttp.ClientSession() as session:
            server = Prometheus(f"http://127.0.0.1:{port}", session)
            await server.until(server.ready)
            await server.until(lambda: server.value("count_over_time(routerd_build_info[1m]) >= 2"))
            yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _command(target_url: str, folder: Path, port: int) -> list[str]:
    config = folder / "prometheus.yml"
    config.write_text(f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{boards.RULES}"]
scrape_configs:
  - job_name: routerd
    static_configs: [{{targets: ["{urlsplit(target_url).netloc}"]}}]
""")
    return [
        PROGRAM or "",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]


def _free_port() -> int:
    """Prometheus cannot be asked which port it took, so one is chosen for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
