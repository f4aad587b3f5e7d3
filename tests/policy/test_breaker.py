"""When an upstream is left alone, and how it comes back. Time is virtual: every call is told what time it is."""

import math
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from routerd.policy.breaker import (
    JITTER,
    RECHECK_S,
    RETRY_AFTER_MAX_S,
    WINDOW_RESULTS,
    Breaker,
    BreakerPolicy,
    BreakerSnapshot,
    NotAdmitted,
    Permit,
    PermitSettledTwice,
)

POLICY = BreakerPolicy()
NO_JITTER = 0.0


def succeed(breaker: Breaker, now: float, times: int = 1) -> None:
    for _ in range(times):
        breaker.success(breaker.begin(now), now)


def fail(breaker: Breaker, now: float, times: int = 1, draw: float = NO_JITTER) -> None:
    for _ in range(times):
        breaker.failure(breaker.begin(now), now, draw)


def state_after_failure(breaker: Breaker, now: float) -> str:
    fail(breaker, now)
    return breaker.state


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker("groq/x", POLICY)
    fail(breaker, now, times=3)
    return breaker


# --- tripping -------------------------------------------------------------------------------------------------------


def test_trips_on_three_failures_in_a_row() -> None:
    """The third failure in a row opens the breaker, the second does not."""
    breaker = Breaker("x", POLICY)

    fail(breaker, 0.0, times=2)
    assert breaker.state == "closed"
    assert state_after_failure(breaker, 0.0) == "open"


def test_a_success_ends_a_row() -> None:
    """Failures with a success between them are no row; far apart in time they still are one."""
    breaker = Breaker("x", BreakerPolicy(ratio=1.0))

    fail(breaker, 0.0, times=2)
    succeed(breaker, 1.0)
    fail(breaker, 2.0, times=2)
    assert breaker.state == "closed"
    assert state_after_failure(breaker, 9999.0) == "open"


def test_trips_on_half_of_five() -> None:
    """An upstream that fails every other time never has three in a row, and trips all the same."""
    breaker = Breaker("x", POLICY)

    for _ in range(2):
        fail(breaker, 0.0)
        succeed(breaker, 0.0)
    assert breaker.state == "closed"
    assert state_after_failure(breaker, 0.0) == "open"


def test_only_failures_trip() -> None:
    """A success that makes up the number of results opens nothing, though the ratio is bad enough."""
    breaker = Breaker("x", POLICY)

    fail(breaker, 0.0, times=2)
    succeed(breaker, 0.0)
    fail(breaker, 0.0)
    succeed(breaker, 0.0)

    assert breaker.state == "closed"


@pytest.mark.parametrize(("later", "state"), [(300.0, "open"), (300.5, "closed")])
def test_the_window_slides_exactly(later: float, state: str) -> None:
    """A result counts as long as it is no older than the window, to the fraction of a second."""
    breaker = Breaker("x", POLICY)

    fail(breaker, 0.0, times=2)
    succeed(breaker, 0.0, times=2)
    fail(breaker, later)

    assert breaker.state == state


def test_the_window_is_bounded() -> None:
    """A busy upstream is judged on its newest results: older failures are forgotten before their time."""
    breaker = Breaker("x", BreakerPolicy(failures=2, min_requests=WINDOW_RESULTS, ratio=0.01))

    for _ in range(8):
        fail(breaker, 0.0)
        succeed(breaker, 0.0)
    succeed(breaker, 0.0, times=WINDOW_RESULTS)
    fail(breaker, 0.0)

    assert breaker.state == "closed"
    assert repr(breaker) == f"<Breaker x closed, 1/{WINDOW_RESULTS} failed>"


def test_a_trip_opens_at_once_for_long() -> None:
    """A refused key opens the breaker with the first answer, and is probed slowly."""
    breaker = Breaker("x", POLICY)

    breaker.trip(breaker.begin(10.0), 10.0, NO_JITTER)

    assert breaker.state == "open"
    assert breaker.reopens_in_s(10.0) == 600.0


# --- open -----------------------------------------------------------------------------------------------------------


