"""The ledger of one provider and key: admission, settling, what upstreams say, refusals, and restarts."""

from __future__ import annotations

import datetime as dt
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from routerd.canonical import Limit, LimitReport
from routerd.policy import quota as ledger
from routerd.policy.meters import GUARD_S, Amount, calendar
from routerd.policy.quota import Quota, Reason, Reservation, guess_s

NOW = 5000.0
WALL = dt.datetime(2026, 11, 21, 12, 0, tzinfo=dt.UTC).timestamp()
MODEL = "vendor/model:free"
ONE = Amount()


def reserved(quota: Quota, amount: Amount = ONE, now: float = NOW, wall: float = WALL) -> Reservation:
    reservation = quota.reserve(MODEL, amount, now, wall)
    assert reservation is not None
    return reservation


def remaining(quota: Quota, now: float = NOW, wall: float = WALL) -> dict[str, float]:
    return {status.name: status.remaining for status in quota.status(now, wall)}


class TestAdmission:
    def test_without_limits_everything_is_admitted(self) -> None:
        """A provider nobody limits costs no waiting and no bookkeeping."""
        quota = Quota([])

        assert quota.wait_s(MODEL, ONE, NOW, WALL) == 0
        assert quota.headroom(MODEL, NOW, WALL) == 1
        assert not quota.persistent(MODEL)
        quota.settle(reserved(quota), ONE, NOW, WALL)

    def test_two_hundred_at_once_get_what_both_limits_allow(self) -> None:
        """Twenty a minute and fifty a day: 20, then 20, then 10, then none until midnight UTC."""
        quota = Quota([Limit(20, "requests", "minute"), Limit(50, "requests", "day", "UTC")])

        def rush(after_s: float) -> int:
            answers = [quota.reserve(MODEL, ONE, NOW + after_s, WALL + after_s) for _ in range(200)]
            return sum(answer is not None for answer in answers)

        assert [rush(0), rush(59), rush(61), rush(122), rush(183), rush(12 * 3600)] == [20, 0, 20, 10, 0, 0]
        assert rush(12 * 3600 + GUARD_S) == 20

    def test_all_limits_or_none(self) -> None:
        """What one limit refuses is not taken from another."""
        quota = Quota([Limit(20, "requests", "minute"), Limit(1000, "tokens", "minute")])
        reserved(quota, Amount(1, 900))

        assert quota.reserve(MODEL, Amount(1, 200), NOW, WALL) is None
        assert remaining(quota) == {"requests/minute": 19, "tokens/minute": 100}

    def test_a_wait_is_long_enough(self) -> None:
        """Whoever waits as long as told, and is alone, is admitted."""
        quota = Quota(
            [Limit(2, "requests", "minute"), Limit(6000, "tokens", "minute"), Limit(2, "requests", "hour", "UTC")]
        )
        amount, after_s = Amount(1, 3000), 0.0
        for _ in range(8):
            wait_s = quota.wait_s(MODEL, amount, NOW + after_s, WALL + after_s)
            reservation = quota.reserve(MODEL, amount, NOW + after_s, WALL + after_s)
            assert (wait_s > 0) == (reservation is None)
            if reservation is not None:
                quota.settle(reservation, amount, NOW + after_s, WALL + after_s)
            after_s += wait_s

        assert after_s > 2 * 3600

    def test_what_can_never_fit_is_told_apart_from_what_has_to_wait(self) -> None:
        """A prompt above tokens per minute makes the upstream incapable of it, not busy."""
        quota = Quota([Limit(8000, "tokens", "minute")])

        assert quota.wait_s(MODEL, Amount(1, 9000), NOW, WALL) == math.inf
        assert quota.wait_s(MODEL, Amount(1, 8000), NOW, WALL) == 0

    def test_a_glob_names_the_models_that_share_a_limit(self) -> None:
        """Case counts, and models outside the glob are not limited."""
        quota = Quota([Limit(1, "requests", "day", "UTC", "*:free")])
        reserved(quota)

        assert quota.wait_s("other/one:free", ONE, NOW, WALL) > 0
        assert quota.wait_s("other/one:FREE", ONE, NOW, WALL) == 0
        assert quota.wait_s("other/one", ONE, NOW, WALL) == 0

    def test_what_costs_nothing_passes_an_empty_budget(self) -> None:
        """A money limit that is used up does not stop free models."""
        quota = Quota([Limit(5, "usd", "day", "Europe/Berlin")])
        quota.settle(reserved(quota, Amount(1, 100, 4.0)), Amount(1, 100, 5.5), NOW, WALL)

        assert quota.wait_s(MODEL, Amount(1, 100, 0.01), NOW, WALL) > 0
        assert quota.wait_s(MODEL, Amount(1, 100, 0.0), NOW, WALL) == 0

    def test_headroom_is_the_smallest_share(self) -> None:
        """Ten of twenty and forty of fifty left is a half; an overrun is nothing, not less."""
        quota = Quota([Limit(20, "requests", "minute"), Limit(1000, "tokens", "minute")])
        reserved(quota, Amount(10, 100))
        assert quota.headroom(MODEL, NOW, WALL) == 0.5

        quota.settle(reserved(quota, Amount(1, 100)), Amount(1, 5000), NOW, WALL)
        assert quota.headroom(MODEL, NOW, WALL) == 0

    def test_of_two_limits_alike_the_tighter_counts(self) -> None:
        """Whichever is written first."""
        twins = [Limit(3, "requests", "minute"), Limit(2, "requests", "minute")]

        assert remaining(Quota(twins)) == remaining(Quota(twins[::-1])) == {"requests/minute": 2}

    def test_the_models_remembered_are_bounded(self) -> None:
        """However many names are asked for, memory stays and answers stay right."""
        quota = Quota([Limit(1, "requests", "minute", models="a*")])
        for number in range(ledger.MAX_MODELS * 2):
            quota.wait_s(f"a{number}", ONE, NOW, WALL)

        assert len(quota._lanes) <= ledger.MAX_MODELS
        assert quota.reserve("a1", ONE, NOW, WALL) is not None
        assert quota.reserve("a2", ONE, NOW, WALL) is None


