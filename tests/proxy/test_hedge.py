"""A hedged first token: a second upstream is asked when one is silent, and the first to speak stays."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from routerd.canonical import Usage
from routerd.policy.patience import SAMPLES_MIN
from routerd.proxy.simulated import TEXT, Answer, Fault, Turn
from tests.fakes import Upstreams
from tests.proxy.wire import Heard, hear, listening, streamed
from tests.rig import HELLO, WEATHER, Daemon, daemon, provider

SILENT = Turn(fault=Fault("stall", "before_content"))
PAID, FREE = "input = 1, output = 2", "input = 0, output = 0"
KNOWN = (Turn(),) * SAMPLES_MIN  # answers after which an upstream is known to be quick
SLOW = Turn(Answer(text="Late, but here."), fault=Fault("pause", "before_content", seconds=0.4))


def config(urls: dict[str, tuple[str, str]], hedge: str = 'hedge = "free"', *, state: str = "memory:") -> str:
    """TOML for providers by name, each with a URL and a price; ``auto`` has them as tiers."""
    providers = "".join(provider(name, url, model="m", price=price) for name, (url, price) in urls.items())
    tiers = ", ".join(f'"{name}/m"' for name in urls)
    return f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "{state}"
[defaults]
hedge_after = "100ms"
first_token_timeout = "5s"
stall_timeout = "300ms"
min_stall_timeout = "300ms"
max_wait = "0s"
[routes.auto]
models = [{tiers}]
{hedge}
{providers}
"""


def ended(served: Daemon) -> list[tuple[str, str]]:
    """How the attempts of the last exchange ended, in that order."""
    return [(one["provider"], one["outcome"]) for one in served.exchanges[-1]["attempts"]]


async def get_to_know(served: Daemon) -> None:
    """Let the first upstream of ``auto`` show how quick it usually is."""
    for _ in KNOWN:
        assert (await hear(served.url, streamed())).headers["x-routerd-provider"] == "a"


def hedged(served: Daemon, result: str) -> float:
    return served.metric("routerd_recoveries_total", step="hedge", result=result)


@pytest.mark.parametrize("delivery", ["live", "whole"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "body"])
async def test_the_second_answers_for_a_silent_first(
    upstreams: Upstreams, tmp_path: Path, delivery: str, stream: bool
) -> None:
    """The client waits for the hedge's delay and not for the first one's limit; it gets one answer, under one name."""
    silent, ready = await upstreams(*KNOWN, SILENT), await upstreams()
    more = f'hedge = "free"\ndelivery = "{delivery}"'
    text = config({"a": (silent.base_url, PAID), "b": (ready.base_url, FREE)}, more)
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, HELLO | {"stream": stream})
        await silent.idle()

        assert heard.status == 200
        assert (heard.text if stream else heard.json["choices"][0]["message"]["content"]) == TEXT
        assert 0.1 <= heard.reads[-1][0] < 3
        assert heard.headers["x-routerd-provider"] == "b"
        assert heard.headers["x-routerd-attempts"] == "2"
        assert ended(served) == [("a", "cancelled"), ("b", "success")]
        assert (hedged(served, "success"), hedged(served, "failure")) == (1, 0)
        assert (len(silent.requests), len(ready.requests)) == (SAMPLES_MIN + 1, 1)


async def test_the_first_stays_if_it_speaks_first(upstreams: Upstreams, tmp_path: Path) -> None:
    """The hedge is called off, and what it took is settled."""
    slow, silent = await upstreams(*KNOWN, SLOW), await upstreams(SILENT)
    text = config({"a": (slow.base_url, PAID), "b": (silent.base_url, FREE)})
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, streamed())
        await silent.idle()

        assert heard.text == "Late, but here."
        assert heard.headers["x-routerd-provider"] == "a"
        assert ended(served) == [("b", "cancelled"), ("a", "success")]
        assert (hedged(served, "success"), hedged(served, "failure")) == (0, 1)


async def test_tool_calls_are_made_once(upstreams: Upstreams, tmp_path: Path) -> None:
    """Both would call the tool; the client hears one of them."""
    slow = Turn(fault=Fault("pause", "before_content", seconds=0.15))
    first, second = await upstreams(*KNOWN, slow), await upstreams(slow)
    text = config({"a": (first.base_url, PAID), "b": (second.base_url, FREE)})
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, streamed() | {"tools": [WEATHER]})
        calls = [call["id"] for delta in heard.deltas for call in delta.get("tool_calls", []) if call.get("id")]

        assert len(calls) == 1
        assert heard.finishes == ["tool_calls"]
        assert sorted(outcome for _, outcome in ended(served)) == ["cancelled", "success"]


