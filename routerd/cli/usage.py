"""``routerd usage``: tokens, dollars and failures, added up from the ledger.

It reads the daemon's own file beside it, without asking it and without a way to change anything; so it works whether
the daemon runs or not, for the user the daemon runs as.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import time
from collections.abc import Sequence

import msgspec

from routerd import cli
from routerd.state import StateError, Total
from routerd.state.ledger import KEEP_S, Column
from routerd.state.saved import saved_totals

NAME = "usage"
HELP = "show tokens, dollars, requests and failures from the ledger"

SECONDS = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}
GROUPS: dict[str | None, tuple[Column, ...]] = {
    None: ("provider", "model"),
    "model": ("model",),
    "provider": ("provider",),
    "route": ("route",),
    "day": ("day",),
}
FIGURES = {
    "REQUESTS": "requests",
    "TRIES": "attempts",
    "FAILED": "failures",
    "IN": "input_tokens",
    "CACHED": "cached_tokens",
    "OUT": "output_tokens",
    "REASONING": "reasoning_tokens",
}
LEGEND = "TRIES: at an upstream, FAILED of them; tokens IN, of them CACHED, and OUT, of them REASONING"


def configure(parser: argparse.ArgumentParser) -> None:
    cli.add_config_argument(parser)
    parser.add_argument(
        "--since", type=_age_s, default=_age_s("7d"), metavar="AGE", help="such as 90m, 24h, 7d, 4w (default: 7d)"
    )
    groups = [name for name in GROUPS if name is not None]
    parser.add_argument("--by", choices=groups, help="what to add up by (default: provider and model)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values instead of a table")
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _age_s(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mhdw])", text.strip())
    if match is None or not 0 < float(match[1]) * SECONDS[match[2]] <= KEEP_S:
        raise argparse.ArgumentTypeError(f"must be a number with one of {', '.join(SECONDS)}, at most 90d: 7d")
    return float(match[1]) * SECONDS[match[2]]


def run(args: argparse.Namespace) -> int:
    loaded = cli.load_config(args)
    columns, since = GROUPS[args.by], time.time() - args.since
    try:
        totals = saved_totals(cli.saved_state(loaded), since, columns)
    except StateError as error:
        print(f"there is no ledger to read: {error}", file=sys.stderr)
        return cli.EXIT_WRONG
    if args.json:
        rows = [_document(columns, total) for total in totals]
        print(json.dumps({"since": since, "by": columns, "totals": rows}, indent=1))
    elif args.csv:
        _write_csv(columns, totals)
    else:
        _print(columns, totals, since)
    return cli.EXIT_FINE


def _document(columns: Sequence[Column], total: Total) -> dict[str, object]:
    figures = msgspec.structs.asdict(total)
    return {**dict(zip(columns, figures.pop("group"), strict=True)), **figures}


def _write_csv(columns: Sequence[Column], totals: Sequence[Total]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow((*columns, *Total.__struct_fields__[1:]))
    writer.writerows((*total.group, *msgspec.structs.astuple(total)[1:]) for total in totals)


def _print(columns: Sequence[Column], totals: Sequence[Total], since: float) -> None:
    print(f"since {time.strftime('%Y-%m-%d %H:%M', time.localtime(since))}")
    if not totals:
        print("nothing was asked of any upstream")
        return
    headings = (*(column.upper() for column in columns), *FIGURES, "USD")
    rows = [(*total.group, *_figures(total)) for total in totals]
    if len(totals) > 1:
        rows.append(("all", *("",) * (len(columns) - 1), *_figures(_sum(totals), requests="")))
    cli.print_table(headings, rows, frozenset(headings[len(columns) :]))
    print(LEGEND)


def _figures(total: Total, **instead: str) -> tuple[str, ...]:
    figures = (instead.get(field, f"{getattr(total, field):,}") for field in FIGURES.values())
    return (*figures, f"{total.cost_usd:.4f}")


def _sum(totals: Sequence[Total]) -> Total:
    """Of all groups. Requests are left out: one that was tried in two groups would count twice."""
    columns = zip(*(msgspec.structs.astuple(total)[1:] for total in totals), strict=True)
    return Total(("all",), *map(sum, columns))
