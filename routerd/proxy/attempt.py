"""One upstream call: send, read under a watchdog, and say how it ended.

The watchdog is one ``asyncio.timeout`` that is moved, never rebuilt: first to the first-token limit (which covers
connecting and the headers), then to the stall limit after every read that carried content, then to a short grace after
the model's own finish, when only usage and the terminal marker are due. What a time-out means follows from where the
attempt stood. ``_failure_of`` is the only place where exceptions become outcomes; ``CancelledError`` passes by it.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Collection

from routerd.canonical import Failure, Frame, Outcome, Side, UpstreamProtocolError, UpstreamTruncated, UsageReport
from routerd.dialects import Dialect
from routerd.policy.calls import BAD_ARGUMENTS
from routerd.policy.splice import Diverged, Splice
from routerd.policy.transcript import EMPTY_ANSWER, BadAnswer, Gate, InBandFault
from routerd.proxy.client import ConnectFailed, ConnectionTorn, Reply
from routerd.proxy.downstream import GONE, ClientGone, Sink
from routerd.proxy.pool import Pool, Ticket

ERROR_BODY_BYTES_MAX = 64 * 1024  # of an upstream's error only this much is read
ANSWER_BYTES_MAX = 64 * 1024 * 1024  # of a whole answer
TAIL_GRACE_S = 5.0  # after the model's finish, for usage and the terminal marker
RELEASE_GRACE_S = 1.0  # after the terminal marker, for the end of the HTTP body


class Phase(enum.Enum):
    """Where an attempt stands."""

    WAITING = "waiting"  # nothing of content yet
    ANSWERING = "answering"
    FINISHING = "finishing"  # the model has said why it ended: the answer is whole


_TIMEOUTS = {
    Phase.WAITING: Failure(Outcome.UNAVAILABLE, Side.UPSTREAM, "no content in time", code="first_token_timeout"),
    Phase.ANSWERING: Failure(Outcome.STALLED, Side.UPSTREAM, "silent in the middle of an answer", code="stall"),
    Phase.FINISHING: GONE,  # by then only the client is waited for
}
TIMEOUT_CODES = frozenset(failure.code for failure in _TIMEOUTS.values() if failure is not GONE)
_TORN = {
    Phase.WAITING: Failure(
        Outcome.UNAVAILABLE, Side.UPSTREAM, "connection lost before content", code="connection_lost"
    ),
    Phase.ANSWERING: Failure(Outcome.TRUNCATED, Side.UPSTREAM, "connection lost in mid-answer", code="connection_lost"),
    Phase.FINISHING: Failure(Outcome.TRUNCATED, Side.UPSTREAM, "connection lost at the end", code="connection_lost"),
}
_ERRORS = (
    TimeoutError,
    ConnectFailed,
    ConnectionTorn,
    UpstreamProtocolError,
    BadAnswer,
    Diverged,
    InBandFault,
    ClientGone,
)

# What comes after the model's own finish cannot make its answer less whole.
_LATE = (TimeoutError, ConnectionTorn, UpstreamProtocolError, InBandFault)


class Attempt:
    """One try of an exchange at one upstream."""

    __slots__ = (
        "_begun",
        "_dialect",
        "_hide_usage",
        "_last_at",
        "_on_content",
        "_pool",
        "_reply",
        "_sink",
        "_splice",
        "answer",
        "chunks",
        "diverged",
        "gate",
        "longest_gap_s",
        "phase",
        "refused",
        "ticket",
        "unsaid",
    )

    def __init__(
        self,
        pool: Pool,
        ticket: Ticket,
        sink: Sink,
        gate: Gate,
        *,
        splice: Splice | None = None,
        hide_usage: bool = False,
        on_content: Callable[[Attempt], None] | None = None,
    ) -> None:
        """``hide_usage``: the upstream was asked for a usage chunk that the client did not want.

        ``on_content`` is called once, with the first content, before any of it is sent.
        """
        self.ticket = ticket
        self.gate = gate
        self.phase = Phase.WAITING
        self.chunks = 0
        self.longest_gap_s = 0.0  # between two reads with content
        self.answer = b""  # of a request that is not streamed upstream
        self.diverged = False  # the answer could not be joined to what the client has
        self.unsaid: Collection[str] = ()  # what its answer had that cannot be said anew, by name
        self.refused = False  # the upstream never began to answer, and said so at once: it cost nothing
        self._begun = False  # something of it was sent
        self._last_at = 0.0
        self._pool = pool
        self._dialect: Dialect = ticket.face.dialect
        self._sink = sink
        self._splice = splice
        self._hide_usage = hide_usage
        self._on_content = on_content
        self._reply: Reply | None = None

    async def run(self, body: bytes, *, stream: bool) -> Failure | None:
        """None when the whole answer is delivered (or, not streaming, in ``answer``). Cancellation passes."""
        limits = self.ticket.limits
        try:
            async with asyncio.timeout(limits.first_token_s if stream else limits.answer_s) as watchdog:
                return await self._call(body, stream=stream, watchdog=watchdog)
        except _ERRORS as error:
            if self.phase is not Phase.FINISHING or not isinstance(error, _LATE) or self._sink.blocked:
                return self._failure_of(error)
        return await self._conclude()

    async def _call(self, body: bytes, *, stream: bool, watchdog: asyncio.Timeout) -> Failure | None:
        self._reply = reply = await self._pool.post(self.ticket, body)
        if reply.status != 200:
            error_body = await reply.read_all(ERROR_BODY_BYTES_MAX)
            self.refused = True
            return self._pool.judge(self.ticket, reply.status, reply.headers, error_body)
        self._pool.note_headers(self.ticket, reply.headers)
        if stream:
            await self._relay(reply, watchdog)
        else:
            await self._read_answer(reply)
        return None

    # --- streams ----------------------------------------------------------------------------------------------------

    async def _relay(self, reply: Reply, watchdog: asyncio.Timeout) -> None:
        feed, gate = self._dialect.decoder(), self.gate
        self.unsaid = feed.unsaid
        while data := await reply.read():
            frames = await self._admit(feed.feed(data))
            if gate.progress:
                self._progress(watchdog)
            if frames or gate.calls:
                await self._send(frames)
            if gate.ended:
                break
        else:
            await self._send(gate.admit(feed.close()))
        await self._finish()

    async def _admit(self, frames: list[Frame]) -> list[Frame]:
        """What may be sent. If a call is what is wrong, the client gets the rest of the text in front of it."""
        try:
            return self.gate.admit(frames)
        except (BadAnswer, InBandFault):
            if self.gate.calls and self._sink.committed:
                await self._send(self.gate.passed)
            raise

    def _progress(self, watchdog: asyncio.Timeout) -> None:
        self.chunks += 1
        now = time.monotonic()
        if self.phase is Phase.WAITING:
            self.phase = Phase.ANSWERING
            self._pool.first_token(self.ticket, now)
            if self._on_content is not None:
                self._on_content(self)
        elif now - self._last_at > self.longest_gap_s:
            self.longest_gap_s = now - self._last_at
        self._last_at = now
        limit_s = self.ticket.limits.stall_s
        if self.gate.finished is not None:
            self.phase = Phase.FINISHING
            limit_s = TAIL_GRACE_S
            self._pool.remember(self.ticket, self.gate)  # before the client has the calls and comes back with results
        # The loop's own clock is coarser than the monotonic one; the watchdog is set by it.
        watchdog.reschedule(asyncio.get_running_loop().time() + limit_s)

    async def _send(self, frames: list[Frame]) -> None:
        if self._hide_usage:
            frames = [frame for frame in frames if not _only_usage(frame)]
        if self._splice is not None:
            events = self._splice.feed([event for frame in frames for event in frame.events])
            if self.gate.calls:  # a re-run of this turn would leave out its text
                events += self._splice.settle()
            frames = [Frame(b"", tuple(events))] if events else []
        if frames:
            if not self._begun:  # not before: of two attempts at the same turn only one may have the client
                self._begun = True
                self._sink.begin_attempt(self._dialect)
            await self._sink.send(frames)

    async def _conclude(self) -> Failure | None:
        """The model had finished when the upstream fell silent or broke off: the answer is whole all the same."""
        try:
            async with asyncio.timeout(self.ticket.limits.stall_s):
                await self._finish()
        except _ERRORS as error:
            return self._failure_of(error)
        return None

    async def _finish(self) -> None:
        await self._send(self.gate.close())
        if not self.gate.ended:
            await self._sink.send_end_marker()

    # --- whole answers ----------------------------------------------------------------------------------------------

    async def _read_answer(self, reply: Reply) -> None:
        answer = await reply.read_all(ANSWER_BYTES_MAX)
        self.gate.admit([Frame(answer, tuple(self._dialect.decode_body(answer)))])
        if self.gate.finished is None:
            raise UpstreamTruncated("an answer without a finish")
        if self.gate.altered:
            raise BadAnswer(BAD_ARGUMENTS)  # it goes on as it came, or not at all
        self.phase = Phase.FINISHING
        self._pool.remember(self.ticket, self.gate)
        self.gate.ended = True
        self.answer = answer

    # --- endings ----------------------------------------------------------------------------------------------------

    def _failure_of(self, error: Exception) -> Failure:
        """The one map from exceptions to outcomes."""
        match error:
            case ClientGone():
                return GONE
            case TimeoutError():
                return GONE if self._sink.blocked else _TIMEOUTS[self.phase]
            case ConnectFailed():
                self.refused = True
                detail = "cannot connect"
                return Failure(Outcome.UNAVAILABLE, Side.UPSTREAM, detail, code="connect", account_wide=True)
            case ConnectionTorn():
                return _TORN[self.phase]
            case Diverged():
                self.diverged = True
                detail = "a new answer that does not go on from the old one"
                return Failure(Outcome.MALFORMED, Side.UPSTREAM, detail, code="diverged", cause=Outcome.UNSUPPORTED)
            case InBandFault():
                return self._pool.judge_fault(self.ticket, error.fault)
            case BadAnswer():
                # Nothing to add to a text that broke off may well be the truth.
                cause = Outcome.UNSUPPORTED if error.code == EMPTY_ANSWER and self._splice is not None else None
                detail = "an answer that cannot be used"
                return Failure(Outcome.MALFORMED, Side.UPSTREAM, detail, code=error.code, cause=cause)
            case UpstreamTruncated():
                return Failure(Outcome.TRUNCATED, Side.UPSTREAM, "ended before the answer was whole", code="truncated")
        return Failure(Outcome.MALFORMED, Side.UPSTREAM, "an answer in no known form", code="protocol")

    async def close(self, *, whole: bool) -> None:
        """Give the connection back if the answer was read to its end, else close it. Never raises."""
        reply, self._reply = self._reply, None
        if reply is None:
            return
        if whole and not reply.ended:
            await reply.release(RELEASE_GRACE_S)
        reply.abort()


def _only_usage(frame: Frame) -> bool:
    return len(frame.events) == 1 and type(frame.events[0]) is UsageReport
