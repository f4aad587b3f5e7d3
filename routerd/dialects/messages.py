"""Messages, the wire API whose answers are a list of typed blocks.

Theory of operation
-------------------
*Streams in.* Every event names its type twice, in the SSE event and in the data; the data's is believed. A block is
opened, filled and closed under an index of its own. Thinking, text and tool calls become events and are counted by
kind, from the first that says something, for clients' keep-alives leave empty blocks behind. Blocks of kinds unknown
here (a server's own tools, citations) travel as bytes only. The answer is whole once a stop reason was seen: a
``message_stop`` without one is kept back, with all that follows, and ``close`` reports it.

*Streams out.* One block is open at a time. Whatever is not its continuation closes it and opens the next. The stop
reason waits for the end, because usage shares an event with it.

*Keep-alives.* A ``ping`` is not enough: the vendor's own SDK swallows it, so whoever reads through that SDK sees
silence. What gets through is an empty delta in an open block. So before the first content a keep-alive opens the
message and a text block; from then on the blocks have other indexes than the upstream's, and ``opened`` says that the
stream must be encoded to its end. In the middle of an answer that passes as it comes, ``follow`` watches which block is
open. A text block that stayed empty is taken out of the history again by ``patch_request``.

What is ugly: ``follow`` cuts a frame into its block a second time. It does so only for the few frames that are not
deltas, and so costs less than giving every frame a place for what one dialect needs.

Requests are in ``messages_request``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final, Literal

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
from routerd.dialects import CITATIONS, OTHER_CONTENT, SERVER_TOOLS, Chaining, Stamp
from routerd.dialects.chat_request import JSON_ERRORS
from routerd.dialects.faults import find_fault, named_fault, read_json, told_status
from routerd.dialects.messages_request import (
    continue_request,
    patch_request,
    read_head,
    tool_schemas,
)
from routerd.dialects.messages_translate import decode_request, encode_request, unsaid
from routerd.dialects.reading import StreamDecoder
from routerd.dialects.sse import DONE, Block, Framer
from routerd.dialects.tokens import cost_usd, count

_encode: Final = msgspec.json.Encoder().encode


# --- answers: the wire ------------------------------------------------------------------------------------------------


class _Piece(msgspec.Struct, gc=False):
    """What a delta brings, or a whole block: their fields do not clash."""

    type: str = ""
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None  # thinking that only its vendor can read
    partial_json: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw()
    stop_reason: str | None = None


class _Message(msgspec.Struct, gc=False):
    """The message as it begins, or a whole answer."""

    type: str = ""
    id: str | None = None
    model: str | None = None
    content: list[_Piece] | None = None
    stop_reason: str | None = None
    usage: Any = None


class _Event(msgspec.Struct, gc=False):
    type: str = ""
    index: int = 0
    delta: _Piece | None = None
    content_block: _Piece | None = None
    message: _Message | None = None
    usage: Any = None
    error: Any = None


_decode_event: Final = msgspec.json.Decoder(_Event).decode
_decode_message: Final = msgspec.json.Decoder(_Message).decode
_NO_EVENTS: Final[tuple[Event, ...]] = ()
_END: Final = End()
_EMPTY_PIECE: Final = _Piece()

_FINISH_REASONS: Final[dict[str, FinishReason]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
    "content_filter": "content_filter",
    "sensitive": "content_filter",
}
# Not the model's end but the server's.
_FAULT_REASONS: Final[dict[str, int | None]] = {"error": None, "abort": None, "network_error": 502}
_STOP_REASONS: Final[dict[FinishReason, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
    "error": "refusal",
}


def _ending(reason: str, *, calls: bool) -> Finish | Fault:
    """The stop reason in our words; an unknown one is a plain stop, since the model did give a reason."""
    if reason in _FAULT_REASONS:
        return Fault(_FAULT_REASONS[reason], reason, "")
    known = _FINISH_REASONS.get(reason, "stop")
    return Finish("tool_calls" if calls and known == "stop" else known)


# --- answers: usage ---------------------------------------------------------------------------------------------------


def _read_usage(report: dict[str, Any]) -> Usage:
    """``input_tokens`` leaves out what came from the cache or went into it; ours does not (API reference, 2026)."""
    cached = count(report.get("cache_read_input_tokens"))
    output = count(report.get("output_tokens"))
    details = report.get("output_tokens_details")
    thinking = count(details.get("thinking_tokens")) if isinstance(details, dict) else 0
    return Usage(
        input_tokens=count(report.get("input_tokens")) + cached + count(report.get("cache_creation_input_tokens")),
        cached_tokens=cached,
        output_tokens=output,
        reasoning_tokens=min(thinking, output),
        cost_usd=cost_usd(report.get("cost")),
    )


def _written_usage(usage: Usage) -> dict[str, Any]:
    report: dict[str, Any] = {
        "input_tokens": usage.input_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }
    if usage.reasoning_tokens:
        report["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return report if usage.cost_usd is None else report | {"cost": usage.cost_usd}


class _Meter:
    """Usage of one answer: every report adds what it names, and what it names replaces what was known of that."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def read(self, report: Any) -> UsageReport | None:
        """None while nothing but zeros is known and nobody says what went in: a placeholder, no report."""
        if not isinstance(report, dict):
            return None
        self._known |= {name: value for name, value in report.items() if value is not None}
        usage = _read_usage(self._known)
        if usage.input_tokens == 0 and usage.output_tokens == 0 and "cache_read_input_tokens" not in self._known:
            return None
        return UsageReport(usage)


