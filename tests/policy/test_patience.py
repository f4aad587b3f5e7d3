"""How long an upstream is waited for: as long as it usually takes, with a floor under it and a ceiling above."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.policy.patience import FACTOR, HEDGE_FACTOR, SAMPLES_MAX, SAMPLES_MIN, Patience, Waits

FLOOR_S, CEILING_S = 1.0, 60.0


def waits(*seconds: float) -> Waits:
    noted = Waits()
    for wait_s in seconds:
        noted.note(wait_s)
    return noted


def test_a_stranger_gets_all_the_time_there_is() -> None:
    """Until so many of its waits are known."""
    assert waits().limit_s(FLOOR_S, CEILING_S) == CEILING_S
    assert waits(*[1.0] * (SAMPLES_MIN - 1)).limit_s(FLOOR_S, CEILING_S) == CEILING_S


def test_a_known_one_gets_a_multiple_of_its_longest_usual_wait() -> None:
    """Neither its fastest nor its mean."""
    assert waits(*[1.0] * SAMPLES_MIN, 3.0).limit_s(FLOOR_S, CEILING_S) == FACTOR * 3.0


def test_one_wait_in_a_hundred_is_an_accident() -> None:
    """It does not count among so many others."""
    assert waits(50.0, *[1.0] * (SAMPLES_MAX - 1)).limit_s(FLOOR_S, CEILING_S) == FACTOR * 1.0


def test_the_limit_stays_between_floor_and_ceiling() -> None:
    """A very fast one may still hiccup; a very slow one is not waited for without end."""
    assert waits(*[0.01] * SAMPLES_MIN).limit_s(FLOOR_S, CEILING_S) == FLOOR_S
    assert waits(*[50.0] * SAMPLES_MIN).limit_s(FLOOR_S, CEILING_S) == CEILING_S


@given(st.lists(st.floats(0, 100), min_size=SAMPLES_MIN, max_size=3 * SAMPLES_MAX))
def test_only_the_last_waits_count(seconds: list[float]) -> None:
    """What was long ago is forgotten, and the limit is the same as if it had never been."""
    assert waits(*seconds).limit_s(0, 1000) == waits(*seconds[-SAMPLES_MAX:]).limit_s(0, 1000)


def test_prompts_of_other_sizes_are_another_matter() -> None:
    """A long prompt takes longer to read; what short ones take says nothing about it."""
    patience = Patience()
    for _ in range(SAMPLES_MIN):
        patience.observe(100, 1.0, 0.5)

    assert patience.first_token_s(100, FLOOR_S, CEILING_S) == FACTOR * 1.0
    assert patience.stall_s(100, FLOOR_S, CEILING_S) == FACTOR * 0.5
    assert patience.first_token_s(100_000, FLOOR_S, CEILING_S) == CEILING_S
    assert patience.stall_s(100_000, FLOOR_S, CEILING_S) == CEILING_S


def test_a_second_one_may_be_asked_after_the_usual_wait() -> None:
    """What one request in twenty exceeds, or else a multiple of what is expected, up to half the limit."""
    patience = Patience()
    assert patience.hedge_after_s(100, 1.0, FLOOR_S, CEILING_S) == HEDGE_FACTOR * 1.0
    assert patience.hedge_after_s(100, 0.1, FLOOR_S, CEILING_S) == FLOOR_S
    assert patience.hedge_after_s(100, 50.0, FLOOR_S, CEILING_S) == CEILING_S / 2
    for wait_s in range(1, 101):
        patience.observe(100, float(wait_s) / 5, 0.5)

    assert patience.hedge_after_s(100, 1.0, FLOOR_S, CEILING_S) == pytest.approx(19.0, abs=0.2)
    assert patience.hedge_after_s(100_000, 1.0, FLOOR_S, CEILING_S) == HEDGE_FACTOR * 1.0
