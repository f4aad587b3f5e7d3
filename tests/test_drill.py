"""``routerd drill``: what it prints and how it ends, that it leaves the machine alone, and that it can fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from routerd import cli
from routerd.__main__ import INTERRUPTED, main
from routerd.cli.drill import show
from routerd.proxy.drill import direct
from routerd.proxy.laws import JUMP
from routerd.proxy.report import Report, Tally, delivery, order, report, spending
from routerd.proxy.scripts import Answer, Received, Turn
from routerd.proxy.spending import Spending, spend
from routerd.proxy.stage import Agent, Done, Stage, client
from routerd.proxy.tasks import (
    HEALTHY,
    MODEL,
    TROUBLES,
    TURNS,
    WAYS,
    Case,
    Model,
    Pattern,
    answer_of,
    cases,
    sayings,
)
from tests.process_rig import ROOT

pytestmark = pytest.mark.xdist_group("drill")  # one run of the command serves several tests
SPENT = Spending(80, 20, 20, 80, 0.5, 0.49, 24, 50, 0, 0, 0)
FAULTS = {f"{trouble.name} {trouble.place}".rstrip(): trouble for trouble in TROUBLES}


def case_of(fault: str, *, pattern: Pattern = "always", stream: bool = True) -> Case:
    trouble = HEALTHY if fault == "no fault" else FAULTS[fault]
    return Case(0, trouble, pattern, "chat", "live", stream, 1)


async def without_routerd(*found: Case) -> list[list[Done]]:
    """The tasks as they go straight at the faulty upstream."""
    async with Stage() as stage:
        numbered = [msgspec.structs.replace(case, number=number) for number, case in enumerate(found)]
        return await direct(numbered, stage, 8, 0.6)


def broken(tasks: Sequence[Sequence[Done]]) -> set[str]:
    """The invariants that do not hold of what was heard."""
    return {one.name for one in delivery(tasks, ()) if not one.held}


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One quick drill in a folder of its own, with a config there that no command could use."""
    home = tmp_path_factory.mktemp("home")
    (home / "routerd.toml").write_text("this is = = no config")
    (home / "tmp").mkdir()
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "TMPDIR": str(home / "tmp")}
    command = [sys.executable, "-B", "-m", "routerd", "drill", "--quick", "--seed", "7", "--json"]
    done = subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, check=False, timeout=100)
    return done, home