class TestSettling:
    def test_usage_replaces_the_estimate(self) -> None:
        """Less gives back, more takes on."""
        quota = Quota([Limit(1000, "tokens", "day", "UTC")])

        quota.settle(reserved(quota, Amount(1, 500)), Amount(1, 100), NOW, WALL)
        assert remaining(quota) == {"tokens/day": 900}
        quota.settle(reserved(quota, Amount(1, 500)), Amount(1, 700), NOW, WALL)
        assert remaining(quota) == {"tokens/day": 200}

    def test_release_gives_everything_back(self) -> None:
        """A refused connection spent nothing."""
        limits = [Limit(20, "requests", "minute"), Limit(50, "requests", "day", "UTC"), Limit(900, "tokens", "minute")]
        quota = Quota([*limits, Limit(1, "usd", "month", "UTC")])
        before = remaining(quota)

        quota.release(reserved(quota, Amount(1, 500, 0.5)), NOW, WALL)

        assert before == remaining(quota)

    def test_some_upstreams_count_failed_requests(self) -> None:
        """Then the request stays spent, its tokens do not."""
        quota = Quota([Limit(20, "requests", "day", "UTC"), Limit(900, "tokens", "minute")])

        quota.settle(reserved(quota, Amount(1, 500)), Amount(requests=1), NOW, WALL)

        assert remaining(quota) == {"requests/day": 19, "tokens/minute": 900}

    def test_ending_twice_is_a_bug_and_changes_nothing(self) -> None:
        """The second end of a reservation raises, in any combination."""
        quota = Quota([Limit(20, "requests", "minute")])
        reservation = reserved(quota)
        quota.settle(reservation, ONE, NOW, WALL)

        with pytest.raises(RuntimeError):
            quota.settle(reservation, ONE, NOW, WALL)
        with pytest.raises(RuntimeError):
            quota.release(reservation, NOW, WALL)
        assert remaining(quota) == {"requests/minute": 19}

    def test_a_long_answer_is_charged_when_it_ends(self) -> None:
        """A bucket that was full all the while is short of exactly what the answer used."""
        quota = Quota([Limit(1000, "tokens", "minute")])
        answer = reserved(quota, Amount(1, 700))

        quota.settle(answer, Amount(1, 600), NOW + 300, WALL + 300)

        assert remaining(quota, NOW + 300, WALL + 300) == {"tokens/minute": 400}

    def test_an_answer_that_ends_after_midnight_leaves_the_new_day_alone(self) -> None:
        """Neither its overrun nor its saving belongs to the next window."""
        quota = Quota([Limit(1000, "tokens", "day", "UTC")])
        less, more = reserved(quota, Amount(1, 300)), reserved(quota, Amount(1, 300))
        reserved(quota, Amount(1, 100), NOW + 43_300, WALL + 43_300)

        quota.settle(less, Amount(1, 10), NOW + 43_300, WALL + 43_300)
        quota.settle(more, Amount(1, 900), NOW + 43_300, WALL + 43_300)

        assert remaining(quota, NOW + 43_300, WALL + 43_300) == {"tokens/day": 900}