# --- answers: streams in ----------------------------------------------------------------------------------------------

_Kind = Literal["text", "thinking", "tool", "other"]
_KINDS: Final[dict[str, _Kind]] = {
    "text": "text",
    "thinking": "thinking",
    "redacted_thinking": "thinking",
    "tool_use": "tool",
}


class _Open:
    """A block being read. ``place`` is its number among those of its kind, None until it says something."""

    __slots__ = ("kind", "place", "spoken")

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        self.place: int | None = None
        self.spoken = False  # a call's arguments have come


class _Blocks:
    """The blocks of one answer, and how many of each kind there were."""

    __slots__ = ("_counts", "_open", "unsaid")

    def __init__(self) -> None:
        self.unsaid: set[str] = set()
        self._open: dict[int, _Open] = {}  # by the server's index
        self._counts: dict[_Kind, int] = {"text": 0, "thinking": 0, "tool": 0}

    @property
    def calls(self) -> bool:
        return self._counts["tool"] > 0

    def start(self, index: int, piece: _Piece) -> list[Event]:
        events = self.stop(index)  # a server that closes nothing
        block = self._open[index] = _Open(_KINDS.get(piece.type, "other"))
        if block.kind == "other":
            self.unsaid.add(SERVER_TOOLS if piece.type.endswith(_SERVER_TOOL_ENDINGS) else OTHER_CONTENT)
        if block.kind == "tool":
            events.append(ToolStart(self._place(block), piece.id or "", piece.name or ""))
            arguments = bytes(piece.input).strip()
            if arguments not in (b"", b"{}", b"null"):
                block.spoken = True
                events.append(ToolDelta(self._place(block), _arguments(piece.input)))
        elif block.kind == "thinking" and piece.data:
            events.append(ReasoningDelta(self._place(block), "", sealed=piece.data))
        else:
            events += self.fill(index, piece)
        return events

    def fill(self, index: int, piece: _Piece) -> list[Event]:
        """A delta, or what a block already has when it begins."""
        block = self._open.get(index)
        if block is None:
            block = self._open[index] = _Open(_DELTA_KINDS.get(piece.type, "other"))
        events: list[Event] = []
        if block.kind == "text" and piece.text:
            events.append(TextDelta(self._place(block), piece.text))
        elif block.kind == "thinking" and (piece.thinking or piece.signature):
            events.append(ReasoningDelta(self._place(block), piece.thinking or "", piece.signature or ""))
        elif block.kind == "tool" and piece.partial_json:
            if block.place is None:
                raise UpstreamProtocolError("arguments of no call")
            block.spoken = True
            events.append(ToolDelta(block.place, piece.partial_json))
        elif piece.type == "citations_delta":
            self.unsaid.add(CITATIONS)
        return events

    def stop(self, index: int) -> list[Event]:
        """A call without arguments says so only by ending."""
        block = self._open.pop(index, None)
        if block is None or block.kind != "tool" or block.spoken or block.place is None:
            return []
        return [ToolDelta(block.place, "{}")]

    def _place(self, block: _Open) -> int:
        if block.place is None:
            block.place = self._counts[block.kind]
            self._counts[block.kind] += 1
        return block.place


