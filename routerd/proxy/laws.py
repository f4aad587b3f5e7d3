"""The laws of an answer: what a client heard, held against what the model said.

Rules
-----
* Whoever judges shares nothing with whom he judges. Chat is read by a small reader of its own; other dialects, by their
  decoder, which does not take part when routerd serves them from a chat upstream.
* A turn is **delivered** if the answer is whole and is, to the last byte, what the model said: its text, its calls, its
  finish, one end.
* A turn that is not delivered is lost. That is bad; it is worse if the client cannot know. An answer is **believed** if
  nothing tells the client that it is not whole: no error, no torn connection, nothing unreadable, no finish for want of
  length. What is believed and is only the beginning of what the model said has an **invented end**; what is believed
  and is something else is **corrupted**.
* What is said twice, and a call that nobody can act on, count in every answer, believed or not.

Everything here is a function of bytes and words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import orjson

from routerd.canonical import (
    End,
    Event,
    Fault,
    Finish,
    TextDelta,
    ToolDelta,
    ToolStart,
    UpstreamProtocolError,
    UpstreamTruncated,
)
from routerd.dialects import Dialect

CUT = "length"
JUMP = 8  # characters that must agree for a place to be the same; the texts repeat nothing that long by themselves


class Called(NamedTuple):
    """A call of a tool, as an agent would act on it. ``arguments`` is JSON text."""

    name: str
    arguments: str


class Saying(NamedTuple):
    """What a model says in one turn: a text, the calls after it, and why it ended."""

    text: str
    calls: tuple[Called, ...]
    finish: str


class Heard(NamedTuple):
    """What came back from one request. ``status`` 0: nothing did. ``ended``: HTTP itself came to its proper end."""

    status: int
    data: bytes
    ended: bool


class Read(NamedTuple):
    """What a client makes of the bytes.

    ``ends`` counts terminal markers, ``late`` the pieces that come after the end, ``unreadable`` what is no event.
    """

    text: str = ""
    calls: tuple[Called, ...] = ()
    ids: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()
    ends: int = 0
    errors: int = 0
    late: int = 0
    unreadable: int = 0


class Verdict(msgspec.Struct, frozen=True):
    """What is wrong with one answer; see the rules above. Calls are counted one by one."""

    delivered: bool = False
    duplicated_bytes: int = 0
    calls_lost: int = 0
    calls_doubled: int = 0
    calls_half: int = 0
    corrupted: bool = False
    invented_end: bool = False

    @property
    def honest(self) -> bool:
        """True if the client knows what it has, be it nothing."""
        wrongs = (self.duplicated_bytes, self.calls_lost, self.calls_doubled, self.calls_half)
        return not (any(wrongs) or self.corrupted or self.invented_end)


# --- reading --------------------------------------------------------------------------------------------------------


class _Reading:
    """Puts an answer together, piece by piece."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: list[list[str]] = []  # id, name, arguments
        self._open: dict[int, list[str]] = {}  # by index
        self._finishes: list[str] = []
        self._ends = self._errors = self._late = self._unreadable = 0

    def text(self, text: str) -> None:
        self._late += bool(text) and self._over
        self._text.append(text)

    def call(self, index: int, id: str, name: str, arguments: str) -> None:  # noqa: A002 - as the wire has it
        """A piece of a call: the first of an index, or one with another id, begins a new one."""
        self._late += self._over
        known = self._open.get(index)
        if known is None or (id and id != known[0]):
            known = self._open[index] = [id, "", ""]
            self._calls.append(known)
        known[1] += name
        known[2] += arguments

    def finish(self, reason: str) -> None:
        self._late += bool(self._ends)
        self._finishes.append(reason)

    def end(self) -> None:
        self._ends += 1

    def end_of_body(self) -> None:
        """An error instead of an answer claims no end."""
        self._ends += not self._errors

    def error(self) -> None:
        self._errors += 1

    def unreadable(self) -> None:
        self._unreadable += 1

    @property
    def _over(self) -> bool:
        return bool(self._ends or self._finishes)

    def result(self) -> Read:
        return Read(
            "".join(self._text),
            tuple(Called(name, arguments) for _, name, arguments in self._calls),
            tuple(id_ for id_, _, _ in self._calls),
            tuple(self._finishes),
            self._ends,
            self._errors,
            self._late,
            self._unreadable,
        )


def read(heard: Heard, dialect: Dialect, *, stream: bool) -> Read:
    """What a client of this dialect makes of a 200."""
    if dialect.name == "chat":
        return read_chat_stream(heard.data) if stream else read_chat_body(heard.data)
    return _read_stream(heard, dialect) if stream else _read_body(heard.data, dialect)


