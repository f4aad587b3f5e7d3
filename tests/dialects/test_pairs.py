"""What survives the way from one dialect into another, over all ordered pairs that are registered."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given

from routerd.canonical import (
    End,
    Event,
    Failure,
    Fault,
    Finish,
    Image,
    Message,
    Outcome,
    Price,
    Reasoning,
    ReasoningDelta,
    Request,
    Side,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Upstream,
)
from routerd.dialects import DIALECTS, Dialect
from tests.dialects.streams import STAMP, answers, decode, encode, events_of, feed, merged, recordings

PAIRS = [
    pytest.param(DIALECTS[one], DIALECTS[other], id=f"{one}-{other}")
    for one, other in itertools.permutations(DIALECTS, 2)
]
RECORDED = [
    pytest.param(DIALECTS[one], DIALECTS[other], path, id=f"{one}-{other}/{path.stem}")
    for one, other in itertools.permutations(DIALECTS, 2)
    for path in recordings(DIALECTS[one])
]
every_pair = pytest.mark.parametrize(("one", "other"), PAIRS)

ARGUMENTS = '{"path": "/tmp/ä", "n": 1.50, "deep": {"list": [1, null, "\\u00e9"]}}'
SCHEMA = msgspec.Raw(b'{"type":"object","properties":{"path":{"type":"string"}},"required":["path"]}')
PICTURE = "data:image/png;base64,iVBORw0KGgo="
REQUEST = Request(
    model="auto",
    stream=True,
    messages=(
        Message("system", (Text("Be brief."),)),
        Message("user", (Text("What is this?"), Image(PICTURE))),
        Message(
            "assistant",
            (
                Reasoning("I should read both."),
                Text("Let me read."),
                ToolCall("call_1", "read", ARGUMENTS),
                ToolCall("call_2", "read", '{"path":"b"}'),
            ),
        ),
        Message("user", (ToolResult("call_1", (Text("one"),)), ToolResult("call_2", (Text("two"),)), Text("Go on."))),
    ),
    tools=(Tool("read", "Reads a file.", SCHEMA),),
    tool_choice=ToolChoice("auto"),
    max_output_tokens=1000,
    temperature=0.5,
    stop=("END",),
)
NO_STOPS = {"responses"}  # stop sequences have no place in its requests
UPSTREAM = Upstream("vendor", 0, "model", "wire-model", "", 100_000, 500, Price())


def said(events: list[Event]) -> list[Event]:
    """What the answer says; seals are their vendor's and cross nothing."""
    told = [
        ReasoningDelta(event.index, event.text) if isinstance(event, ReasoningDelta) else event
        for event in events
        if not isinstance(event, ReasoningDelta) or event.text
    ]
    return merged([event if not isinstance(event, Finish) else Finish(event.reason) for event in told])


# --- answers ----------------------------------------------------------------------------------------------------------


@every_pair
@given(events=answers())
def test_stream(one: Dialect, other: Dialect, events: list[Event]) -> None:
    """Text, thinking, calls with their argument bytes, finish and usage arrive as they left."""
    crossed = events_of(decode(other, encode(other, events_of(decode(one, encode(one, events))))))

    assert events == crossed


@every_pair
@given(events=answers())
def test_whole_answer(one: Dialect, other: Dialect, events: list[Event]) -> None:
    """The same for an answer that comes in one piece."""
    crossed = other.decode_body(other.encode_body(one.decode_body(one.encode_body(events, STAMP)), STAMP))

    assert merged(events) == crossed


@every_pair
@given(events=answers())
def test_stream_into_whole_answer(one: Dialect, other: Dialect, events: list[Event]) -> None:
    """An answer that was streamed in one dialect is handed over whole in another."""
    streamed = events_of(decode(one, encode(one, events)))

    assert merged(events) == other.decode_body(other.encode_body(streamed, STAMP))


@pytest.mark.parametrize(("one", "other", "path"), RECORDED)
def test_recording(one: Dialect, other: Dialect, path: Any) -> None:
    """What vendors really send says the same in another dialect."""
    events: list[Event] = [event for event in events_of(decode(one, path.read_bytes())) if type(event) is not End]
    crossed = events_of(decode(other, encode(other, [*events, End()])))

    kinds = {type(event) for event in events}
    assert [event for event in said(events)[1:] if isinstance(event, Finish)] == [
        event for event in crossed if isinstance(event, Finish)
    ]
    for kind in kinds:
        told = [_text(event) for event in said(events) if type(event) is kind]
        assert "".join(told) == "".join(_text(event) for event in said(crossed) if type(event) is kind)


