"""Everything live, and what an attempt takes from it and gives back.

``begin`` takes: two breaker permits, quota, the route's budget. What must survive a kill is on disk when it returns.
``settle`` gives back and learns, exactly once per ticket, whatever happened in between. The choice itself is the
planner's; estimates, breakers and ledgers are saved here and taken up again after a restart.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from urllib.parse import urlsplit

import msgspec

from routerd.canonical import (
    Failure,
    Fault,
    Head,
    Limit,
    LimitReport,
    Outcome,
    Reasoning,
    Remembered,
    Secret,
    Side,
    Upstream,
    Usage,
    seal_key,
)
from routerd.config import Config, ProviderConfig, RouteConfig
from routerd.dialects import DIALECTS, Dialect
from routerd.policy.balance import Affinity, LatencySnapshot
from routerd.policy.breaker import Breaker, BreakerSnapshot, Listener, Permit
from routerd.policy.classify import Verdict, verdict
from routerd.policy.memory import Memory
from routerd.policy.meters import Amount
from routerd.policy.quota import Quota, Reservation
from routerd.policy.transcript import Gate
from routerd.providers import judge, judge_fault
from routerd.proxy.client import Client, ConnectFailed, Reply, Target
from routerd.proxy.live import Account, Face, Limits, LiveRoute, LiveUpstream, Tier, hedge_scope
from routerd.proxy.planner import Plan, Planner, expected_amount
from routerd.proxy.queue import WaitingLine
from routerd.state import Entry, Row, StateError, Store
from routerd.telemetry import ACCOUNT, AttemptRecord, ExchangeRecord, Live, Spent, Telemetry

Quotas = tuple[str, str, float, float, float]  # provider, limit, size, left, reset

STATES_BEST_FIRST = ("closed", "half-open", "open")
HEADERS_FRESH_S = 1.0  # rate-limit headers are added up once in this time
CHARACTERS_PER_TOKEN = 4  # where an upstream never said how much it used
COST_TRUST = 3.0  # an upstream's own figure is believed within this factor of ours: some bill in other units
PROBE_PATIENCE = 4.0  # a probe waits this many times the usual first token, not the whole limit ...
PROBE_PATIENCE_MIN_S = 10.0  # ... but at least this long

NO_USAGE = Usage()
SUCCESS = Verdict("success", "settle", "no")


class Ticket(msgspec.Struct):
    """What an attempt holds of an upstream. Settled exactly once."""

    live: LiveUpstream
    permit: Permit
    account_permit: Permit
    reservation: Reservation
    budget: Reservation
    hedge: Reservation | None  # of the budget for hedging; None: this is no hedge
    route: LiveRoute
    limits: Limits
    wait_ticket: int
    prompt_tokens: int
    began_at: float
    first_token_at: float | None = None
    sent: bool = False  # the upstream may have taken the request, whether it answered or not
    resends: int = 0  # and so often before, over connections that then turned out to be dead
    connected: bool = False  # the upstream answered at all
    continuation: bool = False  # a broken-off answer is taken up in the vendor's own way
    longest_gap_s: float = 0.0  # between two pieces of content
    conversation: int = 0
    exchange: str = ""
    dialect: str = ""  # the client's
    spoken: str = ""  # the one to be used with the upstream, if it is not the one it has for the client's
    headers: Mapping[str, str] = {}  # of the client's that are passed on
    reports: tuple[LimitReport, ...] = ()
    record: AttemptRecord | None = None  # once it is settled

    def note_resend(self) -> None:
        self.resends += 1

    @property
    def face(self) -> Face:
        """The upstream as this request reaches it."""
        return self.live.face(self.spoken or self.dialect)

    @property
    def target(self) -> Target:
        target = self.face.continuation_target if self.continuation else self.face.target
        return target.extended(self.headers) if self.headers else target


class Pool:
    """Everything live. Built from a config; a reload builds another and hands the state over."""

    def __init__(
        self,
        config: Config,
        store: Store,
        telemetry: Telemetry,
        *,
        simulated: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``simulated``: base URLs of the simulated providers, which have none in the config."""
        self._config = config
        self._store = store
        self._telemetry = telemetry
        self._simulated = simulated or {}
        self._clock = clock
        self._affinity = Affinity()
        self.memory = Memory()
        self.planner = Planner(self._affinity)
        self._accounts: dict[str, Account] = {}
        self._clients: dict[str, Client] = {}
        self._live: dict[Upstream, LiveUpstream] = {}
        self._routes: dict[str, LiveRoute] = {}
        self._waiting: dict[str, LiveRoute] = {}  # routes with somebody in line
        self._saved_budgets: dict[str, dict[str, bytes]] = {}
        self._bequests: dict[str, Bequest] = {}  # for routes that have not been built yet
        self._transition = _teller(telemetry)
        self._exchanges = 0
        self._left: asyncio.Future[None] | None = None  # somebody waits until the last exchange has left
        for provider in config.providers.values():
            self._add_provider(provider)
        named = [one for route in config.routes.values() for tier in (*route.tiers, route.auxiliary) for one in tier]
        telemetry.declare(config.routes, tuple(DIALECTS), [(one.provider, one.model) for one in named])

    # --- building ---------------------------------------------------------------------------------------------------

    def _add_provider(self, config: ProviderConfig) -> None:
        client = self._clients[config.name] = Client()
        policy = self._config.defaults.breaker
        accounts = []
        for key in config.keys:
            breaker = Breaker(f"{config.name}/{ACCOUNT}", policy, self._transition)
            account = Account(config, key, Quota(config.limits), breaker, self._config.defaults.answer_timeout_s)
            self._accounts[account.id] = account
            accounts.append((account, key))
        for upstream in config.upstreams:
            account, key = accounts[upstream.key]
            breaker = Breaker(f"{config.name}/{upstream.model}", policy, self._transition)
            urls = config.base_urls or {upstream.dialect: self._simulated[config.name]}
            faces = {
                name: _face(config, key, upstream.in_dialect(name), DIALECTS[name], url)
                for name, url in urls.items()
                if name in DIALECTS
            }
            self._live[upstream] = LiveUpstream(upstream, account, breaker, client, faces)

    def route(self, name: str) -> LiveRoute | None:
        """The live route a public model name stands for."""
        config = self._config.resolve(name)
        if config is None:
            return None
        live = self._routes.get(config.name)
        if live is None:
            live = self._routes[config.name] = self._build_route(config)
        return live

    def _build_route(self, config: RouteConfig) -> LiveRoute:
        tiers = tuple(self._build_tier(tier) for tier in config.tiers)
        auxiliary = (self._build_tier(config.auxiliary),) if config.auxiliary else ()
        now, wall = self._clock(), time.time()
        bequest = self._bequests.pop(config.name, None)
        if bequest is None:
            ledgers = [self._restored(scope, limits, now, wall) for scope, limits in _budgets(config).items()]
            return LiveRoute(config, self._config.defaults, tiers, auxiliary, *ledgers)
        ledgers = [
            _heir(former, bequest.limits[scope], limits, now, wall)
            for former, (scope, limits) in zip(bequest.budgets, _budgets(config).items(), strict=True)
        ]
        route = LiveRoute(config, self._config.defaults, tiers, auxiliary, *ledgers)
        route.line = bequest.line
        return route

    def _restored(self, scope: str, limits: Sequence[Limit], now: float, wall: float) -> Quota:
        """A budget's ledger, with what was spent before the restart."""
        ledger = Quota(limits)
        ledger.restore(self._saved_budgets.get(scope, {}), now, wall)
        return ledger

    def _build_tier(self, upstreams: Sequence[Upstream]) -> Tier:
        groups: dict[tuple[str, str], list[LiveUpstream]] = {}
        for upstream in upstreams:
            groups.setdefault((upstream.provider, upstream.wire_model), []).append(self._live[upstream])
        return tuple(tuple(group) for group in groups.values())

    async def wait(self, route: LiveRoute, rank: float, wait_s: float, reason: str, claim: Head | None = None) -> None:
        """Hold a request until it is worth planning again."""
        self._waiting[route.name] = route
        try:
            await route.line.wait(rank, wait_s, reason, claim)
        finally:
            if not route.line:
                self._waiting.pop(route.name, None)

    # --- attempts ---------------------------------------------------------------------------------------------------

    async def begin(
        self,
        plan: Plan,
        route: LiveRoute,
        head: Head,
        now: float,
        wall: float,
        exchange: ExchangeRecord,
        *,
        hedge: bool = False,
    ) -> Ticket | None:
        """Take what an attempt of the exchange needs; None if somebody else took the last of it since the plan."""
        live = plan.chosen
        if live is None or not (plan.forced or live.allows(now)):
            return None
        amount = expected_amount(live, head, now)
        wanted = [(live.account.quota, live.upstream.wire_model, amount)]
        wanted += [(budget, scope, Amount(0, 0, amount.usd)) for scope, budget in _charged(route, hedge=hedge)]
        reservations = _reserved(wanted, now, wall)
        if reservations is None:
            return None
        ticket = Ticket(
            live,
            live.breaker.begin(now, forced=plan.forced),
            live.account.breaker.begin(now, forced=plan.forced),
            reservations[0],
            reservations[1],
            reservations[2] if hedge else None,
            route,
            self._limits(plan, live, head, now),
            live.latency.begin_wait(head.prompt_tokens, now),
            head.prompt_tokens,
            now,
            conversation=head.conversation,
            exchange=exchange.id,
            dialect=exchange.dialect,
        )
        live.in_flight += 1
        await self._write_ahead(ticket, head, now, wall)
        return ticket

    def _limits(self, plan: Plan, live: LiveUpstream, head: Head, now: float) -> Limits:
        limits, defaults, patience = live.account.limits, self._config.defaults, live.patience
        first_s = patience.first_token_s(head.prompt_tokens, defaults.first_token_floor_s, limits.first_token_s)
        stall_s = patience.stall_s(head.prompt_tokens, defaults.stall_floor_s, limits.stall_s)
        if plan.probe:
            probe_s = max(PROBE_PATIENCE_MIN_S, PROBE_PATIENCE * live.latency.first_token_s(head.prompt_tokens, now))
            first_s = min(first_s, probe_s)
        return Limits(first_s, stall_s, limits.answer_s)

    async def _write_ahead(self, ticket: Ticket, head: Head, now: float, wall: float) -> None:
        """Windows that outlive the process are on disk before the request leaves: a kill can never overspend them."""
        rows = self._ledger_rows(ticket, now, wall)
        if not rows:
            return
        try:
            await self._store.write(rows)
        except BaseException:
            self.settle(ticket, _UNSENT, Gate(whole=True), head, chunks=0, now=now, wall=wall)
            raise

    def _ledger_rows(self, ticket: Ticket, now: float, wall: float) -> list[Row]:
        account, model = ticket.live.account, ticket.live.upstream.wire_model
        rows = []
        if account.quota.persistent(model):
            rows = [
                Row("quota", f"{account.id} {key}", value, wall)
                for key, value in account.quota.rows(now, wall, ticket.reservation)
            ]
        for scope, budget in _charged(ticket.route, hedge=ticket.hedge is not None):
            if budget.persistent(scope):
                rows += [Row("budget", f"{scope} {key}", value, wall) for key, value in budget.rows(now, wall)]
        return rows

    async def post(self, ticket: Ticket, body: bytes) -> Reply:
        live = ticket.live
        ticket.sent = True
        try:
            reply = await live.client.post(ticket.target, body, ticket.note_resend)
        except ConnectFailed:
            ticket.sent = False
            raise
        ticket.connected = True
        return reply

    def first_token(self, ticket: Ticket, now: float) -> None:
        """The first content token is here."""
        ticket.first_token_at = now
        latency = ticket.live.latency
        latency.end_wait(ticket.wait_ticket)
        latency.observe_first_token(ticket.prompt_tokens, now - ticket.began_at, now)

    def note_headers(self, ticket: Ticket, headers: Mapping[str, str]) -> None:
        """Let a good answer's rate-limit headers correct the ledger."""
        reports = ticket.live.account.hooks.limit_reports(200, headers, time.time())
        if reports:
            self._reconcile(ticket, reports)

    def judge(self, ticket: Ticket, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """Classify a refusal, and let what it says of limits correct the ledger."""
        failure, reports = judge(ticket.live.account.hooks, status, headers, body, time.time())
        self._reconcile(ticket, reports)
        return failure

    def judge_fault(self, ticket: Ticket, fault: Fault) -> Failure:
        failure, reports = judge_fault(ticket.live.account.hooks, fault, time.time())
        self._reconcile(ticket, reports)
        return failure

    def _reconcile(self, ticket: Ticket, reports: tuple[LimitReport, ...]) -> None:
        ticket.reports = reports
        ticket.live.account.quota.reconcile(
            reports, ticket.live.upstream.wire_model, self._clock(), time.time(), reservation=ticket.reservation
        )

    def remember(self, ticket: Ticket, gate: Gate) -> None:
        """Keep what came with an answer's tool calls, for the history in which a client may leave it out.

        Of an answer without calls, no more than who sealed its thinking.
        """
        if not gate.calls and not gate.sealed:
            return
        wall = time.time()
        came_with = gate.remembered(ticket.live.upstream.author)
        keys = [call.id for call in gate.calls]
        if not keys:
            seals = tuple(Reasoning("", block.signature, block.sealed) for block in came_with.thinking if block.seal)
            came_with = Remembered(came_with.author, seals)
            keys = [seal_key(block.seal) for block in seals]
        self._save_memory(self.memory.remember(ticket.conversation, keys, came_with, wall), wall)

    def _save_memory(self, rows: Sequence[tuple[str, bytes]], wall: float) -> None:
        if rows:
            self._store.enqueue([Row("reasoning", key, value, wall) for key, value in rows])

    # --- settling ---------------------------------------------------------------------------------------------------

    def settle(
        self, ticket: Ticket, failure: Failure | None, gate: Gate, head: Head, *, chunks: int, now: float, wall: float
    ) -> AttemptRecord:
        """Give back what was taken and learn from how it ended."""
        live = ticket.live
        live.in_flight -= 1
        live.latency.end_wait(ticket.wait_ticket)
        lesson = SUCCESS if failure is None else verdict(failure)
        usage = _usage(ticket, gate, head, failure)
        cost_usd = _cost_usd(live.upstream, usage)
        self._teach_breakers(ticket, failure, lesson, now)
        self._teach_latency(ticket, failure, lesson, usage, head, now)
        self._settle_quota(ticket, failure, lesson, usage, cost_usd, now, wall)
        if failure is None and usage is not None:
            self._affinity.remember(head.conversation, live.id, usage.input_tokens or head.prompt_tokens, now)
        record = ticket.record = _attempt_record(ticket, failure, usage, cost_usd, chunks, now)
        self._telemetry.attempt(record)
        self._store.record((_entry(ticket, record, wall),))
        for route in tuple(self._waiting.values()):
            route.line.wake()
        return record

    def _teach_breakers(self, ticket: Ticket, failure: Failure | None, lesson: Verdict, now: float) -> None:
        upstream, account = ticket.live.breaker, ticket.live.account.breaker
        if failure is not None and failure.account_wide:
            upstream.neutral(ticket.permit, now)
            _teach(account, ticket.account_permit, lesson, failure, now)
            return
        _teach(upstream, ticket.permit, lesson, failure, now)
        if ticket.connected:
            account.success(ticket.account_permit, now)
        else:
            account.neutral(ticket.account_permit, now)

    def _teach_latency(
        self, ticket: Ticket, failure: Failure | None, lesson: Verdict, usage: Usage | None, head: Head, now: float
    ) -> None:
        latency, first_at = ticket.live.latency, ticket.first_token_at
        if lesson.breaker == "success":
            latency.observe_success(now)
            if first_at is not None:
                ticket.live.patience.observe(head.prompt_tokens, first_at - ticket.began_at, ticket.longest_gap_s)
            if first_at is not None and usage is not None:
                latency.observe_rate(usage.output_tokens, now - first_at, now)
        elif lesson.breaker in ("failure", "trip"):
            waited_s = 0.0 if first_at is not None else now - ticket.began_at
            if failure is None or failure.outcome is not Outcome.CANCELLED:
                latency.observe_failure(head.prompt_tokens, waited_s, now)
            elif waited_s > latency.first_token_s(head.prompt_tokens, now):  # outrun: so long at least it would take
                latency.observe_first_token(head.prompt_tokens, waited_s, now)

    def _settle_quota(
        self,
        ticket: Ticket,
        failure: Failure | None,
        lesson: Verdict,
        usage: Usage | None,
        cost_usd: float,
        now: float,
        wall: float,
    ) -> None:
        quota, model = ticket.live.account.quota, ticket.live.upstream.wire_model
        if lesson.quota in ("settle", "release") and usage is not None:
            tokens = usage.input_tokens + usage.output_tokens
            quota.settle(ticket.reservation, Amount(1 + ticket.resends, tokens, cost_usd), now, wall)
        else:
            # A request that was taken and then failed may have been counted over there; one never taken was not.
            counted = ticket.sent and failure is not None and failure.outcome is Outcome.UNAVAILABLE
            quota.settle(ticket.reservation, Amount(counted + ticket.resends, 0.0, 0.0), now, wall)
        ticket.route.budget.settle(ticket.budget, Amount(0, 0, cost_usd), now, wall)
        if ticket.hedge is not None:
            ticket.route.hedge_budget.settle(ticket.hedge, Amount(0, 0, cost_usd), now, wall)
        if failure is None:
            quota.clear(model, now, since=ticket.began_at)
        elif lesson.quota in ("empty", "close"):
            _block(ticket, failure, lesson, now, wall)
        rows = self._ledger_rows(ticket, now, wall)
        if lesson.quota == "close":
            rows += [
                Row("quota", f"{ticket.live.account.id} {key}", value, wall) for key, value in quota.rows(now, wall)
            ]
        if rows:
            self._store.enqueue(rows)

    # --- what is shown ----------------------------------------------------------------------------------------------

    def rate_limit_headers(self, route: LiveRoute, wall: float) -> dict[str, str]:
        """What the route's quotas add up to, in the headers agents read; resets are plain seconds."""
        if wall - route.headers_at >= HEADERS_FRESH_S or wall < route.headers_at:
            route.headers, route.headers_at = self._sum_headers(route, self._clock(), wall), wall
        return route.headers

    def _sum_headers(self, route: LiveRoute, now: float, wall: float) -> dict[str, str]:
        sums: dict[str, list[float]] = {}
        for live in route.upstreams():
            statuses = live.account.quota.status(now, wall, live.upstream.wire_model)
            for unit in ("requests", "tokens"):
                tightest = min(
                    (status for status in statuses if status.unit == unit), key=lambda s: s.remaining, default=None
                )
                if tightest is not None:
                    total = sums.setdefault(unit, [0.0, 0.0, 0.0])
                    total[0] += tightest.limit
                    total[1] += tightest.remaining
                    total[2] = max(total[2], tightest.reset_wall - wall)
        names = ("limit", "remaining", "reset")
        return {
            f"x-ratelimit-{name}-{unit}": str(int(value))
            for unit, values in sums.items()
            for name, value in zip(names, values, strict=True)
        }

    def unready(self, now: float, wall: float) -> dict[str, str]:
        """Why nobody is admissible, by upstream; empty if somebody is."""
        reasons = {}
        for live in self._live.values():
            name = f"{live.upstream.provider}/{live.upstream.model}"
            if not live.allows(now):
                reasons[name] = f"breaker open for {live.reopens_in_s(now):.0f} s"
            elif (wait_s := live.account.quota.wait_s(live.upstream.wire_model, Amount(), now, wall)) > 0:
                reasons[name] = f"quota used up for {wait_s:.0f} s"
            else:
                return {}
        return reasons or {"": "no upstream is configured"}

    def admissible(self, now: float, wall: float) -> tuple[int, int]:
        """How many upstreams would take a request now, and how many there are."""
        able = sum(
            live.allows(now) and live.account.quota.wait_s(live.upstream.wire_model, Amount(), now, wall) <= 0
            for live in self._live.values()
        )
        return able, len(self._live)

    @property
    def accounts(self) -> Collection[Account]:
        return self._accounts.values()

    def shown_routes(self) -> list[LiveRoute]:
        """The configured ones, then the models that were asked for."""
        names = dict.fromkeys((*self._config.routes, *self._routes))
        return [route for route in map(self.route, names) if route is not None]

    @property
    def store_warnings(self) -> tuple[str, ...]:
        return self._store.warnings

    def snapshot(self) -> Live:
        """Every state a scrape shows."""
        now, wall = self._clock(), time.time()
        live = Live()
        for account in self._accounts.values():
            live.breakers.append((account.provider, ACCOUNT, account.breaker.state))
            for limit in account.quota.status(now, wall):
                live.quotas.append((account.provider, limit.name, limit.limit, limit.remaining, limit.reset_wall))
        for one in self._live.values():
            provider, model = one.upstream.provider, one.upstream.model
            live.breakers.append((provider, model, one.breaker.state))
            live.latencies.append((provider, model, one.latency.first_token_s(0, now)))
            live.scores += [(route, provider, model, score) for route, score in one.scores.items()]
        live.breakers = _best_states(live.breakers)
        live.latencies = list({row[:2]: row for row in live.latencies}.values())
        live.scores = list({row[:3]: row for row in live.scores}.values())
        for name in self._config.routes:
            route = self.route(name)  # built here if nobody has asked for it yet: its budget is there all the same
            if route is not None:
                for scope, budget in _charged(route, hedge=True):
                    status = budget.status(now, wall)
                    live.budgets += [(scope, one.limit, one.remaining, one.reset_wall) for one in status]
        live.quotas = _added_up(live.quotas)
        return live

    # --- what outlives the process ----------------------------------------------------------------------------------

    async def restore(self, previous: Pool | None = None) -> None:
        """Take up where the last process left off; at a reload, where the pool of the config before this one stands.

        That pool may go on serving the exchanges it has. What both speak of is one and the same object from now on, so
        neither is blind to what the other learns; only a limit or a breaker that is set differently is a new one.
        """
        quotas = _by_owner(await self._store.load("quota"))
        self._saved_budgets = _by_owner(await self._store.load("budget"))
        if previous is None:
            await self._restore_today(time.time())
        upstreams = await self._store.load("upstream")
        reasoning = await self._store.load("reasoning") if previous is None else {}
        now, wall = self._clock(), time.time()
        self._save_memory(self.memory.restore(reasoning, wall), wall)
        # Nothing is awaited from here on: no route of the previous pool may come into being unnoticed.
        heirs = set() if previous is None else self._inherit(previous.bequeath(), now, wall)
        for account in self._accounts.values():
            if account not in heirs:
                account.quota.restore(quotas.get(account.id, {}), now, wall)
        for live in self._live.values():
            if live not in heirs:
                _restore_upstream(live, upstreams.get(live.id), now, wall)

    async def _restore_today(self, wall: float) -> None:
        """What was spent since midnight is shown; not to know it is no reason not to start."""
        today = self._telemetry.today
        try:
            totals = await self._store.totals(today.midnight(wall), ("provider", "model"))
        except StateError as error:
            self._telemetry.log.warning("state", message=f"what was spent today is not known: {error}")
        else:
            today.take_up({one.group: msgspec.convert(one, Spent, from_attributes=True) for one in totals}, wall)

    def bequeath(self) -> Estate:
        """What the pool of the next config goes on with."""
        self.checkpoint()  # for whatever that config does not know and a later one knows again
        routes = dict(self._bequests)
        for name, route in self._routes.items():
            budgets = (route.budget, route.hedge_budget)
            routes[name] = Bequest(budgets, _budgets(self._config.resolve(name), name), route.line)
        return Estate(self._config, self._accounts, self._live, routes, self._affinity, self._waiting, self.memory)

    def _inherit(self, estate: Estate, now: float, wall: float) -> set[Account | LiveUpstream]:
        """Take over what is in memory. Returns those who got something."""
        heirs: set[Account | LiveUpstream] = set()
        same_breakers = self._config.defaults.breaker == estate.config.defaults.breaker
        for account in self._accounts.values():
            former = estate.accounts.get(account.id)
            if former is not None:
                was, limits = (one.providers[account.provider].limits for one in (estate.config, self._config))
                account.quota = _heir(former.quota, was, limits, now, wall)
                _inherit_breaker(account, former, now, same=same_breakers)
                heirs.add(account)
        known = {(live.id, live.upstream.model): live for live in estate.live.values()}
        for live in self._live.values():
            before = known.get((live.id, live.upstream.model))
            if before is not None:
                live.latency, live.patience = before.latency, before.patience
                _inherit_breaker(live, before, now, same=same_breakers)
                heirs.add(live)
        self._bequests = estate.routes
        self._waiting = estate.waiting
        self._affinity = estate.affinity
        self.memory = estate.memory
        self.planner = Planner(self._affinity)
        return heirs

    # --- how long it is needed --------------------------------------------------------------------------------------

    def enter(self) -> None:
        """An exchange begins; it keeps this pool until it leaves, whatever is reloaded meanwhile."""
        self._exchanges += 1

    def leave(self) -> None:
        self._exchanges -= 1
        if not self._exchanges and self._left is not None and not self._left.done():
            self._left.set_result(None)

    async def last_has_left(self) -> None:
        """Wait until no exchange uses this pool any more. Only for a pool that gets no new ones, and for one caller."""
        if self._exchanges:
            self._left = asyncio.get_running_loop().create_future()
            await self._left

    def checkpoint(self) -> None:
        """Save estimates and breakers.

        Ledgers are saved as they change, and here once more: after a reload an exchange of the old config may have
        written the last state of a limit that by then was another.
        """
        now, wall = self._clock(), time.time()
        rows = [
            Row("quota", f"{account.id} {key}", value, wall)
            for account in self._accounts.values()
            for key, value in account.quota.rows(now, wall)
        ]
        rows += [
            Row("budget", f"{scope} {key}", value, wall)
            for route in self._routes.values()
            for scope, budget in _charged(route, hedge=True)
            for key, value in budget.rows(now, wall)
        ]
        for live in self._live.values():
            saved = SavedUpstream(live.breaker.snapshot(now), live.latency.snapshot(now), wall)
            rows.append(Row("upstream", live.id, msgspec.json.encode(saved), wall))
        rows += [Row("reasoning", key, value, wall) for key, value in self.memory.expire(wall)]
        self._store.enqueue(rows)

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


class Bequest(msgspec.Struct, frozen=True):
    """A route's two ledgers, the limits those were made for, and the line of those who wait."""

    budgets: tuple[Quota, Quota]
    limits: Mapping[str, tuple[Limit, ...]]
    line: WaitingLine


class Estate(msgspec.Struct, frozen=True):
    """What one pool leaves to the next. Routes take shape only when they are asked for, so theirs may wait there."""

    config: Config
    accounts: Mapping[str, Account]
    live: Mapping[Upstream, LiveUpstream]
    routes: dict[str, Bequest]
    affinity: Affinity
    waiting: dict[str, LiveRoute]
    memory: Memory


class SavedUpstream(msgspec.Struct, frozen=True):
    """What is worth keeping of one upstream across a restart."""

    breaker: BreakerSnapshot
    latency: LatencySnapshot
    wall: float


_UNSENT = Failure(Outcome.CANCELLED, Side.ROUTER, "never sent")


def _teller(telemetry: Telemetry) -> Listener:
    """A breaker's listener. It knows of no pool, for breakers outlive the one they were made in."""

    def tell(name: str, before: str, after: str) -> None:
        provider, _, model = name.partition("/")
        telemetry.transition(provider, model, before, after)

    return tell


def _budgets(config: RouteConfig | None, name: str = "") -> dict[str, tuple[Limit, ...]]:
    """The limits of a route's budget and of its budget for hedging, by what those are called."""
    if config is None:
        return {name: (), hedge_scope(name): ()}
    return {
        config.name: () if config.budget is None else (config.budget,),
        hedge_scope(config.name): () if config.hedge_budget is None else (config.hedge_budget,),
    }


def _charged(route: LiveRoute, *, hedge: bool) -> list[tuple[str, Quota]]:
    """The budgets that an attempt is charged to, by what they are called."""
    charged = [(route.name, route.budget)]
    return [*charged, (route.hedge_scope, route.hedge_budget)] if hedge else charged


def _reserved(wanted: Sequence[tuple[Quota, str, Amount]], now: float, wall: float) -> list[Reservation] | None:
    """A reservation in each ledger, or in none of them."""
    taken: list[Reservation] = []
    for quota, name, amount in wanted:
        reservation = quota.reserve(name, amount, now, wall)
        if reservation is None:
            for (other, _, _), earlier in zip(wanted, taken, strict=False):
                other.release(earlier, now, wall)
            return None
        taken.append(reservation)
    return taken


def _inherit_breaker(heir: Account | LiveUpstream, former: Account | LiveUpstream, now: float, *, same: bool) -> None:
    if same:
        heir.breaker = former.breaker
    else:
        heir.breaker.restore(former.breaker.snapshot(now), now)


def _heir(former: Quota, former_limits: Sequence[Limit], limits: Sequence[Limit], now: float, wall: float) -> Quota:
    """The ledger for these limits: the very same if they have not changed, else a new one that keeps what was spent."""
    if tuple(former_limits) == tuple(limits):
        return former
    return Quota(limits, previous=former, now=now, wall=wall)


def _usage(ticket: Ticket, gate: Gate, head: Head, failure: Failure | None) -> Usage | None:
    """What the upstream says it used; an estimate where it began an answer and never said, or was never let finish.

    An answer that opened has had its prompt read, and that is billed, whether or not anything came of it.
    """
    if gate.usage is not None:
        return gate.usage
    cut_off = ticket.sent and failure is not None and failure.outcome is Outcome.CANCELLED
    opened = gate.start is not None and failure is not None and failure.outcome is not Outcome.IN_BAND_ERROR
    if gate.started or failure is None or cut_off or opened:
        return Usage(input_tokens=head.prompt_tokens, output_tokens=gate.characters // CHARACTERS_PER_TOKEN)
    return None


def _cost_usd(upstream: Upstream, usage: Usage | None) -> float:
    """Ours by the price list; the upstream's own figure where it is of the same size, for it knows its discounts."""
    if usage is None:
        return 0.0
    ours = upstream.price.cost_usd(usage.input_tokens, usage.output_tokens, usage.cached_tokens)
    theirs = usage.cost_usd
    if theirs is not None and ours > 0 and ours / COST_TRUST <= theirs <= ours * COST_TRUST:
        return theirs
    return ours


def _teach(breaker: Breaker, permit: Permit, lesson: Verdict, failure: Failure | None, now: float) -> None:
    retry_after_s = failure.retry_after_s if failure is not None else None
    if lesson.breaker == "success":
        breaker.success(permit, now)
    elif lesson.breaker == "failure":
        breaker.failure(permit, now, random.random(), retry_after_s)
    elif lesson.breaker == "trip":
        breaker.trip(permit, now, random.random(), retry_after_s)
    else:
        breaker.neutral(permit, now)


def _block(ticket: Ticket, failure: Failure, lesson: Verdict, now: float, wall: float) -> None:
    """Close the quota that the upstream says is used up."""
    ticket.live.account.quota.block(
        ticket.live.upstream.wire_model,
        "rate_limited" if lesson.quota == "empty" else "exhausted",
        now,
        wall,
        until_now=None if failure.retry_after_s is None else now + failure.retry_after_s,
        per=next((report.per for report in ticket.reports if report.per is not None and report.remaining == 0), None),
        account_wide=failure.account_wide,
        draw=random.random(),
    )


def _attempt_record(
    ticket: Ticket, failure: Failure | None, usage: Usage | None, cost_usd: float, chunks: int, now: float
) -> AttemptRecord:
    upstream = ticket.live.upstream
    first_s = None if ticket.first_token_at is None else ticket.first_token_at - ticket.began_at
    return AttemptRecord(
        upstream.provider,
        upstream.model,
        Outcome.SUCCESS if failure is None else failure.outcome,
        status=None if failure is None else failure.status,
        code="" if failure is None else failure.code,
        duration_s=now - ticket.began_at,
        first_token_s=first_s,
        chunks=chunks,
        usage=usage,
        cost_usd=cost_usd,
    )


def _entry(ticket: Ticket, record: AttemptRecord, wall: float) -> Entry:
    """The attempt as the ledger keeps it."""
    usage = record.usage or NO_USAGE
    return Entry(
        wall,
        ticket.exchange,
        ticket.route.name,
        ticket.dialect,
        record.provider,
        record.model,
        record.outcome,
        record.code,
        record.status,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        usage.reasoning_tokens,
        record.cost_usd,
        record.duration_s,
        record.first_token_s,
    )


def _face(config: ProviderConfig, key: Secret, upstream: Upstream, dialect: Dialect, base_url: str) -> Face:
    """The upstream in one dialect. Its ``continuation_root`` replaces the base URL's path."""
    headers = dict(dialect.upstream_headers) | _auth_headers(config, key, dialect.name)
    target = Target(base_url.rstrip("/") + dialect.upstream_path, headers)
    root = upstream.fix.continuation_root
    if not root or upstream.fix.continuation not in dialect.continuations:
        return Face(dialect, upstream, target, target)
    url = urlsplit(base_url)._replace(path=root).geturl()
    return Face(dialect, upstream, target, Target(url.rstrip("/") + dialect.upstream_path, headers))


def _auth_headers(config: ProviderConfig, key: Secret, dialect: str) -> dict[str, str]:
    headers = dict(config.headers)
    if key and config.dialect_auth.get(dialect, config.auth) == "bearer":
        headers["Authorization"] = f"Bearer {key.reveal()}"
    elif key:
        headers["x-api-key"] = key.reveal()
    return headers


def _by_owner(rows: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """``owner rest-of-key`` -> owner -> rest -> value."""
    owned: dict[str, dict[str, bytes]] = {}
    for key, value in rows.items():
        owner, _, rest = key.partition(" ")
        owned.setdefault(owner, {})[rest] = value
    return owned


def _restore_upstream(live: LiveUpstream, value: bytes | None, now: float, wall: float) -> None:
    if value is None:
        return
    try:
        saved = msgspec.json.decode(value, type=SavedUpstream)
    except msgspec.DecodeError:
        return
    elapsed_s = max(0.0, wall - saved.wall)
    live.breaker.restore(saved.breaker, now, elapsed_s=elapsed_s)
    live.latency.restore(saved.latency, now, elapsed_s=elapsed_s)


def _added_up(quotas: Sequence[Quotas]) -> list[Quotas]:
    """One row per provider and limit: the keys of a pool are not told apart in metrics."""
    rows: dict[tuple[str, str], Quotas] = {}
    for provider, name, limit, left, reset in quotas:
        _, _, limit_so_far, left_so_far, reset_so_far = rows.get((provider, name), (provider, name, 0.0, 0.0, 0.0))
        rows[provider, name] = (provider, name, limit_so_far + limit, left_so_far + left, max(reset, reset_so_far))
    return list(rows.values())


def _best_states(breakers: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """One row per provider and model: a pool is as good as its best key."""
    best: dict[tuple[str, str], str] = {}
    for provider, model, state in breakers:
        seen = best.get((provider, model), state)
        best[provider, model] = min(seen, state, key=STATES_BEST_FIRST.index)
    return [(provider, model, state) for (provider, model), state in best.items()]
