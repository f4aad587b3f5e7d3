"""The history of a chat request, as one upstream will have it.

Theory of operation
-------------------
A conversation outlives the upstream it began with, and each has rules of its own for the turns of others: text that
must be there or must not, ids of a certain shape, seals that only their maker can open. A ``Fix`` names the rules of an
upstream; here they are kept.

* The messages are opened one level deep and each is given to the rewrites for its role. They are written anew only if
  one of them was changed, else they stay byte for byte as they came.
* What clients drop is put back from ``Recall``: thinking as text for whoever demands it, sealed thinking only for the
  model that sealed it.
* What a rewrite does to a turn it does in every later request as well. So a history that has grown at its end still
  begins with the same bytes, and the upstream's prompt cache holds. That is why an id is replaced by a digest of
  itself. The marks for caches do move along; they are not part of what is cached.

What is ugly: a field is looked for by its name alone, so what a client puts there for another purpose is taken for it.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from typing import Final

import msgspec

from routerd.canonical import Fix, Head, Recall, Remembered, Upstream

JSON_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

Fields = dict[str, msgspec.Raw]
_Rewrite = Callable[[Fields], bool]  # changes the object in place; true if it did
_encode: Final = msgspec.json.Encoder().encode
_decode_fields: Final = msgspec.json.Decoder(Fields).decode
_decode_objects: Final = msgspec.json.Decoder(list[Fields]).decode
_decode_string: Final = msgspec.json.Decoder(str).decode

_NULL: Final = msgspec.Raw(b"null")
_EMPTY_STRING: Final = msgspec.Raw(b'""')
_EMPTY_ARGUMENTS: Final = msgspec.Raw(b'"{}"')
_BLANK_REASONING: Final = msgspec.Raw(b'" "')  # an empty string is refused like a missing one
_SYSTEM: Final = msgspec.Raw(b'"system"')
_ASSISTANT: Final = b'"assistant"'
_TOOL: Final = b'"tool"'
_STRING_START: Final = ord('"')
_REASONING_FIELDS: Final = ("reasoning_content", "reasoning", "reasoning_details")


def _is_null(value: msgspec.Raw) -> bool:
    return len(value) == 4 and bytes(value) == b"null"


def _is_string(value: msgspec.Raw) -> bool:
    return memoryview(value)[0] == _STRING_START


def _string(value: msgspec.Raw) -> str:
    """The text of a string, "" for anything else."""
    return _decode_string(value) if _is_string(value) else ""


# --- what a message is ------------------------------------------------------------------------------------------------


def _no_developer(message: Fields) -> bool:
    message["role"] = _SYSTEM
    return True


def _tool_content_as_string(message: Fields) -> bool:
    content = message.get("content", _NULL)
    if _is_string(content):
        return False
    message["content"] = _EMPTY_STRING if _is_null(content) else msgspec.Raw(_encode(joined_parts(bytes(content))))
    return True


class _TextPart(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None


def joined_parts(content: bytes) -> str:
    """Return the text of a list of parts; a part without text leaves its type, so that the model knows of it."""
    try:
        parts = msgspec.json.decode(content, type=list[_TextPart])
    except msgspec.ValidationError:
        return content.decode("utf-8", "replace")
    return "".join(part.text if part.text is not None else f"[{part.type}]" for part in parts)


def _no_null_content(message: Fields) -> bool:
    if not _is_null(message.get("content", _NULL)):
        return False
    message["content"] = _EMPTY_STRING
    return True


def _no_reasoning(message: Fields) -> bool:
    found = [name for name in _REASONING_FIELDS if name in message]
    for name in found:
        del message[name]
    return bool(found)


def _no_details(message: Fields) -> bool:
    return message.pop("reasoning_details", None) is not None


# --- what a tool call is ----------------------------------------------------------------------------------------------


def _calls(message: Fields) -> list[Fields]:
    """The tool calls of a turn; none if they are of another shape."""
    calls = message.get("tool_calls")
    if calls is None:
        return []
    try:
        return _decode_objects(calls)
    except msgspec.ValidationError:
        return []


def _each_call(rewrite: _Rewrite, message: Fields) -> bool:
    calls = _calls(message)
    changed = [rewrite(call) for call in calls]
    if any(changed):
        message["tool_calls"] = msgspec.Raw(_encode(calls))
    return any(changed)


def _no_extra_content(call: Fields) -> bool:
    return call.pop("extra_content", None) is not None


def _no_signatures(message: Fields) -> bool:
    calls = message.get("tool_calls")
    return calls is not None and b'"extra_content"' in bytes(calls) and _each_call(_no_extra_content, message)


class _CallId(msgspec.Struct, gc=False):
    id: str | None = None


_decode_call_ids: Final = msgspec.json.Decoder(list[_CallId] | None).decode


def _call_ids(message: Fields) -> list[str]:
    calls = message.get("tool_calls")
    if calls is None:
        return []
    try:
        return [call.id for call in _decode_call_ids(calls) or () if call.id]
    except msgspec.ValidationError:
        return []


class _CalledFunction(msgspec.Struct, gc=False):
    arguments: str


class _CallMade(msgspec.Struct, gc=False):
    function: _CalledFunction


_decode_calls: Final = msgspec.json.Decoder(list[_CallMade] | None).decode


def _only_strict_arguments(message: Fields) -> bool:
    calls = message.get("tool_calls")
    return calls is not None and not _has_strict_arguments(calls) and _each_call(_strict_arguments, message)


def _has_strict_arguments(calls: msgspec.Raw) -> bool:
    try:
        return all(is_object(call.function.arguments) for call in _decode_calls(calls) or ())
    except msgspec.ValidationError:
        return False


def _strict_arguments(call: Fields) -> bool:
    try:
        function = _decode_fields(call.get("function", _NULL))
    except msgspec.ValidationError:
        return False
    arguments = bytes(function.get("arguments", _NULL))
    if arguments.startswith(b'"') and is_object(msgspec.json.decode(arguments, type=str)):
        return False
    whole = arguments.startswith(b"{")
    function["arguments"] = msgspec.Raw(_encode(arguments.decode())) if whole else _EMPTY_ARGUMENTS
    call["function"] = msgspec.Raw(_encode(function))
    return True


def is_object(text: str) -> bool:
    try:
        _decode_fields(text)
    except JSON_ERRORS:
        try:
            return isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            return False
    return True


# --- ids of calls -----------------------------------------------------------------------------------------------------

_DIGEST_BYTES: Final = 16
_DIGEST_LENGTH_MAX: Final = 21  # letters and digits that come of so many bytes
_PLAIN: Final = re.compile(r"[A-Za-z0-9_-]+")


def _fits(fix: Fix, call_id: str) -> bool:
    length, limit = fix.call_id_length, fix.call_id_limit
    if length is not None:
        return len(call_id) == length and call_id.isascii() and call_id.isalnum()
    return limit is None or (len(call_id) <= limit and _PLAIN.fullmatch(call_id) is not None)


def _digest(fix: Fix, call_id: str) -> str:
    """What stands for an id that does not fit: the same for a call and its result, in this and every later request."""
    digest = blake2b(call_id.encode(), digest_size=_DIGEST_BYTES).digest()
    length = fix.call_id_length or min(fix.call_id_limit or _DIGEST_LENGTH_MAX, _DIGEST_LENGTH_MAX)
    return b64encode(digest, altchars=b"xy")[:length].decode()


def _fitting_ids(fix: Fix, message: Fields) -> bool:
    if all(_fits(fix, call_id) for call_id in _call_ids(message)):
        return False
    return _each_call(partial(fitting_field, fix, "id"), message)


def fitting_field(fix: Fix, name: str, fields: Fields) -> bool:
    call_id = _string(fields.get(name, _NULL))
    if not call_id or _fits(fix, call_id):
        return False
    fields[name] = msgspec.Raw(_encode(_digest(fix, call_id)))
    return True


# --- what clients drop ------------------------------------------------------------------------------------------------


def _recalled(message: Fields, recall: Recall | None) -> Remembered | None:
    """What is known of the answer this turn was: any of its calls leads there."""
    if recall is None:
        return None
    found = map(recall, _call_ids(message))
    return next((remembered for remembered in found if remembered is not None), None)


def _required_reasoning(recall: Recall | None, message: Fields) -> bool:
    """A turn that called tools carries its thinking: as it came, as it is remembered, or else a blank."""
    if bytes(message.get("tool_calls", _NULL)) in (b"null", b"[]"):
        return False
    given = message.get("reasoning_content", _NULL)
    if _says_something(given):
        return False
    wanted = message.get("reasoning", _NULL)  # the same text under its other name
    if not _says_something(wanted):
        remembered = _recalled(message, recall)
        text = remembered.reasoning if remembered is not None else ""
        wanted = msgspec.Raw(_encode(text)) if text.strip() else _BLANK_REASONING
    message["reasoning_content"] = wanted
    return bytes(given) != bytes(wanted)


def _says_something(value: msgspec.Raw) -> bool:
    """A blank is what clients pad with when they have lost the text."""
    return _is_string(value) and bytes(value).strip(b'" ') != b""


def _own_details(author: str, recall: Recall | None, message: Fields) -> bool:
    """Sealed thinking goes to the model that sealed it. Where nobody knows who did, the client is believed."""
    remembered = _recalled(message, recall)
    if remembered is None:
        return False
    if remembered.author != author:
        return _no_details(message)
    if not remembered.details or "reasoning_details" in message:
        return False
    message["reasoning_details"] = msgspec.Raw(remembered.details.encode())
    return True


def _own_signatures(author: str, blank: str, recall: Recall | None, message: Fields) -> bool:
    """The same for the seals on calls. Where a turn has none at all, its first call gets the vendor's blank."""
    calls = _calls(message)
    if not calls:
        return False
    remembered = _recalled(message, recall)
    changed = [_own_signature(author, remembered, call) for call in calls] if remembered is not None else []
    if blank and not any("extra_content" in call for call in calls):
        calls[0]["extra_content"] = msgspec.Raw(blank.encode())
        changed.append(True)
    if any(changed):
        message["tool_calls"] = msgspec.Raw(_encode(calls))
    return any(changed)


