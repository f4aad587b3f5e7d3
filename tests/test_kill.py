"""What ends with the process and what does not: quotas survive ``kill -9``, everything learned survives a stop."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from routerd.proxy.simulated import Fault, Turn
from tests.fakes import ScriptedUpstream, Upstreams
from tests.process_rig import Process, serving
from tests.rig import HELLO, MODEL, config_text, post

LIMIT = 50
CLIENTS = 5  # at most so many requests are in flight when the daemon is killed
DAY_S = 86_400
ANSWER_S = 0.1  # at most: slow enough to be caught in the middle of
STREAM = HELLO | {"stream": True}
PER_DAY = 'limits = [{{ requests = {limit}, per = "day", resets = "{zone}" }}]'


def calm_zone(wall: float) -> str:
    """UTC, or another zone for the minutes around midnight: a window that resets in mid-test proves nothing."""
    return "UTC" if 300 < wall % DAY_S < DAY_S - 300 else "Etc/GMT+6"


def until_midnight_s(zone: str, wall: float) -> float:
    offset_s = 0 if zone == "UTC" else -6 * 3600
    return DAY_S - (wall + offset_s) % DAY_S


def write_config(folder: Path, text: str) -> str:
    """A configuration that keeps its state in ``folder``; returns the path."""
    path = folder / "routerd.toml"
    path.write_text(text.replace("memory:", f"sqlite:{folder / 'state.db'}"))
    return str(path)


def slow(seconds: float) -> Turn:
    return Turn(fault=Fault("pause", "before_content", seconds=seconds))


class Client:
    """Asks for one answer after the other, and counts them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.served = 0
        self.refused = False

    async def ask_on(self) -> None:
        """Until it is refused, or the daemon is gone."""
        try:
            while not self.refused:
                status, _, _ = await post(self._url, HELLO)
                assert status in (200, 429)
                self.served += status == 200
                self.refused = status == 429
        except aiohttp.ClientError:
            return


async def ask_until_killed(
    process: Process, upstream: ScriptedUpstream, after: int, pause_s: float = 0.0, *, count: int = CLIENTS
) -> list[Client]:
    """Let so many clients ask, and kill the daemon a moment after the upstream has seen ``after`` requests in all."""
    clients = [Client(process.url) for _ in range(count)]
    asking = [asyncio.ensure_future(client.ask_on()) for client in clients]
    seen: asyncio.Future[Any] = asyncio.ensure_future(upstream.requested(after))
    refused: asyncio.Future[Any] = asyncio.gather(*asking)
    await asyncio.wait({seen, refused}, return_when=asyncio.FIRST_COMPLETED)
    seen.cancel()
    await asyncio.sleep(pause_s)
    assert await process.stop(signal.SIGKILL) == -signal.SIGKILL
    await refused
    return clients


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_kill_lets_a_daily_limit_be_overspent(seed: int, tmp_path: Path, upstreams: Upstreams) -> None:
    """Killed at random under load, again and again, it is used to the last request and not one further."""
    draw, kills = random.Random(seed), 0
    upstream = await upstreams(lambda _request: slow(draw.uniform(0, ANSWER_S)))
    zone = calm_zone(time.time())
    config = write_config(tmp_path, config_text({"free": upstream}, extra=PER_DAY.format(limit=LIMIT, zone=zone)))
    clients: list[Client] = []

    while len(upstream.requests) + 3 * CLIENTS < LIMIT and not any(client.refused for client in clients):
        async with serving("--config", config, folder=tmp_path) as process:
            after = len(upstream.requests) + draw.randint(1, CLIENTS)
            clients += await ask_until_killed(process, upstream, after, draw.uniform(0, ANSWER_S))
            kills += 1
    async with serving("--config", config, folder=tmp_path) as process:
        last = [Client(process.url) for _ in range(CLIENTS)]
        await asyncio.gather(*(client.ask_on() for client in last))
    async with serving("--config", config, folder=tmp_path) as process:
        status, headers, _ = await post(process.url, HELLO)
        expected_s = until_midnight_s(zone, time.time())

    served = sum(client.served for client in clients + last)
    print(f"{served} of {LIMIT} served, {len(upstream.requests)} sent, {kills} kills with up to {CLIENTS} in flight")
    assert kills >= 2
    assert len(upstream.requests) <= LIMIT
    assert served >= LIMIT - kills * CLIENTS
    assert all(client.refused for client in last)
    assert status == 429
    assert int(headers["Retry-After"]) == pytest.approx(expected_s, abs=5)


