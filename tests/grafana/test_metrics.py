"""What /metrics promises whoever scrapes it: the names, a beginning at zero, and a bounded number of series."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from routerd.canonical import Outcome
from routerd.proxy.simulated import Turn
from routerd.telemetry import MAX_DECLARED_HANDOVERS, MAX_DECLARED_UPSTREAMS, Live, Telemetry
from tests.fakes import Upstreams
from tests.rig import HELLO, MODEL, config_text, daemon, post

NAMES = """
routerd_exchanges_total route dialect outcome
routerd_exchange_duration_seconds route dialect
routerd_first_content_seconds route dialect
routerd_overhead_seconds
routerd_open_exchanges dialect
routerd_wait_seconds reason
routerd_attempts_total provider model outcome
routerd_attempt_first_token_seconds provider model
routerd_failovers_total from_provider to_provider outcome
routerd_recoveries_total step result
routerd_breaker_state provider model state
routerd_breaker_transitions_total provider model to
routerd_quota_limit provider limit
routerd_quota_remaining provider limit
routerd_quota_reset_timestamp_seconds provider limit
routerd_upstream_latency_estimate_seconds provider model
routerd_upstream_score_usd route provider model
routerd_tokens_total provider model kind
routerd_cost_usd_total provider model
routerd_budget_limit_usd scope
routerd_budget_remaining_usd scope
routerd_budget_reset_timestamp_seconds scope
routerd_config_reloads_total result
routerd_config_last_reload_successful
routerd_config_last_reload_success_timestamp_seconds
routerd_build_info version python
gen_ai_client_operation_duration_seconds gen_ai_operation_name gen_ai_provider_name gen_ai_request_model error_type
gen_ai_client_token_usage gen_ai_operation_name gen_ai_provider_name gen_ai_request_model gen_ai_token_type
gen_ai_client_operation_time_to_first_chunk_seconds gen_ai_operation_name gen_ai_provider_name gen_ai_request_model
gen_ai_client_operation_time_per_output_chunk_seconds gen_ai_operation_name gen_ai_provider_name gen_ai_request_model
process_start_time_seconds
process_resident_memory_bytes
process_cpu_seconds_total
process_open_fds
"""
SIMPLE = 'limits = [{ requests = 1000, per = "day" }]'


async def _series(url: str) -> dict[str, frozenset[str]]:
    """Every series as text, with the names of its labels."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as reply:
        families = text_string_to_metric_families(await reply.text())
    return {f"{one.name}{one.labels}": frozenset(one.labels) for family in families for one in family.samples}


async def test_names_and_labels(upstreams: Upstreams, tmp_path: Path) -> None:
    """After one answered request each documented metric is there, with exactly the documented labels."""
    named = {line.split()[0]: frozenset(line.split()[1:]) for line in NAMES.strip().splitlines()}
    text = config_text(
        {"a": await upstreams(), "b": await upstreams()}, extra=SIMPLE, more='budget = { usd = 1, per = "day" }'
    ).replace('models = ["a/model", "b/model"]', 'models = [["a/model", "b/model"]]')
    async with daemon(text, tmp_path) as served:
        await post(served.url, {**HELLO, "stream": True})
        series = await _series(served.url)
    found = {name.partition("{")[0].removesuffix("_bucket"): labels - {"le"} for name, labels in series.items()}

    assert {name: found.get(name) for name in named} == named


async def test_series_do_not_grow_with_what_clients_invent(upstreams: Upstreams, tmp_path: Path) -> None:
    """Unknown models and paths, whatever they are called, add no series after the first of their kind."""
    async with daemon(config_text({"a": await upstreams(Turn())}), tmp_path) as served:
        await _strange_requests(served.url, 0)
        before = await _series(served.url)
        for number in range(1, 21):
            await _strange_requests(served.url, number)
        after = await _series(served.url)

    assert set(after) == set(before)


async def _strange_requests(url: str, number: int) -> None:
    for model in ("auto", MODEL, f"a/{MODEL}", f"invented-{number}", f"a/invented-{number}", f"{number}/{MODEL}"):
        await post(url, {**HELLO, "model": model})
    await post(url, {"model": f"invented-{number}"})
    async with aiohttp.ClientSession() as session:
        for path in (f"/invented/{number}", f"/v1/models/invented-{number}", f"/v1/{number}"):
            async with session.get(url + path) as reply:
                assert reply.status == 404


