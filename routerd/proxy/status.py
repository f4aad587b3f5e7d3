"""What a person is shown: one snapshot of everything, for ``GET /status``, the page and ``routerd status``.

It is made on request from what is alive, changes nothing, and holds nothing that anybody said: no prompt, no key, no
upstream's own words. Times to come are seconds from ``at``, so that whoever shows them can count them down without
having the same clock. A catalog offers hundreds of models; only those of configured routes, and those somebody asked
for, are listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from routerd import __version__, catalog
from routerd.canonical import Outcome, Price
from routerd.config import Config
from routerd.policy.meters import Amount
from routerd.proxy.live import LiveRoute, LiveUpstream
from routerd.proxy.pool import Pool
from routerd.telemetry import Spent, Telemetry

USUAL_PROMPT_TOKENS = 20_000  # an agent's turn: what the latency is estimated for
LITTLE = Amount(1.0, 1.0, 1e-9)  # the least a request can need ...
LITTLE_UNPAID = Amount(1.0, 1.0, 0.0)  # ... where it costs nothing
STATES_WORST_FIRST = ("open", "half-open", "closed")

RouteState = Literal["serving", "fallback", "down"]


class Obstacle(msgspec.Struct, frozen=True):
    """Why an upstream gets no requests. ``wait_s``: for how long, if that is known.

    ``reason``: ``breaker``; ``account``, the breaker of all its key's models; ``limit``, one of its quotas is used up;
    ``refused``, the provider turned requests away.
    """

    reason: str
    text: str
    wait_s: float | None


class TierStatus(msgspec.Struct, frozen=True):
    """How many of a tier's upstreams would take a request now."""

    upstreams: tuple[str, ...]  # provider/model
    admissible: int
    total: int


class WaitingStatus(msgspec.Struct, frozen=True):
    """Requests that are held. ``reason`` and ``next_try_in_s`` are those of the first in line."""

    count: int
    reason: str
    next_try_in_s: float
    longest_s: float


class BudgetStatus(msgspec.Struct, frozen=True):
    name: str
    limit_usd: float
    remaining_usd: float
    reset_in_s: float


class RouteStatus(msgspec.Struct, frozen=True):
    """``serving``: the first tier can; ``fallback``: only a later one can; ``down``: nobody can."""

    name: str
    configured: bool
    state: RouteState
    tiers: tuple[TierStatus, ...]
    waiting: WaitingStatus | None
    budget: BudgetStatus | None


class UpstreamStatus(msgspec.Struct, frozen=True):
    """One provider and model, with all its keys: as good as the best of them."""

    provider: str
    model: str
    keys: int
    keys_admissible: int
    admissible: bool
    breaker: str
    reopens_in_s: float
    obstacle: Obstacle | None
    first_token_s: float
    tokens_per_s: float
    p_fail: float
    in_flight: int
    usd_per_million: Price
    context_tokens: int
    max_output_tokens: int | None


class QuotaStatus(msgspec.Struct, frozen=True):
    """One limit of one provider, all its keys together."""

    provider: str
    name: str
    unit: str
    limit: float
    remaining: float
    reset_in_s: float


class SpentStatus(msgspec.Struct, frozen=True):
    provider: str
    model: str
    attempts: int
    failures: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_usd: float


class SpentToday(msgspec.Struct, frozen=True):
    since: float
    cost_usd: float
    upstreams: tuple[SpentStatus, ...]


class Failover(msgspec.Struct, frozen=True):
    """``target`` empty: nobody came next, and the client was told. ``source`` empty: nobody had been asked."""

    at: float
    exchange: str
    route: str
    source: str
    target: str
    outcome: Outcome
    code: str
    status: int | None
    detail: str


class Warning(msgspec.Struct, frozen=True):  # noqa: A001 - that is what it is
    path: str
    message: str


class PricesStatus(msgspec.Struct, frozen=True):
    """A source of fresh prices.

    ``age_s``: since its last good answer; None: there was none. ``result``: of the last attempt (fresh, unchanged,
    failed, rejected); empty: none since the start.
    """

    age_s: float | None
    models: int
    result: str


