"""A scripted model server on a loopback port: healthy by default, faulty exactly where a script says so.

Theory of operation
-------------------
It stands in for a vendor in three places: as the providers ``routerd serve`` starts with when it has no key at all, as
the upstream of ``routerd drill``, and as the fake the tests are built on. So it speaks HTTP/1.1 over bare transports:
a web framework would repair, or refuse to send, most of what has to go wrong here.

* A ``Script`` holds the turns, one for each chat request in order of arrival; the last one repeats.
* A ``Turn`` is an ``Answer`` (what the model says) and perhaps a ``Fault`` (what goes wrong, and where). A fault that
  strikes at a place (``PLACED_KINDS`` x ``PLACES``) interrupts a healthy answer there; any other kind replaces or
  spoils the whole answer, and its place means nothing.
* An answer is composed from the request like a model would: text for text; a call of the first offered tool, with
  arguments its schema accepts, if the conversation has not called yet; a closing text after tool results. It depends on
  nothing but the request, so a conversation may wander between several servers.
* Composed events carry marks: the index at which each place lies. A place the answer lacks falls through to the next
  one it has, so that a fault always strikes. For an answer that is not streamed, places are fractions of its body.

What is ugly: ``refuse`` cannot be a reaction to a request, since a closed port receives none. The listener is closed as
soon as a refusing turn comes next, and the port is kept bound meanwhile so that nobody else can take it.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import struct
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import msgspec
import orjson

from routerd.canonical import FinishReason, Usage

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_CONNECTIONS = 4096
MAX_SCHEMA_DEPTH = 16
BACKLOG = 1024

TEXT = "This is a simulated answer from routerd; add a provider key to reach a real model."
BEFORE_CALL_TEXT = "This is a simulated answer from routerd; it calls a tool to show that tools work."
AFTER_CALL_TEXT = (
    "This is a simulated answer from routerd: the tool has answered. Add a provider key to reach a real model."
)
REASONING = "A simulated model does not think, it only pretends to."

PlacedKind = Literal["stall", "pause", "reset", "tear", "eof", "error", "malformed"]
WholeKind = Literal[
    "status",
    "refuse",
    "html",
    "json_error",
    "json_body",
    "empty",
    "empty_content",
    "length",
    "bad_arguments",
    "cut_arguments",
]
Kind = PlacedKind | WholeKind
Place = Literal[
    "before_headers", "before_content", "in_reasoning", "mid_text", "mid_call", "between_calls", "before_finish"
]

Headers = tuple[tuple[str, str], ...]

PLACED_KINDS: tuple[PlacedKind, ...] = get_args(PlacedKind)
WHOLE_KINDS: tuple[WholeKind, ...] = get_args(WholeKind)
KINDS: tuple[Kind, ...] = PLACED_KINDS + WHOLE_KINDS
PLACES: tuple[Place, ...] = get_args(Place)


# --- scripts --------------------------------------------------------------------------------------------------------


class Call(msgspec.Struct, frozen=True):
    """A tool call. ``arguments`` is JSON text, sent as it stands. Without an ``id`` a fresh one is made.

    ``signature``: JSON that is sent as the call's ``extra_content``.
    """

    name: str
    arguments: str = "{}"
    id: str = ""
    signature: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says. Whatever is None is made up from the request.

    ``text`` comes before the calls, or alone; ``final_text`` after tool results. ``calls``, when given, are made in
    every turn but the one after tool results; when None, ``parallel`` calls of the first offered tool are.
    ``pace_s`` is the pause between events, ``piece`` the characters in one; ``comments`` puts a comment line before
    each. ``headers`` are added to the answer's own.
    """

    text: str | None = None
    final_text: str | None = None
    reasoning: str = ""
    reasoning_field: Literal["reasoning_content", "reasoning"] = "reasoning_content"
    calls: tuple[Call, ...] | None = None
    parallel: int = 1
    finish: FinishReason | None = None
    usage: Usage | None = None
    headers: Headers = ()
    comments: bool = False
    pace_s: float = 0.0
    piece: int = 16


