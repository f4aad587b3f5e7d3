"""Chat completions: what vendors make of it, and what clients take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

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
from routerd.dialects import Stamp
from routerd.dialects.chat import DETAILS_BYTES_MAX, DIALECT
from tests.dialects.streams import RECORDINGS, STAMP, decode, encode, events_of, feed, raw_of

DONE = b"data: [DONE]\n\n"
START = Start("c", "m")


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **fields: Any) -> bytes:
    """One event of a stream; with neither delta nor finish, one without choices."""
    choices = [{"index": 0, "delta": delta or {}, "finish_reason": finish}]
    body = {"id": "c", "model": "m", "choices": choices if delta is not None or finish else []}
    return b"data: " + json.dumps(body | fields).encode() + b"\n\n"


def call(**fields: Any) -> dict[str, Any]:
    """A delta with one piece of a tool call; ``name`` and ``arguments`` belong to its function."""
    function = {key: fields.pop(key) for key in ("name", "arguments") if key in fields}
    return {"tool_calls": [fields | {"function": function}]}


def read(*reads: bytes) -> list[Event]:
    """Events of a stream that has already begun."""
    start, *events = events_of(feed(DIALECT, chunk({"role": "assistant"}), *reads))
    assert start == START
    return events


def recorded(name: str) -> list[Event]:
    return events_of(decode(DIALECT, (RECORDINGS / "chat" / name).read_bytes()))


# --- streams in -------------------------------------------------------------------------------------------------------


def test_text() -> None:
    """OpenAI: a role, deltas, a finish, usage in a chunk of its own, the marker."""
    start, *texts, finish, usage, end = recorded("openai_text.sse")

    assert Start("chatcmpl-CdR3n8WvK1", "gpt-5.5-2026-08-12") == start
    assert "".join(e.text for e in texts if isinstance(e, TextDelta)) == 'The build is green: "ok" 🟢\nNaïve — done.'
    assert Finish("stop") == finish
    assert UsageReport(Usage(1234, 1024, 17, 0)) == usage
    assert End() == end


def test_parallel_tools() -> None:
    """OpenAI: argument pieces follow the call they belong to."""
    events = recorded("openai_parallel_tools.sse")

    assert [
        ToolStart(0, "call_h2kQ9", "terminal"),
        ToolDelta(0, '{"comm'),
        ToolDelta(0, 'and":"ls'),
        ToolDelta(0, ' -la"}'),
        ToolStart(1, "call_Zp0aX", "read_file"),
        ToolDelta(1, '{"path":'),
        ToolDelta(1, '"README.md"}'),
        Finish("tool_calls"),
    ] == events[1:-2]


def test_comments() -> None:
    """OpenRouter: comments are frames without events, reasoning is told once, the bill is read."""
    data = (RECORDINGS / "chat" / "openrouter_comments.sse").read_bytes()
    frames = decode(DIALECT, data)

    assert sum(frame.raw == b": OPENROUTER PROCESSING\n\n" and frame.events == () for frame in frames) == 4
    assert [
        Start("gen-1763680001-Fq3ZyT", "xiaomi/mimo-v2.6-pro"),
        ReasoningDelta(0, "The user"),
        ReasoningDelta(0, " greets."),
        TextDelta(0, "Hello"),
        TextDelta(0, " there."),
        Finish("stop", '[{"type":"reasoning.text","text":"The user greets.","format":"unknown","index":0}]'),
        UsageReport(Usage(311, 256, 24, 11, 0.00015622)),
        End(),
    ] == events_of(frames)


def test_usage_in_an_extension() -> None:
    """Groq: usage comes under a name of its own, with the finish."""
    assert [
        ReasoningDelta(0, "Need a listing."),
        ToolStart(0, "fc_8b1d2e", "terminal"),
        ToolDelta(0, '{"command":"ls"}'),
        Finish("tool_calls"),
        UsageReport(Usage(146, 0, 38, 0)),
        End(),
    ] == recorded("groq_tools.sse")[1:]


def test_reasoning_content() -> None:
    """DeepSeek: reasoning has its own field, and null or empty fields say nothing."""
    assert [
        ReasoningDelta(0, "嗯"),
        ReasoningDelta(0, ", 9.11 < 9.8"),
        TextDelta(0, "9.8"),
        TextDelta(0, " is greater."),
        Finish("stop"),
        UsageReport(Usage(15, 0, 31, 22)),
        End(),
    ] == recorded("deepseek_reasoning.sse")[1:]


def test_calls_without_index() -> None:
    """Gemini: whole calls without an index, a ``stop`` after them, thinking counted only in the total."""
    assert [
        ToolStart(0, "function-call-1", "terminal", '{"google":{"thought_signature":"CpwBAdHtim"}}'),
        ToolDelta(0, '{"command":"ls"}'),
        ToolStart(1, "function-call-2", "read_file"),
        ToolDelta(1, '{"path":"README.md"}'),
        Finish("tool_calls"),
        UsageReport(Usage(97, 0, 106, 78)),
        End(),
    ] == recorded("gemini_no_index.sse")[1:]


def test_calls_without_id() -> None:
    """Gemini: calls told apart by nothing but their names are still as many, and no marker is needed."""
    assert [
        TextDelta(0, "On it."),
        ToolStart(0, "", "clock"),
        ToolDelta(0, "{}"),
        ToolStart(1, "", "clock"),
        ToolDelta(1, "{}"),
        Finish("tool_calls"),
    ] == recorded("gemini_no_id.sse")[1:]


def test_content_in_parts() -> None:
    """Mistral: content may be a list of thinking and text parts."""
    assert [
        ReasoningDelta(0, "Let me"),
        ReasoningDelta(0, " count."),
        TextDelta(0, "Three"),
        TextDelta(0, " r's."),
        Finish("stop"),
        UsageReport(Usage(20, 0, 44, 0)),
        End(),
    ] == recorded("mistral_parts.sse")[1:]


def test_carriage_returns() -> None:
    """A local server's ``\\r\\n``, numeric id and unfinished last line are all read."""
    expected = [Start("7", "local.gguf"), TextDelta(0, "Hel"), TextDelta(0, "lo"), Finish("stop"), End()]

    assert expected == recorded("local_crlf.sse")