_SERVER_TOOL_ENDINGS: Final = ("server_tool_use", "mcp_tool_use", "_tool_result")
_DELTA_KINDS: Final[dict[str, _Kind]] = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "thinking",
    "input_json_delta": "tool",
}


def _arguments(value: msgspec.Raw) -> str:
    return bytes(value).decode("utf-8", "replace")


class MessagesDecoder(StreamDecoder):
    """Reads one attempt's stream."""

    __slots__ = ("_blocks", "_broken", "_ended", "_meter", "_started")

    def __init__(self) -> None:
        super().__init__()
        self._blocks = _Blocks()
        self._meter = _Meter()
        self._started = False
        self._ended = False
        self._broken = False  # it claimed its end without a stop reason: nothing of that goes on

    def __repr__(self) -> str:
        state = "ENDED" if self._ended else "FINISHED" if self._finished else "STARTED" if self._started else "NEW"
        return f"<MessagesDecoder {state}>"

    @property
    def unsaid(self) -> set[str]:
        """See ``Decoder``."""
        return self._blocks.unsaid

    def _frames(self, blocks: list[Block]) -> list[Frame]:
        frames = []
        for block in blocks:
            events = self._read(block) if block.data else _NO_EVENTS
            if not self._broken:
                frames.append(Frame(block.raw, events))
        return frames

    def _read(self, block: Block) -> tuple[Event, ...]:
        try:
            event = _decode_event(block.data)
        except JSON_ERRORS:
            return self._read_odd(block)
        kind = event.type
        if kind == "content_block_delta":
            return tuple(self._blocks.fill(event.index, event.delta or _EMPTY_PIECE))
        read = self._READERS.get(kind)
        if read is None:
            return self._read_other(event, block)
        return read(self, event)

    def _read_odd(self, block: Block) -> tuple[Event, ...]:
        """What is no event of the usual shape."""
        if block.data == DONE:
            return _NO_EVENTS
        fault = named_fault(block) or find_fault(read_json(block.data))
        if fault is None:
            raise UpstreamProtocolError("JSON that is no event of a message")
        return (fault,)

    def _read_other(self, event: _Event, block: Block) -> tuple[Event, ...]:
        """Errors, in any place they are put; pings, and events of kinds nobody knew of when this was written."""
        if event.type == "ping":
            return _NO_EVENTS
        fault = named_fault(block)
        if fault is None and (event.error or event.type in ("", "error")):
            fault = find_fault(read_json(block.data))
        return _NO_EVENTS if fault is None else (fault,)

    def _on_start(self, event: _Event) -> tuple[Event, ...]:
        message = event.message
        if self._started or message is None:
            return _NO_EVENTS
        self._started = True
        report = self._meter.read(message.usage)
        start = Start(message.id or "", message.model or "")
        return (start, report) if report is not None and report.usage.input_tokens else (start,)

    def _on_block_start(self, event: _Event) -> tuple[Event, ...]:
        return tuple(self._blocks.start(event.index, event.content_block or _EMPTY_PIECE))

    def _on_block_stop(self, event: _Event) -> tuple[Event, ...]:
        return tuple(self._blocks.stop(event.index))

    def _on_message_delta(self, event: _Event) -> tuple[Event, ...]:
        events: list[Event] = []
        reason = event.delta.stop_reason if event.delta is not None else None
        if reason and not self._finished:
            ending = _ending(reason, calls=self._blocks.calls)
            self._finished = isinstance(ending, Finish)
            events.append(ending)
        report = self._meter.read(event.usage)
        if report is not None:
            events.append(report)
        events.sort(key=_faults_last)
        return tuple(events)

    def _on_message_stop(self, _: _Event) -> tuple[Event, ...]:
        if self._ended:
            return _NO_EVENTS
        self._ended = True
        self._broken = not self._finished
        return _NO_EVENTS if self._broken else (_END,)

    _READERS: ClassVar[dict[str, Callable[[Any, _Event], tuple[Event, ...]]]] = {
        "message_start": _on_start,
        "content_block_start": _on_block_start,
        "content_block_stop": _on_block_stop,
        "message_delta": _on_message_delta,
        "message_stop": _on_message_stop,
    }