def test_open_refuses_until_its_time_is_up() -> None:
    """Nothing is admitted for 15 s, then one probe is."""
    breaker = opened()

    assert not breaker.allows(14.999)
    assert breaker.reopens_in_s(12.0) == 3.0
    with pytest.raises(NotAdmitted):
        breaker.begin(14.999)
    assert breaker.allows(15.0)
    assert breaker.reopens_in_s(15.0) == 0.0
    assert breaker.begin(15.0).probe


def test_a_failed_probe_doubles_the_opening() -> None:
    """15, 30, 60 … seconds, up to ten minutes and no further."""
    breaker = opened()
    lengths = [breaker.reopens_in_s(0.0)]

    now = 0.0
    for _ in range(7):
        now += lengths[-1]
        fail(breaker, now)
        lengths.append(breaker.reopens_in_s(now))

    assert lengths == [15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 600.0, 600.0]


def test_jitter_shortens_and_never_lengthens() -> None:
    """The configured times are upper bounds; the draw takes up to a quarter off, at the longest opening too."""
    breaker = Breaker("x", BreakerPolicy(open_s=600.0))

    fail(breaker, 0.0, times=3, draw=0.5)

    assert breaker.reopens_in_s(0.0) == 600.0 * (1 - JITTER / 2)


@pytest.mark.parametrize(
    ("retry_after_s", "opening_s"),
    [(5.0, 15.0), (90.0, 90.0), (1e9, RETRY_AFTER_MAX_S), (-1.0, 15.0), (math.nan, 15.0)],
)
def test_retry_after_only_lengthens(retry_after_s: float, opening_s: float) -> None:
    """The upstream's own word counts when it asks for longer, within reason."""
    breaker = Breaker("x", BreakerPolicy(failures=1))

    breaker.failure(breaker.begin(0.0), 0.0, NO_JITTER, retry_after_s)

    assert breaker.reopens_in_s(0.0) == opening_s


# --- the probe ------------------------------------------------------------------------------------------------------


def test_one_probe_at_a_time() -> None:
    """While a probe is in flight nobody else gets in, and asking when says: look again soon."""
    breaker = opened()

    breaker.begin(20.0)

    assert breaker.state == "half-open"
    assert not breaker.allows(9999.0)
    assert breaker.reopens_in_s(9999.0) == RECHECK_S
    with pytest.raises(NotAdmitted):
        breaker.begin(9999.0)


def test_a_cancelled_probe_leaves_its_place() -> None:
    """A client that hangs up on the probe says nothing of the upstream: the next request is the probe, at once."""
    breaker = opened()

    breaker.neutral(breaker.begin(20.0), 21.0)

    assert breaker.state == "open"
    assert breaker.allows(21.0)
    fail(breaker, 21.0)
    assert breaker.reopens_in_s(21.0) == 30.0


def test_cancelled_attempts_count_nowhere() -> None:
    """Neutral ends neither trip a breaker nor interrupt a row of failures."""
    breaker = Breaker("x", POLICY)

    for _ in range(50):
        breaker.neutral(breaker.begin(0.0), 0.0)
    fail(breaker, 0.0, times=2)
    breaker.neutral(breaker.begin(0.0), 0.0)
    assert breaker.state == "closed"
    fail(breaker, 0.0)
    assert repr(breaker) == "<Breaker x open 15.0s left, 3/3 failed>"


def test_a_recovered_upstream_starts_with_a_clean_window() -> None:
    """The failures that opened the breaker do not count against the upstream once its probe has succeeded."""
    breaker = opened()

    succeed(breaker, 20.0)
    fail(breaker, 21.0, times=2)

    assert breaker.state == "closed"


# --- panic and late results -----------------------------------------------------------------------------------------


def test_a_forced_success_closes() -> None:
    """When nothing else was left and the upstream answered, it serves again without waiting for its time."""
    breaker = opened()

    permit = breaker.begin(1.0, forced=True)
    assert not permit.probe
    breaker.success(permit, 2.0)

    assert breaker.state == "closed"


def test_a_forced_failure_changes_nothing() -> None:
    """Panic does not push the probe further away."""
    breaker = opened()

    breaker.failure(breaker.begin(1.0, forced=True), 2.0, NO_JITTER, 500.0)

    assert breaker.reopens_in_s(2.0) == 13.0


def test_a_forced_attempt_is_the_probe_when_its_time_has_come() -> None:
    """There is never a reason to go beside the probe when the place is free."""
    assert opened().begin(15.0, forced=True).probe


