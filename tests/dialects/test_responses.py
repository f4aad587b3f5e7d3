"""The Responses dialect: what servers' streams mean, and what clients are sent."""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai._models import BaseModel, construct_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.input_token_count_response import InputTokenCountResponse

from routerd.canonical import (
    End,
    Event,
    Failure,
    Fault,
    Finish,
    Frame,
    Head,
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
from routerd.dialects.responses import DIALECT
from routerd.dialects.responses_encoder import response_id
from tests.dialects.streams import (
    RECORDINGS,
    STAMP,
    answers,
    decode,
    encode,
    events_of,
    feed,
    merged,
    raw_of,
    recordings,
)

FAILURE = Failure(Outcome.UNAVAILABLE, Side.ROUTER, "nobody answers", status=503)
EVENTS: dict[str, type[BaseModel]] = {
    typing.get_args(model.model_fields["type"].annotation)[0]: model
    for model in typing.get_args(typing.get_args(ResponseStreamEvent)[0])
}
LOOSE = {"local_crlf"}  # leaves out what the vendor's own client insists on
every_recording = pytest.mark.parametrize("path", recordings(DIALECT), ids=lambda path: path.stem)


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n".encode()


def life(status: str = "in_progress", kind: str = "", **fields: Any) -> bytes:
    """An event with the response."""
    names = {"in_progress": "created"}
    response = {"id": "resp_1", "object": "response", "model": "m", "status": status, "output": []} | fields
    return event(f"response.{kind or names.get(status, status)}", response=response)


def item(kind: str, index: int = 0, identity: str | None = None, *, done: bool = False, **fields: Any) -> bytes:
    wire = {"id": identity or f"{kind}_{index}", "type": kind} | fields
    return event(f"response.output_item.{'done' if done else 'added'}", output_index=index, item=wire)


def message(index: int = 0, text: str | None = None, **fields: Any) -> bytes:
    """The event that begins a message or, with its text, ends it."""
    content = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
    return item("message", index, done=text is not None, role="assistant", content=content, **fields)


def call(arguments: str | None = None, index: int = 0, **fields: Any) -> bytes:
    """The event that begins a call or, with its arguments, ends it."""
    named = {"call_id": f"call_{index}", "name": "shell", "arguments": arguments or ""} | fields
    return item("function_call", index, done=arguments is not None, **named)


def part(kind: str, index: int = 0, **fields: Any) -> bytes:
    """An event about a message's only text."""
    return event(kind, item_id=f"message_{index}", output_index=index, content_index=0, **fields)


def delta(text: str, index: int = 0) -> bytes:
    return part("response.output_text.delta", index, delta=text)


def arguments(piece: str, index: int = 0, **fields: Any) -> bytes:
    kind = "response.function_call_arguments.delta"
    return event(kind, item_id=f"function_call_{index}", output_index=index, delta=piece, **fields)


def summary(kind: str, index: int = 0, place: int = 0, **fields: Any) -> bytes:
    name = f"response.reasoning_summary_{kind}"
    return event(name, item_id=f"reasoning_{index}", output_index=index, summary_index=place, **fields)


START = life()
LAST = life("completed")


def read(*stream: bytes) -> list[Event]:
    """What a whole stream says between its start and its finish."""
    events = events_of(decode(DIALECT, START, *stream))
    assert events[0] == Start("resp_1", "m")
    return [event for event in events[1:] if not isinstance(event, Finish | UsageReport | End)]


def recorded(name: str) -> list[Event]:
    return events_of(decode(DIALECT, (RECORDINGS / "responses" / f"{name}.sse").read_bytes()))


def told(stream: bytes) -> list[dict[str, Any]]:
    """The data of each event of a stream."""
    lines = stream.replace(b"\r\n", b"\n").split(b"\n")
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


def kinds(stream: bytes) -> list[str]:
    return [one["type"].removeprefix("response.") for one in told(stream)]


def assert_valid(stream: bytes) -> None:
    """Every event is one of the vendor's own, to the letter, and is named as it is."""
    for block in filter(None, stream.split(b"\n\n")):
        name, _, data = block.removeprefix(b"event: ").partition(b"\ndata: ")
        one = json.loads(data)
        assert name.decode() == one["type"]
        EVENTS[one["type"]].model_validate(one, strict=True)


def accumulated(stream: bytes) -> Any:
    """The answer as the vendor's own client puts it together. Raises RuntimeError where it does not fit."""
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=[], text_format=omit)
    for one in told(stream):
        state.handle_event(typing.cast("Any", construct_type(type_=ResponseStreamEvent, value=one)))
    return state._completed_response


