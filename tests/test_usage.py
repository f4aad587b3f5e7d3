"""``routerd usage``: the ledger, added up, as a table for people and as data for programs."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from routerd import cli
from routerd.__main__ import main
from routerd.state import open_store
from tests.state.test_ledger import entry

CONFIG = """
[state]
url = "sqlite:routerd.db"
[providers.lab]
base_url = "http://127.0.0.1:9001/v1"
models = { big = { context = 200_000 } }
"""
DAY_S = 86_400.0


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no config and no state of this machine takes part."""
    for name in list(os.environ):
        if name.endswith("_KEY") or name.startswith(("XDG_", "ROUTERD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(cli, "SERVICE_STATE", tmp_path / "service")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routerd.toml").write_text(CONFIG)


def remember(folder: Path) -> None:
    """Two weeks: an old attempt, and today one request that was tried twice and one that was not."""
    now = time.time()
    entries = [
        entry(wall=now - 10 * DAY_S, exchange="x0", cost_usd=9.0),
        entry(wall=now, exchange="x1", outcome="unavailable", cost_usd=0.0),
        entry(wall=now, exchange="x1", provider="b", model="n"),
        entry(wall=now, exchange="x2", provider="b", model="n", route="night"),
    ]

    async def write() -> None:
        store = open_store("sqlite:routerd.db", folder)
        store.record(entries)
        await store.close()

    asyncio.run(write())


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["usage", "--json", *arguments]) == cli.EXIT_FINE
    return json.loads(capsys.readouterr().out)


class TestWhatItShows:
    def test_by_provider_and_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Of the last seven days, with a last line for all; requests are not added up, they may be in several lines."""
        remember(tmp_path)
        assert main(["usage"]) == cli.EXIT_FINE

        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert lines[0][0] == "since"
        headings = "PROVIDER MODEL REQUESTS TRIES FAILED IN CACHED OUT REASONING USD"
        assert [" ".join(line) for line in lines[1:5]] == [
            headings,
            "a m 1 1 1 100 60 10 4 0.0000",
            "b n 2 2 0 200 120 20 8 1.0000",
            "all 3 1 300 180 30 12 1.0000",
        ]

    @pytest.mark.parametrize(
        ("by", "groups"),
        [
            ("model", [("m", 1), ("n", 2)]),
            ("provider", [("a", 1), ("b", 2)]),
            ("route", [("auto", 2), ("night", 1)]),
            ("day", [(time.strftime("%Y-%m-%d"), 3)]),
        ],
    )
    def test_by_whatever_is_asked_for(
        self, by: str, groups: list[tuple[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One line for each."""
        remember(tmp_path)
        said = document(capsys, "--by", by)

        assert said["by"] == [by]
        assert groups == [(total[by], total["attempts"]) for total in said["totals"]]

    @pytest.mark.parametrize(("since", "attempts"), [("5m", 3), ("24h", 3), ("7d", 3), ("2w", 4), ("10.5d", 4)])
    def test_as_far_back_as_asked(
        self, since: str, attempts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Minutes, hours, days or weeks."""
        remember(tmp_path)
        said = document(capsys, "--since", since)

        assert sum(total["attempts"] for total in said["totals"]) == attempts

    def test_as_data(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """CSV says the same as JSON, with names in its first line."""
        remember(tmp_path)
        expected = document(capsys)["totals"]
        assert main(["usage", "--csv"]) == cli.EXIT_FINE

        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert rows == [{name: str(value) for name, value in total.items()} for total in expected]

    def test_an_empty_ledger(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Says so, and is no failure."""
        asyncio.run(open_store("sqlite:routerd.db", tmp_path).close())

        assert main(["usage"]) == cli.EXIT_FINE
        assert "nothing was asked of any upstream" in capsys.readouterr().out


class TestWhereItLooks:
    def test_without_a_ledger_it_says_where_it_looked(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """And ends with 1."""
        assert main(["usage"]) == cli.EXIT_WRONG

        assert f"there is no ledger to read: {tmp_path}/routerd.db" in capsys.readouterr().err

    def test_state_in_memory_has_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It ends with the daemon."""
        (tmp_path / "routerd.toml").write_text(CONFIG.replace("sqlite:routerd.db", "memory:"))

        assert main(["usage"]) == cli.EXIT_WRONG
        assert "in memory" in capsys.readouterr().err

    def test_the_services_state_is_found(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Whoever calls it is not the service, and has another folder for state."""
        remember(tmp_path / "service")

        assert len(document(capsys)["totals"]) == 2

    @pytest.mark.parametrize("since", ["yesterday", "7", "0d", "1y", "-1d", "91d"])
    def test_other_ages_are_wrong_usage(self, since: str, capsys: pytest.CaptureFixture[str]) -> None:
        """With the units that there are."""
        with pytest.raises(SystemExit) as end:
            main(["usage", f"--since={since}"])

        assert end.value.code == cli.EXIT_USAGE
        assert "m, h, d, w" in capsys.readouterr().err
