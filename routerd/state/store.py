"""What every store promises. Callers depend on this alone, so that a store shared by several machines can follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class StateError(Exception):
    """State cannot be kept or read. The text says what to do about it."""


class Row(msgspec.Struct, frozen=True):
    """One remembered thing. The last row of a (kind, key) stands; ``wall`` is its age, in Unix seconds."""

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

    async def write(self, rows: Sequence[Row]) -> None:
        """Durable against ``kill -9`` when it returns. StateError if that could not be reached."""
        ...

    def enqueue(self, rows: Sequence[Row]) -> None:
        """Written soon; several rows of one key within that time cost one write. From any thread, never blocks."""
        ...

    async def close(self) -> None:
        """Write what is enqueued and let go of the files. Closing twice is harmless; using it afterwards is not."""
        ...
