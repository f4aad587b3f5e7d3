"""Which upstream is best: the score, what it is learned from, and the draw between near equals. Time is virtual."""

import math
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import Price
from routerd.policy.balance import (
    CLASSES,
    EDGE_SHARE,
    PREFER_USD_PER_HOUR,
    WAIT_MAX_S,
    WAITING_MAX,
    Affinity,
    Candidate,
    Latency,
    LatencyPolicy,
    LatencySnapshot,
    Terms,
    order,
    pick_key,
    score,
    score_all,
)

HOUR = 3600.0
SMALL, LARGE = 1_000, 200_000
SEED_S = LatencyPolicy().seed_s
FREE = Price()


def scored(candidates: list[Candidate], prefer: str, prompt_tokens: int = 50_000, now: float = 0.0) -> list[Terms]:
    return score_all(
        candidates,
        prompt_tokens=prompt_tokens,
        max_output_tokens=None,
        value_of_time_usd_per_s=PREFER_USD_PER_HOUR[prefer] / HOUR,
        now=now,
    )


def best(candidates: list[Candidate], prefer: str, prompt_tokens: int = 50_000, now: float = 0.0) -> int:
    totals = [terms.total_usd for terms in scored(candidates, prefer, prompt_tokens, now)]
    return totals.index(min(totals))


def latency_of(first_token_s: float, now: float = 0.0) -> Latency:
    """An upstream that has just answered prompts of every size after this long."""
    latency = Latency()
    for tokens in (1_000, 5_000, 20_000, 50_000, 200_000):
        latency.observe_first_token(tokens, first_token_s, now)
    return latency


# --- the score ------------------------------------------------------------------------------------------------------


def test_the_terms_add_up() -> None:
    """Every term is what the price list and the estimates say, and the total is their sum."""
    terms = score(
        Price(input=1.0, output=10.0, cached=0.1),
        Latency(LatencyPolicy(tokens_per_s=100.0, output_tokens=1_000.0, p_fail=0.5)),
        prompt_tokens=10_000,
        hit_tokens=8_000,
        max_output_tokens=200,
        value_of_time_usd_per_s=0.001,
        cost_of_another_try_usd=0.02,
        now=0.0,
    )

    assert terms.output_tokens == 200
    assert terms.cost_usd == pytest.approx((2_000 * 1.0 + 8_000 * 0.1 + 200 * 10.0) / 1e6)
    assert terms.latency_s == terms.first_token_s + 2.0
    assert terms.latency_usd == pytest.approx(0.001 * terms.latency_s)
    assert terms.retry_usd == pytest.approx(0.01)
    assert terms.total_usd == pytest.approx(terms.cost_usd + terms.latency_usd + terms.retry_usd)


def test_prefer_flips_the_order() -> None:
    """The slow cheap one for who can wait, the fast dear one for who cannot."""
    cheap_slow: Candidate = (Price(input=0.1, output=0.4), latency_of(25.0), 0)
    dear_fast: Candidate = (Price(input=1.0, output=4.0), latency_of(0.5), 0)

    assert best([cheap_slow, dear_fast], "cheap") == 0
    assert best([cheap_slow, dear_fast], "balanced") == 0
    assert best([cheap_slow, dear_fast], "fast") == 1


def test_a_warm_cache_keeps_its_conversation() -> None:
    """The list price elsewhere is lower, but the prompt is already paid for here."""
    warm: Candidate = (Price(input=1.0, output=4.0, cached=0.1), latency_of(2.0), 48_000)
    cold: Candidate = (Price(input=0.5, output=2.0, cached=0.05), latency_of(2.0), 0)

    assert best([warm, cold], "cheap") == 0
    assert best([(warm[0], warm[1], 0), cold], "cheap") == 1


def test_a_warm_cache_is_left_when_it_pays() -> None:
    """Nobody stays for the cache's sake with an upstream that has become slow, if time is worth more."""
    warm_slow: Candidate = (Price(input=1.0, output=4.0, cached=0.1), latency_of(60.0), 48_000)
    cold_fast: Candidate = (Price(input=0.5, output=2.0, cached=0.05), latency_of(1.0), 0)

    assert best([warm_slow, cold_fast], "cheap") == 0
    assert best([warm_slow, cold_fast], "balanced") == 1


