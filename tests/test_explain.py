"""``routerd explain``: the planner's own order and terms, to be checked by hand, with or without a running daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from routerd import cli
from routerd.__main__ import main
from routerd.proxy.simulated import Fault, Turn
from tests.fakes import Upstreams
from tests.process_rig import serving
from tests.rig import HELLO, config_text, post

BALANCED_USD_PER_S = 2 / 3600
SEED_S = 3.0  # the first token of a prompt of 20,000 tokens, at an upstream nobody has tried
ANSWER_S = 400 / 50  # tokens expected, at the tokens per second expected
P_FAIL = 0.02
TWO = """
[state]
url = "memory:"
[providers.dear]
base_url = "http://127.0.0.1:9001/v1"
models = { big = { context = 200_000, input = 1, output = 2 } }
[providers.cheap]
base_url = "http://127.0.0.1:9002/v1"
keys = ["k1", "k2"]
models = { big = { context = 100_000, input = 0.5, output = 8 }, plain = { context = 100_000, tools = false } }
[routes.auto]
models = [MODELS]
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no config of this machine takes part."""
    for name in list(os.environ):
        if name.endswith("_KEY") or name.startswith(("XDG_", "ROUTERD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def write(models: str = '"big"', more: str = "") -> None:
    Path("routerd.toml").write_text(TWO.replace("MODELS", models) + more)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == cli.EXIT_FINE
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(shown(capsys, "--json", *arguments))


class TestTerms:
    def test_they_are_what_a_hand_would_compute(self, capsys: pytest.CaptureFixture[str]) -> None:
        """20,000 prompt tokens and 400 expected ones, 11 seconds at 2 USD an hour, and the other one as the retry."""
        write()

        cheap, dear = document(capsys, "auto")["upstreams"]

        cheap_usd, dear_usd = 0.02 * 0.5 + 0.0004 * 8, 0.02 * 1 + 0.0004 * 2
        time_usd = (SEED_S + ANSWER_S) * BALANCED_USD_PER_S
        assert [cheap["upstream"], dear["upstream"]] == ["cheap/big", "dear/big"]
        assert (cheap["terms"]["cost_usd"], dear["terms"]["cost_usd"]) == pytest.approx((cheap_usd, dear_usd))
        assert cheap["terms"]["latency_usd"] == pytest.approx(time_usd)
        assert cheap["terms"]["total_usd"] == pytest.approx(cheap_usd + time_usd + P_FAIL * (dear_usd + time_usd))
        assert dear["terms"]["total_usd"] == pytest.approx(dear_usd + time_usd + P_FAIL * (cheap_usd + time_usd))

    @pytest.mark.parametrize(("tokens", "cost"), [("1000", "0.001800"), ("100_000", "0.100800")])
    def test_they_are_for_the_prompt_that_was_asked_about(
        self, tokens: str, cost: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A million tokens in cost 1 USD here, a million out 2, and 400 come out."""
        write()

        row = row_of(shown(capsys, "dear/big", "--tokens", tokens), "dear/big")

        assert row[4] == cost

    def test_the_table_shows_all_of_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Cost, first token, whole answer, its worth, chance of failure, retry and total, to the sixth digit."""
        write()

        row = row_of(shown(capsys, "auto"), "cheap/big")

        assert row == [
            *("1", "cheap/big", "100,000", "0.5/8"),
            *("0.013200", "3.0", "s", "11.0", "s", "0.006111", "2.0%", "0.000538", "0.019849"),
            *("2", "keys"),
        ]

    def test_time_counts_as_the_route_prefers(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Nothing, where it prefers cheap."""
        write(more='prefer = "cheap"')

        assert document(capsys, "auto")["upstreams"][0]["terms"]["latency_usd"] == pytest.approx(0, abs=1e-6)
        assert "an hour of waiting is worth 0.00 USD" in shown(capsys, "auto")


def row_of(table: str, name: str) -> list[str]:
    """The cells of an upstream's line."""
    (line,) = [line for line in table.splitlines() if f" {name} " in line]
    return line.split()


