"""The choice of an upstream for one attempt.

``Planner.plan`` never waits and never takes. It walks the route's tiers from the top; the first tier with anybody
admissible serves. Inside a tier the keys of one provider and model stand as one candidate (the less loaded of two drawn
at random), candidates are scored in dollars, and one is drawn near the best. It looks only at the route's own
upstreams, so it takes the same time however many others there are.

Probes: a breaker whose time is up is tried by the next real request that has somebody else behind it. Panic: if
breakers alone leave a route with nobody, the one that reopens soonest is tried all the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import msgspec

from routerd.canonical import Head, Upstream
from routerd.policy.balance import Affinity, Terms, order, pick_key, score_all
from routerd.policy.meters import Amount
from routerd.proxy.live import LiveRoute, LiveUpstream, Tier

WINDOW_DOUBT = 0.8  # prompt estimates run high for code and low for prose: nearly fitting is worth a try


class Plan(msgspec.Struct):
    """The choice, or why there is none."""

    chosen: LiveUpstream | None = None
    probe: bool = False
    forced: bool = False
    wait_s: float = math.inf  # until somebody may be admissible
    reason: str = "capability"  # what is waited for: quota, budget, breaker, retry; or capability: nothing
    all_tried: bool = False  # somebody admissible was left out because this exchange has just tried it
    overflow: bool = False  # the prompt is longer than every window
    window_tokens: int = 0  # the largest window seen


class Obstacle(msgspec.Struct, frozen=True):
    """What stands between a request and an upstream, and for how long."""

    reason: str  # capability, window, quota, budget or breaker
    wait_s: float  # infinite: this request will never fit


class _Survey:
    """Planning's notes on the candidates of one request."""

    __slots__ = ("admitted", "blocked", "plan", "probes", "route")

    def __init__(self, route: LiveRoute) -> None:
        self.route = route
        self.plan = Plan()
        self.admitted: list[LiveUpstream] = []
        self.probes: list[LiveUpstream] = []
        self.blocked: list[LiveUpstream] = []  # by breakers alone

    def wait(self, wait_s: float, reason: str) -> None:
        if wait_s < self.plan.wait_s:
            self.plan.wait_s, self.plan.reason = wait_s, reason


