"""What outlives the process: quotas spent, windows closed, and the ledger of all attempts.

The protocol, and the way from a URL to a store.
"""

from __future__ import annotations

from pathlib import Path

from routerd.state.ledger import Entry, Total
from routerd.state.memory import MemoryStore
from routerd.state.sqlite import SqliteStore
from routerd.state.store import Row, StateError, Store

__all__ = ["Entry", "Row", "StateError", "Store", "Total", "open_store"]


def open_store(url: str, state_dir: Path) -> Store:
    """``sqlite:FILE`` (relative to ``state_dir``, or absolute) or ``memory:``.

    StateError if the URL is neither, the file cannot be used, or another routerd is using it. Blocks for as long as
    SQLite needs to open and check the file.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "memory" and not rest:
        return MemoryStore()
    if scheme == "sqlite" and rest:
        return SqliteStore(state_dir / rest)
    raise StateError(f'state url "{url}" is unknown: use "sqlite:FILE" or "memory:"')
