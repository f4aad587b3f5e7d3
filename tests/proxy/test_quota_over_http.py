"""Allowances under load, counted where it matters: at the upstream. None is ever exceeded, none is left unused."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from routerd.canonical import Usage
from routerd.proxy.simulated import Answer, Fault, Turn
from tests.fakes import ScriptedUpstream, Upstreams
from tests.proxy.wire import Heard, hear, listening, streamed
from tests.rig import HELLO, MODEL, config_text, daemon, provider

CROWD = 200
HASTY = 'max_wait = "0s"'
MINUTE = '{ requests = 20, per = "minute" }'
CALENDAR_MINUTE = '{ requests = 20, per = "minute", resets = "minute" }'
DAY = '{ requests = 50, per = "day", resets = "UTC" }'
ROLLING_DAY = '{ requests = 50, per = "day" }'

LIMITS: dict[str, tuple[Sequence[str], int]] = {
    "minute": ([MINUTE], 20),
    "day": ([DAY], 50),
    "rolling day": ([ROLLING_DAY], 50),
    "both": ([MINUTE, DAY], 20),
    "both, the other way round": ([DAY, MINUTE], 20),
}


def _limits(limits: Sequence[str]) -> str:
    return f"limits = [ {', '.join(limits)} ]"


async def _crowd(url: str, count: int = CROWD, **fields: Any) -> list[Heard]:
    """So many clients at once, half of them streaming."""
    bodies = [HELLO | {"stream": number % 2 == 0, "user": str(number)} | fields for number in range(count)]
    return await asyncio.gather(*(hear(url, body) for body in bodies))


@pytest.mark.parametrize(("limits", "allowed"), LIMITS.values(), ids=LIMITS)
async def test_crowd_never_exceeds_the_limit(
    limits: Sequence[str], allowed: int, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Of two hundred at once exactly as many get through as are allowed; the others are told when to come back."""
    upstream: ScriptedUpstream = await upstreams(Turn(Answer(text="Here.", pace_s=0.01)))
    async with daemon(config_text({"a": upstream}, defaults=HASTY, extra=_limits(limits)), tmp_path) as served:
        answers = await _crowd(served.url)

        assert Counter(heard.status for heard in answers) == {200: allowed, 429: CROWD - allowed}
        assert len(upstream.requests) == allowed
        assert all(int(heard.headers["Retry-After"]) >= 1 for heard in answers if heard.status == 429)
        assert served.total("routerd_attempts_total") == allowed
        for period in re.findall(r'per = "(\w+)"', _limits(limits)):
            labels = {"provider": "a", "limit": f"requests/{period}"}
            size, left = (served.metric(f"routerd_quota_{what}", **labels) for what in ("limit", "remaining"))
            assert size - left == allowed


async def test_calendar_minute(upstreams: Upstreams, tmp_path: Path) -> None:
    """A wall-clock minute is never overspent either, although this test may run into the next one."""
    upstream: ScriptedUpstream = await upstreams()
    text = config_text({"a": upstream}, defaults=HASTY, extra=_limits([CALENDAR_MINUTE]))
    async with daemon(text, tmp_path) as served:
        answers = await _crowd(served.url)

        assert len(upstream.requests) == sum(heard.status == 200 for heard in answers)
        assert len(upstream.requests) in range(20, 41)


async def test_overflow_goes_to_the_next_provider(upstreams: Upstreams, tmp_path: Path) -> None:
    """What one provider's allowance does not hold another one serves: nobody is refused while anybody has room."""
    small: ScriptedUpstream = await upstreams()
    other: ScriptedUpstream = await upstreams()
    text = config_text({"a": small, "b": other}, defaults=HASTY)
    text = text.replace(
        "[providers.a.models]", '[[providers.a.limits]]\nrequests = 20\nper = "minute"\n[providers.a.models]'
    )
    async with daemon(text, tmp_path) as served:
        answers = await _crowd(served.url)

        assert {heard.status for heard in answers} == {200}
        assert (len(small.requests), len(other.requests)) == (20, CROWD - 20)


