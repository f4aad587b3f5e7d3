"""Thousands of turns of agents in virtual time, with faults at realistic rates: none is lost, and none is corrupted.

The larger run, and the table against other ways to a model: ``python -m tests.simulation``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.simulation import TURNS, VirtualLoop, laws_broken, simulate, virtual_time

TASKS = 20
SEED = 20
BASELINE_SEED, BASELINE_TASKS = 3, 60

# Once one text in some ten thousand was corrupted: where a word came twice at the seam, where two models in a row added
# nothing to a text whose call was missing, and where a server gave a turn of a few letters back.
HARSH_SEED, HARSH_TASKS, HARSHNESS = 11, 100, 5


@pytest.mark.parametrize("way", ["live", "whole"])
def test_no_turn_is_lost_or_corrupted(way: str, record_property: Callable[[str, object], None]) -> None:
    """Every turn that anybody could serve comes whole at the first request, and says what one of the models said."""
    tally = simulate(way, TASKS, SEED)
    record_property("seconds", tally.row())

    assert laws_broken(tally) == [], tally.wrong
    assert tally.finished == tally.tasks == TASKS
    assert tally.turns == TASKS * TURNS


def test_where_one_request_in_four_fails_nothing_is_corrupted() -> None:
    """Turns may be lost then, for attempts are bounded; but what comes whole is whole."""
    tally = simulate("live", HARSH_TASKS, HARSH_SEED, HARSHNESS)

    assert tally.corrupted == 0, tally.wrong
    assert tally.delivered > 0.999 * tally.servable


def test_without_recovery_the_same_faults_show(record_property: Callable[[str, object], None]) -> None:
    """Straight to one provider tasks die; moving on until the first byte, texts break off."""
    direct = simulate("direct", BASELINE_TASKS, BASELINE_SEED)
    first_byte = simulate("first byte", BASELINE_TASKS, BASELINE_SEED)
    record_property("seconds", direct.row())
    record_property("seconds", first_byte.row())

    assert direct.finished < direct.tasks
    assert first_byte.patched > 0
    assert first_byte.delivered < first_byte.turns


def test_the_same_seed_makes_the_same_day() -> None:
    """To the last request and the last second: what a seed shows can be looked at again."""
    one, other = simulate("live", 8, SEED), simulate("live", 8, SEED)

    assert one == other
    assert one != simulate("live", 8, SEED + 1)


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
