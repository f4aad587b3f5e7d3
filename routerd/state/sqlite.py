"""State in one SQLite file.

How it works
------------
* **One thread writes.** SQLite blocks and an event loop must not, so everything goes to a single writer thread that
  owns the connection. While it commits, further writes gather; the next transaction takes them all (group commit), so
  two hundred concurrent writes cost a handful of transactions. Rows of one key are replaced in order of arrival, never
  reordered. Enqueued rows wait ``COALESCE_S`` for company unless a write takes them along.
* **WAL and ``synchronous=NORMAL``.** A commit hands its pages to the operating system and returns: ``kill -9`` loses
  nothing that was acknowledged. A power cut may lose the last moments before it, but cannot corrupt the file. ``FULL``
  would survive that too, at an fsync per commit in front of every request: 0.37 ms instead of 0.05 ms on a virtual
  SSD, several on slower disks. That is more than everything else routerd adds to a request, against a rare event.
* **One process at a time.** Two that believe in the same ledger would both spend it. A lock on a file beside the
  database (``flock``, so it ends with its holder however that dies) turns the second one away.
* **Damage is never silent.** A file that is no database, or a torn one, is moved aside under a name with the time in
  it, an empty one takes its place, and ``warnings`` says so: stopping a daemon nobody watches would cost more than
  spending one day's free requests twice, but somebody has to learn of it.
* **The ledger never gets in the way.** Its entries are only added to a list; the writer commits them in a transaction
  of their own, after the rows that requests wait for, so neither its size nor its failure touches those. Entries that
  could not be written are tried again with the next ones.

What is ugly
------------
A failed transaction keeps its rows for the next one (they are whole states, so late is right and lost is not) but
still tells its writers that it failed: they must not count on it. On a disk that stays full the pending rows are
bounded by ``MAX_PENDING``; beyond, the oldest are dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from routerd.state import ledger
from routerd.state.ledger import Column, Entry, Total
from routerd.state.store import Row, StateError

COALESCE_S = 0.25  # how long an enqueued row may wait for others
MAX_PENDING = 65_536  # rows, ledger entries, and callers, waiting for the writer
BUSY_S = 5.0  # how long another program's lock on the database is waited for
KEEP_S = 92 * 86_400.0  # a row that was not renewed for so long is past every window
PRUNE_ROWS = 1000  # rows removed at once, so that pruning never holds writers up for long
PRUNE_EVERY_S = 3600.0
APPLICATION_ID = 0x726F7574  # "rout" in the file's header: this database is ours
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

# Entry n lifts the schema from version n to n + 1; entries are only ever added.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE rows (
        kind TEXT NOT NULL,
        key TEXT NOT NULL,
        value BLOB NOT NULL,
        wall REAL NOT NULL,
        PRIMARY KEY (kind, key)
    ) WITHOUT ROWID;
    CREATE INDEX rows_by_age ON rows (wall);
    """,
    ledger.SCHEMA,
)
UPSERT = "INSERT INTO rows VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value, wall = excluded.wall"
SELECT = "SELECT key, value FROM rows WHERE kind = ?"
SELECT_ONE = "SELECT key, value FROM rows WHERE kind = ? AND key = ?"
FORGET = "DELETE FROM rows WHERE kind = ? AND key = ?"
PRUNE = "DELETE FROM rows WHERE (kind, key) IN (SELECT kind, key FROM rows WHERE wall < ? ORDER BY wall LIMIT ?)"

CHECK_MAX_BYTES = 64 * 1024 * 1024  # of larger files only the quotas are read through at start: all would be felt
PERMISSION_ADVICE = "Check that the folder exists and belongs to the user routerd runs as, or set another [state] url"
ADVICE = {
    sqlite3.SQLITE_BUSY: "another program keeps it locked; close it",
    sqlite3.SQLITE_LOCKED: "another program keeps it locked; close it",
    sqlite3.SQLITE_FULL: "the disk is full; make room",
    sqlite3.SQLITE_READONLY: "it is read-only; " + PERMISSION_ADVICE,
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; " + PERMISSION_ADVICE,
    sqlite3.SQLITE_PERM: "access is denied; " + PERMISSION_ADVICE,
    sqlite3.SQLITE_IOERR: "the disk reports errors; check it",
    sqlite3.SQLITE_CORRUPT: "it is damaged; restart routerd, which will move it aside and start a new one",
    sqlite3.SQLITE_NOTADB: "it is damaged; restart routerd, which will move it aside and start a new one",
}
DAMAGE_WARNING = (
    "{path} was damaged and is now {aside}. routerd started with an empty one: "
    "what was spent of daily, monthly and money limits before now is unknown to it"
)

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]"]
Query = Callable[[sqlite3.Connection], Any]
Question = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Query]


class Work(msgspec.Struct):
    """What the writer found to do, all at once."""

    rows: list[Row]
    entries: list[Entry]
    waiters: list[Waiter]
    questions: list[Question]
    closing: bool


