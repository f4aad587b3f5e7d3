"""Requests of the Messages dialect: what routing needs to know of one, and one as an upstream wants it.

Theory of operation
-------------------
As in ``chat_request``: ``read_head`` builds the few fields routing needs, ``patch_request`` rewrites top-level fields
and leaves the rest byte for byte as it was. The history is opened only if a search of its bytes says that something in
it must change:

* text blocks that say nothing, which the vendor refuses and our own keep-alives leave behind, are taken out;
* thinking without its seal, or with the seal of another upstream, is taken out where the upstream checks seals; what
  a client left out is put back where this very upstream wrote it, or where it demands to be given back any;
* ids of tool calls are brought into the form the upstream accepts, by a digest, so that they stay the same through all
  requests.

A request without a limit on the answer gets one, since the field is required here and other dialects do without.
"""

from __future__ import annotations

import re
import zlib
from base64 import b32encode
from hashlib import blake2b
from typing import Any, Final

import msgspec

from routerd.canonical import BadRequest, Fix, Head, Reasoning, Recall, Remembered, Upstream, seal_key
from routerd.dialects.chat_request import (
    BYTES_PER_TOKEN,
    IMAGE_TOKENS,
    JSON_ERRORS,
    NO_MODEL,
    ask_to_go_on,
    is_filled,
    read_fields,
    read_request,
)

OUTPUT_TOKENS: Final = 32_768  # of an answer where neither the client nor the catalog sets a limit
BUDGET_MIN_TOKENS: Final = 1024  # for thinking; less is refused (API reference, 2026)
CONVERSATION_MESSAGES_MAX: Final = 4  # the first user message is looked for no further down

_Fields = dict[str, msgspec.Raw]
_encode: Final = msgspec.json.Encoder().encode
_decode_fields: Final = msgspec.json.Decoder(_Fields).decode
_decode_objects: Final = msgspec.json.Decoder(list[_Fields]).decode
_decode_string: Final = msgspec.json.Decoder(str).decode
_LIST_START, _STRING_START = b'["'
_TRUE: Final = msgspec.Raw(b"true")
_FALSE: Final = msgspec.Raw(b"false")
_NULL: Final = msgspec.Raw(b"null")
_CACHE_MARK: Final = msgspec.Raw(b'{"type":"ephemeral"}')


# --- read -------------------------------------------------------------------------------------------------------------


class _Turn(msgspec.Struct, gc=False):
    role: str | None = None
    content: msgspec.Raw = msgspec.Raw()


class _Request(msgspec.Struct, gc=False):
    model: str | None = None
    messages: list[_Turn] | None = None
    system: msgspec.Raw = msgspec.Raw()
    stream: bool | None = None
    max_tokens: int | None = None
    tools: msgspec.Raw = msgspec.Raw()
    mcp_servers: msgspec.Raw = msgspec.Raw()
    output_config: msgspec.Raw = msgspec.Raw()
    output_format: msgspec.Raw = msgspec.Raw()


_decode_request: Final = msgspec.json.Decoder(_Request).decode
_MEDIA: Final = re.compile(rb'(?<!\\)"type"\s*:\s*"(image|document)"')
_DATA: Final = re.compile(rb'(?<!\\)"data"\s*:\s*"[A-Za-z0-9+/=]*"')
_SERVER_TOOL: Final = re.compile(rb'(?<!\\)"type"\s*:\s*"[a-z_]+_20\d{6}"')


def read_head(body: bytes) -> Head:
    """See ``Dialect.read_head``. The estimate of prompt tokens takes the whole body for prompt: it nearly is."""
    request = read_request(_decode_request, body, "messages")
    if not request.model:
        raise BadRequest(NO_MODEL)
    if not request.messages:
        raise BadRequest('"messages" is missing or empty: send at least one message')
    images, media, media_bytes, cited = _media(request.messages)
    return Head(
        model=request.model,
        stream=request.stream is True,
        tools=is_filled(request.tools),
        images=images > 0,
        include_usage=True,
        max_output_tokens=request.max_tokens,
        prompt_tokens=(len(body) - media_bytes) // BYTES_PER_TOKEN + media * IMAGE_TOKENS,
        conversation=_conversation(request),
        streamable=not cited and _is_streamable(request),
        structured=b'"json_schema"' in bytes(request.output_config) + bytes(request.output_format),
    )