@pytest.mark.parametrize(
    ("delta", "events"),
    [
        ({"content": ""}, []),
        ({"content": None, "reasoning": ""}, []),
        ({"reasoning": "a", "reasoning_content": "a"}, [ReasoningDelta(0, "a")]),
        ({"reasoning": {"odd": 1}, "content": "b"}, [TextDelta(0, "b")]),
        ({"reasoning": "a", "content": "b"}, [ReasoningDelta(0, "a"), TextDelta(0, "b")]),
        ({"refusal": "no"}, [TextDelta(0, "no")]),
        ({"content": [{"type": "thinking", "thinking": "a"}]}, [ReasoningDelta(0, "a")]),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": ""}]}]}, []),
        ({"content": [{"type": "thinking", "thinking": []}, {"type": "reference", "ids": [1]}]}, []),
        ({"content": "", "tool_calls": []}, []),
        ({"function_call": {"name": "f", "arguments": "{}"}}, [ToolStart(0, "", "f"), ToolDelta(0, "{}")]),
        (call(index=0, id=7, name="f"), [ToolStart(0, "7", "f")]),
        (call(id="a", name="f", arguments={"x": 1}), [ToolStart(0, "a", "f"), ToolDelta(0, '{"x":1}')]),
        (call(extra_content={"google": {"thought_signature": "s"}}), []),
        (call(index=3, id="a", name="f", arguments=None), [ToolStart(0, "a", "f")]),
    ],
)
def test_delta(delta: dict[str, Any], events: list[Event]) -> None:
    """What a delta says, in all its spellings."""
    assert events == read(chunk(delta))


@pytest.mark.parametrize(
    ("pieces", "events"),
    [
        pytest.param(
            [call(index=0, id="a", name="f"), call(index=0, arguments="{"), call(index=0, id="a", arguments="}")],
            [ToolStart(0, "a", "f"), ToolDelta(0, "{"), ToolDelta(0, "}")],
            id="id repeated",
        ),
        pytest.param(
            [call(index=0, id="a", name="f", arguments="{}"), call(index=0, id="b", name="f", arguments="{}")],
            [ToolStart(0, "a", "f"), ToolDelta(0, "{}"), ToolStart(1, "b", "f"), ToolDelta(1, "{}")],
            id="new id on the same index",
        ),
        pytest.param(
            [call(index=0, name="f", arguments="{}"), call(index=0, name="g", arguments="{}")],
            [ToolStart(0, "", "f"), ToolDelta(0, "{}"), ToolStart(1, "", "g"), ToolDelta(1, "{}")],
            id="new name on the same index",
        ),
        pytest.param(
            [call(index=0, id="a", name="f", arguments="{"), call(index=0, name="f", arguments="}")],
            [ToolStart(0, "a", "f"), ToolDelta(0, "{"), ToolDelta(0, "}")],
            id="name repeated",
        ),
        pytest.param(
            [call(id="a", name="f", arguments="{"), call(arguments="}"), call(index=0, arguments=" ")],
            [ToolStart(0, "a", "f"), ToolDelta(0, "{"), ToolDelta(0, "}"), ToolDelta(0, " ")],
            id="index missing",
        ),
        pytest.param(
            [call(index=0, id="a"), call(index=0, name="f"), call(index=0, arguments="{}")],
            [ToolStart(0, "a", "f"), ToolDelta(0, "{}")],
            id="name late",
        ),
        pytest.param(
            [call(index=0, name="f"), call(index=0, id="a", arguments="{}")],
            [ToolStart(0, "a", "f"), ToolDelta(0, "{}")],
            id="id late",
        ),
        pytest.param(
            [call(index=0, id="a", arguments="{"), call(index=0, arguments="}"), call(index=0, name="f")],
            [ToolStart(0, "a", "f"), ToolDelta(0, "{}")],
            id="name last",
        ),
        pytest.param(
            [call(index=0, name="f"), call(index=1, id="b", name="g")],
            [ToolStart(0, "", "f"), ToolStart(1, "b", "g")],
            id="id never",
        ),
        pytest.param(
            [call(index=0, id="a", name="f"), call(index=1, id="b", name="g"), call(index=0, arguments="{}")],
            [ToolStart(0, "a", "f"), ToolStart(1, "b", "g"), ToolDelta(0, "{}")],
            id="interleaved",
        ),
    ],
)
def test_tool_pieces(pieces: list[dict[str, Any]], events: list[Event]) -> None:
    """Which call a piece belongs to; each call is announced once, with the best id and name there is."""
    assert events == read(*[chunk(piece) for piece in pieces])