class TestReconcile:
    def test_less_than_we_thought_is_believed_at_once(self) -> None:
        """Somebody else uses the same key."""
        quota = Quota([Limit(50, "requests", "day", "UTC")])

        quota.reconcile([LimitReport("requests", "day", 50, 7)], MODEL, NOW, WALL)

        assert remaining(quota) == {"requests/day": 7}

    def test_what_left_after_the_answered_request_comes_off_too(self) -> None:
        """The upstream cannot have counted in this answer what it may not have received yet."""
        quota = Quota([Limit(50, "requests", "day", "UTC")])
        answered = reserved(quota)
        reserved(quota)
        reserved(quota)

        quota.reconcile([LimitReport("requests", "day", 50, 7)], MODEL, NOW, WALL, reservation=answered)

        assert remaining(quota) == {"requests/day": 5}

    def test_more_than_we_thought_is_believed_but_for_what_is_in_flight(self) -> None:
        """A stated figure is evidence; others in flight may be missing in it."""
        quota = Quota([Limit(50, "requests", "day", "UTC")])
        for _ in range(30):
            quota.settle(reserved(quota), ONE, NOW, WALL)
        for _ in range(2):
            reserved(quota)
        answered = reserved(quota)

        quota.reconcile([LimitReport("requests", "day", 50, 40)], MODEL, NOW, WALL, reservation=answered)

        assert remaining(quota) == {"requests/day": 38}

    @pytest.mark.parametrize(
        "report",
        [
            LimitReport("requests", "day", None, 40),  # of which limit?
            LimitReport("requests", "day", 1000, 990),  # the upstream's is wider than our own cap
            LimitReport("requests", "day", 50, None),
            LimitReport("requests", "day", 50, math.nan),
            LimitReport("requests", "day", 50, math.inf),
            LimitReport("requests", "month", 1000, 990),
            LimitReport("tokens", "day", 50, 40),
        ],
    )
    def test_there_is_no_optimism_without_evidence(self, report: LimitReport) -> None:
        """A figure that is not clearly about this very limit gives nothing back."""
        quota = Quota([Limit(50, "requests", "day", "UTC")])
        for _ in range(30):
            quota.settle(reserved(quota), ONE, NOW, WALL)

        quota.reconcile([report], MODEL, NOW, WALL)

        assert remaining(quota)["requests/day"] == 20

    def test_a_statement_about_yesterday_does_not_close_today(self) -> None:
        """An answer under way since before midnight speaks of a window that is over."""
        quota = Quota([Limit(50, "requests", "day", "UTC")])
        answered = reserved(quota)

        quota.reconcile(
            [LimitReport("requests", "day", 50, 0)], MODEL, NOW + 43_300, WALL + 43_300, reservation=answered
        )

        assert remaining(quota, NOW + 43_300, WALL + 43_300) == {"requests/day": 50}

    @pytest.mark.parametrize("release_first", [True, False])
    def test_a_refused_request_gives_nothing_back_once_the_upstream_said_zero(self, *, release_first: bool) -> None:
        """Zero is zero, in whatever order the refusal is read and the reservation released."""
        quota = Quota(
            [Limit(50, "requests", "day", "UTC"), Limit(20, "requests", "minute"), Limit(900, "tokens", "minute")]
        )
        refused, reports = (
            reserved(quota, Amount(1, 100)),
            [
                LimitReport("requests", "day", 50, 0),
                LimitReport("requests", "minute", 20, 0),
                LimitReport("tokens", "minute", 900, 0),
            ],
        )
        if release_first:
            quota.release(refused, NOW, WALL)
        quota.reconcile(reports, MODEL, NOW, WALL, reservation=refused)
        if not release_first:
            quota.release(refused, NOW, WALL)

        assert set(remaining(quota).values()) == {0}

    def test_a_figure_that_agrees_with_ours_settles_it(self) -> None:
        """Ours counted a request that the upstream counted too, or else somebody else's: it gives nothing back."""
        quota = Quota([Limit(50, "requests", "day", "UTC")])
        failing, answered = reserved(quota), reserved(quota)

        quota.reconcile([LimitReport("requests", "day", 50, 48)], MODEL, NOW, WALL, reservation=answered)
        quota.release(failing, NOW, WALL)

        assert remaining(quota) == {"requests/day": 48}

    def test_a_tighter_limit_than_configured_is_believed_a_wider_is_not(self) -> None:
        """The upstream knows its limits, and a cap of one's own may be below them."""
        quota = Quota([Limit(100, "tokens", "minute")])

        quota.reconcile([LimitReport("tokens", "minute", 80)], MODEL, NOW, WALL)
        assert quota.wait_s(MODEL, Amount(1, 90), NOW, WALL) == math.inf
        quota.reconcile([LimitReport("tokens", "minute", 500)], MODEL, NOW, WALL)
        assert quota.status(NOW, WALL)[0].limit == 100

    def test_usage_announced_to_end_soon_is_forgotten_then(self) -> None:
        """A stated reset dates what somebody else spent in a rolling period."""
        quota = Quota([Limit(20, "requests", "minute")])

        quota.reconcile([LimitReport("requests", "minute", 20, 0, reset_s=9.0)], MODEL, NOW, WALL)

        assert 9.0 <= quota.wait_s(MODEL, Amount(20), NOW, WALL) <= 10.0

    def test_a_statement_without_a_period_goes_to_the_limit_of_that_size(self) -> None:
        """Else to the shortest that can take that long to reset."""
        limits = [Limit(1000, "requests", "day", "UTC"), Limit(30, "requests", "minute")]

        by_size, by_reset, by_default = Quota(limits), Quota(limits), Quota(limits)
        by_size.reconcile([LimitReport("requests", None, 1000, 5)], MODEL, NOW, WALL)
        by_reset.reconcile([LimitReport("requests", None, None, 5, reset_s=7000.0)], MODEL, NOW, WALL)
        by_default.reconcile([LimitReport("requests", None, None, 5)], MODEL, NOW, WALL)

        assert remaining(by_size) == remaining(by_reset) == {"requests/day": 5, "requests/minute": 30}
        assert remaining(by_default) == {"requests/day": 1000, "requests/minute": 5}