def test_a_price_without_cache_discount_ignores_the_cache() -> None:
    """Where hits cost as much as the rest, a hit is worth nothing."""
    price = Price(input=1.0, output=4.0)
    with_hit, without = scored([(price, Latency(), 40_000), (price, Latency(), 0)], "cheap")

    assert with_hit.cost_usd == pytest.approx(without.cost_usd)


def test_a_hit_is_never_larger_than_the_prompt() -> None:
    """A prompt that shrank costs what a hit of its whole length costs, and not less than nothing."""
    price = Price(input=1.0, output=0.0, cached=0.1)
    (terms,) = scored([(price, Latency(), 90_000)], "cheap", prompt_tokens=10_000)

    assert terms.hit_tokens == 10_000
    assert terms.cost_usd == pytest.approx(0.001)


def test_free_upstreams_are_ordered_by_latency() -> None:
    """Even when time is worth nothing, the faster of two free ones comes first, and any free one before a paid one."""
    slow: Candidate = (FREE, latency_of(100.0), 0)
    fast: Candidate = (FREE, latency_of(1.0), 0)
    penny: Candidate = (Price(input=0.01, output=0.01), latency_of(0.1), 0)

    assert best([slow, fast], "cheap") == 1
    assert best([slow, penny], "cheap") == 0
    assert all(terms.total_usd > 0 for terms in scored([slow, fast], "cheap"))


def test_another_try_is_the_best_of_the_others() -> None:
    """The best one's own failure costs the second best, everybody else's the best; the lonely one pays itself again."""
    prices = [Price(input=1.0), Price(input=2.0), Price(input=3.0)]
    first, second, third = scored([(price, Latency(), 0) for price in prices], "cheap", prompt_tokens=1_000_000)
    (lonely,) = scored([(prices[0], Latency(), 0)], "cheap", prompt_tokens=1_000_000)

    p_fail = LatencyPolicy().p_fail
    assert first.retry_usd == pytest.approx(p_fail * 2.0)
    assert second.retry_usd == third.retry_usd == pytest.approx(p_fail * 1.0)
    assert lonely.retry_usd == pytest.approx(p_fail * 1.0)
    assert scored([], "cheap") == []


def test_an_unreliable_upstream_pays_for_its_failures() -> None:
    """At the same price and speed, the one that keeps failing is the dearer one."""
    flaky, steady = latency_of(2.0), latency_of(2.0)
    for _ in range(5):
        flaky.observe_failure(LARGE, 1.0, 0.0)
        steady.observe_success(0.0)

    price = Price(input=1.0, output=4.0)
    assert best([(price, flaky, 0), (price, steady, 0)], "cheap", prompt_tokens=SMALL) == 1


# --- time to the first token ----------------------------------------------------------------------------------------


def test_an_untried_upstream_is_expected_to_be_like_its_seed() -> None:
    """Each class of prompts has its own."""
    latency = Latency()

    assert list(SEED_S) == [latency.first_token_s(n, 0.0) for n in (0, 2_048, 8_192, 32_768, 131_072)]
    assert latency.first_token_s(2_047, 0.0) == SEED_S[0]


def test_a_slower_answer_counts_at_once_and_a_faster_one_slowly() -> None:
    """Peaks are believed; what comes after has to outlast them."""
    latency = Latency()

    latency.observe_first_token(SMALL, 20.0, 0.0)
    assert latency.first_token_s(SMALL, 0.0) == 20.0
    latency.observe_first_token(SMALL, 1.0, 45.0)
    assert latency.first_token_s(SMALL, 45.0) == pytest.approx(1.0 + 19.0 * math.exp(-45 / 450), rel=0.1)
    latency.observe_first_token(SMALL, 21.0, 46.0)
    assert latency.first_token_s(SMALL, 46.0) == 21.0


def test_steady_answers_are_learned_exactly() -> None:
    """An upstream that is twice as fast as its seed is not pulled back to the seed while it keeps answering."""
    latency = Latency()

    for now in range(0, 3600, 60):
        latency.observe_first_token(SMALL, 0.7, float(now))

    assert latency.first_token_s(SMALL, 3540.0) == pytest.approx(0.7)


