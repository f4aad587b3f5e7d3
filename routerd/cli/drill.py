"""``routerd drill``: does it hold on this machine? Faults by script, through a daemon of its own, without any key.

Nothing of a running daemon is touched: no config is read, no port but free ones is used, and no state is kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from routerd import cli

if TYPE_CHECKING:
    from collections.abc import Callable

    from routerd.proxy.report import Report, Row, Share

NAME = "drill"
HELP = "play scripted faults through a routerd of its own on this machine, and print the invariants held"

GOOD, _, BAD = cli.SIGNS
WITHOUT = "without: the same tasks straight at a, with two retries"
WAYS = ("live stream", "live", "whole stream", "whole")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_seed, default=1, metavar="N", help="other texts, pieces and turns (default: 1)")
    parser.add_argument("--quick", action="store_true", help="every fault, but not in every way it can be met")
    parser.add_argument("--json", action="store_true", help="print the report for a program")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    import uvloop

    from routerd.proxy.drill import drill

    with _progress() as progress:
        report = uvloop.run(drill(args.seed, quick=args.quick, progress=progress))
    return show(report, as_json=args.json)


def show(report: Report, *, as_json: bool) -> int:
    """Print it, and return the exit code it stands for."""
    import msgspec

    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        _print(report)
    return cli.EXIT_FINE if report.held else cli.EXIT_WRONG


@contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """A bar on stderr, if somebody looks at it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("drill"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drill", total=1.0)
        yield lambda done: bar.update(task, completed=done)


def _print(report: Report) -> None:
    spoken = ", ".join(report.dialects)
    print(f"{report.tasks} tasks of agents that speak {spoken}: seed {report.seed}, {report.seconds:.1f} s")
    print(f"provider a fails by script, provider b is healthy; the watchdogs bark after {report.limit_s:g} s\n")
    headings = ("FAULT AT A", *(way.upper() for way in WAYS), "SECONDS ADDED", "WITHOUT")
    cli.print_table(headings, [_row(row) for row in report.rows], frozenset(headings[1:]))
    print(f"\nturns delivered; seconds added: median, 99 %, worst; {WITHOUT}\n")
    cli.print_table(
        ("INVARIANT", "WITH ROUTERD", "WITHOUT"),
        [(one.name, f"{GOOD if one.held else BAD} {one.figure}", one.direct) for one in report.invariants],
        frozenset(),
    )
    for sentence in report.broken:
        print(f"\n{BAD} {sentence}")


def _row(row: Row) -> tuple[str, ...]:
    added = row.added
    seconds = f"{added.median_s:.2f} / {added.p99_s:.2f} / {added.worst_s:.2f}"
    ways = (_cell(row.ways[way]) if way in row.ways else "" for way in WAYS)
    return row.fault, *ways, seconds, _share(row.direct) if row.direct.of else ""


def _cell(share: Share) -> str:
    return _share(share) if share.delivered == share.of else f"{BAD} {_share(share)}"


def _share(share: Share) -> str:
    return f"{share.delivered:,}/{share.of:,}"