class SqliteStore:
    """A store in the file ``path``. StateError if that cannot be opened, is newer, or is in use by another process.

    ``commits``: transactions so far. ``dropped``: enqueued rows that were lost because the disk could not keep up.
    """

    def __init__(self, path: Path, *, busy_s: float = BUSY_S, max_pending: int = MAX_PENDING) -> None:
        self.warnings: tuple[str, ...] = ()
        self.commits = 0
        self.dropped = 0
        self._path = path.resolve()
        self._busy_s = busy_s
        self._max_pending = max_pending
        self._lock_fd = _lock(self._path)
        try:
            self._database = self._open()
        except BaseException:
            os.close(self._lock_fd)
            raise
        self._wake = threading.Condition()
        self._pending: dict[tuple[str, str], Row] = {}
        self._failed: dict[tuple[str, str], Row] = {}
        self._unrecorded: list[Entry] = []  # entries that could not be written so far
        self._entries: list[Entry] = []
        self._waiters: list[Waiter] = []
        self._questions: list[Question] = []
        self._closing = False
        self._next_prune = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="routerd-state", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<SqliteStore {self._path} {len(self._pending)} rows pending, {self.commits} commits>"

    def _open(self) -> sqlite3.Connection:
        try:
            return _connect(self._path, self._busy_s)
        except DamagedError:
            aside = _move_aside(self._path)
            self.warnings = (DAMAGE_WARNING.format(path=self._path, aside=aside.name),)
            return _connect(self._path, self._busy_s)

    # From the event loop

    async def load(self, kind: str) -> dict[str, bytes]:
        return dict(await self._ask(lambda database: database.execute(SELECT, (kind,)).fetchall()))

    async def read(self, kind: str, keys: Sequence[str]) -> dict[str, bytes]:
        return dict(
            await self._ask(
                lambda database: [row for key in keys for row in database.execute(SELECT_ONE, (kind, key))],
            )
        )

    async def totals(self, since: float, by: Sequence[Column]) -> list[Total]:
        return list(await self._ask(lambda database: ledger.totals(database, since, by)))

    async def _ask(self, query: Query) -> Any:
        """Ask the database, on the writer's thread and after all that was written before."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        with self._wake:
            self._check_open()
            self._questions.append((loop, answer, query))
            self._wake.notify()
        return await answer

    async def write(self, rows: Sequence[Row]) -> None:
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        with self._wake:
            self._check_open()
            if len(self._waiters) >= self._max_pending:
                raise StateError("the disk cannot keep up: too many writes are waiting")
            self._put(rows)
            self._waiters.append((loop, written))
            self._wake.notify()
        await written

    def enqueue(self, rows: Sequence[Row]) -> None:
        with self._wake:
            self._check_open()
            self._put(rows)
            self._wake.notify()

    def record(self, entries: Sequence[Entry]) -> None:
        with self._wake:
            self._check_open()
            if not (self._entries or self._pending):  # else the writer is awake already, waiting for company
                self._wake.notify()
            self._entries += entries
            self._shorten(self._entries)

    def _shorten(self, entries: list[Entry]) -> None:
        surplus = len(entries) - self._max_pending
        if surplus > 0:
            del entries[:surplus]
            self.dropped += surplus

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        lost, self._failed = len(self._failed), {}
        if lost:
            raise StateError(f"{lost} rows could not be written to {self._path}")

    def _check_open(self) -> None:
        if self._closing:
            raise StateError("the state store is closed")

    def _put(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._pending[row.kind, row.key] = row
        while len(self._pending) > self._max_pending:
            del self._pending[next(iter(self._pending))]
            self.dropped += 1

    # In the writer thread

    def _run(self) -> None:
        try:
            closing = False
            while not closing:
                work = self._next()
                error = self._commit_rows(work.rows) if work.rows else None
                _tell(work.waiters, error)
                self._commit_entries(work.entries)
                for question in work.questions:
                    self._answer(question)
                self._prune()
                closing = work.closing
        finally:
            self._stop()

    def _next(self) -> Work:
        """Sleep until there is something to do, and take all of it."""
        with self._wake:
            self._wake.wait_for(lambda: self._pending or self._entries or self._urgent())
            self._wake.wait_for(self._urgent, COALESCE_S)
            rows = list((self._failed | self._pending).values()) if self._failed else list(self._pending.values())
            self._pending, self._failed = {}, {}
            entries = self._unrecorded + self._entries
            self._unrecorded, self._entries = [], []
            waiters, self._waiters = self._waiters, []
            questions, self._questions = self._questions, []
            return Work(rows, entries, waiters, questions, self._closing)

    def _urgent(self) -> bool:
        return bool(self._waiters or self._questions or self._closing)

    def _commit_rows(self, rows: list[Row]) -> StateError | None:
        """None if they are durable. What failed stays for the next time."""
        gone = [(row.kind, row.key) for row in rows if not row.value]
        error = self._commit(UPSERT, [(row.kind, row.key, row.value, row.wall) for row in rows if row.value])
        if error is None and gone:
            error = self._commit(FORGET, gone)
        if error is None:
            self.commits += 1
            return None
        self._failed = {(row.kind, row.key): row for row in rows[-self._max_pending :]}
        return StateError(f"{self._path} could not be written: {_advice(error)}")

    def _commit_entries(self, entries: list[Entry]) -> None:
        if entries and self._commit(ledger.INSERT, [msgspec.structs.astuple(entry) for entry in entries]) is not None:
            self._shorten(entries)
            self._unrecorded = entries

    def _commit(self, statement: str, values: Sequence[Sequence[Any]]) -> sqlite3.Error | None:
        """All of them in one transaction, or why not."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(statement, values)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            return error
        return None

    def _answer(self, question: Question) -> None:
        loop, answer, query = question
        try:
            result = query(self._database)
        except sqlite3.Error as error:
            failure = StateError(f"{self._path} could not be read: {_advice(error)}")
            _call(loop, lambda: None if answer.done() else answer.set_exception(failure))
        else:
            _call(loop, lambda: None if answer.done() else answer.set_result(result))

    def _prune(self) -> None:
        if time.monotonic() < self._next_prune:
            return
        wall = time.time()
        try:
            pruned = [
                self._database.execute(statement, (bound, PRUNE_ROWS)).rowcount
                for statement, bound in (
                    (PRUNE, wall - KEEP_S),
                    (ledger.PRUNE_OLD, wall - ledger.KEEP_S),
                    (ledger.PRUNE_MANY, ledger.ROWS_MAX),
                )
            ]
        except sqlite3.Error:
            pruned = []  # old rows only cost room; the next write will tell what is wrong
        if PRUNE_ROWS not in pruned:
            self._next_prune = time.monotonic() + PRUNE_EVERY_S

    def _stop(self) -> None:
        """Whatever ended the thread, nobody is left waiting and the lock is free."""
        with self._wake:
            self._closing = True
            waiters, self._waiters = self._waiters, []
            questions, self._questions = self._questions, []
        failure = StateError("the state store is closed")
        _tell(waiters, failure)
        _tell([(loop, answer) for loop, answer, _ in questions], failure)
        self._database.close()
        os.close(self._lock_fd)


