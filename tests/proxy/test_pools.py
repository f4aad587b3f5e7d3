"""How load is spread: over the keys of a provider, by price and cache, within budgets, and away from what failed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from routerd.canonical import Usage
from routerd.proxy.simulated import Answer, Fault, Received, Turn
from tests.fakes import ScriptedUpstream, Upstreams
from tests.proxy.wire import error_of, get, hear, streamed
from tests.rig import HELLO, KEY, MODEL, WEATHER, Daemon, config_text, daemon

KEYS = ("first-key", "second-key")
BAD = Turn(fault=Fault("status", status=500))
SLOW = Turn(Answer(text="Slowly.", pace_s=0.02))


def pool_of(upstreams: Mapping[str, Any], **options: str) -> str:
    """A config whose first provider has two keys."""
    keys = ", ".join(f'"{key}"' for key in KEYS)
    return config_text(upstreams, **options).replace(f'api_key = "{KEY}"', f"keys = [{keys}]", 1)


def one_tier(upstreams: Mapping[str, Any], **options: str) -> str:
    """A config whose providers all stand in the first tier of ``auto``."""
    text = config_text(upstreams, **options)
    tiers = ", ".join(f'"{name}/{MODEL}"' for name in upstreams)
    return text.replace(f"models = [{tiers}]", f"models = [[{tiers}]]", 1)


def keys_of(upstream: ScriptedUpstream) -> Counter[str]:
    """How often each key was used."""
    return Counter(request.headers["authorization"].removeprefix("Bearer ") for request in upstream.requests)


def refuse(key: str, status: int, *headers: tuple[str, str]) -> Any:
    """A step that refuses one key and serves all others."""

    def step(request: Received) -> Turn:
        refused = request.headers["authorization"].endswith(key)
        return Turn(fault=Fault("status", status=status, headers=headers) if refused else None)

    return step


async def _state(served: Daemon, provider: str, model: str) -> str:
    """The state of a breaker, as a scrape shows it."""
    labels = {"provider": provider, "model": model}
    states = ("closed", "open", "half-open")
    return next(state for state in states if served.metric("routerd_breaker_state", state=state, **labels))


# --- keys -----------------------------------------------------------------------------------------------------------


async def test_keys_share_the_load(upstreams: Upstreams, tmp_path: Path) -> None:
    """Requests under way at the same time are spread over a provider's keys, the less loaded one first."""
    upstream: ScriptedUpstream = await upstreams(SLOW)
    async with daemon(pool_of({"a": upstream}), tmp_path) as served:
        await asyncio.gather(*(hear(served.url) for _ in range(20)))

        assert keys_of(upstream) == {"first-key": 10, "second-key": 10}


@pytest.mark.parametrize("status", [401, 402, 403, 429])
async def test_refused_key_leaves_the_other_one_working(status: int, upstreams: Upstreams, tmp_path: Path) -> None:
    """One key's trouble is its own: the provider stays in service, and the client sees nothing of it."""
    upstream: ScriptedUpstream = await upstreams(refuse("first-key", status, ("retry-after", "3600")))
    other = await upstreams()
    async with daemon(pool_of({"a": upstream, "b": other}), tmp_path) as served:
        statuses = [(await hear(served.url)).status for _ in range(10)]

        assert statuses == [200] * 10
        assert keys_of(upstream)["first-key"] <= 1
        assert keys_of(upstream)["second-key"] == 10
        assert not other.requests
        assert await _state(served, "a", "*") == "closed"
        assert (await get(served.url, "/readyz")).status == 200


async def test_provider_without_a_working_key_is_left(upstreams: Upstreams, tmp_path: Path) -> None:
    """Each key is found out once; then the next tier serves."""
    upstream: ScriptedUpstream = await upstreams(Turn(fault=Fault("status", status=401)))
    other: ScriptedUpstream = await upstreams()
    async with daemon(pool_of({"a": upstream, "b": other}), tmp_path) as served:
        statuses = [(await hear(served.url)).status for _ in range(3)]

        assert statuses == [200] * 3
        assert keys_of(upstream) == {"first-key": 1, "second-key": 1}
        assert await _state(served, "a", "*") == "open"