def assert_consistent(stream: bytes) -> None:
    """Numbers go up by one, and an item has one id and one index from its beginning to its end."""
    events = told(stream)
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    added = {one["output_index"]: one["item"] for one in events if one["type"] == "response.output_item.added"}
    done = {one["output_index"]: one["item"] for one in events if one["type"] == "response.output_item.done"}
    assert list(added) == list(range(len(added)))
    assert {index: one.get("id") for index, one in added.items()} == {i: one.get("id") for i, one in done.items()}
    for one in events:
        if "item_id" in one:
            assert one["item_id"] == added[one["output_index"]]["id"]
    assert events[-1]["response"]["output"] == [done[index] for index in sorted(done)]


def text_of(events: Iterable[Event]) -> str:
    return "".join([event.text for event in events if isinstance(event, TextDelta)])


# --- in: recordings ---------------------------------------------------------------------------------------------------


def test_text() -> None:
    """Deltas are told once, whatever else repeats them; what is not text is passed over."""
    assert [
        Start("resp_68f1c0a2b7d481a0", "gpt-6-luna-2026-09-14"),
        TextDelta(0, "The build"),
        TextDelta(0, ' is green: "ok" 🟢\n'),
        TextDelta(0, "Naïve — done."),
        Finish("stop"),
        UsageReport(Usage(1234, 1024, 17, 0)),
        End(),
    ] == recorded("openai_text")


def test_thinking_and_calls() -> None:
    """The parts of a summary are one thought, sealed at its end; a call goes by its call id."""
    start, *events = recorded("openai_reasoning_tools")

    assert [
        ReasoningDelta(0, "**Looking at the tree**\n\nI should list.\n\n**Reading**\n\nThen read both."),
        ReasoningDelta(0, "", "gAAAAABo8dLhW3nq1bQxkY0zv5m"),
        ToolStart(0, "call_h2kQ9", "terminal"),
        ToolDelta(0, '{"command":"ls -la"}'),
        ToolStart(1, "call_Zp0aX", "read_file"),
        ToolDelta(1, '{"path":"README.md"}'),
        Finish("tool_calls"),
        UsageReport(Usage(2520, 2048, 96, 41)),
        End(),
    ] == [*merged(events[:4]), *merged(events[4:])]
    assert isinstance(start, Start)


def test_server_tools_are_no_calls() -> None:
    """What a server runs itself is passed over; the texts around it are two."""
    events = recorded("server_tool")

    assert [TextDelta(0, "It is "), TextDelta(0, "sunny."), TextDelta(1, "Take a hat.")] == events[1:4]
    assert events[4] == Finish("stop")


def test_bill() -> None:
    """OpenRouter: comments say nothing, thinking comes in full, and the bill is read."""
    assert [
        ReasoningDelta(0, "The user"),
        ReasoningDelta(0, " greets."),
        TextDelta(0, "Hello"),
        TextDelta(0, " there."),
        Finish("stop"),
        UsageReport(Usage(311, 256, 24, 11, 0.00015622)),
        End(),
    ] == recorded("openrouter_comments")[1:]


def test_another_id_at_every_event() -> None:
    """The place of an item tells which one it is where its id does not, and nothing is said twice."""
    assert [
        TextDelta(0, "Listing"),
        TextDelta(0, " it."),
        ToolStart(0, "call_1", "terminal"),
        ToolDelta(0, '{"command":"ls"}'),
    ] == recorded("local_crlf")[1:5]


def test_only_the_last_response() -> None:
    """A server that streams nothing but the end has said everything; a call without arguments has an empty object."""
    assert [
        ReasoningDelta(0, "Short."),
        TextDelta(0, "All at once."),
        ToolStart(0, "call_9", "now"),
        ToolDelta(0, "{}"),
        Finish("tool_calls"),
    ] == recorded("only_the_last_response")[1:6]


def test_incomplete() -> None:
    """An answer that the limit cut off says so."""
    assert Finish("length") in recorded("incomplete")


def test_what_clients_run_is_a_call() -> None:
    """A call of another kind than functions is held and believed like one; its arguments are all of it."""
    start, call, whole, finish = recorded("custom_tool")[:4]

    assert isinstance(start, Start)
    assert call == ToolStart(0, "call_patch1", "apply_patch", '{"type":"custom_tool_call"}')
    assert isinstance(whole, ToolDelta)
    assert json.loads(whole.arguments)["input"] == "*** Begin Patch\n*** End Patch"
    assert finish == Finish("tool_calls")


# --- in: repetitions --------------------------------------------------------------------------------------------------

DONE_TEXT = part("response.output_text.done", text="Hello")
DONE_PART = part("response.content_part.done", part={"type": "output_text", "text": "Hello", "annotations": []})
WHOLE = {"type": "message", "id": "message_0", "content": [{"type": "output_text", "text": "Hello"}]}
REPETITIONS = [DONE_TEXT, DONE_PART, message(text="Hello"), life("completed", output=[WHOLE])]


