"""Fakes that implement the real seams: here an upstream over real sockets, driven by a script.

What it can say and do is described by ``Turn``, ``Answer`` and ``Fault`` in ``routerd.proxy.simulated``. This adds what
tests ask for: the requests as they came, and waiting for something to happen instead of sleeping.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest

from routerd.proxy.simulated import Call, Received, Script, SimulatedServer, Step, Turn

WAIT_S = 10.0


def call(name: str, **arguments: Any) -> Call:
    """A tool call with these arguments."""
    return Call(name, json.dumps(arguments))


class _Recording(Script):
    def __init__(self, *steps: Step) -> None:
        super().__init__(*steps)
        self.requests: list[Received] = []

    def play(self, request: Received) -> Turn:
        self.requests.append(request)
        return super().play(request)


class ScriptedUpstream:
    """An upstream that plays turns, one for each chat request; the last one repeats. Use it with ``async with``.

    A step may be a function of the request instead of a turn. The model's name comes back as it was asked for.
    """

    server: ClassVar[type[SimulatedServer]] = SimulatedServer
    dialect: ClassVar[str] = "chat"

    def __init__(
        self, *steps: Step, model_suffix: str = "", models: tuple[str, ...] = ("model",), wait_s: float = WAIT_S
    ) -> None:
        self._wait_s = wait_s
        self._script = _Recording(*steps)
        self._changed = asyncio.Event()
        self._server = self.server(self._script, model_suffix=model_suffix, models=models, on_change=self._changed.set)

    def __repr__(self) -> str:
        return f"<ScriptedUpstream {self._server!r}, {self.open_connections} connections>"

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._server.close()

    @property
    def base_url(self) -> str:
        return self._server.base_url

    @property
    def requests(self) -> list[Received]:
        """The chat requests so far, oldest first."""
        return self._script.requests

    @property
    def answering(self) -> int:
        """Requests being answered now."""
        return self._server.answering

    @property
    def open_connections(self) -> int:
        return self._server.open_connections

    async def requested(self, count: int) -> list[Received]:
        """Wait until so many chat requests have arrived, and return them all."""
        await self.until(lambda: len(self.requests) >= count)
        return self.requests

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        await self.until(lambda: not self.answering)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something about this upstream is true; fail after ``wait_s`` seconds."""
        try:
            async with asyncio.timeout(self._wait_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"waited in vain: {self!r}") from None


Upstreams = Callable[..., Awaitable[ScriptedUpstream]]


@pytest.fixture
async def upstreams() -> AsyncIterator[Upstreams]:
    """Start upstreams that are closed after the test; called like ``ScriptedUpstream``, and awaited."""
    async with AsyncExitStack() as stack:

        async def start(
            *steps: Step, kind: type[ScriptedUpstream] = ScriptedUpstream, **options: Any
        ) -> ScriptedUpstream:
            return await stack.enter_async_context(kind(*steps, **options))

        yield start
