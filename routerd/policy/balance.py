"""Which upstream is best for this request: everything it costs, in one currency.

Rules
-----
* The score of an upstream is expected dollars: what the tokens cost, plus what the waiting is worth, plus the chance
  of failing times what another try then costs. The least wins.
* There is no rule for cache affinity. A conversation's last prompt at an upstream, within the cache's lifetime, is
  expected to be a cache hit there, and hits are cheaper. So a warm cache is left when leaving it pays.
* ``prefer`` is a value of time. It is never quite zero: a billionth of a dollar per second never outweighs a token,
  but it puts the faster of two free upstreams first.
* Everything learned fades. After a few ``tau_s`` without news an estimate is back at its seed, so an upstream that
  was slow or broken looks ordinary again and gets a request that tells.

Time to the first content token
-------------------------------
* *Peak-EWMA*: a slower observation replaces the estimate at once, a faster one moves it by 1 - e^(-dt/tau). Errors
  are dear and requests few, so it is quick to doubt and slow to trust.
* *By prompt size*: five classes, each kept as the *excess* over the seed of the class. What is missing or stale in a
  class is filled in from the next ones, nearest first, and at last from the seed. Upwards a delay is taken as it is
  (a queue is as long for a large prompt); downwards, or where the upstream is faster than its seed, in proportion.
* *Censored*: an attempt that has waited 20 s without a token shows already that the wait is at least 20 s. So the
  estimate is never below what the oldest waiting attempt of each class has waited.
* *Penalised*: a failure counts as a wait of ``penalty_s`` over the seed, at least. An upstream that refuses everything
  in a millisecond would look the fastest otherwise.

What is ugly
------------
* The seeds are judgement, and so is the scale between the prompt classes: prompt caches make large prompts start
  sooner than their size says.
* Expected output is learned per upstream, though it depends on the request at least as much.
* A wait longer than ``WAIT_MAX_S`` is taken for a ticket nobody gave back, and forgotten.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from math import exp, inf

import msgspec

from routerd.canonical import Price

PREFER_USD_PER_HOUR = {"cheap": 0.0, "balanced": 2.0, "fast": 60.0}  # what ``prefer`` says an hour of waiting is worth
TIE_BREAK_USD_PER_S = 1e-9

CLASS_BOUNDS_TOKENS = (2_048, 8_192, 32_768, 131_072)  # prompts below the first bound are class 0, and so on
NEIGHBOURS = ((1, 2, 3, 4), (2, 0, 3, 4), (3, 1, 4, 0), (4, 2, 1, 0), (3, 2, 1, 0))  # of each class, nearest first
CLASSES = len(NEIGHBOURS)
ENOUGH = 0.98  # so much of an estimate from fresh observations, and further classes are not asked

WAIT_MIN_S, WAIT_MAX_S = 0.001, 3600.0  # every observed wait is taken to be within; longer ones are leaks
WAITING_MAX = 1024  # tickets per class; the oldest is forgotten beyond
PACE_MIN_S, PACE_MAX_S = 1e-4, 10.0  # seconds per output token: faster is a buffer's burst, slower is a stall
PACE_TOKENS_MIN = 16  # shorter answers say nothing of the pace
OUTPUT_TOKENS_MAX = 1e6
RESULTS_MAX = 1e9  # of a restored count
RATE_GAIN = 0.2  # of one answer on pace and length, when the last one was just now
AFFINITY_ENTRIES = 4096
BAND = 0.10
EDGE_SHARE = 0.25  # the chance of an upstream at the edge of the band, against that of the best


class LatencyPolicy(msgspec.Struct, frozen=True):
    """What to expect of an upstream nobody has tried, and how fast to forget. Raises ValueError for what cannot be."""

    tau_s: float = 450.0  # after this long without news, 37 % of what was learned is left
    seed_s: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 8.0)  # first content token, by prompt class
    penalty_s: float = 10.0  # a failure counts as at least so much over the seed
    tokens_per_s: float = 50.0
    output_tokens: float = 400.0
    p_fail: float = 0.02
    prior_results: float = 5.0  # the weight of p_fail, in results

    def __post_init__(self) -> None:
        demands = (
            (0 < self.tau_s < inf, "tau_s must be above 0"),
            (len(self.seed_s) == CLASSES, f"seed_s needs {CLASSES} values, one for each class of prompts"),
            (
                all(WAIT_MIN_S <= seed <= WAIT_MAX_S for seed in self.seed_s),
                f"seed_s must be from {WAIT_MIN_S} to {WAIT_MAX_S}",
            ),
            (0 <= self.penalty_s <= WAIT_MAX_S, f"penalty_s must be from 0 to {WAIT_MAX_S}"),
            (PACE_MIN_S <= 1 / (self.tokens_per_s or inf) <= PACE_MAX_S, "tokens_per_s must be from 0.1 to 10000"),
            (0 <= self.output_tokens <= OUTPUT_TOKENS_MAX, f"output_tokens must be from 0 to {OUTPUT_TOKENS_MAX:.0f}"),
            (0 <= self.p_fail <= 1, "p_fail must be from 0 to 1"),
            (0 < self.prior_results < inf, "prior_results must be above 0"),
        )
        wrong = [text for fine, text in demands if not fine]
        if wrong:
            raise ValueError("; ".join(wrong))


class LatencySnapshot(msgspec.Struct, frozen=True):
    """What outlives a restart: values beside their ages in seconds, so it means the same on any clock."""

    excess_s: tuple[float, ...]  # by prompt class
    excess_age_s: tuple[float | None, ...]  # None: never observed
    pace_s: float
    pace_age_s: float | None
    output_tokens: float
    output_age_s: float | None
    failures: float
    results: float
    results_age_s: float | None


class Latency:
    """What one upstream's past says about its next answer. ``now`` is monotonic seconds."""

    __slots__ = (
        "_due",
        "_excess_at",
        "_excess_s",
        "_failures",
        "_first_due",
        "_output_at",
        "_output_tokens",
        "_pace_at",
        "_pace_s",
        "_policy",
        "_results",
        "_results_at",
        "_seed_s",
        "_serial",
        "_tau_s",
        "_waiting",
    )

    def __init__(self, policy: LatencyPolicy | None = None) -> None:
        self._policy = policy = policy or LatencyPolicy()
        self._tau_s = policy.tau_s
        self._seed_s = policy.seed_s
        self._excess_s = [0.0] * CLASSES
        self._excess_at = [-inf] * CLASSES
        self._pace_s = 1.0 / policy.tokens_per_s
        self._pace_at = -inf
        self._output_tokens = policy.output_tokens
        self._output_at = -inf
        self._failures = 0.0
        self._results = 0.0
        self._results_at = -inf
        # By class: ticket -> when it has waited as long as the seed. Tickets begin in order: the first is the oldest.
        self._waiting: tuple[dict[int, float], ...] = tuple({} for _ in range(CLASSES))
        self._due = [inf] * CLASSES  # of the oldest ticket
        self._first_due = inf
        self._serial = 0

    # --- estimates --------------------------------------------------------------------------------------------------

    def first_token_s(self, prompt_tokens: float, now: float) -> float:
        """Expected wait for the first content token of a prompt of this size."""
        own = bisect_right(CLASS_BOUNDS_TOKENS, prompt_tokens)
        learned_s = self._learned_s(own, now)
        return learned_s if now <= self._first_due else max(learned_s, self._waited_s(own, now))

    def pace_s(self, now: float) -> float:
        """Expected seconds per output token once the answer has begun."""
        seed = 1.0 / self._policy.tokens_per_s
        return seed + (self._pace_s - seed) * exp((self._pace_at - now) / self._tau_s)

    def output_tokens(self, max_output_tokens: float | None, now: float) -> float:
        """Expected length of the answer, at most what the request allows."""
        seed = self._policy.output_tokens
        tokens = seed + (self._output_tokens - seed) * exp((self._output_at - now) / self._tau_s)
        return tokens if max_output_tokens is None or tokens < max_output_tokens else max_output_tokens

    def p_fail(self, now: float) -> float:
        """Expected share of failures, from 0 to 1."""
        kept = exp((self._results_at - now) / self._tau_s)
        prior = self._policy.prior_results
        return (self._failures * kept + self._policy.p_fail * prior) / (self._results * kept + prior)

    # --- observations -----------------------------------------------------------------------------------------------

    def begin_wait(self, prompt_tokens: float, now: float) -> int:
        """Note that an attempt waits for its first token. The ticket goes to ``end_wait``, whatever happens."""
        own = bisect_right(CLASS_BOUNDS_TOKENS, prompt_tokens)
        waiting = self._waiting[own]
        if len(waiting) >= WAITING_MAX:
            self.end_wait(next(iter(waiting)))
        self._serial += 1
        ticket = self._serial * CLASSES + own
        due = waiting[ticket] = now + self._seed_s[own]
        if len(waiting) == 1:
            self._due[own] = due
            self._first_due = min(self._due)
        return ticket

    def end_wait(self, ticket: int) -> None:
        """Give the ticket back. A second time does nothing, so it may stand in a ``finally``."""
        own = ticket % CLASSES
        waiting = self._waiting[own]
        if waiting.pop(ticket, None) == self._due[own]:
            self._due[own] = next(iter(waiting.values()), inf)
            self._first_due = min(self._due)

    def observe_first_token(self, prompt_tokens: float, elapsed_s: float, now: float) -> None:
        """Learn from the first *content* token: headers, pings and role chunks say nothing of the wait."""
        own = bisect_right(CLASS_BOUNDS_TOKENS, prompt_tokens)
        seed_s = self._seed_s[own]
        # A stored peak that has long decayed must not come back with the next observation: the lower of the two counts.
        known_s = min(self._learned_s(own, now), seed_s + self._excess_s[own])
        value_s = _within(WAIT_MIN_S, elapsed_s, WAIT_MAX_S)
        if value_s < known_s:
            value_s += (known_s - value_s) * self._kept(self._excess_at[own], now)
        self._excess_s[own] = value_s - seed_s
        self._excess_at[own] = now

    def observe_rate(self, output_tokens: float, seconds: float, now: float) -> None:
        """Learn from a whole answer: its length, and its seconds from the first token to the last.

        Answers that are too short to time, or that came at once, teach the length alone.
        """
        tokens = _within(0.0, output_tokens, OUTPUT_TOKENS_MAX)
        gain = max(RATE_GAIN, 1.0 - self._kept(self._output_at, now))
        self._output_tokens += gain * (tokens - self._output_tokens)
        self._output_at = now
        if tokens >= PACE_TOKENS_MIN and seconds > 0:
            gain = max(RATE_GAIN, 1.0 - self._kept(self._pace_at, now))
            self._pace_s += gain * (_within(PACE_MIN_S, seconds / tokens, PACE_MAX_S) - self._pace_s)
            self._pace_at = now

    def observe_success(self, now: float) -> None:
        self._count(0.0, now)

    def observe_failure(self, prompt_tokens: float, elapsed_s: float, now: float) -> None:
        """Learn from a failed attempt. ``elapsed_s``: how long it waited in vain for its first token, 0 if it had one.

        Only for what the breaker counts as failure: a rate limit or a client's hang-up is neither.
        """
        own = bisect_right(CLASS_BOUNDS_TOKENS, prompt_tokens)
        self.observe_first_token(prompt_tokens, max(self._seed_s[own] + self._policy.penalty_s, elapsed_s), now)
        self._count(1.0, now)

    # --- restarts ---------------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> LatencySnapshot:
        """All but the waiting attempts, which end with the process."""
        return LatencySnapshot(
            excess_s=tuple(self._excess_s),
            excess_age_s=tuple(_age_s(at, now) for at in self._excess_at),
            pace_s=self._pace_s,
            pace_age_s=_age_s(self._pace_at, now),
            output_tokens=self._output_tokens,
            output_age_s=_age_s(self._output_at, now),
            failures=self._failures,
            results=self._results,
            results_age_s=_age_s(self._results_at, now),
        )

    def restore(self, snapshot: LatencySnapshot, now: float, *, elapsed_s: float = 0.0) -> None:
        """Take up where a snapshot left off; ``elapsed_s`` is how long the process was away, where that is known.

        Values outside what could have been observed are brought back inside.
        """
        if len(snapshot.excess_s) == len(snapshot.excess_age_s) == CLASSES:
            pairs = zip(snapshot.excess_s, self._seed_s, strict=True)
            self._excess_s = [_within(WAIT_MIN_S, more_s + seed_s, WAIT_MAX_S) - seed_s for more_s, seed_s in pairs]
            self._excess_at = [_at(age_s, now, elapsed_s) for age_s in snapshot.excess_age_s]
        self._pace_s = _within(PACE_MIN_S, snapshot.pace_s, PACE_MAX_S)
        self._pace_at = _at(snapshot.pace_age_s, now, elapsed_s)
        self._output_tokens = _within(0.0, snapshot.output_tokens, OUTPUT_TOKENS_MAX)
        self._output_at = _at(snapshot.output_age_s, now, elapsed_s)
        self._results = _within(0.0, snapshot.results, RESULTS_MAX)
        self._failures = _within(0.0, snapshot.failures, self._results)
        self._results_at = _at(snapshot.results_age_s, now, elapsed_s)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _learned_s(self, own: int, now: float) -> float:
        """The seed and what is known over it. The own class has as much of a say as it is fresh."""
        kept = exp((self._excess_at[own] - now) / self._tau_s)
        if kept >= ENOUGH:
            return self._seed_s[own] + self._excess_s[own]
        return self._seed_s[own] + self._excess_s[own] * kept + self._filled_in_s(own, 1.0 - kept, now)

    def _filled_in_s(self, own: int, rest: float, now: float) -> float:
        """What the other classes, nearest first, say to the share of an estimate that the own one leaves open."""
        filled_s = 0.0
        for place in NEIGHBOURS[own]:
            at = self._excess_at[place]
            if at == -inf:
                continue
            share = rest * exp((at - now) / self._tau_s)
            filled_s += share * _carried_s(self._excess_s[place], self._seed_s[place], self._seed_s[own])
            rest -= share
            if rest <= 1.0 - ENOUGH:
                break
        return filled_s

    def _waited_s(self, own: int, now: float) -> float:
        """What the oldest waiting attempts, by how far they are beyond their seeds, let this class expect."""
        seed_s = self._seed_s[own]
        longest_s = 0.0
        for place, due in enumerate(self._due):
            if due < now - WAIT_MAX_S:
                self._forget(place, now - WAIT_MAX_S)
            elif due < now:
                longest_s = max(longest_s, seed_s + _carried_s(now - due, self._seed_s[place], seed_s))
        return longest_s

    def _forget(self, place: int, before: float) -> None:
        for ticket in [ticket for ticket, due in self._waiting[place].items() if due < before]:
            self.end_wait(ticket)

    def _count(self, failures: float, now: float) -> None:
        kept = self._kept(self._results_at, now)
        self._failures = self._failures * kept + failures
        self._results = self._results * kept + 1.0
        self._results_at = now

    def _kept(self, at: float, now: float) -> float:
        """How much of what was learned then is left: from 1 for just now to 0 for never."""
        return min(1.0, exp((at - now) / self._tau_s))

    def __repr__(self) -> str:
        waiting = sum(map(len, self._waiting))
        seeds = zip(self._seed_s, self._excess_s, strict=True)
        known = "/".join(f"{seed_s + excess_s:.2g}" for seed_s, excess_s in seeds)
        return f"<Latency {known}s, {1 / self._pace_s:.0f} tokens/s, {waiting} waiting>"