@pytest.mark.parametrize("deltas", [[], ["Hel"], ["Hel", "lo"]])
@pytest.mark.parametrize("repeated", [set(one) for n in range(1, 5) for one in itertools.combinations(range(4), n)])
def test_text_is_told_once(deltas: list[str], repeated: set[int]) -> None:
    """However often and however late a text is repeated, and whatever is missing of its deltas."""
    repetitions = [REPETITIONS[place] for place in sorted(repeated)]
    end = [] if 3 in repeated else [LAST]

    assert text_of(read(message(), *map(delta, deltas), *repetitions, *end)) == "Hello"


def test_every_event_twice() -> None:
    """Nothing is said twice, least of all behind the end of its item."""
    whole = part("response.content_part.done", part={"type": "output_text", "text": "Hello"})
    ends = [DONE_TEXT, whole, part("response.content_part.done"), message(text="Hello")]

    assert [TextDelta(0, "Hello")] == read(START, message(), message(), *ends, *ends, LAST, LAST)


def test_another_text_at_the_end() -> None:
    """What was said stands; a repetition that does not begin with it adds nothing."""
    assert text_of(read(message(), delta("Hello "), message(text="Hello"), LAST)) == "Hello "
    assert text_of(read(message(), delta("Hello"), message(text="Good day to you"), LAST)) == "Hello"


@pytest.mark.parametrize("deltas", [[], ['{"a"'], ['{"a"', ":1}"]])
@pytest.mark.parametrize("ends", [(True, True), (True, False), (False, True)])
def test_arguments_are_told_once(deltas: list[str], ends: tuple[bool, bool]) -> None:
    """The same for the arguments of a call."""
    kind = "response.function_call_arguments.done"
    done = event(kind, item_id="function_call_0", output_index=0, arguments='{"a":1}')
    repetitions = [one for one, wanted in zip((done, call('{"a":1}')), ends, strict=True) if wanted]

    assert [ToolStart(0, "call_0", "shell"), ToolDelta(0, '{"a":1}')] == merged(
        read(call(), *map(arguments, deltas), *repetitions, LAST)
    )


def test_thinking_is_told_once() -> None:
    """The same for the parts of a summary."""
    parts = [{"type": "summary_text", "text": text} for text in ("One.", "Two.")]
    stream = [
        summary("text.delta", delta="On"),
        summary("text.done", text="One."),
        summary("part.done", part=parts[0]),
        item("reasoning", done=True, summary=parts),
    ]

    assert [ReasoningDelta(0, "One.\n\nTwo.")] == merged(read(item("reasoning", summary=[]), *stream, LAST))


def test_thinking_in_both_forms() -> None:
    """Thinking that comes in full and as a summary is told in the form that came first."""
    full = event("response.reasoning_text.delta", item_id="reasoning_0", output_index=0, content_index=0, delta="All.")
    both: dict[str, Any] = {
        "summary": [{"type": "summary_text", "text": "S."}],
        "content": [{"type": "reasoning_text", "text": "All."}],
    }
    begun = item("reasoning", summary=[])

    assert [ReasoningDelta(0, "All.")] == read(begun, full, summary("text.delta", delta="S."), LAST)
    assert [ReasoningDelta(0, "S.")] == read(
        begun, summary("text.delta", delta="S."), full, item("reasoning", done=True, **both), LAST
    )
    assert [ReasoningDelta(0, "All.")] == read(item("reasoning", done=True, **both), LAST)


def test_sealed_thinking() -> None:
    """A thought without words is all seal; the seal as it was at the beginning is not believed."""
    begun = item("reasoning", summary=[], encrypted_content="half")

    assert [ReasoningDelta(0, "", sealed="whole")] == read(
        begun, item("reasoning", done=True, summary=[], encrypted_content="whole"), LAST
    )


def test_alternating_calls() -> None:
    """The pieces of two calls find their own."""
    pieces = [arguments("{", 0), arguments("{", 1), arguments("}", 0), arguments("}", 1)]
    events = read(call(index=0), call(index=1), *pieces, call("{}", 0), call("{}", 1), LAST)

    assert [(event.index, event.arguments) for event in events if isinstance(event, ToolDelta)] == [
        (0, "{"),
        (1, "{"),
        (0, "}"),
        (1, "}"),
    ]


def test_one_index_for_all_items() -> None:
    """A server that counts nothing: each item begins another."""
    events = read(message(), delta("Hi"), message(text="Hi"), call(), call("{}"), message(), delta("Ho"), LAST)

    assert [TextDelta(0, "Hi"), ToolStart(0, "call_0", "shell"), ToolDelta(0, "{}"), TextDelta(1, "Ho")] == events


def test_refusal() -> None:
    """A refusal is what the model says."""
    refusals = [part("response.refusal.delta", delta="I "), part("response.refusal.done", refusal="I will not.")]

    assert text_of(read(message(), *refusals, LAST)) == "I will not."


def test_empty_answer_of_an_unknown_kind() -> None:
    """An item nobody knew of when this was written is not known to be nothing; a search is."""
    assert [TextDelta(0, "")] == read(item("hologram", done=True, status=7, content="light"), LAST)
    assert read(item("web_search_call", done=True, status="completed", content={}), LAST) == []


