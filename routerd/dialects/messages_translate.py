"""Whole Messages requests <-> the canonical request, for upstreams or clients that speak another wire API.

Only used when the dialects differ; a request that stays in its dialect is never taken apart like this. What has no
place in the canonical request is dropped by name (``Request.dropped``) or, where the answer would depend on it,
refused: tools that the vendor itself would run, and files that only it holds.

What is ugly: a budget for thinking and an effort are two currencies, and what one is worth in the other is our guess
(``EFFORT_BUDGETS``). And a demand for just any JSON object exists in chat alone; here it becomes a sentence.
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
from routerd.dialects.chat_request import JSON_ERRORS, mended
from routerd.dialects.messages_request import EFFORT_BUDGETS, effort_for

_encode: Final = msgspec.json.Encoder().encode
_NO_SCHEMA: Final = msgspec.Raw(b'{"type":"object","properties":{}}')

# Dropped without harm to the answer; the names are the feature labels of routerd_dropped_features_total.
_DROPPABLE: Final = ("top_k", "service_tier", "context_management", "inference_geo", "speed", "cache_control")
# The answer would not be what was asked for without these.
_REFUSED: Final = {
    "mcp_servers": "only a vendor that speaks this API connects to MCP servers itself",
    "container": "containers live at one vendor",
}
JSON_ONLY: Final = "Answer with one JSON object and nothing else."


# --- the wire ---------------------------------------------------------------------------------------------------------


class _Part(msgspec.Struct, gc=False):
    """A content block of any kind."""

    type: str = "text"
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")
    tool_use_id: str = ""
    content: str | list[_Part] | None = None
    is_error: bool | None = None
    source: dict[str, Any] | None = None
    title: str | None = None
    cache_control: Any = None


class _Turn(msgspec.Struct, gc=False):
    role: str
    content: str | list[_Part] = ""


class _OfferedTool(msgspec.Struct, gc=False):
    name: str = ""
    type: str | None = None
    description: str = ""
    input_schema: msgspec.Raw = msgspec.Raw()
    strict: bool | None = None
    cache_control: Any = None


class _Choice(msgspec.Struct, gc=False):
    type: str = "auto"
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class _Thinking(msgspec.Struct, gc=False):
    type: str = ""
    budget_tokens: int | None = None


class _Format(msgspec.Struct, gc=False):
    type: str = ""
    schema: msgspec.Raw = _NO_SCHEMA


class _OutputConfig(msgspec.Struct, gc=False):
    effort: str | None = None
    format: _Format | None = None


class _Metadata(msgspec.Struct, gc=False):
    user_id: str | None = None


class _Messages(msgspec.Struct, gc=False):
    model: str
    messages: list[_Turn]
    system: str | list[_Part] | None = None
    stream: bool | None = None
    tools: list[_OfferedTool] | None = None
    tool_choice: _Choice | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    thinking: _Thinking | None = None
    output_config: _OutputConfig | None = None
    output_format: _Format | None = None
    metadata: _Metadata | None = None


_decode_messages: Final = msgspec.json.Decoder(_Messages).decode
_decode_names: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_object: Final = _decode_names


# --- in ---------------------------------------------------------------------------------------------------------------


def decode_request(body: bytes) -> Request:
    """Read a whole Messages request. Raises ``BadRequest`` for what cannot be said in another dialect."""
    wire, fields = _read(body)
    for name, why in _REFUSED.items():
        if _is_given(fields, name):
            raise BadRequest(f'"{name}" cannot be served by this route: {why}', code="unsupported")
    effort, budget = _effort(wire)
    choice = wire.tool_choice
    config = wire.output_config or _OutputConfig()
    return Request(
        model=wire.model,
        stream=wire.stream is True,
        messages=tuple(_turns(wire)),
        tools=tuple(_tools(wire.tools or [])),
        tool_choice=_choice(choice),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        max_output_tokens=wire.max_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        stop=tuple(wire.stop_sequences or ()),
        reasoning_effort=effort,
        reasoning_budget_tokens=budget,
        answer_format=_format(config.format or wire.output_format),
        user=wire.metadata.user_id if wire.metadata is not None else None,
        dropped=tuple(name for name in _DROPPABLE if _is_given(fields, name)),
    )


def _read(body: bytes) -> tuple[_Messages, dict[str, msgspec.Raw]]:
    try:
        try:
            return _decode_messages(body), _decode_names(body)
        except msgspec.ValidationError:
            raise
        except JSON_ERRORS:
            body = mended(body)
            return _decode_messages(body), _decode_names(body)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise BadRequest(f"the request has the wrong shape: {error}") from None


def _is_given(fields: dict[str, msgspec.Raw], name: str) -> bool:
    return bytes(fields.get(name, b"null")) not in (b"null", b"false", b"{}", b"[]", b"0", b"0.0")


def _effort(wire: _Messages) -> tuple[str | None, int | None]:
    """How much to think, if the request says: as an effort, and as a budget where one was given.

    Not to think at all is the rule here and an exception elsewhere that not every server knows how to ask for, so that
    is left unsaid.
    """
    thinking = wire.thinking
    stated = wire.output_config.effort if wire.output_config is not None else None
    if thinking is None or thinking.type == "disabled":
        return stated, None
    if thinking.budget_tokens is not None:
        return stated or effort_for(thinking.budget_tokens), thinking.budget_tokens
    return stated, None


def _turns(wire: _Messages) -> Iterator[Message]:
    if wire.system:
        yield Message("system", tuple(_blocks(wire.system)))
    for turn in wire.messages:
        if turn.role not in ("system", "user", "assistant"):
            raise BadRequest(f"a message has the unknown role {turn.role[:40]!r}")
        yield Message(turn.role, tuple(_blocks(turn.content)))  # type: ignore[arg-type]  # checked above


def _blocks(content: str | list[_Part]) -> Iterator[Block]:
    if isinstance(content, str):
        if content:
            yield Text(content)
        return
    for part in content:
        read = _PARTS.get(part.type)
        if read is None:
            kind = part.type[:40]
            raise BadRequest(f"content of type {kind!r} cannot be served by this route", code="unsupported")
        yield from read(part)


def _text_part(part: _Part) -> Iterator[Block]:
    if part.text:
        yield Text(part.text, cached=part.cache_control is not None)


def _thinking_part(part: _Part) -> Iterator[Block]:
    yield Reasoning(part.thinking or "", signature=part.signature or "")


def _sealed_part(part: _Part) -> Iterator[Block]:
    yield Reasoning("", sealed=part.data or "")


def _call_part(part: _Part) -> Iterator[Block]:
    arguments = bytes(part.input).decode("utf-8", "replace")
    yield ToolCall(part.id, part.name, arguments, cached=part.cache_control is not None)


def _result_part(part: _Part) -> Iterator[Block]:
    content = tuple(block for block in _blocks(part.content or "") if isinstance(block, Text | Image | Document))
    yield ToolResult(part.tool_use_id, content, bool(part.is_error), cached=part.cache_control is not None)


def _image_part(part: _Part) -> Iterator[Block]:
    yield Image(_url(part), cached=part.cache_control is not None)


def _document_part(part: _Part) -> Iterator[Block]:
    """A text is a text, whatever it came as; the model sees its title before it."""
    source, cached = part.source or {}, part.cache_control is not None
    title = f"{part.title}\n\n" if part.title else ""
    if source.get("type") == "text":
        yield Text(title + str(source.get("data", "")), cached=cached)
    elif source.get("type") == "content":
        yield from _blocks(msgspec.convert(source.get("content") or "", str | list[_Part]))
    else:
        yield Document(_url(part), name=part.title or "", cached=cached)


def _url(part: _Part) -> str:
    source = part.source or {}
    if source.get("type") == "base64":
        return f"data:{source.get('media_type', '')};base64,{source.get('data', '')}"
    if source.get("type") == "url":
        return str(source.get("url", ""))
    detail = f"a source of type {str(source.get('type'))[:40]!r} cannot be served by this route: send the data itself"
    raise BadRequest(detail, code="unsupported")


_PARTS: Final[dict[str, Callable[[_Part], Iterator[Block]]]] = {
    "text": _text_part,
    "thinking": _thinking_part,
    "redacted_thinking": _sealed_part,
    "image": _image_part,
    "document": _document_part,
    "tool_use": _call_part,
    "tool_result": _result_part,
}


def _tools(tools: list[_OfferedTool]) -> Iterator[Tool]:
    for tool in tools:
        if tool.type not in (None, "custom"):
            raise BadRequest(f"tools of type {tool.type[:40]!r} cannot be served by this route", code="unsupported")
        schema = tool.input_schema or _NO_SCHEMA
        yield Tool(tool.name, tool.description, schema, tool.strict, cached=tool.cache_control is not None)


def _choice(choice: _Choice | None) -> ToolChoice | None:
    if choice is None:
        return None
    return ToolChoice("named", choice.name) if choice.type == "tool" else _CHOICES.get(choice.type)


_CHOICES: Final = {"auto": ToolChoice("auto"), "any": ToolChoice("required"), "none": ToolChoice("none")}


def _format(wanted: _Format | None) -> AnswerFormat | None:
    if wanted is None or wanted.type != "json_schema":
        return None
    return AnswerFormat("json_schema", name="answer", schema=wanted.schema)


# --- out --------------------------------------------------------------------------------------------------------------


def encode_request(request: Request) -> bytes:
    """Write the request as Messages has it; what an upstream demands on top is ``patch_request``'s."""
    system, turns = _split(request)
    forced = request.tool_choice is not None and request.tool_choice.mode in ("required", "named")
    thinking = None if forced else _wire_thinking(request)
    optional = {
        "system": system or None,
        "stream": request.stream or None,
        "tools": [_offered(tool) for tool in request.tools] or None,
        "tool_choice": _wire_choice(request),
        "max_tokens": request.max_output_tokens,
        # The vendor takes 0 to 1, not both of these at once, and neither while thinking (API reference, 2026).
        "temperature": None if request.temperature is None or thinking else min(request.temperature, 1.0),
        "top_p": None if request.temperature is not None or thinking else request.top_p,
        "stop_sequences": [text for text in request.stop if text.strip()] or None,
        "thinking": thinking,
        "output_config": _wire_output(request, thinking=thinking is not None),
        "metadata": None if request.user is None else {"user_id": request.user},
    }
    fields = {"model": request.model, "messages": turns}
    return _encode(fields | {name: value for name, value in optional.items() if value is not None})


