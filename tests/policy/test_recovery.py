"""What follows a failed attempt: a table of what the client has, how it broke, and what is left to spend."""

from __future__ import annotations

import pytest

from routerd.canonical import Event, Failure, Finish, Outcome, ReasoningDelta, Side, Start, TextDelta, ToolStart
from routerd.policy.recovery import Break, Budget, Continue, Fail, Rerun, Retry, Step, Stop, next_step
from routerd.policy.transcript import Transcript

NOTHING: tuple[Event, ...] = ()
THINKING = (Start("id", "model"), ReasoningDelta(0, "Hm."))
BLANK = (*THINKING, TextDelta(0, "\n\n"))
TEXT = (*BLANK, TextDelta(0, "I will"))
CALLS = (*TEXT, ToolStart(0, "call", "weather"), Finish("tool_calls"))

LEFT = Budget(3)
SPENT = Budget(0)
IN_TEXT, IN_CALL = Break(), Break(in_call=True)

FAULTS: dict[Outcome, Failure] = {
    outcome: Failure(outcome, Side.UPSTREAM, "")
    for outcome in Outcome
    if outcome not in (Outcome.SUCCESS, Outcome.CLIENT_ERROR, Outcome.CANCELLED)
}


def delivered(events: tuple[Event, ...]) -> Transcript:
    transcript = Transcript()
    transcript.fold(events)
    return transcript


def step_after(events: tuple[Event, ...], broke: Break = IN_TEXT, budget: Budget = LEFT) -> Step:
    return next_step(delivered(events), FAULTS[Outcome.TRUNCATED], broke, budget)


@pytest.mark.parametrize("outcome", FAULTS)
@pytest.mark.parametrize("events", [NOTHING, THINKING, BLANK], ids=["nothing", "thinking", "blank text"])
def test_before_the_first_word_everything_is_retried(events: tuple[Event, ...], outcome: Outcome) -> None:
    """Whatever went wrong: the client has nothing that could be said twice."""
    assert next_step(delivered(events), FAULTS[outcome], IN_CALL, LEFT) == Retry()


@pytest.mark.parametrize("outcome", FAULTS)
def test_in_the_middle_of_a_text_it_is_gone_on_with(outcome: Outcome) -> None:
    """Whatever went wrong, on the first try or on a later one."""
    assert next_step(delivered(TEXT), FAULTS[outcome], IN_TEXT, LEFT) == Continue()


def test_in_the_middle_of_a_call_the_whole_request_is_made_again() -> None:
    """The text in front of the call is whole; only the calls are wanted."""
    assert step_after(TEXT, IN_CALL) == Rerun()


def test_a_rerun_that_could_not_be_joined_is_not_tried_twice() -> None:
    """The text is gone on with instead: that leads to the call as well."""
    assert step_after(TEXT, Break(in_call=True, diverged=True)) == Continue()


def test_a_document_is_rerun_then_gone_on_with_and_checked() -> None:
    """Half of one invites a second beginning."""
    assert step_after(TEXT, Break(structured=True)) == Rerun()
    assert step_after(TEXT, Break(structured=True, diverged=True)) == Continue(checked=True)


def test_what_cannot_be_put_together_is_not() -> None:
    """Several choices, log probabilities: retried as long as nothing is out, then over."""
    assert step_after(THINKING, Break(joinable=False)) == Retry()
    assert isinstance(step_after(TEXT, Break(joinable=False)), Fail)


@pytest.mark.parametrize("broke", [IN_TEXT, IN_CALL])
def test_calls_with_the_client_are_the_end(broke: Break) -> None:
    """Whatever came next would be acted upon a second time."""
    assert isinstance(step_after(CALLS, broke), Fail)


def test_more_text_than_is_kept_cannot_be_gone_on_with() -> None:
    """Nobody would know where."""
    transcript = delivered(TEXT)
    for _ in range(5):
        transcript.fold([TextDelta(0, "x" * 1024 * 1024)])

    assert isinstance(next_step(transcript, FAULTS[Outcome.STALLED], IN_TEXT, LEFT), Fail)


@pytest.mark.parametrize("events", [NOTHING, TEXT, CALLS])
@pytest.mark.parametrize("budget", [LEFT, SPENT])
def test_nobody_is_left_to_answer(events: tuple[Event, ...], budget: Budget) -> None:
    """The client has hung up: not even an error is owed."""
    gone = Failure(Outcome.CANCELLED, Side.CLIENT, "")

    assert next_step(delivered(events), gone, IN_TEXT, budget) == Stop()


@pytest.mark.parametrize("events", [NOTHING, TEXT])
def test_a_clients_own_error_is_told(events: tuple[Event, ...]) -> None:
    """Asking elsewhere would not change it."""
    wrong = Failure(Outcome.CLIENT_ERROR, Side.CLIENT, "")

    assert next_step(delivered(events), wrong, IN_TEXT, LEFT) == Fail(wrong)


@pytest.mark.parametrize("events", [NOTHING, TEXT])
def test_with_no_attempt_left_the_last_failure_is_told(events: tuple[Event, ...]) -> None:
    """However it broke."""
    assert step_after(events, budget=SPENT) == Fail(FAULTS[Outcome.TRUNCATED])