def test_unknown_events() -> None:
    """Events of new kinds pass as bytes, whatever their fields are."""
    strange = event("response.hologram.delta", delta={"x": 1}, output_index="a") + event("keepalive", sequence_number=3)
    frames = feed(DIALECT, START + strange + delta("Hi"))

    assert strange == raw_of(frames[1:3])
    assert [frame.events for frame in frames[1:3]] == [(), ()]


def test_text_of_no_item() -> None:
    """Text is text, whoever forgot to begin its item, or even the response."""
    assert [Start("", ""), TextDelta(0, "Hi")] == events_of(feed(DIALECT, delta("Hi")))


_odd_values: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, -1, 10**20, 1.5, True, "", "x", "reasoning", [], [None], [{}], {}, {"a": 1}]
)


@every_recording
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_odd_fields(path: Path, data: st.DataObject) -> None:
    """A field of a wrong type or none raises a protocol error or nothing; what passed can be followed all the same."""
    events = told(path.read_bytes())
    place: Any = data.draw(st.sampled_from(events))
    key: Any = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(_odd_values)
    stream = [b"data: " + json.dumps(one).encode() + b"\n\n" for one in events]

    try:
        frames = decode(DIALECT, *stream)
    except UpstreamProtocolError:
        return
    encoder = DIALECT.encoder(STAMP)
    encoder.follow(frames[: data.draw(st.integers(0, len(frames)))])
    assert encoder.keepalive()
    assert told(encoder.error(FAILURE))


# --- in: endings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("max_output_tokens", "length"),
        ("content_filter", "content_filter"),
        ("max_tool_calls", "stop"),
        ("something_new", "length"),
        (None, "length"),
    ],
)
def test_incomplete_reasons(reason: str | None, finish: Any) -> None:
    """Why an answer is incomplete."""
    last = life("incomplete", incomplete_details=reason and {"reason": reason})

    assert Finish(finish) in events_of(decode(DIALECT, START, delta("Hi"), last))


def test_status_before_name() -> None:
    """A response that is incomplete is so, whatever its event is called; one that says nothing is what it is called."""
    cut = {"incomplete_details": {"reason": "max_output_tokens"}}

    assert Finish("length") in events_of(decode(DIALECT, START, life("incomplete", "completed", **cut)))
    assert Finish("stop") in events_of(decode(DIALECT, START, life("completed", "done")))
    assert Finish("stop") in events_of(decode(DIALECT, START, event("response.completed")))
    with pytest.raises(UpstreamTruncated):
        decode(DIALECT, START, life("failed", "completed"))


def test_calls_and_length() -> None:
    """Calls before the limit do not hide that it was reached."""
    last = life("incomplete", incomplete_details={"reason": "max_output_tokens"})

    assert Finish("length") in events_of(decode(DIALECT, START, call(), call("{}"), last))


def test_completed_with_half_a_call() -> None:
    """A server that ends before a call does has not ended, even if what came looks whole."""
    with pytest.raises(UpstreamProtocolError):
        decode(DIALECT, START, call(), arguments('{"a":1}'), LAST)


@pytest.mark.parametrize("came", ["", '{"a"', '{"a":1}'])
@pytest.mark.parametrize("ended", [True, False])
def test_call_cut_off_by_the_limit(came: str, *, ended: bool) -> None:
    """What came of it never passes for its arguments, least of all nothing for none."""
    end = [call(came, status="incomplete")] if ended else []
    last = life("incomplete", incomplete_details={"reason": "max_output_tokens"})
    events = read(call(), *[arguments(came)] * bool(came), *end, last)

    with pytest.raises(ValueError, match="line 1"):
        json.loads("".join([event.arguments for event in events if isinstance(event, ToolDelta)]))


@pytest.mark.parametrize(
    ("code", "status"),
    [("server_error", 500), ("rate_limit_exceeded", 429), ("invalid_prompt", 400), ("vector_store_timeout", None)],
)
def test_failed(code: str, status: int | None) -> None:
    """A failed response is a fault, with what was used until then before it."""
    last = life("failed", error={"code": code, "message": "No."}, usage={"input_tokens": 3, "output_tokens": 1})

    assert [UsageReport(Usage(3, 0, 1)), Fault(status, code, "No.")] == events_of(feed(DIALECT, START, last))[1:]


def test_failed_without_a_reason() -> None:
    """It has failed all the same."""
    assert Fault(None, "cancelled", "") == events_of(feed(DIALECT, START, life("cancelled", error=None)))[-1]


