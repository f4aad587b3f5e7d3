"""When nobody can serve at the moment, a request is held: with signs of life, in order, while that is worth it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from routerd.canonical import Usage
from routerd.proxy.simulated import TEXT, Answer, Fault, Received, Turn
from tests.fakes import ScriptedUpstream, Upstreams
from tests.proxy.wire import error_of, get, hear, listening, streamed
from tests.rig import HELLO, MODEL, Daemon, config_text, daemon


def limited(retry_after_s: float | None = None) -> Turn:
    """A 429, with or without the time of its end."""
    headers = () if retry_after_s is None else (("retry-after", str(retry_after_s)),)
    return Turn(fault=Fault("status", status=429, headers=headers))


def _waited(served: Daemon, reason: str) -> tuple[float, float]:
    """How often and how long requests were held for this reason."""
    count = served.metric("routerd_wait_seconds_count", reason=reason)
    return count, served.metric("routerd_wait_seconds_sum", reason=reason)


async def test_held_until_the_limit_resets(upstreams: Upstreams, tmp_path: Path) -> None:
    """A stream is kept alive until Retry-After has passed, and then simply answered."""
    upstream = await upstreams(limited(1), Turn())
    async with daemon(config_text({"a": upstream}, defaults='keepalive = "100ms"'), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert heard.status == 200
        assert heard.text == TEXT
        assert not heard.torn
        assert len(upstream.requests) == 2
        assert 1.0 <= heard.reads[-1][0] < 4
        assert 4 <= len(heard.keepalives) <= 11
        assert heard.longest_silence_s < 0.45
        count, seconds = _waited(served, "quota")
        assert count == 1
        assert seconds == pytest.approx(1.0, abs=0.5)
        assert served.exchanges[0]["waited_s"] == pytest.approx(1.0, abs=0.5)
        assert served.exchanges[0]["outcome"] == "success"


async def test_whole_answer_is_waited_for_in_silence(upstreams: Upstreams, tmp_path: Path) -> None:
    """Nothing can be said before the status, and the status is not known yet: the client just waits."""
    upstream = await upstreams(limited(1), Turn())
    async with daemon(config_text({"a": upstream}, defaults='keepalive = "100ms"'), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 200
        assert heard.json["choices"][0]["message"]["content"] == TEXT
        assert len(heard.reads) == 1
        assert 1.0 <= heard.reads[0][0] < 4


async def test_first_reset_counts(upstreams: Upstreams, tmp_path: Path) -> None:
    """Of several limited providers the one that is free first is waited for."""
    late, soon = await upstreams(limited(3600)), await upstreams(limited(0.5), Turn())
    async with daemon(config_text({"a": late, "b": soon}), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 200
        assert heard.headers["x-routerd-provider"] == "b"
        assert heard.reads[-1][0] < 4
        assert len(late.requests) == 1


async def test_short_outage_is_not_felt(upstreams: Upstreams, tmp_path: Path) -> None:
    """A server that is restarted meanwhile costs the client a second, not its answer."""
    upstream = await upstreams(Turn(fault=Fault("refuse", seconds=1.0)), Turn())
    async with daemon(config_text({"a": upstream}, defaults='keepalive = "100ms"'), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert heard.text == TEXT
        assert heard.longest_silence_s < 0.45
        assert _waited(served, "retry")[0] >= 1


async def test_everybody_is_tried_again_after_a_pause(upstreams: Upstreams, tmp_path: Path) -> None:
    """When all have failed once, the round begins anew, after half a second and then two."""
    faulty = Turn(fault=Fault("status", status=500))
    first, second = await upstreams(faulty, faulty, Turn()), await upstreams(faulty)
    async with daemon(config_text({"a": first, "b": second}), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 200
        assert [one["provider"] for one in served.exchanges[0]["attempts"]] == ["a", "b", "a", "b", "a"]
        assert 2.5 <= heard.reads[-1][0] < 6


# --- order ----------------------------------------------------------------------------------------------------------


async def test_who_came_first_goes_first(upstreams: Upstreams, tmp_path: Path) -> None:
    """Above a token allowance requests leave at the pace it refills: in the order they came, none refused."""
    spent = Turn(Answer(usage=Usage(input_tokens=5_950)))
    upstream: ScriptedUpstream = await upstreams(spent, Turn(Answer(usage=Usage(input_tokens=17, output_tokens=23))))
    limits = 'limits = [ { tokens = 6_000, per = "minute" } ]'  # a hundred in a second; each request takes forty
    async with daemon(config_text({"a": upstream}, extra=limits), tmp_path) as served:
        await hear(served.url)
        held = []
        for number in range(5):
            held.append(asyncio.create_task(hear(served.url, _numbered(number))))
            await _arrived(served, number + 2)
        answers = await asyncio.gather(*held)
        ends = [heard.reads[-1][0] for heard in answers]

        assert [heard.status for heard in answers] == [200] * 5
        assert [_number(request) for request in upstream.requests[1:]] == list(range(5))
        assert 0.8 < ends[-1] < 6
        assert _waited(served, "quota")[0] >= 3


async def test_what_is_given_back_is_taken_at_once(upstreams: Upstreams, tmp_path: Path) -> None:
    """A request that used less than was set aside for it lets the next one go long before the bucket refills."""
    used = Answer(text="Short.", usage=Usage(input_tokens=10, output_tokens=2), pace_s=0.05)
    upstream: ScriptedUpstream = await upstreams(Turn(used))
    limits = 'limits = [ { tokens = 6_000, per = "minute" } ]'
    long = HELLO | {"messages": [{"role": "user", "content": "word " * 3_000}]}  # about four thousand tokens
    async with daemon(config_text({"a": upstream}, extra=limits), tmp_path) as served:
        first = asyncio.create_task(hear(served.url, long))
        await upstream.requested(1)
        second = await hear(served.url, long)

        assert first.done()
        assert second.status == 200
        assert 0 < served.exchanges[1]["waited_s"] < 5


async def test_the_large_are_not_overtaken_for_ever(upstreams: Upstreams, tmp_path: Path) -> None:
    """Small requests that keep taking what a large one waits for stand back once its time had come in vain."""
    spent, used = Usage(input_tokens=119_900), Usage(input_tokens=500, output_tokens=500)
    upstream: ScriptedUpstream = await upstreams(Turn(Answer(usage=spent)), Turn(Answer(usage=used)))
    limits = 'limits = [ { tokens = 120_000, per = "minute" } ]'  # two thousand in a second
    large = HELLO | {"messages": [{"role": "user", "content": "word " * 3_000}], "max_tokens": 100}
    async with daemon(config_text({"a": upstream}, extra=limits), tmp_path) as served:
        await hear(served.url)
        elder = asyncio.create_task(hear(served.url, large))
        await _arrived(served, 2)
        small: list[asyncio.Task[Any]] = []
        async with asyncio.timeout(20):
            while not elder.done():  # a thousand tokens each: five times what the allowance refills
                small.append(asyncio.create_task(hear(served.url, _numbered(len(small)) | {"max_tokens": 990})))
                await asyncio.sleep(0.1)
        waited_s = elder.result().reads[-1][0]
        overtakers = sum("word" not in str(request.body) for request in upstream.requests[1:])
        for task in small:
            task.cancel()

        assert elder.result().status == 200
        assert 1.5 < waited_s < 10
        assert overtakers > 0


async def test_nobody_is_held_by_what_another_one_needs(upstreams: Upstreams, tmp_path: Path) -> None:
    """An image waits for the one upstream that sees; a text that came later goes on with the other one meanwhile."""
    sees: ScriptedUpstream = await upstreams(limited(2), Turn())
    blind = await upstreams(Turn(fault=Fault("status", status=500)), Turn())
    head, _, tail = config_text({"a": sees, "b": blind}).rpartition("images = true")
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    async with daemon(f"{head}images = false{tail}", tmp_path) as served:
        image = asyncio.create_task(hear(served.url, HELLO | {"messages": [{"role": "user", "content": [url]}]}))
        await sees.requested(1)
        text = await hear(served.url)
        assert not image.done()

        assert text.status == 200
        assert text.headers["x-routerd-provider"] == "b"
        assert (await image).status == 200


async def test_those_who_wait_do_not_hurry_each_other(upstreams: Upstreams, tmp_path: Path) -> None:
    """During an outage each request keeps its own pauses, whatever others try meanwhile."""
    over = asyncio.Event()
    upstream: ScriptedUpstream = await upstreams(
        lambda _: Turn(fault=None if over.is_set() else Fault("status", status=500))
    )
    settings = "breaker = { failures = 1000, min_requests = 500 }"
    async with daemon(config_text({"a": upstream}, defaults=settings), tmp_path) as served:
        held = []
        for number in range(1, 5):
            held.append(asyncio.create_task(hear(served.url)))
            await upstream.requested(number)
        asyncio.get_running_loop().call_later(1.0, over.set)
        answers = await asyncio.gather(*held)

        assert [heard.status for heard in answers] == [200] * 4
        assert len(upstream.requests) <= 12


def _numbered(number: int) -> dict[str, Any]:
    return HELLO | {"messages": [{"role": "user", "content": str(number)}], "max_tokens": 23}


def _number(request: Received) -> int:
    return int(request.body["messages"][0]["content"])


async def _open(served: Daemon, count: int) -> None:
    """Wait until so many exchanges are open."""
    async with asyncio.timeout(5):
        while served.metric("routerd_open_exchanges", dialect="chat") < count:  # noqa: ASYNC110 - a gauge has no event
            await asyncio.sleep(0.002)


async def _arrived(served: Daemon, count: int) -> None:
    """Wait until so many exchanges have begun."""
    async with asyncio.timeout(5):
        while served.total("routerd_open_exchanges") + len(served.exchanges) < count:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.002)


# --- bounds ---------------------------------------------------------------------------------------------------------


async def test_patience_is_a_budget(upstreams: Upstreams, tmp_path: Path) -> None:
    """Waits add up: what one took the next no longer has, and then the client is told when to come back."""
    upstream = await upstreams(limited(1))
    async with daemon(config_text({"a": upstream}, defaults='max_wait = "1500ms"'), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 429
        assert heard.headers["Retry-After"] == "1"
        assert error_of(heard)["type"] == "rate_limit_error"
        assert len(upstream.requests) == 2
        assert 1.0 <= heard.reads[-1][0] < 4


async def test_giving_up_after_signs_of_life(upstreams: Upstreams, tmp_path: Path) -> None:
    """Once the stream has begun, giving up is an error in its own protocol and a torn connection."""
    upstream = await upstreams(limited(1))
    settings = 'max_wait = "1500ms"\nkeepalive = "100ms"'
    async with daemon(config_text({"a": upstream}, defaults=settings), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert heard.status == 200
        assert heard.torn
        assert heard.chunks[-1]["error"]["type"] == "rate_limit_error"
        assert b"[DONE]" not in heard.data
        assert served.exchanges[0]["outcome"] == "rate_limited"


async def test_attempts_are_bounded(upstreams: Upstreams, tmp_path: Path) -> None:
    """However patient the config, an exchange lets models work for nothing only so many times."""
    upstream = await upstreams(Turn(fault=Fault("empty_content")))
    async with daemon(config_text({"a": upstream}, defaults="max_attempts = 3"), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 503
        assert len(upstream.requests) == 3
        assert served.metric("routerd_attempts_total", provider="a", model=MODEL, outcome="malformed") == 3


async def test_refusals_cost_patience_only(upstreams: Upstreams, tmp_path: Path) -> None:
    """What was turned away at once has cost nothing: it is tried again as long as waiting is allowed."""
    upstream = await upstreams(*[limited(0.1)] * 5, Turn())
    async with daemon(config_text({"a": upstream}, defaults="max_attempts = 2"), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 200
        assert served.metric("routerd_attempts_total", provider="a", model=MODEL, outcome="rate_limited") == 5


async def test_no_patience_at_all_still_goes_elsewhere(upstreams: Upstreams, tmp_path: Path) -> None:
    """``max_wait`` limits waiting, not going on to the next upstream at once."""
    faulty, healthy = await upstreams(Turn(fault=Fault("status", status=500))), await upstreams()
    async with daemon(config_text({"a": faulty, "b": healthy}, defaults='max_wait = "0s"'), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 200
        assert heard.headers["x-routerd-provider"] == "b"


async def test_client_that_hangs_up_while_it_is_held(upstreams: Upstreams, tmp_path: Path) -> None:
    """Its place in the line is given up, and nothing is asked for it when the limit resets."""
    upstream: ScriptedUpstream = await upstreams(limited(1), Turn(Answer(text="For the other one.")))
    async with daemon(config_text({"a": upstream}, defaults='keepalive = "50ms"'), tmp_path) as served:
        async with listening(served.url, streamed()) as client:
            await client.until(bool)
            other = asyncio.create_task(hear(served.url))
            await _open(served, 2)
        heard = await other

        assert heard.json["choices"][0]["message"]["content"] == "For the other one."
        assert len(upstream.requests) == 2
        assert [one["outcome"] for one in served.exchanges] == ["cancelled", "success"]
        assert served.total("routerd_open_exchanges") == 0


async def test_held_request_does_not_make_the_daemon_unready(upstreams: Upstreams, tmp_path: Path) -> None:
    """``/readyz`` tells of upstreams: not ready, and why, while all are limited; ready again after the reset."""
    upstream: ScriptedUpstream = await upstreams(limited(1), Turn())
    async with daemon(config_text({"a": upstream}), tmp_path) as served:
        held = asyncio.create_task(hear(served.url))
        await upstream.requested(1)
        async with asyncio.timeout(1):
            while (ready := await get(served.url, "/readyz")).status == 200:
                pass
        await held

        assert ready.status == 503
        assert ready.json["upstreams"] == {f"a/{MODEL}": "quota used up for 1 s"}
        assert (await get(served.url, "/readyz")).status == 200