class Status(msgspec.Struct, frozen=True):
    """``at`` and ``since`` are Unix seconds."""

    version: str
    at: float
    uptime_s: float
    simulated: bool
    config: str
    catalog_as_of: str
    open_requests: int
    routes: tuple[RouteStatus, ...]
    upstreams: tuple[UpstreamStatus, ...]
    quotas: tuple[QuotaStatus, ...]
    today: SpentToday
    failovers: tuple[Failover, ...]
    warnings: tuple[Warning, ...]
    prices: dict[str, PricesStatus] = {}  # by source; empty: none are fetched


class Moment(msgspec.Struct, frozen=True):
    """When the snapshot is taken, on all three clocks: ``now`` monotonic, ``wall`` Unix seconds, since the start."""

    now: float
    wall: float
    uptime_s: float


def snapshot(config: Config, pool: Pool, telemetry: Telemetry, moment: Moment, *, open_requests: int) -> Status:
    """Everything as it is now."""
    routes = pool.shown_routes()
    return Status(
        version=__version__,
        at=moment.wall,
        uptime_s=moment.uptime_s,
        simulated=config.simulated,
        config=str(config.source or ""),
        catalog_as_of=catalog.load().as_of,
        open_requests=open_requests,
        routes=tuple(_route(route, moment, configured=route.name in config.routes) for route in routes),
        upstreams=tuple(_upstream(group, moment) for group in _groups(routes)),
        quotas=_quotas(pool, moment),
        today=_today(telemetry, moment),
        failovers=tuple(_failovers(telemetry)),
        warnings=tuple(_warnings(config, pool, telemetry)),
        prices=_prices(telemetry, moment),
    )


# --- routes ---------------------------------------------------------------------------------------------------------


def _route(route: LiveRoute, moment: Moment, *, configured: bool) -> RouteStatus:
    tiers = tuple(_tier(route, tier, moment) for tier in route.tiers)
    return RouteStatus(
        route.name,
        configured,
        "serving"
        if tiers and tiers[0].admissible
        else "fallback"
        if any(tier.admissible for tier in tiers)
        else "down",
        tiers,
        _waiting(route, moment),
        _budget(route, moment),
    )


def _tier(route: LiveRoute, tier: Sequence[Sequence[LiveUpstream]], moment: Moment) -> TierStatus:
    able = sum(any(_serves(route, live, moment) for live in group) for group in tier)
    return TierStatus(tuple(dict.fromkeys(_name(group[0]) for group in tier)), able, len(tier))


def _serves(route: LiveRoute, live: LiveUpstream, moment: Moment) -> bool:
    within_budget = route.budget.wait_s(route.name, _least(live), moment.now, moment.wall) <= 0
    return within_budget and _obstacle(live, moment) is None


def _waiting(route: LiveRoute, moment: Moment) -> WaitingStatus | None:
    line = route.line.waiting()
    if line is None:
        return None
    return WaitingStatus(line.count, line.reason, line.next_try_in_s, moment.now - line.oldest_rank)


def _budget(route: LiveRoute, moment: Moment) -> BudgetStatus | None:
    for limit in route.budget.status(moment.now, moment.wall):
        return BudgetStatus(limit.name, limit.limit, limit.remaining, limit.reset_wall - moment.wall)
    return None


# --- upstreams ------------------------------------------------------------------------------------------------------


def _groups(routes: Iterable[LiveRoute]) -> list[Sequence[LiveUpstream]]:
    """The keys of each provider and model that a route leads to."""
    groups: dict[str, Sequence[LiveUpstream]] = {}
    for route in routes:
        for tier in (*route.tiers, *route.auxiliary):
            for group in tier:
                groups.setdefault(_name(group[0]), group)
    return list(groups.values())


def _name(live: LiveUpstream) -> str:
    return f"{live.upstream.provider}/{live.upstream.model}"


