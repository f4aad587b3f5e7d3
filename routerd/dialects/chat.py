"""Chat completions, OpenAI's first wire API and the one every vendor imitates.

Theory of operation
-------------------
*Streams in.* ``sse`` cuts blocks; each is decoded into structs that name only the fields used here, and msgspec skips
the rest without building it. Every vendor's deviation is met where its field is read: reasoning under two names,
content as a list of parts, tool calls without index, id or name, arguments as an object, a finish reason in other
words, usage in five places, errors in six shapes. What cannot be an answer raises; what is an error becomes a
``Fault``.

Three rules keep what leaves here sound:

* the answer is whole once the model has given a finish reason. ``[DONE]`` alone proves nothing, so a ``[DONE]`` before
  any finish reason is kept back for ``close`` to report, and never reaches a client as a clean end;
* a tool call is announced once, with its id and name. Where they come late, its blocks wait and leave as one frame;
* the empty deltas and empty choices that servers send as keep-alives carry no event;
* what a vendor seals (``extra_content`` of a call, ``reasoning_details``) is kept as JSON and never looked into, but
  for joining the pieces of a text that came in several.

*Streams out.* A chunk is fixed bytes around one delta. Usage is kept until the end, because the last report stands and
clients expect it in one chunk before ``[DONE]``.

Requests are in ``chat_request``.
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
    Head,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    UpstreamProtocolError,
    UpstreamTruncated,
    Usage,
    UsageReport,
)
from routerd.dialects import CHOICES, CITATIONS, PICTURES, SPEECH, Chaining, Stamp
from routerd.dialects.chat_request import (
    JSON_ERRORS,
    continue_request,
    patch_request,
    read_head,
    tool_schemas,
)
from routerd.dialects.chat_translate import decode_request, encode_request, unsaid
from routerd.dialects.faults import find_fault, named_fault, read_fault, read_json, told_error
from routerd.dialects.reading import StreamDecoder
from routerd.dialects.sse import BLOCK_BYTES_MAX, DONE, Block
from routerd.dialects.tokens import cost_usd, count

DETAILS_BYTES_MAX: Final = 4 * 1024 * 1024  # of an answer's sealed thinking; of more, none is kept

_encode: Final = msgspec.json.Encoder().encode


# --- answers: the wire ------------------------------------------------------------------------------------------------


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: Any = None  # a string; some servers send the object itself


class _Piece(msgspec.Struct, gc=False):
    """A piece of a tool call."""

    index: int | None = None
    id: str | int | None = None
    function: _Function | None = None
    extra_content: msgspec.Raw = msgspec.Raw()  # Gemini's seal on a call


class _Part(msgspec.Struct, gc=False):
    """A part of content that is not one string."""

    type: str = ""
    text: str | None = None
    thinking: str | list[_Part] | None = None


class _Delta(msgspec.Struct, gc=False):
    """A delta of a stream, or the message of a whole answer: the same fields."""

    role: str | None = None
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    refusal: str | None = None
    tool_calls: list[_Piece] | None = None
    function_call: _Function | None = None
    reasoning_details: msgspec.Raw = msgspec.Raw()  # thinking as OpenRouter wants it back: a list, in pieces
    annotations: msgspec.Raw = msgspec.Raw()
    images: msgspec.Raw = msgspec.Raw()
    audio: msgspec.Raw = msgspec.Raw()


class _Choice(msgspec.Struct, gc=False):
    index: int | None = 0
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None
    usage: Any = None
    error: Any = None


class _Chunk(msgspec.Struct, gc=False):
    """A chunk of a stream, or a whole answer."""

    id: str | int | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None
    x_groq: Any = None  # an extension some servers put usage and early stops into


_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode
_NO_FUNCTION: Final = _Function()

_FINISH_REASONS: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_length": "length",
    "model_context_window_exceeded": "length",
    "repetition_truncation": "length",
    "tool_calls": "tool_calls",
    "tool_call": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "content-filter": "content_filter",
    "safety": "content_filter",
    "recitation": "content_filter",
    "prohibited_content": "content_filter",
    "blocklist": "content_filter",
    "refusal": "content_filter",
    "sensitive": "content_filter",
}
# Not the model's end but the server's: what was generated is not an answer.
_FAULT_REASONS: Final[dict[str, int | None]] = {
    "error": None,
    "abort": None,
    "cancelled": None,
    "network_error": 502,
    "insufficient_system_resource": 503,
}
_END: Final = End()
_NO_EVENTS: Final[tuple[Event, ...]] = ()


def _finish(reason: str, *, calls: bool, details: str) -> Finish:
    """Return the reason in our words; an unknown one is taken for a plain stop, since the model did give a reason.

    Some servers say ``stop`` after tool calls, which would keep a client from running them.
    """
    known = _FINISH_REASONS.get(reason) or _FINISH_REASONS.get(reason.lower(), "stop")
    return Finish("tool_calls" if calls and known == "stop" else known, details)


def _read_text(delta: _Delta, events: list[Event]) -> None:
    reasoning = delta.reasoning_content or delta.reasoning  # both: the same text twice
    if reasoning and isinstance(reasoning, str):
        events.append(ReasoningDelta(0, reasoning))
    content = delta.content
    if content:
        if isinstance(content, str):
            events.append(TextDelta(0, content))
        else:
            _read_parts(content, events)
    if delta.refusal:
        events.append(TextDelta(0, delta.refusal))


def _read_parts(parts: list[_Part], events: list[Event]) -> None:
    for part in parts:
        if part.thinking:
            thinking = part.thinking
            text = thinking if isinstance(thinking, str) else "".join(inner.text or "" for inner in thinking)
            if text:
                events.append(ReasoningDelta(0, text))
        elif part.text:
            events.append(TextDelta(0, part.text))


# --- answers: sealed thinking -----------------------------------------------------------------------------------------

_OBJECT_START, _LIST_START = b"{["
_EMPTY_LIST_BYTES: Final = 2
_JOINED_FIELDS: Final = {"reasoning.text": "text", "reasoning.summary": "summary"}  # what comes in pieces, by type
_decode_details: Final = msgspec.json.Decoder(list[list[dict[str, Any]]]).decode


class _Details:
    """The sealed thinking of one answer, collected from pieces."""

    __slots__ = ("_pieces", "_size")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, details: msgspec.Raw) -> None:
        if len(details) > _EMPTY_LIST_BYTES and memoryview(details)[0] == _LIST_START:
            self._size += len(details)
            self._pieces.append(bytes(details))
            if self._size > DETAILS_BYTES_MAX:
                self._pieces.clear()

    def text(self) -> str:
        """All of it as one JSON list, or "" if there is none or too much."""
        if not self._pieces or self._size > DETAILS_BYTES_MAX:
            return ""
        if len(self._pieces) == 1:
            return self._pieces[0].decode("utf-8", "replace")
        try:
            pieces = _decode_details(b"[" + b",".join(self._pieces) + b"]")
        except JSON_ERRORS:
            return ""
        return _encode(_joined([detail for piece in pieces for detail in piece])).decode()


def _joined(details: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbouring pieces of one text, as OpenRouter's own client does. A field's first value stands."""
    joined: list[tuple[dict[str, Any], list[str]]] = []
    for detail in details:
        field = _JOINED_FIELDS.get(str(detail.get("type")), "")
        piece = detail.get(field)
        texts = [piece] if isinstance(piece, str) else []
        if field and joined and all(joined[-1][0].get(name) == detail.get(name) for name in ("type", "index")):
            last, last_texts = joined[-1]
            last_texts += texts
            last.update({name: value for name, value in detail.items() if name != field and not last.get(name)})
        else:
            joined.append((detail, texts))
    return [
        detail | {_JOINED_FIELDS[detail["type"]]: "".join(texts)} if len(texts) > 1 else detail
        for detail, texts in joined
    ]


