"""Requests of the chat dialect: what routing needs to know of one, and one as an upstream wants it.

Theory of operation
-------------------
A request is read twice, and never in full. ``read_head`` builds the few fields routing needs and leaves each message's
content as raw bytes. ``patch_request`` rewrites top-level fields and leaves ``messages`` and ``tools`` byte for byte as
they were, which is what an upstream's prompt cache is keyed on.

Messages are opened only if a ``Fix`` asks for something in them; that is ``chat_history``.

What is ugly: msgspec rejects lone surrogates (``"\\ud83d"``) and broken UTF-8, which models and tools do produce when
an emoji is cut in two. Then, and only then, the standard library reads the JSON and U+FFFD takes the broken
character's place (``mended``; the decoders of answers use it too).
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from routerd.canonical import COMPLETE, BadRequest, Fix, Head, Recall, Upstream
from routerd.dialects import chat_history
from routerd.dialects.chat_history import Fields

IMAGE_TOKENS: Final = 1600  # a large image at the vendors that publish a formula
BYTES_PER_TOKEN: Final = 4
CONVERSATION_MESSAGES_MAX: Final = 4  # the first user message is looked for no further down
NO_MODEL: Final = '"model" is missing: name a route or a model that GET /v1/models lists'

JSON_ERRORS: Final = chat_history.JSON_ERRORS

_T = TypeVar("_T")

_encode: Final = msgspec.json.Encoder().encode
_decode_fields: Final = msgspec.json.Decoder(Fields).decode


def mended(data: bytes) -> bytes:
    """Return the same JSON with U+FFFD for broken characters. Raises ``ValueError`` and ``RecursionError``."""
    text = json.dumps(json.loads(data.decode("utf-8", "replace")), ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# --- read -------------------------------------------------------------------------------------------------------------


class _Turn(msgspec.Struct, gc=False):
    role: str | None = None
    content: msgspec.Raw = msgspec.Raw()


class _StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None


class _Request(msgspec.Struct, gc=False):
    model: str | None = None
    messages: list[_Turn] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: msgspec.Raw = msgspec.Raw()
    functions: msgspec.Raw = msgspec.Raw()
    response_format: msgspec.Raw = msgspec.Raw()
    n: int | None = None
    logprobs: bool | None = None
    modalities: msgspec.Raw = msgspec.Raw()
    audio: msgspec.Raw = msgspec.Raw()


_decode_request: Final = msgspec.json.Decoder(_Request).decode
_LIST_START, _STRING_START = b'["'
_IMAGE_KEY: Final = re.compile(rb'(?<!\\)"image_url"\s*:')
DATA_URL: Final = re.compile(rb'"data:[^",]*;base64,[^"]*"')


def read_head(body: bytes) -> Head:
    """See ``Dialect.read_head``. The estimate of prompt tokens takes the whole body for prompt: it nearly is."""
    request = read_request(_decode_request, body, "messages")
    if not request.model:
        raise BadRequest(NO_MODEL)
    if not request.messages:
        raise BadRequest('"messages" is missing or empty: send at least one message')
    images, image_bytes = _images(request.messages)
    options = request.stream_options
    return Head(
        model=request.model,
        stream=request.stream is True,
        tools=is_filled(request.tools) or is_filled(request.functions),
        images=images > 0,
        include_usage=options is not None and options.include_usage is True,
        max_output_tokens=request.max_completion_tokens or request.max_tokens,
        prompt_tokens=(len(body) - image_bytes) // BYTES_PER_TOKEN + images * IMAGE_TOKENS,
        conversation=_conversation(request.messages),
        streamable=_is_streamable(request),
        structured=b'"json' in bytes(request.response_format),
    )


def _is_streamable(request: _Request) -> bool:
    """Several choices, log probabilities and sound have no place in the events of a stream."""
    if request.logprobs or (request.n or 1) > 1:
        return False
    return not (is_filled(request.audio) or b"audio" in bytes(request.modalities))


def read_request(decode: Callable[[bytes], _T], body: bytes, content: str) -> _T:
    """Read the body as far as ``decode`` does. ``content`` is the field that makes it a request, in case it is none."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the request has the wrong shape: {error}") from None
    except JSON_ERRORS:
        pass
    try:
        return decode(mended(body))
    except msgspec.ValidationError as error:
        raise BadRequest(f"the request has the wrong shape: {error}") from None
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        raise BadRequest(f'the body is not JSON: send one object with "model" and "{content}"') from None


