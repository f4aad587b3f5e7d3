"""``routerd serve``: the daemon."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from routerd.config import ConfigError, find, load
from routerd.proxy.service import serve
from routerd.state import StateError

NAME = "serve"
HELP = "run the daemon"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config", metavar="FILE", help="the configuration; else the usual places, else the environment"
    )
    parser.add_argument("--listen", metavar="ADDR", action="append", default=[], help="instead of server.listen")


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    read = partial(load, find(args.config, os.environ, Path.cwd()), os.environ, args.listen)
    try:
        serve(read(), state_dir(os.environ), read)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return os.EX_CONFIG
    except (StateError, OSError) as error:
        print(f"routerd: {error}", file=sys.stderr)
        return 1
    return 0


def state_dir(environ: os._Environ[str]) -> Path:
    """Where relative state files live: what systemd gives, else the user's own place for state."""
    given = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    base = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base) / "routerd"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
