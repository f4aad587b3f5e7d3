"""The Messages dialect: what vendors' streams mean, and what clients are sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from routerd.canonical import (
    End,
    Event,
    Failure,
    Fault,
    Finish,
    Outcome,
    ReasoningDelta,
    Side,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    UpstreamProtocolError,
    UpstreamTruncated,
    Usage,
    UsageReport,
)
from routerd.dialects.messages import DIALECT
from tests.dialects.streams import RECORDINGS, STAMP, decode, encode, events_of, feed

FAILURE = Failure(Outcome.UNAVAILABLE, Side.ROUTER, "nobody answers", status=503)


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n".encode()


def block_start(index: int, **block: Any) -> bytes:
    return event("content_block_start", index=index, content_block=block)


def delta(index: int, **fields: Any) -> bytes:
    return event("content_block_delta", index=index, delta=fields)


def block_stop(index: int) -> bytes:
    return event("content_block_stop", index=index)


def ending(reason: str | None, **usage: int) -> bytes:
    return event("message_delta", delta={"stop_reason": reason}, usage=usage or None) + event("message_stop")


START = event("message_start", message={"id": "msg_1", "model": "m", "usage": {"input_tokens": 0, "output_tokens": 0}})


def recorded(name: str) -> list[Event]:
    return events_of(decode(DIALECT, (RECORDINGS / "messages" / f"{name}.sse").read_bytes()))


def told(stream: bytes) -> list[dict[str, Any]]:
    """The data of each event of a stream."""
    return [json.loads(line[6:]) for line in stream.split(b"\n") if line.startswith(b"data: ")]


# --- in ---------------------------------------------------------------------------------------------------------------


def test_thinking() -> None:
    """Thinking comes with its seal, and what only the vendor can read comes whole, each a block of its own."""
    seal = "EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pk="
    sealed = "EmwKAhgBEgy3va3pzix/LafPsn4aDFIT2Xlxh0L5L8rLVyIwxtE3rAFBa8cr3qpP"

    assert [
        ReasoningDelta(0, "Let me think.\n\n1. "),
        ReasoningDelta(0, "27 * 453"),
        ReasoningDelta(0, "", seal),
        ReasoningDelta(1, "", sealed=sealed),
        TextDelta(0, "12,231"),
    ] == recorded("thinking")[2:7]


def test_usage() -> None:
    """What came from the cache is a part of the input; the report at the end replaces the one at the start."""
    reports = [event.usage for event in recorded("tool_use") if isinstance(event, UsageReport)]

    assert reports == [Usage(2520, 2048, 2), Usage(2520, 2048, 89)]


def test_usage_in_two_halves() -> None:
    """A report that names the output only leaves the input as it was told."""
    reports = [event.usage for event in recorded("text") if isinstance(event, UsageReport)]

    assert reports[-1] == Usage(25, 0, 15)


def test_call_without_arguments() -> None:
    """It ends without a word, and means an empty object."""
    assert [ToolStart(1, "toolu_02", "now"), ToolDelta(1, "{}")] == [
        event for event in recorded("tool_use") if isinstance(event, ToolStart | ToolDelta) and event.index == 1
    ]


def test_server_tools_are_no_calls() -> None:
    """What a server runs itself is passed over; the text around it is in two blocks."""
    events = recorded("server_tool")

    assert [TextDelta(0, "I will search."), TextDelta(1, "It is sunny.")] == [
        event for event in events if isinstance(event, TextDelta)
    ]
    assert not [event for event in events if isinstance(event, ToolStart)]


def test_stop_after_calls() -> None:
    """A compatible server that says its turn is over after calls would keep a client from running them."""
    assert Finish("tool_calls") in recorded("compatible_crlf")


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("something_new", "stop"),
    ],
)
def test_stop_reasons(reason: str, finish: Any) -> None:
    """Every stop reason is one of ours."""
    assert events_of(decode(DIALECT, START, ending(reason)))[1] == Finish(finish)


def test_stop_reason_that_is_a_fault() -> None:
    """A server's own end is none of the model's."""
    with pytest.raises(UpstreamTruncated):
        decode(DIALECT, START, ending("network_error"))


def test_error_event() -> None:
    """The kind of error is the code; there is no status in it."""
    (fault,) = events_of(feed(DIALECT, event("error", error={"type": "overloaded_error", "message": "Overloaded"})))

    assert fault == Fault(None, "overloaded_error", "Overloaded")


def test_end_without_a_reason_is_kept_back() -> None:
    """Nothing from there on reaches a client, who would run half a call with no arguments."""
    call = START + block_start(0, type="tool_use", id="a", name="shell", input={})
    frames = feed(DIALECT, call + event("message_stop") + ending("tool_use"))

    assert b"".join(frame.raw for frame in frames) == call


def test_arguments_of_no_call() -> None:
    """A call nobody opened cannot be put together."""
    with pytest.raises(UpstreamProtocolError):
        feed(DIALECT, START + delta(3, type="input_json_delta", partial_json='{"a"'))


def test_text_of_no_block() -> None:
    """Text is text, whoever forgot to open its block."""
    (start, text) = events_of(feed(DIALECT, START + delta(0, type="text_delta", text="Hi")))

    assert (start, text) == (Start("msg_1", "m"), TextDelta(0, "Hi"))


def test_whole_body_without_a_reason() -> None:
    """Is half an answer."""
    with pytest.raises(UpstreamTruncated):
        DIALECT.decode_body(b'{"type":"message","content":[{"type":"text","text":"Hi"}]}')


def test_whole_body_with_sealed_thinking() -> None:
    """Thinking keeps its seals both ways."""
    events: list[Event] = [
        Start(STAMP.id, STAMP.model),
        ReasoningDelta(0, "Hm.", "seal"),
        ReasoningDelta(1, "", sealed="secret"),
        TextDelta(0, "Hi"),
        Finish("stop"),
        UsageReport(Usage(3, 0, 2)),
        End(),
    ]

    assert DIALECT.decode_body(DIALECT.encode_body(events, STAMP)) == events
    streamed = events_of(decode(DIALECT, encode(DIALECT, events)))
    assert streamed[1:4] == [ReasoningDelta(0, "Hm."), ReasoningDelta(0, "", "seal"), events[2]]


# --- out --------------------------------------------------------------------------------------------------------------


def test_blocks() -> None:
    """One block is open at a time, and their indexes go up."""
    events: list[Event] = [
        Start("a", "m"),
        ReasoningDelta(0, "Hm."),
        TextDelta(0, "Hi"),
        ToolStart(0, "x", "shell"),
        ToolDelta(0, "{}"),
        Finish("tool_calls"),
        End(),
    ]
    stream = told(encode(DIALECT, events))

    assert [(one["type"], one.get("index")) for one in stream] == [
        ("message_start", None),
        *[(f"content_block_{kind}", 0) for kind in ("start", "delta", "stop")],
        *[(f"content_block_{kind}", 1) for kind in ("start", "delta", "stop")],
        *[(f"content_block_{kind}", 2) for kind in ("start", "delta", "stop")],
        ("message_delta", None),
        ("message_stop", None),
    ]


def test_no_end_without_a_finish() -> None:
    """Half an answer never ends cleanly."""
    assert b"message_stop" not in encode(DIALECT, [Start("a", "m"), TextDelta(0, "Hi"), End()])


def test_keepalive_before_content() -> None:
    """It opens the message and a text block, for an empty delta in there is the only thing clients count as life."""
    encoder = DIALECT.encoder(STAMP)
    first, second = encoder.keepalive(), encoder.keepalive()

    assert [one["type"] for one in told(first)] == ["message_start", "content_block_start", "content_block_delta"]
    assert [one["delta"] for one in told(second)] == [{"type": "text_delta", "text": ""}]
    assert encoder.opened


def test_content_after_a_keepalive() -> None:
    """Text goes on in the block; anything else closes it, and the indexes go on."""
    encoder = DIALECT.encoder(STAMP)
    encoder.keepalive()
    stream = told(encoder.encode(ReasoningDelta(0, "Hm.")))

    assert [(one["type"], one["index"]) for one in stream] == [
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
    ]


@pytest.mark.parametrize(
    ("sent", "index", "kind"),
    [
        (START + block_start(0, type="text", text=""), 0, "text_delta"),
        (START + block_start(0, type="thinking", thinking=""), 0, "thinking_delta"),
        (START + block_start(0, type="text", text="") + block_stop(0), 1, "text_delta"),
    ],
)
def test_keepalive_behind_what_was_passed_on(sent: bytes, index: int, kind: str) -> None:
    """It fits: into the block that is open, else into one of its own, behind the last."""
    encoder = DIALECT.encoder(STAMP)
    encoder.follow(feed(DIALECT, sent))
    last = told(encoder.keepalive())[-1]

    assert (last["index"], last["delta"]["type"]) == (index, kind)
    assert encoder.opened == (index == 1)


def test_encoding_behind_what_was_passed_on() -> None:
    """Text goes on in the open block, calls open the next one, and the message begins only once."""
    encoder = DIALECT.encoder(STAMP)
    encoder.follow(feed(DIALECT, START + block_start(4, type="text", text="") + delta(4, type="text_delta", text="a")))
    events: list[Event] = [Start("b", "n"), TextDelta(0, "b"), ToolStart(0, "x", "shell"), Finish("tool_calls"), End()]
    stream = told(b"".join(encoder.encode(event) for event in events))

    assert [(one["type"], one.get("index")) for one in stream] == [
        ("content_block_delta", 4),
        ("content_block_stop", 4),
        ("content_block_start", 5),
        ("content_block_stop", 5),
        ("message_delta", None),
        ("message_stop", None),
    ]


def test_end_marker_behind_what_was_passed_on() -> None:
    """A whole answer that came without its marker gets it, and its stop reason is not said again."""
    encoder = DIALECT.encoder(STAMP)
    encoder.follow(feed(DIALECT, START + event("message_delta", delta={"stop_reason": "end_turn"})))

    assert [one["type"] for one in told(encoder.encode(End()))] == ["message_stop"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (503, "overloaded_error"),
        (502, "api_error"),
        (422, "invalid_request_error"),
    ],
)
def test_errors(status: int, kind: str) -> None:
    """Every status has its type of error."""
    failure = Failure(Outcome.UNAVAILABLE, Side.ROUTER, "so it is", status=status)

    assert json.loads(DIALECT.encode_error(failure)) == {
        "type": "error",
        "error": {"type": kind, "message": "so it is"},
    }


def test_error_in_mid_stream() -> None:
    """An error event, and nothing that looks like an end."""
    stream = DIALECT.encoder(STAMP).error(FAILURE)

    assert [one["type"] for one in told(stream)] == ["error"]
    assert stream.startswith(b"event: error\n")