class Affinity:
    """What each conversation last sent to each upstream, while the upstream's prompt cache may still hold it.

    Holds the newest ``entries`` pairs; ``lifetime_s`` is the cache's, refreshed by every use.
    """

    __slots__ = ("_entries", "_lifetime_s", "_sent")

    def __init__(self, lifetime_s: float = 300.0, entries: int = AFFINITY_ENTRIES) -> None:
        self._lifetime_s = lifetime_s
        self._entries = entries
        # An ordered dict, for its oldest entry is found at once; a plain one scans the gaps that evictions left.
        self._sent: OrderedDict[tuple[int, Hashable], tuple[int, float]] = OrderedDict()

    def remember(self, conversation: int, upstream: Hashable, prompt_tokens: int, now: float) -> None:
        """Note a prompt that the upstream has answered."""
        pair = (conversation, upstream)
        self._sent[pair] = (prompt_tokens, now)
        self._sent.move_to_end(pair)
        if len(self._sent) > self._entries:
            self._sent.popitem(last=False)

    def hit_tokens(self, conversation: int, upstream: Hashable, prompt_tokens: int, now: float) -> int:
        """Tokens of a new prompt of the conversation that are expected to be cache hits at the upstream."""
        sent = self._sent.get((conversation, upstream))
        if sent is None or now - sent[1] > self._lifetime_s:
            return 0
        return min(sent[0], prompt_tokens)

    def __len__(self) -> int:
        return len(self._sent)


