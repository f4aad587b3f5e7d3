"""The laws that a drill holds answers against: each wrong is found in an answer that has it, and in no other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import End, Event, Finish, Start, TextDelta, ToolDelta, ToolStart, UsageReport
from routerd.canonical import Usage as Tokens
from routerd.dialects import DIALECTS, Stamp
from routerd.proxy.laws import (
    JUMP,
    Books,
    Called,
    Heard,
    Saying,
    Verdict,
    duplicated_bytes,
    judge,
    read,
    unsettled,
)

TEXT = "I look at the weather: café, 雨の日 and 🙂 in Oslo."
OTHER_TEXT = "Here is another wording of the very same thing."
CALLS = (Called("weather", '{"city": "Oslo"}'), Called("weather", '{"city": "Bergen"}'))
SAID = Saying(TEXT, CALLS, "tool_calls")
OTHER = Saying(OTHER_TEXT, CALLS, "tool_calls")
CHAT = DIALECTS["chat"]
DONE = b"data: [DONE]\n\n"
WHOLE = Verdict(delivered=True)
LOST = Verdict()


def delta(finish: str | None = None, **said: Any) -> bytes:
    choice = {"index": 0, "delta": said, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def call(index: int, arguments: str, id_: str = "") -> bytes:
    function = {"name": "weather", "arguments": arguments} if id_ else {"arguments": arguments}
    return delta(tool_calls=[{"index": index, "function": function} | ({"id": id_} if id_ else {})])


FIRST = [call(0, CALLS[0].arguments[:7], "call_1"), call(0, CALLS[0].arguments[7:])]
SECOND = [call(1, "", "call_2"), call(1, CALLS[1].arguments)]
SPOKEN = [delta(role="assistant"), delta(content=TEXT[:20]), delta(content=TEXT[20:])]
FINISH = delta("tool_calls")
ERROR = b'data: {"error": {"message": "It failed."}}\n\n'
STREAM = [*SPOKEN, *FIRST, *SECOND, FINISH, DONE]


def verdict(events: Sequence[bytes], *, ended: bool = True, status: int = 200) -> Verdict:
    heard = Heard(status, b"".join(events), ended)
    return judge(heard, read(heard, CHAT, stream=True), [SAID, OTHER])


def body_verdict(message: dict[str, Any], finish: str = "tool_calls") -> Verdict:
    data = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}]}).encode()
    heard = Heard(200, data, ended=True)
    return judge(heard, read(heard, CHAT, stream=False), [SAID, OTHER])


def wire_calls(calls: Sequence[Called] = CALLS) -> list[dict[str, Any]]:
    return [{"id": f"call_{at}", "function": one._asdict()} for at, one in enumerate(calls)]


class TestDelivered:
    def test_a_whole_stream(self) -> None:
        """Text, calls, finish and end, just as they were said; comments and keep-alives are nothing."""
        assert verdict(STREAM) == WHOLE
        assert verdict([b": ping\n\n", *SPOKEN, delta(), *FIRST, *SECOND, FINISH, DONE]) == WHOLE

    def test_a_whole_body(self) -> None:
        """Its end is that it is whole JSON."""
        assert body_verdict({"content": TEXT, "tool_calls": wire_calls()}) == WHOLE

    def test_either_wording(self) -> None:
        """Whoever said it."""
        assert verdict([delta(content=OTHER_TEXT), *STREAM[3:]]) == WHOLE

    @pytest.mark.parametrize("dialect", sorted(DIALECTS))
    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "body"])
    def test_in_every_dialect(self, dialect: str, stream: bool) -> None:
        """As its encoder writes it."""
        events: list[Event] = [Start("id", "model"), TextDelta(0, TEXT)]
        for index, one in enumerate(CALLS):
            events += [ToolStart(index, f"call_{index}", one.name), ToolDelta(index, one.arguments)]
        events += [Finish("tool_calls"), UsageReport(Tokens(1, 0, 1)), End()]
        stamp, spoken = Stamp("id", "model", 0), DIALECTS[dialect]
        encoder = spoken.encoder(stamp)
        said = b"".join(map(encoder.encode, events)) if stream else spoken.encode_body(events, stamp)
        heard = Heard(200, said, ended=True)

        assert judge(heard, read(heard, spoken, stream=stream), [OTHER, SAID]) == WHOLE

        cut = Heard(200, said[: len(said) // 2], ended=False)
        assert not judge(cut, read(cut, spoken, stream=stream), [OTHER, SAID]).delivered


class TestLost:
    """The turn is lost, and the client knows."""

    def test_a_refusal(self) -> None:
        """Any other status."""
        assert verdict([b'{"error": {}}'], status=503) == LOST
        assert verdict([], status=0, ended=False) == LOST

    @pytest.mark.parametrize("count", range(len(STREAM) - 2))
    def test_a_torn_connection(self, count: int) -> None:
        """Wherever it tears between whole calls; a call that has begun is known to be half."""
        found = verdict(STREAM[:count], ended=False)

        assert not found.delivered
        assert found.honest == (count not in (4, 6))

    def test_an_error_in_the_stream(self) -> None:
        """In place of the rest, and nothing after it."""
        assert verdict([*SPOKEN, ERROR]) == LOST

    def test_an_answer_cut_by_its_length(self) -> None:
        """Which it says."""
        assert verdict([*SPOKEN[:2], delta("length"), DONE]) == LOST
        assert verdict([*SPOKEN, *FIRST[:1], delta("length"), DONE]) == Verdict(calls_half=1)


class TestWrong:
    """What must never be heard."""

    def test_text_said_twice(self) -> None:
        """Counted in bytes."""
        again = TEXT[5:20]
        found = verdict([*SPOKEN[:2], delta(content=again), *STREAM[2:]])

        assert found.duplicated_bytes == len(again.encode())
        assert found.corrupted

    def test_an_invented_end(self) -> None:
        """A terminal marker behind half an answer."""
        assert verdict([*SPOKEN[:2], DONE]) == Verdict(calls_lost=2, invented_end=True)
        assert verdict([*SPOKEN[:2], delta("stop"), DONE]).invented_end
        assert verdict(SPOKEN[:2]).invented_end  # HTTP's own end is one as well
        assert verdict([]).invented_end

    def test_an_end_behind_an_error(self) -> None:
        """The error would be forgotten."""
        assert verdict([*SPOKEN, ERROR, DONE]) == Verdict(invented_end=True)

    def test_a_lost_call(self) -> None:
        """One of two, and the answer says that it is whole."""
        assert verdict([*SPOKEN, *FIRST, FINISH, DONE]).calls_lost == 1
        assert body_verdict({"content": TEXT}, "stop").calls_lost == 2

    def test_a_doubled_call(self) -> None:
        """An agent would do it twice."""
        again = [call(2, CALLS[0].arguments, "call_3")]
        found = verdict([*SPOKEN, *FIRST, *SECOND, *again, FINISH, DONE])

        assert (found.calls_doubled, found.corrupted) == (1, True)
        assert verdict([*SPOKEN, *FIRST, call(0, CALLS[0].arguments, "call_9"), ERROR]).calls_doubled == 1

    @pytest.mark.parametrize("arguments", ['{"city": "Os', '{"city": "Oslo"}}', "[]", ""])
    def test_half_a_call(self, arguments: str) -> None:
        """Whatever else the answer says."""
        broken = call(0, arguments, "call_1")

        assert verdict([*SPOKEN, broken, FINISH, DONE]).calls_half == 1
        assert verdict([*SPOKEN, broken], ended=False).calls_half == 1

    @pytest.mark.parametrize(
        "events",
        [
            [delta(content="Something else."), *STREAM[3:]],
            [*SPOKEN, delta(content=OTHER_TEXT), *STREAM[3:]],
            [*SPOKEN, *SECOND, *FIRST, FINISH, DONE],
            [*SPOKEN[:2], b'data: {"choi\n\n', *STREAM[2:]],
            [*STREAM, delta(content="more")],
            [*STREAM[:-1], FINISH, DONE],
            [*STREAM, DONE],
            [*STREAM[:-2], delta("stop"), DONE],
            [*SPOKEN, *FIRST, call(1, CALLS[1].arguments, "call_1"), FINISH, DONE],
            [b"<!DOCTYPE html>\n\n", *SPOKEN[:0]],
        ],
        ids=["words", "both", "order", "event", "late", "finishes", "ends", "finish", "ids", "html"],
    )
    def test_what_nobody_said(self, events: Sequence[bytes]) -> None:
        """Another text, another order, something unreadable, something after the end."""
        found = verdict(events)

        assert not found.delivered
        assert not found.honest

    def test_a_body_that_is_none(self) -> None:
        """A page, or half of an answer."""
        for data in (b"<html>", b'{"choices": [{"message"', b"{}", b"[]"):
            heard = Heard(200, data, ended=True)
            assert not judge(heard, read(heard, CHAT, stream=False), [SAID]).honest


@given(st.integers(0, len(STREAM) - 1))
def test_no_part_of_an_answer_passes_for_a_whole_one(count: int) -> None:
    """Wherever it stops, an end behind it is found out."""
    found = verdict([*STREAM[:count], DONE])

    assert found.delivered == (count == len(STREAM) - 1)
    assert found.honest == found.delivered


@given(st.data())
def test_whatever_is_said_twice_is_counted(data: st.DataObject) -> None:
    """If it is long enough to be told from chance."""
    end = data.draw(st.integers(JUMP, len(TEXT)))
    start = data.draw(st.integers(0, end - JUMP))
    again = TEXT[start:end]

    assert duplicated_bytes(TEXT[:end] + again + TEXT[end:], TEXT) == len(again.encode())
    assert duplicated_bytes(TEXT[:end], TEXT) == 0


@pytest.mark.parametrize(
    ("books", "count"),
    [
        (Books({"a": 3, "b": 1}, {"a": 3, "b": 1}, {"a": 3, "b": 1}), 0),
        (Books({"a": 3}, {"a": 4}, {"a": 3}), 1),
        (Books({"a": 2}, {"a": 2}, {"a": 3, "b": 2}), 3),
        (Books({}, {}, {}), 0),
    ],
)
def test_the_books_are_compared(books: Books, count: int) -> None:
    """An attempt that one witness has and another one has not was settled twice, or never."""
    assert unsettled(books) == count
