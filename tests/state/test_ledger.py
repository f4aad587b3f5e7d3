"""The ledger of every store: what goes in, what comes out added up, what is forgotten, and what it may never cost."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import msgspec
import pytest

from routerd.state import Entry, StateError, Store, open_store
from routerd.state import ledger as rules
from routerd.state import memory as in_memory
from routerd.state.ledger import Column
from routerd.state.saved import saved_totals
from routerd.state.sqlite import MIGRATIONS, SqliteStore
from tests.state.test_store import row

FILE = "sqlite:routerd.db"
PAIR: tuple[Column, ...] = ("provider", "model")
SAMPLE = Entry(
    wall=0.0,
    exchange="x1",
    route="auto",
    dialect="chat",
    provider="a",
    model="m",
    outcome="success",
    code="",
    status=None,
    input_tokens=100,
    cached_tokens=60,
    output_tokens=10,
    reasoning_tokens=4,
    cost_usd=0.5,
    duration_s=2.0,
    first_token_s=0.7,
)


def entry(**fields: object) -> Entry:
    """One made just now, unless said otherwise."""
    return msgspec.structs.replace(SAMPLE, **{"wall": time.time(), **fields})


@asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncIterator[Store]:
    store = open_store(url, folder)
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize("url", [FILE, "memory:"])
class TestEveryStore:
    async def test_it_adds_up(self, url: str, tmp_path: Path) -> None:
        """By whatever is asked for, in its order; a request tried twice is one request and two attempts."""
        async with opened(url, tmp_path) as store:
            store.record([entry(), entry(outcome="stalled", cost_usd=0.25), entry(exchange="x2", model="n")])
            store.record([entry(provider="b")])
            totals = await store.totals(0, PAIR)

        assert [total.group for total in totals] == [("a", "m"), ("a", "n"), ("b", "m")]
        first = totals[0]
        assert (first.requests, first.attempts, first.failures, first.cost_usd) == (1, 2, 1, 0.75)
        assert (first.input_tokens, first.cached_tokens) == (200, 120)
        assert (first.output_tokens, first.reasoning_tokens) == (20, 8)

    async def test_it_looks_back_as_far_as_asked(self, url: str, tmp_path: Path) -> None:
        """What ended before is not counted."""
        now = time.time()
        async with opened(url, tmp_path) as store:
            store.record([entry(wall=now - 100), entry(wall=now - 10)])

            assert [total.attempts for total in await store.totals(now - 50, ("route",))] == [1]
            assert await store.totals(now + 1, ("route",)) == []

    async def test_days_are_those_of_this_machine(self, url: str, tmp_path: Path) -> None:
        """From midnight to midnight, local time."""
        noon = time.mktime((2026, 11, 20, 12, 0, 0, 0, 0, -1))
        async with opened(url, tmp_path) as store:
            store.record([entry(wall=noon), entry(wall=noon + 11 * 3600), entry(wall=noon + 13 * 3600)])
            totals = await store.totals(0, ("day",))

        assert [(total.group, total.attempts) for total in totals] == [(("2026-11-20",), 2), (("2026-11-21",), 1)]

    @pytest.mark.parametrize("outcome", ["success", "client_error", "cancelled"])
    async def test_what_no_upstream_is_to_blame_for_is_no_failure(self, outcome: str, url: str, tmp_path: Path) -> None:
        """The client's own error and its hang-up are counted as attempts alone."""
        async with opened(url, tmp_path) as store:
            store.record([entry(outcome=outcome)])
            (total,) = await store.totals(0, PAIR)

        assert (total.attempts, total.failures) == (1, 0)

    async def test_a_closed_store_refuses(self, url: str, tmp_path: Path) -> None:
        """As for everything else."""
        store = open_store(url, tmp_path)
        await store.close()

        with pytest.raises(StateError, match="closed"):
            store.record([entry()])
        with pytest.raises(StateError, match="closed"):
            await store.totals(0, PAIR)


async def test_memory_keeps_the_last_ones(tmp_path: Path) -> None:
    """It has no disk to fill, and must not fill the memory."""
    async with opened("memory:", tmp_path) as store:
        for _ in range(2):
            store.record([entry()] * in_memory.MAX_ENTRIES)
        (total,) = await store.totals(0, PAIR)

    assert total.attempts == in_memory.MAX_ENTRIES