async def test_everything_in_use_begins_at_zero(upstreams: Upstreams, tmp_path: Path) -> None:
    """Before the first request the counters of all that the routes can use are there, and budgets and breakers too."""
    async with daemon(config_text({"a": await upstreams(), "b": await upstreams()}), tmp_path) as served:
        value = served.registry.get_sample_value

        for outcome in Outcome:
            assert value("routerd_exchanges_total", {"route": "auto", "dialect": "chat", "outcome": outcome}) == 0
            assert value("routerd_attempts_total", {"provider": "a", "model": MODEL, "outcome": outcome}) == 0
        handed = {"from_provider": "a", "to_provider": "b", "outcome": "stalled"}
        assert value("routerd_failovers_total", handed) == 0
        assert value("routerd_breaker_transitions_total", {"provider": "b", "model": "*", "to": "open"}) == 0
        assert value("routerd_config_reloads_total", {"result": "failure"}) == 0
        assert value("routerd_config_last_reload_successful") == 1


async def test_budget_is_shown_before_it_is_used(upstreams: Upstreams, tmp_path: Path) -> None:
    """A route's budget is on the page from the start: its size, what is left, and when it is whole again."""
    text = config_text({"a": await upstreams()}, more='budget = { usd = 2.5, per = "day", resets = "UTC" }')
    async with daemon(text, tmp_path) as served:
        assert served.metric("routerd_budget_limit_usd", scope="auto") == 2.5
        assert served.metric("routerd_budget_remaining_usd", scope="auto") == 2.5
        assert served.metric("routerd_budget_reset_timestamp_seconds", scope="auto") % 86400 == 0


def test_declared_series_are_bounded() -> None:
    """However many upstreams a config's routes hold, only the first of them are declared."""
    telemetry = Telemetry(io.BytesIO())
    many = [(f"provider-{number}", "model") for number in range(500)]
    telemetry.declare(["auto"], ["chat"], many)
    samples = [sample for family in telemetry.registry.collect() for sample in family.samples]
    attempts = {sample.labels["provider"] for sample in samples if sample.name == "routerd_attempts_total"}
    pairs = {tuple(sample.labels.values())[:2] for sample in samples if sample.name == "routerd_failovers_total"}

    assert attempts == {f"provider-{number}" for number in range(MAX_DECLARED_UPSTREAMS)}
    assert len(pairs) == MAX_DECLARED_HANDOVERS


def test_watching_another_pool_shows_no_series_twice() -> None:
    """After a reload the states of the new pool stand in the place of the old one's."""
    telemetry = Telemetry(io.BytesIO())
    telemetry.watch(lambda: Live(budgets=[("auto", 3.0, 1.0, 0.0)]))
    telemetry.watch(lambda: Live(budgets=[("auto", 5.0, 2.0, 0.0)]))
    samples = itertools.chain.from_iterable(family.samples for family in telemetry.registry.collect())

    assert [sample.value for sample in samples if sample.name == "routerd_budget_remaining_usd"] == [2.0]


def test_refused_reload_is_seen_until_one_succeeds() -> None:
    """A refused config is counted and leaves the gauge at 0 and the time of the config in force as it was."""
    telemetry = Telemetry(io.BytesIO())
    value = telemetry.registry.get_sample_value
    telemetry.config_in_force()
    since = value("routerd_config_last_reload_success_timestamp_seconds")
    telemetry.reloaded(success=False)

    assert value("routerd_config_last_reload_successful") == 0
    assert value("routerd_config_last_reload_success_timestamp_seconds") == since
    telemetry.reloaded(success=True)
    assert value("routerd_config_last_reload_successful") == 1
    assert value("routerd_config_reloads_total", {"result": "failure"}) == 1


def test_start_time_is_the_clients_own() -> None:
    """The process metrics do without /proc/stat, which a sandbox may hide, and tell the same time."""
    plain = CollectorRegistry()
    ProcessCollector(registry=plain)
    expected = plain.get_sample_value("process_start_time_seconds")
    if expected is None:
        pytest.skip("no /proc/stat here to compare with")

    assert Telemetry(io.BytesIO()).registry.get_sample_value("process_start_time_seconds") == pytest.approx(
        expected, abs=2
    )
