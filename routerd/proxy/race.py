"""A hedged first token: two attempts at the same turn, of which the first with content goes on.

Theory of operation
-------------------
Each attempt runs in a task of its own. Nothing of either reaches the client before its first content, and with that
content it claims the race: in the same step of the loop every other task is cancelled, so two answers can never mix.
A cancelled one settles like any attempt that was called off. One that fails without having claimed leaves the race; the
race is over when somebody's answer is whole, or when nobody is left.

A task that is cancelled before its first step never runs at all. So runners take what they need inside their task, and
nothing that is taken can be left behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from routerd.canonical import Failure, Outcome, Side
from routerd.proxy.attempt import Attempt

# Who was asked first had the time that is usual for it, and more. That it was slower still counts as a failure: behind
# one that hangs, every turn would otherwise wait for its hedge.
OUTRUN_FIRST = Failure(
    Outcome.CANCELLED, Side.ROUTER, "another upstream answered first", code="outrun", cause=Outcome.UNAVAILABLE
)
OUTRUN_HEDGE = Failure(Outcome.CANCELLED, Side.ROUTER, "the one asked before answered first", code="outrun")

Ended = tuple[Attempt, Failure | None]


class Race:
    """Use it with ``async with``: whoever still runs at the end is called off, and waited for."""

    __slots__ = ("_news", "_running", "_winner")

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Ended | None]] = set()
        self._winner: asyncio.Task[Any] | None = None
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def enter(self, runner: Coroutine[Any, Any, Ended | None]) -> None:
        """Start an attempt. It may come to nothing: None."""
        task = asyncio.create_task(runner)
        task.add_done_callback(self._ended)
        self._running.add(task)

    def claim(self) -> None:
        """Called in a runner's task: its attempt has content."""
        if self._winner is None:
            self._winner = asyncio.current_task()
            for task in self._running:
                if task is not self._winner:
                    task.cancel()
            self._news.set()

    @property
    def lost(self) -> bool:
        """Asked in a runner's task: another one has claimed the race."""
        return self._winner is not None and self._winner is not asyncio.current_task()

    async def quiet(self, for_s: float) -> bool:
        """True if nobody has content for so long, and nobody has given up."""
        try:
            async with asyncio.timeout(for_s):
                await self._news.wait()
        except TimeoutError:
            return True
        return False

    async def result(self, passed_over: Callable[[Attempt, Failure], None]) -> Ended | None:
        """The answer, or the failure of whoever failed last; ``passed_over`` is told of those before.

        None if it has come to nothing.
        """
        last: Ended | None = None
        while self._running:
            done, self._running = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                ended = None if task.cancelled() else task.result()
                if ended is None:
                    continue
                if last is not None and last[1] is not None:
                    passed_over(last[0], last[1])
                last = ended
                if ended[1] is None or ended[1].outcome is Outcome.CANCELLED:
                    return ended
        return last

    def _ended(self, _task: asyncio.Task[Ended | None]) -> None:
        self._news.set()