def _is_streamable(request: _Request) -> bool:
    """What a server's own tools do has no place in the events of a stream; nor have citations."""
    if is_filled(request.mcp_servers):
        return False
    tools = bytes(request.tools)
    return b"_20" not in tools or _SERVER_TOOL.search(tools) is None


def _conversation(request: _Request) -> int:
    """Hash what stays the same through all turns: the system prompt and the text of the first user message.

    Its text, not its bytes: clients move their cache marks along, and a mark makes a list of what was a string.
    """
    checksum, length = zlib.crc32(request.system), len(request.system)
    for turn in (request.messages or [])[:CONVERSATION_MESSAGES_MAX]:
        if turn.role == "user":
            text = _text(turn.content)
            return (length + len(text)) << 32 | zlib.crc32(text, checksum)
    return length << 32 | checksum


class _TextPart(msgspec.Struct, gc=False):
    text: str = ""


_decode_parts: Final = msgspec.json.Decoder(list[_TextPart]).decode


def _text(content: msgspec.Raw) -> bytes:
    if content and memoryview(content)[0] == _LIST_START:
        try:
            return "".join([part.text for part in _decode_parts(content)]).encode("utf-8", "replace")
        except JSON_ERRORS:
            return bytes(content)
    return bytes(content)[1:-1]


def _media(turns: list[_Turn]) -> tuple[int, int, int, bool]:
    """Return how many images there are, how many files of any kind, the bytes these take up as data, and whether the
    answer is to cite them.
    """
    images = count = size = 0
    cited = False
    for turn in turns:
        content = turn.content
        if turn.role == "user" and content and memoryview(content)[0] == _LIST_START:
            text = bytes(content)
            if b'"source"' in text:
                kinds = _MEDIA.findall(text)
                images += kinds.count(b"image")
                count += len(kinds)
                size += sum(map(len, _DATA.findall(text)))
                cited = cited or b'"citations"' in text
    return images, count, size, cited


# --- tools ------------------------------------------------------------------------------------------------------------


class _OfferedTool(msgspec.Struct, gc=False):
    name: str = ""
    input_schema: Any = None


class _Offer(msgspec.Struct, gc=False):
    tools: list[_OfferedTool] | None = None


_decode_offer: Final = msgspec.json.Decoder(_Offer).decode


def tool_schemas(body: bytes) -> dict[str, dict[str, Any]]:
    """See ``Dialect.tool_schemas``. A tool that brings no schema (the vendor knows it) makes the list unreadable."""
    try:
        tools = _decode_offer(body).tools or []
    except JSON_ERRORS:
        return {}
    if any(tool.input_schema is None for tool in tools):
        return {}
    return {tool.name: tool.input_schema if isinstance(tool.input_schema, dict) else {} for tool in tools}


# --- taken up again ---------------------------------------------------------------------------------------------------

_decode_raws: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


def continue_request(body: bytes, text: str, manner: str) -> bytes:
    """See ``Dialect.continue_request``. A trailing assistant turn must not end in white space, and nobody may think."""
    fields = read_fields(body)
    messages = _decode_raws(fields["messages"])
    turns: list[dict[str, str]] = [{"role": "assistant", "content": text.rstrip()}]
    if manner == "instructed":
        turns.append(ask_to_go_on(text))
    else:
        fields.pop("thinking", None)
    fields["messages"] = msgspec.Raw(_encode(messages + [msgspec.Raw(_encode(turn)) for turn in turns]))
    return _encode(fields)


# --- patched ----------------------------------------------------------------------------------------------------------


