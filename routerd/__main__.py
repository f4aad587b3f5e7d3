"""Hands the command line over to ``cli/``: picks the command, and turns its end into an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from routerd import __version__, cli
from routerd.config import ConfigError

INTERRUPTED = 128 + 2  # what a shell reports for SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; raises SystemExit for ``--help`` and wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(_wanted(given))
    args = parser.parse_args(given)
    if args.run is None:
        parser.print_help(sys.stderr)
        return cli.EXIT_USAGE
    try:
        code = int(args.run(args))
        sys.stdout.flush()  # here, where a reader that has left can still be told from a fault
    except ConfigError as error:
        cli.print_problems(error.problems)
        return cli.EXIT_CONFIG
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return cli.EXIT_FINE
    return code


def _wanted(given: Sequence[str]) -> list[str]:
    """The commands to import: the one that is asked for, or all if that is not clear."""
    known = cli.names()
    first = given[0] if given else ""
    return [first] if first in known else known


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "routerd", description="The local endpoint that keeps an agent's model calls alive."
    )
    parser.add_argument("--version", action="version", version=f"routerd {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in map(cli.command, names):
        subparser = commands.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.configure(subparser)
        subparser.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