class TestLearned:
    def test_an_unconfigured_limit_is_learned_for_its_model(self) -> None:
        """It holds until its stated reset, and for no other model."""
        quota = Quota([])

        quota.reconcile([LimitReport("requests", "hour", 100, 0, reset_s=600.0)], MODEL, NOW, WALL)

        assert quota.reserve(MODEL, ONE, NOW, WALL) is None
        assert quota.wait_s(MODEL, ONE, NOW, WALL) == pytest.approx(600 + GUARD_S, abs=0.01)
        assert quota.wait_s("another", ONE, NOW, WALL) == 0
        assert quota.reserve(MODEL, ONE, NOW + 601, WALL + 601) is not None

    def test_it_follows_what_the_upstream_says_next(self) -> None:
        """Wider limits included: there is no configured one to respect."""
        quota = Quota([])
        quota.reconcile([LimitReport("tokens", "minute", 8000, 100, reset_s=60.0)], MODEL, NOW, WALL)
        assert quota.reserve(MODEL, Amount(1, 200), NOW, WALL) is None

        quota.reconcile([LimitReport("tokens", "minute", 30_000, 29_000, reset_s=2.0)], MODEL, NOW, WALL)

        assert quota.reserve(MODEL, Amount(1, 20_000), NOW, WALL) is not None
        assert quota.reserve(MODEL, Amount(1, 20_000), NOW, WALL) is None

    @pytest.mark.parametrize("report", [LimitReport("requests", "day", None, 3), LimitReport("requests", "day", 0, 0)])
    def test_too_little_said_teaches_nothing(self, report: LimitReport) -> None:
        """A limit of unknown or no size cannot be metered."""
        quota = Quota([])

        quota.reconcile([report], MODEL, NOW, WALL)

        assert quota.status(NOW, WALL) == []

    def test_what_is_learned_is_bounded(self) -> None:
        """Upstreams that name ever new models cost no memory."""
        quota = Quota([])
        for number in range(ledger.MAX_LEARNED * 3):
            quota.reconcile([LimitReport("requests", "day", 100, 5)], f"m{number}", NOW, WALL)

        assert len(quota.status(NOW, WALL)) == ledger.MAX_LEARNED
        assert remaining(quota)["requests/day m191"] == 5