def _faults_last(event: Event) -> bool:
    """What was used until then has to be known before."""
    return type(event) is Fault


def _read_body(body: bytes) -> list[Event]:
    try:
        message: _Message | None = _decode_message(body)
    except JSON_ERRORS:
        message = None
    if message is None or message.content is None:
        fault = find_fault(read_json(body))
        if fault is None:
            raise UpstreamProtocolError("JSON that is no message")
        return [fault]
    if not message.stop_reason:
        raise UpstreamTruncated("an answer without a stop reason")
    return _read_message(message, message.content, message.stop_reason)


def _read_message(message: _Message, content: list[_Piece], reason: str) -> list[Event]:
    events: list[Event] = [Start(message.id or "", message.model or "")]
    blocks = _Blocks()
    for index, piece in enumerate(content):
        events += blocks.start(index, piece)
        events += blocks.stop(index)
    ending = _ending(reason, calls=blocks.calls)
    if isinstance(ending, Fault):
        return [ending]
    events.append(ending)
    report = _Meter().read(message.usage)
    if report is not None:
        events.append(report)
    events.append(_END)
    return events


# --- answers: streams out ---------------------------------------------------------------------------------------------

_DELTA: Final = b"event: content_block_delta"
_KEEPALIVES: Final[dict[str, dict[str, str]]] = {
    "text": {"type": "text_delta", "text": ""},
    "thinking": {"type": "thinking_delta", "thinking": ""},
}
_PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'
_NO_OUTPUT: Final = {"output_tokens": 0}  # the least a client must find; read back, it says nothing


