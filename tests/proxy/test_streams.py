"""What the client sees of a stream: the upstream's own bytes, whole calls or none, life signs, and honest ends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import pytest

from routerd.proxy.simulated import TEXT, Answer, Fault, PlacedKind, Turn
from tests.fakes import ScriptedUpstream, Upstreams, call
from tests.proxy.wire import (
    DONE,
    STREAM_HEAD,
    Heard,
    RawUpstream,
    Talk,
    call_event,
    chunks,
    event,
    hear,
    is_keepalive,
    listening,
    streamed,
)
from tests.rig import HELLO, MODEL, WEATHER, Daemon, config_text, daemon

QUICK = 'first_token_timeout = "300ms"\nstall_timeout = "300ms"\nmax_wait = "0s"\n'
WITH_USAGE = {"stream_options": {"include_usage": True}}
USAGE = (
    event({}, usage=None)
    .replace(b'"choices": [{', b'"choices": [], "was": [{')
    .replace(b'"usage": null', b'"usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}')
)
HEALTHY = (
    b": a comment of the vendor's\n\n",
    event({"role": "assistant", "content": ""}, system_fingerprint="fp_1"),
    event({"reasoning_content": "Hm."}),
    event({"content": "Grüße, "}, provider="Vendor", extra={"nested": [1, 2.50, None]}),
    b": another\n\n",
    event({"content": "Welt."}).replace(b"data: ", b"data:").replace(b"\n\n", b"\r\n\r\n"),
    event({}, "stop", native_finish_reason="STOP"),
)


def _play(pieces: Iterable[bytes]) -> RawUpstream:
    """An upstream that always streams these chunks."""
    told = list(pieces)

    async def play(talk: Talk) -> None:
        await talk.stream(told)

    return RawUpstream(play)


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def _serve(upstreams: dict[str, Any], tmp_path: Path, *, defaults: str = "", more: str = "", extra: str = "") -> Any:
    return daemon(config_text(upstreams, defaults=defaults, more=more, extra=extra), tmp_path)


def _attempts(served: Daemon) -> list[tuple[str, str]]:
    (exchange,) = served.exchanges
    return [(attempt["provider"], attempt["outcome"]) for attempt in exchange["attempts"]]


def _calls(heard: Heard) -> list[tuple[str, str]]:
    """Name and arguments of every call, joined as clients do."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for delta in heard.deltas:
        for piece in delta.get("tool_calls") or ():
            index, function = piece["index"], piece["function"]
            names[index] = names.get(index, "") + (function.get("name") or "")
            arguments[index] = arguments.get(index, "") + (function.get("arguments") or "")
    return [(names[index], arguments[index]) for index in sorted(names)]


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 1_000_000])
async def test_healthy_stream_passes_byte_for_byte(size: int, tmp_path: Path) -> None:
    """However the network cuts it, the client gets exactly what the upstream said: comments, odd spacing, extras."""
    said = b"".join((*HEALTHY, USAGE, DONE))
    async with _play(_cut(said, size)) as upstream, _serve({"a": upstream}, tmp_path) as served:
        heard = await hear(served.url, streamed(**WITH_USAGE))

        assert heard.data == said
        assert not heard.torn
        assert heard.headers["Content-Type"] == "text/event-stream"
        assert _attempts(served) == [("a", "success")]


async def test_usage_nobody_asked_for_is_hidden(tmp_path: Path) -> None:
    """The upstream is asked for usage all the same, for the books; the client's stream goes without that chunk."""
    async with _play((*HEALTHY, USAGE, DONE)) as upstream, _serve({"a": upstream}, tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert heard.data == b"".join((*HEALTHY, DONE))
        assert upstream.talks[0].body["stream_options"] == {"include_usage": True}
        assert served.exchanges[0]["input_tokens"] == 7
        assert served.exchanges[0]["output_tokens"] == 3
        assert served.metric("routerd_tokens_total", provider="a", model=MODEL, kind="input") == 7
        assert served.metric("routerd_cost_usd_total", provider="a", model=MODEL) == pytest.approx(13e-6)


async def test_text_goes_on_as_it_comes(tmp_path: Path) -> None:
    """A delta is with the client before the upstream has said the next one."""
    heard_it = asyncio.Event()

    async def play(talk: Talk) -> None:
        await talk.stream([*HEALTHY[:4]], end=False)
        await heard_it.wait()
        await talk.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(HEALTHY[-1] + DONE), HEALTHY[-1] + DONE))

    async with (
        RawUpstream(play) as upstream,
        _serve({"a": upstream}, tmp_path) as served,
        listening(served.url, streamed()) as client,
    ):
        await client.until(lambda data: data == b"".join(HEALTHY[:4]))
        heard_it.set()

        assert (await client.rest()).endswith(DONE)