async def test_nobody_is_asked_in_vain(upstreams: Upstreams, tmp_path: Path) -> None:
    """Within the usual time there is no second request; nor is there one without being asked for it."""
    quick, silent, other = await upstreams(), await upstreams(SILENT, Turn()), await upstreams()
    async with daemon(config({"a": (quick.base_url, PAID), "b": (other.base_url, FREE)}), tmp_path) as served:
        assert (await hear(served.url, streamed())).text == TEXT
    off = config({"a": (silent.base_url, PAID), "b": (other.base_url, FREE)}, 'hedge = "off"')
    async with (
        daemon(off.replace('first_token_timeout = "5s"', 'first_token_timeout = "500ms"'), tmp_path) as served,
    ):
        heard = await hear(served.url, streamed())

        assert heard.reads[0][0] >= 0.45
        assert ended(served) == [("a", "unavailable"), ("b", "success")]
        assert len(other.requests) == 1


async def test_free_means_free(upstreams: Upstreams, tmp_path: Path) -> None:
    """What costs money is passed over, though it stands in a better tier; so is the silent one's own provider."""
    silent, paid, free = await upstreams(*KNOWN, SILENT), await upstreams(), await upstreams()
    text = config(
        {"a": (silent.base_url, PAID), "b": (paid.base_url, PAID), "c": (free.base_url, FREE)},
    )
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, streamed())

        assert heard.headers["x-routerd-provider"] == "c"
        assert paid.requests == []


async def test_paid_ends_with_its_budget(upstreams: Upstreams, tmp_path: Path) -> None:
    """Hedges at paid upstreams are charged to a budget of their own, which a restart does not refill."""
    silent = await upstreams(*KNOWN, SILENT)
    paid = await upstreams(Turn(Answer(text="Paid.", usage=Usage(input_tokens=100, output_tokens=400))))
    text = config(
        {"a": (silent.base_url, PAID), "b": (paid.base_url, PAID)},
        'hedge = "paid"\nhedge_budget = { usd = 0.0012, per = "day", resets = "UTC" }',
        state=f"sqlite:{tmp_path}/state.db",
    ).replace('first_token_timeout = "5s"', 'first_token_timeout = "600ms"')
    asked = streamed() | {"max_tokens": 400}
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        first, outcomes = await hear(served.url, asked), ended(served)
        left = served.metric("routerd_budget_remaining_usd", scope="auto:hedge")
        second = await hear(served.url, asked)

        assert first.text == second.text == "Paid."
        assert outcomes == [("a", "cancelled"), ("b", "success")]
        assert left == pytest.approx(0.0012 - 0.0009, abs=1e-5)
        assert ended(served) == [("a", "unavailable"), ("b", "success")]  # too little was left for another hedge
        assert hedged(served, "success") == 1
    async with daemon(text, tmp_path) as served:
        assert served.metric("routerd_budget_remaining_usd", scope="auto:hedge") == pytest.approx(left, abs=1e-5)


async def test_not_behind_what_was_said(upstreams: Upstreams, tmp_path: Path) -> None:
    """Silence in the middle of an answer is no case for a hedge: what was said is gone on with."""
    stalls, free = await upstreams(*KNOWN, Turn(fault=Fault("stall", "mid_text"))), await upstreams()
    text = config({"a": (stalls.base_url, PAID), "b": (free.base_url, FREE)})
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, streamed())

        assert not heard.torn
        assert ended(served)[0] == ("a", "stalled")
        assert hedged(served, "success") == hedged(served, "failure") == 0


async def test_a_failed_hedge_costs_nothing_but_itself(upstreams: Upstreams, tmp_path: Path) -> None:
    """The first one is still there, and is waited for; its breaker heard of no failure."""
    slow, broken = await upstreams(*KNOWN, SLOW), await upstreams(Turn(fault=Fault("status", status=500)))
    text = config({"a": (slow.base_url, PAID), "b": (broken.base_url, FREE)})
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, streamed())

        assert heard.text == "Late, but here."
        assert ended(served) == [("b", "unavailable"), ("a", "success")]


async def test_a_failed_first_leaves_it_to_the_hedge(upstreams: Upstreams, tmp_path: Path) -> None:
    """And nobody else is asked meanwhile."""
    breaks = Turn(fault=Fault("eof", "before_finish"), answer=Answer(text=" ", pace_s=0.1))
    late_500 = Turn(fault=Fault("pause", "before_headers", seconds=0.2))
    first, second = await upstreams(*KNOWN, late_500), await upstreams(SLOW)
    third = await upstreams(breaks)
    text = config({"a": (first.base_url, PAID), "b": (second.base_url, FREE), "c": (third.base_url, PAID)})
    text = text.replace('first_token_timeout = "5s"', 'first_token_timeout = "150ms"')
    text = text.replace("[providers.b]", '[providers.b]\nfirst_token_timeout = "5s"')
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, streamed())

        assert heard.text == "Late, but here."
        assert ended(served) == [("a", "unavailable"), ("b", "success")]
        assert third.requests == []


