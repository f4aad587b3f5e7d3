"""What a Responses stream says.

Theory of operation
-------------------
An answer is a list of items (messages, thinking, calls), and everything that is said of one is said up to four times:
in deltas, in a ``done`` of the text, in a ``done`` of the item, and in the response that ends the stream. Servers that
imitate the API leave out any of them. So each text is kept until its item is done, and a repetition adds only what goes
beyond it: nothing if it was told before, the tail if a delta got lost, all of it if there were no deltas.

Which item an event means: the one with its id, else the one at its output index (some servers make up a new id for
every event). The items of the last response are matched by their order among those of their kind, for in some servers'
streams neither ids nor indexes agree with it.

* The answer is whole with the response that ends the stream, whose status is believed before the event's name. The
  finish, the usage and the end are one event here.
* A call is complete with the ``done`` of its arguments or of its item. A response that claims to be completed while a
  call is not is none.
* Calls to tools that are no functions, which a client runs all the same, are announced as calls, so that they are held
  and believed like calls: their arguments are the whole item, and their signature marks them. So are pictures.
* Tools that a server runs itself, annotations and what is unknown travel as bytes only. An unknown item counts as empty
  text: it is not known to be nothing.

What is ugly: thinking comes as a summary or in full, in some servers as both. Whichever comes first counts, the other
would say it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

import msgspec

from routerd.canonical import (
    End,
    Event,
    Fault,
    Finish,
    Frame,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    UpstreamProtocolError,
    UpstreamTruncated,
)
from routerd.dialects import CITATIONS, OTHER_CONTENT, SERVER_TOOLS
from routerd.dialects.chat_request import JSON_ERRORS
from routerd.dialects.faults import find_fault, named_fault, read_json
from routerd.dialects.reading import StreamDecoder
from routerd.dialects.responses_wire import (
    ACT_MARKS,
    CALL_KINDS,
    KINDS,
    SERVER_KINDS,
    Kind,
    WireEvent,
    WireItem,
    WireResponse,
    cut_reason,
    decode_event,
    decode_response,
    failed,
    kind_of,
    read_item,
    read_response,
    read_usage,
    with_status,
)
from routerd.dialects.sse import DONE, Block

_encode: Final = msgspec.json.Encoder().encode
_NO_EVENTS: Final[tuple[Event, ...]] = ()
_END: Final = End()
_TEXT_DELTA: Final = "response.output_text.delta"
_CITATION: Final = "response.output_text.annotation.added"
_BREAK: Final = "\n\n"  # between the parts of one item's thinking


# --- items being read -------------------------------------------------------------------------------------------------


class _Said:
    """What has been said of one text. ``place``: its number in the answer, None until it says something."""

    __slots__ = ("_pieces", "place")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.place: int | None = None

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def add(self, piece: str) -> None:
        self._pieces.append(piece)

    def rest(self, whole: str) -> str:
        """What the whole text adds; "" if it is no longer, or another one."""
        said = "".join(self._pieces)
        if len(whole) <= len(said) or not whole.startswith(said):
            return ""
        self._pieces = [whole]
        return whole[len(said) :]


class _Item:
    """An item being read."""

    __slots__ = ("complete", "done", "kind", "parts", "place", "voice")

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.parts: dict[int, _Said] = {}
        self.place: int | None = None  # of thinking and calls
        self.voice = ""  # of thinking: which of its two forms counts
        self.complete = kind != "function_call"
        self.done = False

    def part(self, index: int | None) -> _Said:
        said = self.parts.get(index or 0)
        if said is None:
            said = self.parts[index or 0] = _Said()
        return said


class _Items:
    """The items of one answer, and how many texts, thoughts and calls there were."""

    __slots__ = ("_by_id", "_by_index", "_counts", "_order", "unsaid")

    def __init__(self) -> None:
        self.unsaid: set[str] = set()
        self._by_id: dict[str, _Item] = {}
        self._by_index: dict[int, _Item] = {}
        self._order: dict[Kind, list[_Item]] = {kind: [] for kind in (*KINDS.values(), "act", "other")}
        self._counts = {"text": 0, "thinking": 0, "call": 0}

    @property
    def calls(self) -> bool:
        return self._counts["call"] > 0

    @property
    def half_a_call(self) -> bool:
        return any(not item.complete for kind in CALL_KINDS for item in self._order[kind])

    def add(self, event: WireEvent, raw: msgspec.Raw) -> list[Event]:
        """An item begins."""
        wire = read_item(raw)
        kind = kind_of(wire.type)
        known = self._find(event.output_index, wire.id)
        if known is not None and known.kind == kind and not known.done:
            return []
        return self._announce(self._new(kind, event.output_index, wire.id), wire)

    def saying(self, event: WireEvent, kind: Kind) -> _Item:
        """The item that a delta is of."""
        item = self._find(event.output_index, event.item_id)
        if item is None or item.kind != kind or item.done:
            item = self._new(kind, event.output_index, event.item_id)
        return item

    def text(self, said: _Said, text: str) -> TextDelta:
        said.add(text)
        if said.place is None:
            said.place = self._number("text")
        return TextDelta(said.place, text)

    def think(self, event: WireEvent, voice: str) -> list[Event]:
        """A delta of thinking."""
        item = self.saying(event, "reasoning")
        if not event.delta or voice != (item.voice or voice):
            return []
        item.voice = voice
        index = _part_index(event, voice)
        opening = self._opening(item, index)
        item.part(index).add(event.delta)
        return [ReasoningDelta(self._thought_place(item), opening + event.delta)]

    def call(self, event: WireEvent) -> list[Event]:
        """A delta of a call's arguments."""
        item = self.saying(event, "function_call")
        if item.place is None:
            raise UpstreamProtocolError("arguments of no call")
        if not event.delta:
            return []
        item.part(0).add(event.delta)
        return [ToolDelta(item.place, event.delta)]

    def close_text(self, event: WireEvent, kind: Kind, whole: str | None, voice: str = "") -> list[Event]:
        """One text of an item is done."""
        item = self._find(event.output_index, event.item_id)
        if whole is None or (item is not None and item.done):
            return []
        if item is None or item.kind != kind:
            item = self._new(kind, event.output_index, event.item_id)
        if kind == "message":
            return self._rest_of_text(item.part(event.content_index), whole)
        if kind == "reasoning":
            return self._rest_of_thought(item, voice, _part_index(event, voice), whole)
        return self._rest_of_call(item, whole, cut=False, last=False)

    def close(self, event: WireEvent, raw: msgspec.Raw) -> list[Event]:
        """An item is done."""
        wire = read_item(raw)
        kind = kind_of(wire.type)
        item = self._find(event.output_index, wire.id)
        if item is not None and item.kind == kind and item.done:
            return []
        events: list[Event] = []
        if item is None or item.kind != kind:
            item = self._new(kind, event.output_index, wire.id)
            events += self._announce(item, wire)
        return events + self._finish(item, wire, raw)

    def last(self, output: list[msgspec.Raw]) -> list[Event]:
        """The whole output, once more."""
        events: list[Event] = []
        places = dict.fromkeys(self._order, 0)
        known = {kind: list(items) for kind, items in self._order.items()}
        for raw in output:
            wire = read_item(raw)
            kind = kind_of(wire.type)
            place = places[kind]
            places[kind] += 1
            if place < len(known[kind]):
                item = known[kind][place]
            else:
                item = self._new(kind, None, None)
                events += self._announce(item, wire)
            if not item.done:
                events += self._finish(item, wire, raw)
        return events

    # --- one item ---------------------------------------------------------------------------------------------------

    def _find(self, index: int | None, identity: str | None) -> _Item | None:
        item = self._by_id.get(identity) if identity is not None else None
        return item if item is not None or index is None else self._by_index.get(index)

    def _new(self, kind: Kind, index: int | None, identity: str | None) -> _Item:
        item = _Item(kind)
        self._order[kind].append(item)
        if index is not None:
            self._by_index[index] = item
        if identity is not None:
            self._by_id[identity] = item
        return item

    def _announce(self, item: _Item, wire: WireItem) -> list[Event]:
        if item.kind == "function_call":
            if not wire.name:
                raise UpstreamProtocolError("a call without a name")
            item.place = self._number("call")
            return [ToolStart(item.place, wire.call_id or wire.id or "", wire.name)]
        if item.kind == "act":
            item.place = self._number("call")
            item.complete = False
            identity = wire.call_id or wire.id or ""
            return [ToolStart(item.place, identity, wire.name or wire.type, ACT_MARKS[wire.type])]
        if item.kind == "other":
            self.unsaid.add(SERVER_TOOLS if wire.type in SERVER_KINDS else OTHER_CONTENT)
        return []

    def _finish(self, item: _Item, wire: WireItem, raw: msgspec.Raw) -> list[Event]:
        events: list[Event] = []
        if item.kind == "message":
            for index, part in enumerate(wire.content or ()):
                events += self._rest_of_text(item.part(index), part.text or part.refusal or "")
        elif item.kind == "reasoning":
            events += self._finish_thought(item, wire)
        elif item.kind == "function_call":
            events += self._rest_of_call(item, _arguments(wire.arguments), cut=wire.status == "incomplete", last=True)
        elif item.kind == "act" and item.place is not None:
            item.complete = True
            events.append(ToolDelta(item.place, bytes(raw).decode("utf-8", "replace")))
        elif wire.type not in SERVER_KINDS:
            events.append(TextDelta(self._number("text"), ""))
        item.done = True
        item.parts = {}
        return events

    def _finish_thought(self, item: _Item, wire: WireItem) -> list[Event]:
        events: list[Event] = []
        voice = item.voice or ("content" if wire.content else "summary")
        for index, part in enumerate((wire.content if voice == "content" else wire.summary) or ()):
            events += self._rest_of_thought(item, voice, index, part.text or "")
        if wire.encrypted_content:
            spoken = item.place is not None
            seal = {"signature" if spoken else "sealed": wire.encrypted_content}
            events.append(ReasoningDelta(self._thought_place(item), "", **seal))
        return events

    def _rest_of_text(self, said: _Said, whole: str) -> list[Event]:
        rest = said.rest(whole)
        if not rest:
            return []
        if said.place is None:
            said.place = self._number("text")
        return [TextDelta(said.place, rest)]

    def _rest_of_thought(self, item: _Item, voice: str, index: int, whole: str) -> list[Event]:
        if not whole or voice != (item.voice or voice):
            return []
        item.voice = voice
        opening = self._opening(item, index)
        rest = item.part(index).rest(whole)
        return [ReasoningDelta(self._thought_place(item), opening + rest)] if rest else []

    def _opening(self, item: _Item, index: int) -> str:
        """What stands before the first words of a part."""
        return _BREAK if item.place is not None and not item.part(index) else ""

    def _thought_place(self, item: _Item) -> int:
        if item.place is None:
            item.place = self._number("thinking")
        return item.place

    def _rest_of_call(self, item: _Item, whole: str, *, cut: bool, last: bool) -> list[Event]:
        """A call without arguments says so only by ending; one that was cut off is not complete."""
        if item.place is None:
            raise UpstreamProtocolError("arguments of no call")
        said = item.part(0)
        item.complete = not cut
        if last and not cut and not said and not whole.strip():
            whole = "{}"
        rest = said.rest(whole)
        return [ToolDelta(item.place, rest)] if rest else []

    def _number(self, name: str) -> int:
        place = self._counts[name]
        self._counts[name] += 1
        return place

    def mark_cut(self) -> list[Event]:
        """A call that was cut off must not pass for a whole one, not even by the chance of where it was cut."""
        calls = (item for kind in CALL_KINDS for item in self._order[kind] if not item.complete)
        return [ToolDelta(item.place, "{") for item in calls if item.place is not None]


