"""What a simulated model says and what goes wrong while it says it: scripts, as data.

* A ``Script`` holds the turns of a server, one for each chat request in order of arrival; the last one repeats.
* A ``Turn`` is an ``Answer`` (what the model says) and perhaps a ``Fault`` (what goes wrong, and where). A fault that
  strikes at a place (``PLACED_KINDS`` x ``PLACES``) interrupts a healthy answer there; any other kind replaces or
  spoils the whole answer, and its place means nothing.
* An answer is composed from the request like a model would: text for text; a call of the first offered tool, with
  arguments its schema accepts, if the conversation has not called yet; a closing text after tool results. It depends on
  nothing but the request, so a conversation may wander between several servers.
* Asked to go on with an answer that broke off, a model does so: ``gone_on_with``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec
import orjson

from routerd.canonical import COMPLETE, FinishReason, Usage

MAX_SCHEMA_DEPTH = 16

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


# --- going on with an answer that broke off -------------------------------------------------------------------------


def shown_text(request: Received) -> str | None:
    """The part of an answer that is to be gone on with; None if that is not what is asked."""
    messages = request.body["messages"]
    if messages[-1]["role"] == "assistant":
        return str(messages[-1]["content"])
    asked = len(messages) > 1 and messages[-2]["role"] == "assistant" and COMPLETE in str(messages[-1]["content"])
    return str(messages[-2]["content"]) if asked else None


def gone_on_with(answer: Answer, request: Received, others: Sequence[Answer] = ()) -> Answer:
    """What a model says to this request: its answer, or the rest of one that broke off.

    It goes on with its own text, or with that of one of the ``others`` it finds begun.
    """
    shown = shown_text(request)
    if shown is None:
        return answer
    prefilled = request.chat.messages[-1].role == "assistant"
    for one in (answer, *others):
        for text, calls in ((one.text, answer.calls), (one.final_text, ())):
            if text is not None and text.startswith(shown):
                nothing = "" if prefilled or calls else COMPLETE
                return msgspec.structs.replace(answer, text=text[len(shown) :] or nothing, calls=calls)
    return answer