async def test_failed_requests_count(upstreams: Upstreams, tmp_path: Path) -> None:
    """A request that was taken and then failed may have been counted over there: it is not given back."""
    upstream: ScriptedUpstream = await upstreams(Turn(fault=Fault("status", status=500)))
    patient = HASTY + "\nbreaker = { failures = 1000, min_requests = 500 }"
    async with daemon(config_text({"a": upstream}, defaults=patient, extra=_limits([DAY])), tmp_path) as served:
        answers = await _crowd(served.url)

        assert len(upstream.requests) <= 50
        assert 200 not in {heard.status for heard in answers}


async def test_refused_connections_do_not_count(upstreams: Upstreams, tmp_path: Path) -> None:
    """What never reached the upstream cost nothing there, and costs nothing here."""
    upstream: ScriptedUpstream = await upstreams(Turn(fault=Fault("refuse", seconds=0.3)), Turn())
    settings = "breaker = { failures = 1000, min_requests = 500 }"
    async with daemon(config_text({"a": upstream}, defaults=settings, extra=_limits([DAY])), tmp_path) as served:
        answers = await _crowd(served.url, 50)

        assert {heard.status for heard in answers} == {200}
        assert len(upstream.requests) == 50


async def test_hanging_up_gives_nothing_back(upstreams: Upstreams, tmp_path: Path) -> None:
    """A request whose client left was made all the same: coming and going cannot overspend an allowance."""
    upstream: ScriptedUpstream = await upstreams(Turn(fault=Fault("stall", "before_content")))
    settings = 'keepalive = "50ms"\n' + HASTY

    async def come_and_go(url: str) -> None:
        async with listening(url, streamed()) as client:
            if client.status == 200:
                await client.until(bool)

    async with daemon(config_text({"a": upstream}, defaults=settings, extra=_limits([MINUTE])), tmp_path) as served:
        for _ in range(3):
            await asyncio.gather(*(come_and_go(served.url) for _ in range(15)))
            await upstream.idle()

        assert len(upstream.requests) == 20


async def test_prompts_are_reserved_before_they_are_counted(upstreams: Upstreams, tmp_path: Path) -> None:
    """What is under way counts at once: a crowd of long prompts never asks for more than the token allowance."""
    upstream: ScriptedUpstream = await upstreams(Turn(Answer(text="Yes.", pace_s=0.01)))
    limits = _limits(['{ tokens = 100_000, per = "minute" }'])
    long = [{"role": "user", "content": "word " * 8_000}]  # about ten thousand tokens
    async with daemon(config_text({"a": upstream}, defaults=HASTY, extra=limits), tmp_path) as served:
        answers = await _crowd(served.url, 40, messages=long, max_tokens=10)

        counts = Counter(heard.status for heard in answers)
        assert counts[200] + counts[429] == 40
        assert 5 <= counts[200] <= 10
        assert served.total("routerd_tokens_total") <= 100_000


async def test_unforeseen_tokens_are_a_debt(upstreams: Upstreams, tmp_path: Path) -> None:
    """An answer longer than expected is charged in full, and everybody waits until that is paid off."""
    upstream: ScriptedUpstream = await upstreams(Turn(Answer(usage=Usage(input_tokens=15, output_tokens=19_985))))
    limits = _limits(['{ tokens = 10_000, per = "minute" }'])
    async with daemon(config_text({"a": upstream}, defaults=HASTY, extra=limits), tmp_path) as served:
        first = await hear(served.url)
        second = await hear(served.url, HELLO | {"max_tokens": 10})

        assert first.status == 200
        assert second.status == 429
        assert 55 <= int(second.headers["Retry-After"]) <= 65


async def test_a_prompt_that_was_read_is_paid_for(upstreams: Upstreams, tmp_path: Path) -> None:
    """An answer that opened and broke off before its first word may be billed for its prompt: so it is, here too."""
    opened = Turn(fault=Fault("eof", "before_content"))
    refused = Turn(fault=Fault("status", status=500))
    upstream: ScriptedUpstream = await upstreams(opened, refused, Turn(Answer(usage=Usage(input_tokens=1))))
    settings = "breaker = { failures = 1000, min_requests = 500 }"
    async with daemon(config_text({"a": upstream}, defaults=settings), tmp_path) as served:
        heard = await hear(served.url, HELLO | {"messages": [{"role": "user", "content": "word " * 1_000}]})
        tokens = served.metric("routerd_tokens_total", provider="a", model=MODEL, kind="input")

        assert heard.status == 200
        assert len(upstream.requests) == 3
        assert 1_000 < tokens < 2_000


