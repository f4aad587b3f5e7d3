"""When to stop sending requests to an upstream, and when to try it again.

Rules
-----
* *Closed* serves. It trips on so many failures in a row, or on a share of failures among enough results in a sliding
  window. Only a failure trips: a success may raise the number of results over the threshold, but never opens anything.
* *Open* refuses until its time is up: ``open_s`` doubled for every opening that has not been forgiven since, less a
  random part of it, at most ``open_max_s``; or what the upstream's Retry-After says, when that is longer.
* *Half-open* is one probe in flight, a real request. Its success closes the breaker, its failure opens it for twice
  as long, and an end that says nothing (cancelled, rate limited) frees it, so that the next request is the probe.
* Every attempt holds a permit and settles it exactly once, as success, failure, trip or neutral. A neutral end counts
  nowhere: a client's hang-up is no evidence about an upstream.
* The panic rule lets a *forced* attempt through whatever the state, when a route would have nothing left. Its success
  closes the breaker (the upstream plainly works), its failure teaches nothing that is not known already.
* A permit counts only in the *generation* it was issued in; every opening and every closing starts a new one. A long
  answer that began before the trip neither closes nor re-opens anything when it ends minutes later. Going half-open
  starts none, for a forced attempt begun since the opening is as good a witness as the probe.
* After recovery the upstream's weight climbs from a tenth to one over its first successes, or over one window when
  traffic is thin. Past openings are forgiven one at a time, each by a whole window without a failure that ends with a
  success; so an upstream that flaps stays away longer each time, although its probes succeed.

How it works
------------
pybreaker's ``CircuitBreaker`` holds the state, tells its listeners of transitions and keeps its counters in a storage.
It is driven through ``open()``, ``half_open()`` and ``close()`` only. Its ``call()`` and ``calling()`` are never used:
they take a client's cancellation for a failure, admit any number of trials while half-open, count only failures in a
row, take an excluded exception for a success, and read the wall clock. Consecutive failures and successes since the
recovery live in the storage, where pybreaker resets them with the transitions. All else (window, timer, probe,
generations) is ours, and gets the time and the random draw as arguments.

What is ugly
------------
* pybreaker's ``open()`` reads the wall clock to say when it opened. The storage drops that.
* pybreaker tells listeners first and its storage second, so the state is mirrored here, by a listener of our own. The
  mirror is also what keeps the path of a healthy request free of pybreaker's properties.
* ``repr()`` has no clock: the time left is as of the last time the breaker was asked.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Literal, cast

import msgspec
import pybreaker

State = Literal["closed", "open", "half-open"]
Listener = Callable[[str, str, str], None]

WINDOW_RESULTS = 512  # the window holds the newest so many results of its time: busy upstreams are judged on less of it
RETRY_AFTER_MAX_S = 3600.0  # an upstream that asks for more is still probed once an hour
EXPONENT_MAX = 64  # openings not yet forgiven; with sensible times open_max_s is reached long before
JITTER = 0.25  # an opening is shortened by up to this share, so that daemons that failed together do not probe together
RECHECK_S = 1.0  # while a probe is in flight nobody knows how long it takes; ask again after this
WEIGHT_MIN = 0.1


class PermitSettledTwice(RuntimeError):
    """An attempt told the breaker its end a second time: a bug in the caller, never an upstream's fault."""


class NotAdmitted(pybreaker.CircuitBreakerError):
    """``begin()`` without ``forced`` while nothing is admissible; another attempt took the probe since the plan."""


class BreakerPolicy(msgspec.Struct, frozen=True):
    """When to open and for how long. Raises ValueError for values that could never trip or never end."""

    failures: int = 3  # in a row
    ratio: float = 0.5  # share of failures among the results of the window ...
    min_requests: int = 5  # ... once there are so many
    window_s: float = 300.0
    open_s: float = 15.0  # the first opening; doubled by every further one
    open_max_s: float = 600.0
    slow_start_successes: int = 3  # after recovery, until the full weight

    def __post_init__(self) -> None:
        demands = (
            (self.failures >= 1, "failures must be at least 1"),
            (0 < self.ratio <= 1, "ratio must be above 0 and at most 1"),
            (1 <= self.min_requests <= WINDOW_RESULTS, f"min_requests must be from 1 to {WINDOW_RESULTS}"),
            (self.window_s > 0, "window must be above 0"),
            (0 < self.open_s <= self.open_max_s < math.inf, "open must be above 0 and at most open_max"),
            (self.slow_start_successes >= 1, "slow_start_successes must be at least 1"),
        )
        wrong = [text for fine, text in demands if not fine]
        if wrong:
            raise ValueError("; ".join(wrong))


class BreakerSnapshot(msgspec.Struct, frozen=True):
    """What outlives a restart. ``remaining_s`` is a duration, so it means the same on any clock.

    A probe in flight is saved as an opening whose time is up: its answer died with the process.
    """

    open: bool
    remaining_s: float
    exponent: int


class Permit(msgspec.Struct, eq=False, gc=False):
    """One attempt's leave to go. ``begin()`` makes it; exactly one of the four ends settles it."""

    generation: int
    probe: bool = False
    settled: bool = False