def test_half_announced_call_waits() -> None:
    """Blocks of a call that cannot be named yet leave as one frame, so that no half call is taken for a comment."""
    decoder = DIALECT.decoder()
    decoder.feed(chunk({"role": "assistant"}))
    first, second = chunk(call(index=0, id="a")), chunk(call(index=0, name="f"))

    assert decoder.feed(first) == []
    assert decoder.feed(b": ping\n\n") == []
    (frame,) = decoder.feed(second)
    assert first + b": ping\n\n" + second == frame.raw
    assert (ToolStart(0, "a", "f"),) == frame.events


def test_call_never_named_is_told_at_the_finish() -> None:
    """A call whose name never comes is not swallowed."""
    assert [ToolStart(0, "a", ""), ToolDelta(0, "{}"), Finish("tool_calls")] == read(
        chunk(call(index=0, id="a", arguments="{}")), chunk(finish="tool_calls")
    )


def test_fault_ends_the_wait() -> None:
    """An error while a call waits for its name comes out at once."""
    assert [Fault(500, "500", "")] == read(chunk(call(index=0, id="a")), chunk(error={"code": 500}))


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("stop", "stop"),
        ("STOP", "stop"),
        ("end_turn", "stop"),
        ("a word of tomorrow", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("tool_calls", "tool_calls"),
        ("function_call", "tool_calls"),
        ("tool_use", "tool_calls"),
        ("content_filter", "content_filter"),
        ("SAFETY", "content_filter"),
    ],
)
def test_finish_reason(reason: str, expected: str) -> None:
    """Vendors' words for a finish become ours."""
    (finish,) = read(chunk(finish=reason))

    assert isinstance(finish, Finish)
    assert expected == finish.reason