def patch_request(body: bytes, head: Head, upstream: Upstream, recall: Recall | None = None) -> bytes:
    """See ``Dialect.patch_request``."""
    fields, fix = read_fields(body), upstream.fix
    fields["model"] = msgspec.Raw(_encode(upstream.wire_model))
    if (bytes(fields.get("stream", _FALSE)) == b"true") != head.stream:
        fields["stream"] = _TRUE if head.stream else _FALSE
    output_tokens = _patch_output(fields, upstream)
    _patch_messages(fields, upstream, recall)
    _patch_thinking(fields, fix, output_tokens)
    if not fix.temperature:
        fields.pop("temperature", None)
    _patch_choice(fields, head, fix)
    _patch_tools(fields, head, fix)
    if fix.cache_markers and b'"cache_control"' not in body:
        _mark_caches(fields)
    for name in fix.rejected_fields:
        fields.pop(name, None)
    return _encode(fields)


def _is_given(fields: _Fields, name: str) -> bool:
    return bytes(fields.get(name, _NULL)) != b"null"


def _patch_output(fields: _Fields, upstream: Upstream) -> int:
    most = upstream.max_output_tokens
    tokens = (
        int(bytes(fields["max_tokens"]))
        if _is_given(fields, "max_tokens")
        else min(most or OUTPUT_TOKENS, OUTPUT_TOKENS)
    )
    if most is not None:
        tokens = min(tokens, most)
    fields["max_tokens"] = msgspec.Raw(b"%d" % tokens)
    return tokens


class _Thinking(msgspec.Struct, gc=False):
    type: str = ""
    budget_tokens: int | None = None


EFFORT_BUDGETS: Final = {
    "minimal": 1024,
    "low": 2048,
    "medium": 8192,
    "high": 16_384,
    "xhigh": 32_768,
    "max": 65_536,
}
_EFFORTS: Final = ((2048, "low"), (8192, "medium"), (16_384, "high"), (32_768, "xhigh"))  # up to so many tokens


def effort_for(budget_tokens: int) -> str:
    """The effort that a budget for thinking amounts to."""
    return next((effort for most, effort in _EFFORTS if budget_tokens <= most), "max")