def _part_index(event: WireEvent, voice: str) -> int:
    return (event.summary_index if voice == "summary" else event.content_index) or 0


def _arguments(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _encode(value).decode()


# --- streams ----------------------------------------------------------------------------------------------------------


class ResponsesDecoder(StreamDecoder):
    """Reads one attempt's stream."""

    __slots__ = ("_flow", "_items", "_started")

    def __init__(self) -> None:
        super().__init__()
        self._items = _Items()
        self._flow: tuple[WireEvent, _Said] | None = None  # the last delta of a text, and that text
        self._started = False

    def __repr__(self) -> str:
        state = "FINISHED" if self._finished else "STARTED" if self._started else "NEW"
        return f"<ResponsesDecoder {state}>"

    @property
    def unsaid(self) -> set[str]:
        """See ``Decoder``."""
        return self._items.unsaid

    def _frames(self, blocks: list[Block]) -> list[Frame]:
        read = self._read
        return [Frame(block.raw, read(block) if block.data else _NO_EVENTS) for block in blocks]

    def _read(self, block: Block) -> tuple[Event, ...]:
        """The events of a block with data. The first branch is all but a few blocks of any stream."""
        try:
            event = decode_event(block.data)
        except JSON_ERRORS:
            return self._read_odd(block)
        if self._flow is not None and event.type == _TEXT_DELTA and event.delta:
            last, said = self._flow
            if (
                event.output_index == last.output_index
                and event.item_id == last.item_id
                and event.content_index == last.content_index
                and said.place is not None
            ):
                said.add(event.delta)
                return (TextDelta(said.place, event.delta),)
        self._flow = None
        return self._read_event(event, block)

    def _read_event(self, event: WireEvent, block: Block) -> tuple[Event, ...]:
        read = self._READERS.get(event.type)
        if read is None:
            if event.type == _CITATION:
                self.unsaid.add(CITATIONS)
            return self._read_other(event, block)
        if self._finished:
            return _NO_EVENTS
        events = read(self, event)
        if events and not self._started and type(events[0]) not in (Start, Fault):
            self._started = True
            events.insert(0, Start("", ""))
        return tuple(events)

    def _read_odd(self, block: Block) -> tuple[Event, ...]:
        """What is no event of the usual shape: an error, a kind of event with fields of its own, broken characters."""
        if block.data == DONE:
            return _NO_EVENTS
        value = read_json(block.data)
        fault = named_fault(block)
        if fault is not None:
            return (with_status(fault),)
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind and kind != "error" and kind not in self._READERS:
            return _NO_EVENTS
        try:
            return self._read_event(decode_event(_encode(value)), block)
        except (msgspec.ValidationError, RecursionError):
            fault = find_fault(value)
        if fault is None:
            raise UpstreamProtocolError("JSON that is no event of a response")
        return (with_status(fault),)

    def _read_other(self, event: WireEvent, block: Block) -> tuple[Event, ...]:
        """Errors, in any place they are put, and events of kinds that say nothing here or are new."""
        fault = named_fault(block)
        if fault is None and event.type in ("", "error"):
            fault = find_fault(read_json(block.data))
        return _NO_EVENTS if fault is None else (with_status(fault),)

    def _on_life(self, event: WireEvent) -> list[Event]:
        """The response as it begins."""
        if self._started:
            return []
        self._started = True
        response = read_response(event.response)
        return [Start(response.id or "", response.model or "")]

    def _on_text(self, event: WireEvent) -> list[Event]:
        item = self._items.saying(event, "message")
        if not event.delta:
            return []
        said = item.part(event.content_index)
        if event.type == _TEXT_DELTA:
            self._flow = event, said
        return [self._items.text(said, event.delta)]

    def _on_summary(self, event: WireEvent) -> list[Event]:
        return self._items.think(event, "summary")

    def _on_thought(self, event: WireEvent) -> list[Event]:
        return self._items.think(event, "content")

    def _on_arguments(self, event: WireEvent) -> list[Event]:
        return self._items.call(event)

    def _on_text_done(self, event: WireEvent) -> list[Event]:
        return self._items.close_text(event, "message", event.text or event.refusal)

    def _on_summary_done(self, event: WireEvent) -> list[Event]:
        whole = event.part.text if event.part is not None else event.text
        return self._items.close_text(event, "reasoning", whole, "summary")

    def _on_thought_done(self, event: WireEvent) -> list[Event]:
        return self._items.close_text(event, "reasoning", event.text, "content")

    def _on_arguments_done(self, event: WireEvent) -> list[Event]:
        return self._items.close_text(event, "function_call", _arguments(event.arguments))

    def _on_part_done(self, event: WireEvent) -> list[Event]:
        part = event.part
        if part is None:
            return []
        if part.type == "reasoning_text":
            return self._items.close_text(event, "reasoning", part.text, "content")
        return self._items.close_text(event, "message", part.text or part.refusal)

    def _on_item(self, event: WireEvent) -> list[Event]:
        return self._items.add(event, event.item)

    def _on_item_done(self, event: WireEvent) -> list[Event]:
        return self._items.close(event, event.item)

    def _on_last(self, event: WireEvent) -> list[Event]:
        response = read_response(event.response)
        status = response.status or ""
        if status not in _STATUSES:
            status = event.type.rpartition(".")[2]
        events = [] if self._started else self._on_life(event)
        events += _ending(response, status, self._items)
        self._finished = type(events[-1]) is End
        return events

    _READERS: ClassVar[dict[str, Callable[[Any, WireEvent], list[Event]]]] = {
        "response.created": _on_life,
        "response.queued": _on_life,
        "response.in_progress": _on_life,
        "response.output_item.added": _on_item,
        "response.output_item.done": _on_item_done,
        "response.content_part.done": _on_part_done,
        _TEXT_DELTA: _on_text,
        "response.output_text.done": _on_text_done,
        "response.refusal.delta": _on_text,
        "response.refusal.done": _on_text_done,
        "response.reasoning_summary_text.delta": _on_summary,
        "response.reasoning_summary_text.done": _on_summary_done,
        "response.reasoning_summary_part.done": _on_summary_done,
        "response.reasoning_text.delta": _on_thought,
        "response.reasoning_text.done": _on_thought_done,
        "response.function_call_arguments.delta": _on_arguments,
        "response.function_call_arguments.done": _on_arguments_done,
        "response.completed": _on_last,
        "response.incomplete": _on_last,
        "response.failed": _on_last,
        "response.cancelled": _on_last,
        "response.done": _on_last,  # what some gateways call any of them
    }


_STATUSES: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})