def _own_signature(author: str, remembered: Remembered, call: Fields) -> bool:
    if remembered.author != author:
        return _no_extra_content(call)
    signature = remembered.signatures.get(_string(call.get("id", _NULL)))
    if signature is None or "extra_content" in call:
        return False
    call["extra_content"] = msgspec.Raw(signature.encode())
    return True


# --- marks for caches -------------------------------------------------------------------------------------------------

CACHE_MARKS_MAX: Final = 4  # a fifth is refused (Anthropic's docs and Alibaba's, 2026)
_CACHE_KEY: Final = b'"cache_control"'
_CACHE_MARK: Final = b'{"type":"ephemeral"}'
_SYSTEM_ROLES: Final = frozenset({b'"system"', b'"developer"'})


def _wants_marks(fields: Fields, head: Head, upstream: Upstream) -> bool:
    """True where the client has set none itself, and where a later request can be expected to begin with this one.

    Writing to such a cache costs a quarter more than not to, and a title or a summary is asked for once.
    """
    if not upstream.fix.cache_markers or "cache_control" in fields:
        return False
    messages = bytes(fields["messages"])
    if not head.tools and _ASSISTANT not in messages:
        return False
    return _CACHE_KEY not in messages and _CACHE_KEY not in bytes(fields.get("tools", _NULL))