def unsaid(request: Request) -> tuple[str, ...]:
    """See ``Dialect.unsaid``."""
    forced = request.tool_choice is not None and request.tool_choice.mode in ("required", "named")
    thinking = _wire_thinking(request) is not None
    gone = {
        "reasoning_effort": thinking and forced,
        "temperature": request.temperature is not None and thinking and not forced,
        "top_p": request.top_p is not None and (request.temperature is not None or (thinking and not forced)),
    }
    return tuple(name for name, dropped in gone.items() if dropped)


def _wire_thinking(request: Request) -> dict[str, Any] | None:
    budget = request.reasoning_budget_tokens
    if budget is None and request.reasoning_effort is not None:
        budget = EFFORT_BUDGETS.get(request.reasoning_effort)
    return None if budget is None else {"type": "enabled", "budget_tokens": budget}


def _wire_output(request: Request, *, thinking: bool) -> dict[str, Any] | None:
    wanted = request.answer_format
    config: dict[str, Any] = {}
    if wanted is not None and wanted.kind == "json_schema":
        config["format"] = {"type": "json_schema", "schema": wanted.schema or _NO_SCHEMA}
    if thinking and request.reasoning_effort is not None:
        config["effort"] = _EFFORT_NAMES.get(request.reasoning_effort, request.reasoning_effort)
    return config or None


