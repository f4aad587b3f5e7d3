"""Whole chat requests <-> the canonical request, for upstreams that speak another wire API.

Only used when the dialects differ; a request that stays in its dialect is never taken apart like this. What has no
place in the canonical request is dropped by name (``Request.dropped``) or, where the answer would depend on it,
refused.

What is ugly: chat knows one message per tool result and the canonical turn holds many, so results are gathered into the
user turn that follows and spread out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

_encode: Final = msgspec.json.Encoder().encode
_NOTHING: Final = msgspec.Raw(b"{}")

# Dropped without harm to the answer; the names are the feature labels of routerd_dropped_features_total.
_DROPPABLE: Final = (
    *("logit_bias", "frequency_penalty", "presence_penalty", "seed", "service_tier", "store", "metadata"),
    *("prediction", "verbosity", "top_logprobs", "prompt_cache_key", "web_search_options"),
)
# The answer would not be what was asked for without these.
_REFUSED: Final = {
    "audio": "spoken answers exist only in chat completions",
    "logprobs": "log probabilities exist only in chat completions",
}


class _Function(msgspec.Struct, gc=False, frozen=True):
    name: str = ""
    arguments: str = ""
    description: str = ""
    parameters: msgspec.Raw = _NOTHING
    strict: bool | None = None


class _Call(msgspec.Struct, gc=False):
    id: str = ""
    function: _Function = _Function()
    extra_content: msgspec.Raw = msgspec.Raw()


class _Turn(msgspec.Struct, gc=False):
    role: str = ""
    content: Any = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str = ""
    reasoning_content: str | None = None


class _OfferedTool(msgspec.Struct, gc=False):
    type: str = "function"
    function: _Function | None = None


class _Format(msgspec.Struct, gc=False):
    type: str = "text"
    json_schema: dict[str, Any] | None = None


class _Chat(msgspec.Struct, gc=False):
    model: str
    messages: list[_Turn]
    stream: bool | None = None
    tools: list[_OfferedTool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    reasoning_effort: str | None = None
    response_format: _Format | None = None
    user: str | None = None
    n: int | None = None


_decode_chat: Final = msgspec.json.Decoder(_Chat).decode
_decode_names: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def decode_request(body: bytes) -> Request:
    """Read a whole chat request. Raises ``BadRequest`` for what cannot be said in another dialect."""
    try:
        chat, fields = _decode_chat(body), _decode_names(body)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the request has the wrong shape: {error}") from None
    _refuse(chat, fields)
    return Request(
        model=chat.model,
        stream=chat.stream is True,
        messages=tuple(_turns(chat.messages)),
        tools=tuple(_tools(chat.tools or [])),
        tool_choice=_choice(chat.tool_choice),
        parallel_tool_calls=chat.parallel_tool_calls,
        max_output_tokens=chat.max_completion_tokens or chat.max_tokens,
        temperature=chat.temperature,
        top_p=chat.top_p,
        stop=(chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ()),
        reasoning_effort=chat.reasoning_effort,
        answer_format=_format(chat.response_format),
        user=chat.user,
        dropped=tuple(name for name in _DROPPABLE if _is_given(fields, name)),
    )


def _is_given(fields: dict[str, msgspec.Raw], name: str) -> bool:
    return bytes(fields.get(name, b"null")) not in (b"null", b"false", b"{}", b"[]", b"0", b"0.0")


def _refuse(chat: _Chat, fields: dict[str, msgspec.Raw]) -> None:
    for name, why in _REFUSED.items():
        if _is_given(fields, name):
            raise BadRequest(f'"{name}" cannot be served by this route: {why}', code="unsupported")
    if (chat.n or 1) > 1:
        raise BadRequest('"n" above 1 cannot be served by this route: ask several times instead', code="unsupported")


# --- messages in ------------------------------------------------------------------------------------------------------


def _turns(turns: list[_Turn]) -> Iterator[Message]:
    """One canonical turn for each of chat's, but tool results go into the user turn that they open."""
    results: list[Block] = []
    for turn in turns:
        if turn.role == "tool":
            results.append(ToolResult(turn.tool_call_id, tuple(_results(turn.content))))
            continue
        if turn.role in ("system", "developer"):
            if results:
                yield Message("user", tuple(results))
                results = []
            yield Message("system", tuple(_parts(turn.content)))
        elif turn.role == "user":
            yield Message("user", (*results, *_parts(turn.content)))
            results = []
        elif turn.role == "assistant":
            if results:
                yield Message("user", tuple(results))
                results = []
            yield Message("assistant", tuple(_spoken(turn)))
        else:
            raise BadRequest(f"a message has the unknown role {turn.role[:40]!r}")
    if results:
        yield Message("user", tuple(results))


def _spoken(turn: _Turn) -> Iterator[Block]:
    if turn.reasoning_content and turn.reasoning_content.strip():
        yield Reasoning(turn.reasoning_content)
    yield from _parts(turn.content)
    for call in turn.tool_calls or ():
        extra = bytes(call.extra_content).decode()
        yield ToolCall(call.id, call.function.name, call.function.arguments or "{}", signature=extra)


def _results(content: Any) -> Iterator[Text | Image | Document]:
    for part in _parts(content):
        if isinstance(part, Text | Image | Document):
            yield part


def _parts(content: Any) -> Iterator[Block]:
    """Content as a string or as parts."""
    if isinstance(content, str):
        if content:
            yield Text(content)
        return
    for part in content or ():
        if not isinstance(part, dict):
            raise BadRequest("a content part is not an object")
        kind = part.get("type")
        read = _PARTS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise BadRequest(f"content of type {str(kind)[:40]!r} cannot be served by this route", code="unsupported")
        yield read(part)


