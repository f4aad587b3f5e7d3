"""One client request, from its admission to its last byte.

``Exchange.run`` is the whole story, readable top to bottom: plan, wait if nobody can serve now, attempt, and on
anything but success ask ``next_step`` what to do. The policy decides; this does. Whatever happens, every ticket taken
is settled once and the exchange is recorded once.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Container, Iterable
from collections.abc import Set as AbstractSet
from functools import partial

import msgspec
from aiohttp import web

from routerd.canonical import BadRequest, Failure, Head, Outcome, Side, Start, Upstream
from routerd.dialects import Dialect, Stamp
from routerd.policy.calls import Schemas
from routerd.policy.classify import Code, agrees, blame_client
from routerd.policy.recovery import Break, Budget, Continue, Fail, Rerun, Step, Stop, next_step
from routerd.policy.splice import Splice, seems_whole
from routerd.policy.transcript import CUT_CALL, EMPTY_ANSWER, SCHEMA_CODES, Gate
from routerd.proxy.attempt import TIMEOUT_CODES, Attempt
from routerd.proxy.chain import Link
from routerd.proxy.deadline import answer_within_s
from routerd.proxy.downstream import GONE, ClientGone, Collector, Downstream, Sink
from routerd.proxy.live import Face, LiveRoute, LiveUpstream
from routerd.proxy.planner import Plan
from routerd.proxy.pool import CHARACTERS_PER_TOKEN, Pool, Ticket
from routerd.proxy.race import OUTRUN_FIRST, OUTRUN_HEDGE, Ended, Race
from routerd.telemetry import ExchangeRecord, Telemetry

REFUSALS_MAX = 256  # per exchange: so many refusals, each cheap and quick, do not count as attempts
ROUND_PAUSE_S = (0.5, 2.0, 5.0, 15.0)  # before everybody is tried again; the last value repeats
PANIC_AFTER_S = 15.0  # with nobody else to ask, one whose breaker stays open for longer is tried again all the same
TIMER_SLACK_S = 0.002  # the loop's timers count whole milliseconds, and may be early by one
MISSES_MAX = 8  # so often a plan that could not be carried out is made anew at once
MISSED_PAUSE_S = 0.02  # then after this: whatever the reason is, it may not keep the loop busy
GOING_ON_TOKENS = 100  # of the words in which an answer that broke off is asked for, at the most
NOBODY: frozenset[LiveUpstream] = frozenset()
TOO_LATE = Failure(
    Outcome.UNAVAILABLE,
    Side.ROUTER,
    "no provider could answer within the time that the client waits",
    status=503,
    code="too_late",
)
# What an upstream may refuse in one wire API and take in another one.
_OF_THE_FACE = frozenset({Code.BAD_REQUEST, Code.REJECTED, Code.UNSUPPORTED_FEATURE, Code.MODEL_NOT_FOUND})
_VAGUE = frozenset({Code.BAD_REQUEST, Code.REJECTED})  # may have been an accident
_MISFITS = frozenset({Code.UNSUPPORTED_FEATURE, Code.MODERATION})  # no later try and no other wording of ours helps


class Arrival(msgspec.Struct):
    """What the app hands over: a request understood, and when it came. ``body`` has all of the conversation.

    ``asked`` is what the client sent instead, where it named the earlier part.
    """

    request: web.Request
    dialect: Dialect
    body: bytes
    head: Head
    route: LiveRoute
    id: str
    at: float  # monotonic
    link: Link | None = None
    asked: bytes = b""

    @property
    def sent(self) -> bytes:
        """The request as the client sent it."""
        return self.asked or self.body


class Exchange:
    """One client request being served."""

    def __init__(self, arrival: Arrival, pool: Pool, telemetry: Telemetry) -> None:
        head, route = arrival.head, arrival.route
        self._arrival = arrival
        self._pool = pool
        self._telemetry = telemetry
        self._clock = time.monotonic
        self._attempts_left = route.max_attempts
        self._waits_left_s = route.max_wait_s
        within_s = answer_within_s(arrival.request.headers, head, route)
        self._deadline = None if within_s is None else arrival.at + within_s
        self._rounds = 0
        self._round_over_at: float | None = None  # since when nobody is left to try in this round
        self._tried: set[LiveUpstream] = set()  # in this round
        self._unfit: set[LiveUpstream] = set()  # for this request, whatever the round
        self._doubted: set[LiveUpstream] = set()  # of the unfit: those that gave no reason, and may be asked once more
        self._reconsidered = False
        self._patient: set[LiveUpstream] = set()  # had the configured limits once, whatever was learned
        self._failures: list[tuple[LiveUpstream, Failure]] = []
        self._step: Step | None = None  # what the last failure led to
        self._refusals = 0
        self._dispatched = 0
        self._missed = 0  # reservations that were planned and could not be had
        self._waited = False  # and no attempt since
        self._let_pass = False  # one that was overtaken had its chance to go first
        self._turn_at = math.inf  # when the quota that was waited for first should have been free
        self._in_call = False  # what the client has broke off inside a tool call
        self._diverged = False  # a re-run could not be joined to what the client has
        self._nothing_after = -1  # so many characters of text somebody who was to go on had nothing to add
        self._bodies = {arrival.dialect.name: arrival.body}  # the request, by dialect
        self._passed_on = _passed_on(arrival)
        self._untold: Failure | None = None  # why the request has no form in another dialect
        self._spoken: dict[LiveUpstream, str] = {}  # in what dialect, where the client's own was refused
        self._no_prefill: set[LiveUpstream] = set()  # refused to go on with a trailing assistant turn
        # A request that does not stream is streamed upstream all the same, so that the same watchdogs guard it.
        self._collector = None if head.stream or not head.streamable else Collector()
        self._asked = msgspec.structs.replace(head, stream=True) if self._collector is not None else head
        stamp = Stamp(arrival.id, head.model, int(time.time()), head.include_usage, arrival.sent)
        self.downstream = Downstream(
            arrival.request,
            arrival.dialect,
            stamp,
            keepalive_s=route.keepalive_s,
            clock=self._clock,
            link=arrival.link,
        )
        self.record = ExchangeRecord(
            arrival.id, route.name, arrival.dialect.name, head.stream, prompt_tokens=head.prompt_tokens
        )

    async def run(self) -> None:
        """Serve it. Returns when the client has its answer or its error; cancellation passes."""
        opened = self._telemetry.opened(self._arrival.dialect.name)
        self.downstream.describe({"x-routerd-exchange": self._arrival.id})
        if self._arrival.head.stream:
            self.downstream.start_keepalive()
        try:
            await (self._serve() if self._deadline is None else self._serve_in_time())
        except ClientGone:
            self.record.outcome = Outcome.CANCELLED
        finally:
            self.downstream.stop_keepalive()
            opened.dec()
            self._close_record()

    async def _serve_in_time(self) -> None:
        """Serve it, or say that nobody could before the client gives up."""
        try:
            async with asyncio.timeout(self._time_left_s()):
                await self._serve()
        except TimeoutError:
            if self.downstream.status:  # it has its answer, or an error, and does not read it
                self.downstream.drop()
                raise ClientGone from None
            await self._fail(TOO_LATE)

    def _time_left_s(self) -> float:
        return math.inf if self._deadline is None else self._deadline - self._clock()

    async def _serve(self) -> None:
        over = False
        while not over:
            plan = self._plan()
            if plan.chosen is None:
                over = await self._wait(plan)
            elif await self._stood_back(plan.chosen):
                continue
            elif not (plan.forced and self._has_failed(plan.chosen) and self._reconsider()):
                over = await self._try(plan, plan.chosen)

    def _has_failed(self, live: LiveUpstream, codes: Container[str] | None = None) -> bool:
        """True if it failed in this exchange, in any way or with one of these codes."""
        return any(other is live and (codes is None or failure.code in codes) for other, failure in self._failures)

    def _plan(self, barred: AbstractSet[LiveUpstream] = NOBODY) -> Plan:
        """``barred``: who is not to be chosen this time."""
        return self._pool.planner.plan(
            self._arrival.route,
            self._now_asked(self._arrival.head),  # the client's: a call on the side is one that does not stream
            now=self._clock(),
            wall=time.time(),
            draw=random.random(),
            tried=self._tried,
            unfit=self._unfit | barred if barred else self._unfit,
            hurried=bool(self._failures),
        )

    # --- attempts ---------------------------------------------------------------------------------------------------

    async def _try(self, plan: Plan, live: LiveUpstream) -> bool:
        """One attempt, or two in a race; True when the exchange is over."""
        if not self._translates(live):
            return False
        after_s = self._hedge_after_s(live)
        ended = await (self._go(plan, live) if after_s is None else self._race(plan, live, after_s))
        if ended is None:  # somebody took the last of the quota in between: plan anew, after all others had a turn
            self._missed += 1
            await asyncio.sleep(0 if self._missed <= MISSES_MAX else MISSED_PAUSE_S)
            return False
        attempt, failure = ended
        if failure is not None:
            return await self._recover(attempt, failure)
        await self._deliver(attempt)
        return True

    async def _go(
        self, plan: Plan, live: LiveUpstream, race: Race | None = None, *, hedge: bool = False
    ) -> Ended | None:
        """One attempt from its reservation to its settling; None if it could not begin."""
        now, wall, asked = self._clock(), time.time(), self._now_asked(self._asked)
        ticket = await self._pool.begin(plan, self._arrival.route, asked, now, wall, self.record, hedge=hedge)
        if ticket is None:
            return None
        self._prepare(ticket)
        self._note_dispatch(live, hedge=hedge)
        attempt = self._attempt(ticket, race)
        failure: Failure | None = GONE  # what stands if cancellation ends the attempt
        try:
            failure = await attempt.run(self._body(ticket), stream=self._asked.stream)
            failure = failure and self._agreed(live, failure)
        finally:
            if race is not None and race.lost:
                failure = OUTRUN_HEDGE if hedge else OUTRUN_FIRST
                self._tried.add(live)
            self._settle(ticket, attempt, failure, asked)
            if failure is not None:
                await attempt.close(whole=False)
        return attempt, failure

    def _now_asked(self, head: Head) -> Head:
        """What is asked for at this step: to go on with an answer means to read what there is of it as well."""
        if not isinstance(self._step, Continue):
            return head
        more = GOING_ON_TOKENS + self.downstream.transcript.characters // CHARACTERS_PER_TOKEN
        return msgspec.structs.replace(head, prompt_tokens=head.prompt_tokens + more)

    def _prepare(self, ticket: Ticket) -> None:
        live = ticket.live
        ticket.spoken = self._spoken.get(live, "")
        if ticket.face.dialect is self._arrival.dialect:
            ticket.headers = self._passed_on
        if self._has_failed(live, TIMEOUT_CODES) and live not in self._patient:
            self._patient.add(live)  # a limit learned from better days may be what cut it off: once it gets all of it
            ticket.limits = live.account.limits
        elif self._deadline is not None and self._has_another(live):
            ticket.limits = ticket.limits.within(self._time_left_s() / 2)

    def _has_another(self, live: LiveUpstream) -> bool:
        """True if there is somebody of another provider to turn to, should this one not answer in time."""
        now, done = self._clock(), self._tried | self._unfit
        return any(
            other.upstream.provider != live.upstream.provider and other not in done and other.allows(now)
            for other in self._arrival.route.lives_for(self._arrival.head)
        )

    def _note_dispatch(self, live: LiveUpstream, *, hedge: bool) -> None:
        upstream = live.upstream
        self._attempts_left -= 1
        self._dispatched += 1
        if self.record.overhead_s is None:
            self.record.overhead_s = self._clock() - self._arrival.at
        if self.record.attempts and not hedge:
            self._telemetry.failover(self.record, upstream.provider, upstream.model)
        self._describe(upstream)

    def _describe(self, upstream: Upstream) -> None:
        """In the headers: who answers, as far as it is known."""
        self.downstream.describe(
            {
                "x-routerd-provider": upstream.provider,
                "x-routerd-model": upstream.model,
                "x-routerd-attempts": str(self._dispatched),
                **self._pool.rate_limit_headers(self._arrival.route, time.time()),
            }
        )

    # --- hedges -----------------------------------------------------------------------------------------------------

    def _hedge_after_s(self, live: LiveUpstream) -> float | None:
        """When somebody else may be asked as well; None: not at all. Only while the client has nothing yet."""
        route, tokens = self._arrival.route, self._asked.prompt_tokens
        if route.hedge == "off" or not self._asked.stream or self.downstream.transcript.begun:
            return None
        expected_s = live.latency.first_token_s(tokens, self._clock())
        limit_s = live.account.limits.first_token_s
        return live.patience.hedge_after_s(tokens, expected_s, route.hedge_after_s, limit_s)

    async def _race(self, plan: Plan, live: LiveUpstream, after_s: float) -> Ended | None:
        """An attempt, and if it has nothing to say for so long, a second one beside it."""
        async with Race() as race:
            race.enter(self._go(plan, live, race))
            if await race.quiet(after_s):
                race.enter(self._hedge(live, race))
            ended = await race.result(self._note_failure)
        if ended is not None:  # whoever was called off may have been settled after the one that counts
            self.record.attempts.sort(key=lambda record: record is ended[0].ticket.record)
        return ended

    async def _hedge(self, first: LiveUpstream, race: Race) -> Ended | None:
        """The second attempt, at the next best of those that are healthy and may be used for this, if there is one."""
        plan = self._plan(self._no_hedges(first))
        live = plan.chosen
        if live is None or plan.probe or plan.forced or self._attempts_left <= 0 or not self._translates(live):
            return None
        return await self._go(plan, live, race, hedge=True)

    def _no_hedges(self, first: LiveUpstream) -> set[LiveUpstream]:
        """Who cannot help against this one's silence, or costs money that may not be spent on it."""
        free = self._arrival.route.hedge == "free"
        return {
            live
            for live in self._arrival.route.lives_for(self._arrival.head)
            if live.upstream.provider == first.upstream.provider or (free and not live.upstream.price.free)
        }

    # --- one attempt's setting --------------------------------------------------------------------------------------

    def _attempt(self, ticket: Ticket, race: Race | None = None) -> Attempt:
        """An attempt set up for the step at hand."""
        head = self._arrival.head
        sink: Sink = self.downstream if self._collector is None else self._collector
        held = isinstance(self._step, Rerun) or (isinstance(self._step, Continue) and self._step.checked)
        gate = Gate(
            whole=held or not head.stream or self._arrival.route.whole,
            schemas=self._schemas if head.tools else None,
            forgiven=self._forgiven(),
        )
        hide_usage = head.stream and ticket.face.upstream.fix.stream_usage and not head.include_usage
        return Attempt(
            self._pool,
            ticket,
            sink,
            gate,
            splice=self._splice(ticket),
            hide_usage=hide_usage,
            on_content=None if race is None else partial(self._claim, race),
        )

    def _claim(self, race: Race, attempt: Attempt) -> None:
        race.claim()
        self._describe(attempt.ticket.live.upstream)

    def _forgiven(self) -> set[str]:
        """What this attempt's answer may have wrong with it, since another one had it as well.

        Nothing at all is believed only where no call can be missing; a model that is asked in words says ``COMPLETE``.
        """
        codes = {failure.code for _, failure in self._failures}
        forgiven = codes & {CUT_CALL}
        if codes & SCHEMA_CODES:
            forgiven |= SCHEMA_CODES
        if isinstance(self._step, Continue) and self._added_nothing() and not self._arrival.head.tools:
            forgiven |= {EMPTY_ANSWER} if seems_whole(self.downstream.transcript.text or "") else set()
        return forgiven

    def _added_nothing(self) -> bool:
        """True if somebody has been asked to go on with just this text, and said nothing."""
        return self._nothing_after == self.downstream.transcript.characters

    def _schemas(self) -> Schemas:
        return self._arrival.dialect.tool_schemas(self._arrival.body)

    def _splice(self, ticket: Ticket) -> Splice | None:
        """How the new answer is joined to the text the client has, if it has any."""
        sent = self.downstream.transcript.text or ""
        if isinstance(self._step, Rerun):
            return Splice("rerun", sent)
        if not isinstance(self._step, Continue):
            return None
        ticket.continuation = self._prefills(ticket.live)
        return Splice("prefill" if ticket.continuation else "instructed", sent, document=self._step.checked)

    def _prefills(self, live: LiveUpstream) -> bool:
        """Not after somebody said nothing: asked in words, a model can say that nothing was missing."""
        able = self._face(live).prefills and live not in self._no_prefill
        return able and not self._added_nothing()

    def _body(self, ticket: Ticket) -> bytes:
        """The request as the upstream wants it."""
        face = ticket.face
        body = self._bodies[face.dialect.name]
        if isinstance(self._step, Continue):
            manner = face.upstream.fix.continuation if ticket.continuation else "instructed"
            body = face.dialect.continue_request(body, self.downstream.transcript.text or "", manner)
        recall = partial(self._pool.memory.recall, self._asked.conversation)
        return face.dialect.patch_request(body, self._asked, face.upstream, recall)

    def _face(self, live: LiveUpstream) -> Face:
        return live.face(self._spoken.get(live, self._arrival.dialect.name))

    def _translates(self, live: LiveUpstream) -> bool:
        """Write the request in the upstream's dialect; False if it asks for what cannot be said there."""
        arrival, face = self._arrival, self._face(live)
        if face.dialect.name in self._bodies:
            return True
        try:
            request = arrival.dialect.decode_request(arrival.body)
        except BadRequest as error:
            self._untold = error.failure
            self._unfit.add(live)
            return False
        self._bodies[face.dialect.name] = face.dialect.encode_request(request)
        self._note_dropped(arrival.dialect, face.dialect, (*request.dropped, *face.dialect.unsaid(request)))
        return True

    def _note_dropped(self, told: Dialect, heard: Dialect, features: Iterable[str]) -> None:
        for feature in features:
            self._telemetry.dropped_features.labels(told.name, heard.name, feature).inc()
            self.record.dropped.append(feature)

    def _settle(self, ticket: Ticket, attempt: Attempt, failure: Failure | None, asked: Head) -> None:
        ticket.longest_gap_s = attempt.longest_gap_s
        record = self._pool.settle(
            ticket, failure, attempt.gate, asked, chunks=attempt.chunks, now=self._clock(), wall=time.time()
        )
        self.record.attempts.append(record)
        self.record.repairs += attempt.gate.repairs if failure is None else 0
        if failure is not GONE:
            self._count_recoveries(ticket, "success" if failure is None else "failure")

    def _count_recoveries(self, ticket: Ticket, result: str) -> None:
        """An attempt may be several things at once: a retry, the end of a wait, and a probe."""
        count = self._telemetry.recoveries.labels
        if ticket.hedge is not None:
            count("hedge", result).inc()
        elif self._step is not None:
            count("continue" if isinstance(self._step, Rerun | Continue) else "retry", result).inc()
        if self._waited:
            self._waited = False
            count("wait", result).inc()
        if ticket.permit.probe or ticket.account_permit.probe:
            count("probe", result).inc()

    def _agreed(self, live: LiveUpstream, failure: Failure) -> Failure:
        """A refusal that a second provider shares is the client's own error, unless we had added to the request."""
        if isinstance(self._step, Continue):
            return failure
        for other, earlier in self._failures:
            if other.upstream.provider != live.upstream.provider and agrees(earlier, failure):
                return blame_client(failure)
        return failure

    async def _recover(self, attempt: Attempt, failure: Failure) -> bool:
        """Decide what a failure leads to; True when the exchange is over."""
        self._note_failure(attempt, failure)
        head = self._arrival.head
        broke = Break(self._in_call, self._diverged, structured=head.structured, joinable=head.streamable)
        budget = Budget(self._attempts_left)
        self._step = step = next_step(self.downstream.transcript, failure, broke, budget)
        if isinstance(step, Fail):
            await self._fail(self._last_word(step.failure))
        elif isinstance(step, Stop):
            self.downstream.drop()
        return isinstance(step, Fail | Stop)

    def _note_failure(self, attempt: Attempt, failure: Failure) -> None:
        """What a failure says about who is to be tried next, and how."""
        self._failures.append((attempt.ticket.live, failure))
        if not isinstance(self._step, Rerun):  # a re-run is held: it adds nothing to what the client has
            self._in_call = bool(attempt.gate.calls)
        if attempt.refused and self._refusals < REFUSALS_MAX:  # cost no money: only the time allowed for waiting
            self._refusals += 1
            self._attempts_left += 1
            self._waits_left_s -= self._clock() - attempt.ticket.began_at
        self._diverged = self._diverged or attempt.diverged
        if isinstance(self._step, Continue) and failure.code == EMPTY_ANSWER:
            self._nothing_after = self.downstream.transcript.characters
        self._leave_out(attempt.ticket, failure)

    def _leave_out(self, ticket: Ticket, failure: Failure) -> None:
        """Who is not to be tried next: this one in this round, or for this request altogether."""
        live = ticket.live
        if failure.outcome is not Outcome.UNSUPPORTED:
            self._tried.add(live)
        elif ticket.continuation:
            self._no_prefill.add(live)  # it may still take the unchanged request, or one that asks in words
        elif failure.code in _OF_THE_FACE and live not in self._spoken and len(live.faces) > 1:
            # Newer wire APIs of a vendor tend to lack what its older ones have had for long.
            names = (live.upstream.dialect, *live.faces)
            self._spoken[live] = next(name for name in names if name != ticket.face.dialect.name)
        else:
            self._unfit.add(live)
            if failure.code in _VAGUE:
                self._doubted.add(live)

    async def _deliver(self, attempt: Attempt) -> None:
        if self._arrival.head.stream:
            await self.downstream.end()
        else:
            cost_usd = sum(record.cost_usd for record in self.record.attempts)
            self.downstream.describe({"x-routerd-cost-usd": f"{cost_usd:.8f}"})
            await self.downstream.send_body(self._answer(attempt))
        self.record.outcome = Outcome.SUCCESS
        if attempt.unsaid and (self._collector is not None or not self.downstream.raw):
            self._note_dropped(attempt.ticket.face.dialect, self._arrival.dialect, sorted(attempt.unsaid))
        await attempt.close(whole=True)

    def _answer(self, attempt: Attempt) -> bytes:
        """The whole answer: as it came, or put together from what was streamed."""
        if self._collector is None:
            return self._translated(attempt)
        start = attempt.gate.start or Start(self._arrival.id, attempt.ticket.live.upstream.model)
        # An id is good only where its server's own bytes may pass: another one's may be nothing but a small number.
        identity = start.id if attempt.ticket.face.dialect is self._arrival.dialect else self._arrival.id
        stamp = Stamp(identity, start.model, int(time.time()), include_usage=True, asked=self._arrival.sent)
        return self._arrival.dialect.encode_body(self._collector.events, stamp)

    def _translated(self, attempt: Attempt) -> bytes:
        """An answer that came whole, in the client's dialect."""
        dialect, wanted = attempt.ticket.face.dialect, self._arrival.dialect
        if dialect is wanted:
            return attempt.answer
        model, asked = attempt.ticket.live.upstream.model, self._arrival.sent
        stamp = Stamp(self._arrival.id, model, int(time.time()), include_usage=True, asked=asked)
        return wanted.encode_body(dialect.decode_body(attempt.answer), stamp)

    # --- waiting ----------------------------------------------------------------------------------------------------

    async def _wait(self, plan: Plan) -> bool:
        """Hold the request until somebody can serve it; True when that is hopeless and the client has been told."""
        began = self._clock()
        wait_s = self._pause_s(plan, began) if plan.all_tried else plan.wait_s
        if wait_s > min(self._waits_left_s, self._time_left_s()) or self._attempts_left <= 0:
            if not math.isinf(wait_s) and self._reconsider():
                return False
            if self._waited:
                self._telemetry.recoveries.labels("wait", "failure").inc()
            await self._fail(self._nobody(plan, wait_s))
            return True
        if await self._hold(wait_s, plan.reason) >= wait_s:
            # Not woken before its time: that is pause enough, and nobody is left out after it.
            self._rounds += plan.all_tried
            self._round_over_at = None
            self._tried.clear()
        self._waited = True
        return False

    async def _hold(self, wait_s: float, reason: str) -> float:
        """Stand in line. Returns for how long it was."""
        began, arrival = self._clock(), self._arrival
        if reason == "quota":
            self._turn_at = min(self._turn_at, began + wait_s)
        overtaken = began > self._turn_at  # its time had come, and somebody else had taken what it waited for
        claim = arrival.head if overtaken and reason == "quota" else None
        await self._pool.wait(arrival.route, arrival.at, wait_s + TIMER_SLACK_S, reason, claim)
        waited_s = self._clock() - began
        self._waits_left_s -= waited_s
        self.record.waited_s += waited_s
        self._telemetry.wait.labels(reason).observe(waited_s)
        return waited_s

    async def _stood_back(self, live: LiveUpstream) -> bool:
        """True after leaving an upstream to one that came before, has waited for it and was overtaken."""
        route = self._arrival.route
        claim = route.line.claim(self._arrival.at) if route.line else None
        if claim is None:
            return False
        obstacle = self._pool.planner.obstacle(route, live, claim, now=self._clock(), wall=time.time())
        wait_s = 0.0 if obstacle is None else obstacle.wait_s if obstacle.reason == "quota" else math.inf
        if wait_s > min(self._waits_left_s, self._time_left_s()):
            return False
        if obstacle is None:  # nothing seems to keep it: it is let pass once, for it may not want this upstream at all
            if self._let_pass:
                return False
            self._let_pass = True
            route.line.wake()
        await self._hold(wait_s, "quota")
        return True

    def _reconsider(self) -> bool:
        """Nobody is left who is likely to serve this in time. So whoever refused without a reason, or is shut out by no
        more than a guess at its quota, is asked once more; False if there is none such, or it has been done.
        """
        if self._reconsidered or self._attempts_left <= 0:
            return False
        self._reconsidered = True
        self._unfit -= self._doubted
        self._tried |= self._doubted
        now = self._clock()
        lives = self._arrival.route.upstreams()
        ended = [live.account.quota.doubt(live.upstream.wire_model, now) for live in lives]
        return bool(self._doubted) or any(ended)

    def _pause_s(self, plan: Plan, now: float) -> float:
        """How much longer to leave in peace those who have just failed."""
        if self._round_over_at is None:
            self._round_over_at = now
        rested_s = now - self._round_over_at
        pause_s = ROUND_PAUSE_S[min(self._rounds, len(ROUND_PAUSE_S) - 1)]
        return max(0.0, pause_s - rested_s, min(plan.wait_s, PANIC_AFTER_S - rested_s))

    # --- endings ----------------------------------------------------------------------------------------------------

    def _nobody(self, plan: Plan, wait_s: float) -> Failure:
        """Nobody can serve this within the time allowed."""
        if plan.reason == "budget":
            return self._over_budget(wait_s)
        if math.isinf(wait_s):
            return self._refusal(plan)
        if plan.reason == "quota":
            detail = "every provider's quota for this is used up; it is free again later"
            return _router_failure(429, detail, "rate_limited", wait_s)
        return _router_failure(503, "no provider is answering at the moment", "unavailable", wait_s)

    def _over_budget(self, wait_s: float) -> Failure:
        """Never a 402 or 403, which agents die of."""
        name = self._arrival.route.name
        if math.isinf(wait_s):
            return _router_failure(429, f"this alone would cost more than the budget of {name}", "over_budget", None)
        detail = f"the budget of {name} is spent; it has room again later"
        return _router_failure(429, detail, "over_budget", wait_s)

    def _refusal(self, plan: Plan) -> Failure:
        """Nobody will ever serve this request as it is."""
        codes = {failure.code for _, failure in self._failures}
        if plan.overflow or Code.CONTEXT_OVERFLOW in codes:
            windows = (live.upstream.context_tokens for live in self._arrival.route.upstreams())
            detail = f"maximum context length is {max(windows, default=0)} tokens; shorten the conversation"
            return Failure(Outcome.CLIENT_ERROR, Side.CLIENT, detail, status=400, code="context_length_exceeded")
        if self._untold is not None:
            return self._untold
        if not self._failures:
            detail = "no model of this route takes what the request contains (tools, images, or so much at once)"
            return Failure(Outcome.CLIENT_ERROR, Side.CLIENT, detail, status=400, code="unsupported")
        if codes & _MISFITS:
            detail = "every provider asked turned down what the request contains"
            return Failure(Outcome.CLIENT_ERROR, Side.CLIENT, detail, status=400, code="unsupported")
        if Code.BAD_REQUEST in codes:
            detail = "the provider refuses this request as malformed"
            return Failure(Outcome.CLIENT_ERROR, Side.CLIENT, detail, status=400, code="invalid_request")
        return _router_failure(503, "no provider of this route serves this model at the moment", "unavailable", None)

    def _last_word(self, failure: Failure) -> Failure:
        """What the client is told when an attempt's failure is final: never a status it would die of needlessly."""
        if failure.outcome is Outcome.CLIENT_ERROR:
            return failure
        if failure.outcome in (Outcome.RATE_LIMITED, Outcome.EXHAUSTED) and failure.retry_after_s is not None:
            return _router_failure(429, "every provider tried is rate limited", "rate_limited", failure.retry_after_s)
        detail = f"no provider could answer (tried {len(self._failures)})"
        return msgspec.structs.replace(failure, side=Side.ROUTER, status=503, detail=detail)

    async def _fail(self, failure: Failure) -> None:
        self.record.outcome = failure.outcome
        self.record.detail = failure.detail
        await self.downstream.fail(failure)

    def _close_record(self) -> None:
        record, arrived = self.record, self._arrival.at
        record.duration_s = self._clock() - arrived
        record.status = self.downstream.status
        if self.downstream.first_content_at is not None:
            record.first_content_s = self.downstream.first_content_at - arrived
        self._telemetry.exchange(record)


def _passed_on(arrival: Arrival) -> dict[str, str]:
    """The client's headers that an upstream of the same dialect is to see."""
    headers = arrival.request.headers
    return {name: headers[name] for name in arrival.dialect.forwarded_headers if name in headers}


def _router_failure(status: int, detail: str, code: str, retry_after_s: float | None) -> Failure:
    outcome = Outcome.RATE_LIMITED if status == 429 else Outcome.UNAVAILABLE
    return Failure(outcome, Side.ROUTER, detail, status=status, code=code, retry_after_s=retry_after_s)