@pytest.mark.parametrize(
    "fields",
    [
        {"code": "rate_limit_exceeded", "message": "Slow down", "param": None, "sequence_number": 3},
        {"error": {"code": "rate_limit_exceeded", "message": "Slow down", "type": "tokens"}, "sequence_number": 3},
    ],
)
def test_error_event(fields: dict[str, Any]) -> None:
    """With its fields at the top, as documented, or in an object of their own, as sent."""
    assert [Fault(429, "rate_limit_exceeded", "Slow down")] == events_of(feed(DIALECT, event("error", **fields)))


def test_nothing_after_the_last_response() -> None:
    """What a server still sends is passed over."""
    assert End() == events_of(decode(DIALECT, START, delta("Hi"), LAST, delta("Ho"), LAST))[-1]


def test_nameless_call() -> None:
    """Nobody can act on it."""
    with pytest.raises(UpstreamProtocolError):
        feed(DIALECT, START + call(name=None))


def test_arguments_of_no_call() -> None:
    """A call nobody began cannot be put together."""
    kind = "response.function_call_arguments.done"
    for piece in (arguments("{"), event(kind, item_id="a", output_index=0, arguments="{}")):
        with pytest.raises(UpstreamProtocolError):
            feed(DIALECT, START + piece)


@pytest.mark.parametrize(("given", "told"), [(None, "{}"), ({"a": 1}, '{"a":1}'), (" ", "{}"), ("[1]", "[1]")])
def test_arguments_that_are_no_text(given: Any, told: str) -> None:
    """An object is as good as its text, and nothing at all is an empty object."""
    done = item("function_call", done=True, call_id="a", name="shell", arguments=given)

    assert [ToolStart(0, "a", "shell"), ToolDelta(0, told)] == read(done, LAST)


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (b'event: error\ndata: "out of order"\n\n', Fault(None, "", "out of order")),
        (event("error", text=5, code="server_error", message="No."), Fault(500, "server_error", "No.")),
        (b'data: {"error": {"message": "No.", "code": 503}}\n\n', Fault(503, "503", "No.")),
    ],
)
def test_odd_errors(stream: bytes, fault: Fault) -> None:
    """An error is one in whatever form it comes."""
    assert [fault] == events_of(feed(DIALECT, stream))


def test_states() -> None:
    """A decoder shows how far it is."""
    decoder = DIALECT.decoder()
    shown = [repr(decoder)] + [repr(decoder) for data in (START, LAST) if decoder.feed(data)]

    assert shown == [f"<ResponsesDecoder {state}>" for state in ("NEW", "STARTED", "FINISHED")]


# --- out --------------------------------------------------------------------------------------------------------------

ALL_KINDS: list[Event] = [
    Start("a", "m"),
    ReasoningDelta(0, "Hm."),
    ReasoningDelta(0, "", "seal"),
    ReasoningDelta(1, "", sealed="secret"),
    TextDelta(0, "Hi"),
    TextDelta(0, " there"),
    TextDelta(1, "Two"),
    ToolStart(0, "x", "shell"),
    ToolStart(1, "y", "shell"),
    ToolDelta(0, '{"a"'),
    ToolDelta(1, "{}"),
    ToolDelta(0, ":1}"),
    Finish("tool_calls"),
    UsageReport(Usage(30, 20, 10, 5, 0.25)),
    End(),
]


@settings(deadline=None)  # the vendor's client takes its time at first
@given(events=answers())
def test_streams_are_valid(events: list[Event]) -> None:
    """Every event is as the vendor's own client wants it, and that client puts the same answer together."""
    stream = encode(DIALECT, events)

    assert_valid(stream)
    assert_consistent(stream)
    final = accumulated(stream)
    if final is not None:
        assert final.output_text == text_of(events)


def test_every_kind_of_item() -> None:
    """One text or thought is open at a time; calls are open until the finish, since their pieces may alternate."""
    stream = encode(DIALECT, ALL_KINDS)

    assert_valid(stream)
    assert_consistent(stream)
    assert kinds(stream) == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        *["output_item.added", "output_item.done"],
        *["output_item.added", "content_part.added", "output_text.delta", "output_text.delta"],
        *["output_text.done", "content_part.done", "output_item.done"],
        *["output_item.added", "content_part.added", "output_text.delta"],
        *["output_text.done", "content_part.done", "output_item.done"],
        *["output_item.added", "output_item.added"],
        *["function_call_arguments.delta"] * 3,
        *["function_call_arguments.done", "output_item.done"] * 2,
        "completed",
    ]


def test_last_response() -> None:
    """It repeats all items, and says what was used."""
    last = told(encode(DIALECT, ALL_KINDS))[-1]["response"]

    assert last["id"] == "resp_answer-1"
    assert [one["id"] for one in last["output"]] == [
        *[f"rs_answer-1_{index}" for index in (0, 1)],
        *[f"msg_answer-1_{index}" for index in (2, 3)],
        *[f"fc_answer-1_{index}" for index in (4, 5)],
    ]
    assert [one.get("encrypted_content") for one in last["output"]][:2] == ["seal", "secret"]
    assert [one["arguments"] for one in last["output"][4:]] == ['{"a":1}', "{}"]
    assert last["usage"]["cost"] == 0.25
    assert last["usage"]["input_tokens_details"] == {"cached_tokens": 20, "cache_write_tokens": 0}


