"""``routerd hermes``: the lines that make Hermes Agent use this daemon, shown or put into its config file.

What is shown can be pasted as it is and gives no token away: where the daemon's config refers to an environment
variable, so does the YAML (Hermes replaces ``${NAME}`` itself). What ``--write`` puts into the file, which only its
owner can read, holds the token itself, since the service Hermes runs in may not have the variable.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routerd import cli
from routerd.config import AUTO, MIN_AGENT_CONTEXT_TOKENS, Config, Listen

if TYPE_CHECKING:
    from ruamel.yaml import YAML

NAME = "hermes"
HELP = "show the Hermes Agent config for this daemon; --write puts it into $HERMES_HOME/config.yaml"

PROVIDER_NAME = "routerd"
PLACEHOLDER = "${ROUTERD_TOKEN}"
NO_TOKEN = "no-key-required"  # noqa: S105 -- what Hermes itself sends when it has none
WIDTH = 4096  # of a line: never fold one
ANYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 -- reached here through loopback


def configure(parser: argparse.ArgumentParser) -> None:
    cli.add_config_argument(parser)
    parser.add_argument("--write", action="store_true", help="apply it, keeping all else in the file, with a backup")


def run(args: argparse.Namespace) -> int:
    loaded = cli.load_config(args)
    obstacle = _obstacle(loaded)
    if obstacle:
        print(obstacle, file=sys.stderr)
        return cli.EXIT_WRONG
    if os.environ.get("CUSTOM_BASE_URL"):
        print("warning: CUSTOM_BASE_URL is set; Hermes prefers it to this base_url", file=sys.stderr)
    if args.write:
        path = (_home(os.environ) / "config.yaml").resolve()  # a link stays a link
        try:
            return _write(path, settings(loaded, _token(loaded)))
        except OSError as error:
            print(f"{path}: {error.strerror or error}; it was not changed", file=sys.stderr)
            return cli.EXIT_WRONG
    print(_shown(loaded), end="")
    return cli.EXIT_FINE


def _obstacle(loaded: Config) -> str:
    """Why Hermes could not use this daemon; empty if it can."""
    if _address(loaded) is None:
        return "server.listen has no TCP address, and Hermes cannot talk to a unix socket: add one"
    window = loaded.routes[AUTO].context_tokens
    if window < MIN_AGENT_CONTEXT_TOKENS:
        return (
            f"routes.{AUTO}: its window is {window:,} tokens; Hermes does not start below {MIN_AGENT_CONTEXT_TOKENS:,}"
        )
    return ""


def settings(loaded: Config, token: str) -> dict[str, Any]:
    """What has to stand in Hermes' config file."""
    connection = {"base_url": f"http://{_address(loaded)}/v1", "api_key": token}
    windows = {name: {"context_length": route.context_tokens} for name, route in loaded.routes.items()}
    return {
        "model": {"default": AUTO, "provider": "custom", **connection, **windows[AUTO]},
        "custom_providers": [
            {
                "name": PROVIDER_NAME,
                **connection,
                "model": AUTO,
                "api_mode": "chat_completions",
                "models": windows,
            }
        ],
    }


def _address(loaded: Config) -> str | None:
    """``host:port`` as Hermes on the same machine reaches it, loopback before other addresses."""
    addresses = sorted((listen for listen in loaded.server.listen if listen.port), key=lambda listen: not listen.local)
    return _reachable(addresses[0]) if addresses else None


def _reachable(listen: Listen) -> str:
    return f"{ANYWHERE[listen.host]}:{listen.port}" if listen.host in ANYWHERE else str(listen)


def _token(loaded: Config) -> str:
    return loaded.server.tokens[0].reveal() if loaded.server.tokens else NO_TOKEN


def _shown(loaded: Config) -> str:
    if not loaded.server.tokens:
        return _dumped(settings(loaded, NO_TOKEN))
    reference = loaded.server.token_reference
    hint = "" if reference else f"# set {PLACEHOLDER[2:-1]} in ~/.hermes/.env to the first of server.tokens\n"
    return hint + _dumped(settings(loaded, reference or PLACEHOLDER))


def _dumped(document: object) -> str:
    text = io.StringIO()
    _yaml().dump(document, text)
    return text.getvalue()


def _yaml() -> YAML:
    from ruamel.yaml import YAML

    yaml = YAML()  # keeps comments, order and quotes
    yaml.preserve_quotes = True
    yaml.width = WIDTH
    return yaml


# --- writing --------------------------------------------------------------------------------------------------------


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HERMES_HOME") or Path.home() / ".hermes").expanduser()


def _write(path: Path, wanted: Mapping[str, Any]) -> int:
    from ruamel.yaml.error import YAMLError

    try:
        before = _read(path)
        document = _yaml().load(before) if before else None
        merged = _dumped(_merged(document, wanted))
    except (YAMLError, UnicodeDecodeError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        print(f"{path}: is not a YAML file of settings{line}; it was not changed", file=sys.stderr)
        return cli.EXIT_WRONG
    if merged == before:
        print(f"{path} is as it should be")
        return cli.EXIT_FINE
    backup = _back_up(path)
    _replace(path, merged)
    print(f"wrote {path}" + (f"; what it was is in {backup.name}" if backup else ""))
    return cli.EXIT_FINE


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _merged(document: Any, wanted: Mapping[str, Any]) -> Any:
    """Hermes' settings with ours in them. TypeError if they are no mapping."""
    document = {} if document is None else document
    if not isinstance(document, dict):
        raise TypeError("not a mapping")
    _merge_model(document, wanted["model"])
    _merge_provider(document, wanted["custom_providers"][0])
    return document


def _merge_model(document: dict[str, Any], model: Mapping[str, Any]) -> None:
    """Older files give the model as one word. ``api_mode`` goes: it would be the mode of another endpoint."""
    if not isinstance(document.get("model"), dict):
        document["model"] = {}
    document["model"].update(model)
    document["model"].pop("api_mode", None)


def _merge_provider(document: dict[str, Any], provider: Mapping[str, Any]) -> None:
    if not isinstance(document.get("custom_providers"), list):
        document["custom_providers"] = []
    entries = document["custom_providers"]
    ours = next((entry for entry in entries if isinstance(entry, dict) and entry.get("name") == PROVIDER_NAME), None)
    if ours is None:
        entries.append(dict(provider))
    else:
        ours.update(provider)


def _back_up(path: Path) -> Path | None:
    """A copy beside the file, named for the second it was made in; None if there was nothing to copy."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    backup = path.with_name(f"{path.name}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.{os.getpid()}.bak")
    with open(os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    return backup


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, and readable by the owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with mode 0600
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