def test_a_forced_success_overtakes_the_probe() -> None:
    """It closes the breaker, and the probe's own failure, coming later, opens nothing."""
    breaker = opened()
    forced = breaker.begin(1.0, forced=True)
    probe = breaker.begin(15.0)

    breaker.success(forced, 16.0)
    breaker.failure(probe, 17.0, NO_JITTER)

    assert breaker.state == "closed"


def test_a_forced_refusal_of_the_key_lengthens_the_opening() -> None:
    """A 401 is news whatever the state: the probe becomes a slow one, without a second transition."""
    heard: list[tuple[str, str, str]] = []
    breaker = Breaker("x", POLICY, lambda *transition: heard.append(transition))
    fail(breaker, 0.0, times=3)

    breaker.trip(breaker.begin(1.0, forced=True), 2.0, NO_JITTER)

    assert breaker.reopens_in_s(2.0) == 600.0
    assert heard == [("x", "closed", "open")]


@pytest.mark.parametrize("end", ["success", "failure", "trip", "neutral"])
def test_late_results_from_before_the_trip_count_nowhere(end: str) -> None:
    """A long answer that began before the trip neither closes the breaker nor moves its timer."""
    breaker = Breaker("x", POLICY)
    late = breaker.begin(0.0)
    fail(breaker, 0.0, times=3)
    extra = (NO_JITTER, 500.0) if end in {"failure", "trip"} else ()

    getattr(breaker, end)(late, 1.0, *extra)

    assert breaker.state == "open"
    assert breaker.reopens_in_s(1.0) == 14.0


def test_late_results_from_before_the_recovery_count_nowhere() -> None:
    """Failures of attempts that began while it was down do not trip an upstream that is up again."""
    breaker = opened()
    late = [breaker.begin(1.0, forced=True) for _ in range(5)]
    succeed(breaker, 20.0)

    for permit in late:
        breaker.failure(permit, 21.0, NO_JITTER)

    assert breaker.state == "closed"


def test_settling_twice_is_a_bug() -> None:
    """An attempt has one end."""
    breaker = Breaker("x", POLICY)
    permit = breaker.begin(0.0)
    breaker.success(permit, 0.0)

    with pytest.raises(PermitSettledTwice):
        breaker.neutral(permit, 0.0)


# --- coming back ----------------------------------------------------------------------------------------------------


def test_slow_start() -> None:
    """After recovery the weight climbs from a tenth to one over three successes."""
    breaker = opened()
    weights = [breaker.weight(15.0)]

    for _ in range(4):
        succeed(breaker, 15.0)
        weights.append(breaker.weight(15.0))

    assert weights == pytest.approx([0.1, 0.1, 0.4, 0.7, 1.0])
    assert Breaker("x", POLICY).weight(0.0) == 1.0


def test_slow_start_ends_by_time_too() -> None:
    """An upstream that is rarely drawn does not stay at a tenth for ever."""
    breaker = opened()
    succeed(breaker, 15.0)

    assert breaker.weight(165.0) == pytest.approx(0.55)
    assert breaker.weight(315.0) == 1.0


def test_flapping_is_not_forgiven() -> None:
    """Down again soon after a probe succeeded: the next opening is longer, as if the probe had failed."""
    breaker = opened()
    succeed(breaker, 15.0, times=4)

    fail(breaker, 20.0, times=3)

    assert breaker.reopens_in_s(20.0) == 30.0


def test_sustained_success_is_forgiven_one_opening_per_window() -> None:
    """Each five minutes without a failure, ended by a success, take one doubling back."""
    breaker = opened()
    for now in (15.0, 45.0):
        fail(breaker, now)
    succeed(breaker, 105.0)  # three openings: the next would be 120 s

    succeed(breaker, 105.0 + 300.0)
    succeed(breaker, 105.0 + 301.0)
    fail(breaker, 500.0, times=3)
    assert breaker.reopens_in_s(500.0) == 60.0

    succeed(breaker, 560.0)
    succeed(breaker, 560.0 + 7200.0)
    fail(breaker, 7800.0, times=3)
    assert breaker.reopens_in_s(7800.0) == 15.0