@pytest.mark.parametrize(
    ("finish", "kind", "reason", "status"),
    [
        ("stop", "completed", None, "completed"),
        ("tool_calls", "completed", None, "completed"),
        ("length", "incomplete", "max_output_tokens", "incomplete"),
        ("content_filter", "incomplete", "content_filter", "completed"),
    ],
)
def test_endings(finish: Any, kind: str, reason: str | None, status: str) -> None:
    """What the limit cut off is not completed; only what the limit cut off has an incomplete item."""
    stream = encode(DIALECT, [Start("a", "m"), TextDelta(0, "Hi"), Finish(finish), End()])
    last = told(stream)[-1]

    assert_valid(stream)
    assert last["type"] == f"response.{kind}"
    assert last["response"]["status"] == kind
    assert (last["response"]["incomplete_details"] or {}).get("reason") == reason
    assert last["response"]["output"][0]["status"] == status


def test_no_end_without_a_finish() -> None:
    """Half an answer never ends cleanly."""
    assert "completed" not in kinds(encode(DIALECT, [Start("a", "m"), TextDelta(0, "Hi"), End()]))


def test_what_is_not_told() -> None:
    """An upstream's fault is evidence, not for a client, and a piece of a call that was not begun here is dropped."""
    assert encode(DIALECT, [Fault(500, "server_error", "No."), ToolDelta(3, "{}")]) == b""


def test_picture_behind_a_keepalive() -> None:
    """A picture is there also where the response had to be begun before the upstream's."""
    picture: dict[str, Any] = {"status": "completed", "result": "iVBORw0KGgo="}
    stream = [item("image_generation_call", 0, "ig_1", status="in_progress", result=None)]
    stream.append(item("image_generation_call", 0, "ig_1", done=True, **picture))
    encoder = DIALECT.encoder(STAMP)
    written = encoder.keepalive() + b"".join(map(encoder.encode, events_of(decode(DIALECT, START, *stream, LAST))))

    assert_valid(written)
    assert accumulated(written).output[0].result == "iVBORw0KGgo="


def test_custom_call_keeps_its_form() -> None:
    """A call of another kind leaves as it came, also when it is written anew."""
    stream = encode(DIALECT, recorded("custom_tool"))

    assert_valid(stream)
    assert kinds(stream) == ["created", "in_progress", "output_item.added", "output_item.done", "completed"]
    assert accumulated(stream).output[0].input == "*** Begin Patch\n*** End Patch"


def test_what_is_repeated_of_the_request() -> None:
    """A response says how it was asked for, but for what is long; nulls and what is unreadable are left out."""
    asked = {"metadata": {"a": "b"}, "temperature": 0.5, "parallel_tool_calls": None, "tools": [{}], "input": "Hi"}
    whole = json.loads(DIALECT.encode_body(ALL_KINDS, Stamp("a", "m", 1, asked=json.dumps(asked).encode())))
    bytes_of_no_text = b'{"metadata":{"a":"\xff"}}'
    broken = json.loads(DIALECT.encode_body(ALL_KINDS, Stamp("a", "m", 1, asked=bytes_of_no_text)))

    Response.model_validate(whole, strict=True)
    Response.model_validate(broken, strict=True)
    assert (whole["metadata"], whole["temperature"]) == ({"a": "b"}, 0.5)
    assert (whole["parallel_tool_calls"], whole["tools"], "input" in whole) == (True, [], False)


@pytest.mark.parametrize(
    ("identity", "expected"),
    [("resp_1", "resp_1"), ("chatcmpl-rd12", "resp_rd12"), ("msg_9", "resp_msg_9"), ("gen-1", "resp_gen-1")],
)
def test_response_ids(identity: str, expected: str) -> None:
    """The id of a response looks like one, whatever its answer was called elsewhere."""
    assert response_id(identity) == expected


def test_error() -> None:
    """The vendor's client finds it where it looks, and others where the documentation has it."""
    stream = DIALECT.encoder(STAMP).error(FAILURE)
    (error,) = told(stream)

    assert_valid(stream)
    assert (error["type"], error["message"], error["error"]["message"]) == ("error", "nobody answers", "nobody answers")
    assert error["code"] == error["error"]["code"]


def test_error_body() -> None:
    """As in OpenAI's other API."""
    assert json.loads(DIALECT.encode_error(FAILURE)) == {
        "error": {"message": "nobody answers", "type": "server_error", "param": None, "code": "overloaded"}
    }


def test_count() -> None:
    """The answer to how many tokens a request has."""
    counted = json.loads(DIALECT.encode_count(Head("m", False, False, False, False, None, 17, 0)))

    assert InputTokenCountResponse.model_validate(counted, strict=True).input_tokens == 17
    assert DIALECT.count_paths == ("/v1/responses/input_tokens",)


