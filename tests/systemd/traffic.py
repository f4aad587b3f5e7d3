"""What goes through a daemon while it is restarted: long streams, and short requests without end.

Clients repeat nothing: every refused connection, every error status and every answer that is not whole is a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator

import aiohttp
import msgspec

from routerd.proxy.simulated import Answer, Received, Turn
from tests.proxy.wire import CHAT, DONE, streamed
from tests.rig import HELLO

PIECES = 40
SLOW_TEXT = " ".join(f"word{number:03}" for number in range(PIECES))
SLOW = "slow"  # a request that mentions this is answered piece by piece
WAIT_S = 60.0


def turn(request: Received) -> Turn:
    """The upstream's part: streams that take their time, and short answers at once."""
    if SLOW.encode() in request.raw:
        return Turn(Answer(text=SLOW_TEXT, piece=8, pace_s=0.075))
    return Turn(Answer(text="A short answer."))


class Tally(msgspec.Struct):
    """What became of the requests. ``longest_s``: the longest wait for an answer."""

    done: int = 0
    longest_s: float = 0.0
    failures: list[str] = msgspec.field(default_factory=list)

    def count(self, began_at: float) -> None:
        """One more request is over, which began at this monotonic time."""
        self.done += 1
        self.longest_s = max(self.longest_s, time.monotonic() - began_at)

    def __str__(self) -> str:
        return f"{self.done} requests, {len(self.failures)} failed, the slowest took {self.longest_s:.2f} s"


class Streams:
    """So many streams that are open at any time: where one ends, the next begins."""

    def __init__(self, url: str) -> None:
        self.tally = Tally()
        self._url = url
        self._began: set[int] = set()
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, count: int) -> None:
        """Open them, and wait until each has got content."""
        self._tasks = [asyncio.ensure_future(self._keep_open(number)) for number in range(count)]
        async with asyncio.timeout(WAIT_S):
            while len(self._began) < count:  # noqa: ASYNC110 - fifty at once need no event each
                await asyncio.sleep(0.01)

    async def ended(self) -> Tally:
        """Open no more, and wait for the last byte of each."""
        self._over = True
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*self._tasks)
        return self.tally

    async def _keep_open(self, number: int) -> None:
        while not self._over:
            began_at = time.monotonic()
            await self._one(number)
            self.tally.count(began_at)

    async def _one(self, number: int) -> None:
        body = streamed(messages=[{"role": "user", "content": SLOW}])
        data = b""
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.post(self._url + CHAT, json=body) as reply,
            ):
                async for piece in reply.content.iter_any():
                    data += piece
                    if number not in self._began and b'"content"' in data:
                        self._began.add(number)
            self._check(reply.status, data)
        except aiohttp.ClientError as error:
            self.tally.failures.append(f"{error!r} after {len(data)} bytes")

    def _check(self, status: int, data: bytes) -> None:
        events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]
        text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        if status != 200 or text != SLOW_TEXT or not data.endswith(DONE):
            self.tally.failures.append(f"{status}: {data[-300:]!r}")


@contextlib.asynccontextmanager
async def steady_load(url: str, *, clients: int = 10, pause_s: float = 0.05) -> AsyncIterator[Tally]:
    """Short requests while the context lasts: half of the clients keep their connection, half make a new one each."""
    tally = Tally()
    stop = asyncio.Event()
    tasks = [asyncio.ensure_future(_client(url, tally, stop, pause_s, keep=bool(n % 2))) for n in range(clients)]
    try:
        yield tally
    finally:
        stop.set()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*tasks)


async def _client(url: str, tally: Tally, stop: asyncio.Event, pause_s: float, *, keep: bool) -> None:
    connector = aiohttp.TCPConnector(force_close=not keep)
    async with aiohttp.ClientSession(connector=connector) as session:
        while not stop.is_set():
            await _ask(session, url, tally)
            await asyncio.sleep(pause_s)


async def _ask(session: aiohttp.ClientSession, url: str, tally: Tally) -> None:
    began_at = time.monotonic()
    try:
        async with session.post(url + CHAT, json=HELLO) as reply:
            body = await reply.read()
        if reply.status != 200 or b"A short answer." not in body:
            tally.failures.append(f"{reply.status}: {body[:300]!r}")
    except aiohttp.ClientError as error:
        tally.failures.append(repr(error))
    tally.count(began_at)


class Idlers:
    """Connections that have had an answer each and are kept for the next request."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def ask(self, count: int) -> Tally:
        """So many requests at once."""
        tally = Tally()
        await asyncio.gather(*(_ask(self._session, self._url, tally) for _ in range(count)))
        return tally

    async def close(self) -> None:
        await self._session.close()