class Fault(msgspec.Struct, frozen=True):
    """What goes wrong.

    ``stall`` is silent until the client leaves; ``pause`` is silent for ``seconds`` and then goes on. With
    ``comment_s`` either of them sends a comment line that often, once the headers are out. ``reset`` is a TCP RST,
    ``tear`` a FIN inside the HTTP body, ``eof`` a complete HTTP answer whose stream just stops. ``error`` is an error
    event (before the headers: a plain 500), ``malformed`` an event cut in two (before the headers: no HTTP at all).
    ``refuse`` closes the port for ``seconds``; 0 is for good.
    ``status``, ``headers`` and ``body`` belong to ``status``; an ``error`` event carries ``status`` as its code.
    """

    kind: Kind
    place: Place = "before_headers"
    seconds: float = 0.0
    comment_s: float | None = None
    status: int = 0
    headers: Headers = ()
    body: bytes | None = None


class Turn(msgspec.Struct, frozen=True):
    """The behaviour of one request."""

    answer: Answer = Answer()
    fault: Fault | None = None


def _status(status: int, *headers: tuple[str, str]) -> Fault:
    return Fault("status", status=status, headers=headers)


FAULTS: Mapping[str, Fault | None] = {
    "ok": None,
    "400": _status(400),
    "401": _status(401),
    "402": _status(402),
    "403": _status(403),
    "404": _status(404),
    "413": _status(413),
    "429": _status(429, ("retry-after", "1")),
    "500": _status(500),
    "503": _status(503),
    "529": _status(529),
    "refuse": Fault("refuse"),
    "hang": Fault("stall", "before_headers"),
    "stall": Fault("stall", "mid_text"),
    "pause": Fault("pause", "mid_text", seconds=1.0),
    "reset": Fault("reset", "mid_text"),
    "tear": Fault("tear", "mid_text"),
    "eof": Fault("eof", "mid_text"),
    "error": Fault("error", "mid_text"),
    "malformed": Fault("malformed", "mid_text"),
    "html": Fault("html"),
    "json": Fault("json_error"),
    "json_error": Fault("json_error"),
    "json_body": Fault("json_body"),
    "empty": Fault("empty"),
    "empty_content": Fault("empty_content"),
    "length": Fault("length"),
    "bad_arguments": Fault("bad_arguments"),
    "cut_arguments": Fault("cut_arguments"),
}


def turn_for(name: str) -> Turn:
    """The turn a fault's name in a config stands for: ``ok``, ``503``, ``stall``, or with a place ``stall:mid_call``.

    Raises ValueError for a name or a place that does not exist.
    """
    kind, _, place = name.partition(":")
    if kind not in FAULTS or (place and (kind not in PLACED_KINDS or place not in PLACES)):
        raise ValueError(f"no such fault: {name!r}; there are {', '.join(FAULTS)}, some of them with :place")
    fault = FAULTS[kind]
    if fault is not None and place:
        fault = msgspec.structs.replace(fault, place=place)
    return Turn(fault=fault)


class Message(msgspec.Struct, frozen=True):
    role: str


class Function(msgspec.Struct, frozen=True):
    name: str
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    function: Function | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Chat(msgspec.Struct, frozen=True):
    """What the model looks at in a request."""

    messages: list[Message]
    model: str = "model"
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @property
    def after_tools(self) -> bool:
        """True if the conversation ends with a tool's result."""
        return bool(self.messages) and self.messages[-1].role == "tool"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True


class Received(msgspec.Struct, frozen=True):
    """A chat request as it came. ``number`` counts from 1; ``headers`` have lower-case names; ``raw`` is the body."""

    number: int
    path: str
    headers: dict[str, str]
    raw: bytes
    chat: Chat

    @property
    def body(self) -> Any:
        """The whole body, parsed."""
        return orjson.loads(self.raw)


Step = Turn | Callable[[Received], Turn]


class Script:
    """The turns of a server, one for each chat request in order of arrival; the last one repeats.

    A step may be a function of the request instead (it cannot refuse). None at all is one healthy turn.
    """

    def __init__(self, *steps: Step) -> None:
        self._steps = steps or (Turn(),)
        self._played = 0

    def upcoming(self) -> Turn | None:
        """The next turn, None while it depends on the request."""
        step = self._steps[self._played]
        return step if isinstance(step, Turn) else None

    def play(self, request: Received) -> Turn:
        """The turn of this request, which is over with that."""
        step = self._steps[self._played]
        self.skip()
        return step if isinstance(step, Turn) else step(request)

    def skip(self) -> None:
        self._played = min(self._played + 1, len(self._steps) - 1)