async def test_when_both_fail_the_exchange_goes_on(upstreams: Upstreams, tmp_path: Path) -> None:
    """A race that nobody wins is two failures, and a third upstream is still to be asked."""
    silent = Turn(fault=Fault("stall", "before_headers"))
    first, second, third = await upstreams(*KNOWN, silent), await upstreams(silent), await upstreams()
    text = config({"a": (first.base_url, PAID), "b": (second.base_url, FREE), "c": (third.base_url, PAID)})
    text = text.replace('first_token_timeout = "5s"', 'first_token_timeout = "300ms"')
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, streamed())

        assert heard.text == TEXT
        assert ended(served) == [("a", "unavailable"), ("b", "unavailable"), ("c", "success")]


async def test_a_winner_may_still_fail(upstreams: Upstreams, tmp_path: Path) -> None:
    """Then somebody new takes up its answer, not the one that had nothing to say."""
    silent, stalls = await upstreams(*KNOWN, SILENT), await upstreams(Turn(fault=Fault("stall", "mid_text")))
    third = await upstreams(Turn(Answer(text=TEXT)))
    text = config(
        {"a": (silent.base_url, PAID), "b": (stalls.base_url, FREE), "c": (third.base_url, PAID)},
    )
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard = await hear(served.url, streamed())

        assert not heard.torn
        assert ended(served)[:2] == [("a", "cancelled"), ("b", "stalled")]
        assert len(silent.requests) == SAMPLES_MIN + 1
        assert len(third.requests) >= 1


async def test_a_client_that_leaves_ends_both(upstreams: Upstreams, tmp_path: Path) -> None:
    """Nothing goes on behind its back, and both are settled."""
    first, second = await upstreams(*KNOWN, SILENT), await upstreams(SILENT)
    text = config({"a": (first.base_url, PAID), "b": (second.base_url, FREE)})
    text = text.replace("[defaults]", '[defaults]\nkeepalive = "50ms"')
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        async with listening(served.url, streamed()):
            await first.requested(SAMPLES_MIN + 1)
            await second.requested(1)
        await first.idle()
        await second.idle()
        async with asyncio.timeout(5):
            while not served.exchanges:  # noqa: ASYNC110 - a log line has no event
                await asyncio.sleep(0.01)

        assert sorted(ended(served)) == [("a", "cancelled"), ("b", "cancelled")]
        assert served.exchanges[-1]["outcome"] == "cancelled"
        assert served.metric("routerd_breaker_state", provider="a", model="m", state="closed") == 1


async def test_a_stranger_is_hedged_as_well(upstreams: Upstreams, tmp_path: Path) -> None:
    """Where little is known, half of the limit is waited for at the most; having lost before makes it no longer."""
    silent, ready = await upstreams(SILENT), await upstreams()
    text = config({"a": (silent.base_url, PAID), "b": (ready.base_url, FREE)})
    text = text.replace('first_token_timeout = "5s"', 'first_token_timeout = "1s"')
    text = text.replace("[defaults]", "[defaults]\nbreaker = { failures = 9, min_requests = 9 }")
    async with daemon(text, tmp_path) as served:
        for _ in range(3):
            heard = await hear(served.url, streamed())

            assert heard.text == TEXT
            assert 0.45 <= heard.reads[0][0] < 0.95
            assert ended(served) == [("a", "cancelled"), ("b", "success")]


async def test_one_that_always_hangs_is_left_alone_in_the_end(upstreams: Upstreams, tmp_path: Path) -> None:
    """Losing counts as a failure for whoever was asked first: in the end its breaker opens."""
    silent, ready = await upstreams(*KNOWN, SILENT), await upstreams()
    text = config({"a": (silent.base_url, PAID), "b": (ready.base_url, FREE)})
    text = text.replace("[defaults]", "[defaults]\nbreaker = { failures = 2 }")
    async with daemon(text, tmp_path) as served:
        await get_to_know(served)
        heard: list[Heard] = [await hear(served.url, streamed()) for _ in range(3)]

        assert [one.text for one in heard] == [TEXT] * 3
        assert served.metric("routerd_breaker_state", provider="a", model="m", state="open") == 1
        assert ended(served) == [("b", "success")]