async def test_limits_hold_for_each_key(upstreams: Upstreams, tmp_path: Path) -> None:
    """A vendor counts per account, so two keys are worth two allowances, and metrics show their sum."""
    upstream: ScriptedUpstream = await upstreams()
    other: ScriptedUpstream = await upstreams()
    text = pool_of({"a": upstream, "b": other}).replace(
        "[providers.a.models]", '[[providers.a.limits]]\nrequests = 3\nper = "day"\n[providers.a.models]'
    )
    async with daemon(text, tmp_path) as served:
        statuses = [(await hear(served.url)).status for _ in range(8)]

        assert statuses == [200] * 8
        assert keys_of(upstream) == {"first-key": 3, "second-key": 3}
        assert len(other.requests) == 2
        assert served.metric("routerd_quota_limit", provider="a", limit="requests/day") == 6
        assert served.metric("routerd_quota_remaining", provider="a", limit="requests/day") == 0


# --- money ----------------------------------------------------------------------------------------------------------

DEAR = "input = 10, output = 20"


async def test_cheapest_of_a_tier_serves(upstreams: Upstreams, tmp_path: Path) -> None:
    """Among equals the price decides; a failure of the cheap one is made good by the dear one."""
    dear, cheap = await upstreams(), await upstreams(*[Turn()] * 5, BAD)
    text = one_tier({"dear": dear, "cheap": cheap}).replace("input = 1, output = 2", DEAR, 1)
    async with daemon(text, tmp_path) as served:
        answers = [await hear(served.url) for _ in range(6)]

        assert [heard.status for heard in answers] == [200] * 6
        assert [heard.headers["x-routerd-provider"] for heard in answers] == ["cheap"] * 5 + ["dear"]
        assert served.metric("routerd_upstream_score_usd", route="auto", provider="cheap", model=MODEL) > 0