class TestOrder:
    def test_tiers_come_first_and_prices_second(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A cheaper upstream of a lower tier does not come before a dear one above it."""
        write('"dear/big", "cheap/big"')

        explained = document(capsys, "auto")

        order = [(entry["tier"], entry["upstream"]) for entry in explained["upstreams"]]
        assert order == [(1, "dear/big"), (2, "cheap/big")]
        assert explained["next"] == "dear/big"

    def test_who_is_left_out_stands_last_with_the_reason(self, capsys: pytest.CaptureFixture[str]) -> None:
        """An agent's request has tools, and this prompt is too long for one of them."""
        write('["cheap/plain", "cheap/big", "dear/big"]')

        table = shown(capsys, "auto", "--tokens", "150000")

        lines = [line for line in table.splitlines() if line.startswith("1 ")]
        assert [line.split()[1] for line in lines] == ["dear/big", "cheap/plain", "cheap/big"]
        assert lines[1].endswith("2 keys, 2 left out (takes no tools)")
        assert lines[2].endswith("2 keys, 2 left out (the prompt is longer than its window)")
        assert table.endswith("next: dear/big\n")

    def test_where_nobody_can_ever_serve_it_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        """With what is in the way."""
        write()

        table = shown(capsys, "auto", "--tokens", "1_000_000")

        assert table.endswith("nobody can serve this for good: the prompt is longer than every window\n")


class TestState:
    def test_without_state_it_says_that_these_are_seeds(self, capsys: pytest.CaptureFixture[str]) -> None:
        """For nothing is known of the daemon then."""
        write()

        assert "estimates are seeds, not from the running daemon" in shown(capsys, "auto")

    @pytest.mark.parametrize("damage", ["garbage", "foreign", "absent"])
    def test_state_that_cannot_be_read_is_said_and_left_alone(
        self, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It is the daemon's to mend."""
        path = tmp_path / "state.db"
        if damage == "garbage":
            path.write_bytes(b"no database" * 1000)
        elif damage == "foreign":
            with contextlib.closing(sqlite3.connect(path)) as database:
                database.execute("CREATE TABLE theirs (x)")
        before = path.read_bytes() if path.exists() else None
        write()
        Path("routerd.toml").write_text(Path("routerd.toml").read_text().replace("memory:", f"sqlite:{path}"))

        table = shown(capsys, "auto")

        assert f"estimates are seeds, not from the running daemon: {path}" in table
        assert (path.read_bytes() if path.exists() else None) == before

    async def test_beside_a_running_daemon_it_knows_the_quotas(
        self, tmp_path: Path, upstreams: Upstreams, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What is used up is left out, until the time it is free again."""
        limits = 'limits = [{ requests = 2, per = "month", resets = "UTC" }]'
        limited, spare = await upstreams(), await upstreams()
        saved(tmp_path, config_text({"limited": limited, "spare": spare}, extra=limits))
        async with serving(folder=tmp_path) as process:
            for _ in range(2):
                await post(process.url, HELLO)
            explained = await asyncio.to_thread(document, capsys, "auto")
            assert (await post(process.url, HELLO))[0] == 200

        (left_out,) = explained["upstreams"][0]["left_out"]
        assert left_out["reason"] == "quota"
        assert 0 < left_out["wait_s"] <= 31 * 86_400
        assert explained["next"] == "spare/model"
        assert (len(limited.requests), len(spare.requests)) == (2, 1)

    async def test_after_a_stop_it_knows_breakers_and_latencies(
        self, tmp_path: Path, upstreams: Upstreams, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As the next daemon will find them."""
        broken, fine = await upstreams(Turn(fault=Fault("status", status=503))), await upstreams()
        patient = 'breaker = { failures = 3, open = "10m" }'
        saved(tmp_path, config_text({"broken": broken, "fine": fine}, defaults=patient))
        async with serving(folder=tmp_path) as process:
            for _ in range(3):
                await post(process.url, HELLO | {"stream": True})
            await process.stop()

        table = await asyncio.to_thread(shown, capsys, "auto", "--tokens", "1000")

        assert "broken/model" in table
        assert "breaker open for " in table
        assert float(row_of(table, "fine/model")[5]) < 1.0
        assert table.endswith("next: fine/model\n")

    async def test_where_every_breaker_is_open_it_names_who_is_tried_all_the_same(
        self, tmp_path: Path, upstreams: Upstreams, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """For the daemon does not leave a route with nobody."""
        broken = await upstreams(Turn(fault=Fault("status", status=503)))
        impatient = 'max_wait = "1s"\nmax_attempts = 3\nbreaker = { failures = 1, open = "10m" }'
        saved(tmp_path, config_text({"broken": broken}, defaults=impatient))
        async with serving(folder=tmp_path) as process:
            await post(process.url, HELLO)
            await process.stop()

        table = await asyncio.to_thread(shown, capsys, "auto")

        assert table.endswith("next: broken/model, though its breaker is open, for nobody else is left\n")


def saved(folder: Path, text: str) -> None:
    """A config in the working directory whose state is on disk."""
    (folder / "routerd.toml").write_text(text.replace("memory:", f"sqlite:{folder / 'state.db'}"))


class TestWrongUse:
    def test_an_unknown_model_ends_with_1_and_names_like_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        """On stderr, so that what is piped stays clean."""
        write()

        assert main(["explain", "bigg"]) == cli.EXIT_WRONG

        out, err = capsys.readouterr()
        assert out == ""
        assert err == "there is no model or route 'bigg'; near it: big, dear/big\n"

    @pytest.mark.parametrize("tokens", ["0", "-5", "many", "1e9", "999999999999"])
    def test_an_impossible_number_of_tokens_ends_with_2(self, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
        """As for every other program."""
        write()

        with pytest.raises(SystemExit) as end:
            main(["explain", "auto", f"--tokens={tokens}"])

        assert end.value.code == cli.EXIT_USAGE
        assert "--tokens" in capsys.readouterr().err

    def test_it_needs_neither_a_config_nor_a_daemon(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Not even for the simulated providers, whose servers are the daemon's."""
        assert "simulated-a/model-simulated" in shown(capsys, "auto")