class Planner:
    """Chooses. ``affinity`` is what each conversation last sent where."""

    __slots__ = ("_affinity",)

    def __init__(self, affinity: Affinity) -> None:
        self._affinity = affinity

    def plan(
        self,
        route: LiveRoute,
        head: Head,
        *,
        now: float,
        wall: float,
        draw: float,
        tried: Collection[LiveUpstream] = (),
        unfit: Collection[LiveUpstream] = (),
        hurried: bool = False,
    ) -> Plan:
        """Choose the upstream for one attempt, or say how long to wait for one. Takes nothing.

        ``hurried``: this request has lost time already, so it is no probe while somebody healthy is there.
        """
        survey = _Survey(route)
        for tier in route.tiers_for(head):
            self._survey(survey, tier, head, now, wall, draw, tried, unfit)
            if survey.admitted:
                if hurried:
                    survey.probes.clear()
                return self._choose(survey, route, head, now, draw)
        return self._nobody(survey, now)

    def obstacle(self, route: LiveRoute, live: LiveUpstream, head: Head, *, now: float, wall: float) -> Obstacle | None:
        """Why this request would not go to this upstream of the route now; None if it may. Takes nothing."""
        survey = _Survey(route)
        if not self._fits(survey, live.upstream, head):
            return Obstacle("window" if survey.plan.overflow else "capability", math.inf)
        if self._admissible(survey, live, head, now, wall, tried=False):
            return None
        reason = "breaker" if survey.blocked else "budget" if survey.plan.reason == "budget" else "quota"
        return Obstacle(reason, survey.plan.wait_s)

    def _survey(
        self,
        survey: _Survey,
        tier: Tier,
        head: Head,
        now: float,
        wall: float,
        draw: float,
        tried: Collection[LiveUpstream],
        unfit: Collection[LiveUpstream],
    ) -> None:
        for group in tier:
            admitted = [
                live
                for live in group
                if live not in unfit
                and self._fits(survey, live.upstream, head)
                and self._admissible(survey, live, head, now, wall, live in tried)
            ]
            if not admitted:
                continue
            live = admitted[0]
            if len(admitted) > 1:
                live = admitted[pick_key([one.in_flight for one in admitted], draw)]
            (survey.probes if live.suspect else survey.admitted).append(live)

    def _fits(self, survey: _Survey, upstream: Upstream, head: Head) -> bool:
        if (head.tools and not upstream.tools) or (head.images and not upstream.images):
            return False
        plan = survey.plan
        if upstream.context_tokens > plan.window_tokens:
            plan.window_tokens = upstream.context_tokens
        if head.prompt_tokens * WINDOW_DOUBT > upstream.context_tokens:
            plan.overflow = True
            return False
        return True

    def _admissible(
        self, survey: _Survey, live: LiveUpstream, head: Head, now: float, wall: float, tried: bool
    ) -> bool:
        amount = expected_amount(live, head, now)
        wait_s = live.account.quota.wait_s(live.upstream.wire_model, amount, now, wall)
        if wait_s > 0:
            if not math.isinf(wait_s):
                survey.wait(wait_s, "quota")
            return False
        if not self._affordable(survey, amount, now, wall):
            return False
        allowed = live.allows(now)
        if tried:
            survey.plan.all_tried = True
            survey.wait(live.reopens_in_s(now), "retry" if allowed else "breaker")
            return False
        if not allowed:
            survey.blocked.append(live)
            survey.wait(live.reopens_in_s(now), "breaker")
        return allowed

    def _affordable(self, survey: _Survey, amount: Amount, now: float, wall: float) -> bool:
        """What costs nothing passes a budget that is spent."""
        wait_s = survey.route.budget.wait_s(survey.route.name, amount, now, wall)
        if math.isinf(wait_s) and math.isinf(survey.plan.wait_s):
            survey.plan.reason = "budget"
        elif wait_s > 0:
            survey.wait(wait_s, "budget")
        return wait_s == 0

    def _choose(self, survey: _Survey, route: LiveRoute, head: Head, now: float, draw: float) -> Plan:
        """A probe if one is due, for somebody healthy stands behind it; else the best by score."""
        survey.plan.overflow = False
        if survey.probes:
            return self._planned(survey.plan, survey.probes[0], probe=True)
        candidates = survey.admitted
        if len(candidates) == 1:
            return self._planned(survey.plan, candidates[0], probe=False)
        totals = [term.total_usd for term in self.terms(route, candidates, head, now)]
        for live, total in zip(candidates, totals, strict=True):
            live.scores[route.name] = total
        first = order(totals, [live.breaker.weight(now) for live in candidates], draw)[0]
        return self._planned(survey.plan, candidates[first], probe=False)

    def terms(self, route: LiveRoute, candidates: Sequence[LiveUpstream], head: Head, now: float) -> list[Terms]:
        """The terms of each candidate's score for this request."""
        hit = self._affinity.hit_tokens
        return score_all(
            [
                (live.upstream.price, live.latency, hit(head.conversation, live.id, head.prompt_tokens, now))
                for live in candidates
            ],
            prompt_tokens=head.prompt_tokens,
            max_output_tokens=head.max_output_tokens,
            value_of_time_usd_per_s=route.value_of_time_usd_per_s,
            now=now,
        )

    def _planned(self, plan: Plan, live: LiveUpstream, *, probe: bool) -> Plan:
        plan.chosen, plan.probe = live, probe
        return plan

    def _nobody(self, survey: _Survey, now: float) -> Plan:
        """Nobody healthy is admissible: a probe without anybody behind it, else panic, else waiting."""
        if survey.probes:
            return self._planned(survey.plan, survey.probes[0], probe=True)
        if survey.blocked:
            survey.plan.forced = True
            return self._planned(survey.plan, min(survey.blocked, key=lambda live: live.reopens_in_s(now)), probe=False)
        return survey.plan


def expected_amount(live: LiveUpstream, head: Head, now: float) -> Amount:
    """What an attempt is expected to take of its account's quota."""
    output_tokens = live.latency.output_tokens(head.max_output_tokens, now)
    price = live.upstream.price
    usd = 0.0 if price.free else price.cost_usd(head.prompt_tokens, output_tokens)
    return Amount(1.0, head.prompt_tokens + output_tokens, usd)
