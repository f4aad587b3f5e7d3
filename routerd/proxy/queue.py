"""Those who wait for capacity on one route, in the order they came.

Only the head of the queue is ever woken: when its own time has come, or when something was given back. If it can then
go, it wakes the next; if not, it waits again in its old place. So there is no polling, no herd, and nobody overtakes.
"""

from __future__ import annotations

import asyncio
import heapq

import msgspec


class Waiting(msgspec.Struct, frozen=True):
    """Those in line, as others see them. ``reason``: what the first of them waits for."""

    count: int
    reason: str
    next_try_in_s: float
    oldest_rank: float


class _Waiter:
    __slots__ = ("due", "rank", "reason", "woken")

    def __init__(self, rank: float, due: float, reason: str, woken: asyncio.Future[None]) -> None:
        self.rank = rank
        self.due = due
        self.reason = reason
        self.woken = woken

    def __lt__(self, other: _Waiter) -> bool:
        return self.rank < other.rank


class WaitingLine:
    """Waiting exchanges of one route. ``rank``: when the exchange arrived."""

    __slots__ = ("_timer", "_waiters")

    def __init__(self) -> None:
        self._waiters: list[_Waiter] = []
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiters)

    def waiting(self) -> Waiting | None:
        """Who is in line; None: nobody."""
        if not self._waiters:
            return None
        head = self._waiters[0]
        left_s = head.due - asyncio.get_running_loop().time()
        return Waiting(len(self._waiters), head.reason, max(0.0, left_s), head.rank)

    async def wait(self, rank: float, wait_s: float, reason: str = "") -> None:
        """Return when it is worth trying again: at the latest when, as the head of the line, ``wait_s`` is over."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(rank, loop.time() + wait_s, reason, loop.create_future())
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
            waiter = heapq.heappop(self._waiters)
            if not waiter.woken.done():
                waiter.woken.set_result(None)
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiters:
            self._timer = asyncio.get_running_loop().call_at(self._waiters[0].due, self.wake)
