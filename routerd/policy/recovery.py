"""What to do after an attempt that did not succeed.

Theory of operation
-------------------
``next_step`` looks at four things: what the client already has (the transcript), how the attempt ended (the failure),
what is left of the exchange's budget, and which providers refused the request itself. It answers with one step; the
caller carries it out. The rules, in order:

1. The client is gone: nothing is left to do.
2. The failure is nobody's to retry (the client's own error, or a second provider agreeing that it is).
3. Text or a call is already with the client: what follows would be said twice, so the stream fails in its own protocol.
4. The budget (attempts, time) is spent: fail.
5. Otherwise: try again, elsewhere first.
"""

from __future__ import annotations

import msgspec

from routerd.canonical import Failure, Outcome
from routerd.policy.classify import verdict
from routerd.policy.transcript import Transcript


class Budget(msgspec.Struct, frozen=True):
    """What an exchange may still spend."""

    attempts: int
    time_s: float


class Retry(msgspec.Struct, frozen=True):
    """Try again; nothing of the failed attempt shows."""


class Fail(msgspec.Struct, frozen=True):
    """Tell the client."""

    failure: Failure


class Stop(msgspec.Struct, frozen=True):
    """Nobody is listening."""


Step = Retry | Fail | Stop


def next_step(delivered: Transcript, failure: Failure, budget: Budget) -> Step:
    """One decision; see the rules above."""
    if failure.outcome is Outcome.CANCELLED:
        return Stop()
    if verdict(failure).retry == "no" or delivered.committed:
        return Fail(failure)
    if budget.attempts <= 0 or budget.time_s <= 0:
        return Fail(failure)
    return Retry()