def refuse(quota: Quota, reason: Reason = "rate_limited", now: float = NOW, stated_s: float | None = None) -> float:
    """Seconds it is closed for after a refusal, without jitter."""
    until_now = None if stated_s is None else now + stated_s
    return quota.block(MODEL, reason, now, WALL + now - NOW, until_now=until_now) - now


class TestBlocks:
    def test_a_stated_time_holds(self) -> None:
        """Until then there is nothing; then there is everything."""
        quota = Quota([])

        assert refuse(quota, stated_s=30) == 30
        assert quota.wait_s(MODEL, ONE, NOW + 10, WALL + 10) == 20
        assert quota.headroom(MODEL, NOW + 10, WALL + 10) == 0
        assert quota.reserve(MODEL, ONE, NOW + 29, WALL + 29) is None
        assert quota.reserve(MODEL, ONE, NOW + 30, WALL + 30) is not None
        assert quota.wait_s("another", ONE, NOW, WALL) == 0

    def test_without_a_stated_time_it_climbs_the_ladder(self) -> None:
        """1 s, 2 s, the next minute but not under 15 s, 30 s, 60 s, 60 s."""
        quota, now, waits_s = Quota([]), NOW, []
        for _ in range(6):
            waits_s.append(refuse(quota, now=now))
            now += waits_s[-1]

        assert waits_s == pytest.approx([1, 2, 57 * 1.1, 30, 60, 60])

    @pytest.mark.parametrize(
        ("reason", "strikes", "second", "shortest_s", "longest_s"),
        [
            ("rate_limited", 0, 0, 0.8, 1.2),
            ("rate_limited", 2, 10, 50, 60),
            ("rate_limited", 2, 50, 70, 84),
            ("rate_limited", 99, 0, 48, 72),
            ("exhausted", 0, 0, 2880, 4320),
            ("exhausted", 1, 0, 5760, 8640),
            ("exhausted", 99, 0, 69_120, 103_680),
        ],
    )
    def test_guesses_are_spread(
        self, reason: Reason, strikes: int, second: float, shortest_s: float, longest_s: float
    ) -> None:
        """By a fifth either way; a minute's end only later, since before it nothing changes."""
        wall = WALL // 60 * 60 + second

        assert guess_s(reason, strikes, wall, 0.0) == pytest.approx(shortest_s)
        assert guess_s(reason, strikes, wall, 1.0) == pytest.approx(longest_s)

    def test_a_burst_of_refusals_is_one_strike(self) -> None:
        """Ten requests that were under way together say the same thing once."""
        quota = Quota([])

        assert {refuse(quota) for _ in range(10)} == {1.0}
        assert refuse(quota, now=NOW + 1) == 2

    def test_a_success_ends_guesses_and_their_ladder(self) -> None:
        """But proves nothing against a refusal heard after it had left."""
        quota = Quota([])
        refuse(quota)
        refuse(quota, now=NOW + 1)

        quota.clear(MODEL, NOW + 2, since=NOW)
        assert quota.wait_s(MODEL, ONE, NOW + 2, WALL) > 0
        quota.clear(MODEL, NOW + 2, since=NOW + 1.5)
        assert quota.wait_s(MODEL, ONE, NOW + 2, WALL) == 0
        assert refuse(quota, now=NOW + 2) == 1

    def test_weaker_evidence_shortens_nothing(self) -> None:
        """A guess does not touch a statement, of two statements the longer stands, nor does a success end one."""
        quota = Quota([])
        refuse(quota, stated_s=300)

        assert refuse(quota, now=NOW + 1) == 299
        assert refuse(quota, now=NOW + 1, stated_s=5) == 299
        quota.clear(MODEL, NOW + 2)
        assert quota.wait_s(MODEL, ONE, NOW + 2, WALL) == 298
        assert refuse(quota, now=NOW + 2, stated_s=600) == 600

    def test_stronger_evidence_shortens_a_guess(self) -> None:
        """An hour was assumed, then the upstream says ten minutes."""
        quota = Quota([])

        assert refuse(quota, "exhausted") == 3600
        assert refuse(quota, "exhausted", stated_s=600) == 600

    def test_a_minute_s_refusal_leaves_an_exhausted_day_closed(self) -> None:
        """The two reasons are kept apart; the longer one decides."""
        quota = Quota([])
        refuse(quota, "exhausted")

        assert refuse(quota, "rate_limited", stated_s=2) == 3600

    def test_unknown_exhaustion_doubles_up_to_a_day(self) -> None:
        """1 h, 2 h, 4 h, 8 h, 16 h, 24 h, 24 h."""
        quota, now, hours = Quota([]), NOW, []
        for _ in range(7):
            wait_s = refuse(quota, "exhausted", now=now)
            hours.append(wait_s / 3600)
            now += wait_s

        assert hours == [1, 2, 4, 8, 16, 24, 24]

    def test_an_exhausted_day_ends_by_its_own_calendar(self) -> None:
        """The limit's zone says when, whatever the ledger thought was left and whoever shares it."""
        quota = Quota([Limit(20, "requests", "day", "America/Los_Angeles")])
        pending = reserved(quota)

        until = quota.block(MODEL, "exhausted", NOW, WALL, per="day")
        quota.release(pending, NOW, WALL)

        assert until - NOW == pytest.approx(20 * 3600, abs=2)
        assert quota.wait_s("another", ONE, NOW, WALL) == pytest.approx(20 * 3600, abs=2)

    def test_exhaustion_of_a_window_known_to_be_empty_is_that_window_s(self) -> None:
        """Nothing needs to be guessed when the ledger agrees; money budgets of our own are not what is meant."""
        quota = Quota([Limit(1, "requests", "day", "UTC"), Limit(1, "usd", "month", "UTC")])
        quota.settle(reserved(quota, Amount(1, 0, 1.0)), Amount(1, 0, 1.0), NOW, WALL)

        assert refuse(quota, "exhausted") == pytest.approx(12 * 3600, abs=2)
        assert refuse(Quota([Limit(1, "usd", "month", "UTC")]), "exhausted") == 3600

    def test_an_account_is_closed_for_all_its_models(self) -> None:
        """Those asked about before and those never heard of."""
        quota = Quota([])
        quota.wait_s("known", ONE, NOW, WALL)

        quota.block(MODEL, "exhausted", NOW, WALL, until_now=NOW + 50, account_wide=True)

        assert {quota.wait_s(model, ONE, NOW, WALL) for model in (MODEL, "known", "new")} == {50}

    def test_no_statement_closes_for_ever(self) -> None:
        """A reset in the year 9999 is a bug over there."""
        assert refuse(Quota([]), stated_s=1e12) == ledger.MAX_BLOCK_S

    def test_blocks_are_bounded(self) -> None:
        """The one that ends first is forgotten first."""
        quota = Quota([])
        for number in range(ledger.MAX_BLOCKS + 10):
            quota.block(f"m{number}", "rate_limited", NOW, WALL, until_now=NOW + 100 + number)

        assert len(quota._blocks) == ledger.MAX_BLOCKS
        assert quota.wait_s("m9", ONE, NOW, WALL) == 0
        assert quota.wait_s("m10", ONE, NOW, WALL) == 110


