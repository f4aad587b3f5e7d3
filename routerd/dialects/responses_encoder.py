"""Writing a Responses stream, also behind one that was passed on as it came.

Theory of operation
-------------------
An item is opened, filled and done; then it is a part of the output, which the last response lists once more. One text
or thought is open at a time: whatever is not its continuation closes it. Calls stay open until the finish, since the
pieces of several may alternate. The finish closes everything and waits for the end, because status and usage are of the
last response.

``follow`` keeps the same books about what an upstream's own bytes have opened and closed: its response, its last
sequence number, the finished items as they came, and of the open ones what has been said so far. So what is written
later goes on in the same item, and the last response lists what was passed on too. A delta costs one comparison and one
append: it is taken apart only if it is not of the text that the one before it was of.

* Sequence numbers go up by one with every event. A keep-alive between events that are passed on repeats the last
  number, for the next one is the upstream's to give.
* A function call that was passed on without its end is neither done nor listed: nobody may take it for a whole one.
  Items of other kinds that were left open (a search the server did) are listed as they began.
* A failure is an ``error`` event with its fields in two places: at the top, where the documentation has them, and under
  ``error``, where the vendor's SDK looks in order to raise. ``response.failed`` would make Hermes wait longer before it
  asks again (Hermes Agent 0.19.0).

What is ugly: ids. The response's begins with ``resp_`` whatever an answer was called elsewhere, and those of items are
made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final

import msgspec

from routerd.canonical import (
    End,
    Event,
    Failure,
    Fault,
    Finish,
    FinishReason,
    Frame,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    UpstreamProtocolError,
    Usage,
    UsageReport,
)
from routerd.dialects import Stamp
from routerd.dialects.chat_request import JSON_ERRORS
from routerd.dialects.faults import told_error
from routerd.dialects.responses_wire import ACT_MARKS, WireEvent, decode_event, read_item
from routerd.dialects.sse import Framer

FINISHED_BYTES_MAX: Final = 32 * 1024 * 1024  # of an answer's items; of more, the last response lists only the first

_encode: Final = msgspec.json.Encoder().encode
_decode_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_MARKS: Final = frozenset(ACT_MARKS.values())
_SILENCE: Final = b": keep-alive\n\n"  # where no event fits any more

# What a response must say of its request, where nothing is known of it.
_UNTOLD: Final[dict[str, Any]] = {
    "instructions": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "temperature": None,
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
}
# What it repeats of its request. Instructions and tools are too long to be sent again and again.
_REPEATED: Final = frozenset(
    {
        "max_output_tokens",
        "max_tool_calls",
        "metadata",
        "parallel_tool_calls",
        "previous_response_id",
        "prompt_cache_key",
        "reasoning",
        "safety_identifier",
        "store",
        "temperature",
        "text",
        "tool_choice",
        "top_logprobs",
        "top_p",
        "truncation",
        "user",
    }
)
_CUT_REASONS: Final[dict[FinishReason, str]] = {
    "length": "max_output_tokens",
    "content_filter": "content_filter",
    "error": "content_filter",
}


def response_id(identity: str) -> str:
    """The id of a response whose answer may have been called otherwise."""
    return identity if identity.startswith("resp_") else f"resp_{identity.removeprefix('chatcmpl-')}"


# --- the wire ---------------------------------------------------------------------------------------------------------


class _Voice(msgspec.Struct, frozen=True):
    """How one kind of text is written: the names of its events and fields."""

    kind: str  # of the item
    added: str
    delta: str
    done: str
    part_done: str
    part_type: str
    index_field: str = "content_index"
    text_field: str = "text"
    container: str = "content"  # where the item keeps it
    delta_fields: bytes = b""
    part_fields: tuple[str, ...] = ()


_CONTENT: Final = ("response.content_part.added", "response.content_part.done")
_VOICES: Final[dict[str, _Voice]] = {
    "output_text": _Voice(
        "message",
        _CONTENT[0],
        "response.output_text.delta",
        "response.output_text.done",
        _CONTENT[1],
        "output_text",
        delta_fields=b'"logprobs":[],',
        part_fields=("annotations", "logprobs"),
    ),
    "refusal": _Voice(
        "message",
        _CONTENT[0],
        "response.refusal.delta",
        "response.refusal.done",
        _CONTENT[1],
        "refusal",
        text_field="refusal",
    ),
    "reasoning_text": _Voice(
        "reasoning",
        _CONTENT[0],
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        _CONTENT[1],
        "reasoning_text",
    ),
    "summary_text": _Voice(
        "reasoning",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "summary_text",
        index_field="summary_index",
        container="summary",
    ),
}
_VOICES_OF: Final = {"message": "output_text", "reasoning": "summary_text"}  # in which we write
_BY_DELTA: Final = {voice.delta: name for name, voice in _VOICES.items()}
_BY_DONE: Final = {voice.done: name for name, voice in _VOICES.items()}
_ARGUMENTS_DELTA: Final = "response.function_call_arguments.delta"
_ARGUMENTS_DONE: Final = "response.function_call_arguments.done"
_DELTAS: Final = tuple(
    opening
    for name in (*_BY_DELTA, _ARGUMENTS_DELTA)
    for opening in (b"event: " + name.encode() + b"\n", b'data: {"type":"' + name.encode() + b'"')
)


def _usage(usage: Usage) -> dict[str, Any]:
    report = {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    return report if usage.cost_usd is None else report | {"cost": usage.cost_usd}


def _part(voice: _Voice, text: str) -> dict[str, Any]:
    return {"type": voice.part_type, voice.text_field: text} | {name: [] for name in voice.part_fields}


class _Open:
    """An item that is not done.

    ``key``: its place among those of its kind, None if anything may go on in it. ``prefix``: all of a delta's event
    up to its sequence number. ``raw``: an item of another kind, as it began.
    """

    __slots__ = (
        "call_id",
        "id",
        "index",
        "key",
        "kind",
        "name",
        "own",
        "part_index",
        "part_open",
        "parts",
        "pieces",
        "prefix",
        "raw",
        "seal",
        "text_done",
        "voice",
    )

    def __init__(self, kind: str, index: int, identity: str, key: int | None = None) -> None:
        self.kind = kind
        self.index = index
        self.id = identity
        self.key = key
        self.voice = _VOICES_OF.get(kind, "")
        self.parts: dict[str, list[Any]] = {"content": [], "summary": []}  # those that are done
        self.part_index = 0
        self.part_open = False
        self.text_done = False
        self.pieces: list[str] = []  # of the open part, or of the arguments
        self.prefix = b""
        self.call_id = ""
        self.name = ""
        self.seal = ""
        self.own = True  # False: it was begun by what was passed on
        self.raw = b""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def begin_part(self, voice: str, index: int) -> None:
        self.voice, self.part_index = voice, index
        self.part_open, self.text_done = True, False
        self.pieces = []
        self.prefix = b""

    def end_part(self, part: Any) -> None:
        self.parts[_VOICES[self.voice].container].append(part)
        self.part_open = False
        self.pieces = []

    def goes_on(self, kind: str, key: int) -> bool:
        """True if more of the same may be written into it."""
        return self.kind == kind and not self.text_done and (self.key is None or self.key == key)

    def written(self, status: str) -> dict[str, Any]:
        """The item as it is when it begins or is done."""
        item: dict[str, Any] = {"id": self.id, "type": self.kind}
        if self.kind == "function_call":
            return item | {"call_id": self.call_id, "name": self.name, "arguments": self.text, "status": status}
        if self.kind == "message":
            return item | {"role": "assistant", "status": status, "content": self.parts["content"]}
        item |= {"summary": self.parts["summary"], "status": status}
        if self.parts["content"]:
            item["content"] = self.parts["content"]
        return item | {"encrypted_content": self.seal} if self.seal else item


# --- the encoder ------------------------------------------------------------------------------------------------------


class ResponsesEncoder:
    """Writes one exchange's stream.

    ``opened``: it has begun a response of its own, so an upstream's bytes do not fit behind it any more.
    """

    __slots__ = (
        "_asked",
        "_begun",
        "_calls",
        "_created",
        "_fields",
        "_finished",
        "_finished_bytes",
        "_flow",
        "_id",
        "_index",
        "_last",
        "_model",
        "_open",
        "_passing",
        "_reason",
        "_sequence",
        "_stem",
        "_stopped",
        "_usage",
        "opened",
    )

    def __init__(self, stamp: Stamp) -> None:
        self._id = response_id(stamp.id)
        self._stem = self._id.removeprefix("resp_")
        self._model = stamp.model
        self._created = stamp.created
        self._asked = stamp.asked
        self._fields: bytes = b""  # the response as it was passed on
        self._begun = False
        self._sequence = 0  # of the next event
        self._index = 0  # of the next item
        self._open: dict[int, _Open] = {}  # by output index
        self._calls: dict[int, _Open] = {}  # those of them that are calls, by their place among the calls
        self._finished: dict[int, bytes] = {}
        self._finished_bytes = 0
        self._reason: FinishReason | None = None
        self._stopped = False
        self._usage: Usage | None = None
        self._passing = False  # the last event was an upstream's own
        self._last = b""  # that event, if it is a delta whose number nobody has looked at
        self._flow: tuple[type[Any], int, list[str]] | None = None  # the text that the last delta was of
        self.opened = False

    def encode(self, event: Event) -> bytes:
        if self._passing:
            self._take_over()
        return self._ENCODERS[type(event)](self, event)

    def keepalive(self) -> bytes:
        """The response once more, which is in progress; clients count that as life."""
        if self._stopped:
            return _SILENCE
        if self._passing:
            self._look_up()
            return self._lived("response.in_progress", self._sequence - 1)
        self.opened = True
        return self._begin() + self._progress()

    def error(self, failure: Failure) -> bytes:
        """See above for why its fields are there twice."""
        if self._passing:
            self._take_over()
        error = told_error(failure)
        fields = {name: error[name] for name in ("code", "message", "param")}
        return self._event("error", **fields, error=error)

    # --- one method per kind of event -------------------------------------------------------------------------------

    def _on_start(self, _: Start) -> bytes:
        return self._begin() + self._progress() if not self._begun else b""

    def _on_text(self, event: TextDelta) -> bytes:
        item, opening = self._continued("message", event.index)
        return opening + self._say(item, event.text) if event.text else opening

    def _on_reasoning(self, event: ReasoningDelta) -> bytes:
        if event.sealed:
            opening = self._begin() + self._close_texts()
            item = self._new("reasoning", "rs", event.index)
            item.seal = event.sealed
            return opening + self._added(item) + self._close(item)
        item, opening = self._continued("reasoning", event.index)
        if event.text:
            opening += self._say(item, event.text)
        if not event.signature:
            return opening
        item.seal = event.signature  # nothing of another upstream's may come behind it
        return opening + self._close(item)

    def _on_tool_start(self, event: ToolStart) -> bytes:
        opening = self._begin() + self._close_texts()
        if event.signature in _MARKS:
            self._calls[event.index] = self._new("act", "act", event.index)
            return opening
        item = self._new("function_call", "fc", event.index)
        item.call_id, item.name = event.id, event.name
        self._calls[event.index] = item
        return opening + self._added(item)

    def _on_tool_delta(self, event: ToolDelta) -> bytes:
        item = self._calls.get(event.index)
        if item is None:
            return b""  # of a call that somebody else began: it is never done
        if item.kind == "act":
            item.pieces.append(event.arguments)
            return b""
        if not item.prefix:
            item.prefix = _delta_prefix(_ARGUMENTS_DELTA, item, b"")
        return self._say(item, event.arguments)

    def _on_usage(self, event: UsageReport) -> bytes:
        self._usage = event.usage
        return b""

    def _on_finish(self, event: Finish) -> bytes:
        self._reason = event.reason
        opening = self._begin()
        return opening + b"".join([self._close(item) for item in list(self._open.values()) if _closable(item)])

    def _on_end(self, _: End) -> bytes:
        """Nothing without a finish: half an answer never ends cleanly."""
        if self._stopped or self._reason is None:
            return b""
        self._stopped = True
        status = "incomplete" if self._reason in _CUT_REASONS else "completed"
        return self._event(f"response.{status}", response=self.response())

    def _on_fault(self, _: Fault) -> bytes:
        """Evidence for the classifier, not for a client: ``error`` is what a client is told."""
        return b""

    # --- the response -----------------------------------------------------------------------------------------------

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        reason = self._reason
        cut = _CUT_REASONS.get(reason) if reason is not None else None
        status = "in_progress" if reason is None else "completed" if cut is None else "incomplete"
        return self._described(
            status=status,
            incomplete_details=None if cut is None else {"reason": cut},
            output=self._output() if reason is not None else [],
            usage=None if self._usage is None else _usage(self._usage),
        )

    def _described(self, **state: Any) -> dict[str, Any]:
        return (_fields(self._fields) or self._own_fields()) | {"error": None} | state

    def _own_fields(self) -> dict[str, Any]:
        head = {"id": self._id, "object": "response", "created_at": self._created, "model": self._model}
        return head | _UNTOLD | _repeated(self._asked)

    def _output(self) -> list[msgspec.Raw]:
        """All items in their order. Those left open by what was passed on are listed as they began, but no calls."""
        left = {index: item.raw for index, item in self._open.items() if item.raw and item.kind == "other"}
        return [msgspec.Raw(raw) for _, raw in sorted({**left, **self._finished}.items())]

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return self._lived("response.created", self._next())

    def _progress(self) -> bytes:
        return self._lived("response.in_progress", self._next())

    def _lived(self, name: str, number: int) -> bytes:
        response = self._described(status="in_progress", incomplete_details=None, output=[], usage=None)
        return _wire(name, {"type": name, "sequence_number": max(number, 0), "response": response})

    # --- items ------------------------------------------------------------------------------------------------------

    def _continued(self, kind: str, key: int) -> tuple[_Open, bytes]:
        """The item that takes up a text, opened if need be, and what has to be written before."""
        for item in self._open.values():
            if item.goes_on(kind, key):
                item.key = key
                return item, b"" if item.part_open else self._open_part(item)
        opening = self._begin() + self._close_texts()
        item = self._new(kind, "msg" if kind == "message" else "rs", key)
        return item, opening + self._added(item) + self._open_part(item)

    def _new(self, kind: str, prefix: str, key: int) -> _Open:
        item = _Open(kind, self._index, f"{prefix}_{self._stem}_{self._index}", key)
        self._open[self._index] = item
        self._index += 1
        return item

    def _added(self, item: _Open) -> bytes:
        return self._event("response.output_item.added", output_index=item.index, item=item.written("in_progress"))

    def _open_part(self, item: _Open) -> bytes:
        voice = _VOICES[item.voice]
        item.begin_part(item.voice, len(item.parts[voice.container]))
        return self._part_event(voice.added, item, part=_part(voice, ""))

    def _part_event(self, name: str, item: _Open, /, **fields: Any) -> bytes:
        index_field = _VOICES[item.voice].index_field
        places = {"item_id": item.id, "output_index": item.index, index_field: item.part_index}
        return self._event(name, **places, **fields)

    def _say(self, item: _Open, text: str) -> bytes:
        if not item.prefix:
            voice = _VOICES[item.voice]
            place = b'"%s":%d,' % (voice.index_field.encode(), item.part_index)
            item.prefix = _delta_prefix(voice.delta, item, place + voice.delta_fields)
        item.pieces.append(text)
        number = self._sequence
        self._sequence = number + 1
        return item.prefix + b'%d,"delta":%b}\n\n' % (number, _encode(text))

    def _close_texts(self) -> bytes:
        """Whatever is open, but for calls, whose pieces may alternate."""
        texts = [item for item in self._open.values() if item.kind in _VOICES_OF and _closable(item)]
        return b"".join([self._close(item) for item in texts])

    def _close(self, item: _Open) -> bytes:
        del self._open[item.index]
        if item.kind == "act":
            return self._close_act(item)
        closing = b""
        if item.kind == "function_call":
            places = {"item_id": item.id, "output_index": item.index}
            closing = self._event(_ARGUMENTS_DONE, **places, name=item.name, arguments=item.text)
        elif item.part_open:
            closing = self._close_part(item)
        cut = self._reason == "length" and item.kind == "message"
        raw = _encode(item.written("incomplete" if cut else "completed"))
        self._keep(item.index, raw)
        return closing + self._event("response.output_item.done", output_index=item.index, item=msgspec.Raw(raw))

    def _close_part(self, item: _Open) -> bytes:
        voice, text = _VOICES[item.voice], item.text
        part = _part(voice, text)
        closing = b""
        if not item.text_done:
            fields: dict[str, Any] = {voice.text_field: text} | ({"logprobs": []} if voice.delta_fields else {})
            closing = self._part_event(voice.done, item, **fields)
        closing += self._part_event(voice.part_done, item, part=part)
        item.end_part(part)
        return closing

    def _close_act(self, item: _Open) -> bytes:
        """It is written in one piece, as it was read."""
        raw = msgspec.Raw(item.text.encode())
        self._keep(item.index, bytes(raw))
        return b"".join(
            self._event(f"response.output_item.{name}", output_index=item.index, item=raw) for name in ("added", "done")
        )

    def _keep(self, index: int, raw: bytes) -> None:
        self._finished_bytes += len(raw)
        if self._finished_bytes <= FINISHED_BYTES_MAX:
            self._finished[index] = raw

    def _event(self, name: str, /, **fields: Any) -> bytes:
        return _wire(name, {"type": name, "sequence_number": self._next(), **fields})

    def _next(self) -> int:
        number = self._sequence
        self._sequence = number + 1
        return number

    _ENCODERS: ClassVar[dict[type, Callable[[Any, Any], bytes]]] = {
        Start: _on_start,
        TextDelta: _on_text,
        ReasoningDelta: _on_reasoning,
        ToolStart: _on_tool_start,
        ToolDelta: _on_tool_delta,
        UsageReport: _on_usage,
        Finish: _on_finish,
        End: _on_end,
        Fault: _on_fault,
    }

    # --- behind what was passed on ----------------------------------------------------------------------------------

    def follow(self, frames: Iterable[Frame]) -> None:
        """Note what an upstream's own bytes, sent on as they came, have begun, said and ended."""
        self._passing = True
        for frame in frames:
            raw, flow = frame.raw, self._flow
            if flow is not None and len(frame.events) == 1 and raw.startswith(_DELTAS):
                event: Any = frame.events[0]
                kind, index, pieces = flow
                if type(event) is kind and event.index == index:
                    pieces.append(event.text if kind is not ToolDelta else event.arguments)
                    self._last = raw
                    self._sequence += 1
                    continue
            self._flow = None
            for block in Framer().feed(raw):
                if block.data:
                    self._follow(block.data, frame.events)

    def _follow(self, data: bytes, events: tuple[Event, ...]) -> None:
        try:
            event = decode_event(data)
        except JSON_ERRORS:
            return
        self._last = b""
        self._sequence = max(self._sequence, event.sequence_number or 0) + 1
        self._begun = True
        if event.response:
            self._follow_response(event)
        elif event.item:
            self._follow_item(event)
        elif event.type in _BY_DELTA or event.type == _ARGUMENTS_DELTA:
            self._follow_delta(event, events)
        elif event.type == _CONTENT[0] or event.type == _VOICES["summary_text"].added:
            self._begin_part(event)
        elif event.type in _BY_DONE and event.output_index in self._open:
            item = self._open[event.output_index]
            item.pieces = [event.text or event.refusal or item.text]
            item.text_done = True
        elif event.type == _CONTENT[1] or event.type == _VOICES["summary_text"].part_done:
            self._end_part(event, data)

    def _follow_response(self, event: WireEvent) -> None:
        if event.type in ("response.created", "response.queued", "response.in_progress"):
            self._fields = bytes(event.response)
        else:
            self._stopped = True

    def _follow_item(self, event: WireEvent) -> None:
        index = self._index if event.output_index is None else event.output_index
        self._index = max(self._index, index + 1)
        if event.type == "response.output_item.done":
            self._open.pop(index, None)
            self._keep(index, bytes(event.item))
        elif event.type == "response.output_item.added":
            try:
                wire = read_item(event.item)
            except UpstreamProtocolError:
                return
            known = wire.type if wire.type in _VOICES_OF or wire.type == "function_call" else "other"
            item = self._open[index] = _Open(known, index, wire.id or "")
            item.own = False
            item.raw = bytes(event.item)

    def _follow_delta(self, event: WireEvent, events: tuple[Event, ...]) -> None:
        """The first delta of a text, or one between those of another."""
        voice = _BY_DELTA.get(event.type, "")
        item = self._open.get(event.output_index or 0)
        if item is None:
            kind = _VOICES[voice].kind if voice else "function_call"
            item = self._open[event.output_index or 0] = _Open(kind, event.output_index or 0, event.item_id or "")
            item.own = False
            self._index = max(self._index, item.index + 1)
        index = (event.summary_index if voice == "summary_text" else event.content_index) or 0
        if voice and not (item.part_open and item.voice == voice and item.part_index == index):
            item.begin_part(voice, index)
        item.pieces.append(event.delta or "")
        if len(events) == 1 and isinstance(events[0], TextDelta | ReasoningDelta | ToolDelta):
            self._flow = (type(events[0]), events[0].index, item.pieces)

    def _begin_part(self, event: WireEvent) -> None:
        item = self._open.get(event.output_index or 0)
        part_type = event.part.type if event.part is not None else ""
        if item is not None and part_type in _VOICES:
            index = event.summary_index if part_type == "summary_text" else event.content_index
            item.begin_part(part_type, index or 0)

    def _end_part(self, event: WireEvent, data: bytes) -> None:
        item = self._open.get(event.output_index or 0)
        if item is not None and item.voice:
            item.end_part(_fields(data).get("part", _part(_VOICES[item.voice], item.text)))

    def _look_up(self) -> None:
        """Read the number of the last delta, which was only counted."""
        for block in Framer().feed(self._last) if self._last else ():
            try:
                number = decode_event(block.data).sequence_number or 0
            except JSON_ERRORS:
                number = 0
            self._sequence = max(self._sequence, number + 1)
        self._last = b""

    def _take_over(self) -> None:
        """From here on we write."""
        self._look_up()
        self._passing = False
        self._flow = None


def _fields(data: bytes) -> dict[str, Any]:
    """The fields of an object, as they are; empty for anything else."""
    try:
        return _decode_fields(data) if data else {}
    except JSON_ERRORS:
        return {}


def _repeated(asked: bytes) -> dict[str, Any]:
    """What a response repeats of the request, as far as that says anything."""
    try:
        told = {name: msgspec.json.decode(value) for name, value in _fields(asked).items() if name in _REPEATED}
    except JSON_ERRORS:
        return {}
    return {name: value for name, value in told.items() if value is not None}


def _closable(item: _Open) -> bool:
    """False for what was passed on and only its own upstream could have ended."""
    return item.own or item.kind in _VOICES_OF


def _delta_prefix(name: str, item: _Open, places: bytes) -> bytes:
    text = name.encode()
    head = (text, text, _encode(item.id), item.index, places)
    return b'event: %b\ndata: {"type":"%b","item_id":%b,"output_index":%d,%b"sequence_number":' % head


def _wire(name: str, event: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _encode(event) + b"\n\n"


def write_body(events: Iterable[Event], stamp: Stamp) -> bytes:
    """A whole response."""
    encoder = ResponsesEncoder(stamp)
    for event in events:
        encoder.encode(event)
    return _encode(encoder.response())