async def test_answer_that_does_not_stream(tmp_path: Path) -> None:
    """It is streamed upstream for the sake of the watchdogs, and comes to the client as one body with usage."""
    async with _play((*HEALTHY, USAGE, DONE)) as upstream, _serve({"a": upstream}, tmp_path) as served:
        heard = await hear(served.url)

        assert upstream.talks[0].body["stream"] is True
        assert heard.headers["Content-Type"].startswith("application/json")
        assert heard.json["object"] == "chat.completion"
        assert heard.json["id"] == "gen-1"
        assert heard.json["model"] == "vendor/model"
        message = heard.json["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Grüße, Welt.", "reasoning_content": "Hm."}
        assert heard.json["choices"][0]["finish_reason"] == "stop"
        assert heard.json["usage"]["prompt_tokens"] == 7


async def test_answer_that_cannot_be_streamed_passes_byte_for_byte(tmp_path: Path) -> None:
    """Log probabilities have no place in our events: such a request goes out as it is, and its answer comes back so."""
    body = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "logprobs": {"content": []}}],
        "more": 1.50,
    }
    body["choices"][0] |= {"message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}  # type: ignore[index]
    said = json.dumps(body, indent=1).encode()

    async def play(talk: Talk) -> None:
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said))

    async with RawUpstream(play) as upstream, _serve({"a": upstream}, tmp_path) as served:
        heard = await hear(served.url, HELLO | {"logprobs": True})

        assert heard.data == said
        assert "stream" not in upstream.talks[0].body


# --- ends -----------------------------------------------------------------------------------------------------------


async def _close(talk: Talk) -> None:
    """A clean end of the HTTP body."""
    await talk.send(b"0\r\n\r\n")


async def _tear(_talk: Talk) -> None:
    """The connection ends in the middle of the body."""


