"""Which earlier answers a client may go on from by naming them alone, and what leaves when there is no more room.

Theory of operation
-------------------
Some clients do not send the conversation again: they name the answer it stands at, and what they add to it. Upstreams
come and go, and few of them keep anything, so the conversation is kept here: each answer with what was asked in that
turn, and a link to the answer before. This module is the index, small enough for memory; the items themselves are read
from disk when somebody goes on from them.

* **A name is a digest** of the answer's id under its owner's own secret: nobody finds another one's answers, and what
  is on disk shows neither ids nor tokens.
* **Bounds** are ``ENTRIES_MAX``, ``BYTES_MAX``, ``ENTRY_BYTES_MAX`` and ``KEEP_S`` without use. Who was used longest
  ago leaves first. Using an answer uses all before it, and these last, oldest of all at the very end: so whoever leaves
  is always the end of its conversation, and no conversation is ever cut in the middle.
* **Most answers are never named again**: clients that send the whole conversation each time ask for storage without
  knowing it, and each of their answers holds all of it. So first answers that nobody has gone on from share
  ``FRESH_SHARE`` of the room among themselves as soon as somebody else needs the rest.
* **A link holds** only while what it points to is what it pointed to when it was made: servers that use an id twice
  exist, and one conversation must never run on into another. In the same conversation the new answer takes the place of
  the old one. In another it is *contested*, if the old one was used within ``CONTESTED_S``: nobody can know which of
  the two is meant, so neither can be named any more.
* **A conversation starts anew**, with all that was said so far as one entry, where the link would not hold for long:
  ``CHAIN_MAX`` answers, or ``RENEW_S`` after its first one, which the disk does not keep for ever.

The index outlives the process as small rows of its own. When an answer was last used is saved once in ``TOUCH_S``, so
that a long conversation does not rewrite all its rows in every turn.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import msgspec

ENTRIES_MAX: Final = 16_384  # answers
BYTES_MAX: Final = 64 * 1024 * 1024  # of all answers, with what was asked
ENTRY_BYTES_MAX: Final = 8 * 1024 * 1024  # of one; a larger one cannot be gone on from by name
FRESH_SHARE: Final = 0.25  # of the room, for first answers that nobody has gone on from
KEEP_S: Final = 30 * 86_400.0  # without use
RENEW_S: Final = 30 * 86_400.0  # with KEEP_S below the age at which stores remove rows that nobody renews
CHAIN_MAX: Final = 512  # answers in a row
TOUCH_S: Final = 86_400.0
CONTESTED_S: Final = 86_400.0

ITEMS: Final = "answer_items"  # the kinds of rows: what was said ...
INDEX: Final = "answer"  # ... and what is known of it

Rows = list[tuple[str, str, bytes]]
"""Kind, key, value. An empty value means that the row is to be forgotten."""


class _Entry(msgspec.Struct):
    """One answer. ``made`` and ``used``: Unix seconds, the first also tells it from an earlier one of its name.

    ``began`` is when the first answer of the conversation was made, ``length`` how many there are with this one.
    ``contested``: another answer bears the same name, so that it can only be linked to.
    """

    made: float
    used: float
    saved: float  # ``used`` as the disk knows it
    size: int
    began: float
    length: int = 1
    parent: str = ""
    parent_made: float = 0.0
    contested: bool = False


_decode: Final = msgspec.json.Decoder(_Entry).decode


def owner_of(token: str) -> bytes:
    """Whose answers those of a token's bearer are; everybody's where no token is asked for (``""``)."""
    return hashlib.sha256(token.encode()).digest() if token else b""


def name_of(answer_id: str, owner: bytes) -> str:
    """Where an owner's answer is kept."""
    return hashlib.blake2b(answer_id.encode(), key=owner, digest_size=18).hexdigest()