async def test_what_is_gone_on_with_is_read_again(upstreams: Upstreams, tmp_path: Path) -> None:
    """Whoever goes on with a broken answer reads what there is of it, and that is reserved for as well."""
    torn = Turn(Answer(text="word " * 4_000, piece=16_000), fault=Fault("eof", "before_finish"))
    first = await upstreams(torn)
    second: ScriptedUpstream = await upstreams(Turn(fault=Fault("stall", "before_content")))
    limits = _limits(['{ tokens = 1_000_000, per = "minute" }'])
    async with daemon(config_text({"a": first, "b": second}, extra=limits), tmp_path) as served:
        async with listening(served.url, streamed() | {"max_tokens": 10}):
            await second.requested(1)
            held = [served.metric("routerd_quota_remaining", provider=name, limit="tokens/minute") for name in "ab"]
        await second.idle()

        assert held[1] < 1_000_000 - 5_000


async def test_a_request_sent_twice_counts_twice(tmp_path: Path) -> None:
    """A kept connection that dies under a request may have delivered it: then the window has two less."""
    body = b'{"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    received = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
                received += 1
                if received == 2:
                    break
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    text = config_text({}, defaults=HASTY).replace("models = []", f'models = ["a/{MODEL}"]')
    text += provider("a", url, extra=_limits([DAY]))
    asked = HELLO | {"logprobs": True}  # which cannot be put together from a stream
    async with server, daemon(text, tmp_path) as served:
        statuses = [(await hear(served.url, asked)).status for _ in range(2)]

        assert statuses == [200, 200]
        assert received == 3
        assert served.metric("routerd_quota_remaining", provider="a", limit="requests/day") == 47


async def test_limit_for_some_models(upstreams: Upstreams, tmp_path: Path) -> None:
    """A limit with a pattern binds the models it names by their wire names, and no others."""
    upstream: ScriptedUpstream = await upstreams(models=("model", "gratis"))
    limits = _limits(['{ requests = 5, per = "day", models = "*:free" }'])
    text = config_text({"a": upstream}, defaults=HASTY, extra=limits)
    text += '"gratis" = { id = "vendor/gratis:free", context = 131072, max_output = 8192 }\n'
    async with daemon(text, tmp_path) as served:
        paid = await _crowd(served.url, 20)
        gratis = await _crowd(served.url, 20, model="gratis")

        assert Counter(heard.status for heard in paid) == {200: 20}
        assert Counter(heard.status for heard in gratis) == {200: 5, 429: 15}
        assert Counter(request.body["model"] for request in upstream.requests) == {MODEL: 20, "vendor/gratis:free": 5}


async def test_upstreams_own_figures_are_heeded(upstreams: Upstreams, tmp_path: Path) -> None:
    """When its headers say that less is left than we thought, less is asked for."""
    headers = (("x-ratelimit-limit-requests", "20"), ("x-ratelimit-remaining-requests", "4"))
    told = Answer(headers=(*headers, ("x-ratelimit-reset-requests", "50s")))
    upstream: ScriptedUpstream = await upstreams(Turn(told), Turn())
    async with daemon(config_text({"a": upstream}, defaults=HASTY, extra=_limits([MINUTE])), tmp_path) as served:
        await hear(served.url)
        answers = await _crowd(served.url, 20)

        assert Counter(heard.status for heard in answers) == {200: 4, 429: 16}
        assert len(upstream.requests) == 5


async def test_headers_tell_what_is_left(upstreams: Upstreams, tmp_path: Path) -> None:
    """In the names agents read, as plain numbers; the sum over all that serve the route."""
    several = {"a": await upstreams(), "b": await upstreams()}
    async with daemon(config_text(several, extra=_limits([MINUTE, DAY])), tmp_path) as served:
        heard = await hear(served.url)

        told = {name.lower(): int(value) for name, value in heard.headers.items() if name.lower().startswith("x-rate")}
        assert told["x-ratelimit-limit-requests"] == 40
        assert told["x-ratelimit-remaining-requests"] == 39
        assert 0 <= told["x-ratelimit-reset-requests"] <= 86_400