def _text_part(part: dict[str, Any]) -> Block:
    return Text(str(part.get("text", "")), cached="cache_control" in part)


def _image_part(part: dict[str, Any]) -> Block:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    return Image(str(url or ""), cached="cache_control" in part)


def _file_part(part: dict[str, Any]) -> Block:
    file = part.get("file")
    if not isinstance(file, dict) or not file.get("file_data"):
        raise BadRequest("a file must carry its data to be served by this route", code="unsupported")
    return Document(str(file["file_data"]), name=str(file.get("filename", "")))


_PARTS: Final[dict[str, Callable[[dict[str, Any]], Block]]] = {
    "text": _text_part,
    "refusal": lambda part: Text(str(part.get("refusal", ""))),
    "image_url": _image_part,
    "file": _file_part,
}


def _tools(tools: list[_OfferedTool]) -> Iterator[Tool]:
    for tool in tools:
        if tool.function is None:
            raise BadRequest(f"tools of type {tool.type[:40]!r} cannot be served by this route", code="unsupported")
        function = tool.function
        yield Tool(function.name, function.description, function.parameters, strict=function.strict)


_CHOICES: Final = {
    "auto": ToolChoice("auto"),
    "none": ToolChoice("none"),
    "required": ToolChoice("required"),
    "any": ToolChoice("required"),
}


def _choice(choice: Any) -> ToolChoice | None:
    if not isinstance(choice, dict):
        return _CHOICES.get(choice) if isinstance(choice, str) else None
    function = choice.get("function")
    return ToolChoice("named", str(function.get("name", ""))) if isinstance(function, dict) else None


def _format(wanted: _Format | None) -> AnswerFormat | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return AnswerFormat("json_object")
    schema = wanted.json_schema or {}
    return AnswerFormat(
        "json_schema",
        name=str(schema.get("name", "answer")),
        schema=msgspec.Raw(_encode(schema.get("schema", {}))),
        strict=schema.get("strict"),
    )


# --- out --------------------------------------------------------------------------------------------------------------


def encode_request(request: Request) -> bytes:
    """Write the request as chat has it; what an upstream demands on top is ``patch_request``'s."""
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": [message for turn in request.messages for message in _messages(turn)],
    }
    optional = {
        "stream": request.stream or None,
        "tools": [_offered(tool) for tool in request.tools] or None,
        "tool_choice": _wire_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "max_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stop": list(request.stop) or None,
        "reasoning_effort": request.reasoning_effort,
        "response_format": _wire_format(request.answer_format),
        "user": request.user,
    }
    return _encode(fields | {name: value for name, value in optional.items() if value is not None})


def unsaid(request: Request) -> tuple[str, ...]:
    """See ``Dialect.unsaid``."""
    results = (block for turn in request.messages for block in turn.blocks if isinstance(block, ToolResult))
    return ("is_error",) if any(result.is_error for result in results) else ()


def _messages(turn: Message) -> Iterator[dict[str, Any]]:
    if turn.role == "assistant":
        yield _assistant(turn)
        return
    for block in turn.blocks:
        if isinstance(block, ToolResult):
            yield {"role": "tool", "tool_call_id": block.call_id, "content": _content(block.content)}
    rest = tuple(block for block in turn.blocks if isinstance(block, Text | Image | Document))
    if rest or not turn.blocks:
        yield {"role": turn.role, "content": _content(rest)}


def _assistant(turn: Message) -> dict[str, Any]:
    texts = tuple(block for block in turn.blocks if isinstance(block, Text | Image | Document))
    message: dict[str, Any] = {"role": "assistant", "content": _content(texts) if texts else None}
    thoughts = "".join(block.text for block in turn.blocks if isinstance(block, Reasoning))
    if thoughts:
        message["reasoning_content"] = thoughts
    calls = [_call(block) for block in turn.blocks if isinstance(block, ToolCall)]
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    return message


def _call(block: ToolCall) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.arguments}
    call: dict[str, Any] = {"id": block.id, "type": "function", "function": function}
    if block.signature.startswith("{"):
        call["extra_content"] = msgspec.Raw(block.signature.encode())
    return call


def _content(blocks: tuple[Text | Image | Document, ...]) -> str | list[dict[str, Any]]:
    """A plain string where it says as much: not every server takes parts."""
    if not blocks:
        return ""
    first = blocks[0]
    if len(blocks) == 1 and isinstance(first, Text) and not first.cached:
        return first.text
    return [_part(block) for block in blocks]


def _part(block: Text | Image | Document) -> dict[str, Any]:
    if isinstance(block, Text):
        part: dict[str, Any] = {"type": "text", "text": block.text}
    elif isinstance(block, Image):
        part = {"type": "image_url", "image_url": {"url": block.url}}
    else:
        part = {"type": "file", "file": {"filename": block.name or "document", "file_data": block.url}}
    return part | {"cache_control": {"type": "ephemeral"}} if block.cached else part


def _offered(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _wire_choice(choice: ToolChoice | None) -> Any:
    if choice is None:
        return None
    return {"type": "function", "function": {"name": choice.name}} if choice.mode == "named" else choice.mode


def _wire_format(wanted: AnswerFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.kind == "json_object":
        return {"type": "json_object"}
    schema: dict[str, Any] = {"name": wanted.name or "answer", "schema": wanted.schema or _NOTHING}
    if wanted.strict is not None:
        schema["strict"] = wanted.strict
    return {"type": "json_schema", "json_schema": schema}
