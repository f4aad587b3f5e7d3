"""``routerd status``: what the running daemon says of itself, in a terminal.

It asks ``GET /status`` at the address of the configuration, with its token, and shows what the page shows.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from routerd import cli
from routerd.config import Config, Listen

if TYPE_CHECKING:
    from rich.console import RenderableType

    from routerd.proxy.status import Failover, PricesStatus, RouteStatus, Status, UpstreamStatus

NAME = "status"
HELP = "show breakers, quotas, latencies and spend of the running daemon"

PATIENCE_S = 5.0
EVERY_S = 2.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024
LAST_FAILOVERS = 10
ANYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- reached here through loopback

GOOD, CARE, BAD = cli.SIGNS
ROUTE_SIGNS = {"serving": GOOD, "fallback": CARE, "down": BAD}
OBSTACLE_SIGNS = {"limit": CARE, "refused": CARE, "breaker": BAD, "account": BAD}

Row = tuple[str, ...]
Section = tuple[str, Row, list[Row], frozenset[str]]  # title, headings, rows, numeric headings


class NoAnswer(Exception):
    """Nobody there, or not a routerd that lets us look. The text says what to do."""


def configure(parser: argparse.ArgumentParser) -> None:
    cli.add_config_argument(parser)
    parser.add_argument("--url", help="ask this daemon: http://HOST:PORT or unix:/PATH (default: the config's address)")
    parser.add_argument("--watch", action="store_true", help=f"ask again every {EVERY_S:g} s, until interrupted")
    parser.add_argument("--json", action="store_true", help="print what the daemon answers, as it is")


def run(args: argparse.Namespace) -> int:
    loaded = cli.load_config(args)
    ask = _asker(loaded, args.url)
    try:
        if args.watch:
            _watch(ask, as_json=args.json)
        else:
            _print(ask(), as_json=args.json)
    except NoAnswer as error:
        print(error, file=sys.stderr)
        return cli.EXIT_WRONG
    return cli.EXIT_FINE


# --- asking ---------------------------------------------------------------------------------------------------------


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _asker(loaded: Config, url: str | None) -> Callable[[], bytes]:
    where = _given(url) if url else _listening(loaded)
    headers = {"Authorization": f"Bearer {loaded.server.tokens[0].reveal()}"} if loaded.server.tokens else {}
    return lambda: _ask(where, headers)


def _given(url: str) -> Listen:
    if url.startswith("unix:"):
        return Listen(path=url.removeprefix("unix:"))
    parts = urlsplit(url if "//" in url else f"//{url}")
    if parts.scheme not in ("", "http") or not parts.hostname:
        raise SystemExit(_wrong_url(url))
    try:
        return Listen(parts.hostname, parts.port or 80)
    except ValueError:
        raise SystemExit(_wrong_url(url)) from None


def _wrong_url(url: str) -> int:
    print(f"{url}: must be http://HOST:PORT or unix:/PATH", file=sys.stderr)
    return cli.EXIT_USAGE


def _listening(loaded: Config) -> Listen:
    """Where the daemon of this configuration is reached from this machine, the nearest way first."""
    first = min(loaded.server.listen, key=lambda listen: (not listen.local, not listen.path))
    return Listen(ANYWHERE.get(first.host, first.host), first.port, first.path)


def _ask(where: Listen, headers: dict[str, str]) -> bytes:
    connection = (
        _UnixConnection(where.path)
        if where.path
        else http.client.HTTPConnection(where.host, where.port, timeout=PATIENCE_S)
    )
    try:
        connection.request("GET", "/status", headers=headers)
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER_BYTES)
    except OSError as error:
        raise NoAnswer(f"no daemon answers at {where}: {error.strerror or error}") from error
    except http.client.HTTPException as error:
        raise NoAnswer(f"what answers at {where} does not speak HTTP") from error
    finally:
        connection.close()
    if answer.status in (401, 403):
        raise NoAnswer(f"the daemon at {where} refuses: {_reason(body)} (token and names come from the config)")
    if answer.status != 200 or answer.headers.get_content_type() != "application/json":
        raise NoAnswer(f"what answers at {where} is no routerd: {answer.status} {answer.reason}")
    return body


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return "it does not say why"


# --- showing --------------------------------------------------------------------------------------------------------


def _decoded(body: bytes) -> Status:
    import msgspec

    from routerd.proxy.status import Status

    try:
        return msgspec.json.decode(body, type=Status)
    except msgspec.DecodeError as error:
        raise NoAnswer(f"the daemon is another version than this command: {error}") from error


def _print(body: bytes, *, as_json: bool) -> None:
    if as_json:
        print(body.decode())
        return
    status = _decoded(body)
    print("\n".join(_head(status)))
    for title, headings, rows, numeric in _sections(status):
        print(f"\n{title}" if rows else f"\n{title}: none")
        if rows:
            cli.print_table(headings, rows, numeric)


def _watch(ask: Callable[[], bytes], *, as_json: bool) -> None:
    try:
        if as_json or not sys.stdout.isatty():
            _watch_lines(ask, as_json=as_json)
        else:
            _watch_screen(ask)
    except KeyboardInterrupt:
        return  # that is how watching ends


def _watch_lines(ask: Callable[[], bytes], *, as_json: bool) -> None:
    """One after the other, for a file or another program."""
    while True:
        _print(ask(), as_json=as_json)
        if not as_json:
            print()
        sys.stdout.flush()
        time.sleep(EVERY_S)


def _watch_screen(ask: Callable[[], bytes]) -> None:
    """In place. A daemon that restarts meanwhile is waited for."""
    from rich.live import Live

    shown = _screen(_decoded(ask()))
    with Live(shown, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            time.sleep(EVERY_S)
            try:
                live.update(_screen(_decoded(ask())), refresh=True)
            except NoAnswer as error:
                live.update(_screen_of(f"{BAD} {error}"), refresh=True)


def _screen(status: Status) -> RenderableType:
    from rich.console import Group

    parts: list[Any] = [_screen_of(line) for line in _head(status)]
    for title, headings, rows, numeric in _sections(status):
        parts.append(_screen_of(f"\n{title}" if rows else f"\n{title}: none"))
        if rows:
            parts.append(cli.rich_table(headings, rows, numeric))
    return Group(*parts)


def _screen_of(line: str) -> RenderableType:
    from rich.text import Text

    return Text(line, cli.SIGNS.get(line[:1], ""))


def _head(status: Status) -> Iterator[str]:
    count = status.open_requests
    yield (
        f"routerd {status.version}, up {_span(status.uptime_s)}, {count} open request{'s' * (count != 1)}, "
        f"prices as of {status.catalog_as_of}"
    )
    for source, prices in status.prices.items():
        yield _prices(source, prices)
    if status.simulated:
        yield f"{CARE} SIMULATED: no provider key and no config was found, so every answer is made up"
    for warning in status.warnings:
        yield f"{CARE} {warning.path}{': ' if warning.path else ''}{warning.message}"


def _prices(source: str, prices: PricesStatus) -> str:
    trouble = prices.result in ("failed", "rejected")
    known = "none yet" if prices.age_s is None else f"{prices.models:,} models, {_span(prices.age_s)} old"
    attempt = f", last attempt {prices.result}" if trouble else ""
    return f"{CARE if trouble else GOOD} prices of {source}: {known}{attempt}"


def _sections(status: Status) -> Iterator[Section]:
    states = {f"{one.provider}/{one.model}": one for one in status.upstreams}
    yield (
        "Routes",
        ("ROUTE", "STATE", "GOES TO", "WAITING", "BUDGET LEFT"),
        [_route(one, states) for one in status.routes],
        frozenset(),
    )
    yield (
        "Upstreams",
        ("UPSTREAM", "STATE", "FIRST TOKEN", "FAILING", "IN FLIGHT", "$ IN/OUT", "WINDOW"),
        [_upstream(one) for one in status.upstreams],
        frozenset(("FIRST TOKEN", "FAILING", "IN FLIGHT", "$ IN/OUT", "WINDOW")),
    )
    yield (
        "Quotas",
        ("PROVIDER", "LIMIT", "LEFT", "OF", "WHOLE AGAIN IN"),
        [
            (
                one.provider,
                one.name,
                *_amounts(one.remaining, one.limit, one.unit),
                _span(one.reset_in_s) if one.remaining < one.limit else "",
            )
            for one in status.quotas
        ],
        frozenset(("LEFT", "OF", "WHOLE AGAIN IN")),
    )
    yield (
        f"Spent today: {status.today.cost_usd:.4f} USD",
        ("UPSTREAM", "TRIES", "FAILED", "IN", "CACHED", "OUT", "USD"),
        [
            (
                f"{one.provider}/{one.model}",
                *(
                    f"{figure:,}"
                    for figure in (
                        one.attempts,
                        one.failures,
                        one.input_tokens,
                        one.cached_tokens,
                        one.output_tokens,
                    )
                ),
                f"{one.cost_usd:.4f}",
            )
            for one in status.today.upstreams
        ],
        frozenset(("TRIES", "FAILED", "IN", "CACHED", "OUT", "USD")),
    )
    yield (
        "Last failovers",
        ("AGO", "ROUTE", "FROM", "WHY", "THEN"),
        [_failover(one, status.at) for one in status.failovers[:LAST_FAILOVERS]],
        frozenset(("AGO",)),
    )


def _route(route: RouteStatus, states: dict[str, UpstreamStatus]) -> Row:
    tiers = (
        " | ".join(name if name not in states or states[name].admissible else f"({name})" for name in tier.upstreams)
        for tier in route.tiers
    )
    budget, waiting = route.budget, route.waiting
    held = f"{waiting.count} for {waiting.reason}, next try in {_span(waiting.next_try_in_s)}" if waiting else ""
    left = f"{budget.remaining_usd:.4f} of {budget.limit_usd:g} {budget.name}" if budget else ""
    return route.name, f"{ROUTE_SIGNS[route.state]} {route.state}", " > ".join(tiers), held, left


def _upstream(one: UpstreamStatus) -> Row:
    price = one.usd_per_million
    keys = f" ({one.keys_admissible} of {one.keys} keys)" if one.keys > 1 else ""
    return (
        f"{one.provider}/{one.model}",
        _state(one) + keys,
        f"{one.first_token_s:.1f} s",
        f"{one.p_fail:.1%}",
        str(one.in_flight or ""),
        "free" if price.free else f"{price.input:g}/{price.output:g}",
        f"{one.context_tokens:,}",
    )


def _state(one: UpstreamStatus) -> str:
    why = one.obstacle
    if why is None:
        return f"{GOOD} ready" if one.breaker == "closed" else f"{CARE} breaker {one.breaker}, probe due"
    wait = "" if why.wait_s is None else f", {_span(why.wait_s)}"
    return f"{OBSTACLE_SIGNS.get(why.reason, BAD)} {why.text}{wait}"


def _amounts(remaining: float, limit: float, unit: str) -> Row:
    return tuple(f"{value:.4f}" if unit == "usd" else f"{int(value):,}" for value in (remaining, limit))


def _failover(one: Failover, at: float) -> Row:
    why = [str(one.outcome).replace("_", " ")]
    why += [f"HTTP {one.status}"] if one.status is not None else []
    why += [text for text in (one.code.replace("_", " "), one.detail) if text]
    return _span(at - one.at), one.route, one.source, ", ".join(why), one.target or f"{BAD} the client was told"


def _span(seconds: float) -> str:
    """``35s``, ``12m``, ``5h12m`` or ``2d3h``."""
    whole = max(0, round(seconds))
    for unit_s, unit, less_s, less in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit_s:
            rest = whole % unit_s // less_s
            return f"{whole // unit_s}{unit}" + (f"{rest}{less}" if rest else "")
    return f"{whole}s"
