"""Requests of the Responses dialect: what routing needs to know of one, and one as an upstream wants it.

Theory of operation
-------------------
As in ``chat_request``: ``read_head`` builds the few fields routing needs, ``patch_request`` rewrites top-level fields
and leaves the rest byte for byte as it was, and ``input`` is opened only if something in it may have to change.

This API can keep conversations at the server, and a router cannot use that: the next turn may go to somebody else. So
an upstream is never asked to keep anything (``store`` is false). What the client wants kept is kept here, and a request
that names an earlier answer becomes one that brings the whole conversation (``chained``).

A history is made of turns, each a run of items that one model wrote in one go. Whose it was is known by its calls, or
by the seal on its thinking, from ``Recall``. A turn that this very upstream wrote is sent back as it was. In any other:

* sealed thinking is left out, since nobody but its author can open it and OpenAI answers 400 to it; where nobody knows
  the author, the client is believed;
* thinking in plain text is left out, or, for whoever demands to be given it back, written as such;
* items lose their ids. An id says where an item is in its author's store. Others look it up all the same, do not find
  it and answer 404, or miss the item that stood before it and answer 400 (OpenAI, 2025 and 2026). Nothing else is lost
  with it. Assistant messages then take the short form, since some servers want an id in the long one (OpenRouter's
  docs, 2026). Ids that were given here, to an answer that was put together, go in any case.

Sealed thinking that a client left out is put back where this upstream wrote it.

What is ugly: items that end a turn are told by their names (``..._call``), and a kind of item that comes to be later
and is named otherwise is taken for the client's own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import groupby
from operator import is_
from typing import Any, Final

import msgspec

from routerd.canonical import BadRequest, Fix, Head, Reasoning, Recall, Remembered, Upstream, seal_key
from routerd.dialects.chat_history import Fields, fitting_field, is_object, joined_parts
from routerd.dialects.chat_request import (
    BYTES_PER_TOKEN,
    CONVERSATION_MESSAGES_MAX,
    DATA_URL,
    IMAGE_TOKENS,
    JSON_ERRORS,
    NO_MODEL,
    ask_to_go_on,
    is_filled,
    keep_first,
    mended,
    patch_options,
    read_fields,
    read_request,
)

_encode: Final = msgspec.json.Encoder().encode
_decode_fields: Final = msgspec.json.Decoder(Fields).decode
_decode_raws: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_string: Final = msgspec.json.Decoder(str).decode
_LIST_START, _STRING_START = b'["'
_CONTAINER_STARTS: Final = b"[{"
_TRUE: Final = msgspec.Raw(b"true")
_FALSE: Final = msgspec.Raw(b"false")
_NULL: Final = msgspec.Raw(b"null")


# --- read -------------------------------------------------------------------------------------------------------------


class _Item(msgspec.Struct, gc=False):
    type: str | None = None
    role: str | None = None
    content: msgspec.Raw = msgspec.Raw()
    output: msgspec.Raw = msgspec.Raw()
    result: msgspec.Raw = msgspec.Raw()


class _Tool(msgspec.Struct, gc=False):
    type: str = ""


class _Request(msgspec.Struct, gc=False):
    model: str | None = None
    input: str | list[_Item] | None = None
    instructions: msgspec.Raw = msgspec.Raw()
    stream: bool | None = None
    tools: list[_Tool] | None = None
    max_output_tokens: int | None = None
    text: msgspec.Raw = msgspec.Raw()
    include: list[str] | None = None
    top_logprobs: int | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    conversation: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


_decode_request: Final = msgspec.json.Decoder(_Request).decode
_IMAGE: Final = re.compile(rb'(?<!\\)"type"\s*:\s*"(?:input_image|computer_screenshot)"')
_FILE: Final = re.compile(rb'(?<!\\)"type"\s*:\s*"input_file"')
_FILE_DATA: Final = re.compile(rb'(?<!\\)"file_data"\s*:\s*"[A-Za-z0-9+/=]*"')
_STREAMED_TOOLS: Final = frozenset({"function"})  # what others do has no place in the events of a stream
_LOGPROBS: Final = "message.output_text.logprobs"

NO_BACKGROUND: Final = (
    '"background" cannot be served: an answer is made while its request is open. Leave it out, and set "stream" if the '
    "answer may take long"
)
NO_CONVERSATION: Final = (
    '"conversation" cannot be served: it lives at one vendor, and another may have to take over. Send the items as '
    '"input", or name the last answer in "previous_response_id"'
)
NO_PROMPT: Final = (
    '"prompt" cannot be served: the template lives at one vendor, and another may have to take over. Send its text as '
    '"instructions" and "input"'
)
NO_REFERENCE: Final = (
    'an "item_reference" cannot be served: items are not kept at the vendor. Send the item itself, as many clients do '
    'with "store": false, or name the last answer in "previous_response_id"'
)


def read_head(body: bytes) -> Head:
    """See ``Dialect.read_head``. The estimate of prompt tokens takes the whole body for prompt: it nearly is."""
    request = read_request(_decode_request, body, "input")
    if not request.model:
        raise BadRequest(NO_MODEL)
    _refuse(request)
    images, files, media_bytes = _media(request.input)
    return Head(
        model=request.model,
        stream=request.stream is True,
        tools=bool(request.tools),
        images=images > 0,
        include_usage=True,
        max_output_tokens=request.max_output_tokens,
        prompt_tokens=(len(body) - media_bytes) // BYTES_PER_TOKEN + (images + files) * IMAGE_TOKENS,
        conversation=_conversation(request),
        streamable=_is_streamable(request),
        structured=b'"json_' in bytes(request.text),
        previous=request.previous_response_id or "",
        kept=request.store is not False,  # unless the client says no
    )


def _refuse(request: _Request) -> None:
    """What no upstream can be given, whatever it speaks."""
    if request.background:
        raise BadRequest(NO_BACKGROUND, code="unsupported")
    if is_filled(request.conversation):
        raise BadRequest(NO_CONVERSATION, code="unsupported")
    if is_filled(request.prompt):
        raise BadRequest(NO_PROMPT, code="unsupported")
    if not request.input and not request.previous_response_id:
        raise BadRequest('"input" is missing or empty: send a text or at least one item')
    if len(request.instructions) and memoryview(request.instructions)[0] not in (_STRING_START, ord("n")):
        raise BadRequest('"instructions" must be a string; what is more than that can be said in "input"')
    if isinstance(request.input, list):
        for item in request.input:
            if item.type == "item_reference" or (item.type is None and item.role is None):
                raise BadRequest(NO_REFERENCE, code="unsupported")


def _is_streamable(request: _Request) -> bool:
    if request.top_logprobs or (request.include is not None and _LOGPROBS in request.include):
        return False
    return all(tool.type in _STREAMED_TOOLS for tool in request.tools or ())


def _conversation(request: _Request) -> int:
    """Hash what stays the same through all turns: the instructions and the text up to the first user message.

    Its text, not its bytes: what was a string in the first request is an item in the next.
    """
    checksum, length = zlib.crc32(request.instructions), len(request.instructions)
    items = request.input or ""
    if isinstance(items, str):
        text = items.encode("utf-8", "replace")
        return (length + len(text)) << 32 | zlib.crc32(text, checksum)
    for item in items[:CONVERSATION_MESSAGES_MAX]:
        text = _text(item.content)
        checksum = zlib.crc32(text, checksum)
        length += len(text)
        if item.role == "user":
            break
    return length << 32 | checksum


class _TextPart(msgspec.Struct, gc=False):
    text: str | None = None


_decode_content: Final = msgspec.json.Decoder(str | list[_TextPart]).decode


def _text(content: msgspec.Raw) -> bytes:
    try:
        told = _decode_content(content)
    except JSON_ERRORS:
        return bytes(content)
    text = told if isinstance(told, str) else "".join([part.text or "" for part in told])
    return text.encode("utf-8", "replace")


def _media(items: str | list[_Item] | None) -> tuple[int, int, int]:
    """Return how many images and how many files there are, and how many bytes they take up as data."""
    images = files = size = 0
    if not isinstance(items, list):
        return images, files, size
    for item in items:
        size += len(item.result)  # a picture that was drawn
        content = item.content or item.output
        if content and item.role != "assistant" and memoryview(content)[0] in _CONTAINER_STARTS:
            text = bytes(content)
            images += len(_IMAGE.findall(text))
            files += len(_FILE.findall(text))
            size += sum(map(len, DATA_URL.findall(text))) + sum(map(len, _FILE_DATA.findall(text)))
    return images, files, size


# --- tools ------------------------------------------------------------------------------------------------------------


class _OfferedTool(msgspec.Struct, gc=False):
    type: str = ""
    name: str = ""
    parameters: Any = None


class _Offer(msgspec.Struct, gc=False):
    tools: list[_OfferedTool] | None = None


_decode_offer: Final = msgspec.json.Decoder(_Offer).decode


def tool_schemas(body: bytes) -> dict[str, dict[str, Any]]:
    """See ``Dialect.tool_schemas``. A tool of another kind than functions makes the whole list unreadable."""
    try:
        tools = _decode_offer(body).tools or []
    except JSON_ERRORS:
        return {}
    if any(tool.type != "function" for tool in tools):
        return {}
    return {tool.name: tool.parameters if isinstance(tool.parameters, dict) else {} for tool in tools}


# --- taken up again ---------------------------------------------------------------------------------------------------


def continue_request(body: bytes, text: str, manner: str) -> bytes:
    """See ``Dialect.continue_request``."""
    fields = read_fields(body)
    turns: list[dict[str, str]] = [{"role": "assistant", "content": text.rstrip()}]
    if manner == "instructed":
        turns.append(ask_to_go_on(text))
    fields["input"] = msgspec.Raw(_joined([_items(fields), _encode(turns)]))
    return _encode(fields)


# --- conversations kept here ------------------------------------------------------------------------------------------


def input_items(body: bytes) -> bytes:
    """Return what the request itself says, as a JSON array of items. Raises ``BadRequest``."""
    return _items(_fields(body))


def chained(body: bytes, history: Sequence[bytes]) -> bytes:
    """Return the same request with the conversation in front of its own items and without the id of an answer.

    ``history``: JSON arrays of items, oldest first. Instructions are not among them: each request brings its own, and
    those of earlier ones do not count (OpenAI's API reference, 2026). Raises ``BadRequest``.
    """
    fields = _fields(body)
    fields.pop("previous_response_id", None)
    fields["input"] = msgspec.Raw(_joined([*history, _items(fields)]))
    return _encode(fields)


def _fields(body: bytes) -> Fields:
    return read_request(_decode_fields, body, "input")


def _items(fields: Fields) -> bytes:
    """``input`` as an array: a text is short for one message of the user."""
    given = bytes(fields.get("input", _NULL))
    if given in (b"null", b'""'):
        return b"[]"
    if given[0] == _STRING_START:
        return b'[{"type":"message","role":"user","content":%b}]' % given
    if given[0] != _LIST_START:
        raise BadRequest('"input" must be a string or an array of items')
    return given


def _joined(arrays: Sequence[bytes]) -> bytes:
    """One array of what is in all of them, byte for byte."""
    inner = [array.strip()[1:-1].strip() for array in arrays]
    return b"[%b]" % b",".join([items for items in inner if items])


# --- patched ----------------------------------------------------------------------------------------------------------

SEALS: Final = "reasoning.encrypted_content"  # what ``include`` calls them


def patch_request(body: bytes, head: Head, upstream: Upstream, recall: Recall | None = None) -> bytes:
    """See ``Dialect.patch_request``."""
    fields, fix = read_fields(body), upstream.fix
    fields["model"] = msgspec.Raw(_encode(upstream.wire_model))
    if (bytes(fields.get("stream", _FALSE)) == b"true") != head.stream:
        fields["stream"] = _TRUE if head.stream else _FALSE
    if not head.stream:
        fields.pop("stream_options", None)
    fields.pop("previous_response_id", None)
    _keep_nothing(fields)
    if head.max_output_tokens is not None and upstream.max_output_tokens is not None:
        fields["max_output_tokens"] = msgspec.Raw(b"%d" % min(head.max_output_tokens, upstream.max_output_tokens))
    patch_options(fields, head, fix)
    _patch_tools(fields, head, fix)
    _patch_input(fields, upstream, recall)
    for name in fix.rejected_fields:
        fields.pop(name, None)
    return _encode(fields)


def _keep_nothing(fields: Fields) -> None:
    """The upstream keeps nothing, so thinking is to come with its seal, which stands in for what would be kept.

    Asked for only along with other wishes about thinking: models that do none refuse it (OpenAI, 2026).
    """
    if bytes(fields.get("store", _NULL)) == b"false":
        return
    fields["store"] = _FALSE
    included = bytes(fields.get("include", _NULL))
    if "reasoning" in fields and SEALS.encode() not in included:
        fields["include"] = msgspec.Raw(_joined([b"[]" if included == b"null" else included, _encode([SEALS])]))


class _Named(msgspec.Struct, gc=False):
    name: str | None = None


_decode_named: Final = msgspec.json.Decoder(list[_Named]).decode


def _patch_tools(fields: Fields, head: Head, fix: Fix) -> None:
    if not fix.unique_tool_names or not head.tools:
        return
    try:
        tools = _decode_named(fields["tools"])
    except JSON_ERRORS:
        return  # not as tools are: the upstream will say so better
    keep_first(fields, [tool.name for tool in tools])


# --- history ----------------------------------------------------------------------------------------------------------

_CALLS: Final = frozenset({"function_call", "custom_tool_call"})
_ANSWERED: Final = frozenset({"reasoning", "mcp_list_tools", "mcp_approval_request", "compaction"})
# The only kinds that need no id (OpenAI's API reference, 2026).
_NAMELESS: Final = frozenset({None, "message", "reasoning", "function_call_output", "custom_tool_call_output", *_CALLS})
_OUR_ID: Final = re.compile(r"[a-z]+_.*_[0-9]+$").match  # of items put together here: the answer's id, and a place
_SYSTEM: Final = msgspec.Raw(b'"system"')
_NO_ARGUMENTS: Final = msgspec.Raw(b'"{}"')
_BLANK: Final = " "  # an empty text is refused like a missing one
# What is in a history that may have to be changed for some upstream or other.
_TELLTALES: Final = (b'"id"', b'"reasoning"', b'_call"')


class _Piece(msgspec.Struct, gc=False):
    """What has to be known of an item to say whether it must change."""

    type: str | None = None
    role: str | None = None
    id: str | None = None
    call_id: str | None = None
    encrypted_content: str | None = None


_Entry = tuple[_Piece, msgspec.Raw]
_decode_pieces: Final = msgspec.json.Decoder(list[_Piece]).decode


def _patch_input(fields: Fields, upstream: Upstream, recall: Recall | None) -> None:
    """Open the history if something in it may have to change, and write it anew if something did."""
    given = bytes(fields.get("input", _NULL))
    if given[0] != _LIST_START:
        return
    developer = not upstream.fix.developer_role and b'"developer"' in given
    if not developer and not any(telltale in given for telltale in _TELLTALES):
        return
    history = _History(upstream, recall)
    try:
        patched = history.patched(given)
    except JSON_ERRORS:
        try:
            patched = history.patched(mended(given))
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            return  # not as items are: the upstream will say so better
    if patched is not None:
        fields["input"] = msgspec.Raw(patched)


def _is_answer(entry: _Entry) -> bool:
    """True for what a model wrote, or its server did for it."""
    piece, _ = entry
    kind = piece.type
    return piece.role == "assistant" or (kind is not None and (kind in _ANSWERED or kind.endswith("_call")))


class _History:
    """One history, as one upstream will have it."""

    __slots__ = ("_author", "_demanding", "_fix", "_recall", "_told")

    def __init__(self, upstream: Upstream, recall: Recall | None) -> None:
        fix = upstream.fix
        self._author = upstream.author
        self._recall = recall
        self._fix = fix
        self._told: set[str] = set()  # the seals that are in the history so far, or have been put back
        # Whether there is more to an item than whose it is.
        self._demanding = not fix.developer_role or fix.strict_arguments or fix.string_tool_content or _limits_ids(fix)

    def patched(self, given: bytes) -> bytes | None:
        """The items as the upstream wants them, None if that is how they are."""
        self._told.clear()
        items = _decode_raws(given)
        patched: list[msgspec.Raw] = []
        for is_answer, run in groupby(zip(_decode_pieces(given), items, strict=True), _is_answer):
            entries = list(run)
            patched += self._turn(entries) if is_answer else self._nameless(entries)
        unchanged = len(patched) == len(items) and all(map(is_, patched, items))
        return None if unchanged else _encode(patched)

    def _turn(self, turn: list[_Entry]) -> list[msgspec.Raw]:
        """The turn with thinking as this upstream takes it: as it came where this upstream wrote it."""
        came_with = self._recalled(turn)
        own = came_with is not None and came_with.author == self._author
        manner = self._fix.reasoning_content
        thoughts = [entry for entry in turn if entry[0].type == "reasoning"]
        seals = {piece.encrypted_content for piece, _ in thoughts if piece.encrypted_content}
        left_out = self._left_out(seals, came_with if own else None)
        whole = seals or ((thoughts or manner == "keep") and not left_out)
        if own and whole and manner != "reject":
            return self._as_it_came(turn)
        rest = [entry for entry in turn if entry[0].type != "reasoning"]
        if manner == "require":
            return _in_plain_text(thoughts, rest, came_with) + self._nameless(rest)
        if manner == "keep" and came_with is None:
            rest = [entry for entry in turn if entry[0].type != "reasoning" or entry[0].encrypted_content]
        return [_sealed_item(block) for block in left_out if manner == "keep"] + self._nameless(rest)

    def _left_out(self, seals: set[str], own: Remembered | None) -> list[Reasoning]:
        """Sealed thinking that came with a turn and is not in the history, which has these ``seals`` here."""
        self._told |= seals
        blocks = own.thinking if own is not None else ()
        left_out = [block for block in blocks if block.seal and block.seal not in self._told]
        self._told.update([block.seal for block in left_out])
        return left_out

    def _as_it_came(self, turn: list[_Entry]) -> list[msgspec.Raw]:
        named_here = any(piece.id is not None and _OUR_ID(piece.id) for piece, _ in turn)
        if not named_here and not self._demanding:
            return [raw for _, raw in turn]
        return [self._item(entry, nameless=named_here) for entry in turn]

    def _nameless(self, entries: list[_Entry]) -> list[msgspec.Raw]:
        return [self._item(entry, nameless=True) for entry in entries]

    def _recalled(self, turn: list[_Entry]) -> Remembered | None:
        """What is remembered of the turn: any of its calls leads there, or, if it has none, any seal."""
        if self._recall is None:
            return None
        keys = [piece.call_id for piece, _ in turn if piece.type in _CALLS and piece.call_id] or [
            seal_key(piece.encrypted_content) for piece, _ in turn if piece.encrypted_content
        ]
        return next((remembered for remembered in map(self._recall, keys) if remembered is not None), None)

    def _item(self, entry: _Entry, *, nameless: bool) -> msgspec.Raw:
        """The item as this upstream wants it; the same object if that is how it is."""
        piece, raw = entry
        nameless = nameless and piece.id is not None and piece.type in _NAMELESS
        if not nameless and not self._demanding:
            return raw
        item = _decode_fields(raw)
        if nameless:
            _leave_name_out(item, piece)
        fitted = self._demanding and _fit(item, piece, self._fix)
        return msgspec.Raw(_encode(item)) if nameless or fitted else raw


# --- thinking ---------------------------------------------------------------------------------------------------------


def _sealed_item(block: Reasoning) -> msgspec.Raw:
    """Sealed thinking as it is given back. Without its id: that it may lack where it has its seal."""
    summary = [{"type": "summary_text", "text": block.text}] if block.text else []
    return msgspec.Raw(_encode({"type": "reasoning", "summary": summary, "encrypted_content": block.seal}))


class _Thought(msgspec.Struct, gc=False):
    summary: list[_TextPart] | None = None
    content: list[_TextPart] | None = None


_decode_thought: Final = msgspec.json.Decoder(_Thought).decode


def _in_plain_text(thoughts: list[_Entry], rest: list[_Entry], came_with: Remembered | None) -> list[msgspec.Raw]:
    """Thinking for whoever demands that calls come with it: as given, as remembered, or else a blank."""
    if not any(piece.type in _CALLS for piece, _ in rest):
        return []
    texts = [thought_text(_decode_thought(raw)) for _, raw in thoughts]
    text = "\n\n".join([text for text in texts if text.strip()]) or (came_with.reasoning if came_with else "") or _BLANK
    return [msgspec.Raw(_encode(plain_thought(text)))]


def plain_thought(text: str) -> dict[str, Any]:
    """A reasoning item of somebody who thinks in the open. Its id leads nowhere; servers check that there is one."""
    told = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": f"rs_{seal_key(text)}", "summary": [], "content": told}


def thought_text(thought: Any) -> str:
    """The text of a reasoning item with ``summary`` and ``content``: what was thought, else the summary of it."""
    parts = thought.content or thought.summary or ()
    return "\n\n".join([part.text for part in parts if part.text])


# --- items ------------------------------------------------------------------------------------------------------------


class _OutputPart(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None


_decode_output: Final = msgspec.json.Decoder(list[_OutputPart]).decode


def _leave_name_out(item: Fields, piece: _Piece) -> None:
    """Take the id away; an assistant message then takes the form that has none."""
    del item["id"]
    content = item.get("content", _NULL)
    if piece.role != "assistant" or memoryview(content)[0] != _LIST_START:
        return
    parts = _decode_output(content)
    if all(part.type == "output_text" for part in parts):
        item["content"] = msgspec.Raw(_encode("".join([part.text or "" for part in parts])))
        item.pop("status", None)


def _limits_ids(fix: Fix) -> bool:
    return fix.call_id_length is not None or fix.call_id_limit is not None


def _fit(item: Fields, piece: _Piece, fix: Fix) -> bool:
    """What an upstream demands of every item of a kind; true if that changed it."""
    changed = _limits_ids(fix) and fitting_field(fix, "call_id", item)
    if not fix.developer_role and piece.role == "developer":
        item["role"] = _SYSTEM
        changed = True
    if fix.strict_arguments and piece.type == "function_call" and not is_object(_string(item.get("arguments", _NULL))):
        item["arguments"] = _NO_ARGUMENTS
        changed = True
    if fix.string_tool_content and piece.type == "function_call_output":
        output = item.get("output", _NULL)
        if memoryview(output)[0] == _LIST_START:
            item["output"] = msgspec.Raw(_encode(joined_parts(bytes(output))))
            changed = True
    return changed


def _string(value: msgspec.Raw) -> str:
    return _decode_string(value) if memoryview(value)[0] == _STRING_START else ""