async def test_what_was_in_flight_at_a_kill_counts_as_spent(tmp_path: Path, upstreams: Upstreams) -> None:
    """The upstream has counted it, whatever became of the answer."""
    upstream = await upstreams(Turn(fault=Fault("stall", "mid_text")), Turn())
    per_day = PER_DAY.format(limit=3, zone=calm_zone(time.time()))
    config = write_config(tmp_path, config_text({"free": upstream}, extra=per_day))

    async with serving("--config", config, folder=tmp_path) as process:
        await ask_until_killed(process, upstream, after=1, count=1)
    async with serving("--config", config, folder=tmp_path) as process:
        client = Client(process.url)
        await client.ask_on()

    assert (client.served, client.refused) == (2, True)
    assert len(upstream.requests) == 3


async def test_a_stop_keeps_breakers_and_latencies(tmp_path: Path, upstreams: Upstreams) -> None:
    """What it has learned of its providers by SIGTERM, the next process knows from the start."""
    broken, fine = await upstreams(Turn(fault=Fault("status", status=503))), await upstreams()
    patient = 'breaker = { failures = 3, open = "10m" }'
    config = write_config(tmp_path, config_text({"broken": broken, "fine": fine}, defaults=patient))

    async with serving("--config", config, folder=tmp_path) as process:
        assert [(await post(process.url, STREAM))[0] for _ in range(3)] == [200] * 3
        before = await metrics(process.url)
        assert await process.stop() == 0
    async with serving("--config", config, folder=tmp_path) as process:
        after = await metrics(process.url)
        assert (await post(process.url, STREAM))[0] == 200

    assert state_of(after, "broken") == {"open": 1, "closed": 0, "half-open": 0}
    assert state_of(after, "fine") == {"open": 0, "closed": 1, "half-open": 0}
    assert latency_s(before, "fine") < 1 < 10 < latency_s(before, "broken")
    assert latency_s(after, "fine") == pytest.approx(latency_s(before, "fine"), abs=0.2)
    assert latency_s(after, "broken") == pytest.approx(latency_s(before, "broken"), rel=0.1)
    assert len(broken.requests) == 3


async def test_a_stop_lets_open_exchanges_end(tmp_path: Path, upstreams: Upstreams) -> None:
    """Nobody new is let in, and nobody who is in is thrown out."""
    upstream = await upstreams(Turn(fault=Fault("pause", "mid_text", seconds=0.5)))
    config = write_config(tmp_path, config_text({"slow": upstream}))

    async with serving("--config", config, folder=tmp_path) as process:
        asked = asyncio.ensure_future(post(process.url, HELLO))
        await upstream.requested(1)
        assert await process.stop() == 0
        status, _, body = await asked

    assert status == 200
    assert b'"finish_reason":"stop"' in body


Samples = list[tuple[str, Mapping[str, str], float]]


async def metrics(url: str) -> Samples:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as reply:
        families = text_string_to_metric_families(await reply.text())
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


def of_model(samples: Samples, name: str, provider: str) -> list[tuple[Mapping[str, str], float]]:
    labels_wanted = {"provider": provider, "model": MODEL}
    return [
        (labels, value)
        for sample, labels, value in samples
        if sample == name and labels_wanted.items() <= labels.items()
    ]


def state_of(samples: Samples, provider: str) -> dict[str, float]:
    return {labels["state"]: value for labels, value in of_model(samples, "routerd_breaker_state", provider)}


def latency_s(samples: Samples, provider: str) -> float:
    ((_, value),) = of_model(samples, "routerd_upstream_latency_estimate_seconds", provider)
    return value
