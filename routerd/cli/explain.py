"""``routerd explain``: who would serve a request now, in which order, and why.

It asks the daemon's own planner, over the configuration and a copy of the saved state, and so works beside a running
daemon or without one. What the state does not hold it says: prompt caches and requests in flight are known to the
running process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence

import msgspec

from routerd import cli
from routerd.canonical import Head, Upstream
from routerd.config import Config
from routerd.policy.balance import Terms
from routerd.proxy.live import LiveRoute, LiveUpstream, Tier
from routerd.proxy.planner import Obstacle, Plan
from routerd.proxy.pool import Pool
from routerd.state import StateError, Store
from routerd.state.memory import MemoryStore
from routerd.state.saved import saved_copy
from routerd.telemetry import Telemetry

NAME = "explain"
HELP = "show who would serve a request to a model or route, in which order, and the terms of each score"

USUAL_PROMPT_TOKENS = 20_000  # an agent's turn: system prompt, tools, some history
PROMPT_TOKENS_MAX = 100_000_000
SAVED_KINDS = ("quota", "budget", "upstream")

HEADINGS = ("TIER", "UPSTREAM", "WINDOW", "IN/OUT", "COST", "FIRST", "ALL", "TIME", "P_FAIL", "RETRY", "TOTAL", "NOTE")
NUMERIC = frozenset(HEADINGS) - {"TIER", "UPSTREAM", "NOTE"}
LEGEND = """
TOTAL = COST of the tokens + TIME (of ALL the answer, at the value of time) + RETRY (P_FAIL x another try), in USD.
FIRST is the wait for the first token; IN/OUT are prices in USD per million tokens.
"""
REASONS = {
    "capability": "takes no tools",
    "window": "the prompt is longer than its window",
    "quota": "quota used up",
    "breaker": "breaker open",
    "budget": "the route's budget is spent",
}


class Standing(msgspec.Struct):
    """How one upstream (all keys of one provider and model) stands with this request."""

    tier: int  # from 1
    upstream: Upstream
    keys: int
    terms: Terms | None = None  # None: left out
    obstacles: tuple[Obstacle, ...] = ()  # one for each key that is left out
    probe: bool = False

    @property
    def name(self) -> str:
        return f"{self.upstream.provider}/{self.upstream.model}"


class Explanation(msgspec.Struct):
    """The whole answer; ``standings`` in the order they would be tried, those left out last in their tier."""

    route: str
    head: Head
    value_of_time_usd_per_s: float
    basis: str
    plan: Plan
    standings: list[Standing]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a route (auto), a model, or provider/model")
    parser.add_argument(
        "--tokens", type=_tokens, default=USUAL_PROMPT_TOKENS, metavar="N", help="of the prompt (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    cli.add_config_argument(parser)


def _tokens(text: str) -> int:
    number = int(text.replace(",", ""))
    if not 0 < number <= PROMPT_TOKENS_MAX:
        raise argparse.ArgumentTypeError(f"must be from 1 to {PROMPT_TOKENS_MAX:,}")
    return number


def run(args: argparse.Namespace) -> int:
    loaded, _ = cli.load_priced(args)
    explanation = asyncio.run(_explain(loaded, _head(args.model, args.tokens)))
    if explanation is None:
        near = loaded.near(args.model)
        hint = f"near it: {', '.join(near)}" if near else "`routerd models` lists what is offered"
        print(f"there is no model or route {args.model!r}; {hint}", file=sys.stderr)
        return cli.EXIT_WRONG
    if args.json:
        print(json.dumps(_document(explanation), indent=1))
    else:
        _print(explanation)
    return cli.EXIT_FINE


def _head(model: str, prompt_tokens: int) -> Head:
    """A turn of an agent: streamed, with tools, the first of its conversation."""
    return Head(
        model=model,
        stream=True,
        tools=True,
        images=False,
        include_usage=True,
        max_output_tokens=None,
        prompt_tokens=prompt_tokens,
        conversation=0,
    )


# --- asking the planner ---------------------------------------------------------------------------------------------


async def _explain(loaded: Config, head: Head) -> Explanation | None:
    """None if there is no such model."""
    store, basis = _state(loaded)
    pool = Pool(loaded, store, Telemetry(io.BytesIO()), simulated=dict.fromkeys(loaded.providers, "http://localhost"))
    try:
        await pool.restore()
        route = pool.route(head.model)
        return None if route is None else _survey(pool, route, head, basis)
    finally:
        await pool.close()


def _state(loaded: Config) -> tuple[Store, str]:
    """The saved state, if it can be read, and what the answer rests on."""
    try:
        store = saved_copy(loaded.state_url, SAVED_KINDS)
    except StateError as error:
        return MemoryStore(), f"estimates are seeds, not from the running daemon: {error}"
    return store, f"estimates, breakers and quotas as last saved in {loaded.state_url.removeprefix('sqlite:')}"


def _survey(pool: Pool, route: LiveRoute, head: Head, basis: str) -> Explanation:
    now, wall = time.monotonic(), time.time()
    standings = [
        standing
        for place, tier in enumerate(route.tiers_for(head), 1)
        for standing in _tier(pool, route, place, tier, head, now, wall)
    ]
    plan = pool.planner.plan(route, head, now=now, wall=wall, draw=0.0)
    return Explanation(route.name, head, route.value_of_time_usd_per_s, basis, plan, standings)


def _tier(
    pool: Pool, route: LiveRoute, place: int, tier: Tier, head: Head, now: float, wall: float
) -> Iterator[Standing]:
    """Probes that are due go first, then the rest by score; at the end those left out."""
    admitted: dict[bool, list[tuple[LiveUpstream, Standing]]] = {True: [], False: []}
    left_out = []
    for group in tier:
        found = [(live, pool.planner.obstacle(route, live, head, now=now, wall=wall)) for live in group]
        obstacles = tuple(obstacle for _, obstacle in found if obstacle is not None)
        live = next((live for live, obstacle in found if obstacle is None), group[0])
        standing = Standing(place, live.upstream, len(group), obstacles=obstacles)
        if len(obstacles) == len(group):
            left_out.append(standing)
            continue
        standing.probe = live.suspect
        admitted[live.suspect].append((live, standing))
    for several in admitted.values():
        yield from _scored(pool, route, several, head, now)
    yield from left_out


def _scored(
    pool: Pool, route: LiveRoute, several: Sequence[tuple[LiveUpstream, Standing]], head: Head, now: float
) -> list[Standing]:
    """With the planner's own terms, the best first."""
    for (_, standing), terms in zip(
        several, pool.planner.terms(route, [live for live, _ in several], head, now), strict=True
    ):
        standing.terms = terms
    return sorted((standing for _, standing in several), key=_total_usd)