def test_one_finish() -> None:
    """A finish reason repeated, as on a usage chunk, is told once."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2}

    assert [Finish("stop"), UsageReport(Usage(1, 0, 2, 0))] == read(
        chunk(finish="stop"), chunk(finish="stop", usage=usage)
    )


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 3}, Usage(9, 0, 3, 0)),
        ({"prompt_tokens": 9, "prompt_cache_hit_tokens": 4}, Usage(9, 4, 0, 0)),
        ({"prompt_tokens": 9, "cache_read_input_tokens": 4}, Usage(9, 4, 0, 0)),
        ({"prompt_tokens": 9, "cached_tokens": 4}, Usage(9, 4, 0, 0)),
        ({"prompt_tokens": 9, "cached_tokens": 40}, Usage(9, 9, 0, 0)),
        ({"prompt_tokens": 9, "prompt_tokens_details": None, "completion_tokens": None}, Usage(9, 0, 0, 0)),
        ({"prompt_tokens": "9", "cost": "cheap"}, Usage()),
        ({"prompt_tokens": -9, "cost": -1}, Usage()),
        ({"cost": 0}, Usage(cost_usd=0.0)),
        ({"prompt_tokens": 21, "completion_tokens": 0, "total_tokens": 81}, Usage(21, 0, 60, 60)),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 3,
                "total_tokens": 17,
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
            Usage(9, 0, 8, 5),
        ),
    ],
)
def test_usage(usage: dict[str, Any], expected: Usage) -> None:
    """Usage under any name; nonsense counts as nothing and never breaks an answer."""
    assert [UsageReport(expected)] == read(chunk(usage=usage))


def test_usage_in_the_choice() -> None:
    """Moonshot: usage sits inside the choice."""
    body = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": {"prompt_tokens": 9}}]}

    assert [Finish("stop"), UsageReport(Usage(9))] == read(b"data: " + json.dumps(body).encode() + b"\n\n")


@pytest.mark.parametrize("usage", [None, [], "none", 7])
def test_no_usage(usage: object) -> None:
    """A usage field that is not usage is no report."""
    assert read(chunk(usage=usage)) == []


def test_usage_chunk_is_recognisable() -> None:
    """A chunk of usage alone is a frame of exactly one report, so that it can be kept from a client."""
    frames = feed(DIALECT, chunk({"content": "a"}, "stop"), chunk(usage={"prompt_tokens": 1}))

    assert (UsageReport(Usage(1)),) == frames[-1].events


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"error": {"message": "m", "type": "t", "code": "c"}}, Fault(None, "c", "m")),
        ({"error": {"message": "m", "type": "t", "code": None}}, Fault(None, "t", "m")),
        ({"error": {"message": "m", "code": 429}}, Fault(429, "429", "m")),
        ({"error": {"message": "m", "code": "400", "type": ""}}, Fault(400, "400", "m")),
        ({"error": {"message": "m", "code": "1302"}}, Fault(None, "1302", "m")),
        ({"error": {"message": "m", "code": 503, "status": "UNAVAILABLE"}}, Fault(503, "UNAVAILABLE", "m")),
        ({"error": {"message": "m", "code": 502, "metadata": {"error_type": "e"}}}, Fault(502, "e", "m")),
        ({"error": {"message": {"a": 1}}}, Fault(None, "", '{"a":1}')),
        ({"error": "over capacity"}, Fault(None, "", "over capacity")),
        ({"error": {"message": "m"}, "choices": [{"delta": {}, "finish_reason": "error"}]}, Fault(None, "", "m")),
        ({"choices": [{"index": 0, "delta": {}, "error": {"message": "m", "code": 500}}]}, Fault(500, "500", "m")),
        ({"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]}, Fault(None, "error", "")),
        (
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "insufficient_system_resource"}]},
            Fault(503, "insufficient_system_resource", ""),
        ),
        ([{"error": {"message": "m", "code": 400}}], Fault(400, "400", "m")),
        ({"object": "error", "message": "m", "type": "t", "code": 400}, Fault(400, "t", "m")),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
            Fault(None, "overloaded_error", "m"),
        ),
        ({"detail": [{"msg": "extra"}]}, Fault(None, "", '[{"msg":"extra"}]')),
        ({"choices": None, "base_resp": {"status_code": 1027, "status_msg": "m"}}, Fault(None, "1027", "m")),
        ({"choices": [], "x_groq": {"error": "over_capacity"}}, Fault(None, "", "over_capacity")),
    ],
)
def test_fault(data: object, fault: Fault) -> None:
    """Errors inside a 200, in every shape vendors give them."""
    assert [fault] == read(b"data: " + json.dumps(data).encode() + b"\n\n")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b'{"error":{"message":"m","code":500}}', Fault(500, "500", "m")),
        (b'{"message":"m","code":500}', Fault(500, "500", "m")),
        (b'"m"', Fault(None, "", "m")),
        (b"it broke", Fault(None, "", "it broke")),
        (chunk({"content": "x"}, error={"message": "m"})[6:-2], Fault(None, "", "m")),
    ],
)
def test_error_event(data: bytes, fault: Fault) -> None:
    """An event named ``error`` is a fault whatever its data."""
    assert [fault] == read(b"event: error\ndata: " + data + b"\n\n")


def test_other_names_of_events_do_not_matter() -> None:
    """A chunk is a chunk under any other name."""
    assert [TextDelta(0, "a")] == read(b"event: message\n" + chunk({"content": "a"}))


def test_empty_continuation() -> None:
    """A piece of a call that adds nothing has no event."""
    assert [ToolStart(0, "a", "f")] == read(chunk(call(index=0, id="a", name="f")), chunk(call(index=0, arguments="")))


def test_usage_before_a_fault() -> None:
    """What was used before an error is known before the error is."""
    usage = {"prompt_tokens": 5}

    assert [UsageReport(Usage(5)), Fault(None, "error", "")] == read(chunk(finish="error", usage=usage))


def test_fault_text_is_bounded() -> None:
    """A page of text in an error is cut."""
    (fault,) = read(chunk(error="x" * 100_000))

    assert isinstance(fault, Fault)
    assert len(fault.message) == 2000


@pytest.mark.parametrize("data", [b'{"choices":[]}', b'{"id":"x"}', b'{"error":null,"choices":[]}', b'{"type":"ping"}'])
def test_chunk_that_says_nothing(data: bytes) -> None:
    """Keep-alives in chunk form have no events, not even a start."""
    assert events_of(feed(DIALECT, b"data: " + data + b"\n\n", chunk({}))) == []


@pytest.mark.parametrize(
    "data",
    [b"7", b"[]", b'{"choices":7}', b'{"choices":[{"delta":{"content":7}}]}', b"{", b"\xff", b'{"choices":[NaN]}'],
)
def test_no_chunk(data: bytes) -> None:
    """JSON of another kind, or none, is a protocol error."""
    with pytest.raises(UpstreamProtocolError):
        read(b"data: " + data + b"\n\n")


def test_completion_in_place_of_a_stream() -> None:
    """A whole completion where a stream was asked for is a protocol error."""
    body = DIALECT.encode_body([START, TextDelta(0, "a"), Finish("stop")], STAMP)

    with pytest.raises(UpstreamProtocolError):
        feed(DIALECT, body)


def test_other_choices_are_not_followed() -> None:
    """Of several answers at once the first one counts."""
    second = {"index": 1, "delta": {"content": "b"}, "finish_reason": "stop"}
    both = [second, {"index": 0, "delta": {"content": "a"}}]

    assert [TextDelta(0, "a")] == read(chunk(choices=[second]), chunk(choices=both))


@pytest.mark.parametrize("broken", [b"\\ud83d", b"\xf0\x9f", b"\\udca9"])
def test_half_a_character(broken: bytes) -> None:
    """Half an emoji costs that character, not the answer."""
    (event,) = read(b'data: {"choices":[{"delta":{"content":"a' + broken + b'b"}}]}\n\n')

    assert isinstance(event, TextDelta)
    assert event.text == "a\ufffdb"


def test_done_without_finish_is_held() -> None:
    """``[DONE]`` proves nothing without a finish reason: it stays here, and close says why."""
    decoder = DIALECT.decoder()
    decoder.feed(chunk({"content": "a"}))

    assert decoder.feed(DONE) == []
    assert decoder.feed(DONE) == []
    with pytest.raises(UpstreamTruncated):
        decoder.close()


def test_finish_without_done_is_whole() -> None:
    """Some vendors leave the marker out; then there is none among the events."""
    assert [START, TextDelta(0, "a"), Finish("stop")] == events_of(decode(DIALECT, chunk({"content": "a"}, "stop")))


def test_torn_after_finish_is_whole() -> None:
    """What tears after the finish reason is only usage; it is dropped, and no half of it goes on."""
    whole = chunk({"content": "a"}, "stop")

    assert whole == raw_of(decode(DIALECT, whole + b'data: {"choices":[],"usa'))


def test_unbounded_wait_is_refused() -> None:
    """A call that never gets a name cannot fill the memory."""
    piece = chunk(call(index=0, id="a", arguments="x" * 1_000_000))

    with pytest.raises(UpstreamProtocolError, match="name"):
        read(*[piece] * 9)


def test_repr() -> None:
    """The decoder's state is visible."""
    decoder = DIALECT.decoder()
    assert repr(decoder) == "<ChatDecoder NEW, 0 calls, 0 bytes held>"

    decoder.feed(chunk(call(index=0, id="a", name="f")) + chunk(finish="tool_calls") + DONE)
    assert repr(decoder) == "<ChatDecoder ENDED, 1 calls, 0 bytes held>"