class TestOnDisk:
    async def test_it_outlives_the_process(self, tmp_path: Path) -> None:
        """And can be read beside a running daemon, or without one."""
        url = f"sqlite:{tmp_path}/routerd.db"
        async with opened(FILE, tmp_path) as store:
            store.record([entry()])
            expected = await store.totals(0, PAIR)

            assert expected == saved_totals(url, 0, PAIR)
        assert expected == saved_totals(url, 0, PAIR)

    async def test_many_cost_few_transactions_and_wake_nobody(self, tmp_path: Path) -> None:
        """Quotas have transactions of their own; the ledger gathers beside them."""
        async with opened(FILE, tmp_path) as store:
            assert isinstance(store, SqliteStore)
            for number in range(1000):
                store.record([entry(exchange=str(number))])
            await store.write([row("a")])

            assert store.commits == 1
            assert [total.requests for total in await store.totals(0, PAIR)] == [1000]

    async def test_its_failure_is_not_the_quotas(self, tmp_path: Path) -> None:
        """Whatever is wrong with the ledger, quotas are written; and the entries are tried again."""
        async with opened(FILE, tmp_path) as store:
            with closing(sqlite3.connect(tmp_path / "routerd.db", isolation_level=None)) as other:
                other.execute("ALTER TABLE ledger RENAME TO elsewhere")
                store.record([entry()])
                await store.write([row("a", "1")])
                with pytest.raises(StateError, match="could not be read"):
                    await store.totals(0, PAIR)
                other.execute("ALTER TABLE elsewhere RENAME TO ledger")
            store.record([entry()])

            assert await store.load("quota") == {"a": b"1"}
            assert [total.attempts for total in await store.totals(0, PAIR)] == [2]

    async def test_what_cannot_be_written_is_bounded(self, tmp_path: Path) -> None:
        """On a disk that stays full the oldest entries are dropped, and counted."""
        store = SqliteStore(tmp_path / "routerd.db", max_pending=10)
        with closing(sqlite3.connect(tmp_path / "routerd.db", isolation_level=None)) as other:
            other.execute("ALTER TABLE ledger RENAME TO elsewhere")
            for number in range(3):
                store.record([entry(exchange=f"{number} {place}") for place in range(8)])
                await store.load("quota")
            other.execute("ALTER TABLE elsewhere RENAME TO ledger")
        (total,) = await store.totals(0, PAIR)
        await store.close()

        assert total.requests == 10
        assert store.dropped == 14

    async def test_old_entries_are_forgotten(self, tmp_path: Path) -> None:
        """Those beyond their age go, batch by batch, when the daemon starts and every hour."""
        old = time.time() - rules.KEEP_S - 3600
        async with opened(FILE, tmp_path) as store:
            store.record([entry(wall=old)] * 30 + [entry()])
        async with opened(FILE, tmp_path) as store:
            await store.write([row("a")])
            await store.load("quota")

            assert [total.attempts for total in await store.totals(0, PAIR)] == [1]

    async def test_there_are_never_too_many(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond so many the oldest go, however young they are."""
        monkeypatch.setattr(rules, "ROWS_MAX", 5)
        async with opened(FILE, tmp_path) as store:
            store.record([entry(exchange=str(number), cost_usd=number) for number in range(12)])
        async with opened(FILE, tmp_path) as store:
            await store.write([row("a")])
            await store.load("quota")
            (total,) = await store.totals(0, PAIR)

        assert (total.attempts, total.cost_usd) == (5, 7 + 8 + 9 + 10 + 11)

    async def test_a_file_without_a_ledger_gets_one(self, tmp_path: Path) -> None:
        """State of an older routerd is kept."""
        with closing(sqlite3.connect(tmp_path / "routerd.db")) as database:
            database.executescript(f"{MIGRATIONS[0]} PRAGMA application_id = {0x726F7574}; PRAGMA user_version = 1;")
            database.execute("INSERT INTO rows VALUES ('quota', 'a', x'31', ?)", (time.time(),))
            database.commit()
        async with opened(FILE, tmp_path) as store:
            store.record([entry()])

            assert await store.load("quota") == {"a": b"1"}
            assert len(await store.totals(0, PAIR)) == 1


class TestReadingBeside:
    @pytest.mark.parametrize("url", ["memory:", "sqlite:/nonexistent/routerd.db"])
    def test_without_a_file_it_says_why(self, url: str) -> None:
        """Which is no bug but a setting, or a daemon that never ran."""
        with pytest.raises(StateError, match=r"memory|No such file"):
            saved_totals(url, 0, PAIR)

    async def test_nothing_is_changed(self, tmp_path: Path) -> None:
        """Not even by accident: the file is opened for reading."""
        async with opened(FILE, tmp_path) as store:
            store.record([entry()])
        before = (tmp_path / "routerd.db").read_bytes()
        await asyncio.to_thread(saved_totals, f"sqlite:{tmp_path}/routerd.db", 0, PAIR)

        assert before == (tmp_path / "routerd.db").read_bytes()


async def test_recording_costs_next_to_nothing(tmp_path: Path) -> None:
    """Making an entry and handing it over: microseconds, for it happens once per attempt."""
    count = 2000
    async with opened(FILE, tmp_path) as store:
        best_s = min([_record_many(store, count) for _ in range(5)])

    assert best_s / count < 10e-6


def _record_many(store: Store, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        store.record((entry(),))
    return time.perf_counter() - began
