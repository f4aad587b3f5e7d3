"""State that ends with the process: for tests, trials and machines without a disk."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import deque
from collections.abc import Sequence

import msgspec

from routerd.state import ledger
from routerd.state.ledger import Column, Entry, Total
from routerd.state.store import Row, StateError

MAX_ENTRIES = 4096  # of the ledger; the oldest are forgotten


class MemoryStore:
    """A dictionary behind the protocol of a store. One row per (kind, key), so as many as there are names.

    The ledger is short. Whoever wants totals pays for them: its entries go into a database that lives that long.
    """

    def __init__(self) -> None:
        self.warnings: tuple[str, ...] = ()
        self._rows: dict[str, dict[str, bytes]] = {}
        self._entries: deque[Entry] = deque(maxlen=MAX_ENTRIES)
        self._closed = False

    async def load(self, kind: str) -> dict[str, bytes]:
        self._check_open()
        return dict(self._rows.get(kind, {}))

    async def read(self, kind: str, keys: Sequence[str]) -> dict[str, bytes]:
        self._check_open()
        rows = self._rows.get(kind, {})
        return {key: rows[key] for key in keys if key in rows}

    async def write(self, rows: Sequence[Row]) -> None:
        self.enqueue(rows)

    def enqueue(self, rows: Sequence[Row]) -> None:
        self._check_open()
        for row in rows:
            kind = self._rows.setdefault(row.kind, {})
            if row.value:
                kind[row.key] = row.value
            else:
                kind.pop(row.key, None)

    def record(self, entries: Sequence[Entry]) -> None:
        self._check_open()
        self._entries.extend(entries)

    async def totals(self, since: float, by: Sequence[Column]) -> list[Total]:
        self._check_open()
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.executescript(ledger.SCHEMA)
            database.executemany(ledger.INSERT, map(msgspec.structs.astuple, self._entries))
            return ledger.totals(database, since, by)

    async def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the state store is closed")
