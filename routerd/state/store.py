"""What every store promises. Callers depend on this alone, so that a store shared by several machines can follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from routerd.state.ledger import Column, Entry, Total


class StateError(Exception):
    """State cannot be kept or read. The text says what to do about it."""


class Row(msgspec.Struct, frozen=True):
    """One remembered thing. The last row of a (kind, key) stands; ``wall`` is its age, in Unix seconds.

    An empty value forgets it.
    """

    kind: str
    key: str
    value: bytes
    wall: float


class Store(Protocol):
    """Rows that outlive the process.

    ``warnings``: what the operator has to know of how it opened, in whole sentences; mostly empty.
    """

    warnings: tuple[str, ...]

    async def load(self, kind: str) -> dict[str, bytes]:
        """All rows of a kind by key, everything written or enqueued before included."""
        ...

    async def read(self, kind: str, keys: Sequence[str]) -> dict[str, bytes]:
        """The rows of a kind with these keys, as far as there are such; as for ``load``, nothing written is missed."""
        ...

    async def write(self, rows: Sequence[Row]) -> None:
        """Durable against ``kill -9`` when it returns. StateError if that could not be reached."""
        ...

    def enqueue(self, rows: Sequence[Row]) -> None:
        """Written soon; several rows of one key within that time cost one write. From any thread, never blocks."""
        ...

    def record(self, entries: Sequence[Entry]) -> None:
        """Put into the ledger soon. From any thread, never blocks; on a disk that stays full the oldest are lost."""
        ...

    async def totals(self, since: float, by: Sequence[Column]) -> list[Total]:
        """What the ledger's entries since then add up to, everything recorded before included."""
        ...

    async def close(self) -> None:
        """Write what is enqueued and let go of the files. Closing twice is harmless; using it afterwards is not."""
        ...