async def test_conversation_stays_where_its_cache_is_warm(upstreams: Upstreams, tmp_path: Path) -> None:
    """The second turn of a long conversation costs a tenth where the first one went, so it goes there."""
    several: dict[str, ScriptedUpstream] = {name: await upstreams() for name in ("a", "b", "c")}
    text = one_tier(several).replace("output = 2", "output = 2, cached = 0.1")
    messages = [{"role": "system", "content": "You know this book: " + "word " * 20_000}, *HELLO["messages"]]
    async with daemon(text, tmp_path) as served:
        answers = [await hear(served.url, HELLO | {"messages": messages})]
        for _ in range(9):
            messages = [*messages, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And?"}]
            answers.append(await hear(served.url, HELLO | {"messages": messages}))

        assert len({heard.headers["x-routerd-provider"] for heard in answers}) == 1


async def test_budget_of_a_route(upstreams: Upstreams, tmp_path: Path) -> None:
    """When it is spent, the route refuses what costs money until the budget is whole; other names still work."""
    upstream = await upstreams(Turn(Answer(usage=Usage(input_tokens=600_000))))  # 60 cents
    budget = 'budget = { usd = 1.0, per = "day", resets = "UTC" }'
    async with daemon(config_text({"a": upstream}, more=budget), tmp_path) as served:
        answers = [await hear(served.url) for _ in range(3)]
        direct = await hear(served.url, HELLO | {"model": MODEL})

        assert [heard.status for heard in answers] == [200, 200, 429]
        assert 0 < int(answers[2].headers["Retry-After"]) <= 86_402
        assert len(error_of(answers[2])["message"]) < 120
        assert direct.status == 200
        assert len(upstream.requests) == 3
        assert served.metric("routerd_budget_remaining_usd", scope="auto") == 0
        assert served.metric("routerd_cost_usd_total", provider="a", model=MODEL) == pytest.approx(1.8)


async def test_free_upstream_serves_when_the_money_is_spent(upstreams: Upstreams, tmp_path: Path) -> None:
    """What costs nothing passes a budget with nothing left."""
    dear, free = await upstreams(Turn(Answer(usage=Usage(input_tokens=2_000_000)))), await upstreams()
    text = config_text({"dear": dear, "free": free}, more='budget = { usd = 1.0, per = "day" }')
    head, _, tail = text.rpartition("input = 1, output = 2")
    async with daemon(f"{head}input = 0, output = 0{tail}", tmp_path) as served:
        answers = [await hear(served.url) for _ in range(3)]

        assert [heard.status for heard in answers] == [200] * 3
        assert [heard.headers["x-routerd-provider"] for heard in answers] == ["dear", "free", "free"]


async def test_dollar_limit_of_a_provider(upstreams: Upstreams, tmp_path: Path) -> None:
    """Money can be a provider's limit, too; then the next one serves."""
    dear, other = await upstreams(Turn(Answer(usage=Usage(input_tokens=2_000_000)))), await upstreams()
    limits = 'limits = [ { usd = 1.0, per = "day" } ]'
    async with daemon(config_text({"a": dear, "b": other}, extra=limits), tmp_path) as served:
        answers = [await hear(served.url) for _ in range(3)]

        assert [heard.headers["x-routerd-provider"] for heard in answers] == ["a", "b", "b"]


# --- calls on the side ----------------------------------------------------------------------------------------------

SIDE = {"no tools, no stream": ({}, "side"), "tools": ({"tools": [WEATHER]}, "a"), "stream": ({"stream": True}, "a")}


@pytest.mark.parametrize(("fields", "provider"), SIDE.values(), ids=SIDE)
async def test_auxiliary_calls_have_tiers_of_their_own(
    fields: dict[str, Any], provider: str, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Titles and summaries are asked for without tools and stream: they go to the auxiliary models first."""
    several = {"a": await upstreams(), "side": await upstreams()}
    async with daemon(config_text(several, more=f'auxiliary = ["side/{MODEL}"]'), tmp_path) as served:
        heard = await hear(served.url, HELLO | fields)

        assert heard.headers["x-routerd-provider"] == provider


async def test_auxiliary_calls_fall_back_on_the_route(upstreams: Upstreams, tmp_path: Path) -> None:
    """When the auxiliary model fails, the route's own serve."""
    several: dict[str, ScriptedUpstream] = {"a": await upstreams(), "side": await upstreams(BAD)}
    async with daemon(config_text(several, more=f'auxiliary = ["side/{MODEL}"]'), tmp_path) as served:
        heard = await hear(served.url)

        assert len(several["side"].requests) == 1
        assert heard.status == 200
        assert heard.headers["x-routerd-provider"] == "a"


# --- coming back ----------------------------------------------------------------------------------------------------

TOUCHY = 'first_token_timeout = "300ms"\nbreaker = { failures = 1, open = "200ms", open_max = "200ms" }'
OPEN_S = 0.2


async def test_one_request_probes(upstreams: Upstreams, tmp_path: Path) -> None:
    """When an opening is over, one real request tries the upstream, with another one behind it; the rest stay away."""
    failing: ScriptedUpstream = await upstreams(BAD, Turn(fault=Fault("stall")), BAD)
    healthy = await upstreams(SLOW)
    async with daemon(config_text({"a": failing, "b": healthy}, defaults=TOUCHY), tmp_path) as served:
        await hear(served.url)
        await asyncio.sleep(OPEN_S)
        answers = await asyncio.gather(*(hear(served.url) for _ in range(5)))

        assert [heard.status for heard in answers] == [200] * 5
        assert {heard.headers["x-routerd-provider"] for heard in answers} == {"b"}
        assert len(failing.requests) == 2
        assert served.metric("routerd_breaker_transitions_total", provider="a", model=MODEL, to="half-open") == 1
        assert served.metric("routerd_breaker_transitions_total", provider="a", model=MODEL, to="open") == 2
        assert served.metric("routerd_recoveries_total", step="probe", result="failure") == 1


async def test_good_probe_brings_the_upstream_back(upstreams: Upstreams, tmp_path: Path) -> None:
    """Its answer is the client's answer, and from then on the upper tier serves again."""
    failing: ScriptedUpstream = await upstreams(BAD, Turn())
    healthy: ScriptedUpstream = await upstreams()
    async with daemon(config_text({"a": failing, "b": healthy}, defaults=TOUCHY), tmp_path) as served:
        await hear(served.url)
        assert await _state(served, "a", MODEL) == "open"
        await asyncio.sleep(OPEN_S)
        answers = [await hear(served.url) for _ in range(3)]

        assert [heard.headers["x-routerd-provider"] for heard in answers] == ["a"] * 3
        assert len(healthy.requests) == 1
        assert await _state(served, "a", MODEL) == "closed"
        assert served.metric("routerd_recoveries_total", step="probe", result="success") == 1


async def test_client_that_leaves_frees_the_probe(upstreams: Upstreams, tmp_path: Path) -> None:
    """A probe whose client hung up proved nothing: the next request is the probe, and nothing stays half-open."""
    failing: ScriptedUpstream = await upstreams(BAD, Turn(fault=Fault("stall")), Turn())
    healthy = await upstreams()
    settings = TOUCHY.replace("300ms", "60s")
    async with daemon(config_text({"a": failing, "b": healthy}, defaults=settings), tmp_path) as served:
        await hear(served.url)
        await asyncio.sleep(OPEN_S)
        leaving = asyncio.create_task(hear(served.url))
        await failing.requested(2)
        leaving.cancel()
        await asyncio.wait([leaving])
        await failing.idle()
        heard = await hear(served.url)

        assert heard.headers["x-routerd-provider"] == "a"
        assert await _state(served, "a", MODEL) == "closed"


LASTING = 'breaker = { failures = 1, open = "10m" }\nmax_wait = "0s"'


async def test_open_breakers_never_leave_nobody(upstreams: Upstreams, tmp_path: Path) -> None:
    """With nothing else to ask, an open upstream is asked all the same; its success brings it back."""
    upstream = await upstreams(BAD, Turn())
    async with daemon(config_text({"a": upstream}, defaults=LASTING), tmp_path) as served:
        statuses = [(await hear(served.url)).status for _ in range(3)]

        assert statuses == [503, 200, 200]
        assert await _state(served, "a", MODEL) == "closed"


async def test_least_bad_is_tried_and_then_the_other(upstreams: Upstreams, tmp_path: Path) -> None:
    """If every breaker of a route is open, all its upstreams still get their chance within one exchange."""
    worst, better = await upstreams(BAD), await upstreams(BAD, Turn())
    async with daemon(config_text({"a": worst, "b": better}, defaults=LASTING), tmp_path) as served:
        first, second = await hear(served.url), await hear(served.url, streamed())

        assert first.status == 503
        assert second.status == 200
        assert second.headers["x-routerd-provider"] == "b"


async def test_readiness_tells_of_breakers(upstreams: Upstreams, tmp_path: Path) -> None:
    """Not ready, and why, while every upstream is open."""
    async with daemon(config_text({"a": await upstreams(BAD)}, defaults=LASTING), tmp_path) as served:
        await hear(served.url)
        ready = await get(served.url, "/readyz")

        assert ready.status == 503
        assert list(ready.json["upstreams"]) == [f"a/{MODEL}"]
        assert "breaker" in str(ready.json["upstreams"])


async def test_first_answers_after_recovery_are_few(upstreams: Upstreams, tmp_path: Path) -> None:
    """An upstream that has just come back gets a part of its share at first, so that it is not run over."""
    back: ScriptedUpstream = await upstreams(BAD, Turn())
    steady: ScriptedUpstream = await upstreams()
    touchy = TOUCHY.replace("failures = 1", "failures = 1, slow_start_successes = 1000") + '\nmax_wait = "0s"'
    text = one_tier({"a": back, "b": steady}, defaults=touchy)
    async with daemon(text, tmp_path) as served:
        await hear(served.url, HELLO | {"model": f"a/{MODEL}"})
        await asyncio.sleep(OPEN_S)
        await hear(served.url)  # the probe
        before = len(back.requests), len(steady.requests)
        for _ in range(60):
            await hear(served.url)

        assert await _state(served, "a", MODEL) == "closed"
        assert len(back.requests) - before[0] < 25
        assert len(steady.requests) - before[1] > 35
