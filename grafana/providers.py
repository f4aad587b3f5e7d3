"""Who is fast, who fails and how, whom the breakers leave alone, and what the choice is made by."""

from __future__ import annotations

from collections.abc import Iterator

from grafana.panels import (
    GEN_AI,
    GREEN,
    IN_USE,
    MODELS,
    PROVIDER,
    PROVIDERS,
    RED,
    UPSTREAM,
    YELLOW,
    Json,
    bars,
    counts,
    dashboard,
    failovers,
    heatmap,
    increase,
    levels,
    lines,
    quantile,
    ratio,
    timeline,
)

TRIED = f"routerd_attempts_total{{{UPSTREAM}}}"
GOOD = f'routerd_attempts_total{{{UPSTREAM},outcome="success"}}'
FAILED = f'routerd_attempts_total{{{UPSTREAM},outcome!="success"}}'
TO_FIRST = "routerd_attempt_first_token_seconds"
PER_CHUNK = "gen_ai_client_operation_time_per_output_chunk_seconds"
NAME = "{{provider}} {{model}}"
GEN_AI_BY = "gen_ai_provider_name, gen_ai_request_model"
GEN_AI_NAME = "{{gen_ai_provider_name}} {{gen_ai_request_model}}"
NO_ATTEMPTS = "No attempts yet"


def providers() -> Json:
    return dashboard(
        "providers",
        "providers",
        "Who is fast, who fails and how, whom the breakers leave alone, and what the choice is made by.",
        [PROVIDERS, MODELS],
        [
            (8, [_breakers()]),
            (8, _outcomes()),
            (8, _first_tokens()),
            (8, _answers()),
            (8, _choices()),
            (8, [failovers(12), _dropped()]),
        ],
    )


def _breakers() -> Json:
    own = _level(f'{UPSTREAM},model!="*"')
    account = _level(f'{PROVIDER},model="*"')
    return timeline(
        24,
        "Breakers",
        "Closed is well; open is left alone; half-open is tried with one request. The model * is the whole account.",
        {NAME: f"({own} {IN_USE}) or {account}"},
        (("closed", GREEN), ("half-open", YELLOW), ("open", RED)),
    )


def _level(selector: str) -> str:
    """0 closed, 1 half-open, 2 open."""
    half, full = (
        f'max by (provider, model) (routerd_breaker_state{{state="{state}",{selector}}})'
        for state in ("half-open", "open")
    )
    return f"({half} + 2 * {full})"


def _outcomes() -> Iterator[Json]:
    yield bars(
        10,
        "Attempts that failed",
        "By outcome. Rate limits and exhausted quotas are no fault of the upstream and open no breaker.",
        {"{{outcome}}": increase(FAILED, "outcome")},
        "short",
    )
    yield counts(
        8,
        "Who failed, and how",
        "Attempts that did not end in a whole answer, in the time shown.",
        FAILED,
        {"provider": "Provider", "model": "Model", "outcome": "Outcome"},
    )
    yield lines(
        6,
        "Success",
        "Share of attempts that brought a whole answer.",
        {"{{provider}}": ratio(increase(GOOD, "provider"), increase(TRIED, "provider"))},
        "percentunit",
        max=1,
        no_value=NO_ATTEMPTS,
    )


def _first_tokens() -> Iterator[Json]:
    yield lines(
        12,
        "First token",
        "From sending a request on to the first token of content: half of the attempts were faster, and 95 % were.",
        {
            f"{NAME}, half": quantile(0.5, TO_FIRST, UPSTREAM, "provider, model"),
            f"{NAME}, 95 %": quantile(0.95, TO_FIRST, UPSTREAM, "provider, model"),
        },
        "s",
        no_value=NO_ATTEMPTS,
    )
    yield heatmap(
        6,
        "First token, spread",
        "All attempts, by how long their first token took. Two bands mean two kinds of request, or of server.",
        f"{TO_FIRST}_bucket{{{UPSTREAM}}}",
        "s",
        NO_ATTEMPTS,
    )
    yield levels(
        6,
        "First token, expected",
        "What the choice of an upstream reckons with. It forgets with time, and rises while somebody waits.",
        {NAME: f"max by (provider, model) (routerd_upstream_latency_estimate_seconds{{{UPSTREAM}}}) {IN_USE}"},
        "s",
    )


def _answers() -> Iterator[Json]:
    yield lines(
        8,
        "Whole attempt, 95 %",
        "From sending a request on to its last byte.",
        {GEN_AI_NAME: quantile(0.95, "gen_ai_client_operation_duration_seconds", GEN_AI, GEN_AI_BY)},
        "s",
        no_value=NO_ATTEMPTS,
    )
    yield lines(
        8,
        "First chunk, 95 %",
        "The first token again, under the name and in the buckets of OpenTelemetry's conventions.",
        {GEN_AI_NAME: quantile(0.95, "gen_ai_client_operation_time_to_first_chunk_seconds", GEN_AI, GEN_AI_BY)},
        "s",
        no_value=NO_ATTEMPTS,
    )
    total, count = (
        f"sum by ({GEN_AI_BY}) (rate({PER_CHUNK}_{part}{{{GEN_AI}}}[$__rate_interval]))" for part in ("sum", "count")
    )
    yield lines(
        8,
        "Pause between chunks",
        "Mean time from one piece of an answer to the next.",
        {GEN_AI_NAME: ratio(total, count)},
        "s",
        no_value="No streamed answers yet",
    )


def _choices() -> Iterator[Json]:
    yield levels(
        12,
        "Score",
        "What the last request was expected to cost at each upstream of its tier: price, waiting and risk, in dollars. "
        "The lowest serves; routerd explain shows the terms.",
        {"{{route}}: " + NAME: f"max by (route, provider, model) (routerd_upstream_score_usd{{{UPSTREAM}}})"},
        "currencyUSD",
        decimals=5,
        no_value="Nothing to choose between: no tier with two upstreams has been asked yet",
    )
    yield bars(6, "Chosen", "Attempts by provider and model.", {NAME: increase(TRIED, "provider, model")}, "short")
    yield bars(
        6,
        "Breakers moved",
        "Changes of state, by the state that was entered.",
        {"{{to}}": increase(f"routerd_breaker_transitions_total{{{UPSTREAM}}}", "to")},
        "short",
    )


def _dropped() -> Json:
    return counts(
        12,
        "Lost in translation",
        "Request features that the upstream's dialect has no word for.",
        "routerd_dropped_features_total",
        {"from_dialect": "Client speaks", "to_dialect": "Upstream speaks", "feature": "Feature"},
    )
