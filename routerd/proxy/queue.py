"""Those who wait for capacity on one route, in the order they came.

Everybody is woken when the own time has come, in the order of arrival where several have the same: they may wait for
different things (an image for the one upstream that sees, a text for another), so nobody is held by what those before
him need. When something is given back before its time, only the head is woken, so that a crowd does not run for one
place. Whoever cannot go then waits again in the old place. There is no polling.

Nobody is held by one in front who needs more. But where small requests keep taking what a large one waits for, it would
wait for ever: so whoever finds nothing left when the own time has come stakes a *claim*, and then those who came later
stand back from what it waits for.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from operator import attrgetter

import msgspec

from routerd.canonical import Head

SAME_TIME_S = 0.02  # whose times are this close wait for the same thing, and go in the order of arrival


class Waiting(msgspec.Struct, frozen=True):
    """Those in line, as others see them. ``reason``: what the first of them waits for."""

    count: int
    reason: str
    next_try_in_s: float
    oldest_rank: float


class _Waiter:
    __slots__ = ("claim", "due", "rank", "reason", "woken")

    def __init__(
        self, rank: float, due: float, reason: str, woken: asyncio.Future[None], claim: Head | None = None
    ) -> None:
        self.claim = claim
        self.rank = rank
        self.due = due
        self.reason = reason
        self.woken = woken

    def __lt__(self, other: _Waiter) -> bool:
        return self.due < other.due

    def wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


class WaitingLine:
    """Waiting exchanges of one route. ``rank``: when the exchange arrived."""

    __slots__ = ("_timer", "_waiters")

    def __init__(self) -> None:
        self._waiters: list[_Waiter] = []  # a heap: the one whose time comes first is on top
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiters)

    def waiting(self) -> Waiting | None:
        """Who is in line; None: nobody."""
        if not self._waiters:
            return None
        head = self._head()
        left_s = head.due - time.monotonic()
        return Waiting(len(self._waiters), head.reason, max(0.0, left_s), head.rank)

    def claim(self, rank: float) -> Head | None:
        """What the first of those waits for who came before ``rank`` and were overtaken; None: there is none."""
        claims = [waiter for waiter in self._waiters if waiter.claim is not None and waiter.rank < rank]
        return min(claims, key=attrgetter("rank")).claim if claims else None

    async def wait(self, rank: float, wait_s: float, reason: str = "", claim: Head | None = None) -> None:
        """Return when it is worth trying again: at the latest when ``wait_s`` is over.

        ``claim``: the request of one that was overtaken.
        """
        woken = asyncio.get_running_loop().create_future()
        waiter = _Waiter(rank, time.monotonic() + wait_s, reason, woken, claim)
        heapq.heappush(self._waiters, waiter)
        self._arm()
        try:
            await waiter.woken
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                heapq.heapify(self._waiters)
            self._arm()

    def wake(self) -> None:
        """Something may be free: let the head try."""
        if self._waiters:
            head = self._head()
            self._waiters.remove(head)
            heapq.heapify(self._waiters)
            head.wake()
            self._arm()

    def _head(self) -> _Waiter:
        return min(self._waiters, key=attrgetter("rank"))

    def _wake_due(self) -> None:
        same_until = max(time.monotonic(), self._waiters[0].due) + SAME_TIME_S
        due = []
        while self._waiters and self._waiters[0].due <= same_until:
            due.append(heapq.heappop(self._waiters))
        for waiter in sorted(due, key=attrgetter("rank")):
            waiter.wake()
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiters:
            wait_s = max(0.0, self._waiters[0].due - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._wake_due)