def test_every_invariant_holds(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """And the exit code says so."""
    done, _ = ran
    found = json.loads(done.stdout)

    assert [one for one in found["invariants"] if not one["held"]] == []
    assert found["broken"] == []
    assert (done.returncode, done.stderr) == (cli.EXIT_FINE, "")


def test_every_fault_is_met_in_every_way(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Streamed or not, delivered live or whole; and in every dialect there is."""
    found = json.loads(ran[0].stdout)

    assert {row["fault"] for row in found["rows"]} == {"no fault", *(trouble.name for trouble in TROUBLES)}
    for row in found["rows"]:
        assert set(row["ways"]) == {"live stream", "live", "whole stream", "whole"}
        assert all(share["delivered"] == share["of"] >= TURNS for share in row["ways"].values())
    assert {"chat", "messages"} <= set(found["dialects"])


def test_the_same_faults_are_felt_without_routerd(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Else it would show nothing that they are not felt with it."""
    found = {one["name"]: one["direct"] for one in json.loads(ran[0].stdout)["invariants"]}
    delivered, of = (int(part.replace(",", "")) for part in found["turns delivered"].split(" of "))

    assert delivered < of / 2
    for name in ("calls lost", "calls said by half", "answers corrupted", "ends invented"):
        assert int(found[name]) > 0


def test_it_leaves_the_machine_alone(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """No config is read, no state is written, and nothing stays behind in the folder for temporary files."""
    _, home = ran

    assert sorted(str(path.relative_to(home)) for path in home.rglob("*")) == ["routerd.toml", "tmp"]


def test_an_interrupt_ends_it_cleanly(tmp_path: Path) -> None:
    """At once, without a word, and without leaving its folder behind."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-B", "-m", "routerd", "drill"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 30
        while not list(tmp_path.iterdir()) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)

    assert (process.returncode, out, err) == (INTERRUPTED, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--seed", "x"], ["--seed", "-1"], ["--quick", "extra"], ["--dance"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    """Before anything is started."""
    with pytest.raises(SystemExit) as end:
        main(["drill", *arguments])

    assert end.value.code == cli.EXIT_USAGE


# --- it can fail ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("ends unfinished mid text", "ends invented"),
        ("ends unfinished before finish", "ends invented"),
        ("empty answer", "ends invented"),
        ("cut arguments", "calls said by half"),
        ("bad arguments", "calls lost"),
        ("malformed event mid text", "answers corrupted"),
        ("HTML", "ends invented"),
        ("stall before content", "turns delivered"),
        ("503", "turns delivered"),
        ("connection refused", "turns delivered"),
    ],
)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "body"])
async def test_a_front_that_is_no_router_breaks_the_invariants(fault: str, name: str, stream: bool) -> None:
    """The same tasks, judged by the same laws, straight at the faulty upstream."""
    found = broken(await without_routerd(case_of(fault, stream=stream)))

    assert "turns delivered" in found
    if stream:  # a body that is cut is no JSON: nobody takes it for an answer
        assert name in found


async def test_without_a_fault_nothing_is_broken() -> None:
    """Neither by the upstream nor by the agent."""
    healthy = [case_of("no fault", pattern="never", stream=stream) for stream in (True, False)]

    assert broken(await without_routerd(*healthy)) == set()


def twice(case: Case, answer: Answer) -> Answer:
    """What a router might make of a text that broke off: it begins again, at a word."""
    return msgspec.structs.replace(answer, text=str(answer.text)[:30] + str(answer.text)[10:])


def doubled(case: Case, answer: Answer) -> Answer:
    return msgspec.structs.replace(answer, calls=(answer.calls or ()) + (answer.calls or ())[:1])


def lost(case: Case, answer: Answer) -> Answer:
    return msgspec.structs.replace(answer, calls=(answer.calls or ())[:1])


def mixed(case: Case, answer: Answer) -> Answer:
    """The beginning of one model's answer, and the end of the other's."""
    return msgspec.structs.replace(answer, text=str(answer.text)[:30] + str(answer_of(case, 0, "b").text)[30:])


@pytest.mark.parametrize(
    ("sabotage", "name"),
    [
        (twice, "bytes said twice"),
        (doubled, "calls doubled"),
        (lost, "calls lost"),
        (mixed, "answers corrupted"),
    ],
)
async def test_a_router_that_spoils_answers_is_found_out(sabotage: Any, name: str) -> None:
    """Whole answers, well formed, and wrong."""
    case = case_of("no fault", pattern="never")

    def spoilt(_received: Received) -> Turn:
        return Turn(sabotage(case, answer_of(case, 0, "a")))

    async with Stage() as stage, client(5.0) as front:
        done = await Agent(case, front, stage.put("spoilt", spoilt), MODEL, Model(case, "a")).work()

    assert name in broken([done])
    assert len(done) == 1


@pytest.mark.parametrize(
    "changes",
    [{"sent": 21}, {"window_delivered": 79}, {"billed_usd": 0.5001}, {"told": 0}, {"dishonest": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_cent_too_much_is_found_out(changes: dict[str, Any]) -> None:
    """And a request too many, or an answer too few."""
    assert all(one.held for one in spending(SPENT))
    assert not all(one.held for one in spending(SPENT._replace(**changes)))


async def test_the_bill_is_the_upstreams_own() -> None:
    """Allowances are used, and what the upstreams counted is within them."""
    async with Stage() as stage:
        spent = await spend(stage, 3)

    assert spent.window / 2 < spent.sent <= spent.window
    assert spent.budget_usd / 2 < spent.billed_usd <= spent.budget_usd
    assert (spent.window_delivered, spent.unsettled, spent.leaked) == (spent.asked, 0, 0)


def test_disorder_is_found_out() -> None:
    """What is left behind, what was settled twice, and what took too long."""
    tidy, untidy = Tally(attempts=5, limit_s=0.6), Tally(attempts=5, unsettled=1, limit_s=0.6)
    untidy.left.connections = 1

    assert [one.held for one in order(tidy, 0.7)] == [True, True, True]
    assert [one.held for one in order(untidy, 60.0)] == [False, False, False]


async def test_a_broken_invariant_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    """The invariant is marked, and the answer that broke it is shown."""
    tally = Tally(routed=await without_routerd(case_of("ends unfinished mid text")))
    found = report(1, ("chat",), tally, SPENT)

    assert show(found, as_json=False) == cli.EXIT_WRONG

    shown = capsys.readouterr().out
    assert "turns delivered       ✕ 0 of 3" in shown
    assert "✕ 0/3" in shown
    assert "ends unfinished mid text, always; chat, streamed, delivered live; turn 0: " in shown
    assert "invented end" in shown


@pytest.mark.parametrize("terminal", [True, False])
async def test_what_holds_ends_with_0(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a table, prettier on a terminal; or for programs."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    healthy = await without_routerd(case_of("no fault", pattern="never"))
    found = report(1, ("chat",), Tally(routed=healthy, direct=healthy), SPENT)

    assert show(found, as_json=False) == cli.EXIT_FINE
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert "● 3 of 3" in shown
    assert ("──" in shown) == terminal

    assert show(found, as_json=True) == cli.EXIT_FINE
    assert msgspec.json.decode(capsys.readouterr().out, type=Report) == found


# --- the tasks ------------------------------------------------------------------------------------------------------


def test_a_seed_makes_the_same_tasks_again() -> None:
    """And another one makes others."""
    again, other = cases(("chat", "messages"), 1, quick=True), cases(("chat", "messages"), 2, quick=True)

    assert cases(("chat", "messages"), 1, quick=True) == again
    assert [str(case) for case in again] != [str(case) for case in other]
    assert answer_of(again[5], 0, "a") == answer_of(cases(("chat", "messages"), 1, quick=True)[5], 0, "a")


@pytest.mark.parametrize("quick", [True, False])
def test_all_faults_strike(quick: bool) -> None:
    """Each in every way, once or always, and once is once; over all dialects."""
    found = cases(("chat", "messages", "other"), 1, quick=quick)

    assert {(case.trouble, case.delivery, case.stream) for case in found} == {
        (trouble, *way) for trouble in (HEALTHY, *TROUBLES) for way in WAYS
    }
    assert {case.dialect for case in found} == {"chat", "messages", "other"}
    assert all(bool(case.struck) == (case.trouble is not HEALTHY) for case in found)
    assert all(len(case.struck) == 1 for case in found if case.pattern == "once")
    assert [case.number for case in found] == list(range(len(found)))


@pytest.mark.parametrize("seed", range(20))
def test_the_texts_repeat_nothing(seed: int) -> None:
    """So whatever is heard twice was said twice; and no two wordings can be taken for each other."""
    case = msgspec.structs.replace(case_of("no fault"), seed=seed)
    for turn in (0, 1):
        first, second = (saying.text for saying in sayings(case, turn))
        for text in (first, second):
            pieces = [text[at : at + JUMP] for at in range(len(text) - JUMP)]
            assert len(set(pieces)) == len(pieces)
        assert not first.startswith(second[:JUMP])


async def test_everything_is_gone_after_a_part_of_it() -> None:
    """Tasks and connections, whoever fails."""
    before = asyncio.all_tasks()
    await without_routerd(*(case_of(fault, pattern="once") for fault in FAULTS))

    assert asyncio.all_tasks() == before