class _Counters(pybreaker.CircuitBreakerStorage):
    """pybreaker's storage in plain attributes: failures in a row, and successes since the recovery."""

    def __init__(self) -> None:
        super().__init__("memory")
        self.kept_state: str = pybreaker.STATE_CLOSED
        self.failures = 0
        self.successes = 0

    @property
    def state(self) -> str:
        return self.kept_state

    @state.setter
    def state(self, state: str) -> None:
        self.kept_state = state

    def increment_counter(self) -> None:
        self.failures += 1

    def reset_counter(self) -> None:
        self.failures = 0

    def increment_success_counter(self) -> None:
        self.successes += 1

    def reset_success_counter(self) -> None:
        self.successes = 0

    @property
    def counter(self) -> int:
        return self.failures

    @property
    def success_counter(self) -> int:
        return self.successes

    @property
    def opened_at(self) -> datetime | None:
        return None

    @opened_at.setter
    def opened_at(self, datetime: datetime) -> None:
        """Forget it: the wall clock jumps, and the opening's end is kept on the monotonic one."""


class _Announcer(pybreaker.CircuitBreakerListener):
    """Keeps the breaker's mirror of the state, then passes the transition on."""

    def __init__(self, breaker: Breaker, listener: Listener | None) -> None:
        self._breaker = breaker
        self._listener = listener

    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,  # noqa: ARG002 - pybreaker's signature
        old_state: pybreaker.CircuitBreakerState | None,
        new_state: pybreaker.CircuitBreakerState,
    ) -> None:
        self._breaker.mirror(cast("State", new_state.name))
        if self._listener is not None and old_state is not None:
            self._listener(self._breaker.name, old_state.name, new_state.name)