@pytest.mark.parametrize("first_token_s", [0.2, 300.0])
def test_without_news_estimates_go_back_to_the_seed(first_token_s: float) -> None:
    """After an hour an upstream that was slow looks ordinary, and so is tried again."""
    latency = latency_of(first_token_s)
    distances = [abs(latency.first_token_s(SMALL, now) - SEED_S[0]) for now in (0.0, 450.0, 900.0, 3600.0, 86_400.0)]

    assert distances == sorted(distances, reverse=True)
    assert distances[-2] < 0.01 * distances[0]
    assert distances[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_stale_peak_does_not_come_back() -> None:
    """A quick answer long after a slow one is believed, for the slow one says nothing any more."""
    latency = Latency()

    latency.observe_first_token(SMALL, 300.0, 0.0)
    latency.observe_first_token(SMALL, 0.5, 1800.0)

    assert latency.first_token_s(SMALL, 1800.0) < SEED_S[0]


def test_a_class_without_data_asks_its_neighbours() -> None:
    """A slow start with small prompts delays large ones as much; one with large prompts small ones in proportion."""
    queued, prefilling, quick = Latency(), Latency(), Latency()

    queued.observe_first_token(SMALL, SEED_S[0] + 9.0, 0.0)
    assert queued.first_token_s(LARGE, 0.0) == pytest.approx(SEED_S[4] + 9.0)
    prefilling.observe_first_token(LARGE, SEED_S[4] * 3, 0.0)
    assert prefilling.first_token_s(SMALL, 0.0) == pytest.approx(SEED_S[0] * 3)
    quick.observe_first_token(SMALL, SEED_S[0] / 2, 0.0)
    assert quick.first_token_s(LARGE, 0.0) == pytest.approx(SEED_S[4] / 2)


def test_the_own_class_comes_before_its_neighbours() -> None:
    """What large prompts took is no argument where small ones have been seen."""
    latency = Latency()

    latency.observe_first_token(LARGE, 100.0, 0.0)
    latency.observe_first_token(SMALL, 1.0, 0.0)

    assert latency.first_token_s(SMALL, 0.0) == 1.0
    assert latency.first_token_s(LARGE, 0.0) == 100.0


def test_waiting_is_an_observation() -> None:
    """While an attempt waits, the estimate is at least what it has waited; when it ends, that is forgotten."""
    latency = Latency()
    oldest = latency.begin_wait(SMALL, 0.0)
    newer = latency.begin_wait(SMALL, 5.0)

    assert latency.first_token_s(SMALL, 1.0) == SEED_S[0]
    assert latency.first_token_s(SMALL, 20.0) == 20.0
    latency.end_wait(oldest)
    assert latency.first_token_s(SMALL, 20.0) == 15.0
    latency.end_wait(newer)
    latency.end_wait(newer)
    assert latency.first_token_s(SMALL, 20.0) == SEED_S[0]


def test_a_large_prompt_may_wait_longer() -> None:
    """Eight seconds are usual for a huge prompt and no reason to doubt the upstream for a small one."""
    latency = Latency()
    latency.begin_wait(LARGE, 0.0)

    assert latency.first_token_s(SMALL, 8.0) == SEED_S[0]
    assert latency.first_token_s(SMALL, 16.0) == pytest.approx(2 * SEED_S[0])
    assert latency.first_token_s(LARGE, 16.0) == 16.0


def test_tickets_that_nobody_gives_back_are_forgotten() -> None:
    """A leak costs an upstream an hour, not its life, and memory stays bounded."""
    latency = Latency()
    for _ in range(2 * WAITING_MAX):
        latency.begin_wait(SMALL, 0.0)

    assert repr(latency) == f"<Latency 1.5/2/3/5/8s, 50 tokens/s, {WAITING_MAX} waiting>"
    assert latency.first_token_s(SMALL, WAIT_MAX_S) == WAIT_MAX_S
    assert latency.first_token_s(SMALL, WAIT_MAX_S + 10.0) == SEED_S[0]
    assert repr(latency) == "<Latency 1.5/2/3/5/8s, 50 tokens/s, 0 waiting>"


def test_failing_fast_is_not_being_fast() -> None:
    """An upstream that refuses in a millisecond is expected to take longer than one that answers ordinarily."""
    refusing, answering = Latency(), latency_of(3.0)

    refusing.observe_failure(SMALL, 0.001, 0.0)

    assert refusing.first_token_s(SMALL, 0.0) == SEED_S[0] + LatencyPolicy().penalty_s
    assert best([(FREE, refusing, 0), (FREE, answering, 0)], "fast", prompt_tokens=SMALL) == 1


def test_failing_slowly_is_worse() -> None:
    """A timeout counts for what it took."""
    latency = Latency()

    latency.observe_failure(SMALL, 60.0, 0.0)

    assert latency.first_token_s(SMALL, 0.0) == 60.0


# --- pace, length, failures -----------------------------------------------------------------------------------------


def test_pace_and_length_are_learned_and_forgotten() -> None:
    """Answers move both estimates a fifth of the way each; hours later both are at their seeds."""
    latency = Latency()

    latency.observe_rate(1_000, 10.0, 0.0)
    assert latency.pace_s(0.0) == pytest.approx(0.01)
    assert latency.output_tokens(None, 0.0) == pytest.approx(1_000)
    latency.observe_rate(500, 10.0, 0.0)
    assert latency.pace_s(0.0) == pytest.approx(0.012)
    assert latency.output_tokens(None, 0.0) == pytest.approx(900)
    assert latency.output_tokens(300, 0.0) == 300
    assert latency.pace_s(1e5) == pytest.approx(0.02)
    assert latency.output_tokens(None, 1e5) == pytest.approx(400)


@pytest.mark.parametrize(("tokens", "seconds"), [(15, 0.001), (5_000, 0.0), (5_000, -1.0)])
def test_some_answers_say_nothing_of_the_pace(tokens: int, seconds: float) -> None:
    """Very short ones, and those that came at once, do not make an upstream look infinitely fast."""
    latency = Latency()

    latency.observe_rate(tokens, seconds, 0.0)

    assert latency.pace_s(0.0) == 0.02
    assert latency.output_tokens(None, 0.0) == tokens


def test_the_failure_ratio_starts_from_a_prior_and_fades_to_it() -> None:
    """One failure is no proof of ruin, ten are nearly one, and yesterday's are none."""
    latency = Latency()
    shares = [latency.p_fail(0.0)]

    for _ in range(10):
        latency.observe_failure(SMALL, 1.0, 0.0)
        shares.append(latency.p_fail(0.0))

    assert shares == sorted(shares)
    assert shares[0] == 0.02
    assert shares[1] == pytest.approx((1 + 0.02 * 5) / (1 + 5))
    assert shares[10] == pytest.approx((10 + 0.02 * 5) / (10 + 5))
    assert latency.p_fail(86_400.0) == pytest.approx(0.02)


observations = st.one_of(
    st.tuples(st.just("observe_first_token"), st.integers(0, 10**7), st.floats(allow_infinity=True)),
    st.tuples(st.just("observe_failure"), st.integers(0, 10**7), st.floats(allow_infinity=True)),
    st.tuples(st.just("observe_rate"), st.integers(0, 10**9), st.floats(allow_infinity=True)),
    st.tuples(st.just("observe_success")),
    st.tuples(st.just("begin_wait"), st.integers(0, 10**7)),
)


@given(st.lists(st.tuples(st.floats(0, 1e5), observations), max_size=20), st.integers(0, 10**7))
def test_estimates_are_bounded_whatever_is_observed(
    story: list[tuple[float, tuple[Any, ...]]], prompt_tokens: int
) -> None:
    """Zeros, negatives, infinities and NaN included."""
    latency, now = Latency(), 0.0

    for pause_s, (name, *arguments) in story:
        now += pause_s
        getattr(latency, name)(*arguments, now)

    assert 0.0 < latency.first_token_s(prompt_tokens, now) <= 2 * WAIT_MAX_S
    assert 0.99e-4 <= latency.pace_s(now) <= 10.01
    assert 0.0 <= latency.output_tokens(None, now) <= 1e6
    assert 0.0 <= latency.p_fail(now) <= 1.0


@given(
    st.lists(st.tuples(st.floats(0, 2000), st.sampled_from([SMALL, 5_000, LARGE]), st.floats(0.01, 600)), max_size=12),
    st.floats(0, 2000),
    st.floats(0.01, 600),
)
def test_an_observation_never_moves_the_estimate_away_from_it(
    past: list[tuple[float, int, float]], pause_s: float, observed_s: float
) -> None:
    """Slower than expected: the estimate becomes it. Faster: the estimate falls, but not below it."""
    latency, now = Latency(), 0.0
    for gap_s, tokens, seconds in past:
        now += gap_s
        latency.observe_first_token(tokens, seconds, now)
    now += pause_s
    expected_s = latency.first_token_s(SMALL, now)

    latency.observe_first_token(SMALL, observed_s, now)

    learned_s = latency.first_token_s(SMALL, now)
    assert observed_s - 1e-9 <= learned_s <= max(observed_s, expected_s) + 1e-9


# --- restarts -------------------------------------------------------------------------------------------------------


def test_estimates_survive_a_restart() -> None:
    """They go on fading from where they were, on a clock that starts anywhere, the time away included."""
    old, new = latency_of(30.0, now=100.0), Latency()
    old.observe_rate(2_000, 10.0, 100.0)
    old.observe_failure(SMALL, 40.0, 100.0)
    saved = msgspec.json.decode(msgspec.json.encode(old.snapshot(150.0)), type=LatencySnapshot)

    new.restore(saved, 9e5, elapsed_s=50.0)

    for estimate in ("pace_s", "p_fail"):
        assert getattr(old, estimate)(200.0) == pytest.approx(getattr(new, estimate)(9e5))
    assert old.output_tokens(None, 200.0) == pytest.approx(new.output_tokens(None, 9e5))
    for tokens in (SMALL, 5_000, LARGE):
        assert old.first_token_s(tokens, 200.0) == pytest.approx(new.first_token_s(tokens, 9e5))


def test_an_empty_snapshot_restores_to_the_seeds() -> None:
    """What was never observed stays unobserved."""
    latency = Latency()

    latency.restore(Latency().snapshot(5.0), 10.0)

    assert SEED_S[0] == latency.first_token_s(SMALL, 10.0)
    assert latency.p_fail(10.0) == 0.02


def test_a_damaged_snapshot_does_no_harm() -> None:
    """Values that nobody could have observed are brought back into their bounds; a strange shape is left out."""
    latency, nan = Latency(), math.nan

    latency.restore(LatencySnapshot((nan,) * CLASSES, (-5.0,) * CLASSES, 0.0, -1.0, 1e99, nan, 9.0, -2.0, 0.0), 10.0)
    latency.restore(LatencySnapshot((1.0,), (0.0,), -1.0, 0.0, -1.0, 0.0, 9.0, 2.0, 0.0), 10.0)

    assert 0.0 < latency.first_token_s(SMALL, 10.0) <= WAIT_MAX_S
    assert latency.pace_s(10.0) == pytest.approx(1e-4)
    assert latency.output_tokens(None, 10.0) == 0.0
    assert 0.0 <= latency.p_fail(10.0) <= 1.0


def test_a_policy_that_cannot_work_is_refused() -> None:
    """All that is wrong is said at once."""
    with pytest.raises(ValueError, match=r"tau_s must be .*; seed_s needs 5 values.*; tokens_per_s must be"):
        LatencyPolicy(tau_s=0.0, seed_s=(1.0,), tokens_per_s=0.0)


# --- affinity -------------------------------------------------------------------------------------------------------


def test_the_last_prompt_is_the_expected_hit() -> None:
    """Per conversation and upstream, never more than the prompt itself."""
    affinity = Affinity()
    affinity.remember(7, "a", 10_000, 0.0)

    assert affinity.hit_tokens(7, "a", 12_000, 1.0) == 10_000
    assert affinity.hit_tokens(7, "a", 4_000, 1.0) == 4_000
    assert affinity.hit_tokens(7, "b", 12_000, 1.0) == 0
    assert affinity.hit_tokens(8, "a", 12_000, 1.0) == 0


def test_a_cache_lives_five_minutes_from_its_last_use() -> None:
    """Every answered prompt starts them anew."""
    affinity = Affinity()

    affinity.remember(7, "a", 10_000, 0.0)
    affinity.remember(7, "a", 11_000, 250.0)

    assert affinity.hit_tokens(7, "a", 12_000, 550.0) == 11_000
    assert affinity.hit_tokens(7, "a", 12_000, 550.1) == 0


def test_the_least_recently_used_pair_is_forgotten_first() -> None:
    """The table does not grow."""
    affinity = Affinity(entries=2)

    for conversation in (1, 2, 1, 3):
        affinity.remember(conversation, "a", 100, 0.0)

    assert len(affinity) == 2
    assert [affinity.hit_tokens(conversation, "a", 200, 0.0) for conversation in (1, 2, 3)] == [100, 0, 100]


# --- the order ------------------------------------------------------------------------------------------------------

totals_and_weights = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.1, 1.0)), max_size=12)
draws = st.floats(0, 1, exclude_max=True)