def is_filled(array: msgspec.Raw) -> bool:
    return len(array) > 16 or bytes(array).strip(b"[] \t\r\n") not in (b"", b"null")


def _conversation(turns: list[_Turn]) -> int:
    """Hash what stays the same through all turns: everything up to the first user message.

    A checksum and a length, not a digest: it says which prompt cache may be warm and guards nothing, and a digest of a
    long system prompt would cost more than all the rest of reading the request.
    """
    checksum = length = 0
    for turn in turns[:CONVERSATION_MESSAGES_MAX]:
        checksum = zlib.crc32(turn.content, checksum)
        length += len(turn.content)
        if turn.role == "user":
            break
    return length << 32 | checksum


def _images(turns: list[_Turn]) -> tuple[int, int]:
    """Return how many images there are, and how many bytes they take up as data in the request."""
    count = size = 0
    for turn in turns:
        content = turn.content
        if content and memoryview(content)[0] == _LIST_START:
            text = bytes(content)
            if b'"image_url"' in text:
                count += len(_IMAGE_KEY.findall(text))
                size += sum(map(len, DATA_URL.findall(text)))
    return count, size


# --- tools ------------------------------------------------------------------------------------------------------------


class _OfferedFunction(msgspec.Struct, gc=False):
    name: str = ""
    parameters: Any = None


class _OfferedTool(msgspec.Struct, gc=False):
    function: _OfferedFunction | None = None


class _Offer(msgspec.Struct, gc=False):
    tools: list[_OfferedTool] | None = None
    functions: list[_OfferedFunction] | None = None


_decode_offer: Final = msgspec.json.Decoder(_Offer).decode


def tool_schemas(body: bytes) -> dict[str, dict[str, Any]]:
    """See ``Dialect.tool_schemas``. A tool of an unknown kind makes the whole list unreadable."""
    try:
        offer = _decode_offer(body)
    except JSON_ERRORS:
        return {}
    functions = [tool.function for tool in offer.tools or ()] + list(offer.functions or ())
    if any(function is None for function in functions):
        return {}
    return {
        function.name: function.parameters if isinstance(function.parameters, dict) else {}
        for function in functions
        if function is not None
    }


# --- taken up again ---------------------------------------------------------------------------------------------------

TAIL_CHARACTERS: Final = 160  # of the broken-off text quoted to a model that is asked to go on

# By manner: what marks the trailing assistant turn, and what the request as a whole needs. Sources: DeepSeek's docs on
# chat prefix completion and Mistral's on prefix ("prefix"), Moonshot's and DashScope's on partial mode ("partial"),
# vLLM's server docs (the two flags).
_TURN_MARKS: Final[dict[str, dict[str, bool]]] = {"prefix": {"prefix": True}, "partial": {"partial": True}}
_BODY_MARKS: Final[dict[str, dict[str, bool]]] = {
    "flags": {"continue_final_message": True, "add_generation_prompt": False}
}


def continue_request(body: bytes, text: str, manner: str) -> bytes:
    """See ``Dialect.continue_request``."""
    fields = read_fields(body)
    messages = _decode_raws(fields["messages"])
    turn: dict[str, Any] = {"role": "assistant", "content": text.rstrip()}
    if manner == "instructed":
        messages += [msgspec.Raw(_encode(turn)), msgspec.Raw(_encode(ask_to_go_on(text)))]
    else:
        messages.append(msgspec.Raw(_encode(turn | _TURN_MARKS.get(manner, {}))))
    fields["messages"] = msgspec.Raw(_encode(messages))
    for name, value in _BODY_MARKS.get(manner, {}).items():
        fields[name] = msgspec.Raw(_encode(value))
    return _encode(fields)


_decode_raws: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


def ask_to_go_on(text: str) -> dict[str, str]:
    return {
        "role": "user",
        "content": "The connection broke while you were writing your last answer. It ends with:\n\n"
        f"{text.rstrip()[-TAIL_CHARACTERS:]}\n\n"
        "Go on with the very next character after that. Do not repeat any of it, do not start again, do not "
        f"comment on the interruption. If nothing was missing, reply with {COMPLETE} alone.",
    }