# --- streams out ------------------------------------------------------------------------------------------------------

ANSWER: list[Event] = [
    Start(STAMP.id, STAMP.model),
    ReasoningDelta(0, "Hm. "),
    ReasoningDelta(0, "So."),
    TextDelta(0, "It is "),
    TextDelta(0, "done. ✓"),
    ToolStart(0, "call_a", "terminal"),
    ToolDelta(0, '{"command":'),
    ToolDelta(0, ' "ls"}'),
    ToolStart(1, "call_b", "clock"),
    ToolDelta(1, "{}"),
    Finish("tool_calls"),
    UsageReport(Usage(100, 60, 20, 7, 0.25)),
    End(),
]


def data_of(stream: bytes) -> list[str]:
    return [block.removeprefix("data: ") for block in stream.decode().split("\n\n")[:-1]]


def accumulated(stream: bytes) -> ChatCompletion:
    """The answer as OpenAI's own client puts it together."""
    state: ChatCompletionStreamState[Any] = ChatCompletionStreamState()
    for data in data_of(stream):
        if data != "[DONE]":
            state.handle_chunk(ChatCompletionChunk.model_validate_json(data))
    return state.get_final_completion()


def test_client_accumulates_stream() -> None:
    """OpenAI's client rebuilds the answer, role said once, usage known, keep-alives unnoticed."""
    encoder = DIALECT.encoder(STAMP)
    stream = b"".join(encoder.keepalive() + encoder.encode(event) for event in ANSWER[:-1]) + encoder.encode(End())

    completion = accumulated(stream)
    message = completion.choices[0].message

    assert message.role == "assistant"
    assert message.content == "It is done. ✓"
    assert [
        (call.id, call.function.name, call.function.arguments)
        for call in message.tool_calls or []
        if call.type == "function"
    ] == [("call_a", "terminal", '{"command": "ls"}'), ("call_b", "clock", "{}")]
    assert completion.choices[0].finish_reason == "tool_calls"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 120


