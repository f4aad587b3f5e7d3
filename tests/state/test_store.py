"""What every store promises, and what only the one on disk can."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from routerd.state import Row, StateError, Store, open_store
from routerd.state import sqlite as on_disk
from routerd.state.sqlite import SqliteStore
from tests.state import spender

FILE = "sqlite:routerd.db"


def row(key: str, value: str = "x", kind: str = "quota", wall: float | None = None) -> Row:
    return Row(kind, key, value.encode(), time.time() if wall is None else wall)


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(folder.glob(pattern))


@asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncIterator[Store]:
    store = open_store(url, folder)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def sqlite_store(
    folder: Path, *, busy_s: float = 5.0, max_pending: int = on_disk.MAX_PENDING
) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(folder / "routerd.db", busy_s=busy_s, max_pending=max_pending)
    try:
        yield store
    finally:
        await store.close()


@contextmanager
def other_program(folder: Path) -> Iterator[sqlite3.Connection]:
    """Somebody else with the same database open."""
    connection = sqlite3.connect(folder / "routerd.db", isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.parametrize("url", [FILE, "memory:"])
class TestEveryStore:
    async def test_what_was_written_is_there(self, url: str, tmp_path: Path) -> None:
        """By kind and key; kinds do not mix."""
        async with opened(url, tmp_path) as store:
            await store.write([row("a", "1"), row("b", "2")])
            await store.write([row("a", "3", kind="other")])

            assert await store.load("quota") == {"a": b"1", "b": b"2"}
            assert await store.load("other") == {"a": b"3"}
            assert await store.load("nothing") == {}

    async def test_the_last_row_of_a_key_stands(self, url: str, tmp_path: Path) -> None:
        """Written or enqueued, in order of the calls."""
        async with opened(url, tmp_path) as store:
            store.enqueue([row("a", "1")])
            await store.write([row("a", "2")])
            store.enqueue([row("a", "3"), row("a", "4")])

            assert await store.load("quota") == {"a": b"4"}

    async def test_an_empty_value_forgets(self, url: str, tmp_path: Path) -> None:
        """The row is gone, unless it is written again after that."""
        async with opened(url, tmp_path) as store:
            await store.write([row("a", "1"), row("b", "1"), row("c", "1")])
            await store.write([row("a", ""), row("b", ""), row("never there", ""), row("d", "2")])
            await store.write([row("b", "3")])

            assert await store.load("quota") == {"b": b"3", "c": b"1", "d": b"2"}

    async def test_single_rows_are_read(self, url: str, tmp_path: Path) -> None:
        """Those of the kind that there are, and also what was only just enqueued."""
        async with opened(url, tmp_path) as store:
            await store.write([row("a", "1"), row("b", "1"), row("c", "1"), row("d", "1", kind="other")])
            store.enqueue([row("b", "2"), row("c", "")])

            assert await store.read("quota", ["a", "b", "c", "d"]) == {"a": b"1", "b": b"2"}

    async def test_a_closed_store_refuses(self, url: str, tmp_path: Path) -> None:
        """Closing twice is harmless; writing to it afterwards is not silent."""
        store = open_store(url, tmp_path)
        await store.close()
        await store.close()

        with pytest.raises(StateError, match="closed"):
            await store.write([row("a")])
        with pytest.raises(StateError, match="closed"):
            store.enqueue([row("a")])
        with pytest.raises(StateError, match="closed"):
            await store.load("quota")

    async def test_it_opens_without_complaint(self, url: str, tmp_path: Path) -> None:
        """Nothing to warn of in a new store."""
        async with opened(url, tmp_path) as store:
            assert store.warnings == ()


class TestUrl:
    async def test_a_relative_file_lies_in_the_state_folder(self, tmp_path: Path) -> None:
        """Which is made if need be; an absolute one lies where it says."""
        async with (
            opened("sqlite:a.db", tmp_path / "made" / "here"),
            opened(f"sqlite:{tmp_path}/b.db", tmp_path / "no"),
        ):
            pass

        assert (tmp_path / "made" / "here" / "a.db").exists()
        assert (tmp_path / "b.db").exists()
        assert not (tmp_path / "no").exists()

    @pytest.mark.parametrize("url", ["", "sqlite:", "memory:x", "redis://localhost", "routerd.db"])
    def test_an_unknown_url_says_what_is_known(self, url: str, tmp_path: Path) -> None:
        """So that the next try is the right one."""
        with pytest.raises(StateError, match='use "sqlite:FILE" or "memory:"'):
            open_store(url, tmp_path)


class TestOnDisk:
    async def test_it_outlives_the_process(self, tmp_path: Path) -> None:
        """Written and enqueued rows alike, after an orderly end."""
        async with opened(FILE, tmp_path) as store:
            await store.write([row("a", "1")])
            store.enqueue([row("b", "2")])

        async with opened(FILE, tmp_path) as store:
            assert await store.load("quota") == {"a": b"1", "b": b"2"}

    def test_a_kill_loses_nothing_that_was_acknowledged(self, tmp_path: Path) -> None:
        """Killed in the middle of writing, three times on the same file, at different moments."""
        for number in range(3):
            acknowledged = _killed("tests.state.writer", tmp_path, number, lines=200 + 150 * number)
            rows, log = asyncio.run(_load(tmp_path))

            assert len(acknowledged) >= 200
            latest = dict(line.split() for line in acknowledged)
            for name, value in latest.items():
                assert _order(rows[name]) >= _order(value)
            assert {f"{line.replace(' ', '.', 1)}" for line in acknowledged} <= log

    def test_kills_never_overspend_a_daily_limit(self, tmp_path: Path) -> None:
        """Four runs, three of them killed while sending: no request too many, and only those in flight are lost."""
        sent = 0
        for lines in (60, 110, 80):
            sent += len(_killed("tests.state.spender", tmp_path, 400, lines))
        sent += len(_killed("tests.state.spender", tmp_path, 400, 1000))

        assert 400 - 3 * spender.AGENTS <= sent <= 400

    async def test_concurrent_writes_share_transactions(self, tmp_path: Path) -> None:
        """Two hundred at once are all durable after a few commits."""
        async with sqlite_store(tmp_path) as store:
            before = store.commits
            await asyncio.gather(*(store.write([row(f"k{number}")]) for number in range(200)))

            assert len(await store.load("quota")) == 200
            assert store.commits - before < 20

    async def test_enqueued_rows_share_a_transaction_and_do_not_wait_long(self, tmp_path: Path) -> None:
        """A hundred rows of five keys cost one commit, soon."""
        async with sqlite_store(tmp_path) as store:
            for number in range(100):
                store.enqueue([row(f"k{number % 5}", str(number))])
            with other_program(tmp_path) as reader:
                deadline = time.monotonic() + 20 * on_disk.COALESCE_S
                while not reader.execute("SELECT count(*) FROM rows").fetchone()[0]:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)

            assert store.commits == 1
            assert await store.load("quota") == {f"k{number}": str(95 + number).encode() for number in range(5)}

    async def test_two_event_loops_may_share_a_store(self, tmp_path: Path) -> None:
        """Each writer is woken on its own loop."""
        async with sqlite_store(tmp_path) as store:
            await asyncio.gather(
                store.write([row("here")]), asyncio.to_thread(lambda: asyncio.run(store.write([row("there")])))
            )

            assert set(await store.load("quota")) == {"here", "there"}

    async def test_a_cancelled_writer_disturbs_nobody(self, tmp_path: Path) -> None:
        """Its rows may be written or not; the others' are."""
        async with sqlite_store(tmp_path) as store:
            cancelled = asyncio.ensure_future(store.write([row("a")]))
            await asyncio.sleep(0)
            cancelled.cancel()
            await store.write([row("b")])

            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert "b" in await store.load("quota")

    async def test_only_its_owner_may_read_it(self, tmp_path: Path) -> None:
        """Also the files beside it, and also if it was made wider before."""
        (tmp_path / "routerd.db").touch(mode=0o644)
        async with opened(FILE, tmp_path) as store:
            await store.write([row("a")])
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)}

        assert len(modes) == 4
        assert set(modes.values()) == {0o600}

    async def test_old_rows_are_removed_a_few_at_a_time(self, tmp_path: Path) -> None:
        """Rows past every window go, at most a bounded number between two transactions; the rest stays."""
        old = time.time() - on_disk.KEEP_S - 60
        async with sqlite_store(tmp_path) as store:
            await store.write([row("fresh")])
            await store.write([row(f"k{number}", wall=old) for number in range(on_disk.PRUNE_ROWS + 5)])

        async with sqlite_store(tmp_path) as store:
            await store.load("quota")
            assert len(await store.load("quota")) == 6
            assert len(await store.load("quota")) == 1

    async def test_pending_rows_are_bounded(self, tmp_path: Path) -> None:
        """Beyond the bound the oldest are dropped, and counted."""
        async with sqlite_store(tmp_path, max_pending=10) as store:
            store.enqueue([row(f"k{number}") for number in range(15)])

            assert set(await store.load("quota")) == {f"k{number}" for number in range(5, 15)}
            assert store.dropped == 5