async def _stall(_talk: Talk) -> None:
    """Silence, for which there is a short grace: this one test takes as long."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("last", [_close, _tear, _stall])
async def test_answer_without_its_end_marker_is_whole(last: Callable[[Talk], Any], tmp_path: Path) -> None:
    """Once the model said why it ended, the answer is whole; the client gets the ``[DONE]`` the upstream left out."""

    async def play(talk: Talk) -> None:
        await talk.stream(HEALTHY, end=False)
        await last(talk)

    async with RawUpstream(play) as upstream, _serve({"a": upstream}, tmp_path, defaults=QUICK) as served:
        heard = await hear(served.url, streamed())

        rest = heard.data.removeprefix(b"".join(HEALTHY))
        assert rest.endswith(DONE)
        assert all(map(is_keepalive, chunks(rest)))
        assert not heard.torn
        assert _attempts(served) == [("a", "success")]


BREAKS: dict[str, tuple[Fault, str]] = {
    "stall": (Fault("stall", "mid_text"), "stalled"),
    "stall with comments": (Fault("stall", "mid_text", comment_s=0.05), "stalled"),
    "reset": (Fault("reset", "mid_text"), "truncated"),
    "tear": (Fault("tear", "mid_text"), "truncated"),
    "eof": (Fault("eof", "mid_text"), "truncated"),
    "eof at the end": (Fault("eof", "before_finish"), "truncated"),
    "error": (Fault("error", "mid_text"), "in_band_error"),
    "malformed": (Fault("malformed", "mid_text"), "malformed"),
}


@pytest.mark.parametrize(("fault", "outcome"), BREAKS.values(), ids=BREAKS)
async def test_break_after_text_never_looks_like_an_end(
    fault: Fault, outcome: str, upstreams: Upstreams, tmp_path: Path
) -> None:
    """With nobody to go on, the client gets an error in its own protocol and a torn connection: no finish, no end."""
    upstream = await upstreams(Turn(Answer(pace_s=0.01), fault))
    async with _serve({"a": upstream}, tmp_path, defaults=QUICK + "max_attempts = 1") as served:
        heard = await hear(served.url, streamed())

        assert heard.status == 200
        assert heard.torn
        assert TEXT.startswith(heard.text)
        assert DONE not in heard.data
        assert [chunk["error"]["type"] for chunk in heard.chunks if "error" in chunk] == ["server_error"]
        assert "error" in heard.chunks[-1]
        assert not {"stop", "length", "tool_calls"} & set(heard.finishes)
        assert _attempts(served) == [("a", outcome)]
        assert served.exchanges[0]["outcome"] == outcome
        assert served.exchanges[0]["status"] == 200


# --- calls ----------------------------------------------------------------------------------------------------------

CALL = (
    event({"role": "assistant", "content": ""}),
    event({"content": "Let me see."}),
    call_event(0, "", name="weather", id="call_1"),
    call_event(0, '{"city":'),
    call_event(0, '"Oslo"}'),
    event({}, "tool_calls"),
    DONE,
)


async def test_call_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    """While a call is being written the client sees signs of life but nothing of the call; then all of it at once."""
    go_on = asyncio.Event()

    async def play(talk: Talk) -> None:
        await talk.stream(CALL[:4], end=False)
        await go_on.wait()
        rest = b"".join(CALL[4:])
        await talk.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))

    async with (
        RawUpstream(play) as upstream,
        _serve({"a": upstream}, tmp_path, defaults='keepalive = "100ms"') as served,
        listening(served.url, streamed(tools=[WEATHER])) as client,
    ):
        seen = await client.until(lambda data: sum(map(is_keepalive, chunks(data))) >= 2)
        go_on.set()
        whole = await client.rest()

        assert seen.startswith(b"".join(CALL[:2]))
        assert b"tool_calls" not in seen
        assert whole.removeprefix(seen) == b"".join(CALL[2:])


async def test_parallel_calls_pass_byte_for_byte(tmp_path: Path) -> None:
    """Holding calls back changes when they come, not what comes."""
    said = (
        event({"role": "assistant", "content": None}),
        call_event(0, '{"city":', name="weather", id="call_1"),
        call_event(1, '{"city":', name="weather", id="call_2"),
        call_event(0, '"Oslo"}'),
        call_event(1, '"Rome"}'),
        event({}, "tool_calls"),
        DONE,
    )
    async with _play(said) as upstream, _serve({"a": upstream}, tmp_path) as served:
        heard = await hear(served.url, streamed(tools=[WEATHER]))

        assert heard.data == b"".join(said)
        assert _calls(heard) == [("weather", '{"city":"Oslo"}'), ("weather", '{"city":"Rome"}')]


PLACED: tuple[PlacedKind, ...] = tuple(kind for kind in get_args(PlacedKind) if kind != "pause")
ASKING = Answer(text="Let me see.", calls=(call("weather", city="Oslo"), call("weather", city="Rome")))


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("place", ["mid_call", "between_calls", "before_finish"])
async def test_death_in_a_call_is_run_again_unseen(
    kind: PlacedKind, place: Any, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Nothing of the broken calls shows; the other upstream's calls follow the text that was already sent."""
    broken = await upstreams(Turn(ASKING, Fault(kind, place)))
    healthy = await upstreams(Turn(ASKING))
    async with _serve({"a": broken, "b": healthy}, tmp_path, defaults=QUICK) as served:
        heard = await hear(served.url, streamed(tools=[WEATHER]))

        _assert_sound(heard, text="Let me see.", finish="tool_calls")
        assert _calls(heard) == [("weather", '{"city": "Oslo"}'), ("weather", '{"city": "Rome"}')]
        assert [provider for provider, _ in _attempts(served)] == ["a", "b"]
        assert served.exchanges[0]["outcome"] == "success"