def _mark_cache(messages: list[Fields]) -> bool:
    """Mark the end of the system prompt, and of the last turns of users and tools.

    A turn goes up to the next message of the assistant. So the last mark of one request is among those of the next,
    however many calls were made in between, and that one finds what this one stored.
    """
    roles = [bytes(message.get("role", _NULL)) for message in messages]
    start = next((place for place, role in enumerate(roles) if role not in _SYSTEM_ROLES), len(roles))
    marks = int(_mark_last(messages[:start]))
    for turn in _turns_from_the_end(messages[start:], roles[start:]):
        marks += _mark_last(turn)
        if marks == CACHE_MARKS_MAX:
            break
    return marks > 0


def _turns_from_the_end(messages: list[Fields], roles: list[bytes]) -> Iterator[list[Fields]]:
    end = len(messages)
    for place in range(end - 1, -1, -1):
        if roles[place] == _ASSISTANT:
            yield messages[place + 1 : end]
            end = place
    yield messages[:end]


def _mark_last(messages: list[Fields]) -> bool:
    """Mark the last message that has text."""
    return any(_mark(message) for message in reversed(messages))


def _mark(message: Fields) -> bool:
    content = message.get("content", _NULL)
    if _is_string(content):
        return _mark_text(message, content)
    try:
        parts = _decode_objects(content)
    except msgspec.ValidationError:
        return False
    for part in reversed(parts):
        if bytes(part.get("type", _NULL)) == b'"text"' and _string(part.get("text", _NULL)).strip():
            part["cache_control"] = msgspec.Raw(_CACHE_MARK)
            message["content"] = msgspec.Raw(_encode(parts))
            return True
    return False