def test_chunk_form() -> None:
    """Every chunk carries the stamp and one choice."""
    (chunk_data,) = data_of(DIALECT.encoder(Stamp("a", 'm"', 5)).encode(TextDelta(0, 'say "hi"\n')))

    assert json.loads(chunk_data) == {
        "id": "a",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": 'm"',
        "choices": [{"index": 0, "delta": {"content": 'say "hi"\n'}, "finish_reason": None}],
    }


def test_usage_chunk_comes_once_and_last() -> None:
    """The last report stands, in one chunk without choices, right before the marker."""
    events: list[Event] = [UsageReport(Usage(1, 0, 1)), Finish("stop"), UsageReport(Usage(1, 0, 2)), End()]
    _, usage, done = data_of(encode(DIALECT, events))

    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"]["total_tokens"] == 3
    assert done == "[DONE]"


def test_cost_survives() -> None:
    """The upstream's bill goes on to whoever reads it."""
    assert UsageReport(Usage(100, 60, 20, 7, 0.25)) in events_of(decode(DIALECT, encode(DIALECT, ANSWER)))


def test_error_chunk() -> None:
    """A failure after the start: a top-level error, finish reason ``error``, no marker behind it."""
    failure = Failure(Outcome.TRUNCATED, Side.UPSTREAM, "Network connection lost.", status=200, code="secret")
    (data,) = data_of(DIALECT.encoder(STAMP).error(failure))

    error = {"message": "Network connection lost.", "type": "server_error", "param": None, "code": "bad_gateway"}
    assert error == json.loads(data)["error"]
    assert json.loads(data)["choices"][0]["finish_reason"] == "error"


def test_fault_is_never_encoded() -> None:
    """An upstream's text does not reach a client."""
    assert DIALECT.encoder(STAMP).encode(Fault(500, "c", "text")) == b""


# --- whole answers ----------------------------------------------------------------------------------------------------


def test_body_for_clients() -> None:
    """OpenAI's client parses a whole answer."""
    completion = ChatCompletion.model_validate_json(DIALECT.encode_body(ANSWER, STAMP))
    (choice,) = completion.choices

    assert (completion.id, completion.model, completion.created) == (STAMP.id, "auto", 1_763_680_000)
    assert choice.message.content == "It is done. ✓"
    assert (choice.message.model_extra or {})["reasoning_content"] == "Hm. So."
    assert choice.finish_reason == "tool_calls"
    assert [call.id for call in choice.message.tool_calls or []] == ["call_a", "call_b"]


def test_body_of_calls_alone() -> None:
    """Without text beside tool calls, content is null; without usage there is no usage field."""
    events: list[Event] = [START, ToolStart(0, "a", "f"), ToolDelta(0, "{}"), Finish("tool_calls")]
    body = json.loads(DIALECT.encode_body(events, STAMP))

    assert body["choices"][0]["message"]["content"] is None
    assert "usage" not in body


def test_no_finish_is_invented() -> None:
    """An answer without a finish has none in its body either."""
    body = json.loads(DIALECT.encode_body([START, TextDelta(0, "a")], STAMP))

    assert body["choices"][0]["finish_reason"] is None


def completion_body(message: dict[str, Any], finish: str | None = "stop", **fields: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish}
    return json.dumps({"id": "c", "model": "m", "choices": [choice]} | fields).encode()