# --- whole answers ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(events=answers())
def test_bodies_are_valid(events: list[Event]) -> None:
    """A whole answer is a response to the letter."""
    Response.model_validate(json.loads(DIALECT.encode_body(events, STAMP)), strict=True)


def test_body_with_every_kind_of_item() -> None:
    """Thinking keeps its seals both ways, and alternating calls come in order."""
    body = DIALECT.encode_body(ALL_KINDS, STAMP)

    Response.model_validate(json.loads(body), strict=True)
    assert DIALECT.decode_body(body) == [
        Start(STAMP.id, STAMP.model),
        *ALL_KINDS[1:4],
        TextDelta(0, "Hi there"),
        TextDelta(1, "Two"),
        ToolStart(0, "x", "shell"),
        ToolDelta(0, '{"a":1}'),
        ToolStart(1, "y", "shell"),
        ToolDelta(1, "{}"),
        *ALL_KINDS[-3:],
    ]


@pytest.mark.parametrize("status", ["in_progress", "queued", None])
def test_body_that_is_not_at_its_end(status: str | None) -> None:
    """Is half an answer."""
    with pytest.raises(UpstreamTruncated):
        DIALECT.decode_body(json.dumps({"object": "response", "status": status, "output": []}).encode())


def test_failed_body() -> None:
    """A response that failed inside a 200 is a lone fault."""
    body = {"object": "response", "status": "failed", "output": [], "error": {"code": "server_error", "message": "No."}}

    assert [Fault(500, "server_error", "No.")] == DIALECT.decode_body(json.dumps(body).encode())


def test_body_with_half_a_call() -> None:
    """A response that claims to be completed while a call is not is none."""
    half = {"type": "function_call", "call_id": "a", "name": "shell", "arguments": "{", "status": "incomplete"}
    body = {"object": "response", "status": "completed", "output": [half]}

    with pytest.raises(UpstreamProtocolError):
        DIALECT.decode_body(json.dumps(body).encode())


# --- keep-alives ------------------------------------------------------------------------------------------------------


def test_keepalive_before_content() -> None:
    """It begins the response, and from then on says again and again that it is in progress."""
    encoder = DIALECT.encoder(STAMP)
    first, second = encoder.keepalive(), encoder.keepalive()

    assert_valid(first + second)
    assert kinds(first) == ["created", "in_progress"]
    assert kinds(second) == ["in_progress"]
    assert [one["sequence_number"] for one in told(first + second)] == [0, 1, 2]
    assert encoder.opened


def test_content_after_a_keepalive() -> None:
    """The response goes on under its id; it began only once."""
    encoder = DIALECT.encoder(STAMP)
    pieces = [encoder.keepalive()]
    for one in ALL_KINDS:
        pieces += [encoder.encode(one), b"" if isinstance(one, End) else encoder.keepalive()]
    stream = b"".join(pieces)

    assert_valid(stream)
    assert kinds(stream).count("created") == 1
    assert {one["response"]["id"] for one in told(stream) if "response" in one} == {STAMP.id}
    assert accumulated(stream).output_text == "Hi thereTwo"


def test_keepalive_after_the_end() -> None:
    """No event fits there any more."""
    encoder = DIALECT.encoder(STAMP)
    for one in ALL_KINDS:
        encoder.encode(one)

    assert told(encoder.keepalive()) == []


# --- behind what was passed on ----------------------------------------------------------------------------------------


def cuts(path: Path) -> list[tuple[list[Frame], list[Frame]]]:
    """A recording, cut after each frame from the response's first on, but not within a call nor behind the end."""
    frames = decode(DIALECT, path.read_bytes())
    places = []
    for place in range(1, len(frames)):
        before, after = events_of(frames[:place]), events_of(frames[place:])
        within = any(isinstance(event, ToolStart) for event in before)
        if before and not within and any(isinstance(event, Finish) for event in after):
            places.append((frames[:place], frames[place:]))
    return places


@every_recording
def test_keepalive_behind_what_was_passed_on(path: Path) -> None:
    """It bears the response's id, and a number that neither goes back nor takes the upstream's next one."""
    for before, after in cuts(path):
        encoder = DIALECT.encoder(STAMP)
        encoder.follow(before)
        keepalive = encoder.keepalive()

        assert_valid(keepalive)
        assert not encoder.opened
        encoder.follow(after)
        stream = raw_of(before) + keepalive + raw_of(after)
        numbers = [one["sequence_number"] for one in told(stream) if "sequence_number" in one]
        assert sorted(numbers) == numbers
        assert path.stem in LOOSE or kinds(stream)[-1] == "incomplete" or accumulated(stream) is not None