# --- the score ------------------------------------------------------------------------------------------------------


class Terms(msgspec.Struct, frozen=True, gc=False):
    """The terms of one upstream's score; ``total_usd = cost_usd + latency_usd + retry_usd``."""

    cost_usd: float
    latency_s: float
    latency_usd: float
    p_fail: float
    retry_usd: float
    total_usd: float
    hit_tokens: float
    first_token_s: float
    output_tokens: float


Candidate = tuple[Price, Latency, float]  # price, past, tokens expected to be cache hits


def score(
    price: Price,
    latency: Latency,
    *,
    prompt_tokens: float,
    hit_tokens: float,
    max_output_tokens: float | None,
    value_of_time_usd_per_s: float,
    cost_of_another_try_usd: float,
    now: float,
) -> Terms:
    """Give the terms of one upstream. ``cost_of_another_try_usd`` is the best alternative's cost, waiting included."""
    value_usd_per_s = max(value_of_time_usd_per_s, TIE_BREAK_USD_PER_S)
    expected = _expected(price, latency, hit_tokens, prompt_tokens, max_output_tokens, value_usd_per_s, now)
    return _terms(expected, cost_of_another_try_usd)


def score_all(
    candidates: Sequence[Candidate],
    *,
    prompt_tokens: float,
    max_output_tokens: float | None,
    value_of_time_usd_per_s: float,
    now: float,
) -> list[Terms]:
    """Give the terms of every upstream. Another try is the best of the others, or the same again when it is alone."""
    if not candidates:
        return []
    value_usd_per_s = max(value_of_time_usd_per_s, TIE_BREAK_USD_PER_S)
    every = [
        _expected(price, latency, hit_tokens, prompt_tokens, max_output_tokens, value_usd_per_s, now)
        for price, latency, hit_tokens in candidates
    ]
    tries_usd = [cost_usd + latency_usd for cost_usd, _, latency_usd, *_ in every]
    best_usd, *others_usd = sorted(tries_usd)
    second_usd = others_usd[0] if others_usd else best_usd
    return [
        _terms(expected, second_usd if try_usd <= best_usd else best_usd)
        for expected, try_usd in zip(every, tries_usd, strict=True)
    ]