def test_a_failure_starts_the_good_window_anew() -> None:
    """One failure trips nothing, but five minutes with a failure in them forgive nothing."""
    breaker = opened()
    succeed(breaker, 15.0)

    fail(breaker, 200.0)
    succeed(breaker, 400.0)
    fail(breaker, 401.0, times=3)

    assert breaker.reopens_in_s(401.0) == 30.0


def test_slow_start_follows_a_trip_too() -> None:
    """A key that works again gets its traffic back by steps, although it has no backoff to live down."""
    breaker = Breaker("x", POLICY)
    breaker.trip(breaker.begin(0.0), 0.0, NO_JITTER)

    succeed(breaker, 600.0, times=2)
    assert breaker.weight(600.0) == pytest.approx(0.4)
    succeed(breaker, 600.0, times=2)
    assert breaker.weight(600.0) == 1.0


def test_slow_start_ends_once() -> None:
    """Neither forgiveness nor a single failure later on takes the weight back."""
    breaker = opened()
    fail(breaker, 15.0)
    succeed(breaker, 45.0)

    succeed(breaker, 345.0)
    assert breaker.weight(345.0) == 1.0
    fail(breaker, 346.0)
    assert breaker.weight(346.0) == 1.0


def test_the_listener_hears_every_transition() -> None:
    """Name, from, to; and by then the breaker itself says the same."""
    heard: list[tuple[str, str, str]] = []
    states: list[str] = []

    def listen(name: str, was: str, becomes: str) -> None:
        heard.append((name, was, becomes))
        states.append(breaker.state)

    breaker = Breaker("groq/x", POLICY, listen)
    fail(breaker, 0.0, times=3)
    breaker.neutral(breaker.begin(15.0), 15.0)
    succeed(breaker, 15.0)

    assert heard == [
        ("groq/x", "closed", "open"),
        ("groq/x", "open", "half-open"),
        ("groq/x", "half-open", "open"),
        ("groq/x", "open", "half-open"),
        ("groq/x", "half-open", "closed"),
    ]
    assert states == ["open", "half-open", "open", "half-open", "closed"]


def test_repr_shows_the_state() -> None:
    """What a debugger shows is what one would ask."""
    breaker = opened()
    assert repr(breaker) == "<Breaker groq/x open 15.0s left, 3/3 failed>"
    breaker.allows(2.6)
    assert repr(breaker) == "<Breaker groq/x open 12.4s left, 3/3 failed>"
    breaker.begin(15.0)
    assert repr(breaker) == "<Breaker groq/x half-open, probe in flight, 3/3 failed>"


# --- restarts -------------------------------------------------------------------------------------------------------


def test_an_opening_survives_a_restart() -> None:
    """The remaining time and the backoff are kept, on a clock that starts anywhere; the time away may be taken off."""
    old = opened()
    saved = msgspec.json.decode(msgspec.json.encode(old.snapshot(5.0)), type=BreakerSnapshot)
    new = Breaker("groq/x", POLICY)

    new.restore(saved, 77_000.0, elapsed_s=4.0)

    assert BreakerSnapshot(open=True, remaining_s=10.0, exponent=1) == saved
    assert new.reopens_in_s(77_000.0) == 6.0
    fail(new, 77_006.0)
    assert new.reopens_in_s(77_006.0) == 30.0


def test_a_probe_in_flight_at_the_restart_is_tried_again() -> None:
    """Its answer died with the process."""
    old, new = opened(), Breaker("x", POLICY)
    old.begin(15.0)

    new.restore(old.snapshot(16.0), 0.0)

    assert new.state == "open"
    assert new.begin(0.0).probe


def test_a_closed_breaker_keeps_its_record() -> None:
    """A restart is no way to be forgiven, but costs a healthy upstream no traffic."""
    old, new = opened(), Breaker("x", POLICY)
    succeed(old, 15.0)

    new.restore(old.snapshot(16.0), 0.0)

    assert new.state == "closed"
    assert new.weight(0.0) == 1.0
    fail(new, 0.0, times=3)
    assert new.reopens_in_s(0.0) == 30.0


def test_forgiveness_goes_on_after_a_restart() -> None:
    """From the restart on, a good window takes a doubling back as ever."""
    breaker = Breaker("x", POLICY)
    breaker.restore(BreakerSnapshot(open=False, remaining_s=0.0, exponent=2), 1000.0)

    succeed(breaker, 1300.0)
    fail(breaker, 1301.0, times=3)

    assert breaker.reopens_in_s(1301.0) == 30.0