def _upstream(group: Sequence[LiveUpstream], moment: Moment) -> UpstreamStatus:
    obstacles = [_obstacle(live, moment) for live in group]
    able = obstacles.count(None)
    best = min(range(len(group)), key=lambda place: _badness(group[place], obstacles[place]))
    live, obstacle, now = group[best], obstacles[best], moment.now
    upstream, latency = live.upstream, live.latency
    return UpstreamStatus(
        provider=upstream.provider,
        model=upstream.model,
        keys=len(group),
        keys_admissible=able,
        admissible=able > 0,
        breaker=min(live.breaker.state, live.account.breaker.state, key=STATES_WORST_FIRST.index),
        reopens_in_s=live.reopens_in_s(now),
        obstacle=obstacle,
        first_token_s=latency.first_token_s(USUAL_PROMPT_TOKENS, now),
        tokens_per_s=1.0 / latency.pace_s(now),
        p_fail=latency.p_fail(now),
        in_flight=sum(one.in_flight for one in group),
        usd_per_million=upstream.price,
        context_tokens=upstream.context_tokens,
        max_output_tokens=upstream.max_output_tokens,
    )


def _badness(live: LiveUpstream, obstacle: Obstacle | None) -> tuple[float, bool]:
    if obstacle is None:
        return 0.0, live.suspect
    return math.inf if obstacle.wait_s is None else max(obstacle.wait_s, 1e-9), True


def _least(live: LiveUpstream) -> Amount:
    return LITTLE_UNPAID if live.upstream.price.free else LITTLE


def _obstacle(live: LiveUpstream, moment: Moment) -> Obstacle | None:
    now = moment.now
    for breaker, reason, text in (
        (live.account.breaker, "account", "breaker open for all of this key"),
        (live.breaker, "breaker", "breaker open"),
    ):
        if breaker.reopens_in_s(now) > 0:
            return Obstacle(reason, text, breaker.reopens_in_s(now))
    quota, model, least = live.account.quota, live.upstream.wire_model, _least(live)
    wait_s = quota.wait_s(model, least, now, moment.wall)
    if wait_s <= 0:
        return None
    known_s = None if math.isinf(wait_s) else wait_s
    spent = [
        limit.name
        for limit in quota.status(now, moment.wall, model)
        if limit.remaining < (least.usd if limit.unit == "usd" else 1.0)
    ]
    if spent:
        return Obstacle("limit", f"used up: {', '.join(spent)}", known_s)
    return Obstacle("refused", "the provider turned requests away", known_s)


# --- quotas, money, what happened -----------------------------------------------------------------------------------


def _quotas(pool: Pool, moment: Moment) -> tuple[QuotaStatus, ...]:
    rows: dict[tuple[str, str], QuotaStatus] = {}
    for account in pool.accounts:
        for limit in account.quota.status(moment.now, moment.wall):
            key = (account.provider, limit.name)
            so_far = rows.get(key) or QuotaStatus(*key, limit.unit, 0.0, 0.0, 0.0)
            rows[key] = QuotaStatus(
                *key,
                limit.unit,
                so_far.limit + limit.limit,
                so_far.remaining + limit.remaining,
                max(so_far.reset_in_s, limit.reset_wall - moment.wall),
            )
    return tuple(rows.values())


def _today(telemetry: Telemetry, moment: Moment) -> SpentToday:
    today = telemetry.today
    today.turn(moment.wall)
    rows = sorted(today.rows.items(), key=lambda row: -row[1].cost_usd)
    return SpentToday(
        today.began,
        sum(spent.cost_usd for _, spent in rows),
        tuple(_spent(provider, model, spent) for (provider, model), spent in rows),
    )


def _spent(provider: str, model: str, spent: Spent) -> SpentStatus:
    return SpentStatus(provider, model, *msgspec.structs.astuple(spent))


def _prices(telemetry: Telemetry, moment: Moment) -> dict[str, PricesStatus]:
    return {
        source: PricesStatus(
            None if one.checked_at is None else max(0.0, moment.wall - one.checked_at), one.models, one.result
        )
        for source, one in telemetry.prices.items()
    }


def _failovers(telemetry: Telemetry) -> Iterable[Failover]:
    """The latest first."""
    return (Failover(*msgspec.structs.astuple(one)) for one in reversed(telemetry.handovers))


def _warnings(config: Config, pool: Pool, telemetry: Telemetry) -> Iterable[Warning]:
    if telemetry.config_refused:
        yield Warning("", "the config file was changed and is bad: the one before it is still in force (see the log)")
    for sentence in pool.store_warnings:
        yield Warning("state", sentence)
    for problem in config.warnings:
        yield Warning(problem.path, problem.message)
