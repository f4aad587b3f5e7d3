"""Where the money and the free tiers go, and whether they last until their reset."""

from __future__ import annotations

from collections.abc import Iterator

from grafana.panels import (
    GEN_AI,
    GREEN,
    MODELS,
    NEUTRAL,
    ORANGE,
    PROVIDER,
    PROVIDERS,
    ROUTES,
    SCOPE,
    UPSTREAM,
    Json,
    bars,
    budgets,
    dashboard,
    increase,
    levels,
    lines,
    override,
    quantile,
    ratio,
    spent_today,
    stat,
)
from grafana.panels import quotas as quota_table

COST = f"routerd_cost_usd_total{{{UPSTREAM}}}"
NAME = "{{provider}} {{model}}"
LIMIT = f'{PROVIDER},limit=~".+/(hour|day|month).*"'
NO_PRICES = "No fresh prices are fetched"
NO_LIMIT = "No quota longer than a minute is configured or has been learned"


def quotas() -> Json:
    return dashboard(
        "quotas",
        "quotas and cost",
        "Where the money and the free tiers go, and whether they last until their reset.",
        [ROUTES, PROVIDERS, MODELS],
        [
            (4, _totals()),
            (8, _spend()),
            (8, _tokens()),
            (9, [quota_table(12, PROVIDER), budgets(12)]),
            (8, _left()),
            (7, _prices()),
        ],
    )


def _used(kind: str, by: str = "", window: str = "$__rate_interval") -> str:
    return increase(f'routerd_tokens_total{{{UPSTREAM},kind="{kind}"}}', by, window)


def _totals() -> Iterator[Json]:
    read, written, cached = (_used(kind, window="$__range") for kind in ("input", "output", "cached"))
    delivered = increase('routerd_exchanges_total{outcome="success"}', window="$__range")
    spent = increase(COST, window="$__range")
    yield spent_today(4)
    yield stat(4, "Spent", "Dollars in the time shown.", spent, "currencyUSD", decimals=2, steps=NEUTRAL)
    yield stat(
        4,
        "Per turn",
        "Dollars per turn delivered, failed attempts included (all routes and providers).",
        ratio(increase("routerd_cost_usd_total", window="$__range"), delivered),
        "currencyUSD",
        decimals=4,
        no_value="No turns yet",
        steps=NEUTRAL,
    )
    yield stat(4, "Tokens in", "Prompt tokens, cached ones included.", read, "short", decimals=1, steps=NEUTRAL)
    yield stat(4, "Tokens out", "Reasoning included.", written, "short", decimals=1, steps=NEUTRAL)
    yield stat(
        4,
        "From cache",
        "Share of the prompt tokens that the providers had cached.",
        ratio(cached, read),
        "percentunit",
        decimals=0,
        no_value="No tokens yet",
        steps=((ORANGE, None), (GREEN, 0.5)),
    )


def _spend() -> Iterator[Json]:
    yield bars(
        12,
        "Spend",
        "Dollars per step, by provider and model.",
        {NAME: increase(COST, "provider, model")},
        "currencyUSD",
        decimals=4,
    )
    yield levels(
        12,
        "Spend, at the pace of the last hour",
        "Dollars per day, if it goes on like this.",
        {"{{provider}}": f"sum by (provider) (rate({COST}[1h])) * 86400"},
        "currencyUSD",
        decimals=2,
    )


def _tokens() -> Iterator[Json]:
    prompt = f'{GEN_AI},gen_ai_token_type="input"'
    beside = {"mode": "none", "group": "A"}
    yield bars(
        8,
        "Tokens",
        "By kind. Cached ones are among input and reasoning is among output, so these two stand beside the pile.",
        {"{{kind}}": increase(f"routerd_tokens_total{{{UPSTREAM}}}", "kind")},
        "short",
        overrides=[override(kind, custom__stacking=beside) for kind in ("cached", "reasoning")],
    )
    yield lines(
        8,
        "From cache, by model",
        "Share of prompt tokens found in the provider's cache.",
        {NAME: ratio(_used("cached", "provider, model"), _used("input", "provider, model"))},
        "percentunit",
        max=1,
        no_value="No tokens yet",
    )
    yield lines(
        8,
        "Prompt size",
        "Prompt tokens per attempt: half are smaller, and 95 % are.",
        {
            "half": quantile(0.5, "gen_ai_client_token_usage", prompt),
            "95 %": quantile(0.95, "gen_ai_client_token_usage", prompt),
        },
        "short",
        no_value="No attempts yet",
    )


def _left() -> Iterator[Json]:
    by = "by (provider, limit)"
    left = f"min {by} (routerd_quota_remaining{{{LIMIT}}})"
    size = f"max {by} (routerd_quota_limit{{{LIMIT}}})"
    pace = f"min {by} (deriv(routerd_quota_remaining{{{LIMIT}}}[30m]))"
    to_go = f"clamp_min(max {by} (routerd_quota_reset_timestamp_seconds{{{LIMIT}}}) - time(), 0)"
    yield levels(
        8,
        "Quota left",
        "Share of each limit longer than a minute.",
        {"{{provider}} {{limit}}": ratio(left, size)},
        "percentunit",
        max=1,
        no_value=NO_LIMIT,
    )
    yield levels(
        8,
        "Quota left at its reset",
        "If the pace of the last half hour goes on. Below zero it runs out before.",
        {"{{provider}} {{limit}}": f"({left} + {pace} * {to_go}) / ({size} > 0)"},
        "percentunit",
        min=-1,
        max=1,
        no_value=NO_LIMIT,
    )
    yield levels(
        8,
        "Budget left",
        "Dollars, by route.",
        {"{{scope}}": f"min by (scope) (routerd_budget_remaining_usd{{{SCOPE}}})"},
        "currencyUSD",
        decimals=2,
        no_value="No route has a budget",
    )


def _prices() -> Iterator[Json]:
    yield levels(
        12,
        "Age of the prices",
        "Time since a price list was last found to be what is in use. Beyond a few refreshes: see the log.",
        {"{{source}}": "time() - min by (source) (routerd_prices_last_refresh_timestamp_seconds)"},
        "s",
        no_value=NO_PRICES,
    )
    yield bars(
        12,
        "Price lists asked for",
        "By what became of it, and beside them the prices that changed too much to be believed.",
        {
            "{{source}} {{result}}": increase("routerd_price_refreshes_total", "source, result"),
            "{{source}} doubted": increase("routerd_prices_doubted_total", "source"),
        },
        "short",
        no_value=NO_PRICES,
    )