LONG = [
    Limit(50, "requests", "day", "UTC"),
    Limit(1000, "requests", "month"),
    Limit(9000, "tokens", "day"),
    Limit(5, "usd", "minute"),
]


class TestRestart:
    def test_what_was_reserved_before_a_kill_counts_as_spent(self) -> None:
        """The rows written before a request leaves hold its reservation, whatever became of it."""
        quota = Quota([*LONG, Limit(20, "requests", "minute")])
        rows = dict(quota.rows(NOW, WALL, reserved(quota, Amount(1, 4000, 2.0))))
        after = Quota(LONG)

        assert after.restore(rows, 3.0, WALL + 5) == []
        assert remaining(after, 3.0, WALL + 5) == pytest.approx(
            {"requests/day": 49, "requests/month": 999, "tokens/day": 5000, "usd/minute": 3}, abs=1
        )

    def test_only_what_is_long_or_dear_is_written(self) -> None:
        """A minute of requests or tokens is over before anybody could restart."""
        quota = Quota([Limit(20, "requests", "minute"), Limit(900, "tokens", "minute", "minute"), *LONG])

        assert len(quota.rows(NOW, WALL, reserved(quota))) == len(LONG)
        assert quota.persistent(MODEL)
        assert not Quota([Limit(20, "requests", "minute")]).persistent(MODEL)

    def test_keys_outlive_reordering_and_new_amounts(self) -> None:
        """Raising a limit forgets nothing; a limit that is gone is passed over."""
        quota = Quota(LONG)
        reserved(quota)

        after = Quota([Limit(80, "requests", "day", "UTC"), *LONG[2:]])
        assert after.restore(dict(quota.rows(NOW, WALL)), NOW, WALL) == []

        assert remaining(after)["requests/day"] == 79

    def test_a_window_that_ended_meanwhile_is_whole(self) -> None:
        """Yesterday's requests do not count today."""
        quota = Quota(LONG[:1])
        reserved(quota)
        after = Quota(LONG[:1])

        after.restore(dict(quota.rows(NOW, WALL)), NOW, WALL + 86_400)

        assert remaining(after, NOW, WALL + 86_400) == {"requests/day": 50}

    def test_exhaustion_is_remembered_and_a_passing_slowdown_is_not(self) -> None:
        """The ladder goes on where it stood."""
        quota = Quota([])
        refuse(quota, "exhausted")
        quota.block("other", "rate_limited", NOW, WALL)
        after = Quota([])

        after.restore(dict(quota.rows(NOW, WALL)), 10.0, WALL + 600)

        assert after.wait_s(MODEL, ONE, 10.0, WALL + 600) == pytest.approx(3000)
        assert after.wait_s("other", ONE, 10.0, WALL + 600) == 0
        assert after.block(MODEL, "exhausted", 3010.0, WALL + 3600) == pytest.approx(3010 + 7200)

    def test_rows_that_cannot_be_read_are_named(self) -> None:
        """The rest is restored."""
        quota = Quota(LONG)
        reserved(quota)
        rows = dict(quota.rows(NOW, WALL)) | {"tokens/day rolling *": b"\x00", "mystery": b"[]"}
        after = Quota(LONG)

        assert after.restore(rows, NOW, WALL) == ["tokens/day rolling *", "mystery"]
        assert remaining(after)["requests/day"] == 49

    def test_a_new_configuration_keeps_what_was_spent_and_what_is_in_flight(self) -> None:
        """Same limits keep their meters, changed ones their spending, and blocks stay."""
        old = Quota([Limit(20, "requests", "minute"), Limit(50, "requests", "day", "UTC")])
        flying = reserved(old)
        refuse(old, stated_s=5)

        new = Quota(
            [Limit(20, "requests", "minute"), Limit(10, "requests", "day", "UTC")], previous=old, now=NOW, wall=WALL
        )
        old.release(flying, NOW, WALL)

        assert remaining(new) == {"requests/minute": 20, "requests/day": 9}
        assert new.wait_s(MODEL, ONE, NOW, WALL) == 5