@pytest.mark.parametrize("remaining_s", [-5.0, math.nan, math.inf, 1e300])
def test_a_damaged_snapshot_does_no_harm(remaining_s: float) -> None:
    """Whatever was stored, the upstream is probed again within the longest opening there is."""
    breaker = Breaker("x", POLICY)

    breaker.restore(BreakerSnapshot(open=True, remaining_s=remaining_s, exponent=10**9), 0.0)

    assert 0.0 <= breaker.reopens_in_s(0.0) <= RETRY_AFTER_MAX_S
    fail(breaker, RETRY_AFTER_MAX_S)
    assert breaker.reopens_in_s(RETRY_AFTER_MAX_S) == 600.0


def test_a_policy_that_cannot_work_is_refused() -> None:
    """All that is wrong is said at once, in the words of the config."""
    with pytest.raises(ValueError, match=r"failures must be .*; ratio must be .*; open must be above 0"):
        BreakerPolicy(failures=0, ratio=1.5, open_s=20.0, open_max_s=10.0)
    with pytest.raises(ValueError, match="min_requests must be from 1 to 512"):
        BreakerPolicy(min_requests=WINDOW_RESULTS + 1)


# --- against a naive model ------------------------------------------------------------------------------------------


@dataclass
class Naive:
    """The rules once more, with a list that is never trimmed and every question answered from the start."""

    policy: BreakerPolicy
    results: list[tuple[float, bool]] = field(default_factory=list)  # since the last opening or closing: (when, failed)
    state: str = "closed"
    spell: int = 0  # openings and closings so far
    until: float = 0.0
    unforgiven: int = 0
    good_since: float = 0.0

    def trips(self, now: float) -> bool:
        newest = self.results[-self.policy.failures :]
        in_a_row = len(newest) == self.policy.failures and all(failed for _, failed in newest)
        window = [failed for when, failed in self.results if now - when <= self.policy.window_s]
        return in_a_row or (len(window) >= self.policy.min_requests and sum(window) / len(window) >= self.policy.ratio)

    def succeeds(self, now: float) -> None:
        self.results.append((now, False))
        while self.unforgiven and now - self.good_since >= self.policy.window_s:
            self.unforgiven -= 1
            self.good_since += self.policy.window_s

    def fails(self, now: float) -> bool:
        self.results.append((now, True))
        self.good_since = now
        return self.trips(now)

    def backoff_s(self, draw: float) -> float:
        full_s = min(self.policy.open_s * 2**self.unforgiven, self.policy.open_max_s)
        self.unforgiven += full_s < self.policy.open_max_s
        return float(full_s * (1 - JITTER * draw))

    def open(self, until: float) -> None:
        self.state, self.until, self.spell, self.results = "open", until, self.spell + 1, []

    def close(self, now: float) -> None:
        self.state, self.spell, self.results, self.good_since = "closed", self.spell + 1, [], now


