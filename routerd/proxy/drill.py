"""``routerd drill``: a real daemon between agents and upstreams that fail by script, all on this machine's loopback.

Theory of operation
-------------------
Each task of ``tasks`` has a route and two providers for itself, so that no breaker knows of another task's trouble.
Tasks run in batches, each with a daemon that is started for it: a process has only so many open files. Within a batch
some run side by side: more of those that mostly wait, which have batches of their own.

The tasks are done a second time straight at the faulty upstream, by a client with the habits of common SDKs (two
retries of what may pass), for comparison. At the end comes what ``spending`` is about.

What is ugly: daemon, upstreams and agents share one thread. On a slow or busy machine a healthy upstream may miss a
watchdog's limit; so the first batch, in which nothing goes wrong, measures the machine, and the limits are set by it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from routerd.dialects import DIALECTS
from routerd.proxy.laws import unsettled
from routerd.proxy.report import Report, Tally, report
from routerd.proxy.spending import spend
from routerd.proxy.stage import Agent, Client, Done, Stage, client, daemon, provider, settings, settled
from routerd.proxy.tasks import HEALTHY, MODEL, Case, Model, cases

BATCH = 64  # tasks; each takes up to six open files, and many systems allow 1024
SIDE_BY_SIDE = 12
WAITING_SIDE_BY_SIDE = 36  # of tasks that wait most of the time
LIMIT_MIN_S, LIMIT_MAX_S = 0.5, 4.0  # of the watchdogs: for the first token, and for silence after it
LIMIT_FACTOR = 6.0  # times the slowest healthy turn
PATIENCE_S = 30.0  # of an agent: whoever hears nothing for so long has lost its turn
SDK_RETRIES = 2


async def drill(seed: int, *, quick: bool, progress: Callable[[float], None] = lambda _: None) -> Report:
    """Run it all. ``progress`` is told the part that is done, 0 to 1."""
    began, before = time.monotonic(), asyncio.all_tasks()
    dialects, tally = tuple(DIALECTS), Tally(limit_s=LIMIT_MAX_S)
    found = cases(dialects, seed, quick=quick)
    async with Stage() as stage:
        for batch in _batches(found):
            await _run_batch(batch, stage, tally)
            if batch[0].trouble is HEALTHY:
                tally.limit_s = _fitting_limit_s(tally.routed)
            progress(len(tally.routed) / len(found))
        spent = await spend(stage, seed)
        tally.left.connections = await stage.connections()
    tally.left.tasks = await settled(lambda: len(asyncio.all_tasks() - before))
    tally.seconds = round(time.monotonic() - began, 2)
    return report(seed, dialects, tally, spent)


# --- running --------------------------------------------------------------------------------------------------------


def _batches(found: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """The healthy ones first, then those that work, then those that mostly wait."""
    kinds = itertools.groupby(sorted(found, key=_kind), key=_kind)
    for _, group in kinds:
        alike = list(group)
        yield from (alike[start : start + BATCH] for start in range(0, len(alike), BATCH))


def _kind(case: Case) -> int:
    return 0 if case.trouble is HEALTHY else 1 + case.trouble.waits


def _fitting_limit_s(healthy: Sequence[Sequence[Done]]) -> float:
    """A limit for the watchdogs that no healthy upstream misses on this machine, as far as that can be known."""
    worst_s = max(turn.seconds for task in healthy for turn in task)
    return round(min(max(LIMIT_MIN_S, LIMIT_FACTOR * worst_s), LIMIT_MAX_S), 1)


async def _run_batch(batch: Sequence[Case], stage: Stage, tally: Tally) -> None:
    width = WAITING_SIDE_BY_SIDE if batch[0].trouble.waits else SIDE_BY_SIDE
    models = [(Model(case, "a"), Model(case, "b")) for case in batch]
    text = settings(tally.limit_s) + "".join(
        [await _config_of(case, *pair, stage) for case, pair in zip(batch, models, strict=True)]
    )
    async with daemon(text) as served:
        async with client(PATIENCE_S) as front:
            agents = [
                Agent(case, front, f"{served.url}/v1", f"c{case.number}", faulty)
                for case, (faulty, _) in zip(batch, models, strict=True)
            ]
            tally.routed += await _side_by_side(agents, width)
        tally.left.unfinished += await served.unfinished()
        books = served.books(sum(agent.asked for agent in agents), _by_provider(models))
        tally.attempts += sum(books.logged.values())
        tally.unsettled += unsettled(books)
    tally.direct += await direct(batch, stage, width, tally.limit_s)


def _by_provider(models: Sequence[tuple[Model, Model]]) -> dict[str, Model]:
    return {f"{model.who}{model.case.number}": model for pair in models for model in pair}


async def _config_of(case: Case, first: Model, second: Model, stage: Stage) -> str:
    """The two providers and the route of one task."""
    name = f"a{case.number}"
    first_url = await stage.put_refusing(first, case) if case.trouble.refuses else stage.put(name, first)
    second_url = stage.put(f"b{case.number}", second)
    route = f"""
[routes.c{case.number}]
models = ["{name}/{MODEL}", "b{case.number}/{MODEL}"]
delivery = "{case.delivery}"
"""
    return route + provider(name, first_url) + provider(f"b{case.number}", second_url)


async def direct(batch: Sequence[Case], stage: Stage, width: int, limit_s: float) -> list[list[Done]]:
    """The same tasks without a router, in the dialect of the upstream."""
    async with client(limit_s, retries=SDK_RETRIES) as front:
        spoken = [msgspec.structs.replace(case, dialect="chat") for case in batch]
        return await _side_by_side([await _direct_agent(case, front, stage) for case in spoken], width)


async def _direct_agent(case: Case, front: Client, stage: Stage) -> Agent:
    model = Model(case, "a")
    url = await stage.put_refusing(model, case) if case.trouble.refuses else stage.put(f"d{case.number}", model)
    return Agent(case, front, url, MODEL, model)


async def _side_by_side(agents: Sequence[Agent], width: int) -> list[list[Done]]:
    """All of them, so many at a time."""
    places = asyncio.Semaphore(width)

    async def work(agent: Agent) -> list[Done]:
        async with places:
            return await agent.work()

    return await asyncio.gather(*(work(agent) for agent in agents))