class Answers:
    """The index of what can be gone on from."""

    __slots__ = ("_bytes_max", "_entries_max", "_entry_bytes_max", "_fresh", "_going")

    def __init__(self, *, entries_max: int = ENTRIES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._entry_bytes_max = min(ENTRY_BYTES_MAX, bytes_max)
        self._fresh = _Line()  # first answers, until somebody goes on from them
        self._going = _Line()

    def __repr__(self) -> str:
        return f"<Answers {len(self._going)} going on, {len(self._fresh)} fresh, {self._size} bytes>"

    @property
    def _size(self) -> int:
        return self._fresh.size + self._going.size

    def use(self, name: str, wall: float) -> tuple[list[str], Rows]:
        """The answers that lead to this one and itself, oldest first, and the rows to save; none if it is unknown."""
        entry = self._find(name)
        chain = [] if entry is None or entry.contested else self._chain(name)
        return chain, self._touch(chain, wall)

    def joins(self, name: str, parent: str, wall: float) -> bool:
        """True if an answer of this name can be linked to its parent; if not, it is to hold all that was said."""
        before = self._find(parent)
        fits = before is not None and before.length < CHAIN_MAX and before.began > wall - RENEW_S
        return fits and self._find(name) is None and bool(self._chain(parent))

    def contest(self, name: str, parent: str, wall: float) -> Rows | None:
        """The rows to save if another conversation has an answer of this name, else None. Then it is not to be kept.

        ``parent``: the answer that the client went on from.
        """
        other = self._find(name)
        if other is None or name == parent or other.used <= wall - CONTESTED_S:
            return None
        other.contested = True
        return [(INDEX, name, msgspec.json.encode(other))]

    def remember(self, name: str, parent: str, items: bytes, wall: float) -> Rows:
        """Keep a turn's items, behind a parent it ``joins``, or ``""``. Returns the rows to save and to forget."""
        rows = self._forget(name) if self._find(name) is not None else []
        if len(items) > self._entry_bytes_max:
            return rows
        entry = _Entry(wall, wall, wall, len(items), wall)
        before = self._find(parent)
        if before is None:
            self._fresh.put(name, entry)
        else:
            entry.parent, entry.parent_made = parent, before.made
            entry.began, entry.length = before.began, before.length + 1
            self._going.put(name, entry)
            rows += self._touch(self._chain(name), wall)
        rows += [(ITEMS, name, items), (INDEX, name, msgspec.json.encode(entry))]
        return rows + self._shrink()

    def restore(self, saved: Mapping[str, bytes], wall: float) -> Rows:
        """Take up the saved index. Returns the rows to forget: those too old, too many, or not to be read."""
        entries: dict[str, _Entry] = {}
        gone: Rows = []
        for name, value in saved.items():
            entry = _read(value)
            if entry is None or entry.used <= wall - KEEP_S:
                gone += _forgotten(name)
            else:
                entries[name] = entry
        # The last answers first: each is made after its parent, which is so used at least as late as any behind it.
        for entry in sorted(entries.values(), key=_made, reverse=True):
            parent = entries.get(entry.parent)
            if parent is not None:
                parent.used = max(parent.used, entry.used)
        parents = {entry.parent for entry in entries.values()}
        for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].used, -pair[1].made)):
            (self._going if entry.parent or name in parents else self._fresh).put(name, entry)
        return gone + self._shrink()

    def expire(self, wall: float) -> Rows:
        """Drop what nobody has used for long. Returns the rows to forget."""
        gone: Rows = []
        for line in (self._fresh, self._going):
            while line and line.first().used <= wall - KEEP_S:
                gone += _forgotten(line.drop_first())
        return gone

    def _find(self, name: str) -> _Entry | None:
        return self._going.get(name) or self._fresh.get(name)

    def _chain(self, name: str) -> list[str]:
        """Oldest first. Nothing if a link does not hold."""
        names: list[str] = []
        entry = self._find(name)
        while entry is not None and len(names) < CHAIN_MAX:
            names.append(name)
            if not entry.parent:
                return names[::-1]
            name, made = entry.parent, entry.parent_made
            entry = self._find(name)
            if entry is not None and entry.made != made:
                return []
        return []

    def _touch(self, chain: list[str], wall: float) -> Rows:
        rows: Rows = []
        for name in reversed(chain):
            entry = self._going.pop(name) or self._fresh.pop(name)
            if entry is None:
                continue
            self._going.put(name, entry)
            entry.used = wall
            if wall - entry.saved >= TOUCH_S:
                entry.saved = wall
                rows.append((INDEX, name, msgspec.json.encode(entry)))
        return rows

    def _shrink(self) -> Rows:
        gone: Rows = []
        while len(self._fresh) + len(self._going) > self._entries_max or self._size > self._bytes_max:
            crowded = (
                len(self._fresh) > FRESH_SHARE * self._entries_max or self._fresh.size > FRESH_SHARE * self._bytes_max
            )
            line = self._fresh if crowded or not self._going else self._going
            gone += _forgotten(line.drop_first())
        return gone

    def _forget(self, name: str) -> Rows:
        self._going.pop(name) or self._fresh.pop(name)
        return _forgotten(name)


class _Line:
    """Answers in the order in which they leave."""

    __slots__ = ("_entries", "size")

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self.size = 0  # bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> _Entry | None:
        return self._entries.get(name)

    def put(self, name: str, entry: _Entry) -> None:
        """At the end; the name must not be there yet."""
        self._entries[name] = entry
        self.size += entry.size

    def pop(self, name: str) -> _Entry | None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.size -= entry.size
        return entry

    def first(self) -> _Entry:
        return next(iter(self._entries.values()))

    def drop_first(self) -> str:
        name = next(iter(self._entries))
        self.pop(name)
        return name


def _forgotten(name: str) -> Rows:
    return [(INDEX, name, b""), (ITEMS, name, b"")]


def _made(entry: _Entry) -> float:
    return entry.made


def _read(value: bytes) -> _Entry | None:
    try:
        return _decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
