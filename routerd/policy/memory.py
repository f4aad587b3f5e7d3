"""What clients drop: the thinking, and the seals, that came with tool calls.

Theory of operation
-------------------
Some vendors refuse a history in which a turn that called tools lacks its thinking or its seal, and many clients send
neither back, or not to every model. So both are remembered for every answer with tool calls, and put back when the
history is fitted to an upstream that wants them. The unit is the answer; it is found by the id of any of its calls, or,
where it has none, by the seals on its thinking: what has to be known of it then is only who made it.

* An id is enough where nobody could have guessed it (``call_8c1f0e...``). Servers also count (``call_0``,
  ``functions.terminal:3``): such an id is only good together with the conversation it was made in, or one agent's
  thoughts would end up in another's history.
* Bounds are ``ENTRIES_MAX`` and ``BYTES_MAX``. The answers whose recall is longest ago leave first, so conversations
  that go on keep all of theirs.
* What must outlive the process is returned as rows to save; an empty value means that the row is to be forgotten, so
  that the disk never holds more than the memory does.

What is ugly: a server that gives the same small id to two calls of one conversation has the later answer recalled for
both. That is right for the newest turn, which is the one vendors check.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from routerd.canonical import Remembered

ENTRIES_MAX: Final = 4096  # answers
BYTES_MAX: Final = 16 * 1024 * 1024  # of all answers, as they are saved
ENTRY_BYTES_MAX: Final = 512 * 1024  # of one; a larger one keeps its seals alone, or nothing
KEEP_S: Final = 7 * 86_400.0

RANDOM_PART_MIN: Final = 12  # letters and digits in a row ...
RANDOM_DIGITS_MIN: Final = 2  # ... with so many digits among them cannot be guessed
_RUNS: Final = re.compile(rf"[A-Za-z0-9]{{{RANDOM_PART_MIN},}}")

Rows = list[tuple[str, bytes]]


class _Entry(msgspec.Struct, frozen=True):
    """One answer. ``keys``: where each of its calls is found; the first names the row. ``wall``: when it was made."""

    wall: float
    keys: tuple[str, ...]
    remembered: Remembered


_decode: Final = msgspec.json.Decoder(_Entry).decode


class Memory:
    """Answers with tool calls, found by the ids of these calls."""

    __slots__ = ("_by_call", "_bytes_max", "_entries", "_entries_max", "_entry_bytes_max", "_size", "_sizes")

    def __init__(self, *, entries_max: int = ENTRIES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._entry_bytes_max = min(ENTRY_BYTES_MAX, bytes_max)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently recalled first
        self._sizes: dict[str, int] = {}
        self._size = 0
        self._by_call: dict[str, _Entry] = {}

    def __repr__(self) -> str:
        return f"<Memory {len(self._entries)} answers, {self._size} bytes>"

    def remember(self, conversation: int, call_ids: Sequence[str], remembered: Remembered, wall: float) -> Rows:
        """Keep what came with these calls. Returns the rows to save."""
        keys = tuple(_key(conversation, call_id) for call_id in call_ids if call_id)
        if not keys or not (remembered.thinking or remembered.details or remembered.signatures):
            return []
        entry = _Entry(wall, keys, remembered)
        value = msgspec.json.encode(entry)
        if len(value) > self._entry_bytes_max:
            entry = _Entry(wall, keys, Remembered(remembered.author, signatures=remembered.signatures))
            value = msgspec.json.encode(entry)
            if not remembered.signatures or len(value) > self._entry_bytes_max:
                return []
        return [*self._put(entry, len(value)), (keys[0], value)]

    def recall(self, conversation: int, call_id: str) -> Remembered | None:
        """What came with this call, if it is known."""
        entry = self._by_call.get(call_id) or self._by_call.get(_scoped(conversation, call_id))
        if entry is None:
            return None
        self._entries.move_to_end(entry.keys[0])
        return entry.remembered

    def restore(self, saved: Mapping[str, bytes], wall: float) -> Rows:
        """Take up what was saved. Returns the rows to forget: those too old, too many, or not to be read."""
        entries: list[tuple[_Entry, int]] = []
        gone: Rows = []
        for key, value in saved.items():
            entry = _read(key, value)
            if entry is None or entry.wall <= wall - KEEP_S or len(value) > self._entry_bytes_max:
                gone.append((key, b""))
            else:
                entries.append((entry, len(value)))
        for entry, size in sorted(entries, key=lambda pair: pair[0].wall):
            gone += self._put(entry, size)
        return gone

    def expire(self, wall: float) -> Rows:
        """Drop what is old and not in use. Returns the rows to forget."""
        gone: Rows = []
        while self._entries and next(iter(self._entries.values())).wall <= wall - KEEP_S:
            gone.append(self._drop_first())
        return gone

    def _put(self, entry: _Entry, size: int) -> Rows:
        key = entry.keys[0]
        if key in self._entries:
            self._forget(key)
        self._entries[key] = entry
        self._sizes[key] = size
        self._size += size
        for call in entry.keys:
            self._by_call[call] = entry
        gone: Rows = []
        while len(self._entries) > self._entries_max or self._size > self._bytes_max:
            gone.append(self._drop_first())
        return gone

    def _drop_first(self) -> tuple[str, bytes]:
        key = next(iter(self._entries))
        self._forget(key)
        return key, b""

    def _forget(self, key: str) -> None:
        entry = self._entries.pop(key)
        self._size -= self._sizes.pop(key)
        for call in entry.keys:
            if self._by_call.get(call) is entry:
                del self._by_call[call]


def _read(key: str, value: bytes) -> _Entry | None:
    try:
        entry = _decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return entry if entry.keys and entry.keys[0] == key else None


def _key(conversation: int, call_id: str) -> str:
    return call_id if _is_random(call_id) else _scoped(conversation, call_id)


def _scoped(conversation: int, call_id: str) -> str:
    return f"{conversation:x} {call_id}"


def _is_random(call_id: str) -> bool:
    return any(sum(map(str.isdigit, run)) >= RANDOM_DIGITS_MIN for run in _RUNS.findall(call_id))