def _assert_sound(heard: Heard, *, text: str, finish: str) -> None:
    """One role, each text once, one finish, one end, no error, nothing torn."""
    assert not heard.torn
    assert heard.text == text
    assert heard.finishes == [finish]
    assert sum("role" in delta for delta in heard.deltas) == 1
    assert heard.data.count(DONE) == 1
    assert heard.data.endswith(DONE)
    assert b'"error"' not in heard.data


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("place", ["in_reasoning", "mid_text"])
async def test_break_is_mended_by_another_upstream(
    kind: PlacedKind, place: Any, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Thoughts are begun anew and text is gone on with: the client reads one answer, under one role and one name."""
    broken = await upstreams(Turn(Answer(reasoning="Let me think about it."), Fault(kind, place)))
    healthy = await upstreams()
    async with _serve({"a": broken, "b": healthy}, tmp_path, defaults=QUICK) as served:
        heard = await hear(served.url, streamed())

        _assert_sound(heard, text=TEXT, finish="stop")
        assert len({chunk["id"] for chunk in heard.chunks if not is_keepalive(chunk)}) == 1
        assert _attempts(served)[-1] == ("b", "success")


# --- delivery as a whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("place", ["in_reasoning", "mid_text", "mid_call", "before_finish"])
async def test_whole_delivery_hides_every_fault(
    kind: PlacedKind, place: Any, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Nothing goes out before all of it is there, so nothing of a broken answer was ever said."""
    faulty = Answer(reasoning="faulty thoughts, long enough", text="faulty words, long enough", calls=ASKING.calls)
    broken, healthy = await upstreams(Turn(faulty, Fault(kind, place))), await upstreams(Turn(ASKING))
    upstreams_ = {"a": broken, "b": healthy}
    async with _serve(upstreams_, tmp_path, defaults=QUICK, more='delivery = "whole"') as served:
        heard = await hear(served.url, streamed(tools=[WEATHER]))

        _assert_sound(heard, text="Let me see.", finish="tool_calls")
        assert b"faulty" not in heard.data
        assert served.exchanges[0]["outcome"] == "success"


async def test_whole_delivery_keeps_the_client_patient(upstreams: Upstreams, tmp_path: Path) -> None:
    """While an answer is being gathered, through a stall and a second upstream, life signs come in their rhythm."""
    broken = await upstreams(Turn(fault=Fault("stall", "mid_text")))
    healthy = await upstreams(Turn(Answer(text="At last.", pace_s=0.1, piece=1)))
    settings = QUICK + 'keepalive = "100ms"'
    async with _serve({"a": broken, "b": healthy}, tmp_path, defaults=settings, more='delivery = "whole"') as served:
        heard = await hear(served.url, streamed())

        _assert_sound(heard, text="At last.", finish="stop")
        assert len(heard.keepalives) >= 6
        assert heard.longest_silence_s < 0.45


# --- signs of life --------------------------------------------------------------------------------------------------

PAUSES = {
    "before the headers": Fault("pause", "before_headers", seconds=0.7),
    "before content": Fault("pause", "before_content", seconds=0.7),
    "in thought": Fault("pause", "in_reasoning", seconds=0.7),
    "in the text": Fault("pause", "mid_text", seconds=0.7),
    "in the text, with comments": Fault("pause", "mid_text", seconds=0.7, comment_s=0.03),
}


@pytest.mark.parametrize("fault", PAUSES.values(), ids=PAUSES)
async def test_slow_upstream_shows_signs_of_life(fault: Fault, upstreams: Upstreams, tmp_path: Path) -> None:
    """Silence reaches the client as chunks that say nothing, in rhythm; an upstream's comments are not enough."""
    upstream = await upstreams(Turn(fault=fault))
    async with _serve({"a": upstream}, tmp_path, defaults='keepalive = "100ms"') as served:
        heard = await hear(served.url, streamed())

        _assert_sound(heard, text=TEXT, finish="stop")
        assert 3 <= len(heard.keepalives) <= 8
        assert heard.longest_silence_s < 0.45


async def test_fast_upstream_needs_no_sign_of_life(upstreams: Upstreams, tmp_path: Path) -> None:
    """As long as the upstream says something in time, nothing is added to it."""
    upstream = await upstreams(Turn(Answer(pace_s=0.04)))
    async with _serve({"a": upstream}, tmp_path, defaults='keepalive = "200ms"') as served:
        heard = await hear(served.url, streamed())

        assert heard.text == TEXT
        assert not heard.keepalives


# --- clients that leave or do not read ------------------------------------------------------------------------------

THINKING = Answer(text="x" * 400, piece=4, pace_s=0.02)
STAGES: dict[str, tuple[Turn, Callable[[bytes], bool]]] = {
    "before the headers": (Turn(fault=Fault("stall", "before_headers")), bool),
    "before content": (Turn(fault=Fault("stall", "before_content")), bool),
    "in the text": (Turn(THINKING), lambda data: b'"x' in data),
    "in a pause": (Turn(fault=Fault("stall", "mid_text")), lambda data: sum(map(is_keepalive, chunks(data))) > 2),
}


@pytest.mark.parametrize(("turn", "stage"), STAGES.values(), ids=STAGES)
async def test_client_that_hangs_up(
    turn: Turn, stage: Callable[[bytes], bool], upstreams: Upstreams, tmp_path: Path
) -> None:
    """The upstream's call is cancelled at once, the books are closed, and it is nobody's failure."""
    upstream: ScriptedUpstream = await upstreams(turn)
    other = await upstreams()
    settings = 'keepalive = "50ms"\nbreaker = { failures = 1 }'
    limits = 'limits = [ { requests = 10, per = "day", resets = "UTC" } ]'
    async with _serve({"a": upstream, "b": other}, tmp_path, defaults=settings, extra=limits) as served:
        async with listening(served.url, streamed()) as client:
            await client.until(stage)
        await upstream.idle()
        await _ended(served)

        assert _attempts(served) == [("a", "cancelled")]
        assert served.exchanges[0]["outcome"] == "cancelled"
        assert served.exchanges[0]["duration_s"] < 5
        assert not other.requests
        assert served.total("routerd_breaker_transitions_total") == 0
        assert served.total("routerd_open_exchanges") == 0
        assert served.metric("routerd_quota_remaining", provider="a", limit="requests/day") == 9


async def _ended(served: Daemon) -> None:
    """Wait until an exchange has been closed; the upstream may notice a hang-up a moment before the log does."""
    async with asyncio.timeout(5):
        while not served.exchanges:  # noqa: ASYNC110 - the log is text, nothing tells of a new line
            await asyncio.sleep(0.005)


async def test_client_that_hangs_up_on_a_whole_answer(upstreams: Upstreams, tmp_path: Path) -> None:
    """Not streaming makes no difference: the upstream is let go at once."""
    upstream: ScriptedUpstream = await upstreams(Turn(fault=Fault("stall", "mid_text")))
    async with _serve({"a": upstream}, tmp_path) as served:
        request = asyncio.create_task(hear(served.url))
        await upstream.requested(1)
        request.cancel()
        await asyncio.wait([request])
        await upstream.idle()
        await _ended(served)

        assert _attempts(served) == [("a", "cancelled")]


FLOOD = event({"content": "x" * 8000})
KERNEL_BYTES_MAX = 16 * 1024 * 1024  # what the sockets of both legs may hold on an ordinary system


async def _flood(talk: Talk) -> None:
    await talk.send(STREAM_HEAD)
    while True:
        await talk.send(b"%x\r\n%b\r\n" % (len(FLOOD), FLOOD))


async def _request_by_hand(url: str, body: dict[str, Any]) -> socket.socket:
    """A request on a bare socket that reads nothing and hardly buffers."""
    loop, parts, raw = asyncio.get_running_loop(), urlsplit(url), json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await loop.sock_connect(client, (parts.hostname, parts.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(raw)}\r\n\r\n"
    await loop.sock_sendall(client, head.encode() + raw)
    return client


async def test_reader_that_stops_is_dropped(tmp_path: Path) -> None:
    """Not reading holds the upstream back, so little piles up; after the limit the client is dropped, and torn."""
    settings = 'stall_timeout = "500ms"\nkeepalive = "100ms"\nbreaker = { failures = 1 }'
    async with RawUpstream(_flood) as upstream, _serve({"a": upstream}, tmp_path, defaults=settings) as served:
        client = await _request_by_hand(served.url, streamed())
        with client:
            await asyncio.wait_for(upstream.gone.wait(), 5)
            await _ended(served)
            received = await _drained(client)

        assert upstream.talks[0].sent < KERNEL_BYTES_MAX
        assert _attempts(served) == [("a", "cancelled")]
        assert served.exchanges[0]["outcome"] == "cancelled"
        assert 0.4 < served.exchanges[0]["duration_s"] < 5
        assert served.total("routerd_breaker_transitions_total") == 0
        assert DONE not in received
        assert not received.endswith(b"0\r\n\r\n")


async def _drained(client: socket.socket) -> bytes:
    """All that still comes, until the connection ends."""
    loop, received = asyncio.get_running_loop(), b""
    async with asyncio.timeout(5):
        try:
            while data := await loop.sock_recv(client, 65536):
                received += data
        except ConnectionError:
            pass
    return received


async def test_slow_reader_gets_everything(tmp_path: Path) -> None:
    """Whoever reads slowly, but reads, loses nothing and is not taken for a failure of the upstream."""
    said = (*HEALTHY[:3], *([FLOOD] * 500), HEALTHY[-1], DONE)
    async with _play(said) as upstream, _serve({"a": upstream}, tmp_path, defaults='stall_timeout = "2s"') as served:
        client = await _request_by_hand(served.url, streamed())
        with client:
            received = b""
            async with asyncio.timeout(10):
                while not received.endswith(b"0\r\n\r\n"):
                    received += await asyncio.get_running_loop().sock_recv(client, 65536)

        assert received.count(b"x" * 8000) == 500
        assert DONE in received
        assert _attempts(served) == [("a", "success")]