# --- what the model says --------------------------------------------------------------------------------------------


class Said(msgspec.Struct, frozen=True):
    """A composed answer."""

    id: str
    model: str
    created: int
    reasoning: str
    text: str
    calls: tuple[Call, ...]
    finish: FinishReason
    usage: Usage


def example(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """A simple value that a JSON schema accepts: the required properties and nothing more.

    Knows types, enum, const, default, local references, alternatives and simple bounds, but no patterns or formats.
    """
    if depth > MAX_SCHEMA_DEPTH or not isinstance(schema, dict):
        return "simulated"
    root = schema if root is None else root
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    if "$ref" in schema:
        return example(_resolve(schema["$ref"], root), root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return example(schema[key][0], root, depth + 1)
    return _EXAMPLES[_type_of(schema)](schema, root, depth + 1)


def _resolve(reference: str, root: Any) -> Any:
    for part in reference.removeprefix("#/").split("/"):
        root = root.get(part, {}) if isinstance(root, dict) else {}
    return root


def _type_of(schema: dict[str, Any]) -> str:
    found = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(found, list):
        found = next((name for name in found if name != "null"), "null")
    return found if found in _EXAMPLES else "string"


def _object(schema: dict[str, Any], root: Any, depth: int) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    return {name: example(properties.get(name, {}), root, depth) for name in schema.get("required") or ()}


def _array(schema: dict[str, Any], root: Any, depth: int) -> list[Any]:
    return [example(schema.get("items", {}), root, depth) for _ in range(schema.get("minItems", 0))]


def _string(schema: dict[str, Any], _root: Any, _depth: int) -> str:
    padded: str = "simulated".ljust(schema.get("minLength", 0), "-")
    return padded[: schema.get("maxLength")]


def _number(schema: dict[str, Any], _root: Any, _depth: int) -> float:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    value: float = min(max(1, low), schema.get("maximum", schema.get("exclusiveMaximum", low + 2) - 1))
    return value


_EXAMPLES: Mapping[str, Callable[[dict[str, Any], Any, int], Any]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _number,
    "number": _number,
    "boolean": lambda _schema, _root, _depth: False,
    "null": lambda _schema, _root, _depth: None,
}


def compose(turn: Turn, request: Received, model_suffix: str) -> Said:
    """What the model answers to this request, spoiled if the fault is one that spoils answers as a whole."""
    answer, fault, chat = turn.answer, turn.fault, request.chat
    place = fault.place if fault and fault.kind in PLACED_KINDS else None
    calls = () if chat.after_tools else _calls(answer, chat, place)
    text = _text(answer, chat, calls)
    reasoning = answer.reasoning or (REASONING if place == "in_reasoning" else "")
    said = Said(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        model=chat.model if chat.model.endswith(model_suffix) else chat.model + model_suffix,
        created=int(time.time()),
        reasoning=reasoning,
        text=text,
        calls=calls,
        finish=answer.finish or ("tool_calls" if calls else "stop"),
        usage=answer.usage or _usage(request.raw, reasoning, text, calls),
    )
    spoil = _SPOILS.get(fault.kind) if fault else None
    return spoil(said) if spoil else said


def _text(answer: Answer, chat: Chat, calls: tuple[Call, ...]) -> str:
    if chat.after_tools:
        return AFTER_CALL_TEXT if answer.final_text is None else answer.final_text
    if answer.text is None:
        return BEFORE_CALL_TEXT if calls else TEXT
    return answer.text


def _calls(answer: Answer, chat: Chat, place: Place | None) -> tuple[Call, ...]:
    if answer.calls is None:
        function = _wanted_function(chat)
        count = max(answer.parallel, 2 if place == "between_calls" else 1)
        calls = () if function is None else (_call_of(function),) * count
    else:
        calls = answer.calls
    return tuple(call if call.id else msgspec.structs.replace(call, id=f"call_{uuid.uuid4().hex}") for call in calls)


def _wanted_function(chat: Chat) -> Function | None:
    """The function the request demands by name, else the first one offered, else None."""
    functions = [tool.function for tool in chat.tools or () if tool.function]
    if chat.tool_choice == "none" or not functions:
        return None
    choice = chat.tool_choice if isinstance(chat.tool_choice, dict) else {}
    name = choice.get("function", {}).get("name")
    return next((function for function in functions if function.name == name), functions[0])


def _call_of(function: Function) -> Call:
    arguments = example({"type": "object"} | (function.parameters or {}))
    return Call(function.name, orjson.dumps(arguments).decode())


def _usage(raw: bytes, reasoning: str, text: str, calls: tuple[Call, ...]) -> Usage:
    """About four bytes to a token, as with most tokenizers on English and JSON."""
    arguments = sum(len(call.name) + len(call.arguments) for call in calls)
    reasoned = len(reasoning) // 4
    return Usage(
        input_tokens=max(1, len(raw) // 4),
        output_tokens=reasoned + max(1, (len(text) + arguments) // 4),
        reasoning_tokens=reasoned,
    )


def _half(text: str) -> str:
    return text[: len(text) // 2]


def _with_arguments(said: Said, spoiled: Callable[[str], str], finish: FinishReason) -> Said:
    calls = tuple(Call(call.name, spoiled(call.arguments), call.id) for call in said.calls)
    return msgspec.structs.replace(said, calls=calls, finish=finish if calls else said.finish)


def _cut_short(said: Said) -> Said:
    """The output limit is reached: inside the last call, or inside the text when there is none."""
    if said.calls:
        return _with_arguments(said, _half, "length")
    return msgspec.structs.replace(said, text=_half(said.text), finish="length")


_SPOILS: Mapping[Kind, Callable[[Said], Said]] = {
    "empty_content": lambda said: msgspec.structs.replace(said, reasoning="", text="", calls=(), finish="stop"),
    "length": _cut_short,
    "bad_arguments": lambda said: _with_arguments(said, lambda text: text[:-1] + ' "extra" ' + text[-1:], "tool_calls"),
    "cut_arguments": lambda said: _with_arguments(said, _half, "tool_calls"),
}


# --- how it is put on the wire --------------------------------------------------------------------------------------

EVENT_STREAM = "text/event-stream"
JSON = "application/json"
COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
CHUNKED = "transfer-encoding: chunked"
UNTIL_CLOSE = "connection: close"
LAST_CHUNK = b"0\r\n\r\n"
HTML = b"<!DOCTYPE html><html><head><title>Welcome</title></head><body>Please sign in.</body></html>"

_STATUS_ERRORS: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request_error", "This deployment does not accept the request."),
    401: ("invalid_api_key", "The key is not valid."),
    402: ("insufficient_credits", "The balance is used up."),
    403: ("permission_denied", "The key may not use this."),
    404: ("model_not_found", "The model does not exist."),
    413: ("request_too_large", "The request is too large."),
    429: ("rate_limit_exceeded", "Too many requests, retry later."),
    500: ("internal_error", "The server failed."),
    503: ("overloaded", "The service is overloaded."),
    529: ("overloaded_error", "The service is overloaded."),
}


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def pieces(text: str, size: int) -> list[str]:
    """The text in pieces of ``size`` characters, but at least two pieces if it has two characters."""
    size = max(1, min(size, (len(text) + 1) // 2))
    return [text[at : at + size] for at in range(0, len(text), size)]


def error_body(status: int) -> bytes:
    code, message = _STATUS_ERRORS.get(status, ("error", "The request failed."))
    return orjson.dumps({"error": {"message": message, "type": code, "code": code}})


def head(status: int, content_type: str, framing: str, headers: Headers = ()) -> bytes:
    """The status line and the headers. ``framing`` is the header that says where the body ends."""
    lines = [
        f"HTTP/1.1 {status} {http.client.responses.get(status, 'Status')}",
        f"content-type: {content_type}",
        framing,
    ]
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def plain(status: int, content_type: str, body: bytes, headers: Headers = ()) -> bytes:
    """A whole HTTP answer."""
    return head(status, content_type, f"content-length: {len(body)}", headers) + body


class Streamed:
    """A composed answer as events, and the index at which each place lies."""

    def __init__(self, said: Said, answer: Answer, *, include_usage: bool) -> None:
        self.events: list[bytes] = []
        self.marks: dict[Place, int] = {}
        self._said = said
        self._say({"role": "assistant", "content": ""})
        self.marks["before_content"] = len(self.events)
        self._pieces("in_reasoning", pieces(said.reasoning, answer.piece), lambda text: {answer.reasoning_field: text})
        self._pieces("mid_text", pieces(said.text, answer.piece), lambda text: {"content": text})
        for index, call in enumerate(said.calls):
            self._call(index, call, answer.piece)
        self.marks["before_finish"] = len(self.events)
        self._say({}, said.finish)
        if include_usage:
            self.events.append(sse(self._envelope() | {"choices": [], "usage": wire_usage(said.usage)}))
        self.events.append(DONE)

    def position(self, place: Place) -> int:
        """The index of the event before which a fault at this place strikes."""
        following = PLACES[PLACES.index(place) :]
        return next(self.marks[later] for later in following if later in self.marks)

    def _envelope(self) -> dict[str, Any]:
        said = self._said
        return {"id": said.id, "object": "chat.completion.chunk", "created": said.created, "model": said.model}

    def _say(self, delta: dict[str, Any], finish: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self.events.append(sse(self._envelope() | {"choices": [choice]}))

    def _pieces(self, place: Place, texts: list[str], delta: Callable[[str], dict[str, Any]]) -> None:
        for text in texts:
            self._say(delta(text))
            self.marks.setdefault(place, len(self.events))

    def _call(self, index: int, call: Call, piece: int) -> None:
        if index == 1:
            self.marks["between_calls"] = len(self.events)
        self._say({"tool_calls": [{"index": index} | _wire_call(call, "")]})
        self._pieces(
            "mid_call",
            pieces(call.arguments, piece),
            lambda text: {"tool_calls": [{"index": index, "function": {"arguments": text}}]},
        )


def _wire_call(call: Call, arguments: str) -> dict[str, Any]:
    seal = {"extra_content": orjson.loads(call.signature)} if call.signature else {}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}} | seal


def whole(said: Said, answer: Answer) -> bytes:
    """A composed answer as the JSON body of a request that does not stream."""
    message: dict[str, Any] = {"role": "assistant", "content": said.text or None}
    if said.reasoning:
        message[answer.reasoning_field] = said.reasoning
    if said.calls:
        message["tool_calls"] = [_wire_call(call, call.arguments) for call in said.calls]
    choice = {"index": 0, "message": message, "finish_reason": said.finish}
    envelope = {"id": said.id, "object": "chat.completion", "created": said.created, "model": said.model}
    return orjson.dumps(envelope | {"choices": [choice], "usage": wire_usage(said.usage)})


def wire_usage(usage: Usage) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
    return counts if usage.cost_usd is None else counts | {"cost": usage.cost_usd}


# --- where faults strike --------------------------------------------------------------------------------------------


class Strike(NamedTuple):
    """Send this, then: ``wait`` some seconds and go on, ``skip`` the event, ``hang``, ``reset`` or ``close`` the
    connection, or ``keep`` it and be done.
    """

    data: bytes
    then: Literal["wait", "skip", "hang", "reset", "close", "keep"]


def strike_before_headers(fault: Fault) -> Strike:
    status = fault.status or 500
    return {
        "stall": Strike(b"", "hang"),
        "pause": Strike(b"", "wait"),
        "reset": Strike(b"", "reset"),
        "tear": Strike(b"HTTP/1.1 200 OK\r\ncontent-ty", "close"),
        "eof": Strike(b"", "close"),
        "error": Strike(plain(status, JSON, error_body(status)), "keep"),
        "malformed": Strike(b"this is not HTTP\r\n\r\n", "close"),
    }[fault.kind]


def strike_in_stream(fault: Fault, event: bytes) -> Strike:
    """``event`` is the one that would have come next."""
    half = event[: len(event) // 2]
    return {
        "stall": Strike(b"", "hang"),
        "pause": Strike(b"", "wait"),
        "reset": Strike(b"", "reset"),
        "tear": Strike(chunk(event)[: -len(half)], "close"),
        "eof": Strike(LAST_CHUNK, "keep"),
        "error": Strike(chunk(error_event(fault.status or 502)) + LAST_CHUNK, "keep"),
        "malformed": Strike(chunk(half + b"\n\n"), "skip"),
    }[fault.kind]


def strike_in_body(fault: Fault, body: bytes, headers: Headers) -> Strike:
    """Head and the part of the body that still comes; after ``wait`` the rest of it follows."""
    part = body[: cut_of(body, fault.place)]
    whole_head = head(200, JSON, f"content-length: {len(body)}", headers)
    return {
        "stall": Strike(whole_head + part, "hang"),
        "pause": Strike(whole_head + part, "wait"),
        "reset": Strike(whole_head + part, "reset"),
        "tear": Strike(whole_head + part, "close"),
        "eof": Strike(head(200, JSON, UNTIL_CLOSE, headers) + part, "close"),
        "error": Strike(plain(200, JSON, error_body(fault.status or 502), headers), "keep"),
        "malformed": Strike(plain(200, JSON, part, headers), "keep"),
    }[fault.kind]


def cut_of(body: bytes, place: Place) -> int:
    return len(body) * PLACES.index(place) // len(PLACES)


def error_event(status: int) -> bytes:
    error = {"code": status, "message": "The model failed while it answered."}
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    return sse({"id": "chatcmpl-error", "object": "chat.completion.chunk", "error": error, "choices": [choice]})


def replacement(fault: Fault, *, stream: bool) -> bytes | None:
    """The whole HTTP answer of a fault that replaces the model's, None if it does not."""
    match fault.kind:
        case "status":
            body = error_body(fault.status) if fault.body is None else fault.body
            return plain(fault.status, JSON, body, fault.headers)
        case "html":
            return plain(200, "text/html; charset=utf-8", HTML)
        case "json_error":
            return plain(200, JSON, error_body(fault.status or 503))
        case "empty":
            return head(200, EVENT_STREAM, CHUNKED) + LAST_CHUNK if stream else plain(200, JSON, b"")
        case _:
            return None


# --- connections ----------------------------------------------------------------------------------------------------


class Over(Exception):
    """The script ends this answer here. ``keep``: the connection serves on."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self.keep = keep


class BadHttp(Exception):
    """The client's request is not HTTP we understand, or over a bound."""


class Connection(asyncio.Protocol):
    """One client connection: reads a request, plays its turn, and so on until either side has had enough.

    A client that closes its sending side has hung up: whatever is being answered is cancelled at once.
    """

    def __init__(self, server: SimulatedServer) -> None:
        self._server = server
        self._reader = asyncio.StreamReader(limit=MAX_HEAD_BYTES)
        self._writable = asyncio.Event()
        self.answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # not isinstance: uvloop's is none
        self._reader.set_transport(self._transport)
        self._transport.set_write_buffer_limits(0)  # drained means: handed to the kernel
        self._writable.set()
        self.task = asyncio.get_running_loop().create_task(self._serve())
        self.lost = asyncio.get_running_loop().create_future()
        self.task.add_done_callback(self._ended)
        self._server.joined(self)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A script's own function has failed: say so, and let no client wait."""
        if not task.cancelled() and (error := task.exception()):
            self.abort()
            task.get_loop().call_exception_handler({"message": "a script has failed", "exception": error})

    def data_received(self, data: bytes) -> None:
        self._reader.feed_data(data)

    def eof_received(self) -> None:
        self._reader.feed_eof()
        if self.answering:
            self.task.cancel()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._reader.feed_eof()
        self.task.cancel()
        self.lost.set_result(None)
        self._server.left(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def send(self, data: bytes) -> None:
        """Returns when the kernel has the bytes."""
        if data:
            self._transport.write(data)
            await self._writable.wait()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        """Close without sending what is still buffered."""
        self._transport.abort()

    def reset(self) -> None:
        """Close with a TCP RST."""
        found = self._transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(found.fileno())) as shared:  # some loops hide setsockopt on their own object
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # reading

    async def _serve(self) -> None:
        try:
            while await self._serve_one():
                pass
        except asyncio.IncompleteReadError:
            pass  # the client left between or inside requests
        except BadHttp:
            await self.send(plain(400, JSON, error_body(400), (("connection", "close"),)))
        self.close()

    async def _serve_one(self) -> bool:
        """Serve the next request; False if the connection ends with it."""
        try:
            method, path, headers = await self._read_head()
            raw = await self._read_body(headers)
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise BadHttp(str(error)) from error
        self.answering, keep = True, True
        try:
            await self._server.answer(self, method, path, headers, raw)
        except Over as over:
            keep = over.keep
        finally:
            self.answering = False
        return keep and headers.get("connection", "").lower() != "close" and not self._server.refusing

    async def _read_head(self) -> tuple[str, str, dict[str, str]]:
        raw = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        method, path, _version = first.split(" ")
        fields = (line.partition(":") for line in lines)
        return method, path.partition("?")[0], {name.lower(): value.strip() for name, _, value in fields}

    async def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("expect", "").lower() == "100-continue":
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in headers.get("transfer-encoding", ""):
            return await self._read_chunks()
        length = int(headers.get("content-length") or 0)
        if not 0 <= length <= MAX_BODY_BYTES:
            raise ValueError("the body is too long")
        return await self._reader.readexactly(length)

    async def _read_chunks(self) -> bytes:
        body = bytearray()
        while size := int((await self._reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            if not 0 < size <= MAX_BODY_BYTES - len(body):
                raise ValueError("the body is too long")
            body += (await self._reader.readexactly(size + 2))[:-2]
        while await self._reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return bytes(body)

    # playing

    async def play(self, turn: Turn, request: Received, model_suffix: str) -> None:
        """Answer as the turn says. Raises Over where the script ends the answer early."""
        fault = turn.fault
        if fault and fault.kind in PLACED_KINDS and fault.place == "before_headers":
            await self._strike(strike_before_headers(fault), fault)
            fault = None
        replaced = replacement(fault, stream=bool(request.chat.stream)) if fault else None
        if replaced is not None:
            await self.send(replaced)
            return
        said = compose(turn, request, model_suffix)
        if request.chat.stream and not (fault and fault.kind == "json_body"):
            streamed = Streamed(said, turn.answer, include_usage=request.chat.include_usage)
            await self._play_stream(streamed, turn.answer, fault)
        else:
            await self._play_body(whole(said, turn.answer), turn.answer, fault)

    async def _play_stream(self, streamed: Streamed, answer: Answer, fault: Fault | None) -> None:
        placed = fault if fault and fault.kind in PLACED_KINDS else None
        position = streamed.position(placed.place) if placed else -1
        await self.send(head(200, EVENT_STREAM, CHUNKED, answer.headers))
        for index, event in enumerate(streamed.events):
            if answer.comments:
                await self.send(chunk(COMMENT))
            if placed and index == position:
                strike = strike_in_stream(placed, event)
                await self._strike(strike, placed, chunk(COMMENT))
                if strike.then == "skip":
                    continue
            await self.send(chunk(event))
            if answer.pace_s:
                await asyncio.sleep(answer.pace_s)
        await self.send(LAST_CHUNK)

    async def _play_body(self, body: bytes, answer: Answer, fault: Fault | None) -> None:
        if fault and fault.kind in PLACED_KINDS:
            await self._strike(strike_in_body(fault, body, answer.headers), fault)
            await self.send(body[cut_of(body, fault.place) :])
        else:
            await self.send(plain(200, JSON, body, answer.headers))

    async def _strike(self, strike: Strike, fault: Fault, comment: bytes = b"") -> None:
        """Returns if the answer goes on, else raises Over (or hangs until the client leaves)."""
        await self.send(strike.data)
        match strike.then:
            case "skip":
                return
            case "wait":
                await self._silence(fault.seconds, fault.comment_s, comment)
                return
            case "hang":
                await self._silence(float("inf"), fault.comment_s, comment)
            case "reset":
                self.reset()
        raise Over(keep=strike.then == "keep")

    async def _silence(self, seconds: float, comment_s: float | None, comment: bytes) -> None:
        every_s = comment_s if comment_s and comment else float("inf")
        until = asyncio.get_running_loop().time() + seconds
        while (left := until - asyncio.get_running_loop().time()) > 0:
            await _sleep(min(left, every_s))
            if left > every_s:
                await self.send(comment)


async def _sleep(seconds: float) -> None:
    """Sleep; infinity is until cancelled."""
    if seconds == float("inf"):
        await asyncio.get_running_loop().create_future()
    await asyncio.sleep(seconds)


# --- the server -----------------------------------------------------------------------------------------------------


class SimulatedServer:
    """A chat-completions server on an ephemeral loopback port that plays a script.

    ``model_suffix`` ends the model's name in every answer. ``on_change`` is called whenever a request has arrived, or
    ``open_connections``, ``answering`` or ``refusing`` (true while the port is closed) has changed.
    """

    def __init__(
        self,
        script: Script,
        *,
        model_suffix: str = "-simulated",
        models: tuple[str, ...] = ("simulated",),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.requests = 0
        self.answering = 0
        self.refusing = True
        self.base_url = ""
        self._script = script
        self._suffix = model_suffix
        self._models = models
        self._on_change = on_change
        self._connections: set[Connection] = set()
        self._joining: set[asyncio.Task[Any]] = set()
        self._port = 0
        self._reopening: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        state = "refusing" if self.refusing else "listening"
        return f"<SimulatedServer {self.base_url} {state}, {self.requests} requests, {self.answering} answering>"

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    async def start(self) -> str:
        """Open the port (unless the script begins by refusing) and return the base URL, which ends in ``/v1``."""
        self._socket = self._bind()
        self.base_url = f"http://127.0.0.1:{self._port}/v1"
        self._listen()
        self._follow_script()
        return self.base_url

    async def close(self) -> None:
        """Close the port and every connection, and wait until nothing of it runs."""
        if self._reopening:
            self._reopening.cancel()
        self._stop_listening()
        await asyncio.gather(*self._joining)
        tasks = [connection.task for connection in self._connections]
        lost = [connection.lost for connection in self._connections]
        for connection in self._connections:
            connection.task.cancel()
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*lost)

    def _bind(self) -> socket.socket:
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", self._port))
        self._port = bound.getsockname()[1]
        return bound

    def _listen(self) -> None:
        self._socket.listen(BACKLOG)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)
        self.refusing = False

    def _stop_listening(self) -> None:
        if not self.refusing:
            asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self.refusing = True

    def _accept(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            accepted.close()
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(lambda: Connection(self), accepted))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    # refusing

    def _follow_script(self) -> None:
        """Close the port if the next turn is to refuse, and open it again when that is over."""
        turn = self._script.upcoming()
        if turn is None or turn.fault is None or turn.fault.kind != "refuse":
            return
        self._stop_listening()
        self._socket = self._bind()  # a listening socket cannot be made to refuse; one that is only bound does
        for connection in self._connections:
            if not connection.answering:
                connection.close()
        if turn.fault.seconds:
            self._reopening = asyncio.get_running_loop().call_later(turn.fault.seconds, self._reopen)

    def _reopen(self) -> None:
        self._script.skip()
        self._listen()
        self._follow_script()
        self._on_change()

    # answering

    async def answer(self, connection: Connection, method: str, path: str, headers: dict[str, str], raw: bytes) -> None:
        if method == "POST" and path.endswith("/chat/completions"):
            await self._answer_chat(connection, path, headers, raw)
        elif method == "GET" and "/models" in path:
            await connection.send(self._answer_models(path))
        else:
            await connection.send(plain(404, JSON, error_body(404)))

    async def _answer_chat(self, connection: Connection, path: str, headers: dict[str, str], raw: bytes) -> None:
        try:
            chat = msgspec.json.decode(raw, type=Chat)
        except msgspec.MsgspecError:
            await connection.send(plain(400, JSON, error_body(400)))
            return
        if self.refusing:  # it slipped in while the port was closing
            connection.reset()
            raise Over(keep=False)
        self.requests += 1
        self.answering += 1
        request = Received(self.requests, path, headers, raw, chat)
        try:
            turn = self._next_turn(request)
            self._on_change()
            await connection.play(turn, request, self._suffix)
        finally:
            self.answering -= 1
            self._on_change()

    def _next_turn(self, request: Received) -> Turn:
        turn = self._script.play(request)
        if turn.fault and turn.fault.kind == "refuse":
            raise ValueError("a function of the request cannot refuse it: it has come already")
        self._follow_script()
        if not self.refusing:
            return turn
        headers = (*turn.answer.headers, ("connection", "close"))
        return msgspec.structs.replace(turn, answer=msgspec.structs.replace(turn.answer, headers=headers))

    def _answer_models(self, path: str) -> bytes:
        name = path.partition("/models")[2].removeprefix("/")
        if name and name not in self._models:
            return plain(404, JSON, error_body(404))
        cards = [self._card(model) for model in self._models]
        return plain(200, JSON, orjson.dumps(self._card(name) if name else {"object": "list", "data": cards}))

    def _card(self, model: str) -> dict[str, Any]:
        return {
            "id": model,
            "object": "model",
            "created": 0,
            "owned_by": "routerd",
            "context_length": 131072,
            "max_completion_tokens": 32768,
        }

    def joined(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._on_change()

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._on_change()
