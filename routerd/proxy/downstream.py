"""The client's side of one exchange: status, frames, keep-alives and honest endings.

Rules
-----
* The status goes out as late as possible: with the first frame that may go, or, for a stream, with the first
  keep-alive. Until then a failure can still be a proper HTTP error.
* One write per batch of frames. A keep-alive is written only between writes, so it can never tear a frame.
* Once the status is out, a failure is an error in the client's own protocol followed by a torn connection. Nothing that
  looks like a proper end is ever sent for an answer that is not whole.
* Writing to a client that does not read blocks after ``WRITE_BUFFER_BYTES``; the caller's time limit ends that, and
  ``blocked`` tells it that the client, not the upstream, was the slow one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from routerd.canonical import End, Event, Failure, Frame, Outcome, Side, Start
from routerd.dialects import Dialect, Encoder, Stamp
from routerd.policy.transcript import Transcript
from routerd.proxy.chain import Link

STREAM_TYPE = "text/event-stream"
SERVER = "routerd"  # without this aiohttp names itself and its version
KEEPALIVE_WRITE_S = 10.0  # a client that takes no keep-alive for this long is left to the exchange's own limits
# What the text of an error in mid-stream begins with, unless it is about the request itself. Hermes asks again at once
# on a "network error", and not after seconds; "connection lost" would do the same, but with a long history Hermes takes
# it for a full context window and throws half of its memory away (agent/error_classifier.py, 0.19.0).
ASK_AGAIN = "Network error: "
LAST_WRITE_S = 60.0  # the end of an answer, or a whole one, must be taken within this


class ClientGone(Exception):
    """The client hung up, or stopped reading for too long."""


GONE = Failure(Outcome.CANCELLED, Side.CLIENT, "the client hung up")


class Sink(Protocol):
    """Where an attempt's frames go."""

    blocked: bool  # the other end takes nothing at the moment

    @property
    def committed(self) -> bool:
        """True once something was sent that cannot be unsaid."""

    def begin_attempt(self, dialect: Dialect) -> None:
        """A new upstream's frames follow, in its own dialect."""

    async def send(self, frames: list[Frame]) -> None:
        """Take whole frames. Raises ``ClientGone``."""

    async def send_end_marker(self) -> None:
        """The answer is whole, but came without its terminal marker."""


class Collector:
    """Takes the frames of a request that does not stream: its answer is streamed upstream, and handed over whole."""

    __slots__ = ("blocked", "events")

    def __init__(self) -> None:
        self.blocked = False
        self.events: list[Event] = []

    @property
    def committed(self) -> bool:
        return False

    def begin_attempt(self, dialect: Dialect) -> None:  # noqa: ARG002 - events are the same in all
        self.events.clear()

    async def send(self, frames: list[Frame]) -> None:
        self.events += [event for frame in frames for event in frame.events]

    async def send_end_marker(self) -> None:
        self.events.append(End())