class AgainstTheModel(RuleBasedStateMachine):
    """Any interleaving of attempts and their ends, on a clock that only goes forward, with restarts in between.

    All times are multiples of an eighth of a second, so that both sides add them up without rounding.
    """

    policy = BreakerPolicy(window_s=40.0, open_s=8.0, open_max_s=64.0, slow_start_successes=2)

    @initialize(start=st.sampled_from([0.0, 1e6]))
    def begin_life(self, start: float) -> None:
        self.now = start
        self.heard: list[str] = ["closed"]
        self.breaker = Breaker("x", self.policy, lambda _name, _was, becomes: self.heard.append(becomes))
        self.model = Naive(self.policy)
        self.live: list[tuple[Permit, int]] = []  # unsettled permits, and the spell they began in
        self.settled: list[Permit] = []

    @rule(quarters=st.integers(0, 200))
    def pass_time(self, quarters: int) -> None:
        self.now += quarters / 4

    @precondition(lambda self: self.model.state == "open")
    @rule()
    def reach_the_deadline(self) -> None:
        self.now = max(self.now, self.model.until)

    @rule(forced=st.booleans())
    def begin(self, forced: bool) -> None:
        model = self.model
        is_probe = model.state == "open" and self.now >= model.until
        if not (model.state == "closed" or is_probe or forced):
            with pytest.raises(NotAdmitted):
                self.breaker.begin(self.now)
            return
        permit = self.breaker.begin(self.now, forced=forced)
        assert is_probe == permit.probe
        model.state = "half-open" if is_probe else model.state
        self.live.append((permit, model.spell))

    def settle(self, which: int) -> tuple[Permit, bool]:
        """Take a permit out of the living; true if its end should count."""
        permit, spell = self.live.pop(which % len(self.live))
        self.settled.append(permit)
        return permit, spell == self.model.spell

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def success(self, which: int) -> None:
        permit, counts = self.settle(which)
        self.breaker.success(permit, self.now)
        if counts and self.model.state == "closed":
            self.model.succeeds(self.now)
        elif counts:
            self.model.close(self.now)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), draw=st.sampled_from([0.0, 0.5]), retry=st.sampled_from([None, 1.0, 100.0]))
    def failure(self, which: int, draw: float, retry: float | None) -> None:
        permit, counts = self.settle(which)
        self.breaker.failure(permit, self.now, draw, retry)
        if counts and (permit.probe or (self.model.state == "closed" and self.model.fails(self.now))):
            self.model.open(self.now + max(self.model.backoff_s(draw), retry or 0.0))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def trip(self, which: int) -> None:
        permit, counts = self.settle(which)
        self.breaker.trip(permit, self.now, NO_JITTER)
        if counts and self.model.state == "open":
            self.model.until = max(self.model.until, self.now + self.policy.open_max_s)
        elif counts:
            self.model.open(self.now + self.policy.open_max_s)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def neutral(self, which: int) -> None:
        permit, counts = self.settle(which)
        counted = list(self.breaker._failed), self.breaker._counters.failures, self.breaker._exponent
        self.breaker.neutral(permit, self.now)
        assert counted == (list(self.breaker._failed), self.breaker._counters.failures, self.breaker._exponent)
        if counts and permit.probe:
            self.model.state = "open"

    @precondition(lambda self: self.settled)
    @rule(which=st.integers(0, 99), end=st.sampled_from(["success", "neutral"]))
    def settle_again(self, which: int, end: str) -> None:
        with pytest.raises(PermitSettledTwice):
            getattr(self.breaker, end)(self.settled[which % len(self.settled)], self.now)

    @rule(elsewhere=st.sampled_from([0.0, 5e5]))
    def restart(self, elsewhere: float) -> None:
        """The process dies with its attempts, and comes back on another clock."""
        model, saved = self.model, self.breaker.snapshot(self.now)
        remaining_s = max(0.0, model.until - self.now) if model.state == "open" else 0.0
        unforgiven, was = model.unforgiven, model.state
        self.begin_life(elsewhere)
        self.breaker.restore(saved, self.now)
        self.model.unforgiven, self.model.good_since = unforgiven, self.now
        if was != "closed":
            self.model.open(self.now + remaining_s)

    @invariant()
    def agrees_with_the_model(self) -> None:
        model, breaker = self.model, self.breaker
        assert model.state == breaker.state == self.heard[-1] == breaker._machine.current_state
        assert (model.state == "closed" or (model.state == "open" and self.now >= model.until)) == breaker.allows(
            self.now
        )
        if model.state == "open":
            assert max(0.0, model.until - self.now) == breaker.reopens_in_s(self.now)

    @invariant()
    def at_most_one_probe(self) -> None:
        probes = [permit for permit, spell in self.live if permit.probe and spell == self.model.spell]
        assert len(probes) == (self.model.state == "half-open")

    @invariant()
    def is_bounded(self) -> None:
        assert 0.1 <= self.breaker.weight(self.now) <= 1.0
        assert 0.0 <= self.breaker.reopens_in_s(self.now) <= RETRY_AFTER_MAX_S

    def teardown(self) -> None:
        """Every permit can still be settled, and once they are, no probe is left behind."""
        for permit, _ in getattr(self, "live", []):
            self.breaker.neutral(permit, self.now)
            assert permit.settled
        assert not hasattr(self, "breaker") or self.breaker.state != "half-open"


TestAgainstTheModel = AgainstTheModel.TestCase
TestAgainstTheModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
