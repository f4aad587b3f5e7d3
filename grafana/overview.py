"""Is my agent all right? Turns delivered and rescued, waiting, spend and quota, on one page."""

from __future__ import annotations

from collections.abc import Iterator

from grafana.panels import (
    GREEN,
    GREY,
    NEUTRAL,
    ORANGE,
    OURS,
    RED,
    ROUTE,
    ROUTES,
    YELLOW,
    Json,
    bars,
    budgets,
    dashboard,
    failovers,
    fixed,
    increase,
    levels,
    lines,
    over_range,
    override,
    quantile,
    quotas,
    ratio,
    spent_today,
    stat,
    table,
)

DELIVERED = f'routerd_exchanges_total{{{ROUTE},outcome="success"}}'
LOST = f'routerd_exchanges_total{{{ROUTE},outcome!~"success|client_error|cancelled"}}'
OWED = f'routerd_exchanges_total{{{ROUTE},outcome!~"client_error|cancelled"}}'
MISTAKEN = f'routerd_exchanges_total{{{ROUTE},outcome="client_error"}}'
LEFT = f'routerd_exchanges_total{{{ROUTE},outcome="cancelled"}}'
LONG_LIMIT = 'limit=~".+/(hour|day|month).*"'  # what a minute restores is no news here
NO_TURNS = "No turns yet"


def overview() -> Json:
    return dashboard(
        "overview",
        "overview",
        "Is my agent all right? Turns delivered and rescued, waiting, spend and quota.",
        [ROUTES],
        [
            (4, _verdict()),
            (8, _turns()),
            (8, [budgets(12), quotas(12, LONG_LIMIT)]),
            (8, _pace()),
            (8, [failovers(12), *_itself()]),
        ],
    )


def _verdict() -> Iterator[Json]:
    yield stat(
        4,
        "Delivered",
        "Share of turns that got a whole answer. Errors of the client's own and hang-ups are not counted.",
        ratio(increase(DELIVERED, window="$__range"), increase(OWED, window="$__range")),
        "percentunit",
        no_value=NO_TURNS,
        decimals=1,
        steps=((RED, None), (ORANGE, 0.98), (GREEN, 0.999)),
    )
    yield stat(4, "Turns delivered", "Whole answers in the time shown.", over_range(DELIVERED), "short", decimals=0)
    yield stat(
        4,
        "Turns rescued",
        "Answers that a retry, a continuation or a hedge brought in after a fault (all routes).",
        over_range('routerd_recoveries_total{step=~"retry|continue|hedge",result="success"}'),
        "short",
        decimals=0,
        steps=NEUTRAL,
    )
    yield stat(
        4,
        "Turns lost",
        "Requests that ended in an error which was not the client's.",
        over_range(LOST),
        "short",
        decimals=0,
        steps=((GREEN, None), (RED, 1)),
    )
    yield spent_today(4)
    yield stat(
        4,
        "Breakers open",
        "Upstreams (and whole accounts) that are left alone for now because they failed.",
        'sum (routerd_breaker_state{state="open"})',
        "short",
        decimals=0,
        steps=((GREEN, None), (ORANGE, 1)),
    )


def _turns() -> Iterator[Json]:
    yield bars(
        12,
        "Turns",
        "How client requests ended.",
        {
            "delivered": increase(DELIVERED),
            "lost": increase(LOST),
            "client's own error": increase(MISTAKEN),
            "client hung up": increase(LEFT),
        },
        "short",
        overrides=[
            fixed("delivered", GREEN),
            fixed("lost", RED),
            fixed("client's own error", YELLOW),
            fixed("client hung up", GREY),
        ],
    )
    yield bars(
        12,
        "Rescues",
        "What was done about faults, and whether it brought an answer (all routes). One attempt may be a retry, the "
        "end of a wait and a probe at once.",
        {"{{step}}: {{result}}": increase("routerd_recoveries_total", "step, result")},
        "short",
    )


def _pace() -> Iterator[Json]:
    yield lines(
        8,
        "How long a turn takes",
        "From the request's arrival to the first content, and to the last byte, as the client sees it.",
        {
            "first content, half": quantile(0.5, "routerd_first_content_seconds", ROUTE),
            "first content, 95 %": quantile(0.95, "routerd_first_content_seconds", ROUTE),
            "whole answer, 95 %": quantile(0.95, "routerd_exchange_duration_seconds", ROUTE),
        },
        "s",
        no_value=NO_TURNS,
    )
    yield bars(
        8,
        "Held for capacity",
        "Seconds that requests were held because of a quota, a breaker, a budget, or a pause before a retry.",
        {"{{reason}}": increase("routerd_wait_seconds_sum", "reason")},
        "s",
    )
    yield levels(
        8,
        "Requests being served",
        "By the dialect the client speaks.",
        {"{{dialect}}": "sum by (dialect) (routerd_open_exchanges)"},
        "short",
        decimals=0,
    )


def _itself() -> Iterator[Json]:
    yield lines(
        6,
        "Time added",
        "What routerd itself takes between a request's arrival and its sending on.",
        {"half": quantile(0.5, "routerd_overhead_seconds"), "99 %": quantile(0.99, "routerd_overhead_seconds")},
        "s",
        no_value=NO_TURNS,
    )
    config_time = "routerd_config_last_reload_success_timestamp_seconds"
    refused = 'routerd_config_reloads_total{result="failure"}'
    yield table(
        6,
        "Running",
        "What runs, since when, how old its config is, and how much memory it takes.",
        {
            "Started": f"process_start_time_seconds * {OURS} * 1000",
            "Config of": f"max by (job, instance) ({config_time}) * 1000",
            "Reloads refused": over_range(refused, "job, instance"),
            "Memory": f"process_resident_memory_bytes * {OURS}",
        },
        labels={"instance": "Instance", "version": "Version"},
        sort="Instance",
        hidden=("job",),
        overrides=[
            override("Started", unit="dateTimeFromNow"),
            override("Config of", unit="dateTimeFromNow"),
            override("Reloads refused", decimals=0),
            override("Memory", unit="bytes"),
        ],
    )