def read_chat_stream(data: bytes) -> Read:
    """Server-sent events of chat completions; an event whose end has not come is none."""
    reading = _Reading()
    for block in data.split(b"\n\n")[:-1]:
        payload = b"\n".join(line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:"))
        if payload == b"[DONE]":
            reading.end()
        elif payload:
            _read_chunk(payload, reading)
    return reading.result()


def read_chat_body(data: bytes) -> Read:
    """A chat completion that came whole. Its end is that it can be parsed."""
    reading = _Reading()
    if _read_chunk(data, reading, key="message"):
        reading.end_of_body()
    return reading.result()


def _read_chunk(data: bytes, reading: _Reading, key: str = "delta") -> bool:
    """One JSON object; False if it is none."""
    try:
        found = orjson.loads(data)
        if found.get("error"):
            reading.error()
        for choice in found.get("choices") or ():
            _read_choice(choice, choice[key], reading)
    except (orjson.JSONDecodeError, AttributeError, LookupError, TypeError):
        reading.unreadable()
        return False
    return True


def _read_choice(choice: Mapping[str, Any], said: Mapping[str, Any], reading: _Reading) -> None:
    reading.text(said.get("content") or "")
    for place, piece in enumerate(said.get("tool_calls") or ()):
        function = piece.get("function") or {}
        reading.call(
            piece.get("index", place),
            piece.get("id") or "",
            function.get("name") or "",
            function.get("arguments") or "",
        )
    if choice.get("finish_reason"):
        reading.finish(choice["finish_reason"])


def _read_stream(heard: Heard, dialect: Dialect) -> Read:
    reading, decoder = _Reading(), dialect.decoder()
    try:
        for frame in decoder.feed(heard.data):
            _read_events(frame.events, reading)
        for frame in decoder.close() if heard.ended else ():
            _read_events(frame.events, reading)
    except UpstreamTruncated:
        pass  # which is seen by the end that is missing
    except UpstreamProtocolError:
        reading.unreadable()
    return reading.result()


def _read_body(data: bytes, dialect: Dialect) -> Read:
    reading = _Reading()
    try:
        events = [event for event in dialect.decode_body(data) if not isinstance(event, End)]
    except UpstreamProtocolError:
        reading.unreadable()
    else:
        _read_events(events, reading)
        reading.end_of_body()
    return reading.result()


def _read_events(events: Iterable[Event], reading: _Reading) -> None:
    for event in events:
        act = _READERS.get(type(event))
        if act is not None:
            act(reading, event)


_READERS: Mapping[type, Callable[[_Reading, Any], None]] = {
    TextDelta: lambda reading, event: reading.text(event.text),
    ToolStart: lambda reading, event: reading.call(event.index, event.id, event.name, ""),
    ToolDelta: lambda reading, event: reading.call(event.index, "", "", event.arguments),
    Finish: lambda reading, event: reading.finish(event.reason),
    End: lambda reading, _: reading.end(),
    Fault: lambda reading, _: reading.error(),
}


# --- judging --------------------------------------------------------------------------------------------------------


def judge(heard: Heard, found: Read, sayings: Sequence[Saying]) -> Verdict:
    """Hold one answer against what it may say: one of these wordings, from its beginning to its end."""
    if heard.status != 200:
        return Verdict()
    wanted = _nearest(found, sayings)
    believed = _believed(heard, found)
    delivered = believed and not found.late and found.ends == 1 and _is(found, wanted)
    begun = _begins(found, wanted)
    surplus, missing = Counter(found.calls) - Counter(wanted.calls), Counter(wanted.calls) - Counter(found.calls)
    return Verdict(
        delivered=delivered,
        duplicated_bytes=duplicated_bytes(found.text, wanted.text),
        calls_lost=missing.total() if believed else 0,
        calls_doubled=sum(count for call, count in surplus.items() if call in wanted.calls),
        calls_half=sum(not _can_be_acted_on(call) for call in found.calls),
        corrupted=(believed and not delivered and not begun) or (heard.ended and found.unreadable > 0),
        invented_end=(believed and not delivered and begun) or (found.errors > 0 and _claims_end(found)),
    )


def _nearest(found: Read, sayings: Sequence[Saying]) -> Saying:
    """The wording it comes closest to."""
    return max(sayings, key=lambda one: (one.text == found.text, _agreement(one.text, found.text)))


def _agreement(one: str, other: str) -> int:
    """So many characters are the same, from the beginning."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def _believed(heard: Heard, found: Read) -> bool:
    """True if a client takes it for a whole answer. One that was cut by its length says so."""
    warned = found.errors or found.unreadable or CUT in found.finishes
    return not warned and (heard.ended or found.ends > 0)


def _claims_end(found: Read) -> bool:
    return found.ends > 0 or any(reason != "error" for reason in found.finishes)


def _is(found: Read, wanted: Saying) -> bool:
    said = (found.text, found.calls, found.finishes) == (wanted.text, wanted.calls, (wanted.finish,))
    return said and len(set(found.ids)) == len(found.calls) and all(found.ids)


def _begins(found: Read, wanted: Saying) -> bool:
    """True if it is a part of what the model said, from its beginning, and nothing else."""
    return (
        wanted.text.startswith(found.text)
        and found.calls == wanted.calls[: len(found.calls)]
        and (found.text, found.calls) != (wanted.text, wanted.calls)
        and not found.late
    ) or (not found.finishes and (found.text, found.calls) == (wanted.text, wanted.calls))


def _can_be_acted_on(call: Called) -> bool:
    try:
        return isinstance(orjson.loads(call.arguments), dict)
    except orjson.JSONDecodeError:
        return False


def duplicated_bytes(text: str, wanted: str) -> int:
    """So many bytes of ``wanted`` stand in ``text`` once more than they should.

    It walks along both. Where they part, and the text goes on with what came before, it has jumped back.
    """
    at = place = jumped = 0
    while at < len(text):
        if place < len(wanted) and text[at] == wanted[place]:
            at, place = at + 1, place + 1
            continue
        piece = text[at : at + JUMP]
        back = wanted.rfind(piece, 0, max(0, place - 1) + len(piece)) if len(piece) == JUMP else -1
        if 0 <= back < place:
            jumped += len(wanted[back:place].encode())
            place = back
        else:
            at += 1
    return jumped


# --- the books ------------------------------------------------------------------------------------------------------


class Books(NamedTuple):
    """How often each provider was asked, by three witnesses: the log, the metrics, and the provider itself."""

    logged: Mapping[str, int]
    counted: Mapping[str, int]
    received: Mapping[str, int]


def unsettled(books: Books) -> int:
    """So many attempts were not settled exactly once: the witnesses differ by as much."""
    names = {*books.logged, *books.counted, *books.received}
    return sum(max(seen) - min(seen) for seen in ([witness.get(name, 0) for witness in books] for name in names))