def _patch_thinking(fields: _Fields, fix: Fix, output_tokens: int) -> None:
    """Ask for thinking in the upstream's way, and leave it room below the limit on the whole answer."""
    try:
        thinking = msgspec.json.decode(fields.get("thinking", _NULL), type=_Thinking | None)
        config = _decode_fields(fields["output_config"]) if _is_given(fields, "output_config") else {}
        effort = _decode_string(config["effort"]) if "effort" in config else None
    except JSON_ERRORS:
        return  # not as the vendor has it: the upstream will say so better
    if thinking is None or thinking.type not in ("enabled", "adaptive"):
        return
    if fix.thinking == "adaptive":
        if thinking.type == "enabled":
            fields["thinking"] = msgspec.Raw(b'{"type":"adaptive"}')
            config.setdefault("effort", msgspec.Raw(_encode(effort_for(thinking.budget_tokens or 8192))))
            fields["output_config"] = msgspec.Raw(_encode(config))
        return
    budget = thinking.budget_tokens or EFFORT_BUDGETS.get(effort or "medium", 8192)
    budget = min(budget, output_tokens // 2 if budget >= output_tokens else budget)
    if config.pop("effort", None) is not None:
        fields["output_config"] = msgspec.Raw(_encode(config))
    if not config:
        fields.pop("output_config", None)
    if budget < BUDGET_MIN_TOKENS or not _is_thinkable(fields):
        del fields["thinking"]
    elif budget != thinking.budget_tokens:
        fields["thinking"] = msgspec.Raw(b'{"type":"enabled","budget_tokens":%d}' % budget)


def _is_thinkable(fields: _Fields) -> bool:
    """A turn that called tools without thinking cannot be taken up with it (API reference: extended thinking)."""
    try:
        turns = _decode_objects(fields["messages"])
    except JSON_ERRORS:
        return True
    last = next((turn for turn in reversed(turns) if bytes(turn.get("role", _NULL)) == b'"assistant"'), {})
    content = bytes(last.get("content", _NULL))
    return b'"tool_use"' not in content or b'thinking"' in content


def _patch_choice(fields: _Fields, head: Head, fix: Fix) -> None:
    if not head.tools:
        fields.pop("tool_choice", None)
        return
    if fix.parallel_tool_calls and fix.tool_choice_required != "auto":
        return
    try:
        choice = _decode_fields(fields["tool_choice"]) if _is_given(fields, "tool_choice") else {}
    except JSON_ERRORS:
        return
    kind = choice.get("type", msgspec.Raw(b'"auto"'))
    if fix.tool_choice_required == "auto" and bytes(kind) == b'"any"':
        kind = msgspec.Raw(b'"auto"')
    choice = {"type": kind} | {name: value for name, value in choice.items() if name != "type"}
    if not fix.parallel_tool_calls and bytes(kind) != b'"none"':
        choice["disable_parallel_tool_use"] = _TRUE
    fields["tool_choice"] = msgspec.Raw(_encode(choice))


def _patch_tools(fields: _Fields, head: Head, fix: Fix) -> None:
    if not fix.unique_tool_names or not head.tools:
        return
    try:
        tools = _decode_objects(fields["tools"])
    except JSON_ERRORS:
        return
    kept = {bytes(tool.get("name", _NULL)): tool for tool in reversed(tools)}
    if len(kept) < len(tools):
        fields["tools"] = msgspec.Raw(_encode(list(reversed(kept.values()))))


# --- caches -----------------------------------------------------------------------------------------------------------


def _mark_caches(fields: _Fields) -> None:
    """Mark the end of the system prompt and of the conversation: what comes before a mark is cached."""
    if _is_given(fields, "system"):
        fields["system"] = _marked(fields["system"])
    try:
        messages = _decode_raws(fields["messages"])
        last = _decode_fields(messages[-1])
    except JSON_ERRORS:
        return
    last["content"] = _marked(last.get("content", _NULL))
    messages[-1] = msgspec.Raw(_encode(last))
    fields["messages"] = msgspec.Raw(_encode(messages))


def _marked(content: msgspec.Raw) -> msgspec.Raw:
    """The content with a mark on its last block; as it was if that can bear none."""
    try:
        if memoryview(content)[0] == _STRING_START:
            text = _decode_string(content)
            block: dict[str, Any] = {"type": "text", "text": text, "cache_control": _CACHE_MARK}
            return msgspec.Raw(_encode([block])) if text.strip() else content
        blocks = _decode_objects(content)
    except JSON_ERRORS:
        return content
    if not blocks or b"thinking" in bytes(blocks[-1].get("type", _NULL)):
        return content
    blocks[-1]["cache_control"] = _CACHE_MARK
    return msgspec.Raw(_encode(blocks))


# --- history ----------------------------------------------------------------------------------------------------------

_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9_-]+")
_TEXT: Final = b'"text"'
_TOOL_USE: Final = b'"tool_use"'
_THOUGHTS: Final = (b'"thinking"', b'"redacted_thinking"')


def _patch_messages(fields: _Fields, upstream: Upstream, recall: Recall | None) -> None:
    """Open the history if something in it has to be changed, and write it anew if something was."""
    fix, text = upstream.fix, bytes(fields["messages"])
    seals = _SEALS[fix.reasoning_content] and (_TOOL_USE in text or b'thinking"' in text)
    ids = fix.call_id_limit is not None and _TOOL_USE in text
    if not (seals or ids or _has_empty_text(text)):
        return
    try:
        turns = _decode_objects(text)
        changed = [_patch_turn(turn, upstream, recall, seals=seals, ids=ids) for turn in turns]
    except JSON_ERRORS:
        return  # not as messages are: the upstream will say so better
    if any(changed):
        turns = [turn for turn in turns if bytes(turn.get("content", _NULL)) != b"[]"]
        fields["messages"] = msgspec.Raw(_encode(turns))


def _has_empty_text(text: bytes) -> bool:
    """One quick search for all but a few."""
    return b'""' in text and (b'"text":""' in text or b'"text": ""' in text)


# Whether thinking in the history has to be looked at; "reject" says of this dialect that seals are checked.
_SEALS: Final = {"keep": False, "require": True, "reject": True}