class MessagesEncoder:
    """Writes one exchange's stream.

    ``opened``: it has said something of its own, so an upstream's bytes do not fit behind it any more.
    """

    __slots__ = ("_index", "_key", "_kind", "_reason", "_stamp", "_started", "_stopped", "_told", "_usage", "opened")

    def __init__(self, stamp: Stamp) -> None:
        self._stamp = stamp
        self._started = False
        self._index = -1  # of the last block
        self._kind = ""  # of the open block
        self._key: int | None = None  # the open block's place among its kind, None if anything may go on in it
        self._reason: FinishReason | None = None
        self._told = False  # the stop reason is out
        self._stopped = False
        self._usage: Usage | None = None
        self.opened = False

    def encode(self, event: Event) -> bytes:
        return self._ENCODERS[type(event)](self, event)

    def keepalive(self) -> bytes:
        """An empty delta in the open block; before one is open, the message and a text block for it."""
        if self._reason is not None or self._told or self._kind == "tool_use":
            return _PING
        if not self._kind:
            self.opened = True
            return self._begin() + self._open_text(None) + self._delta(_KEEPALIVES["text"])
        return self._delta(_KEEPALIVES[self._kind]) if self._kind in _KEEPALIVES else _PING

    def error(self, failure: Failure) -> bytes:
        return b"event: error\ndata: " + _encode(_error(failure)) + b"\n\n"

    def follow(self, frames: Iterable[Frame]) -> None:
        """Note what an upstream's own bytes, sent on as they came, have opened and closed."""
        for frame in frames:
            if frame.raw[: len(_DELTA)] != _DELTA:
                for block in Framer().feed(frame.raw):
                    self._follow(block)

    def _follow(self, block: Block) -> None:
        try:
            event = _decode_event(block.data)
        except JSON_ERRORS:
            return
        if event.type == "message_start":
            self._started = True
        elif event.type == "content_block_start" and event.content_block is not None:
            self._index, self._kind, self._key = event.index, event.content_block.type, None
        elif event.type == "content_block_stop":
            self._kind = ""
        elif event.type == "message_delta":
            self._told = self._told or bool(event.delta and event.delta.stop_reason)
        elif event.type == "message_stop":
            self._stopped = True

    # --- one method per kind of event -------------------------------------------------------------------------------

    def _on_start(self, event: Start) -> bytes:  # noqa: ARG002 - every encoder has the same shape
        return self._begin()

    def _on_text(self, event: TextDelta) -> bytes:
        opening = b"" if self._continues("text", event.index) else self._begin() + self._open_text(event.index)
        return opening + self._delta({"type": "text_delta", "text": event.text})

    def _on_reasoning(self, event: ReasoningDelta) -> bytes:
        if event.sealed:
            return self._begin() + self._sealed(event.sealed)
        opening = b""
        if not self._continues("thinking", event.index):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            opening = self._begin() + self._open("thinking", event.index, block)
        text = self._delta({"type": "thinking_delta", "thinking": event.text}) if event.text else b""
        seal = self._delta({"type": "signature_delta", "signature": event.signature}) if event.signature else b""
        return opening + text + seal

    def _sealed(self, data: str) -> bytes:
        block = {"type": "redacted_thinking", "data": data}
        return self._open("redacted_thinking", None, block) + self._close()

    def _on_tool_start(self, event: ToolStart) -> bytes:
        block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
        return self._begin() + self._open("tool_use", event.index, block)

    def _on_tool_delta(self, event: ToolDelta) -> bytes:
        return self._delta({"type": "input_json_delta", "partial_json": event.arguments})

    def _on_usage(self, event: UsageReport) -> bytes:
        self._usage = event.usage
        return b""

    def _on_finish(self, event: Finish) -> bytes:
        self._reason = event.reason
        return self._begin() + self._close()

    def _on_end(self, _: End) -> bytes:
        """Nothing without a stop reason: half an answer never ends cleanly."""
        if self._stopped or not (self._told or self._reason is not None):
            return b""
        self._stopped = True
        return self._tell() + _event({"type": "message_stop"})

    def _on_fault(self, _: Fault) -> bytes:
        """Evidence for the classifier, not for a client: ``error`` is what a client is told."""
        return b""

    def _tell(self) -> bytes:
        if self._told or self._reason is None:
            return b""
        self._told = True
        delta = {"stop_reason": _STOP_REASONS[self._reason], "stop_sequence": None}
        usage = _NO_OUTPUT if self._usage is None else _written_usage(self._usage)
        return _event({"type": "message_delta", "delta": delta, "usage": usage})

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _begin(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        message: dict[str, Any] = {
            "id": self._stamp.id,
            "type": "message",
            "role": "assistant",
            "model": self._stamp.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        return _event({"type": "message_start", "message": message})

    def _continues(self, kind: str, key: int) -> bool:
        if self._kind != kind or (self._key is not None and self._key != key):
            return False
        self._key = key
        return True

    def _open_text(self, key: int | None) -> bytes:
        return self._open("text", key, {"type": "text", "text": ""})

    def _open(self, kind: str, key: int | None, block: dict[str, Any]) -> bytes:
        closing = self._close()
        self._index += 1
        self._kind, self._key = kind, key
        return closing + _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return _event({"type": "content_block_stop", "index": self._index})

    def _delta(self, delta: dict[str, str]) -> bytes:
        event = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return _DELTA + b"\ndata: " + _encode(event) + b"\n\n"

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


def _event(event: dict[str, Any]) -> bytes:
    name: str = event["type"]
    return b"event: " + name.encode() + b"\ndata: " + _encode(event) + b"\n\n"


# --- whole answers ----------------------------------------------------------------------------------------------------


class _Answer:
    """The blocks of a whole answer, folded from events, in the order in which they began."""

    __slots__ = ("_blocks", "_pieces", "_reason", "_usage")

    def __init__(self, events: Iterable[Event]) -> None:
        self._blocks: dict[tuple[str, int], dict[str, Any]] = {}
        self._pieces: dict[tuple[str, int], list[str]] = {}
        self._reason: FinishReason | None = None
        self._usage: Usage | None = None
        for event in events:
            self._fold(event)

    def _fold(self, event: Event) -> None:
        match event:
            case TextDelta():
                self._add(("text", event.index), {"type": "text"}, event.text)
            case ReasoningDelta():
                self._fold_thinking(event)
            case ToolStart():
                self._add(("tool_use", event.index), {"type": "tool_use", "id": event.id, "name": event.name}, "")
            case ToolDelta():
                self._pieces["tool_use", event.index].append(event.arguments)
            case Finish():
                self._reason = event.reason
            case UsageReport():
                self._usage = event.usage
            case _:
                pass  # Start and End frame a stream; a whole answer has no place for them

    def _fold_thinking(self, event: ReasoningDelta) -> None:
        if event.sealed:
            block = {"type": "redacted_thinking", "data": event.sealed}
            self._add(("redacted_thinking", event.index), block, "")
            return
        self._add(("thinking", event.index), {"type": "thinking"}, event.text)
        if event.signature:
            self._blocks["thinking", event.index]["signature"] = event.signature

    def _add(self, key: tuple[str, int], block: dict[str, Any], text: str) -> None:
        if key not in self._blocks:
            self._blocks[key] = block
            self._pieces[key] = []
        self._pieces[key].append(text)

    def encode(self, stamp: Stamp) -> bytes:
        message = {
            "id": stamp.id,
            "type": "message",
            "role": "assistant",
            "model": stamp.model,
            "content": [self._whole(key) for key in self._blocks],
            "stop_reason": None if self._reason is None else _STOP_REASONS[self._reason],
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0} if self._usage is None else _written_usage(self._usage),
        }
        return _encode(message)

    def _whole(self, key: tuple[str, int]) -> dict[str, Any]:
        kind, block, text = key[0], self._blocks[key], "".join(self._pieces[key])
        if kind == "text":
            return block | {"text": text}
        if kind == "thinking":
            return {"signature": ""} | block | {"thinking": text}
        return block if kind == "redacted_thinking" else block | {"input": msgspec.Raw(text.encode() or b"{}")}


# --- errors -----------------------------------------------------------------------------------------------------------

_ERRORS: Final[dict[int, str]] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _error(failure: Failure) -> dict[str, Any]:
    status = told_status(failure)
    kind = _ERRORS.get(status) or _ERRORS[400 if status < 500 else 500]
    return {"type": "error", "error": {"type": kind, "message": failure.detail}}


# --- the dialect ------------------------------------------------------------------------------------------------------


class MessagesDialect:
    """``POST /v1/messages``."""

    name = "messages"
    paths: tuple[str, ...] = ("/v1/messages", "/anthropic/v1/messages")
    count_paths: tuple[str, ...] = tuple(f"{path}/count_tokens" for path in paths)
    upstream_path = "/messages"
    upstream_headers: ClassVar[dict[str, str]] = {"anthropic-version": "2023-06-01"}
    forwarded_headers: tuple[str, ...] = ("anthropic-beta",)
    key_header = "x-api-key"
    continuations: frozenset[str] = frozenset({"trailing"})
    follows = True
    chaining: Chaining | None = None

    read_head = staticmethod(read_head)
    patch_request = staticmethod(patch_request)
    decode_request = staticmethod(decode_request)
    encode_request = staticmethod(encode_request)
    unsaid = staticmethod(unsaid)
    tool_schemas = staticmethod(tool_schemas)
    continue_request = staticmethod(continue_request)
    decode_body = staticmethod(_read_body)

    def decoder(self) -> MessagesDecoder:
        return MessagesDecoder()

    def encoder(self, stamp: Stamp) -> MessagesEncoder:
        return MessagesEncoder(stamp)

    def encode_body(self, events: Iterable[Event], stamp: Stamp) -> bytes:
        return _Answer(events).encode(stamp)

    def encode_count(self, head: Head) -> bytes:
        return _encode({"input_tokens": head.prompt_tokens})

    def encode_error(self, failure: Failure) -> bytes:
        return _encode(_error(failure))


DIALECT: Final = MessagesDialect()