def _total_usd(standing: Standing) -> float:
    return math.inf if standing.terms is None else standing.terms.total_usd


# --- showing --------------------------------------------------------------------------------------------------------


def _print(explanation: Explanation) -> None:
    head = explanation.head
    hour_usd = explanation.value_of_time_usd_per_s * 3600
    print(f"{explanation.route}: {head.prompt_tokens:,} prompt tokens, with tools, no warm prompt cache")
    print(f"an hour of waiting is worth {hour_usd:.2f} USD")
    print(f"{explanation.basis}\n")
    cli.print_table(HEADINGS, [_row(standing) for standing in explanation.standings], NUMERIC)
    print(f"{LEGEND}{_verdict(explanation)}")


def _verdict(explanation: Explanation) -> str:
    plan = explanation.plan
    if plan.chosen is None:
        wait = "for good" if math.isinf(plan.wait_s) else f"for {_seconds(plan.wait_s)}"
        return f"nobody can serve this {wait}: {_why(plan)}"
    name = f"{plan.chosen.upstream.provider}/{plan.chosen.upstream.model}"
    if plan.forced:
        return f"next: {name}, though its breaker is open, for nobody else is left"
    return f"next: {name}" + (", as a probe of its breaker" if plan.probe else "")


def _why(plan: Plan) -> str:
    if math.isinf(plan.wait_s):
        return "the prompt is longer than every window" if plan.overflow else "nobody takes what the request contains"
    return REASONS.get(plan.reason, plan.reason)


def _row(standing: Standing) -> tuple[str, ...]:
    upstream, terms = standing.upstream, standing.terms
    return (
        str(standing.tier),
        standing.name,
        f"{upstream.context_tokens:,}",
        "free" if upstream.price.free else f"{upstream.price.input:g}/{upstream.price.output:g}",
        *(("",) * 7 if terms is None else _cells(terms)),
        _note(standing),
    )


def _cells(terms: Terms) -> tuple[str, ...]:
    return (
        f"{terms.cost_usd:.6f}",
        f"{terms.first_token_s:.1f} s",
        f"{terms.latency_s:.1f} s",
        f"{terms.latency_usd:.6f}",
        f"{terms.p_fail:.1%}",
        f"{terms.retry_usd:.6f}",
        f"{terms.total_usd:.6f}",
    )


def _note(standing: Standing) -> str:
    reasons = [_obstacle(obstacle) for obstacle in standing.obstacles]
    if standing.probe:
        return "a probe of its breaker is due"
    if standing.keys == 1:
        return "; ".join(reasons)
    out = f", {len(reasons)} left out ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
    return f"{standing.keys} keys{out}"


def _obstacle(obstacle: Obstacle) -> str:
    if obstacle.reason == "quota" and math.isinf(obstacle.wait_s):
        return "larger than its quota"
    wait = "" if math.isinf(obstacle.wait_s) else f" for {_seconds(obstacle.wait_s)}"
    return REASONS[obstacle.reason] + wait


def _seconds(seconds: float) -> str:
    """``35 s``, ``12 min`` or ``7.5 h``, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _document(explanation: Explanation) -> dict[str, object]:
    plan = explanation.plan
    chosen = None if plan.chosen is None else f"{plan.chosen.upstream.provider}/{plan.chosen.upstream.model}"
    return {
        "route": explanation.route,
        "prompt_tokens": explanation.head.prompt_tokens,
        "value_of_time_usd_per_s": explanation.value_of_time_usd_per_s,
        "basis": explanation.basis,
        "next": chosen,
        "verdict": _verdict(explanation),
        "upstreams": [_entry(standing) for standing in explanation.standings],
    }


def _entry(standing: Standing) -> dict[str, object]:
    upstream = standing.upstream
    return {
        "tier": standing.tier,
        "upstream": standing.name,
        "keys": standing.keys,
        "context_tokens": upstream.context_tokens,
        "usd_per_million": msgspec.to_builtins(upstream.price),
        "probe": standing.probe,
        "terms": msgspec.to_builtins(standing.terms),
        "left_out": [
            {"reason": obstacle.reason, "wait_s": None if math.isinf(obstacle.wait_s) else obstacle.wait_s}
            for obstacle in standing.obstacles
        ],
    }