class TestOneProcess:
    async def test_a_second_one_is_turned_away(self, tmp_path: Path) -> None:
        """It learns who holds the file and what to do; the first goes on."""
        async with opened(FILE, tmp_path) as store:
            with pytest.raises(StateError, match=rf"another routerd \(process {os.getpid()}\): stop it"):
                open_store(FILE, tmp_path)

            await store.write([row("a")])

    async def test_the_lock_holds_between_processes_and_by_other_names(self, tmp_path: Path) -> None:
        """A link to the folder is the same file."""
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        code = "import sys; from pathlib import Path; from routerd.state import open_store;"
        code += f"open_store({FILE!r}, Path(sys.argv[1]))"
        async with opened(FILE, tmp_path / "real"):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, tmp_path / "link", stderr=asyncio.subprocess.PIPE
            )
            _, errors = await process.communicate()

        assert process.returncode == 1
        assert b"is in use by another routerd" in errors

    async def test_the_lock_ends_with_the_store(self, tmp_path: Path) -> None:
        """Also when it could not be opened at all."""
        (tmp_path / "routerd.db").write_bytes(b"")
        (tmp_path / "routerd.db").chmod(0o600)
        for _ in range(2):
            async with opened(FILE, tmp_path):
                pass
        with other_program(tmp_path) as program:
            program.execute("PRAGMA user_version = 99")
        for _ in range(2):
            with pytest.raises(StateError, match="newer"):
                open_store(FILE, tmp_path)

        fd = os.open(tmp_path / "routerd.db.lock", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


class TestTrouble:
    @pytest.mark.parametrize("damage", ["header", "middle", "garbage"])
    async def test_a_damaged_file_is_moved_aside_loudly(self, damage: str, tmp_path: Path) -> None:
        """What was in it is kept under another name, a new one works, and the operator is told."""
        async with opened(FILE, tmp_path) as store:
            await store.write([row(f"key{number}", "v" * 500) for number in range(200)])
        file = tmp_path / "routerd.db"
        content = file.read_bytes()
        middle = content[:8192] + b"\xff" * 30_000 + content[38_192:]
        broken = {"header": b"\0" * 100 + content[100:], "middle": middle, "garbage": b"not a database\n" * 100}[damage]
        file.write_bytes(broken)

        async with opened(FILE, tmp_path) as store:
            await store.write([row("a")])
            assert await store.load("quota") == {"a": b"x"}

        (aside,) = files(tmp_path, "routerd.db.corrupt-*")
        assert aside.read_bytes() == broken
        (warning,) = store.warnings
        assert aside.name in warning
        assert "unknown" in warning

    async def test_a_torn_log_loses_at_most_its_end(self, tmp_path: Path) -> None:
        """As after a power cut: what the log still holds whole is there, and nothing is called damaged."""
        other = tmp_path / "after"
        other.mkdir()
        async with opened(FILE, tmp_path) as store:
            for number in range(20):
                await store.write([row(f"k{number:02}")])
            for name in ("routerd.db", "routerd.db-wal"):
                (other / name).write_bytes((tmp_path / name).read_bytes())
        log = other / "routerd.db-wal"
        log.write_bytes(log.read_bytes()[:-1000])

        async with opened(FILE, other) as store:
            rows = await store.load("quota")

        assert store.warnings == ()
        assert list(rows) == [f"k{number:02}" for number in range(19)]

    def test_a_file_from_the_future_is_not_touched(self, tmp_path: Path) -> None:
        """A newer routerd wrote it: nothing is guessed, and the way out is named."""
        asyncio.run(_load(tmp_path))
        with other_program(tmp_path) as program:
            program.execute("PRAGMA user_version = 7")

        with pytest.raises(StateError, match=r"newer routerd \(schema 7, this one knows 2\): upgrade routerd"):
            open_store(FILE, tmp_path)
        assert not list(tmp_path.glob("*corrupt*"))

    def test_another_program_s_database_is_not_touched(self, tmp_path: Path) -> None:
        """Neither its tables nor its mode."""
        with other_program(tmp_path) as program:
            program.execute("CREATE TABLE bookmarks (url)")
        (tmp_path / "routerd.db").chmod(0o644)

        with pytest.raises(StateError, match="another program's database"):
            open_store(FILE, tmp_path)
        assert stat.S_IMODE((tmp_path / "routerd.db").stat().st_mode) == 0o644

    def test_a_place_that_cannot_be_used_is_named(self, tmp_path: Path) -> None:
        """With what to check."""
        (tmp_path / "file").touch()
        (tmp_path / "routerd.db").mkdir()

        with pytest.raises(StateError, match=r"cannot be used: .* Check that the folder exists"):
            open_store(FILE, tmp_path / "file")
        with pytest.raises(StateError, match=r"cannot be used: .* Check that the folder exists"):
            open_store(FILE, tmp_path)

    async def test_waiting_writers_are_bounded(self, tmp_path: Path) -> None:
        """Beyond the bound a write fails at once instead of piling up."""
        async with sqlite_store(tmp_path, max_pending=10) as store:
            writes = [asyncio.ensure_future(store.write([row("a", str(number))])) for number in range(1000)]
            results = await asyncio.gather(*writes, return_exceptions=True)

            refused = [result for result in results if isinstance(result, StateError)]
            assert "the disk cannot keep up" in str(refused[0])
            assert len(refused) <= 990

    async def test_a_write_that_fails_says_so_and_is_made_up_for(self, tmp_path: Path) -> None:
        """Another program's lock fails the write; its rows go along with the next one."""
        async with sqlite_store(tmp_path, busy_s=0.05) as store:
            with other_program(tmp_path) as program:
                program.execute("BEGIN IMMEDIATE")
                with pytest.raises(StateError, match="another program keeps it locked; close it"):
                    await store.write([row("a"), row("b", "old")])
                program.execute("ROLLBACK")
            await store.write([row("b", "new")])

            assert await store.load("quota") == {"a": b"x", "b": b"new"}

    async def test_rows_that_could_not_be_written_at_the_end_are_not_silent(self, tmp_path: Path) -> None:
        """Closing says how many are lost, and still lets go of the file."""
        store = SqliteStore(tmp_path / "routerd.db", busy_s=0.05)
        with other_program(tmp_path) as program:
            program.execute("BEGIN IMMEDIATE")
            store.enqueue([row("a"), row("b")])
            with pytest.raises(StateError, match="2 rows could not be written"):
                await store.close()

        await store.close()
        async with opened(FILE, tmp_path):
            pass

    async def test_reading_what_is_gone_fails_clearly(self, tmp_path: Path) -> None:
        """And writing too; nobody is left waiting."""
        async with sqlite_store(tmp_path) as store:
            with other_program(tmp_path) as program:
                program.execute("DROP TABLE rows")

            with pytest.raises(StateError, match="could not be read"):
                await store.load("quota")
            with pytest.raises(StateError, match="could not be written"):
                await store.write([row("a")])
            with pytest.raises(StateError, match="1 rows could not be written"):
                await store.close()


def _killed(module: str, folder: Path, argument: int, lines: int) -> list[str]:
    """What a program had said when it was killed, which is after ``lines`` lines, or when it ended before that."""
    command = [sys.executable, "-m", module, str(folder), str(argument)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.readlines()
    return [line.strip() for line in said if line.endswith("\n")]


async def _load(folder: Path) -> tuple[dict[str, str], set[str]]:
    async with opened(FILE, folder) as store:
        rows = {key: value.decode() for key, value in (await store.load("quota")).items()}
        return rows, set(await store.load("log"))


def _order(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split("."))
