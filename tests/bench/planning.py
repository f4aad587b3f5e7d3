"""How long the choice of an upstream takes, by how many there are: the planner called in this process.

Each size is a config file, read and built by the daemon's own code: so many providers, each with two rolling quotas, a
breaker and one model. In one variant only three of them serve the model that is asked for, in the other all do. What is
timed, in CPU time, is what a request pays: the name looked up, and one plan. Nothing is reserved or sent.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from routerd import config
from routerd.canonical import Head
from routerd.proxy.pool import Pool
from routerd.state import open_store
from routerd.telemetry import Telemetry
from tests.bench.figures import SERVED, SIZES
from tests.bench.report import OURS
from tests.bench.scenarios import Figures

FEW = 3
BATCHES = 7
BATCH_S = 0.03
WANTED = "wanted"
CONVERSATIONS = 64
LIMITS = '[ { requests = 1_000_000, per = "minute" }, { tokens = 1_000_000_000, per = "minute" } ]'


def measure() -> dict[str, dict[str, list[Figures]]]:
    """Scenario -> routerd -> batches, as the other scenarios give their rounds."""
    sizes = [(variant, size) for variant in SERVED for size in SIZES]
    return {f"plan_{variant}_{size}": {OURS: asyncio.run(batches(variant, size))} for variant, size in sizes}


async def batches(variant: str, size: int) -> list[Figures]:
    """Times of one size. A pool's connections belong to a loop, though none is ever opened here."""
    pool = build(size, size if variant == "all" else FEW)
    try:
        return [{"plan_us": time_us} for time_us in plan_times_us(pool)]
    finally:
        await pool.close()


def build(size: int, serving: int) -> Pool:
    """A pool of ``size`` upstreams, of which ``serving`` serve the wanted model."""
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as directory:
        file = Path(directory) / "routerd.toml"
        providers = (provider(number, WANTED if number < serving else f"other-{number}") for number in range(size))
        file.write_text("\n".join(['[state]\nurl = "memory:"', *providers]))
        return Pool(config.load(file, {}), open_store("memory:", Path(directory)), Telemetry())


def provider(number: int, model: str) -> str:
    price = 0.1 + number % 7 / 10
    return f"""
[providers.p{number}]
base_url = "http://127.0.0.1:9/p{number}/v1"
dialect = "chat"
api_key = "key-{number}"
limits = {LIMITS}
[providers.p{number}.models]
"{model}" = {{ id = "{model}", context = 1_048_576, input = {price:.1f}, output = {2 * price:.1f} }}
"""


def plan_times_us(pool: Pool) -> list[float]:
    """Microseconds per plan, of each batch."""
    heads = [head(conversation) for conversation in range(CONVERSATIONS)]
    once_s = batch_s(pool, heads[:1] * 3) / 3
    plans = max(1, int(BATCH_S / once_s))
    batch = (heads * (plans // len(heads) + 1))[:plans]
    return [1e6 * batch_s(pool, batch) / plans for _ in range(BATCHES)]


def head(conversation: int) -> Head:
    """What routing knows of an agent's request in the middle of its work."""
    return Head(WANTED, True, True, False, True, None, 20_000 + conversation, conversation)


def batch_s(pool: Pool, heads: Sequence[Head]) -> float:
    """CPU seconds to plan once for each of the requests."""
    begun_s = time.thread_time()
    for one in heads:
        route = pool.route(WANTED)
        assert route is not None
        plan = pool.planner.plan(route, one, now=time.monotonic(), wall=time.time(), draw=random.random())
        assert plan.chosen is not None
    return time.thread_time() - begun_s