def order(totals: Sequence[float], weights: Sequence[float], draw: float, *, band: float = BAND) -> list[int]:
    """Give the places of the upstreams in the order to try them. Totals are finite and not negative.

    The first is drawn among those within ``band`` of the best, so that estimates of near equals stay fresh: by weight
    (slow start), times a share that falls from 1 at the best to ``EDGE_SHARE`` at the edge. The rest ascend.
    """
    ranked = sorted(range(len(totals)), key=totals.__getitem__)
    if len(ranked) < 2:
        return ranked
    best = totals[ranked[0]]
    width = best * band
    if totals[ranked[1]] - best > width:
        return ranked
    fall = (1.0 - EDGE_SHARE) / width if width > 0 else 0.0
    shares = []
    for place in ranked:
        above = totals[place] - best
        if above > width:
            break
        shares.append(weights[place] * (1.0 - fall * above))
    drawn = _drawn(shares, draw)
    if drawn:
        ranked.insert(0, ranked.pop(drawn))
    return ranked


def pick_key(loads: Sequence[float], draw: float) -> int:
    """Give the place of the less loaded of two keys drawn at random: near the best, and no herd runs to one key.

    A key that must not be used has an infinite load, and is chosen only where both have. Raises ValueError for no keys.
    """
    if not loads:
        raise ValueError("a key pool is never empty")
    others = len(loads) - 1
    if others == 0:
        return 0
    first, second = divmod(int(draw * len(loads) * others), others)
    if second >= first:
        second += 1
    return second if loads[second] < loads[first] else first