# --- answers: tool calls ----------------------------------------------------------------------------------------------


class _Call:
    """A tool call of the answer being read. ``pending``: arguments that came before it could be announced."""

    __slots__ = ("announced", "begun", "id", "index", "name", "pending", "signature")

    def __init__(self, index: int) -> None:
        self.index = index
        self.id = ""
        self.name = ""
        self.signature = ""
        self.pending = ""
        self.announced = False
        self.begun = False  # arguments have come

    def announce(self, events: list[Event]) -> None:
        self.announced = True
        events.append(ToolStart(self.index, self.id, self.name, self.signature))
        if self.pending:
            events.append(ToolDelta(self.index, self.pending))
            self.pending = ""


class _Calls:
    """The tool calls of one answer, collected from pieces.

    Which call a piece belongs to, in this order:

    1. it has an index that is new: a new one;
    2. it has an index we know: that one, unless it brings another id, or, without an id, another name once arguments
       have come (some servers give every parallel call the index 0);
    3. it has no index: it opens a call if it brings a name, else it continues the last one.
    """

    __slots__ = ("_last", "_slots", "count")

    def __init__(self) -> None:
        self._slots: dict[int, _Call] = {}  # by the server's index
        self._last: _Call | None = None
        self.count = 0

    @property
    def waiting(self) -> bool:
        """True while a call lacks its id or name and no arguments force it out."""
        return self._last is not None and not self._last.announced

    def read(self, piece: _Piece, events: list[Event]) -> None:
        function = piece.function or _NO_FUNCTION
        if not piece.id and not function.name and type(function.arguments) is str:
            call = self._last if piece.index is None else self._slots.get(piece.index)
            if call is not None and call.announced:  # all but the first piece of nearly every call
                if function.arguments:
                    call.begun = True
                    events.append(ToolDelta(call.index, function.arguments))
                return
        identity = "" if piece.id is None else str(piece.id)
        name, arguments = function.name or "", _arguments(function.arguments)
        call = self._find(piece.index, identity, name)
        if call is None:
            if piece.index is None and not (identity or name or arguments):
                return  # metadata of no call we know, such as a signature of its own
            call = self._open(piece.index, events)
        call.id = call.id or identity
        call.name = call.name or name
        call.signature = call.signature or _object_text(piece.extra_content)
        if not call.announced and call.name and (call.id or arguments):
            call.announce(events)
        if arguments:
            call.begun = True
            if call.announced:
                events.append(ToolDelta(call.index, arguments))
            else:
                call.pending += arguments

    def settle(self, events: list[Event]) -> None:
        """Announce a waiting call with what is known of it: nothing more will come."""
        if self._last is not None and not self._last.announced:
            self._last.announce(events)

    def _find(self, index: int | None, identity: str, name: str) -> _Call | None:
        call = self._last if index is None else self._slots.get(index)
        if call is None:
            return None
        if identity and call.id:
            return call if identity == call.id else None
        if not name or not call.name:
            return call
        if index is None:
            return None
        return None if call.begun and name != call.name else call

    def _open(self, index: int | None, events: list[Event]) -> _Call:
        self.settle(events)
        call = self._last = _Call(self.count)
        self._slots[call.index if index is None else index] = call
        self.count += 1
        return call


