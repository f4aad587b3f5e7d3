"""Thousands of turns of agents in virtual time, with faults at realistic rates: none is lost, and none is corrupted.

The larger run, and the table against other ways to a model: ``python -m tests.simulation``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.simulation import MIXES, TURNS, VirtualLoop, laws_broken, main, simulate, virtual_time
from tests.wires import WIRES, Said, Wire

TASKS = 16
SEED = 20
BASELINE_SEED, BASELINE_TASKS = 3, 60
HARSH_SEED, HARSH_TASKS, HARSHNESS = 11, 50, 5
HEDGED = 'hedge = "free"\n'

# Days on which a law was broken once: seed, tasks, dialects, options of the routes, and what went wrong.
BROKEN_ONCE = [
    (11, 24, "two", "", "a word that comes twice at the seam was taken for a repetition"),
    (13, 24, "two", "", "so were three words"),
    (30, 18, "two", "", "and between two dialects"),
    (48, 8, "two", "", "and within a document, which was JSON all the same"),
    (27, 24, "two", "", "two models in a row added nothing to a text whose call was missing, and were believed"),
    (47, 16, "two", "", "two models in a row added nothing to half a sentence, and were believed"),
    (4, 4, "three", "", "a full stop in front of a call was held as a possible repetition, and lost with the call"),
    (5, 24, "three", HEDGED, "a keep-alive came behind the end of an answer that had won a race"),
]

every_wire = pytest.mark.parametrize("wire", [pytest.param(wire, id=name) for name, wire in WIRES.items()])


@pytest.mark.parametrize("way", ["live", "whole"])
def test_no_turn_is_lost_or_corrupted(way: str, record_property: Callable[[str, object], None]) -> None:
    """Every turn that anybody could serve comes whole at the first request, and says what one of the models said."""
    tally = simulate(way, TASKS, SEED)
    record_property("seconds", tally.row())

    assert laws_broken(tally) == [], tally.wrong
    assert tally.finished == tally.tasks == TASKS
    assert tally.turns == TASKS * TURNS


@pytest.mark.parametrize("options", ["", HEDGED], ids=["", "hedged"])
def test_where_one_request_in_three_fails_nothing_is_corrupted(options: str) -> None:
    """Turns may be lost then, for attempts are bounded; but what comes whole is whole."""
    tally = simulate("live", HARSH_TASKS, HARSH_SEED, HARSHNESS, options=options)

    assert laws_broken(tally, HARSHNESS) == [], tally.wrong


@pytest.mark.parametrize(
    ("seed", "tasks", "mix", "options"), [pytest.param(*day[:4], id=day[4]) for day in BROKEN_ONCE]
)
def test_a_day_that_broke_a_law_breaks_none_any_more(seed: int, tasks: int, mix: str, options: str) -> None:
    """Each of these showed a mistake of ours, in harsh times."""
    tally = simulate("live", tasks, seed, HARSHNESS, mix, options)

    assert (tally.corrupted, tally.false_ends, tally.flawed) == (0, 0, 0), tally.wrong


def test_without_recovery_the_same_faults_show(record_property: Callable[[str, object], None]) -> None:
    """Straight to one provider tasks die, and half answers are taken for whole; moving on until the first byte, texts
    break off.
    """
    direct = simulate("direct", BASELINE_TASKS, BASELINE_SEED)
    first_byte = simulate("first byte", BASELINE_TASKS, BASELINE_SEED)
    record_property("seconds", direct.row())
    record_property("seconds", first_byte.row())

    assert direct.finished < direct.tasks
    assert direct.corrupted > 0
    assert first_byte.patched > 0
    assert first_byte.delivered < first_byte.turns


def test_the_same_seed_makes_the_same_day() -> None:
    """To the last request and the last second: what a seed shows can be looked at again."""
    one, other = simulate("live", 8, SEED), simulate("live", 8, SEED)

    assert one == other
    assert one != simulate("live", 8, SEED + 1)


@pytest.mark.parametrize("mix", MIXES)
def test_every_fault_is_met_in_every_dialect(mix: str) -> None:
    """A few days are enough for each, and for those that cut a stream at each place of an answer."""
    tally = simulate("whole", TASKS, SEED, 15, mix)
    cuts = {f"{fault} / {place}" for fault in ("reset", "fin", "eof", "error") for place in ("opening", "text", "call")}

    assert (
        tally.met.keys() >= {"refuse", "hang", "html", "429", "500", "empty", "bad arguments", "cut arguments"} | cuts
    )
    assert (tally.corrupted, tally.false_ends, tally.flawed) == (0, 0, 0), tally.wrong


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """One row for each way, over days that may be split over processes."""
    assert main(["--tasks", "4", "--ways", "direct", "live", "--faults"]) == 0

    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["way", "direct", "live"]
    assert "faults met: " in printed


@every_wire
@pytest.mark.parametrize("calls", [(), (("call_1", '{"command":"ls"}'), ("call_2", '{"command":"pwd"}'))])
def test_what_a_server_says_is_what_a_client_understands(wire: Wire, calls: tuple[tuple[str, str], ...]) -> None:
    """Streamed and whole, without anything a client would stumble over."""
    said = Said(("I look", " around."), calls)

    streamed = wire.read_stream(b"".join(chunk.data for chunk in wire.stream(said)))
    whole = wire.read_body(wire.body(said))

    for read in (streamed, whole):
        assert (read.text, read.calls) == ("I look around.", tuple(arguments for _, arguments in calls))
        assert (read.finish, read.ended, read.failed, read.flaws) == (said.reason, True, False, ())


@every_wire
def test_a_client_sees_what_is_wrong(wire: Wire) -> None:
    """An error is no end, a broken line is where reading ends, and something behind the end is a flaw."""
    chunks = [chunk.data for chunk in wire.stream(Said(("I look", " around.")))]
    half = b"".join(chunks[:3])

    assert wire.read_stream(half + wire.error).failed
    assert wire.read_stream(half + wire.broken + chunks[-1]).failed
    assert not wire.read_stream(half).ended
    assert "something after the end" in wire.read_stream(b"".join([*chunks, chunks[2]])).flaws


def test_virtual_time_passes_only_while_everybody_waits() -> None:
    """An hour's sleep takes no time, and all clocks agree about it."""
    loop = VirtualLoop()

    async def sleep() -> tuple[float, float, float]:
        monotonic, wall, looped = time.monotonic(), time.time(), loop.time()
        await asyncio.gather(asyncio.sleep(3600), asyncio.sleep(1800))
        return time.monotonic() - monotonic, time.time() - wall, loop.time() - looped

    began = time.monotonic()
    with virtual_time(loop):
        passed = loop.run_until_complete(sleep())
    loop.close()

    assert passed == pytest.approx((3600, 3600, 3600))
    assert time.monotonic() - began < 10
