"""What was spent today: added up as it happens, from midnight to midnight on this machine's wall."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import pytest

from routerd.canonical import Outcome, Usage
from routerd.telemetry import AttemptRecord, ExchangeRecord, Spent, Telemetry, Today

NOON = (2026, 11, 20, 12, 0, 0, 0, 0, -1)
USAGE = Usage(input_tokens=100, cached_tokens=60, output_tokens=10, reasoning_tokens=4)
HOUR_S = 3600.0


@pytest.fixture
def _new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place where clocks change."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def attempt(outcome: Outcome = Outcome.SUCCESS, *, model: str = "m", cost_usd: float = 0.5) -> AttemptRecord:
    return AttemptRecord("a", model, outcome, usage=USAGE, cost_usd=cost_usd)


def test_it_adds_up_by_upstream() -> None:
    """Attempts, failures, tokens, dollars."""
    today, noon = Today(), time.mktime(NOON)
    for record in (attempt(), attempt(Outcome.STALLED, cost_usd=0.25), attempt(model="n")):
        today.add(record, noon)

    assert today.rows["a", "m"] == Spent(2, 1, 200, 120, 20, 8, 0.75)
    assert today.rows["a", "n"].attempts == 1


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.CLIENT_ERROR])
def test_what_no_upstream_is_to_blame_for_is_no_failure(outcome: Outcome) -> None:
    """A client's hang-up is an attempt that was made, and may have cost something."""
    today = Today()
    today.add(attempt(outcome), time.mktime(NOON))

    assert (today.rows["a", "m"].attempts, today.rows["a", "m"].failures) == (1, 0)


def test_at_midnight_it_begins_anew() -> None:
    """To the second, whether anything happens then or somebody only looks."""
    today, noon = Today(), time.mktime(NOON)
    today.add(attempt(), noon)
    today.turn(noon + 12 * HOUR_S - 1)
    assert today.rows

    today.turn(noon + 12 * HOUR_S)
    assert not today.rows
    assert today.began == noon + 12 * HOUR_S


@pytest.mark.usefixtures("_new_york")
def test_a_day_may_have_25_hours() -> None:
    """When clocks are set back, midnight is still midnight."""
    today, noon = Today(), time.mktime((2026, 11, 1, 12, 0, 0, 0, 0, -1))
    today.add(attempt(), noon)

    assert today.began == noon - 13 * HOUR_S
    assert Today.midnight(noon, days=1) == noon + 12 * HOUR_S


def test_it_goes_on_from_what_an_earlier_process_spent() -> None:
    """And adds to that."""
    today, noon = Today(), time.mktime(NOON)
    today.take_up({("a", "m"): Spent(attempts=5, cost_usd=2.0)}, noon)
    today.add(attempt(), noon)

    assert (today.rows["a", "m"].attempts, today.rows["a", "m"].cost_usd) == (6, 2.5)


class TestHandovers:
    def test_only_a_change_of_provider_is_a_failover_to_metrics(self) -> None:
        """Another model of the same provider is shown to people, but is no failover between providers."""
        telemetry = Telemetry(io.BytesIO())
        record = ExchangeRecord("x", "auto", "chat", stream=True, attempts=[attempt(Outcome.STALLED)])
        telemetry.failover(record, "a", "n")
        telemetry.failover(record, "b", "n")

        assert [(one.source, one.target) for one in telemetry.handovers] == [("a/m", "a/n"), ("a/m", "b/n")]
        labels = {"from_provider": "a", "outcome": "stalled"}
        assert telemetry.registry.get_sample_value("routerd_failovers_total", labels | {"to_provider": "b"}) == 1
        assert telemetry.registry.get_sample_value("routerd_failovers_total", labels | {"to_provider": "a"}) is None

    @pytest.mark.parametrize(
        ("outcome", "shown"), [(Outcome.UNAVAILABLE, 1), (Outcome.SUCCESS, 0), (Outcome.CANCELLED, 0)]
    )
    def test_a_lost_request_is_shown(self, outcome: Outcome, shown: int) -> None:
        """Where nobody came next and the client was told; not where it hung up, or was wrong itself."""
        telemetry = Telemetry(io.BytesIO())
        telemetry.exchange(ExchangeRecord("x", "auto", "chat", stream=True, outcome=outcome, detail="words of ours"))

        assert [(one.source, one.target, one.detail) for one in telemetry.handovers] == [
            ("", "", "words of ours")
        ] * shown