@every_recording
def test_recovery_behind_what_was_passed_on(path: Path) -> None:
    """The rest of the answer, written anew, fits behind any part of it: the client has the answer as it was."""
    whole = decode(DIALECT, path.read_bytes())
    for before, after in cuts(path):
        encoder = DIALECT.encoder(STAMP)
        for frame in before:
            encoder.follow([frame])
        rest = [event for event in events_of(after) if not isinstance(event, Start)]
        written = encoder.keepalive() + b"".join(map(encoder.encode, [*rest, End()]))
        stream = raw_of(before) + written

        assert_valid(written)
        assert kinds(written)[-1] in ("completed", "incomplete")
        final = None if path.stem in LOOSE else accumulated(stream)
        assert final is None or final.output_text == text_of(events_of(whole))
        crossed = events_of(decode(DIALECT, stream))
        assert text_of(crossed) == text_of(events_of(whole))
        calls = [event for event in events_of(whole) if isinstance(event, ToolStart)]
        assert calls == [event for event in crossed if isinstance(event, ToolStart)]
        numbers = [one["sequence_number"] for one in told(written)[1:]]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@every_recording
def test_items_behind_what_was_passed_on(path: Path) -> None:
    """What is done says all of its text, and the last response lists every item that was."""
    for before, _ in cuts(path):
        encoder = DIALECT.encoder(STAMP)
        encoder.follow(before)
        said = text_of(events_of(before))
        rest: list[Event] = [TextDelta(0, "More."), Finish("stop"), End()]
        stream = raw_of(before) + b"".join(map(encoder.encode, rest))
        last = told(stream)[-1]["response"]

        texts = [part["text"] for one in last["output"] if one["type"] == "message" for part in one["content"]]
        assert said + "More." == "".join(texts)
        assert told(stream)[0]["response"]["id"] == last["id"]
        indexes = {one["output_index"] for one in told(stream) if one["type"] == "response.output_item.added"}
        assert len(indexes) == len(last["output"])


def test_error_behind_what_was_passed_on() -> None:
    """It has the next number."""
    frames = decode(DIALECT, (RECORDINGS / "responses" / "openai_text.sse").read_bytes())
    encoder = DIALECT.encoder(STAMP)
    encoder.follow(frames[:6])

    assert [one["sequence_number"] for one in told(encoder.error(FAILURE))] == [6]


def test_half_a_call_never_ends_cleanly() -> None:
    """A call that was passed on without its end is neither done nor listed, and the vendor's client refuses that."""
    frames = feed(DIALECT, START + item("function_call", call_id="a", name="shell", arguments="") + arguments('{"a"'))
    encoder = DIALECT.encoder(STAMP)
    encoder.follow(frames)
    rest: list[Event] = [TextDelta(0, "Hi"), Finish("stop"), End()]
    stream = b"".join(map(encoder.encode, rest))

    assert [[one["type"] for one in event["response"]["output"]] for event in told(stream) if "response" in event] == [
        ["message"]
    ]
    whole = raw_of(frames) + stream
    assert not any(one.get("item", {}).get("type") == "function_call" for one in told(stream))
    with pytest.raises(RuntimeError):
        accumulated(whole)


def test_broken_bytes_can_be_followed() -> None:
    """What the decoder lets pass, however it is broken, does not keep anything from being written behind it."""
    broken = delta("x").replace(b'"x"', b'"\xff"')
    odd = item("message", 1).replace(b'"id": "message_1"', b'"id": 7')
    frames = feed(DIALECT, START + message() + delta("a") + broken)
    encoder = DIALECT.encoder(STAMP)
    encoder.follow([*frames, Frame(odd, ())])
    encoder.follow(frames[-2:])

    assert kinds(encoder.keepalive()) == ["in_progress"]
    assert kinds(encoder.encode(TextDelta(0, "b"))) == ["output_text.delta"]


def test_end_marker_behind_the_last_response() -> None:
    """It is not said again."""
    encoder = DIALECT.encoder(STAMP)
    encoder.follow(feed(DIALECT, START + delta("Hi") + LAST))

    assert encoder.encode(End()) == b""
    assert told(encoder.keepalive()) == []


def test_second_upstream_behind_a_thought() -> None:
    """A thought that broke off goes on with the new one, and is sealed with what that is sealed with."""
    begun = item("reasoning", summary=[]) + summary("part.added", part={"type": "summary_text", "text": ""})
    encoder = DIALECT.encoder(STAMP)
    encoder.follow(feed(DIALECT, START + begun + summary("text.delta", delta="Half")))
    rest: list[Event] = [ReasoningDelta(0, " whole"), ReasoningDelta(0, "", "seal"), TextDelta(0, "Hi"), Finish("stop")]
    stream = b"".join(map(encoder.encode, [*rest, End()]))
    thought = told(stream)[-1]["response"]["output"][0]

    assert thought["id"] == "reasoning_0"
    assert thought["summary"] == [{"type": "summary_text", "text": "Half whole"}]
    assert thought["encrypted_content"] == "seal"
