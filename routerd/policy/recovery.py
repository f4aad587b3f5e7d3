"""What to do after an attempt that did not succeed.

Theory of operation
-------------------
``next_step`` looks at what the client already has (the transcript), how the attempt ended and where (the failure, and
whether a tool call had begun), and what is left of the exchange's budget. It answers with one step; the caller carries
it out. The rules, in order:

1. The client is gone: nothing is left to do.
2. The failure is nobody's to retry (the client's own error, or a second provider agreeing that it is), or the attempts
   are spent: fail. Time spent waiting does not count here: it limits waiting, never going elsewhere at once.
3. Nothing of weight is with the client, at most reasoning: try again, elsewhere first. Nothing of it shows.
4. Calls are with the client: whatever came next would be acted upon twice. Or what it has cannot be put together from
   pieces (several choices at once, log probabilities). Fail.
5. Text is with the client, and the break was inside a tool call: make the unchanged request again, hold it, and send
   its calls alone; the text already sent stands for their preamble.
6. Text is with the client, and the break was in the text (or a re-run could not be joined to it): go on with it.
   A text that must be JSON is re-run first, for going on with half a document invites a second beginning; and if it is
   gone on with, the rest is held and checked.

Failing in mid-stream is never a clean end: an agent would take half an answer for a whole one.
"""

from __future__ import annotations

import msgspec

from routerd.canonical import Failure, Outcome
from routerd.policy.classify import verdict
from routerd.policy.transcript import Transcript


class Budget(msgspec.Struct, frozen=True):
    """What an exchange may still spend."""

    attempts: int


class Break(msgspec.Struct, frozen=True):
    """Where the answer that the client has a part of broke off, and what is known of its kind.

    ``in_call``: the text was whole and calls had begun. ``diverged``: a re-run was of no use. ``structured``: the text
    must be JSON. ``joinable``: it may be put together from pieces.
    """

    in_call: bool = False
    diverged: bool = False
    structured: bool = False
    joinable: bool = True


class Retry(msgspec.Struct, frozen=True):
    """Try again; nothing of the failed attempt shows."""


class Rerun(msgspec.Struct, frozen=True):
    """Make the same request again, hold the answer, and send what the client does not have yet."""


class Continue(msgspec.Struct, frozen=True):
    """Ask for the rest of the text. ``checked``: hold it until the whole is seen to be JSON."""

    checked: bool = False


class Fail(msgspec.Struct, frozen=True):
    """Tell the client."""

    failure: Failure


class Stop(msgspec.Struct, frozen=True):
    """Nobody is listening."""


Step = Retry | Rerun | Continue | Fail | Stop


def next_step(delivered: Transcript, failure: Failure, broke: Break, budget: Budget) -> Step:
    """One decision; see the rules above."""
    if failure.outcome is Outcome.CANCELLED:
        return Stop()
    if verdict(failure).retry == "no" or budget.attempts <= 0:
        return Fail(failure)
    if not delivered.committed:
        return Retry()
    if delivered.calls or delivered.text is None or not broke.joinable:
        return Fail(failure)
    if (broke.structured or broke.in_call) and not broke.diverged:
        return Rerun()
    return Continue(checked=broke.structured)