def _ending(response: WireResponse, status: str, items: _Items) -> list[Event]:
    """The events of the last response."""
    report = read_usage(response.usage)
    reports: list[Event] = [report] if report is not None else []
    if status in ("failed", "cancelled"):
        return [*reports, failed(status, response.error)]
    events = items.last(response.output or [])
    reason = cut_reason(response.incomplete_details) if status == "incomplete" else "stop"
    if items.half_a_call:
        if reason == "stop":
            raise UpstreamProtocolError("completed with half a call")
        events += items.mark_cut()
    return [*events, Finish("tool_calls" if items.calls and reason == "stop" else reason), *reports, _END]


def read_body(body: bytes) -> list[Event]:
    """Read a whole response. Raises ``UpstreamProtocolError`` if it is none."""
    try:
        response: WireResponse | None = decode_response(body)
    except JSON_ERRORS:
        response = None
    if response is None or (response.output is None and response.status not in ("failed", "cancelled")):
        fault = find_fault(read_json(body))
        if fault is None:
            raise UpstreamProtocolError("JSON that is no response")
        return [with_status(fault)]
    if response.status not in _STATUSES:
        raise UpstreamTruncated("a response that is not at its end")
    events = _ending(response, response.status or "", _Items())
    if type(events[-1]) is Fault:
        return events[-1:]
    return [Start(response.id or "", response.model or ""), *events]