def _mark_text(message: Fields, text: msgspec.Raw) -> bool:
    """A string becomes a list of one part, for only parts can be marked, and only those with text in them."""
    if not _string(text).strip():
        return False
    part = b'{"type":"text","text":' + bytes(text) + b"," + _CACHE_KEY + b":" + _CACHE_MARK + b"}"
    message["content"] = msgspec.Raw(b"[" + part + b"]")
    return True


# --- all of it --------------------------------------------------------------------------------------------------------

# (the fix asks for it, the role it is about, the rewrite)
_REWRITES: Final[tuple[tuple[Callable[[Fix], bool], bytes, _Rewrite], ...]] = (
    (lambda fix: fix.string_tool_content, _TOOL, _tool_content_as_string),
    (lambda fix: not fix.null_content, _ASSISTANT, _no_null_content),
    (lambda fix: fix.strict_arguments, _ASSISTANT, _only_strict_arguments),
    (lambda fix: fix.reasoning_content == "reject", _ASSISTANT, _no_reasoning),
    (lambda fix: not fix.reasoning_details, _ASSISTANT, _no_details),
    (lambda fix: not fix.thought_signatures, _ASSISTANT, _no_signatures),
    (lambda fix: not fix.developer_role, b'"developer"', _no_developer),
)


def _rewrites(upstream: Upstream, recall: Recall | None) -> dict[bytes, list[_Rewrite]]:
    """What is to be done to the messages of each role, in this order."""
    fix = upstream.fix
    rewrites: dict[bytes, list[_Rewrite]] = {_ASSISTANT: [], _TOOL: []}
    for asks, role, rewrite in _REWRITES:
        if asks(fix):
            rewrites.setdefault(role, []).append(rewrite)
    answers = rewrites[_ASSISTANT]
    if fix.reasoning_content == "require":
        answers.append(partial(_required_reasoning, recall))
    if fix.reasoning_details:
        answers.append(partial(_own_details, upstream.author, recall))
    if fix.thought_signatures:
        answers.append(partial(_own_signatures, upstream.author, fix.blank_signature, recall))
    if fix.call_id_length is not None or fix.call_id_limit is not None:  # last: recall goes by the client's ids
        answers.append(partial(_fitting_ids, fix))
        rewrites[_TOOL].append(partial(fitting_field, fix, "tool_call_id"))
    return rewrites


def patch_messages(fields: Fields, head: Head, upstream: Upstream, recall: Recall | None) -> None:
    """Rewrite ``messages`` as the upstream wants them. What is not as messages are is left for it to refuse."""
    rewrites = _rewrites(upstream, recall)
    try:
        messages = _decode_objects(fields["messages"])
        changed = [
            rewrite(message) for message in messages for rewrite in rewrites.get(bytes(message.get("role", _NULL)), ())
        ]
        if _wants_marks(fields, head, upstream):
            changed.append(_mark_cache(messages))
    except JSON_ERRORS:
        return
    if any(changed):
        fields["messages"] = msgspec.Raw(_encode(messages))