_EFFORT_NAMES: Final = {"minimal": "low"}


def _split(request: Request) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The system prompt, and the turns: neighbours of one role are one, and none is empty."""
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for message in request.messages:
        blocks = list(_wire_blocks(message.blocks))
        if message.role == "system" and not turns:
            system += blocks
            continue
        role = "assistant" if message.role == "assistant" else "user"  # a later system turn can only be said aloud
        if blocks and turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    if request.answer_format is not None and request.answer_format.kind == "json_object":
        system.append({"type": "text", "text": JSON_ONLY})
    for turn in turns:
        if turn["role"] == "user":
            turn["content"].sort(key=_results_first)
    return system, turns


def _results_first(block: dict[str, Any]) -> bool:
    return bool(block["type"] != "tool_result")


def _wire_blocks(blocks: Iterable[Block]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        written = _wire_block(block)
        if written is not None:
            cached = not isinstance(block, Reasoning) and block.cached
            yield written | {"cache_control": {"type": "ephemeral"}} if cached else written


def _wire_block(block: Block) -> dict[str, Any] | None:
    """None for a text that says nothing: the vendor refuses it."""
    match block:
        case Text():
            return {"type": "text", "text": block.text} if block.text.strip() else None
        case Image():
            return {"type": "image", "source": _source(block.url)}
        case Document():
            title = {"title": block.name} if block.name else {}
            return {"type": "document", "source": _source(block.url)} | title
        case Reasoning():
            if block.sealed:
                return {"type": "redacted_thinking", "data": block.sealed}
            return {"type": "thinking", "thinking": block.text, "signature": block.signature}
        case ToolCall():
            return {"type": "tool_use", "id": block.id, "name": block.name, "input": _wire_input(block.arguments)}
    return _wire_result(block)


def _wire_result(block: ToolResult) -> dict[str, Any]:
    content = list(_wire_blocks(block.content))
    result = {"type": "tool_result", "tool_use_id": block.call_id, "content": content}
    return result | {"is_error": True} if block.is_error else result


def _source(url: str) -> dict[str, str]:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:"):
        return {"type": "url", "url": url}
    return {"type": "base64", "media_type": head[len("data:") :].partition(";")[0], "data": data}


def _wire_input(arguments: str) -> msgspec.Raw:
    """The arguments as they are; what is no object, in a history that went wrong elsewhere, is an empty one."""
    try:
        _decode_object(arguments)
    except JSON_ERRORS:
        return msgspec.Raw(b"{}")
    return msgspec.Raw(arguments.encode())


def _offered(tool: Tool) -> dict[str, Any]:
    offered: dict[str, Any] = {"name": tool.name, "input_schema": _wire_schema(tool.schema)}
    if tool.description:
        offered["description"] = tool.description
    if tool.strict:
        offered["strict"] = True
    return offered | {"cache_control": {"type": "ephemeral"}} if tool.cached else offered


def _wire_schema(schema: msgspec.Raw) -> msgspec.Raw:
    """The vendor wants to be told that arguments are an object."""
    try:
        fields = _decode_object(schema)
    except JSON_ERRORS:
        return _NO_SCHEMA
    if "type" in fields:
        return schema
    return msgspec.Raw(_encode({"type": msgspec.Raw(b'"object"')} | fields))


def _wire_choice(request: Request) -> dict[str, Any] | None:
    choice, alone = request.tool_choice, request.parallel_tool_calls is False
    if not request.tools or (choice is None and not alone):
        return None
    mode = "auto" if choice is None else choice.mode
    wire: dict[str, Any] = {"type": _MODES[mode]}
    if choice is not None and mode == "named":
        wire["name"] = choice.name
    if alone and mode != "none":
        wire["disable_parallel_tool_use"] = True
    return wire


_MODES: Final = {"auto": "auto", "none": "none", "required": "any", "named": "tool"}