def _object_text(value: msgspec.Raw) -> str:
    """The JSON of an object, "" for anything else."""
    return bytes(value).decode("utf-8", "replace") if value and memoryview(value)[0] == _OBJECT_START else ""


def _arguments(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _encode(value).decode()


def _read_calls(delta: _Delta, calls: _Calls, events: list[Event]) -> None:
    for piece in delta.tool_calls or ():
        calls.read(piece, events)
    if delta.function_call is not None:
        calls.read(_Piece(None, None, delta.function_call), events)


# --- answers: usage and faults ----------------------------------------------------------------------------------------


def _read_usage(report: Any) -> UsageReport | None:
    """Read usage under any of its names; what is not a number counts as nothing.

    Cached tokens: ``prompt_tokens_details.cached_tokens`` (OpenAI), ``prompt_cache_hit_tokens`` (DeepSeek),
    ``cached_tokens`` (Moonshot), ``cache_read_input_tokens`` (gateways in front of Anthropic's models). Where the total
    exceeds prompt and completion, the rest is reasoning, billed as output but not counted as completion (xAI's docs on
    consumption say so; Gemini's compatible endpoint is seen to do the same, 2026-08).
    """
    if not isinstance(report, dict):
        return None
    prompt_details, completion_details = _details(report, "prompt"), _details(report, "completion")
    prompt, completion = count(report.get("prompt_tokens")), count(report.get("completion_tokens"))
    cached = (
        count(prompt_details.get("cached_tokens"))
        or count(report.get("prompt_cache_hit_tokens"))
        or count(report.get("cached_tokens"))
        or count(report.get("cache_read_input_tokens"))
    )
    uncounted = max(0, count(report.get("total_tokens")) - prompt - completion) if prompt else 0
    output = completion + uncounted
    reasoning = count(completion_details.get("reasoning_tokens")) or uncounted
    return UsageReport(
        Usage(
            input_tokens=prompt,
            cached_tokens=min(cached, prompt),
            output_tokens=output,
            reasoning_tokens=min(reasoning, output),
            cost_usd=cost_usd(report.get("cost")),
        )
    )


def _details(report: dict[str, Any], kind: str) -> dict[str, Any]:
    details = report.get(f"{kind}_tokens_details")
    return details if isinstance(details, dict) else {}


def _read_odd_chunk(data: bytes) -> _Chunk | Fault:
    """Second look at a chunk that is not of the usual shape. Raises ``UpstreamProtocolError``."""
    value = read_json(data)
    fault = find_fault(value)
    if fault is not None:
        return fault
    try:
        return _decode_chunk(_encode(value))  # not ``convert``, which cannot make raw JSON of a value again
    except (msgspec.ValidationError, RecursionError):
        raise UpstreamProtocolError("JSON that is no chunk of a completion") from None


# --- answers: streams -------------------------------------------------------------------------------------------------


class ChatDecoder(StreamDecoder):
    """Reads one attempt's stream."""

    __slots__ = (
        "_calls",
        "_details",
        "_ended",
        "_events",
        "_holding",
        "_raw",
        "_started",
        "unsaid",
    )

    def __init__(self) -> None:
        self.unsaid: set[str] = set()
        super().__init__()
        self._calls = _Calls()
        self._details = _Details()
        self._started = False
        self._ended = False
        self._holding = (
            False  # blocks are kept back: they wait for the rest of a tool call, or are a [DONE] out of turn
        )
        self._raw = b""  # of those blocks
        self._events: list[Event] = []  # of those blocks

    def __repr__(self) -> str:
        state = "ENDED" if self._ended else "FINISHED" if self._finished else "STARTED" if self._started else "NEW"
        return f"<ChatDecoder {state}, {self._calls.count} calls, {len(self._raw)} bytes held>"

    def _frames(self, blocks: list[Block]) -> list[Frame]:
        frames, read = [], self._read
        for block in blocks:
            events = read(block) if block.data else _NO_EVENTS
            if self._holding:
                frames += self._hold(block.raw, events)
            else:
                frames.append(Frame(block.raw, events))
        return frames

    def _hold(self, raw: bytes, events: tuple[Event, ...]) -> list[Frame]:
        """Keep a block back, or let it go with those kept before it."""
        self._raw += raw
        self._events += events
        fault = any(type(event) is Fault for event in events)
        if not fault and (self._calls.waiting or (self._ended and not self._finished)):
            if len(self._raw) > BLOCK_BYTES_MAX:
                raise UpstreamProtocolError("a tool call that never gets its name")
            return []
        frame = Frame(self._raw, tuple(self._events))
        self._raw, self._events, self._holding = b"", [], False
        return [frame]

    def _read(self, block: Block) -> tuple[Event, ...]:
        """Return the events of a block with data. The first branch is all but a few blocks of any stream."""
        try:
            chunk = _decode_chunk(block.data)
        except JSON_ERRORS:
            return self._read_odd(block)
        choices = chunk.choices
        if not choices or block.event or chunk.error is not None:
            return self._read_bare(chunk, block)
        choice = choices[0]
        delta = choice.delta
        if (
            self._started
            and delta is not None
            and not choice.finish_reason
            and chunk.usage is None
            and chunk.x_groq is None
            and not choice.index
            and choice.error is None
            and choice.usage is None
        ):
            content = delta.content
            if (
                type(content) is str
                and content
                and delta.reasoning_content is None
                and delta.reasoning is None
                and delta.tool_calls is None
                and len(delta.reasoning_details) <= _EMPTY_LIST_BYTES
            ):
                return (TextDelta(0, content),)
            events: list[Event] = []
            self._read_delta(delta, events)
            return tuple(events)
        return self._read_choice(chunk, choices)

    def _read_choice(self, chunk: _Chunk, choices: list[_Choice]) -> tuple[Event, ...]:
        """Return the events of a chunk with choices; only the first of several answers is followed."""
        choice = choices[0]
        if choice.index or len(choices) > 1:
            self.unsaid.add(CHOICES)
        if choice.index:
            others = [choice for choice in choices if not choice.index]
            if not others:
                return _NO_EVENTS
            choice = others[0]
        events: list[Event] = []
        delta = choice.delta
        if delta is not None:
            if not self._started:
                self._start(chunk, choice, delta, events)
            self._read_delta(delta, events)
        fault = self._finish(choice, events)
        _read_extras(chunk, choice, events)
        if fault is not None:
            events.append(fault)  # last: what was used until then has to be known before
        return tuple(events)

    def _read_delta(self, delta: _Delta, events: list[Event]) -> None:
        _read_text(delta, events)
        if delta.reasoning_details:
            self._details.add(delta.reasoning_details)
        if delta.tool_calls or delta.function_call is not None:
            _read_calls(delta, self._calls, events)
            self._holding = self._holding or self._calls.waiting
        for feature, value in ((CITATIONS, delta.annotations), (PICTURES, delta.images), (SPEECH, delta.audio)):
            if len(value) > _EMPTY_LIST_BYTES and bytes(value) != b"null":
                self.unsaid.add(feature)

    def _read_odd(self, block: Block) -> tuple[Event, ...]:
        """Return the events of a block that is no chunk of the usual shape."""
        if block.data == DONE:
            return self._end()
        odd = named_fault(block) or _read_odd_chunk(block.data)
        if isinstance(odd, Fault):
            return (odd,)
        return self._read_choice(odd, odd.choices) if odd.choices else self._read_bare(odd, block)

    def _end(self) -> tuple[Event, ...]:
        if self._ended:
            return _NO_EVENTS
        self._ended = True
        self._holding = self._holding or not self._finished
        return (_END,)

    def _start(self, chunk: _Chunk, choice: _Choice, delta: _Delta, events: list[Event]) -> None:
        """Begin at the first chunk that is more than a keep-alive."""
        if delta != _EMPTY_DELTA or choice.finish_reason:
            self._started = True
            events.append(Start("" if chunk.id is None else str(chunk.id), chunk.model or ""))

    def _finish(self, choice: _Choice, events: list[Event]) -> Fault | None:
        fault = _choice_fault(choice)
        if fault is None and choice.finish_reason and not self._finished:
            self._finished = True
            self._calls.settle(events)
            details = self._details.text()
            events.append(_finish(choice.finish_reason, calls=self._calls.count > 0, details=details))
        return fault

    def _read_bare(self, chunk: _Chunk, block: Block) -> tuple[Event, ...]:
        """Return the events of a chunk with a name, an error or no choices: usage, a fault, or nothing at all."""
        fault = named_fault(block) if block.event else None
        if fault is not None:
            return (fault,)
        if chunk.choices and not chunk.error:
            return self._read_choice(chunk, chunk.choices)
        events: list[Event] = []
        choice = chunk.choices[0] if chunk.choices else _NO_CHOICE
        _read_extras(chunk, choice, events)
        if chunk.error:
            events.append(read_fault(chunk.error))
        elif chunk.choices is None and not events:
            fault = find_fault(read_json(block.data))
            if fault is not None:
                events.append(fault)
        return tuple(events)


_NO_CHOICE: Final = _Choice()
_EMPTY_DELTA: Final = _Delta()


def _choice_fault(choice: _Choice) -> Fault | None:
    """Return the fault a choice reports in place of a finish."""
    if choice.error:
        return read_fault(choice.error)
    reason = (choice.finish_reason or "").lower()
    return Fault(_FAULT_REASONS[reason], reason, "") if reason in _FAULT_REASONS else None


def _read_extras(chunk: _Chunk, choice: _Choice, events: list[Event]) -> None:
    """Usage from wherever it is, and an early stop reported in the extension."""
    if chunk.usage is None and choice.usage is None and chunk.x_groq is None:
        return
    extension = chunk.x_groq if isinstance(chunk.x_groq, dict) else {}
    report = _read_usage(chunk.usage) or _read_usage(choice.usage) or _read_usage(extension.get("usage"))
    if report is not None:
        events.append(report)
    if extension.get("error"):
        events.append(read_fault(extension["error"]))


def _read_body(body: bytes) -> list[Event]:
    try:
        chunk: _Chunk | Fault = _decode_chunk(body)
    except JSON_ERRORS:
        chunk = _read_odd_chunk(body)
    if isinstance(chunk, Fault):
        return [chunk]
    choice = chunk.choices[0] if chunk.choices else _NO_CHOICE
    fault = _choice_fault(choice)
    if fault is not None:
        return [fault]
    if chunk.error or choice.message is None:
        fault = find_fault(read_json(body))
        if fault is None:
            raise UpstreamProtocolError("JSON that is no completion")
        return [fault]
    if not choice.finish_reason:
        raise UpstreamTruncated("an answer without a finish reason")
    return _read_message(chunk, choice, choice.message, choice.finish_reason)


def _read_message(chunk: _Chunk, choice: _Choice, message: _Delta, reason: str) -> list[Event]:
    events: list[Event] = [Start("" if chunk.id is None else str(chunk.id), chunk.model or "")]
    calls, details = _Calls(), _Details()
    _read_text(message, events)
    _read_calls(message, calls, events)
    calls.settle(events)
    details.add(message.reasoning_details)
    events.append(_finish(reason, calls=calls.count > 0, details=details.text()))
    _read_extras(chunk, choice, events)
    events.append(_END)
    return events


# --- answers: out -----------------------------------------------------------------------------------------------------


_CHUNK_TAIL: Final = b',"finish_reason":null}]}\n\n'


class ChatEncoder:
    """Writes one exchange's stream. Text and reasoning have one place each here, so their indexes are not written."""

    __slots__ = ("_chunk", "_head", "_include_usage", "_started", "_usage", "opened")

    def __init__(self, stamp: Stamp) -> None:
        head = {"id": stamp.id, "object": "chat.completion.chunk", "created": stamp.created, "model": stamp.model}
        self._head = b"data: " + _encode(head)[:-1]
        self._chunk = self._head + b',"choices":[{"index":0,"delta":'
        self._include_usage = stamp.include_usage
        self._usage: Usage | None = None
        self._started = False
        self.opened = False  # a keep-alive fits anywhere

    def encode(self, event: Event) -> bytes:
        return self._ENCODERS[type(event)](self, event)

    def follow(self, frames: Iterable[Frame]) -> None:
        """See ``Encoder.follow``. Chunks stand alone here."""

    def keepalive(self) -> bytes:
        """An empty delta. It has no role: clients that accumulate would join one role to the next."""
        return self._chunk + b"{}" + _CHUNK_TAIL

    def error(self, failure: Failure) -> bytes:
        """One chunk with a top-level error, as OpenRouter reports failures after the start (its docs, 2026-08)."""
        choices = b',"choices":[{"index":0,"delta":{},"finish_reason":"error"}]'
        return self._head + choices + b',"error":' + _encode(told_error(failure)) + b"}\n\n"

    def _on_start(self, _: Start) -> bytes:
        if self._started:
            return b""
        self._started = True
        return self._chunk + b'{"role":"assistant","content":""}' + _CHUNK_TAIL

    def _on_text(self, event: TextDelta) -> bytes:
        return self._chunk + b'{"content":' + _encode(event.text) + b"}" + _CHUNK_TAIL

    def _on_reasoning(self, event: ReasoningDelta) -> bytes:
        return self._chunk + b'{"reasoning_content":' + _encode(event.text) + b"}" + _CHUNK_TAIL

    def _on_tool_start(self, event: ToolStart) -> bytes:
        function = {"name": event.name, "arguments": ""}
        call = {"index": event.index, "id": event.id, "type": "function", "function": function}
        return self._tool(call | _sealed("extra_content", event.signature))

    def _on_tool_delta(self, event: ToolDelta) -> bytes:
        return self._tool({"index": event.index, "function": {"arguments": event.arguments}})

    def _tool(self, piece: dict[str, Any]) -> bytes:
        return self._chunk + b'{"tool_calls":[' + _encode(piece) + b"]}" + _CHUNK_TAIL

    def _on_usage(self, event: UsageReport) -> bytes:
        self._usage = event.usage
        return b""

    def _on_finish(self, event: Finish) -> bytes:
        delta = _encode(_sealed("reasoning_details", event.details))
        return self._chunk + delta + b',"finish_reason":' + _encode(event.reason) + b"}]}\n\n"

    def _on_end(self, _: End) -> bytes:
        done = b"data: " + DONE + b"\n\n"
        if self._usage is None or not self._include_usage:
            return done
        usage = self._head + b',"choices":[],"usage":' + _encode(_usage(self._usage)) + b"}\n\n"
        self._usage = None
        return usage + done

    def _on_fault(self, _: Fault) -> bytes:
        """Evidence for the classifier, not for a client: ``error`` is what a client is told."""
        return b""

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


def _sealed(name: str, text: str) -> dict[str, msgspec.Raw]:
    """JSON that is not ours to look into, as a field where there is any."""
    return {name: msgspec.Raw(text.encode())} if text else {}


def _usage(usage: Usage) -> dict[str, Any]:
    report = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
    return report if usage.cost_usd is None else report | {"cost": usage.cost_usd}


class _Message:
    """The message of a whole answer, folded from events."""

    __slots__ = ("_calls", "_details", "_reason", "_reasoning", "_text", "_usage")

    def __init__(self, events: Iterable[Event]) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[ToolStart, list[str]]] = {}
        self._reason: FinishReason | None = None
        self._details = ""
        self._usage: Usage | None = None
        for event in events:
            self._fold(event)

    def _fold(self, event: Event) -> None:
        match event:
            case TextDelta():
                self._text.append(event.text)
            case ReasoningDelta():
                self._reasoning.append(event.text)
            case ToolStart():
                self._calls[event.index] = (event, [])
            case ToolDelta():
                self._calls[event.index][1].append(event.arguments)
            case Finish():
                self._reason, self._details = event.reason, event.details
            case UsageReport():
                self._usage = event.usage
            case _:
                pass  # Start and End frame a stream; a whole answer has no place for them

    def encode(self, stamp: Stamp) -> bytes:
        completion: dict[str, Any] = {
            "id": stamp.id,
            "object": "chat.completion",
            "created": stamp.created,
            "model": stamp.model,
            "choices": [{"index": 0, "message": self._message(), "logprobs": None, "finish_reason": self._reason}],
        }
        if self._usage is not None:
            completion["usage"] = _usage(self._usage)
        return _encode(completion)

    def _message(self) -> dict[str, Any]:
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": None if self._calls and not text else text}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        message |= _sealed("reasoning_details", self._details)
        if self._calls:
            message["tool_calls"] = [
                {"id": start.id, "type": "function", "function": {"name": start.name, "arguments": "".join(arguments)}}
                | _sealed("extra_content", start.signature)
                for start, arguments in self._calls.values()
            ]
        return message


