"""A look at the state of a daemon that may be running, without a way to change it.

The daemon holds the lock, so its file is opened for reading only. Write-ahead logging lets it go on writing meanwhile.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from routerd.state import ledger
from routerd.state.ledger import Column, Total
from routerd.state.memory import MemoryStore
from routerd.state.sqlite import APPLICATION_ID, MIGRATIONS
from routerd.state.store import Row, StateError

READ_BUSY_S = 1.0
SELECT = "SELECT kind, key, value, wall FROM rows WHERE kind = ?"


def saved_copy(url: str, kinds: Sequence[str]) -> MemoryStore:
    """What is saved now of these kinds, in memory: nothing written to the copy ever leaves it. Raises StateError."""
    copy = MemoryStore()
    with _reading(url) as database:
        copy.enqueue([Row(*row) for kind in kinds for row in database.execute(SELECT, (kind,))])
    return copy


def saved_totals(url: str, since: float, by: Sequence[Column]) -> list[Total]:
    """What the ledger's entries since then add up to. Raises StateError."""
    with _reading(url) as database:
        return ledger.totals(database, since, by)


@contextlib.contextmanager
def _reading(url: str) -> Iterator[sqlite3.Connection]:
    """The saved state. StateError if there is nothing, or nothing that can be read."""
    scheme, _, rest = url.partition(":")
    if scheme != "sqlite":
        raise StateError("the daemon keeps its state in memory")
    path = Path(rest)
    try:
        path.stat()  # SQLite would only say that it cannot open the file
        uri = f"file:{quote(str(path))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=READ_BUSY_S)) as database:
            _check(database, path)
            yield database
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise StateError(f"{path} could not be read ({error})") from error


def _check(database: sqlite3.Connection, path: Path) -> None:
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID or version != len(MIGRATIONS):
        raise StateError(f"{path} is not this routerd's")