def _tell(waiters: Sequence[Waiter], error: StateError | None) -> None:
    """Wake all writers of a transaction, with one call into each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[Any]]] = {}
    for loop, written in waiters:
        by_loop.setdefault(loop, []).append(written)
    for loop, futures in by_loop.items():
        _call(loop, partial(_settle, futures, error))


def _settle(futures: Sequence[asyncio.Future[Any]], error: StateError | None) -> None:
    for future in futures:
        if future.done():
            continue  # its caller was cancelled
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(StateError(*error.args))


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(callback)


# --- opening --------------------------------------------------------------------------------------------------------


class DamagedError(Exception):
    """The file is not a database, or a torn one."""


def _lock(path: Path) -> int:
    """Hold the lock beside the database until the process ends or the descriptor is closed."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"{path} cannot be used: {error.strerror}. {PERMISSION_ADVICE}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise StateError(
            f"{path} is in use by another routerd (process {holder}): stop it, or give this one its own [state] url"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _connect(path: Path, busy_s: float) -> sqlite3.Connection:
    """An open, checked, migrated database. DamagedError, or StateError for all that moving it aside would not mend."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StateError(f"{path} cannot be used: {error.strerror}. {PERMISSION_ADVICE}") from error
    database = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
    try:
        _prepare(database, path)
    except sqlite3.Error as error:
        database.close()
        if _code(error) in DAMAGED:
            raise DamagedError from error
        raise StateError(f"{path} cannot be opened: {_advice(error)}") from error
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    _refuse_foreign(database, path)
    path.chmod(0o600)  # whoever made it; SQLite gives the files beside it the same mode
    large = path.stat().st_size > CHECK_MAX_BYTES
    found = database.execute(f"PRAGMA quick_check({'rows' if large else 1})").fetchone()
    if found != ("ok",):
        raise DamagedError
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    _migrate(database)


def _refuse_foreign(database: sqlite3.Connection, path: Path) -> None:
    """Neither somebody else's database nor one from the future is touched."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and application != APPLICATION_ID:
        raise StateError(f"{path} is another program's database: give routerd its own [state] url")
    if version > len(MIGRATIONS):
        raise StateError(
            f"{path} was written by a newer routerd (schema {version}, this one knows {len(MIGRATIONS)}): "
            "upgrade routerd, or give it another [state] url"
        )


def _migrate(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    for number in range(version, len(MIGRATIONS)):
        database.executescript(
            f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA application_id = {APPLICATION_ID}; "
            f"PRAGMA user_version = {number + 1}; COMMIT;"
        )


def _move_aside(path: Path) -> Path:
    """Keep the damaged file, with what belongs to it, for whoever wants to look."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = path.with_name(f"{path.name}.corrupt-{stamp}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; the upper bytes only refine it."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _advice(error: sqlite3.Error) -> str:
    return ADVICE.get(_code(error), f"SQLite says {getattr(error, 'sqlite_errorname', 'error')}")