def _patch_turn(turn: _Fields, upstream: Upstream, recall: Recall | None, *, seals: bool, ids: bool) -> bool:
    content = turn.get("content", _NULL)
    if memoryview(content)[0] != _LIST_START:
        return False
    blocks = _decode_objects(content)
    kept = [block for block in blocks if not _is_blank(block)]
    if seals and bytes(turn.get("role", _NULL)) == b'"assistant"':
        kept = _resealed(kept, upstream, recall)
    changed = kept != blocks
    if ids and upstream.fix.call_id_limit is not None:
        limit = upstream.fix.call_id_limit
        patched = [_patch_id(block, limit) for block in kept]
        changed = changed or any(patched)
    if changed:
        turn["content"] = msgspec.Raw(_encode(kept))
    return changed


def _is_blank(block: _Fields) -> bool:
    return bytes(block.get("type", _NULL)) == _TEXT and not _string(block.get("text", _NULL)).strip()


def _string(value: msgspec.Raw) -> str:
    return _decode_string(value) if memoryview(value)[0] == _STRING_START else ""


def _resealed(blocks: list[_Fields], upstream: Upstream, recall: Recall | None) -> list[_Fields]:
    """The turn with thinking as this upstream takes it.

    Who checks seals is given what it sealed itself, and what nobody knows the author of; who only demands that thinking
    comes back is given any.
    """
    thoughts = [block for block in blocks if bytes(block.get("type", _NULL)) in _THOUGHTS]
    rest = [block for block in blocks if bytes(block.get("type", _NULL)) not in _THOUGHTS]
    came_with = _recalled(rest, recall) or _recalled_by_seal(thoughts, rest, recall)
    own = came_with is not None and came_with.author == upstream.author
    if upstream.fix.reasoning_content == "reject":
        thoughts = [block for block in thoughts if _is_sealed(block) and (came_with is None or own)]
    if not thoughts and came_with is not None and (own or upstream.fix.reasoning_content == "require"):
        remembered = [_thought(block, own=own) for block in came_with.thinking]
        demanded = upstream.fix.reasoning_content == "require"
        return [block for block in remembered if _is_sealed(block) or (demanded and "thinking" in block)] + rest
    return [block for block in blocks if block in thoughts or block in rest]


def _is_sealed(block: _Fields) -> bool:
    return "data" in block or bool(_string(block.get("signature", _NULL)))


def _thought(remembered: Reasoning, *, own: bool) -> _Fields:
    """The block as it came; without its seal for anybody but who sealed it, and then nothing of it may be left."""
    if remembered.sealed:
        block = {"type": "redacted_thinking", "data": remembered.sealed} if own else {}
    else:
        signature = remembered.signature if own else ""
        block = {"type": "thinking", "thinking": remembered.text, "signature": signature}
    return {name: msgspec.Raw(_encode(value)) for name, value in block.items()}


def _recalled(blocks: list[_Fields], recall: Recall | None) -> Remembered | None:
    """What is remembered of the turn, by its first call."""
    call = next((block for block in blocks if bytes(block.get("type", _NULL)) == _TOOL_USE), None)
    return recall(_string(call.get("id", _NULL))) if call is not None and recall is not None else None


def _recalled_by_seal(thoughts: list[_Fields], rest: list[_Fields], recall: Recall | None) -> Remembered | None:
    """What is remembered of a turn without calls."""
    if recall is None or any(bytes(block.get("type", _NULL)) == _TOOL_USE for block in rest):
        return None
    seals = [_string(block.get("signature", _NULL)) or _string(block.get("data", _NULL)) for block in thoughts]
    found = (recall(seal_key(seal)) for seal in seals if seal)
    return next((remembered for remembered in found if remembered is not None), None)


def _patch_id(block: _Fields, limit: int) -> bool:
    for name in ("id", "tool_use_id"):
        identity = _string(block.get(name, _NULL))
        if identity and not (len(identity) <= limit and _PLAIN_ID.fullmatch(identity)):
            digest = blake2b(identity.encode("utf-8", "replace"), digest_size=15).digest()
            block[name] = msgspec.Raw(_encode(f"toolu_{b32encode(digest).decode()}"[:limit]))
            return True
    return False