# --- the dialect ------------------------------------------------------------------------------------------------------


class ChatDialect:
    """``POST /v1/chat/completions``."""

    name = "chat"
    paths: tuple[str, ...] = ("/v1/chat/completions",)
    count_paths: tuple[str, ...] = ()
    upstream_path = "/chat/completions"
    upstream_headers: ClassVar[dict[str, str]] = {}
    forwarded_headers: tuple[str, ...] = ()
    key_header = ""
    continuations: frozenset[str] = frozenset({"trailing", "prefix", "partial", "flags"})
    follows = False
    chaining: Chaining | None = None

    read_head = staticmethod(read_head)
    patch_request = staticmethod(patch_request)
    decode_request = staticmethod(decode_request)
    encode_request = staticmethod(encode_request)
    unsaid = staticmethod(unsaid)
    tool_schemas = staticmethod(tool_schemas)
    continue_request = staticmethod(continue_request)
    decode_body = staticmethod(_read_body)

    def decoder(self) -> ChatDecoder:
        return ChatDecoder()

    def encoder(self, stamp: Stamp) -> ChatEncoder:
        return ChatEncoder(stamp)

    def encode_body(self, events: Iterable[Event], stamp: Stamp) -> bytes:
        return _Message(events).encode(stamp)

    def encode_count(self, head: Head) -> bytes:
        return _encode({"total_tokens": head.prompt_tokens})

    def encode_error(self, failure: Failure) -> bytes:
        return _encode({"error": told_error(failure)})


DIALECT: Final = ChatDialect()
