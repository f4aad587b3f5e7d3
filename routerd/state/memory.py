"""State that ends with the process: for tests, trials and machines without a disk."""

from __future__ import annotations

from collections.abc import Sequence

from routerd.state.store import Row, StateError


class MemoryStore:
    """A dictionary behind the protocol of a store. One row per (kind, key), so as many as there are names."""

    def __init__(self) -> None:
        self.warnings: tuple[str, ...] = ()
        self._rows: dict[str, dict[str, bytes]] = {}
        self._closed = False

    async def load(self, kind: str) -> dict[str, bytes]:
        self._check_open()
        return dict(self._rows.get(kind, {}))

    async def write(self, rows: Sequence[Row]) -> None:
        self.enqueue(rows)

    def enqueue(self, rows: Sequence[Row]) -> None:
        self._check_open()
        for row in rows:
            self._rows.setdefault(row.kind, {})[row.key] = row.value

    async def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the state store is closed")