@given(totals_and_weights, draws)
def test_order_is_a_permutation_with_its_first_in_the_band(pairs: list[tuple[float, float]], draw: float) -> None:
    """Everybody once; the first within a tenth of the best; the rest ascending."""
    totals = [total for total, _ in pairs]

    ordered = order(totals, [weight for _, weight in pairs], draw)

    assert list(range(len(pairs))) == sorted(ordered)
    if pairs:
        assert totals[ordered[0]] - min(totals) <= 0.10 * min(totals)
        rest = [totals[place] for place in ordered[1:]]
        assert rest == sorted(rest)


def test_a_clear_best_is_always_first() -> None:
    """Nothing is left to chance beyond the band."""
    assert {(1, 2, 0)} == {tuple(order([3.0, 1.0, 1.2], [1.0, 0.1, 1.0], draw / 100)) for draw in range(100)}


def test_near_equals_share_and_the_cheaper_gets_more() -> None:
    """All within the band get their turn: equals equally, the edge a quarter of the best's share."""
    equals = Counter(order([1.0, 1.0], [1.0, 1.0], draw / 1000)[0] for draw in range(1000))
    unequal = Counter(order([11.0, 10.0], [1.0, 1.0], draw / 1000)[0] for draw in range(1000))

    assert equals == {0: 500, 1: 500}
    assert unequal[0] / unequal[1] == pytest.approx(EDGE_SHARE, abs=0.002)