@pytest.mark.parametrize(
    ("message", "events"),
    [
        ({"content": "a"}, [TextDelta(0, "a")]),
        ({"content": "a", "reasoning": "r"}, [ReasoningDelta(0, "r"), TextDelta(0, "a")]),
        (call(name="f", arguments={"a": 1}), [ToolStart(0, "", "f"), ToolDelta(0, '{"a":1}')]),
        (call(id="x", name="f", arguments=""), [ToolStart(0, "x", "f")]),
        (
            {"tool_calls": [{"id": i, "function": {"name": "f", "arguments": "{}"}} for i in ("x", "y")]},
            [ToolStart(0, "x", "f"), ToolDelta(0, "{}"), ToolStart(1, "y", "f"), ToolDelta(1, "{}")],
        ),
        ({"function_call": {"name": "f", "arguments": "{}"}}, [ToolStart(0, "", "f"), ToolDelta(0, "{}")]),
        ({"content": [{"type": "text", "text": "a"}]}, [TextDelta(0, "a")]),
    ],
)
def test_message(message: dict[str, Any], events: list[Event]) -> None:
    """A whole message says the same as a stream would, in the same order."""
    finish = Finish("tool_calls" if any(type(event) is ToolStart for event in events) else "stop")

    assert [START, *events, finish, End()] == DIALECT.decode_body(b"\n\n" + completion_body(message))


def test_half_a_character_in_a_body() -> None:
    """A body too survives half an emoji."""
    assert TextDelta(0, "\ufffd") in DIALECT.decode_body(completion_body({"content": "\ud83d"}))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b'{"error":{"message":"m","code":429}}', Fault(429, "429", "m")),
        (b'[{"error":{"message":"m","code":400,"status":"INVALID_ARGUMENT"}}]', Fault(400, "INVALID_ARGUMENT", "m")),
        (b'{"choices":[{"error":{"message":"m","code":502}}]}', Fault(502, "502", "m")),
        (b'{"choices":null,"base_resp":{"status_code":1008,"status_msg":"m"}}', Fault(None, "1008", "m")),
        (completion_body({"content": "a"}, "error"), Fault(None, "error", "")),
        (completion_body({"content": "a"}, error={"message": "m"}), Fault(None, "", "m")),
    ],
)
def test_fault_in_a_body(body: bytes, fault: Fault) -> None:
    """An error inside a 200 is a lone fault."""
    assert [fault] == DIALECT.decode_body(body)


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b'{"choices":[]}', b'{"choices":[{"message":null}]}', b"null"])
def test_no_completion(body: bytes) -> None:
    """Anything else is a protocol error."""
    with pytest.raises(UpstreamProtocolError):
        DIALECT.decode_body(body)


def test_body_without_finish() -> None:
    """A whole answer too needs the model's finish."""
    with pytest.raises(UpstreamTruncated):
        DIALECT.decode_body(completion_body({"content": "a"}, None))


# --- seals ------------------------------------------------------------------------------------------------------------

SEAL = '{"google":{"thought_signature":"CpwB+/=="}}'


def thought(text: str = "", **fields: Any) -> dict[str, Any]:
    """A piece of thinking as OpenRouter sends it."""
    return {"type": "reasoning.text", "text": text, "format": "anthropic-claude-v1", "index": 0} | fields


def details(*pieces: list[dict[str, Any]] | object) -> Any:
    """The sealed thinking of an answer that came in these pieces."""
    chunks = [chunk({"reasoning_details": piece}) for piece in pieces]
    finish = read(*chunks, chunk(call(index=0, id="a", name="f"), "tool_calls"))[-1]
    assert type(finish) is Finish
    return json.loads(finish.details or "null")


@pytest.mark.parametrize(
    ("pieces", "joined"),
    [
        (([thought("a b")],), [thought("a b")]),
        (([thought("a")], [thought(" b")], [thought("", signature="E")]), [thought("a b", signature="E")]),
        (([thought("a", signature=None)], [thought("b", signature="E")]), [thought("ab", signature="E")]),
        (([{"type": "reasoning.text", "signature": "E"}], []), [{"type": "reasoning.text", "signature": "E"}]),
        (([thought("a")], [thought("b", index=1)]), [thought("a"), thought("b", index=1)]),
        (
            ([{"type": "reasoning.summary", "summary": "a"}], [{"type": "reasoning.summary", "summary": "b"}]),
            [{"type": "reasoning.summary", "summary": "ab"}],
        ),
        (
            ([{"type": "reasoning.encrypted", "data": "A"}], [{"type": "reasoning.encrypted", "data": "B"}]),
            [{"type": "reasoning.encrypted", "data": "A"}, {"type": "reasoning.encrypted", "data": "B"}],
        ),
        (
            ([thought("a"), {"type": "reasoning.encrypted", "data": "A"}],) * 2,
            [thought("a"), {"type": "reasoning.encrypted", "data": "A"}] * 2,
        ),
        (([{"type": ["odd"]}], [{"n": 1.5}]), [{"type": ["odd"]}, {"n": 1.5}]),
        (([thought("\ud83d")],), [thought("\ufffd")]),
    ],
)
def test_sealed_thinking(pieces: Any, joined: Any) -> None:
    """OpenRouter: pieces of one text are joined, with the seal that comes last; anything else stays as it is."""
    assert joined == details(*pieces)


