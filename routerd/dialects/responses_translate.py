"""Whole Responses requests <-> the canonical request, for upstreams or clients that speak another wire API.

Only used when the dialects differ; a request that stays in its dialect is never taken apart like this. What has no
place in the canonical request is dropped by name (``Request.dropped``) or, where the answer would depend on it,
refused.

* The items of one answer are one assistant turn, and results go into the user turn that they open.
* A tool that a vendor runs itself is left out as long as the model has functions to work with, and so are its traces in
  the history. Free-form tools (``custom``) are treated alike: the call of one would have to come back as what it is
  nowhere else. What they did before is told, as calls with one argument.
* Seals do not cross. Whoever sealed something gets it back from memory (``patch_request``), and to others it is noise.

What is ugly: a stop sequence and an error mark on a result exist elsewhere and not here. The first is lost
(``unsaid``), the second is left to the result's text, as in chat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import msgspec

from routerd.canonical import (
    AnswerFormat,
    BadRequest,
    Block,
    Document,
    Image,
    Message,
    Reasoning,
    Request,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from routerd.dialects.chat_request import read_request
from routerd.dialects.responses_request import NO_REFERENCE, SEALS, plain_thought, thought_text

_encode: Final = msgspec.json.Encoder().encode
_NO_SCHEMA: Final = msgspec.Raw(b'{"type":"object","properties":{}}')

# Dropped without harm to the answer; the names are the feature labels of routerd_dropped_features_total.
_DROPPABLE: Final = (
    *("metadata", "service_tier", "max_tool_calls", "top_logprobs", "prompt_cache_key", "prompt_cache_options"),
    *("prompt_cache_retention", "moderation", "context_management", "access_programs", "image"),
)
# Tools that only a server of this API has, by the name they are dropped under.
_SERVER_TOOLS: Final = {
    "web_search": "web_search",
    "web_search_2025_08_26": "web_search",
    "web_search_preview": "web_search",
    "web_search_preview_2025_03_11": "web_search",
    "file_search": "file_search",
    "code_interpreter": "code_interpreter",
    "image_generation": "image_generation",
    "mcp": "mcp",
    "computer": "computer",
    "computer_use": "computer",
    "computer_use_preview": "computer",
    "local_shell": "local_shell",
    "shell": "shell",
    "apply_patch": "apply_patch",
    "custom": "custom_tool",
    "namespace": "tool_namespace",
    "tool_search": "tool_search",
    "programmatic_tool_calling": "programmatic_tool_calling",
}
# What they leave behind in a history.
_SERVER_ITEMS: Final = frozenset(
    {
        *("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"),
        *("computer_call", "computer_call_output", "local_shell_call", "local_shell_call_output"),
        *("shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output"),
        *("mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response"),
        *("tool_search_call", "tool_search_output", "program", "program_output"),
    }
)


# --- the wire ---------------------------------------------------------------------------------------------------------


class _Part(msgspec.Struct, gc=False):
    """A piece of content of any kind."""

    type: str = "input_text"
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_data: str | None = None
    file_url: str | None = None
    filename: str | None = None
    prompt_cache_breakpoint: Any = None


class _Kind(msgspec.Struct, gc=False):
    type: str | None = None
    role: str | None = None


class _Said(msgspec.Struct, gc=False):
    role: str
    content: str | list[_Part] | None = None


class _Call(msgspec.Struct, gc=False):
    """A call of a function, whose ``arguments`` are JSON, or of a free-form tool, whose ``input`` is any text."""

    call_id: str
    name: str
    arguments: str | None = None
    input: str | None = None


class _Result(msgspec.Struct, gc=False):
    call_id: str
    output: str | list[_Part] | None = None


class _Thought(msgspec.Struct, gc=False):
    summary: list[_Part] | None = None
    content: list[_Part] | None = None
    encrypted_content: str | None = None


class _OfferedTool(msgspec.Struct, gc=False):
    type: str
    name: str = ""
    description: str | None = None
    parameters: msgspec.Raw = _NO_SCHEMA
    strict: bool | None = None


class _Thinking(msgspec.Struct, gc=False):
    effort: str | None = None


class _Format(msgspec.Struct, gc=False):
    type: str = "text"
    name: str = ""
    schema: msgspec.Raw = _NO_SCHEMA
    strict: bool | None = None


class _TextOptions(msgspec.Struct, gc=False):
    format: _Format | None = None
    verbosity: str | None = None


class _Responses(msgspec.Struct, gc=False):
    model: str
    input: str | list[msgspec.Raw]
    instructions: str | None = None
    stream: bool | None = None
    tools: list[_OfferedTool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning: _Thinking | None = None
    text: _TextOptions | None = None
    include: list[str] | None = None
    truncation: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


_decode_responses: Final = msgspec.json.Decoder(_Responses).decode
_decode_names: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_kind: Final = msgspec.json.Decoder(_Kind).decode
_decode_said: Final = msgspec.json.Decoder(_Said).decode
_decode_call: Final = msgspec.json.Decoder(_Call).decode
_decode_result: Final = msgspec.json.Decoder(_Result).decode
_decode_thought: Final = msgspec.json.Decoder(_Thought).decode


# --- in ---------------------------------------------------------------------------------------------------------------


def decode_request(body: bytes) -> Request:
    """Read a whole Responses request. Raises ``BadRequest`` for what cannot be said in another dialect."""
    return read_request(_read, body, "input")


def _read(body: bytes) -> Request:
    wire, fields = _decode_responses(body), _decode_names(body)
    dropped = [name for name in _DROPPABLE if _is_given(fields, name)]
    dropped += _dropped_options(wire)
    tools, choice = _offer(wire, dropped)
    return Request(
        model=wire.model,
        stream=wire.stream is True,
        messages=tuple(_turns(wire, dropped)),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=wire.parallel_tool_calls,
        max_output_tokens=wire.max_output_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        reasoning_effort=wire.reasoning.effort if wire.reasoning is not None else None,
        answer_format=_format(wire.text),
        user=wire.safety_identifier or wire.user,
        dropped=tuple(dict.fromkeys(dropped)),
    )


def _is_given(fields: dict[str, msgspec.Raw], name: str) -> bool:
    return bytes(fields.get(name, b"null")) not in (b"null", b"false", b"{}", b"[]", b"0")


def _dropped_options(wire: _Responses) -> Iterator[str]:
    """Thinking comes with its seals and summaries wherever an upstream gives them, so these are no loss."""
    if wire.text is not None and wire.text.verbosity is not None:
        yield "verbosity"
    if wire.truncation not in (None, "disabled"):
        yield "truncation"
    if any(name != SEALS for name in wire.include or ()):
        yield "include"


class _Turns:
    """Items on their way into turns."""

    __slots__ = ("_blocks", "_joins", "_role", "done")

    def __init__(self) -> None:
        self.done: list[Message] = []
        self._role = ""
        self._joins = False  # what the user says next belongs to this turn
        self._blocks: list[Block] = []

    def said(self, role: str, blocks: Iterable[Block]) -> None:
        """A message. That of an assistant belongs to the answer at hand, that of a user to the results before it."""
        joins = role == self._role and (role == "assistant" or self._joins)
        self._add(role, blocks, joins=joins)
        self._joins = False

    def result(self, block: ToolResult) -> None:
        self._add("user", (block,), joins=self._role == "user" and self._joins)
        self._joins = True

    def _add(self, role: str, blocks: Iterable[Block], *, joins: bool) -> None:
        if not joins:
            self.close()
            self._role = role
        self._blocks += blocks

    def close(self) -> None:
        if self._role:
            self.done.append(Message(self._role, tuple(self._blocks)))  # type: ignore[arg-type]  # one of _ROLES
        self._role, self._blocks = "", []


_ROLES: Final = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def _turns(wire: _Responses, dropped: list[str]) -> list[Message]:
    turns = _Turns()
    if wire.instructions:
        turns.said("system", (Text(wire.instructions),))
    if isinstance(wire.input, str):
        turns.said("user", (Text(wire.input),))
    else:
        for place, item in enumerate(wire.input):
            _read_item(item, place, turns, dropped)
    turns.close()
    return turns.done


def _read_item(item: msgspec.Raw, place: int, turns: _Turns, dropped: list[str]) -> None:
    try:
        wire = _decode_kind(item)
        kind = wire.type or ("message" if wire.role is not None else "item_reference")
        read = _ITEMS.get(kind)
        if read is not None:
            read(item, turns)
            return
    except msgspec.ValidationError as error:
        raise BadRequest(f"input[{place}] has the wrong shape: {error}") from None
    if kind == "item_reference":
        raise BadRequest(NO_REFERENCE, code="unsupported")
    if kind not in _SERVER_ITEMS:
        raise BadRequest(f"an item of type {kind[:40]!r} cannot be served by this route", code="unsupported")
    dropped.append(kind)


def _read_message(item: msgspec.Raw, turns: _Turns) -> None:
    said = _decode_said(item)
    role = _ROLES.get(said.role)
    if role is None:
        raise BadRequest(f"a message has the unknown role {said.role[:40]!r}")
    turns.said(role, _parts(said.content))


def _read_call(item: msgspec.Raw, turns: _Turns) -> None:
    call = _decode_call(item)
    turns.said("assistant", (ToolCall(call.call_id, call.name, call.arguments or "{}"),))


def _read_custom_call(item: msgspec.Raw, turns: _Turns) -> None:
    call = _decode_call(item)
    turns.said("assistant", (ToolCall(call.call_id, call.name, _encode({"input": call.input or ""}).decode()),))


def _read_result(item: msgspec.Raw, turns: _Turns) -> None:
    result = _decode_result(item)
    turns.result(ToolResult(result.call_id, tuple(_parts(result.output))))


def _read_thought(item: msgspec.Raw, turns: _Turns) -> None:
    thought = _decode_thought(item)
    text, seal = thought_text(thought), thought.encrypted_content or ""
    if text or seal:
        block = Reasoning(text, signature=seal) if text else Reasoning("", sealed=seal)
        turns.said("assistant", (block,))


_ITEMS: Final[dict[str, Callable[[msgspec.Raw, _Turns], None]]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_result,
    "custom_tool_call": _read_custom_call,
    "custom_tool_call_output": _read_result,
    "reasoning": _read_thought,
}


def _parts(content: str | list[_Part] | None) -> Iterator[Text | Image | Document]:
    if isinstance(content, str):
        if content:
            yield Text(content)
        return
    for part in content or ():
        read = _PARTS.get(part.type)
        if read is None:
            kind = part.type[:40]
            raise BadRequest(f"content of type {kind!r} cannot be served by this route", code="unsupported")
        yield read(part, part.prompt_cache_breakpoint is not None)


def _image_part(part: _Part, cached: bool) -> Image:
    if not part.image_url:
        raise BadRequest('an image must come as "image_url" to be served by this route', code="unsupported")
    return Image(part.image_url, cached=cached)


def _file_part(part: _Part, cached: bool) -> Document:
    data = part.file_data
    if data and not data.startswith("data:"):
        data = f"data:application/pdf;base64,{data}"
    url = data or part.file_url
    if not url:
        detail = 'a file must come as "file_data" or "file_url" to be served by this route'
        raise BadRequest(detail, code="unsupported")
    return Document(url, name=part.filename or "", cached=cached)


def _text_part(part: _Part, cached: bool) -> Text:
    return Text(part.text or "", cached=cached)


_PARTS: Final[dict[str, Callable[[_Part, bool], Text | Image | Document]]] = {
    "input_text": _text_part,
    "output_text": _text_part,
    "text": _text_part,
    "refusal": lambda part, cached: Text(part.refusal or "", cached=cached),
    "input_image": _image_part,
    "input_file": _file_part,
}


# --- tools in ---------------------------------------------------------------------------------------------------------


def _offer(wire: _Responses, dropped: list[str]) -> tuple[tuple[Tool, ...], ToolChoice | None]:
    offered = wire.tools or []
    tools = tuple(_tool(tool) for tool in offered if tool.type == "function")
    others = [_server_tool(tool.type) for tool in offered if tool.type != "function"]
    if others and not tools:
        raise _no_such_tool(others[0])
    dropped += others
    return _chosen(wire.tool_choice, tools, dropped)


def _server_tool(kind: str) -> str:
    name = _SERVER_TOOLS.get(kind)
    if name is None:
        raise _no_such_tool(kind)
    return name


def _no_such_tool(kind: str) -> BadRequest:
    return BadRequest(f"tools of type {kind[:40]!r} cannot be served by this route", code="unsupported")


def _tool(tool: _OfferedTool) -> Tool:
    """Not to be strict is the rule elsewhere, so a tool that says so says nothing."""
    schema = _NO_SCHEMA if bytes(tool.parameters) == b"null" else tool.parameters
    return Tool(tool.name, tool.description or "", schema, strict=tool.strict or None)


_CHOICES: Final = {"auto": ToolChoice("auto"), "none": ToolChoice("none"), "required": ToolChoice("required")}


def _chosen(choice: Any, tools: tuple[Tool, ...], dropped: list[str]) -> tuple[tuple[Tool, ...], ToolChoice | None]:
    """The tools to offer, and what is to be done with them."""
    if not isinstance(choice, dict):
        return tools, _CHOICES.get(choice) if isinstance(choice, str) else None
    kind = str(choice.get("type"))
    if kind == "allowed_tools":
        return _allowed(choice, tools, dropped)
    if kind != "function":
        raise _no_such_tool(kind)
    return tools, ToolChoice("named", str(choice.get("name", "")))


def _allowed(choice: Any, tools: tuple[Tool, ...], dropped: list[str]) -> tuple[tuple[Tool, ...], ToolChoice | None]:
    """Offering fewer tools says the same where there is no way to say which of them are allowed."""
    listed = choice.get("tools")
    allowed = [tool for tool in listed if isinstance(tool, dict)] if isinstance(listed, list) else []
    names = {str(tool.get("name")) for tool in allowed if tool.get("type") == "function"}
    others = [_server_tool(str(tool.get("type"))) for tool in allowed if tool.get("type") != "function"]
    if others and not names:
        raise _no_such_tool(others[0])
    dropped += others
    return tuple(tool for tool in tools if tool.name in names), _CHOICES.get(str(choice.get("mode")))


def _format(options: _TextOptions | None) -> AnswerFormat | None:
    wanted = options.format if options is not None else None
    if wanted is None or wanted.type not in ("json_object", "json_schema"):
        return None
    if wanted.type == "json_object":
        return AnswerFormat("json_object")
    return AnswerFormat("json_schema", name=wanted.name or "answer", schema=wanted.schema, strict=wanted.strict)


# --- out --------------------------------------------------------------------------------------------------------------


def encode_request(request: Request) -> bytes:
    """Write the request as Responses has it; what an upstream demands on top is ``patch_request``'s.

    The system prompt becomes ``instructions``, which stand in front of everything; what the system says later stays
    where it was said.
    """
    instructions, turns = _split(request.messages)
    fields: dict[str, Any] = {
        "model": request.model,
        "input": [item for turn in turns for item in _items(turn)],
        "store": False,
        "include": [SEALS],
    }
    optional = {
        "instructions": instructions or None,
        "stream": request.stream or None,
        "tools": [_offered(tool) for tool in request.tools] or None,
        "tool_choice": _wire_choice(request),
        "parallel_tool_calls": request.parallel_tool_calls,
        "max_output_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "reasoning": None if request.reasoning_effort is None else {"effort": request.reasoning_effort},
        "text": _wire_format(request.answer_format),
        "user": request.user,
    }
    return _encode(fields | {name: value for name, value in optional.items() if value is not None})


def unsaid(request: Request) -> tuple[str, ...]:
    """See ``Dialect.unsaid``."""
    return ("stop",) if request.stop else ()


def _split(messages: tuple[Message, ...]) -> tuple[str, tuple[Message, ...]]:
    if not messages or messages[0].role != "system":
        return "", messages
    told = [block.text for block in messages[0].blocks if isinstance(block, Text) and block.text]
    if len(messages) == 1:  # somebody has to be spoken to
        return "", messages
    return "\n\n".join(told), messages[1:]


def _items(turn: Message) -> Iterator[dict[str, Any]]:
    if turn.role == "assistant":
        yield from _answer(turn)
        return
    for block in turn.blocks:
        if isinstance(block, ToolResult):
            yield {"type": "function_call_output", "call_id": block.call_id, "output": _content(block.content)}
    rest = tuple(block for block in turn.blocks if isinstance(block, Text | Image | Document))
    if rest or not turn.blocks:
        yield {"role": "developer" if turn.role == "system" else "user", "content": _content(rest)}


def _answer(turn: Message) -> Iterator[dict[str, Any]]:
    """What an assistant said, in the short form: some servers want an id in the long one (OpenRouter's docs, 2026)."""
    for block in turn.blocks:
        match block:
            case Text():
                yield {"role": "assistant", "content": block.text}
            case Reasoning() if block.text:
                yield plain_thought(block.text)
            case ToolCall():
                call = {"call_id": block.id, "name": block.name, "arguments": block.arguments}
                yield {"type": "function_call"} | call
    if not turn.blocks:
        yield {"role": "assistant", "content": ""}


def _content(blocks: tuple[Text | Image | Document, ...]) -> str | list[dict[str, Any]]:
    """A plain string where it says as much: not every server takes parts."""
    if not blocks:
        return ""
    if len(blocks) == 1 and isinstance(blocks[0], Text):
        return blocks[0].text
    return [_part(block) for block in blocks]


def _part(block: Text | Image | Document) -> dict[str, Any]:
    """Cache marks stay away: only some models of one vendor take them, and servers of this API cache by themselves."""
    if isinstance(block, Text):
        return {"type": "input_text", "text": block.text}
    if isinstance(block, Image):
        return {"type": "input_image", "detail": "auto", "image_url": block.url}
    if block.url.startswith("data:"):
        return {"type": "input_file", "filename": block.name or "document", "file_data": block.url}
    return {"type": "input_file", "file_url": block.url}


def _offered(tool: Tool) -> dict[str, Any]:
    """``strict`` is said either way: left out, it is taken for granted here and for absent elsewhere."""
    offered = {"type": "function", "name": tool.name, "description": tool.description}
    return offered | {"parameters": tool.schema, "strict": tool.strict is True}


def _wire_choice(request: Request) -> Any:
    choice = request.tool_choice
    if choice is None or not request.tools:
        return None
    return {"type": "function", "name": choice.name} if choice.mode == "named" else choice.mode


def _wire_format(wanted: AnswerFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.kind == "json_object":
        return {"format": {"type": "json_object"}}
    told: dict[str, Any] = {"type": "json_schema", "name": wanted.name or "answer", "schema": wanted.schema}
    if wanted.schema is None:
        told["schema"] = _NO_SCHEMA
    if wanted.strict is not None:
        told["strict"] = wanted.strict
    return {"format": told}