def test_a_recovering_upstream_gets_its_share_of_the_draw() -> None:
    """Slow start weighs in the draw between near equals."""
    first = Counter(order([1.0, 1.0], [0.1, 1.0], draw / 1100)[0] for draw in range(1100))

    assert first == {0: 100, 1: 1000}


def test_equals_at_zero_cost_and_weight_are_still_ordered() -> None:
    """No division by nothing."""
    assert sorted(order([0.0, 0.0], [1.0, 1.0], 0.7)) == [0, 1]
    assert order([2.0, 2.0], [0.0, 0.0], 0.7) == [0, 1]
    assert order([5.0], [1.0], 0.9) == [0]
    assert order([], [], 0.9) == []


# --- keys -----------------------------------------------------------------------------------------------------------


def test_two_choices_avoid_the_busiest_key() -> None:
    """Of two keys drawn the less loaded wins, so the busiest is never picked and the idlest most often."""
    picked = Counter(pick_key([5.0, 1.0, 9.0], draw / 600) for draw in range(600))

    assert picked == {1: 400, 0: 200}


def test_equal_keys_share_equally() -> None:
    """No key is first by its place."""
    assert Counter(pick_key([2, 2, 2, 2], draw / 1200) for draw in range(1200)) == dict.fromkeys(range(4), 300)


@given(st.lists(st.floats(0, 100) | st.just(math.inf), min_size=1, max_size=64), draws)
def test_a_key_is_always_found_and_never_an_unusable_one_while_few_are(loads: list[float], draw: float) -> None:
    """An infinite load loses against any other."""
    picked = pick_key(loads, draw)

    assert 0 <= picked < len(loads)
    if loads.count(math.inf) <= min(1, len(loads) - 1):
        assert loads[picked] < math.inf


def test_a_pool_without_keys_is_a_bug() -> None:
    """It is refused, not answered with a place that does not exist."""
    with pytest.raises(ValueError, match="never empty"):
        pick_key([], 0.5)