class Breaker:
    """The breaker of one upstream, or of what a whole provider shares.

    ``now`` is monotonic seconds, never falling; ``draw`` a random number in [0, 1). ``listener(name, from, to)`` hears
    every transition, after the breaker has made it; it must not raise. Not safe across threads, and need not be.
    """

    __slots__ = (
        "_asked_at",
        "_counters",
        "_exponent",
        "_failed",
        "_generation",
        "_good_since",
        "_machine",
        "_policy",
        "_recovering",
        "_reopens_at",
        "_state",
        "_times",
        "name",
    )

    def __init__(self, name: str, policy: BreakerPolicy, listener: Listener | None = None) -> None:
        self.name = name
        self._policy = policy
        self._counters = _Counters()
        self._machine = pybreaker.CircuitBreaker(
            name=name, fail_max=policy.failures, state_storage=self._counters, listeners=[_Announcer(self, listener)]
        )
        self._state: State = "closed"
        self._generation = 0
        self._reopens_at = 0.0
        self._exponent = 0  # the next opening lasts open_s doubled so many times
        self._recovering = False  # a slow start to finish, or openings to forgive
        self._good_since = 0.0  # while recovering: since when there was no failure, or no opening was forgiven
        self._times: deque[float] = deque(maxlen=WINDOW_RESULTS)  # of the results in the window, and, side by side,
        self._failed: deque[bool] = deque(maxlen=WINDOW_RESULTS)  # which of them were failures
        self._asked_at = 0.0

    # --- questions --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Open stays open when its time is up: only a request, by being the probe, makes it half-open."""
        return self._state

    def allows(self, now: float) -> bool:
        """True if a request may begin: closed, or open and it would be the probe."""
        if self._state == "closed":
            return True
        self._asked_at = now
        return self._state == "open" and now >= self._reopens_at

    def reopens_in_s(self, now: float) -> float:
        """Seconds until a request may begin, 0 if it may now; ``RECHECK_S`` while the answer hangs on a probe."""
        if self._state == "closed":
            return 0.0
        if self._state == "half-open":
            return RECHECK_S
        return max(0.0, self._reopens_at - now)

    def weight(self, now: float) -> float:
        """Share of its fair traffic that an upstream should get: 1, less while it has just recovered."""
        if self._state != "closed":
            return WEIGHT_MIN
        if not self._recovering:
            return 1.0
        by_successes = self._counters.successes / self._policy.slow_start_successes
        by_time = (now - self._good_since) / self._policy.window_s
        return min(1.0, WEIGHT_MIN + (1.0 - WEIGHT_MIN) * max(by_successes, by_time))

    # --- an attempt -------------------------------------------------------------------------------------------------

    def begin(self, now: float, *, forced: bool = False) -> Permit:
        """Admit an attempt; it is the probe if an opening's time is up. Raises NotAdmitted where not allowed.

        ``forced`` is the panic rule: nothing else is left, so it goes through whatever the state.
        """
        if self._state == "closed":
            return Permit(self._generation)
        if self.allows(now):
            self._machine.half_open()
            return Permit(self._generation, probe=True)
        if not forced:
            raise NotAdmitted(repr(self))
        return Permit(self._generation)

    def success(self, permit: Permit, now: float) -> None:
        if not self._settle(permit):
            return
        if self._state != "closed":
            self._close(now)
            return
        self._times.append(now)
        self._failed.append(False)
        self._counters.failures = 0
        if self._recovering:
            self._forgive(now)

    def failure(self, permit: Permit, now: float, draw: float, retry_after_s: float | None = None) -> None:
        if not self._settle(permit):
            return
        if permit.probe or (self._state == "closed" and self._count_failure(now)):
            self._open(now, self._backoff_s(draw), retry_after_s)

    def trip(self, permit: Permit, now: float, draw: float, retry_after_s: float | None = None) -> None:
        """Open at once and for long: a refused key does not heal in seconds. The backoff stays as it was."""
        if not self._settle(permit):
            return
        duration_s = _jittered_s(self._policy.open_max_s, draw)
        if self._state == "open":
            self._reopens_at = max(self._reopens_at, now + _longer_s(duration_s, retry_after_s))
        else:
            self._open(now, duration_s, retry_after_s)

    def neutral(self, permit: Permit, now: float) -> None:
        """The end says nothing of the upstream. A probe that ends so leaves its place to the next request."""
        if self._settle(permit) and permit.probe:
            self._asked_at = now
            self._machine.open()

    # --- restarts ---------------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> BreakerSnapshot:
        remaining_s = self.reopens_in_s(now) if self._state == "open" else 0.0
        return BreakerSnapshot(self._state != "closed", remaining_s, self._exponent)

    def restore(self, snapshot: BreakerSnapshot, now: float, *, elapsed_s: float = 0.0) -> None:
        """Take up where a snapshot left off, in a breaker that has admitted nothing yet.

        ``elapsed_s`` is how long the process was away, where that is known. The listener hears of an opening.
        """
        self._exponent = max(0, min(snapshot.exponent, EXPONENT_MAX))
        self._recovering = self._exponent > 0
        self._good_since = now
        self._counters.successes = self._policy.slow_start_successes
        if snapshot.open:
            longest_s = max(self._policy.open_max_s, RETRY_AFTER_MAX_S)
            self._open(now, min(max(0.0, snapshot.remaining_s - elapsed_s), longest_s), None)

    # --- the machine ------------------------------------------------------------------------------------------------

    def mirror(self, state: State) -> None:
        """Called by the listener on pybreaker's bus, nobody else."""
        self._state = state

    def _settle(self, permit: Permit) -> bool:
        """True if the permit's end counts: nothing opened or closed since it was issued."""
        if permit.settled:
            raise PermitSettledTwice(repr(self))
        permit.settled = True
        return permit.generation == self._generation

    def _count_failure(self, now: float) -> bool:
        """Record it; True if that trips. The cost is one pass over the window, and only failures pay it."""
        self._times.append(now)
        self._failed.append(True)
        self._counters.failures += 1
        self._good_since = now
        oldest = now - self._policy.window_s
        while self._times[0] < oldest:
            self._times.popleft()
            self._failed.popleft()
        if self._counters.failures >= self._policy.failures:
            return True
        results = len(self._failed)
        return results >= self._policy.min_requests and self._failed.count(True) / results >= self._policy.ratio

    def _backoff_s(self, draw: float) -> float:
        """The length of this opening; the next one will be twice as long, up to the longest."""
        full_s = min(self._policy.open_s * 2**self._exponent, self._policy.open_max_s)
        if full_s < self._policy.open_max_s:
            self._exponent = min(self._exponent + 1, EXPONENT_MAX)
        return _jittered_s(full_s, draw)

    def _open(self, now: float, duration_s: float, retry_after_s: float | None) -> None:
        self._asked_at = now
        self._reopens_at = now + _longer_s(duration_s, retry_after_s)
        self._generation += 1
        self._machine.open()

    def _close(self, now: float) -> None:
        self._generation += 1
        self._times.clear()
        self._failed.clear()
        self._recovering = True
        self._good_since = now
        self._machine.close()

    def _forgive(self, now: float) -> None:
        """After a success: one more step of the slow start, and one past opening less for every good window."""
        self._counters.successes += 1
        windows = int((now - self._good_since) // self._policy.window_s)
        if windows > 0:
            self._exponent = max(0, self._exponent - windows)
            self._good_since += windows * self._policy.window_s
            self._counters.successes = max(self._counters.successes, self._policy.slow_start_successes)
        self._recovering = self._exponent > 0 or self._counters.successes < self._policy.slow_start_successes

    def __repr__(self) -> str:
        if self._state == "open":
            doing = f"open {self.reopens_in_s(self._asked_at):.1f}s left"
        else:
            doing = "half-open, probe in flight" if self._state == "half-open" else self._state
        return f"<Breaker {self.name} {doing}, {self._failed.count(True)}/{len(self._failed)} failed>"


def _jittered_s(duration_s: float, draw: float) -> float:
    return duration_s * (1.0 - JITTER * draw)


def _longer_s(duration_s: float, retry_after_s: float | None) -> float:
    if retry_after_s is None:
        return duration_s
    return max(duration_s, min(retry_after_s, RETRY_AFTER_MAX_S))
