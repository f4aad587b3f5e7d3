"""The commands: one module each, named like its command, found by looking into this folder.

A command's module exposes ``NAME``, ``HELP``, ``configure(parser)`` and ``run(args) -> int``, and imports what is heavy
inside ``run``: a command pays for its own imports only, and the daemon for none of the others'.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from routerd import config

if TYPE_CHECKING:
    from rich.table import Table

SIGNS = {"●": "green", "▲": "yellow", "✕": "red"}
SERVICE_STATE = Path("/var/lib/routerd")  # StateDirectory= of the unit

EXIT_FINE = 0
EXIT_WRONG = 1  # something was found to be wrong
EXIT_USAGE = 2
EXIT_CONFIG = 78  # EX_CONFIG: systemd is told not to restart on it

FOLDED = 20  # characters; a table's last column is not folded to less


class Command(Protocol):
    """What a module of this folder offers."""

    NAME: str
    HELP: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it, and return an exit code. A ``ConfigError`` may pass: it is printed and becomes ``EXIT_CONFIG``."""


def names() -> list[str]:
    """Every command there is, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def command(name: str) -> Command:
    """The command's module, imported."""
    return cast("Command", importlib.import_module(f"{__name__}.{name}"))


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """``--config FILE``, for the commands that read the configuration."""
    parser.add_argument("--config", metavar="FILE", help="the config file (default: the first found; see README)")


def find_config(args: argparse.Namespace) -> Path | None:
    """The config file for this call; None: the environment alone."""
    return config.find(args.config, os.environ, Path.cwd())


def load_config(args: argparse.Namespace) -> config.Config:
    """The configuration, with its warnings printed. Raises ConfigError."""
    loaded = config.load(find_config(args), os.environ)
    print_problems(loaded.warnings, "warning: ")
    return loaded


def load_priced(args: argparse.Namespace) -> tuple[config.Config, dict[str, float]]:
    """The configuration at the prices its daemon has fetched, and when it has, by source. Raises ConfigError."""
    loaded = load_config(args)
    if loaded.prices.refresh_s is None:
        return loaded, {}
    from routerd.proxy.refresh import SavedUnusable, at_saved_prices

    try:
        return at_saved_prices(loaded, saved_state(loaded))
    except SavedUnusable as error:
        print(f"warning: {error}", file=sys.stderr)
        return loaded, {}


def print_problems(problems: tuple[config.Problem, ...], prefix: str = "") -> None:
    """To stderr, one a line."""
    for problem in problems:
        print(f"{prefix}{problem}", file=sys.stderr)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Collection[str]) -> None:
    """In columns; prettier on a terminal that is wide enough, with the last one folded. ``numeric``: to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    if sys.stdout.isatty() and sum(widths[:-1]) + 3 * len(widths) + FOLDED <= shutil.get_terminal_size().columns:
        _print_rich(headings, rows, numeric)
        return
    for row in (headings, *rows):
        cells = zip(headings, row, widths, strict=True)
        print(
            "  ".join(
                text.rjust(width) if head in numeric else text.ljust(width) for head, text, width in cells
            ).rstrip()
        )


def _print_rich(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Collection[str]) -> None:
    from rich.console import Console

    Console().print(rich_table(headings, rows, numeric))


def rich_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Collection[str]) -> Table:
    """The table for a terminal. A cell that begins with a sign has the colour of the sign."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numeric else "left", no_wrap=heading != headings[-1])
    before = ""
    for row in rows:
        cells = ("" if text == before and place == 0 else text for place, text in enumerate(row))
        table.add_row(*(Text(text, SIGNS.get(text[:1], "")) for text in cells))
        before = row[0]
    return table


def saved_state(loaded: config.Config) -> str:
    """Where the daemon of this configuration keeps its state, as seen by a user: a service has a folder of its own."""
    path = Path(loaded.state_url.removeprefix("sqlite:"))
    if loaded.state_url == f"sqlite:{path}" and not path.exists() and SERVICE_STATE.is_dir():
        return f"sqlite:{SERVICE_STATE / path.name}"
    return loaded.state_url