# --- patched ----------------------------------------------------------------------------------------------------------

_TRUE: Final = msgspec.Raw(b"true")
_FALSE: Final = msgspec.Raw(b"false")
_NULL: Final = msgspec.Raw(b"null")
_USAGE_WANTED: Final = msgspec.Raw(b'{"include_usage":true}')
_OUTPUT_FIELDS: Final = ("max_completion_tokens", "max_tokens")  # the first stands if both are sent


def patch_request(body: bytes, head: Head, upstream: Upstream, recall: Recall | None = None) -> bytes:
    """See ``Dialect.patch_request``."""
    fields, fix = read_fields(body), upstream.fix
    fields["model"] = msgspec.Raw(_encode(upstream.wire_model))
    _patch_stream(fields, head, fix)
    _patch_output(fields, upstream)
    patch_options(fields, head, fix)
    _patch_tools(fields, head, fix)
    chat_history.patch_messages(fields, head, upstream, recall)
    for name in fix.rejected_fields:
        fields.pop(name, None)
    return _encode(fields)


def read_fields(body: bytes) -> Fields:
    try:
        return _decode_fields(body)
    except JSON_ERRORS:
        return _decode_fields(mended(body))


def _patch_stream(fields: Fields, head: Head, fix: Fix) -> None:
    if (bytes(fields.get("stream", _FALSE)) == b"true") != head.stream:
        fields["stream"] = _TRUE if head.stream else _FALSE
    if not head.stream or not fix.stream_usage:
        fields.pop("stream_options", None)
        return
    options = bytes(fields.get("stream_options", _NULL))
    if b'"' not in options:
        fields["stream_options"] = _USAGE_WANTED
    else:
        fields["stream_options"] = msgspec.Raw(_encode(_decode_fields(options) | {"include_usage": _TRUE}))


def _patch_output(fields: Fields, upstream: Upstream) -> None:
    """Clamp the output to what the model can give, under the name it knows. Nothing asked for stays nothing."""
    found = [name for name in _OUTPUT_FIELDS if bytes(fields.get(name, _NULL)) != b"null"]
    if not found:
        return
    tokens = int(bytes(fields[found[0]]))
    if upstream.max_output_tokens is not None:
        tokens = min(tokens, upstream.max_output_tokens)
    for name in _OUTPUT_FIELDS:
        fields.pop(name, None)
    fields[upstream.fix.max_tokens_field or found[0]] = msgspec.Raw(b"%d" % tokens)


def patch_options(fields: Fields, head: Head, fix: Fix) -> None:
    if not fix.temperature:
        fields.pop("temperature", None)
    if not fix.parallel_tool_calls and head.tools:
        fields["parallel_tool_calls"] = _FALSE
    if fix.tool_choice_required != "required" and bytes(fields.get("tool_choice", _NULL)) == b'"required"':
        fields["tool_choice"] = msgspec.Raw(_encode(fix.tool_choice_required))


class _Named(msgspec.Struct, gc=False):
    name: str | None = None


class _Tool(msgspec.Struct, gc=False):
    function: _Named | None = None


_decode_tools: Final = msgspec.json.Decoder(list[_Tool]).decode
_decode_list: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


def _patch_tools(fields: Fields, head: Head, fix: Fix) -> None:
    if not fix.unique_tool_names or not head.tools or "tools" not in fields:
        return
    try:
        tools = _decode_tools(fields["tools"])
    except JSON_ERRORS:
        return  # not as tools are: the upstream will say so better
    keep_first(fields, [tool.function.name if tool.function is not None else None for tool in tools])


def keep_first(fields: Fields, names: list[str | None]) -> None:
    """Drop the tools whose name an earlier one has. Those without a name stay."""
    seen: set[str | None] = {None}
    kept = []
    for name, tool in zip(names, _decode_list(fields["tools"]), strict=True):
        if name is None or name not in seen:
            kept.append(tool)
        seen.add(name)
    if len(kept) < len(names):
        fields["tools"] = msgspec.Raw(_encode(kept))