def _text(event: Event) -> str:
    """Of a piece of an answer: what it adds, wherever it was cut."""
    return str(getattr(event, "text", None) or getattr(event, "arguments", None) or getattr(event, "name", None) or "")


@every_pair
def test_error(one: Dialect, other: Dialect) -> None:
    """An error is an error in every dialect, in the same words, and never a whole answer."""
    failure = Failure(Outcome.UNAVAILABLE, Side.ROUTER, "no provider is answering", status=503)
    (fault,) = events_of(feed(one, one.encoder(STAMP).error(failure)))
    again = Failure(Outcome.UNAVAILABLE, Side.ROUTER, fault.message if isinstance(fault, Fault) else "", status=503)

    (crossed,) = events_of(feed(other, other.encoder(STAMP).error(again)))
    assert isinstance(crossed, Fault)
    assert crossed.message == failure.detail


# --- requests ---------------------------------------------------------------------------------------------------------


@every_pair
def test_request(one: Dialect, other: Dialect) -> None:
    """A conversation with pictures, thinking, parallel calls and their results is the same one afterwards."""
    crossed = other.decode_request(other.encode_request(one.decode_request(one.encode_request(REQUEST))))

    stop = () if {one.name, other.name} & NO_STOPS else REQUEST.stop
    assert crossed == msgspec.structs.replace(REQUEST, stop=stop)


@every_pair
def test_schema(one: Dialect, other: Dialect) -> None:
    """The tools mean the same: their schemas are found by the same names."""
    crossed = other.encode_request(one.decode_request(one.encode_request(REQUEST)))

    assert other.tool_schemas(crossed) == {"read": json.loads(bytes(SCHEMA))}


@every_pair
@pytest.mark.parametrize(
    "choice", [None, ToolChoice("auto"), ToolChoice("none"), ToolChoice("required"), ToolChoice("named", "read")]
)
def test_tool_choice(one: Dialect, other: Dialect, choice: ToolChoice | None) -> None:
    """Whether and which tool is to be called."""
    asked = msgspec.structs.replace(REQUEST, tool_choice=choice)

    assert (
        other.decode_request(other.encode_request(one.decode_request(one.encode_request(asked)))).tool_choice == choice
    )


@every_pair
@pytest.mark.parametrize("alone", [None, False])
def test_one_call_at_a_time(one: Dialect, other: Dialect, *, alone: bool | None) -> None:
    """That calls are to be made one by one."""
    asked = msgspec.structs.replace(REQUEST, parallel_tool_calls=alone)
    crossed = other.decode_request(other.encode_request(one.decode_request(one.encode_request(asked))))

    assert crossed.parallel_tool_calls == alone


@every_pair
@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_effort(one: Dialect, other: Dialect, effort: str) -> None:
    """How hard to think."""
    asked = msgspec.structs.replace(REQUEST, reasoning_effort=effort, temperature=None)
    crossed = other.decode_request(other.encode_request(one.decode_request(one.encode_request(asked))))

    assert crossed.reasoning_effort == effort


@every_pair
def test_fitted_to_an_upstream(one: Dialect, other: Dialect) -> None:
    """What was written anew is a request that routing reads and an upstream's limits are put into."""
    body = other.encode_request(one.decode_request(one.encode_request(REQUEST)))
    head = other.read_head(body)
    patched = other.read_head(other.patch_request(body, head, UPSTREAM))

    assert (head.model, head.stream, head.tools, head.images) == ("auto", True, True, True)
    assert (patched.model, patched.max_output_tokens) == ("wire-model", 500)


@every_pair
def test_taken_up_again(one: Dialect, other: Dialect) -> None:
    """A request written anew can be taken up where an answer broke off."""
    body = other.encode_request(one.decode_request(one.encode_request(REQUEST)))
    taken_up = other.decode_request(other.continue_request(body, "Half of a sen", "instructed"))

    assert [turn.role for turn in taken_up.messages][-2:] == ["assistant", "user"]
    assert taken_up.messages[-2].blocks == (Text("Half of a sen"),)
