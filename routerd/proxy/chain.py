"""Conversations that clients go on with by naming their last answer: put together at the door, kept at the end.

To everything behind the door such a request is one that brings its whole conversation, and so it can be routed, tried
again, translated and taken up by another upstream like any other. Which answers there are, and which leave when room is
short, is ``policy.answers``; what the items look like is the dialect's.

What is kept is what the client got, byte for byte: what only one vendor can read stays readable for that vendor. It is
with the store before the client has the end of its answer, and may ask on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from routerd.canonical import BadRequest
from routerd.dialects import Chaining
from routerd.policy.answers import INDEX, ITEMS, KEEP_S, Answers, Rows, name_of
from routerd.state import Row, StateError, Store

ID_CHARACTERS_SHOWN = 100
_DAYS = int(KEEP_S // 86_400)

_decode_items = msgspec.json.Decoder(tuple[msgspec.Raw, msgspec.Raw]).decode


class Chains:
    """All conversations that can be gone on with, whatever configuration is in force."""

    def __init__(self, store: Store, *, wall: Callable[[], float] = time.time) -> None:
        self._store = store
        self._wall = wall
        self._index = Answers()

    def __repr__(self) -> str:
        return f"<Chains {self._index!r}>"

    async def restore(self) -> None:
        """Take up what was saved. Raises StateError."""
        self._save(self._index.restore(await self._store.load(INDEX), self._wall()))

    def checkpoint(self) -> None:
        """Let go of what nobody has used for long."""
        self._save(self._index.expire(self._wall()))

    async def whole(self, chaining: Chaining, body: bytes, previous: str, owner: bytes, bytes_max: int) -> bytes:
        """The request with the conversation up to the answer it names. ``owner``: whose answers these are.

        Raises BadRequest if there is no such answer, or the whole is larger than ``bytes_max``.
        """
        whole = chaining.chained(body, await self._history(previous, owner))
        if len(whole) > bytes_max:
            detail = f"with its conversation the request is larger than server.max_body ({bytes_max} bytes)"
            raise BadRequest(detail, status=413, code="request_too_large")
        return whole

    async def _history(self, previous: str, owner: bytes) -> list[bytes]:
        """What was said up to this answer: arrays of items, oldest first."""
        names, rows = self._index.use(name_of(previous, owner), self._wall())
        if not names:
            raise _unknown(previous)
        self._save(rows)
        try:
            found = await self._store.read(ITEMS, names)
        except StateError as error:
            detail = "the conversation cannot be read at the moment; ask again, or send it whole"
            raise BadRequest(detail, status=503, code="state_unavailable") from error
        if len(found) < len(names):
            raise _unknown(previous)
        return [bytes(items) for name in names for items in _decode_items(found[name])]

    def remember(self, link: Link, answer_id: str, output: bytes) -> None:
        """Keep an answer. It can be gone on from when this returns, unless somebody else's has the same id."""
        wall = self._wall()
        name, parent = name_of(answer_id, link.owner), name_of(link.previous, link.owner) if link.previous else ""
        contested = self._index.contest(name, parent, wall)
        if contested is not None:
            self._save(contested)
            return
        joined = bool(parent) and self._index.joins(name, parent, wall)
        asked = link.chaining.input_items(link.body if joined else link.whole)
        self._save(self._index.remember(name, parent if joined else "", b"[%b,%b]" % (asked, output), wall))

    def _save(self, rows: Rows) -> None:
        if rows:
            wall = self._wall()
            self._store.enqueue([Row(kind, key, value, wall) for kind, key, value in rows])


class Link:
    """One exchange's place in its conversation. It reads along, and keeps the answer when it sees its end.

    ``body`` is the request as it came, ``whole`` the one with the conversation before it.
    """

    __slots__ = ("_chains", "_recorder", "body", "chaining", "owner", "previous", "whole")

    def __init__(
        self, chains: Chains, chaining: Chaining, owner: bytes, previous: str, body: bytes, whole: bytes
    ) -> None:
        self.chaining = chaining
        self.owner = owner
        self.previous = previous
        self.body = body
        self.whole = whole
        self._chains = chains
        self._recorder = chaining.recorder()

    def stream(self, data: bytes) -> None:
        """Whole events are about to be sent."""
        self._keep(self._recorder.stream(data))

    def answer(self, body: bytes) -> None:
        """A whole answer is about to be sent."""
        self._keep(self._recorder.body(body))

    def _keep(self, found: tuple[str, bytes] | None) -> None:
        if found is not None:
            self._chains.remember(self, *found)


def _unknown(answer_id: str) -> BadRequest:
    shown = answer_id[:ID_CHARACTERS_SHOWN]
    detail = (
        f"Previous response with id {shown!r} not found: unless store was false, answers are kept for {_DAYS} days "
        "after their last use, as far as there is room, for the token they were made with. Send the whole conversation "
        "as input, without previous_response_id."
    )
    return BadRequest(detail, code="previous_response_not_found")
