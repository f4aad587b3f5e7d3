"""A thousand turns of agents in virtual time, with faults at realistic rates: none is lost, and none is corrupted.

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


@pytest.mark.parametrize("way", ["live", "whole"])
def test_no_turn_is_lost_or_corrupted(way: str, record_property: Callable[[str, object], None]) -> None:
    """Every turn that anybody could serve comes whole at the first request, and says what one of the models said."""
    tally = simulate(way, TASKS, SEED)
    record_property("seconds", tally.row())

    assert laws_broken(tally) == [], tally.wrong
    assert tally.finished == tally.tasks == TASKS
    assert tally.turns == TASKS * TURNS


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