class LedgerMachine(RuleBasedStateMachine):
    """Any order of reserving, settling, releasing, passing of time, clocks set back, statements and restarts.

    The model is a list of what was admitted when, and what it turned out to have used.
    """

    LIMITS = (
        Limit(5, "requests", "minute"),
        Limit(9, "requests", "hour", "UTC"),
        Limit(12, "requests", "day", "Europe/Berlin"),
        Limit(1000, "tokens", "minute"),
        Limit(2, "usd", "day", "America/Los_Angeles"),
    )

    @initialize(start=st.sampled_from([WALL, WALL + 11 * 3600 - 90, WALL + 12 * 3600 - 90, 1_774_742_370.0]))
    def begin(self, start: float) -> None:
        self.quota = Quota(self.LIMITS)
        self.now, self.wall = NOW, start
        self.flying: list[tuple[Reservation, int]] = []
        self.spent: list[tuple[float, float, Amount]] = []

    @rule(seconds=st.floats(0, 100) | st.sampled_from([0.5, 59.5, 61.0, 3600.0, 86_400.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    @rule(seconds=st.floats(0, 1800))
    def set_the_clock_back(self, seconds: float) -> None:
        """For a moment: then whoever had to wait still has to."""
        if self.quota.wait_s(MODEL, ONE, self.now, self.wall) > 0:
            assert self.quota.wait_s(MODEL, ONE, self.now, self.wall - seconds) > 0

    @rule(tokens=st.floats(1, 400), usd=st.floats(0, 0.5))
    def reserve(self, tokens: float, usd: float) -> None:
        amount = Amount(1, tokens, usd)
        wait_s = self.quota.wait_s(MODEL, amount, self.now, self.wall)
        reservation = self.quota.reserve(MODEL, amount, self.now, self.wall)

        assert (wait_s == 0) == (reservation is not None)
        assert wait_s < math.inf
        if reservation is not None:
            self.flying.append((reservation, len(self.spent)))
            self.spent.append((self.now, self.wall, amount))

    @precondition(lambda self: self.flying)
    @rule(share=st.floats(0, 1), data=st.data())
    def settle(self, share: float, data: st.DataObject) -> None:
        reservation, place = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        now, wall, amount = self.spent[place]
        actual = Amount(1, amount.tokens * share, amount.usd * share)
        self.quota.settle(reservation, actual, self.now, self.wall)
        self.spent[place] = (now, wall, actual)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        before = remaining(self.quota, self.now, self.wall)
        reservation, place = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.quota.release(reservation, self.now, self.wall)
        self.spent[place] = (*self.spent[place][:2], Amount(0, 0, 0))

        after = remaining(self.quota, self.now, self.wall)
        assert all(after[name] >= before[name] - 1e-9 for name in before)

    @rule(left=st.floats(0, 12), index=st.integers(0, 2))
    def hear_of_less(self, left: float, index: int) -> None:
        limit = self.LIMITS[index]
        ours = remaining(self.quota, self.now, self.wall)[limit.name]
        self.quota.reconcile([LimitReport("requests", limit.per, None, left)], MODEL, self.now, self.wall)

        assert remaining(self.quota, self.now, self.wall)[limit.name] == pytest.approx(min(left, ours))

    @rule(reason=st.sampled_from(["rate_limited", "exhausted"]))
    def be_refused(self, reason: Reason) -> None:
        assert self.quota.block(MODEL, reason, self.now, self.wall) > self.now
        assert self.quota.reserve(MODEL, ONE, self.now, self.wall) is None
        self.quota.clear(MODEL, self.now)

    @rule()
    def be_killed(self) -> None:
        """Long windows are restored from their rows; the minute's requests and tokens start anew."""
        rows = dict(self.quota.rows(self.now, self.wall))
        after = Quota(self.LIMITS, previous=self.quota, now=self.now, wall=self.wall)
        fresh = Quota([limit for limit in self.LIMITS if limit.per != "minute"])
        fresh.restore(rows, 7.0, self.wall)

        ours = remaining(self.quota, self.now, self.wall)
        assert remaining(fresh, 7.0, self.wall) == pytest.approx({k: v for k, v in ours.items() if "minute" not in k})
        self.quota = after

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        """In the last period, or the present window, no more was used than the amount."""
        if not self.spent:
            return
        recent = [amount for now, _, amount in self.spent if self.now - now < 60]
        assert sum(amount.requests for amount in recent) <= 5
        assert sum(amount.tokens for amount in recent) <= 2 * 1000 + 1e-6
        for limit in (self.LIMITS[1], self.LIMITS[2], self.LIMITS[4]):
            windows = calendar(limit)
            used: dict[tuple[float, float], float] = {}
            for _, wall, amount in self.spent:
                used[windows(wall)] = used.get(windows(wall), 0.0) + getattr(amount, limit.unit)
            assert max(used.values()) <= limit.amount + 1e-6


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