@pytest.mark.parametrize("pieces", [(), ([],), (None, []), ("x", {"text": "a"}), ([1], [2])])
def test_no_sealed_thinking(pieces: Any) -> None:
    """What is no list of objects is left out, and costs nothing else."""
    assert details(*pieces) is None


def test_sealed_thinking_beside_text() -> None:
    """A seal that comes with text is not missed, an empty list is not taken for one."""
    sealed = [{"type": "reasoning.encrypted", "data": "A"}]
    stream = chunk({"content": "a", "reasoning_details": []}), chunk({"content": "b", "reasoning_details": sealed})

    assert [TextDelta(0, "a"), TextDelta(0, "b"), Finish("stop", json.dumps(sealed))] == read(
        *stream, chunk(finish="stop")
    )


def test_sealed_thinking_is_bounded() -> None:
    """Of more than anybody would send back nothing is kept."""
    piece = [thought("x" * (DETAILS_BYTES_MAX // 4))]

    assert details(*[piece] * 3) is not None
    assert details(*[piece] * 5) is None


@pytest.mark.parametrize(("extra", "signature"), [({"s": "x"}, '{"s": "x"}'), (None, ""), ([1], ""), ("x", "")])
def test_sealed_call(extra: object, signature: str) -> None:
    """Gemini: a call's seal comes with its id and name, and is kept byte for byte."""
    assert read(chunk(call(index=0, id="a", name="f", extra_content=extra))) == [ToolStart(0, "a", "f", signature)]


def test_seals_reach_clients() -> None:
    """An answer that is written anew, as a stream or whole, has its seals where the vendor had them."""
    sealed = json.dumps([thought("a", signature="E")])
    events: list[Event] = [START, ToolStart(0, "a", "f", SEAL), ToolDelta(0, "{}"), Finish("tool_calls", sealed)]
    message = json.loads(DIALECT.encode_body(events, STAMP))["choices"][0]["message"]

    assert events[1:] == events_of(decode(DIALECT, encode(DIALECT, events)))[1:]
    assert (json.loads(SEAL), json.loads(sealed)) == (
        message["tool_calls"][0]["extra_content"],
        message["reasoning_details"],
    )
    assert events == DIALECT.decode_body(DIALECT.encode_body(events, Stamp("c", "m", 0)))[:-1]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        (Failure(Outcome.CLIENT_ERROR, Side.CLIENT, "m", 400), "invalid_request_error", "invalid_request"),
        (Failure(Outcome.CLIENT_ERROR, Side.CLIENT, "m", 401), "authentication_error", "invalid_api_key"),
        (Failure(Outcome.CLIENT_ERROR, Side.CLIENT, "m", 404), "invalid_request_error", "model_not_found"),
        (Failure(Outcome.CLIENT_ERROR, Side.CLIENT, "m", 413), "invalid_request_error", "request_too_large"),
        (Failure(Outcome.CLIENT_ERROR, Side.CLIENT, "m", 418), "invalid_request_error", "invalid_request"),
        (Failure(Outcome.CLIENT_ERROR, Side.CLIENT, "m", 404, "gone"), "invalid_request_error", "gone"),
        (Failure(Outcome.RATE_LIMITED, Side.ROUTER, "m", 429), "rate_limit_error", "rate_limit_exceeded"),
        (Failure(Outcome.EXHAUSTED, Side.UPSTREAM, "m", 402), "rate_limit_error", "rate_limit_exceeded"),
        (Failure(Outcome.UNAVAILABLE, Side.ROUTER, "m", 503), "server_error", "overloaded"),
        (Failure(Outcome.UNAVAILABLE, Side.ROUTER, "m"), "server_error", "overloaded"),
        (Failure(Outcome.UNAUTHORIZED, Side.UPSTREAM, "m", 401, "bad_key"), "server_error", "overloaded"),
        (Failure(Outcome.STALLED, Side.UPSTREAM, "m"), "server_error", "timeout"),
    ],
)
def test_error_body(failure: Failure, kind: str, code: str) -> None:
    """OpenAI's error shape; an upstream's status and code are not the client's."""
    assert {"error": {"message": "m", "type": kind, "param": None, "code": code}} == msgspec.json.decode(
        DIALECT.encode_error(failure)
    )


def test_recordings_are_small() -> None:
    """Recordings stay readable."""
    sizes = [path.stat().st_size for path in Path(RECORDINGS / "chat").rglob("*.sse")]

    assert max(sizes) < 8192