class Downstream:
    """One client being answered."""

    __slots__ = (
        "_clock",
        "_dialect",
        "_encoder",
        "_headers",
        "_keepalive",
        "_keepalive_s",
        "_last_write",
        "_link",
        "_raw",
        "_request",
        "_response",
        "_stamp",
        "_timer",
        "blocked",
        "first_content_at",
        "status",
        "transcript",
    )

    def __init__(
        self,
        request: web.Request,
        dialect: Dialect,
        stamp: Stamp,
        *,
        keepalive_s: float,
        clock: Callable[[], float],
        link: Link | None = None,
    ) -> None:
        """``link`` reads along if the answer is to be kept."""
        self._request = request
        self._dialect = dialect
        self._stamp = stamp
        self._keepalive_s = keepalive_s
        self._clock = clock
        self._link = link
        self._response: web.StreamResponse | None = None
        self._encoder: Encoder | None = None
        self._raw = True  # frames go on as they came; after a change of upstream in mid-answer they are encoded anew
        self._headers: dict[str, str] = {"Server": SERVER}
        self._last_write = clock()
        self._timer: asyncio.TimerHandle | None = None
        self._keepalive: asyncio.Task[None] | None = None
        self.transcript = Transcript()
        self.blocked = False
        self.status = 0
        self.first_content_at: float | None = None

    def describe(self, headers: Mapping[str, str]) -> None:
        """Headers for the answer, as far as they are known before its status goes out."""
        if self._response is None:
            self._headers.update(headers)

    @property
    def response(self) -> web.StreamResponse:
        """What aiohttp's handler returns. An exchange that never answered has lost its client: nobody sees this one."""
        return self._response or web.Response(status=499)

    @property
    def committed(self) -> bool:
        return self.transcript.committed

    @property
    def raw(self) -> bool:
        """True if what was sent of the last attempt is what came."""
        return self._raw

    # --- streams ----------------------------------------------------------------------------------------------------

    def begin_attempt(self, dialect: Dialect) -> None:
        """A new upstream's frames follow. They are encoded to fit if they are of another dialect than the client's, or
        if anything of another upstream's was sent.
        """
        self._raw = dialect.name == self._dialect.name and not self.transcript.begun

    async def send(self, frames: list[Frame]) -> None:
        """Send whole frames in one write. Raises ``ClientGone``."""
        if self._encoder is not None and self._encoder.opened:
            self._raw = False
        raws = [frame.raw for frame in frames] if self._raw else ()
        self._raw = bool(raws) and all(raws)  # once encoded anew it stays so: the encoder owes what it holds, usage
        if self._raw and self._dialect.follows:
            self._require_encoder().follow(frames)
        data = b"".join(raws) if self._raw else self._encode(frames)
        events = [event for frame in frames for event in frame.events]
        self.transcript.fold(events)
        if self.first_content_at is None and self.transcript.begun:
            self.first_content_at = self._clock()
        if data:
            if events:  # comments are passed on, but to most clients they are silence
                self._last_write = self._clock()
            await self._write(data)

    def _encode(self, frames: list[Frame]) -> bytes:
        """Frames of another upstream than the first, or changed ones, in our own words; but only one start."""
        events = [event for frame in frames for event in frame.events]
        encode = self._require_encoder(events).encode
        if self.transcript.start is not None:
            events = [event for event in events if type(event) is not Start]
        return b"".join([encode(event) for event in events])

    def _require_encoder(self, events: Sequence[Event] = ()) -> Encoder:
        """``events``: what is to be encoded, for the name of the model that says it."""
        if self._encoder is None:
            start = self.transcript.start
            if start is not None:  # go on under the name the answer began with
                self._stamp = msgspec.structs.replace(self._stamp, id=start.id, model=start.model)
            else:
                model = next((event.model for event in events if isinstance(event, Start)), "")
                self._stamp = msgspec.structs.replace(self._stamp, model=model or self._stamp.model)
            self._encoder = self._dialect.encoder(self._stamp)
        return self._encoder

    async def send_end_marker(self) -> None:
        """The terminal marker, where a whole answer came without one."""
        self.stop_keepalive()  # nothing may come behind it
        await self._write(self._require_encoder().encode(End()))

    async def _write(self, data: bytes) -> None:
        if self._link is not None:
            self._link.stream(data)
        response = self._response or await self._open()
        self.blocked = True
        try:
            await response.write(data)
        except ConnectionError as error:
            raise ClientGone from error
        self.blocked = False

    async def _open(self) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": STREAM_TYPE, "Cache-Control": "no-cache"})
        response.headers.update(self._headers)
        self._response = response
        self.status = response.status
        try:
            await response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGone from error
        return response

    async def end(self) -> None:
        """The answer is whole and all of it is sent."""
        self.stop_keepalive()
        limit = self._last_limit()
        try:
            response = self._response or await self._open()
            await response.write_eof()
        except ConnectionError as error:
            raise ClientGone from error
        finally:
            limit.cancel()

    def _last_limit(self) -> asyncio.TimerHandle:
        """Guards the last write of an answer, which no attempt's limit does; the caller cancels it."""
        return asyncio.get_running_loop().call_later(LAST_WRITE_S, self.drop)

    # --- keep-alives ------------------------------------------------------------------------------------------------

    def start_keepalive(self) -> None:
        """From now on never be silent for longer than ``keepalive_s``."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._keepalive_s, self._on_silence)

    def _on_silence(self) -> None:
        """One lazy timer per exchange: it looks when it fires, so that a write costs it nothing."""
        quiet_s = self._clock() - self._last_write
        due_s = self._keepalive_s - quiet_s
        if due_s <= 0:
            due_s = self._keepalive_s
            if not self.blocked and (self._keepalive is None or self._keepalive.done()):
                self._keepalive = asyncio.ensure_future(self._write_keepalive())
        self._timer = asyncio.get_running_loop().call_later(due_s, self._on_silence)

    async def _write_keepalive(self) -> None:
        """Does not touch ``blocked``: a client that is slow to take this is not why an upstream is late."""
        if self.transcript.ended:  # the end came between the timer and this
            return
        self._last_write = self._clock()
        try:
            async with asyncio.timeout(KEEPALIVE_WRITE_S):
                response = self._response or await self._open()
                await response.write(self._require_encoder().keepalive())
        except (ClientGone, ConnectionError, TimeoutError):
            pass  # the exchange's own write, or aiohttp's cancellation, reports a lost client

    def stop_keepalive(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._keepalive is not None:
            self._keepalive.cancel()
            self._keepalive = None

    # --- whole answers and failures ---------------------------------------------------------------------------------

    async def send_body(self, body: bytes, *, status: int = 200) -> None:
        """A whole JSON answer."""
        self.stop_keepalive()
        self.status = status
        if self._link is not None and status == 200:
            self._link.answer(body)
        response = web.Response(body=body, status=status, content_type="application/json", headers=self._headers)
        self._response = response
        limit = self._last_limit()
        try:
            await response.prepare(self._request)
            await response.write_eof()
        except ConnectionError as error:
            raise ClientGone from error
        finally:
            limit.cancel()

    async def fail(self, failure: Failure) -> None:
        """Say so, in the client's dialect: as an HTTP error if the status is still ours to choose, else in-protocol."""
        self.stop_keepalive()
        if self._response is None:
            if failure.retry_after_s is not None:
                self._headers["Retry-After"] = str(max(1, round(failure.retry_after_s + 0.5)))
            await self.send_body(self._dialect.encode_error(failure), status=failure.status or 503)
            return
        if failure.side is not Side.CLIENT:
            failure = msgspec.structs.replace(failure, detail=ASK_AGAIN + failure.detail)
        limit = self._last_limit()
        try:
            await self._write(self._require_encoder().error(failure))
        finally:
            limit.cancel()
        self.tear()

    def tear(self) -> None:
        """End without an end: the client's HTTP library must see that the answer is not whole."""
        self.stop_keepalive()
        transport = self._request.transport
        if transport is not None:
            transport.close()

    def drop(self) -> None:
        """Let go of a client that does not read, and of what it has not taken. Does nothing if it has left."""
        self.stop_keepalive()
        transport = self._request.transport
        if transport is not None:
            transport.abort()