_Expected = tuple[float, float, float, float, float, float, float]


def _expected(
    price: Price,
    latency: Latency,
    hit_tokens: float,
    prompt_tokens: float,
    max_output_tokens: float | None,
    value_usd_per_s: float,
    now: float,
) -> _Expected:
    """Everything of the terms that the other upstreams have no part in; positional, for it runs for each of them."""
    hit_tokens = min(hit_tokens, prompt_tokens)
    output_tokens = latency.output_tokens(max_output_tokens, now)
    first_token_s = latency.first_token_s(prompt_tokens, now)
    latency_s = first_token_s + output_tokens * latency.pace_s(now)
    latency_usd = latency_s * value_usd_per_s
    cost_usd = price.cost_usd(prompt_tokens, output_tokens, hit_tokens)
    return cost_usd, latency_s, latency_usd, latency.p_fail(now), hit_tokens, first_token_s, output_tokens


def _terms(expected: _Expected, another_usd: float) -> Terms:
    cost_usd, latency_s, latency_usd, p_fail, hit_tokens, first_token_s, output_tokens = expected
    retry_usd = p_fail * another_usd
    total_usd = cost_usd + latency_usd + retry_usd
    return Terms(
        cost_usd, latency_s, latency_usd, p_fail, retry_usd, total_usd, hit_tokens, first_token_s, output_tokens
    )


def _drawn(shares: Sequence[float], draw: float) -> int:
    """Give the place that a draw in [0, 1) falls on; the first one if there is nothing to share."""
    left = draw * sum(shares)
    for place, share in enumerate(shares):
        left -= share
        if left < 0:
            return place
    return 0


def _carried_s(excess_s: float, from_seed_s: float, to_seed_s: float) -> float:
    """What an excess in one prompt class is worth in another."""
    if excess_s > 0 and to_seed_s > from_seed_s:
        return excess_s
    return excess_s * (to_seed_s / from_seed_s)


def _within(least: float, value: float, most: float) -> float:
    """Give the nearest value within the bounds; NaN becomes ``least``."""
    return min(max(least, value), most)


def _age_s(at: float, now: float) -> float | None:
    return None if at == -inf else max(0.0, now - at)


def _at(age_s: float | None, now: float, elapsed_s: float) -> float:
    return -inf if age_s is None else now - max(0.0, age_s) - max(0.0, elapsed_s)
