"""``routerd models``: what is on offer, from whom, with which window and for how much."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from routerd import catalog, cli
from routerd.canonical import Price, Upstream
from routerd.config import Config

NAME = "models"
HELP = "list what is on offer: routes, then models with their windows, prices and providers"

HEADINGS = ("MODEL", "PROVIDER", "WINDOW", "OUTPUT", "IN", "OUT", "CACHED", "CAN")
NUMERIC = frozenset({"WINDOW", "OUTPUT", "IN", "OUT", "CACHED"})


def configure(parser: argparse.ArgumentParser) -> None:
    cli.add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    loaded, refreshed = cli.load_priced(args)
    if args.json:
        print(json.dumps(_document(loaded, refreshed), indent=1))
        return cli.EXIT_FINE
    for route in loaded.routes.values():
        tiers = [dict.fromkeys(f"{upstream.provider}/{upstream.model}" for upstream in tier) for tier in route.tiers]
        print(f"{route.name}: {' > '.join(' | '.join(tier) for tier in tiers)}")
    print(f"\nUSD per million tokens, as of {catalog.load().as_of} where the config says nothing else")
    for source, at in refreshed.items():
        print(f"refreshed from {source} at {datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC")
    print()
    cli.print_table(HEADINGS, [_row(upstream) for upstream in _offers(loaded)], NUMERIC)
    return cli.EXIT_FINE


def _offers(loaded: Config) -> Iterator[Upstream]:
    """One upstream of each offer, model by model, the cheapest first."""
    for name in loaded.models:
        offers = [upstream for upstream in loaded.table[name].tiers[0] if upstream.key == 0]
        yield from sorted(offers, key=lambda upstream: (upstream.price.input, upstream.price.output))


def _row(upstream: Upstream) -> tuple[str, ...]:
    price = upstream.price
    return (
        upstream.model,
        upstream.provider,
        f"{upstream.context_tokens:,}",
        "" if upstream.max_output_tokens is None else f"{upstream.max_output_tokens:,}",
        *((f"{price.input:g}", f"{price.output:g}", _cached(price)) if not price.free else ("free", "", "")),
        " ".join(_abilities(upstream)),
    )


def _cached(price: Price) -> str:
    return "" if price.cached is None else f"{price.cached:g}"


def _abilities(upstream: Upstream) -> list[str]:
    model = catalog.load().models.get(upstream.model)
    able = {"tools": upstream.tools, "images": upstream.images, "reasoning": model is not None and model.reasoning}
    return [name for name, has in able.items() if has]


def _document(loaded: Config, refreshed: Mapping[str, float]) -> dict[str, object]:
    return {
        "as_of": catalog.load().as_of,
        "refreshed": dict(refreshed),
        "routes": [
            {
                "name": route.name,
                "context_tokens": route.context_tokens,
                "tiers": [[f"{upstream.provider}/{upstream.model}" for upstream in tier] for tier in route.tiers],
            }
            for route in loaded.routes.values()
        ],
        "models": [
            {
                "model": upstream.model,
                "provider": upstream.provider,
                "wire_model": upstream.wire_model,
                "context_tokens": upstream.context_tokens,
                "max_output_tokens": upstream.max_output_tokens,
                "usd_per_million": {
                    "input": upstream.price.input,
                    "output": upstream.price.output,
                    "cached": upstream.price.cached,
                },
                "can": _abilities(upstream),
            }
            for upstream in _offers(loaded)
        ],
    }
