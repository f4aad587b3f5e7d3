"""Responses: what a client that names an earlier answer goes on with.

The items of an answer are taken as the client gets them, from its last event, which repeats them all. Some servers
leave that list empty, so the items that end on the way are noted as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from routerd.dialects.chat_request import JSON_ERRORS
from routerd.dialects.responses_request import chained, input_items
from routerd.dialects.sse import Framer

NOTED_BYTES_MAX: Final = 8 * 1024 * 1024  # of the items of one answer; a longer one cannot be gone on from
_ITEM_DONE: Final = "response.output_item.done"
_ENDS: Final = ("response.completed", "response.incomplete")  # what breaks off at a limit is a part of a conversation
_find_telling: Final = re.compile("|".join(map(re.escape, (_ITEM_DONE, *_ENDS))).encode()).search
_ENDED: Final = frozenset({"completed", "incomplete"})


class _Answer(msgspec.Struct, gc=False):
    id: str | None = None
    status: str | None = None
    output: msgspec.Raw = msgspec.Raw()


class _Event(msgspec.Struct, gc=False):
    type: str = ""
    item: msgspec.Raw = msgspec.Raw()
    response: _Answer | None = None


_decode_event: Final = msgspec.json.Decoder(_Event).decode
_decode_answer: Final = msgspec.json.Decoder(_Answer).decode
_decode_items: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


class ResponsesRecorder:
    """Sees the items of one answer, and its end."""

    __slots__ = ("_items", "_size")

    def __init__(self) -> None:
        self._items: list[bytes] = []
        self._size = 0

    def stream(self, data: bytes) -> tuple[str, bytes] | None:
        """See ``Recorder``. Most events are told by a look that they are neither an item's end nor the answer's."""
        if _find_telling(data) is None:
            return None
        found = None
        for block in Framer().feed(data):
            found = self._read(block.data) or found
        return found

    def body(self, data: bytes) -> tuple[str, bytes] | None:
        try:
            return self._kept(_decode_answer(data))
        except JSON_ERRORS:
            return None

    def _read(self, data: bytes) -> tuple[str, bytes] | None:
        try:
            event = _decode_event(data)
        except JSON_ERRORS:
            return None
        if event.type == _ITEM_DONE and self._size <= NOTED_BYTES_MAX:
            self._items.append(bytes(event.item))
            self._size += len(event.item)
        if event.response is None or event.type not in _ENDS:
            return None
        return self._kept(event.response)

    def _kept(self, answer: _Answer) -> tuple[str, bytes] | None:
        if not answer.id or (answer.status or "completed") not in _ENDED:
            return None
        output = bytes(answer.output)
        if _is_filled(output):
            return answer.id, output
        if self._size > NOTED_BYTES_MAX:
            return None
        return answer.id, b"[%b]" % b",".join(self._items)


def _is_filled(output: bytes) -> bool:
    try:
        return bool(output and _decode_items(output))
    except JSON_ERRORS:
        return False


class ResponsesChaining:
    """How a request goes on from an earlier answer."""

    def input_items(self, body: bytes) -> bytes:
        return input_items(body)

    def chained(self, body: bytes, history: Sequence[bytes]) -> bytes:
        return chained(body, history)

    def recorder(self) -> ResponsesRecorder:
        return ResponsesRecorder()
