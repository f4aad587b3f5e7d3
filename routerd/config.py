"""A TOML file, or nothing but the environment, becomes frozen structs; or a list of everything that is wrong with it.

Theory of operation
-------------------
* Reading never stops at the first mistake. Every value passes through one function (``_Table.read``), which hands it to
  a small parser; a parser that refuses says why, the report takes it down under the value's TOML path, and reading goes
  on with the default. Only at the end does a report with problems in it become a ``ConfigError``.
* Whatever a table is asked for is ticked off. What is left over when it closes is an unknown key.
* A *problem* stops the daemon. A *warning* (``Config.warnings``) is true and worth saying, and stops nothing.
* Secrets never appear in a message: parsers of secrets name what they looked for, not what they found.
* All model names are resolved here, once. ``Config.resolve`` is one dictionary look-up (two for a name in unusual
  case), so a request costs the same whatever else is configured. In order of precedence a name is: a route; a public
  model, from all providers that offer it; pinned, ``provider/model``; a name the model is known by elsewhere
  (``vendor/model``, a wire name with a slash, an alias); the bare wire name of one offer.
* Without a file, or with one that names no provider, the providers are those whose key the environment holds. Without
  any key, and without a file, there are two simulated ones, and ``Config.simulated`` says so.

What is ugly: msgspec would check types alone, but it stops at the first mistake and knows nothing of durations; so the
structs here are built by hand and msgspec only holds them.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec

from routerd import catalog
from routerd.canonical import Fix, Limit, Period, Price, Secret, Unit, Upstream
from routerd.catalog import fresh
from routerd.dialects import DIALECTS
from routerd.policy.balance import PREFER_USD_PER_HOUR
from routerd.policy.breaker import BreakerPolicy

T = TypeVar("T")

Delivery = Literal["live", "whole"]
Hedge = Literal["off", "free", "paid"]

MAX_CONFIG_BYTES = 1024 * 1024
MAX_SECRET_BYTES = 64 * 1024
MAX_NAME_LENGTH = 200
FRAMING_HEADERS = frozenset(
    (
        *("connection", "content-length", "expect", "keep-alive", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    )
)
MAX_KEYS = 64  # in one provider's pool
MIN_REFRESH_S = 3600.0  # price lists change by the day, and others pay for serving them
MAX_REFRESH_S = 30 * 86400.0
NEAR_NAMES = 3

MIN_AGENT_CONTEXT_TOKENS = 64_000  # Hermes Agent refuses to start with less
DEFAULT_CONTEXT_TOKENS = 131_072  # of a model nobody describes
AUTO = "auto"

SIMULATED_FAULTS = (
    *("ok", "400", "401", "402", "403", "404", "413", "429", "500", "503", "529", "hang", "stall", "reset", "eof"),
    *("error", "html", "json", "empty", "bad_arguments", "cut_arguments"),
)
SIMULATED_SUFFIX = "-simulated"
SIMULATED_MODEL = "model" + SIMULATED_SUFFIX
SIMULATED_PROVIDERS = ("simulated-a", "simulated-b")

CUSTOM_FIX = Fix(developer_role=False)  # few servers besides OpenAI's know that role; all know ``system``


# --- what comes out -------------------------------------------------------------------------------------------------


class Problem(msgspec.Struct, frozen=True):
    """What is wrong, and what to do about it. ``path`` is the value's place in the TOML file; empty: the file."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(Exception):
    """The configuration cannot be used. ``problems`` holds every reason."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class Listen(msgspec.Struct, frozen=True):
    """Where to listen: ``host`` and ``port``, or the ``path`` of a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def local(self) -> bool:
        """True if nothing beyond this machine can connect."""
        return bool(self.path) or _loopback(self.host)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Server(msgspec.Struct, frozen=True):
    """The downstream side. ``hosts`` are names a Host header may carry besides loopback and the addresses themselves.

    ``token_reference`` is how the first token is written, if it is a reference to the environment (``${NAME}``): fit
    to be shown where the token is not.
    """

    listen: tuple[Listen, ...]
    tokens: tuple[Secret, ...]
    max_body_bytes: int
    hosts: tuple[str, ...]
    token_reference: str


class Defaults(msgspec.Struct, frozen=True):
    """What holds unless a provider or a route says otherwise."""

    value_of_time_usd_per_s: float
    first_token_timeout_s: float
    first_token_floor_s: float  # what an upstream's own history may shorten first_token_timeout to
    stall_floor_s: float
    stall_timeout_s: float  # silence between content events
    answer_timeout_s: float  # for answers that come whole
    max_wait_s: float  # holding a request for a quota reset or a breaker probe
    max_attempts: int
    hedge_after_s: float  # the soonest that a second upstream is asked for the same answer
    auxiliary_timeout_s: float  # for small calls on the side, by which a route that has ``auxiliary`` has answered
    delivery: Delivery
    keepalive_s: float
    breaker: BreakerPolicy


class ProviderConfig(msgspec.Struct, frozen=True):
    """An account at a vendor. ``upstreams`` holds every key x model, ``simulated`` the script of a simulated one.

    ``base_urls`` maps a dialect to the URL its path is appended to; empty for a simulated provider. ``dialect_auth``
    says where another header than ``auth`` holds the key. ``preset`` is its id in the catalog, if it has one. By what
    the provider calls its models: ``list_priced`` cost what the catalog says, so a fresh price list may say otherwise,
    and ``rostered`` are offered because the catalog lists them, without a word of the user's.
    """

    name: str
    vendor: str
    base_urls: dict[str, str]
    keys: tuple[Secret, ...]
    auth: catalog.Auth
    headers: dict[str, str]
    limits: tuple[Limit, ...]
    upstreams: tuple[Upstream, ...]
    default_model: str
    first_token_timeout_s: float
    stall_timeout_s: float
    dialect_auth: dict[str, catalog.Auth] = {}
    simulated: tuple[str, ...] | None = None
    preset: str = ""
    list_priced: frozenset[str] = frozenset()
    rostered: frozenset[str] = frozenset()


class Prices(msgspec.Struct, frozen=True):
    """Whether fresh prices are fetched. ``refresh_s`` None: they are not. ``urls``: by source, in the order written."""

    refresh_s: float | None = None
    urls: dict[str, str] = {}


class RouteConfig(msgspec.Struct, frozen=True):
    """A name clients may ask for, resolved to upstreams. Each tier serves only when those before it cannot."""

    name: str
    tiers: tuple[tuple[Upstream, ...], ...]
    value_of_time_usd_per_s: float
    delivery: Delivery
    budget: Limit | None = None
    auxiliary: tuple[Upstream, ...] = ()
    hedge: Hedge = "off"
    hedge_budget: Limit | None = None

    @property
    def context_tokens(self) -> int:
        """The window every upstream of the first tier has; 0 while no provider is configured."""
        return min((upstream.context_tokens for upstream in self._first_tier), default=0)

    @property
    def max_output_tokens(self) -> int | None:
        """The longest answer every upstream of the first tier gives, as far as that is known."""
        known = [one.max_output_tokens for one in self._first_tier if one.max_output_tokens is not None]
        return min(known, default=None)

    @property
    def _first_tier(self) -> tuple[Upstream, ...]:
        return self.tiers[0] if self.tiers else ()


class Config(msgspec.Struct, frozen=True):
    """Everything the daemon needs to know, checked. ``source`` is the file it came from, if any."""

    server: Server
    state_url: str
    defaults: Defaults
    providers: dict[str, ProviderConfig]
    routes: dict[str, RouteConfig]
    simulated: bool
    source: Path | None
    warnings: tuple[Problem, ...]
    models: tuple[str, ...]  # the public ones on offer, in the order of the providers
    table: dict[str, RouteConfig]  # every name a client may use
    prices: Prices = Prices()

    def resolve(self, name: str) -> RouteConfig | None:
        """The route for a name a client asked for; None if there is no such name."""
        return self.table.get(name) or self.table.get(name.lower())

    def near(self, name: str) -> list[str]:
        """Names a client may have meant, the likeliest first."""
        known = dict.fromkeys(route.name for route in self.table.values())
        return difflib.get_close_matches(name[:MAX_NAME_LENGTH].lower(), known, n=NEAR_NAMES, cutoff=0.5)

    def names(self) -> list[str]:
        """What ``GET /v1/models`` lists: routes, then models."""
        return list(dict.fromkeys((*self.routes, *self.models)))


# --- entry ----------------------------------------------------------------------------------------------------------


def find(explicit: str | None, environ: Mapping[str, str], cwd: Path) -> Path | None:
    """The config file: as told, ``$ROUTERD_CONFIG``, the first of three places that has a readable one, else None.

    A file that was named is returned whether it exists or not; ``load`` then says that it does not.
    """
    named = explicit or environ.get("ROUTERD_CONFIG")
    if named:
        return cwd / named
    home = _xdg(environ, "XDG_CONFIG_HOME", ".config")
    places = (cwd / "routerd.toml", home / "routerd" / "routerd.toml", Path("/etc/routerd/routerd.toml"))
    return next((place for place in places if os.access(place, os.R_OK) and place.is_file()), None)


def load(path: Path | None, environ: Mapping[str, str], listen: Sequence[str] = ()) -> Config:
    """Read and check everything. Raises ConfigError with all problems.

    ``path`` None: the environment's keys alone. ``listen`` replaces ``server.listen``, as a command line may.
    """
    report = _Report()
    values = {} if path is None else _parse(path, report)
    if report.problems:
        raise ConfigError(report.problems)
    root = _Table(values, "", report)
    config = _read_config(root, path, environ, listen)
    root.close()
    if report.problems:
        raise ConfigError(report.problems)
    return msgspec.structs.replace(config, warnings=tuple(report.warnings))


def _parse(path: Path, report: _Report) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        report.problem("", f"{path}: cannot be read: {error.strerror or error}")
        return {}
    if len(content) > MAX_CONFIG_BYTES:
        report.problem("", f"{path}: is larger than {MAX_CONFIG_BYTES} bytes; that is no routerd config")
        return {}
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError:
        report.problem("", f"{path}: is not UTF-8, which TOML demands")
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, and so is a number too long
        report.problem("", f"{path}: is not TOML: {error}")
    return {}


# --- the reader -----------------------------------------------------------------------------------------------------


class _BadValue(ValueError):
    """A parser refuses a value; the text says what to do."""


class _Report:
    """What was found wrong so far."""

    __slots__ = ("problems", "warnings")

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def problem(self, path: str, message: str) -> None:
        self.problems.append(Problem(path, message))

    def warning(self, path: str, message: str) -> None:
        self.warnings.append(Problem(path, message))


class _Table:
    """A TOML table being read. TOML has no null, so None always means that the key is not there."""

    __slots__ = ("_asked", "_values", "path", "report")

    def __init__(self, values: object, path: str, report: _Report) -> None:
        self.path = path
        self.report = report
        self._asked: dict[str, None] = {}
        if not isinstance(values, dict):
            report.problem(path, f"must be a table, not {_kind(values)}")
            values = {}
        self._values: dict[str, object] = values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def at(self, key: str) -> str:
        """The path of a key of this table."""
        bare = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else '"' + key.replace('"', '\\"') + '"'
        return f"{self.path}.{bare}" if self.path else bare

    def problem(self, key: str, message: str) -> None:
        self.report.problem(self.at(key), message)

    def warning(self, key: str, message: str) -> None:
        self.report.warning(self.at(key), message)

    def take(self, key: str) -> object:
        self._asked[key] = None
        return self._values.get(key)

    def read(self, key: str, parse: Callable[[object], T], default: T) -> T:
        """The parsed value; the default if it is missing or, after reporting it, if it is wrong."""
        value = self.take(key)
        if value is None:
            return default
        try:
            return parse(value)
        except _BadValue as error:
            self.problem(key, str(error))
            return default

    def read_each(self, key: str, parse: Callable[[object], T]) -> tuple[T, ...]:
        """The parsed items of a list; each wrong one is reported under its own path and left out."""
        value = self.take(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.problem(key, f"must be a list, not {_kind(value)}")
            return ()
        return self.items(value, self.at(key), parse)

    def items(self, values: Sequence[object], path: str, parse: Callable[[object], T]) -> tuple[T, ...]:
        """The parsed items of a list at ``path``."""
        return tuple(
            parsed for index, value in enumerate(values) for parsed in self.item(value, f"{path}[{index}]", parse)
        )

    def item(self, value: object, path: str, parse: Callable[[object], T]) -> tuple[T, ...]:
        """One parsed value at ``path``, or none."""
        try:
            return (parse(value),)
        except _BadValue as error:
            self.report.problem(path, str(error))
            return ()

    def table(self, key: str) -> _Table:
        return _Table(self._values[key] if self.take(key) is not None else {}, self.at(key), self.report)

    def tables(self, key: str) -> list[_Table]:
        value = self.take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.problem(key, f"must be a list of tables, not {_kind(value)}")
            return []
        return [_Table(item, f"{self.at(key)}[{index}]", self.report) for index, item in enumerate(value)]

    def close(self) -> None:
        """Report every key nobody asked for."""
        for key in self._values:
            if key not in self._asked:
                self.problem(key, f"unknown key; {_suggest(key, self._asked)}")


def _suggest(word: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown word."""
    choices = sorted(known)
    return _maybe(word.replace("-", "_"), choices) or f"known here: {', '.join(choices)}"


def _maybe(word: str, choices: Iterable[str]) -> str:
    """The choice a word may have been meant for, as a question; empty if nothing is near."""
    known = list(choices)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6) or [name for name in known if name.startswith(word)]
    return f'did you mean "{near[0]}"?' if near else ""


def _shown(text: str) -> str:
    """A value in a message: quoted, one line, not endless."""
    short = text if len(text) <= 80 else text[:77] + "..."
    return f'"{short}"' if short.isprintable() else ascii(short)


def _kind(value: object) -> str:
    names = {bool: "true or false", str: "text", int: "a number", float: "a fraction", list: "a list", dict: "a table"}
    return names.get(type(value), "a date or time")


# --- parsers of single values ---------------------------------------------------------------------------------------


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _BadValue(f"must be text in quotes, not {_kind(value)}")
    if not value.strip():
        raise _BadValue("is empty; leave the key out or give it a value")
    return value.strip()


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _BadValue(f"must be true or false, not {_kind(value)}")
    return value


def _number(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _BadValue(f"must be a number, not {_kind(value)}")
        if not low <= value <= high:  # false for nan as well
            raise _BadValue(f"must be from {low:g} to {high:g}")
        return float(value)

    return parse


def _whole(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _BadValue(f"must be a whole number, not {_kind(value)}")
        if not low <= value <= high:
            raise _BadValue(f"must be from {low} to {high}")
        return value

    return parse


def _choice(options: Sequence[str]) -> Callable[[object], Any]:
    def parse(value: object) -> str:
        text = _text(value)
        if text not in options:
            raise _BadValue(f"{_shown(text)} is none of {', '.join(options)}{_also(_maybe(text, options))}")
        return text

    return parse


def _also(hint: str) -> str:
    return f"; {hint}" if hint else ""


_AMOUNT = r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART = re.compile(rf"{_AMOUNT}(ms|s|m|h|d)\s*")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")


def _duration(low_s: float, high_s: float) -> Callable[[object], float]:
    """Seconds from ``90s``, ``1.5m``, ``1h 30m``."""

    def parse(value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            raise _BadValue(f'needs a unit, one of {", ".join(_SECONDS)}, in quotes: "60s"')
        text = _text(value)
        if not _DURATION.fullmatch(text):
            raise _BadValue(f'{_shown(text)} is no duration; write numbers with {", ".join(_SECONDS)}: "60s", "1h 30m"')
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))
        if not low_s <= seconds <= high_s:
            raise _BadValue(f"must be from {low_s:g}s to {high_s:g}s")
        return seconds

    return parse


_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(rf"{_AMOUNT}([A-Za-z]*)")


def _size(low: int, high: int) -> Callable[[object], int]:
    """Bytes from ``32MiB``, ``500kB`` or a plain number."""

    def parse(value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return _whole(low, high)(value)
        text = _text(value)
        match = _SIZE.fullmatch(text)
        if match is None or match[2].lower() not in _BYTES:
            raise _BadValue(f'{_shown(text)} is no size; write a number and a unit: "32MiB", "500kB"')
        size = float(match[1]) * _BYTES[match[2].lower()]
        if not low <= size <= high:
            raise _BadValue(f"must be from {low} to {high} bytes")
        return int(size)

    return parse


def _listen(value: object) -> Listen:
    text = _text(value)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/"):
            raise _BadValue('a unix socket needs an absolute path: "unix:/run/routerd/routerd.sock"')
        return Listen(path=path)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9._-]*)):([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise _BadValue(f"{_shown(text)} is no address; write HOST:PORT, [IPv6]:PORT or unix:/PATH")
    return Listen(host=match[1] or match[2], port=int(match[3]))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


_ENDPOINTS = ("/chat/completions", "/responses", "/messages")


def _url(value: object) -> str:
    text = _text(value).rstrip("/")
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not text.isprintable() or " " in text:
        raise _BadValue('is no URL with a host; write it like "https://api.example.com/v1"')
    if "@" in parts.netloc:
        raise _BadValue("holds a user name or password; keys belong into api_key")
    if parts.query or parts.fragment:
        raise _BadValue("must end with the path: no ? and no #")
    ending = next((end for end in _ENDPOINTS if parts.path.endswith(end)), "")
    if ending:
        raise _BadValue(f'leave "{ending}" off; it is appended')
    return text


def _prefer(value: object) -> float:
    """The value of time in USD per second."""
    if isinstance(value, str) and value in PREFER_USD_PER_HOUR:
        return PREFER_USD_PER_HOUR[value] / 3600
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _BadValue(f"must be one of {', '.join(PREFER_USD_PER_HOUR)}, or a number of USD per hour")
    return _number(0, 100_000)(value) / 3600


def _check_name(name: str, path: str, report: _Report) -> None:
    """Names are labels of metrics and parts of model names."""
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable() or name != name.strip():
        report.problem(path, f"a name has 1 to {MAX_NAME_LENGTH} printable characters and no space at its ends")


def _xdg(environ: Mapping[str, str], variable: str, fallback: str) -> Path:
    return Path(environ.get(variable) or Path(environ.get("HOME") or "/") / fallback)


class _Secrets:
    """Finds secrets where they are kept. Refuses with what it looked for, never with what it found."""

    __slots__ = ("environ",)

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def text(self, value: object) -> str:
        """Text with every ``${NAME}`` replaced from the environment."""
        return re.sub(r"\$\{([^}]*)\}", self._variable, _text(value))

    def _variable(self, match: re.Match[str]) -> str:
        found = self.environ.get(match[1], "").strip()
        if not found:
            raise _BadValue(f"the environment variable {match[1]} is not set; set it or change the reference")
        return found

    def secret(self, value: object) -> Secret:
        if not isinstance(value, str):
            raise _BadValue(f'must be "${{NAME}}", "file:/path", "credential:NAME" or the text, not {_kind(value)}')
        scheme, _, rest = value.partition(":")
        if scheme == "file":
            return self._file(Path(rest))
        if scheme == "credential":
            return self._credential(rest)
        return Secret(_one_line(self.text(value)))

    def _credential(self, name: str) -> Secret:
        folder = self.environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            raise _BadValue("there is no $CREDENTIALS_DIRECTORY; credentials come with systemd's LoadCredential=")
        if not name or "/" in name or name in {".", ".."}:
            raise _BadValue('a credential is named without a path: "credential:NAME"')
        return self._file(Path(folder) / name)

    def _file(self, path: Path) -> Secret:
        if not path.is_absolute():
            raise _BadValue('needs an absolute path: "file:/etc/routerd/key"')
        try:
            with path.open("rb") as file:
                content = file.read(MAX_SECRET_BYTES + 1).decode().strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise _BadValue(f"{path} cannot be read: {reason}") from None
        if not content or len(content) > MAX_SECRET_BYTES:
            raise _BadValue(f"{path} is empty or larger than {MAX_SECRET_BYTES} bytes; it should hold a key alone")
        return Secret(_one_line(content))


def _one_line(secret: str) -> str:
    """Keys travel in headers, which take visible ASCII only."""
    if not secret.isascii() or not secret.isprintable():
        raise _BadValue("a key is one line of ASCII characters; this one is not")
    return secret


# --- sections -------------------------------------------------------------------------------------------------------


def _read_config(root: _Table, path: Path | None, environ: Mapping[str, str], listen: Sequence[str]) -> Config:
    secrets = _Secrets(environ)
    server = _read_server(root.table("server"), secrets, listen)
    state_url = _read_state(root.table("state"), environ)
    defaults = _read_defaults(root.table("defaults"))
    reader = _Providers(root, secrets, defaults)
    providers = reader.read()
    simulated = not providers and path is None
    if simulated:
        providers = {name: reader.stock_simulated(name) for name in SIMULATED_PROVIDERS}
    if not providers and not reader.named:
        message = "there is none; add a table like [providers.openrouter], or set OPENROUTER_API_KEY"
        # An empty [providers] says that none is meant, yet: a freshly installed service runs, and refuses requests.
        (root.warning if "providers" in root else root.problem)("providers", message)
    names = _Names(providers, defaults)
    routes = _read_routes(root, names, defaults)
    prices = _read_prices(root.table("prices"), providers)
    return Config(
        server=server,
        state_url=state_url,
        defaults=defaults,
        providers=providers,
        routes=routes,
        simulated=simulated,
        source=path,
        warnings=(),
        models=tuple(names.models),
        table=names.with_routes(routes),
        prices=prices,
    )


def _read_server(table: _Table, secrets: _Secrets, listen: Sequence[str]) -> Server:
    written = table.take("tokens")
    tokens = table.read_each("tokens", secrets.secret)
    addresses = _read_listen(table, listen)
    first = written[0] if isinstance(written, list) and written else None
    server = Server(
        listen=addresses,
        tokens=tokens,
        max_body_bytes=table.read("max_body", _size(1024, 2**30), 32 * 2**20),
        hosts=tuple(host.lower() for host in table.read_each("hosts", _text)),
        token_reference=first if isinstance(first, str) and re.fullmatch(r"\$\{[^}]*\}", first) else "",
    )
    exposed = next((address for address in addresses if not address.local), None)
    if exposed and not written:
        table.problem("tokens", f'{exposed} is reachable from other machines; add tokens = ["${{ROUTERD_TOKEN}}"]')
    table.close()
    return server


def _read_listen(table: _Table, override: Sequence[str]) -> tuple[Listen, ...]:
    default = Listen("127.0.0.1", 8080)
    written = table.take("listen")
    if override:
        return table.items(override, "--listen", _listen)
    if isinstance(written, str):
        return (table.read("listen", _listen, default),)
    return table.read_each("listen", _listen) or (default,)


def _read_state(table: _Table, environ: Mapping[str, str]) -> str:
    """``memory:``, or ``sqlite:`` with an absolute path."""
    given = environ.get("STATE_DIRECTORY", "").partition(":")[0]  # systemd may give several
    folder = Path(given) if given else _xdg(environ, "XDG_STATE_HOME", ".local/state") / "routerd"

    def parse(value: object) -> str:
        scheme, colon, place = _text(value).partition(":")
        if scheme == "memory" and colon and not place:
            return "memory:"
        if scheme != "sqlite" or not place.strip("/"):
            raise _BadValue('must be "sqlite:FILE" or "memory:"')
        return f"sqlite:{folder / ('/' + place.lstrip('/') if place.startswith('/') else place)}"

    url = table.read("url", parse, f"sqlite:{folder / 'routerd.db'}")
    table.close()
    return url


def _read_defaults(table: _Table) -> Defaults:
    defaults = Defaults(
        value_of_time_usd_per_s=table.read("prefer", _prefer, _prefer("balanced")),
        first_token_timeout_s=table.read("first_token_timeout", _duration(0.05, 3600), 60.0),
        first_token_floor_s=table.read("min_first_token_timeout", _duration(0.05, 3600), 10.0),
        stall_floor_s=table.read("min_stall_timeout", _duration(0.05, 3600), 10.0),
        stall_timeout_s=table.read("stall_timeout", _duration(0.05, 3600), 45.0),
        answer_timeout_s=table.read("answer_timeout", _duration(0.05, 86400), 600.0),
        max_wait_s=table.read("max_wait", _duration(0, 86400), 300.0),
        max_attempts=table.read("max_attempts", _whole(1, 64), 6),
        hedge_after_s=table.read("hedge_after", _duration(0.05, 3600), 8.0),
        auxiliary_timeout_s=table.read("auxiliary_timeout", _duration(0.05, 3600), 25.0),
        delivery=table.read("delivery", _choice(get_args(Delivery)), "live"),
        keepalive_s=table.read("keepalive", _duration(0.05, 5), 5.0),
        breaker=_read_breaker(table.table("breaker")),
    )
    table.close()
    return defaults


def _read_breaker(table: _Table) -> BreakerPolicy:
    stock = BreakerPolicy()
    try:
        return BreakerPolicy(
            failures=table.read("failures", _whole(1, 1000), stock.failures),
            ratio=table.read("ratio", _number(0.01, 1), stock.ratio),
            min_requests=table.read("min_requests", _whole(1, 1000), stock.min_requests),
            window_s=table.read("window", _duration(0.1, 86400), stock.window_s),
            open_s=table.read("open", _duration(0.01, 86400), stock.open_s),
            open_max_s=table.read("open_max", _duration(0.01, 86400), stock.open_max_s),
            slow_start_successes=table.read("slow_start_successes", _whole(1, 1000), stock.slow_start_successes),
        )
    except ValueError as error:  # the values are fine one by one, but not together
        table.report.problem(table.path, str(error))
        return stock
    finally:
        table.close()


def _read_prices(table: _Table, providers: Mapping[str, ProviderConfig]) -> Prices:
    feeds = fresh.feeds()
    refresh_s = table.read("refresh", _duration(MIN_REFRESH_S, MAX_REFRESH_S), None)
    sources = dict.fromkeys(table.read_each("sources", _choice(tuple(feeds))) or feeds)
    if table.take("sources") == []:
        table.problem("sources", "is empty; leave refresh out if no prices are to be fetched")
    urls = table.table("urls")
    given = {source: urls.read(source, _url, feed.url) for source, feed in feeds.items()}
    urls.close()
    for source in urls:
        if source in feeds and source not in sources:
            urls.warning(source, "is not used: sources leaves it out")
    if refresh_s is None and ("sources" in table or "urls" in table):
        table.warning("refresh", 'is missing, so no prices are fetched; write refresh = "24h"')
    served = {preset for source in sources for preset in feeds[source].providers.values()}
    if refresh_s is not None and not any(provider.preset in served for provider in providers.values()):
        table.warning("refresh", "fetches nothing: these sources have no prices of any provider that is configured")
    table.close()
    return Prices(refresh_s, {source: given[source] for source in sources})


# --- limits ---------------------------------------------------------------------------------------------------------

_UNITS: tuple[Unit, ...] = get_args(Unit)
_PERIODS: tuple[Period, ...] = get_args(Period)


def _read_limit(table: _Table, units: Sequence[Unit] = _UNITS, *, models: bool = True) -> Limit | None:
    """One limit, ``{ requests = 20, per = "minute" }``.

    Unless ``resets`` says otherwise it rolls, and so holds for any day or month, whoever's midnight ends it.
    """
    amounts = {unit: table.read(unit, _number(1e-6, 1e15), 0.0) for unit in units}
    given = [unit for unit in units if unit in table]
    per = table.read("per", _choice(_PERIODS), None)
    resets = table.read("resets", lambda value: _resets(value, per), "rolling")
    pattern = table.read("models", _text, "*") if models else "*"
    if len(given) != 1:
        table.report.problem(table.path, f"needs exactly one of {', '.join(units)}, with its amount")
    if "per" not in table:
        table.problem("per", f"is missing; it is one of {', '.join(_PERIODS)}")
    table.close()
    if len(given) != 1 or per is None:
        return None
    return Limit(amounts[given[0]], given[0], per, resets, pattern)


def _resets(value: object, per: str | None) -> str:
    text = _text(value)
    if text == "minute" and per not in {None, "minute"}:
        raise _BadValue(f'"minute" does not go with per = "{per}"; write "rolling" or a time zone such as "UTC"')
    if text not in {"rolling", "minute"} and not _time_zone(text):
        raise _BadValue(f"unknown time zone {_shown(text)}{_also(_maybe(text, zoneinfo.available_timezones()))}")
    return text


def _time_zone(name: str) -> bool:
    try:
        zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # not found; not a zone's name; a folder of zones
        return False
    return True


# --- providers ------------------------------------------------------------------------------------------------------


class _Offered(msgspec.Struct, frozen=True):
    """A model of a provider, before it is multiplied by the keys."""

    model: str
    wire_model: str
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    max_output_tokens: int | None = None
    price: Price = Price()
    tools: bool = True
    images: bool = False
    list_priced: bool = True
    rostered: bool = False

    @property
    def fit_for_agents(self) -> bool:
        return self.tools and self.context_tokens >= MIN_AGENT_CONTEXT_TOKENS


_SIMULATED_OFFER = _Offered(SIMULATED_MODEL, SIMULATED_MODEL, max_output_tokens=16_384, price=Price(0.1, 0.4, 0.01))


class _Providers:
    """Reads ``[providers.*]``, or makes providers of what the environment holds."""

    def __init__(self, root: _Table, secrets: _Secrets, defaults: Defaults) -> None:
        self._root = root
        self._secrets = secrets
        self._defaults = defaults
        self._catalog = catalog.load()
        self.named = False  # does the file name any?

    def read(self) -> dict[str, ProviderConfig]:
        table = self._root.table("providers")
        self.named = bool(list(table))
        if not self.named:
            return dict(self._from_environment())
        read = ((name, self._provider(name, table.table(name))) for name in table)
        return {name: provider for name, provider in read if provider is not None}

    def _from_environment(self) -> Iterator[tuple[str, ProviderConfig]]:
        """One provider for each key that is set; a key several could use goes to the first of them."""
        used: set[str] = set()
        for preset in self._catalog.providers.values():
            variable = next((name for name in preset.api_key_env if self._secrets.environ.get(name, "").strip()), None)
            if variable is None or variable in used or preset.retired:
                continue
            used.add(variable)
            if preset.dynamic:
                self._root.warning(
                    "providers", f"{variable} is set, but the models of {preset.name} must be listed in a config file"
                )
                continue
            provider = self._provider(preset.id, _Table({}, f"providers.{preset.id}", self._root.report))
            if provider is not None:
                yield preset.id, provider

    def stock_simulated(self, name: str) -> ProviderConfig:
        return self._simulated(name, _Table({}, f"providers.{name}", self._root.report))

    def _provider(self, name: str, table: _Table) -> ProviderConfig | None:
        _check_name(name, table.path, table.report)
        if "/" in name:
            table.report.problem(table.path, 'the name of a provider has no "/": it separates provider and model')
        if table.read("simulated", _flag, False):
            return self._simulated(name, table)
        preset_name = table.read("preset", _text, name)
        preset = self._catalog.provider(preset_name)
        if preset is not None and preset.retired:
            table.report.problem(table.path, f"{preset.retired}; remove this table")
            return None
        if preset is None and (preset_name != name or "base_url" not in table):
            self._unknown(preset_name, table)
        return self._real(name, table, preset)

    def _unknown(self, preset_name: str, table: _Table) -> None:
        known = [name for name, preset in self._catalog.providers.items() if not preset.retired]
        hint = _maybe(preset_name, known) or f"known are {', '.join(known)}"
        message = f"{_shown(preset_name)} is no known provider, and a server of your own needs base_url; {hint}"
        table.report.problem(table.path, message)

    def _real(self, name: str, table: _Table, preset: catalog.Provider | None) -> ProviderConfig:
        free = self._read_tier(table, preset)
        base_urls = self._read_base_urls(table, preset)
        keys = self._read_keys(table, preset)
        offered = self._read_models(table, preset, free)
        limits = self._read_limits(table, preset, free, offered)
        provider = ProviderConfig(
            name=name,
            vendor=(preset.vendor or preset.id) if preset else "",
            base_urls=base_urls,
            keys=keys,
            auth=table.read("auth", _choice(get_args(catalog.Auth)), preset.auth if preset else "bearer"),
            dialect_auth=_dialect_auth(table, preset),
            headers=self._read_headers(table, preset),
            limits=limits,
            upstreams=_upstreams(name, len(keys), _dialect(base_urls), offered, preset),
            default_model=self._read_default_model(table, preset, free, offered),
            preset=preset.id if preset else "",
            list_priced=frozenset(model.wire_model for model in offered if model.list_priced),
            rostered=frozenset(model.wire_model for model in offered if model.rostered),
            **self._read_timeouts(table, preset),
        )
        table.close()
        return provider

    def _simulated(self, name: str, table: _Table) -> ProviderConfig:
        """A provider that needs no vendor: ``faults`` is a script, one item for each request, over and over."""
        table.take("simulated")
        faults = table.read_each("faults", _choice(SIMULATED_FAULTS))
        stock = {SIMULATED_MODEL: _SIMULATED_OFFER}
        offered = self._listed_models(table, None, stock)
        for model in offered:
            if not model.wire_model.endswith(SIMULATED_SUFFIX):
                table.problem("models", f'a simulated model has a name that ends with "{SIMULATED_SUFFIX}"')
        provider = ProviderConfig(
            name=name,
            vendor="",
            base_urls={},
            keys=(Secret(""),),
            auth="bearer",
            headers={},
            limits=tuple(limit for limit in map(_read_limit, table.tables("limits")) if limit),
            upstreams=_upstreams(name, 1, "chat", offered, None),
            default_model=self._read_default_model(table, None, None, offered),
            simulated=faults,
            **self._read_timeouts(table, None),
        )
        table.close()
        return provider

    def _read_timeouts(self, table: _Table, preset: catalog.Provider | None) -> dict[str, Any]:
        preset_s = preset.first_token_timeout_s if preset else None
        first_s = self._defaults.first_token_timeout_s if preset_s is None else preset_s
        return {
            "first_token_timeout_s": table.read("first_token_timeout", _duration(0.05, 3600), first_s),
            "stall_timeout_s": table.read("stall_timeout", _duration(0.05, 3600), self._defaults.stall_timeout_s),
        }

    def _read_tier(self, table: _Table, preset: catalog.Provider | None) -> catalog.FreeTier | None:
        if table.read("tier", _choice(("free", "paid")), "paid") == "paid":
            return None
        if preset is None or preset.free_tier is None:
            who = preset.name if preset else "this server"
            table.problem("tier", f"{who} has no recurring free tier that is known here; use limits instead")
            return None
        return preset.free_tier

    def _read_base_urls(self, table: _Table, preset: catalog.Provider | None) -> dict[str, str]:
        """The URL of each dialect. One URL without ``dialect`` is that of chat; a table names its dialects itself."""
        written = table.take("base_url")
        if isinstance(written, dict):
            urls = table.table("base_url")
            given = {dialect: urls.read(dialect, self._base_url, "") for dialect in _DIALECT_NAMES if dialect in urls}
            urls.close()
            spoken = self._read_dialects(table, tuple(given))
        elif written is not None:
            spoken = self._read_dialects(table, ("chat",))
            given = dict.fromkeys(spoken, table.read("base_url", self._base_url, ""))
        else:
            given = dict(preset.base_urls) if preset else {}
            spoken = self._read_dialects(table, tuple(given))
        self._check_dialects(table, spoken, given)
        return {dialect: given[dialect] for dialect in spoken if dialect in given}

    def _check_dialects(self, table: _Table, spoken: Sequence[str], given: Mapping[str, str]) -> None:
        for dialect in spoken:
            if dialect not in given:
                table.problem("base_url", f"there is none for {dialect}; give one, or leave {dialect} out of dialect")

    def _base_url(self, value: object) -> str:
        return _url(self._secrets.text(value))

    def _read_dialects(self, table: _Table, default: tuple[str, ...]) -> tuple[str, ...]:
        parse = _choice(_DIALECT_NAMES)
        if isinstance(table.take("dialect"), str):
            return (table.read("dialect", parse, "chat"),)
        return table.read_each("dialect", parse) or default

    def _read_keys(self, table: _Table, preset: catalog.Provider | None) -> tuple[Secret, ...]:
        """The pool. A server that needs no key has one that is empty."""
        single = table.read("api_key", self._secrets.secret, None)
        pool = table.read_each("keys", self._secrets.secret)
        if "api_key" in table and "keys" in table:
            table.problem("keys", "give either api_key or keys, not both")
        self._check_pool(table, pool)
        if "api_key" in table or "keys" in table:
            return pool or (single or Secret(""),)
        return (self._environment_key(table, preset.api_key_env) if preset else Secret(""),)

    def _environment_key(self, table: _Table, variables: Sequence[str]) -> Secret:
        """The key in the first variable that is set. No variable: no key is needed."""
        found = next((name for name in variables if self._secrets.environ.get(name, "").strip()), None)
        if found is not None:
            try:
                return self._secrets.secret(f"${{{found}}}")
            except _BadValue as error:
                table.problem("api_key", f"{found}: {error}")
        elif variables:
            names = " or ".join(variables)
            table.problem("api_key", f"there is no key; set the environment variable {names}, or give api_key")
        return Secret("")

    def _check_pool(self, table: _Table, pool: tuple[Secret, ...]) -> None:
        if len(pool) > MAX_KEYS:
            table.problem("keys", f"holds more than {MAX_KEYS} keys")
        for index, key in enumerate(pool):
            if key in pool[:index]:
                table.report.problem(f"{table.at('keys')}[{index}]", "is the same key as one before it; remove it")

    def _read_headers(self, table: _Table, preset: catalog.Provider | None) -> dict[str, str]:
        headers = dict(preset.headers) if preset else {}
        written = table.table("headers")
        for name in written:
            value = written.read(name, self._header, "")
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
                written.problem(name, "is no name of an HTTP header")
            if name.lower() in FRAMING_HEADERS:
                written.problem(name, "says how a message is framed, which is not for a config to say; leave it out")
            headers[name] = value
        return headers

    def _header(self, value: object) -> str:
        return _one_line(self._secrets.text(value))

    # -- a provider's models ----------------------------------------------------------------------------------------

    def _read_models(
        self, table: _Table, preset: catalog.Provider | None, free: catalog.FreeTier | None
    ) -> tuple[_Offered, ...]:
        """What is on offer: the shipped models, at a free tier those it covers, and what the user lists."""
        offers = self._catalog.offers[preset.id] if preset else ()
        shipped = {
            model.id: _shipped(model, offer, free) for model, offer in offers if not free or free.covers(offer.model)
        }
        offered = self._listed_models(table, preset, shipped)
        if not offered and (preset or "base_url" in table):
            table.problem("models", 'list its models: models = ["name"], or a table with their windows and prices')
        return offered

    def _listed_models(
        self, table: _Table, preset: catalog.Provider | None, shipped: dict[str, _Offered]
    ) -> tuple[_Offered, ...]:
        """What is shipped, with what ``models`` changes and adds. A list of names stands for a table without values."""
        written = table.take("models")
        if isinstance(written, list):
            names = table.read_each("models", _text)
            models = _Table({name: {} for name in names}, table.at("models"), table.report)
        else:
            models = table.table("models")
        offered = dict(shipped)
        for key in models:
            model = self._read_model(key, models, preset, shipped)
            offered[model.model] = model
        return tuple(offered.values())

    def _read_model(
        self, key: str, models: _Table, preset: catalog.Provider | None, shipped: Mapping[str, _Offered]
    ) -> _Offered:
        _check_name(key, models.at(key), models.report)
        is_name = isinstance(models.take(key), str)
        table = _Table({"id": models.take(key)}, models.path, models.report) if is_name else models.table(key)
        base = self._base_model(key, preset, shipped)
        offered = _Offered(
            model=base.model,
            wire_model=table.read("id", _text, base.wire_model),
            context_tokens=table.read("context", _whole(1, 10**9), base.context_tokens),
            max_output_tokens=table.read("max_output", _whole(1, 10**9), base.max_output_tokens),
            price=_read_price(table, base.price),
            tools=table.read("tools", _flag, base.tools),
            images=table.read("images", _flag, base.images),
            list_priced=base.list_priced and not any(key in table for key in ("input", "output", "cached")),
        )
        table.close()
        return offered

    def _base_model(self, key: str, preset: catalog.Provider | None, shipped: Mapping[str, _Offered]) -> _Offered:
        """What is known of a listed model: as this provider offers it, as its vendor does, or nothing.

        Prices are taken over only for vendors that charge: what runs at home costs nothing unless it is said.
        """
        model = self._catalog.model(key)
        public = model.id if model else key
        if public in shipped:
            return shipped[public]
        if model is None:
            return _Offered(key, key)
        price = model.offers[0].price if preset is not None and preset.api_key_env else Price()
        return _Offered(model.id, key, model.context, model.max_output, price, model.tools, model.images)

    def _read_default_model(
        self,
        table: _Table,
        preset: catalog.Provider | None,
        free: catalog.FreeTier | None,
        offered: Sequence[_Offered],
    ) -> str:
        """The one ``auto`` uses: as told, as shipped, else the first that suits an agent."""
        names = {model.model: model for model in offered}
        told = table.read("default_model", _text, "")
        if told:
            known = self._catalog.model(told)
            told = told if told in names or known is None else known.id
            if told not in names:
                hint = _also(_maybe(told, names))
                table.problem("default_model", f"{_shown(told)} is not among the models of this provider{hint}")
            return told
        shipped = (free.default_model if free else preset.default_model) if preset else ""
        if shipped in names and names[shipped].fit_for_agents:
            return shipped
        return next((model.model for model in offered if model.fit_for_agents), "")

    def _read_limits(
        self,
        table: _Table,
        preset: catalog.Provider | None,
        free: catalog.FreeTier | None,
        offered: Sequence[_Offered],
    ) -> tuple[Limit, ...]:
        """The user's limits replace the shipped ones: an empty list means that there are none."""
        written = [(limit_table, _read_limit(limit_table)) for limit_table in table.tables("limits")]
        if "limits" not in table:
            rules = free.rules if free else preset.limits if preset else ()
            return catalog.limits_for(rules, [model.wire_model for model in offered])
        for limit_table, limit in written:
            self._check_limit(limit_table, limit, offered)
        return tuple(limit for _, limit in written if limit)

    def _check_limit(self, table: _Table, limit: Limit | None, offered: Sequence[_Offered]) -> None:
        """A limit that could never count anything is a mistake, or at least worth a word."""
        if limit is None:
            return
        counted = [model for model in offered if fnmatchcase(model.wire_model, limit.models)]
        meant = next((model for model in offered if fnmatchcase(model.model, limit.models)), None)
        if not counted and meant is not None:
            table.problem("models", f'goes by the names this provider uses: "{meant.wire_model}", not "{meant.model}"')
        if limit.unit == "usd" and counted and all(model.price.free for model in counted):
            table.warning("usd", "counts nothing: no model it holds for has a price; give them input and output")


_DIALECT_NAMES = ("chat", "responses", "messages")


def _dialect_auth(table: _Table, preset: catalog.Provider | None) -> dict[str, catalog.Auth]:
    """Who says how the key is sent means all dialects; else each has the header its own vendor made it with."""
    if "auth" in table:
        return {}
    usual: dict[str, catalog.Auth] = {
        name: "x-api-key" for name, dialect in DIALECTS.items() if dialect.key_header == "x-api-key"
    }
    return usual | (preset.dialect_auth if preset else {})


def _dialect(base_urls: Mapping[str, str]) -> str:
    """The one requests are sent in that the provider cannot take as they come: chat if it is spoken."""
    routable = [dialect for dialect in ("chat", *base_urls) if dialect in base_urls and dialect in DIALECTS]
    return routable[0] if routable else "chat"


def _shipped(model: catalog.Model, offer: catalog.Offer, free: catalog.FreeTier | None) -> _Offered:
    return _Offered(
        model=model.id,
        wire_model=offer.model,
        context_tokens=offer.context or model.context,
        max_output_tokens=offer.max_output or model.max_output,
        price=Price() if free and not free.credit else offer.price,
        tools=model.tools,
        images=model.images,
        list_priced=free is None or free.credit,
        rostered=True,
    )


def _read_price(table: _Table, base: Price) -> Price:
    """USD per million tokens. A new input price makes the known price of a cache hit obsolete."""
    amount = _number(0, 100_000)
    return Price(
        input=table.read("input", amount, base.input),
        output=table.read("output", amount, base.output),
        cached=table.read("cached", amount, None if "input" in table else base.cached),
    )


def _upstreams(
    provider: str, keys: int, dialect: str, offered: Sequence[_Offered], preset: catalog.Provider | None
) -> tuple[Upstream, ...]:
    fixes = [preset.fix_for(model.wire_model, dialect) if preset else CUSTOM_FIX for model in offered]
    names = DIALECTS if preset and preset.dialect_fix else ()
    return tuple(
        Upstream(
            provider=provider,
            key=key,
            model=model.model,
            wire_model=model.wire_model,
            dialect=dialect,
            context_tokens=model.context_tokens,
            max_output_tokens=model.max_output_tokens,
            price=model.price,
            tools=model.tools,
            images=model.images,
            fix=fix,
            fixes=tuple((name, preset.fix_for(model.wire_model, name)) for name in names) if preset else (),
        )
        for model, fix in zip(offered, fixes, strict=True)
        for key in range(keys)
    )


# --- routes and names -----------------------------------------------------------------------------------------------


class _Names:
    """Every name that is not a route, resolved. ``models`` are the public ones, in the order of the providers."""

    def __init__(self, providers: Mapping[str, ProviderConfig], defaults: Defaults) -> None:
        self._defaults = defaults
        self._providers = providers
        upstreams = [upstream for provider in providers.values() for upstream in provider.upstreams]
        self.models = self._routes(upstreams, lambda upstream: upstream.model)
        self._pinned = self._routes(upstreams, lambda upstream: f"{upstream.provider}/{upstream.model}")
        self._wire = self._routes(upstreams, lambda upstream: upstream.wire_model)
        self._table = self._by_precedence(upstreams)

    def _routes(self, upstreams: Iterable[Upstream], name: Callable[[Upstream], str]) -> dict[str, RouteConfig]:
        groups: dict[str, list[Upstream]] = {}
        for upstream in upstreams:
            groups.setdefault(name(upstream), []).append(upstream)
        return {name: self.route(name, (tuple(group),)) for name, group in groups.items()}

    def _by_precedence(self, upstreams: Sequence[Upstream]) -> dict[str, RouteConfig]:
        table = {**self._pinned, **self.models}
        for upstream in upstreams:
            pinned = self._pinned[f"{upstream.provider}/{upstream.model}"]
            table.setdefault(f"{upstream.provider}/{upstream.wire_model}", pinned)
        for upstream in upstreams:
            if catalog.public_wire_name(upstream.wire_model):
                table.setdefault(upstream.wire_model, self.models[upstream.model])
        for name, public in catalog.load().names.items():
            if public in self.models:
                table.setdefault(name, self.models[public])
        return _any_case({**self._wire, **table})

    def route(self, name: str, tiers: tuple[tuple[Upstream, ...], ...]) -> RouteConfig:
        return RouteConfig(name, tiers, self._defaults.value_of_time_usd_per_s, self._defaults.delivery)

    def default_tiers(self) -> tuple[tuple[Upstream, ...], ...]:
        """A tier for each provider's default model; failing that, one for every model there is."""
        pins = [f"{name}/{provider.default_model}" for name, provider in self._providers.items()]
        tiers = tuple(self._pinned[pin].tiers[0] for pin in pins if pin in self._pinned)
        return tiers or tuple(route.tiers[0] for route in self.models.values())

    def upstreams(self, value: object) -> tuple[Upstream, ...]:
        """A parser: the upstreams of a model that a route names."""
        name = _text(value)
        route = self._table.get(name) or self._table.get(name.lower())
        if route is not None:
            return route.tiers[0]
        hint = _maybe(name.lower(), [*self.models, *self._pinned]) or "`routerd models` lists what they offer"
        raise _BadValue(f"no configured provider offers {_shown(name)}; {hint}")

    def with_routes(self, routes: dict[str, RouteConfig]) -> dict[str, RouteConfig]:
        """The table of all names a client may use."""
        return {**self._table, **_any_case(routes)}


def _any_case(routes: dict[str, RouteConfig]) -> dict[str, RouteConfig]:
    """The same names and their lower-case forms; an exact name goes before another's lower-case form."""
    return {**{name.lower(): route for name, route in reversed(routes.items())}, **routes}


def _read_routes(root: _Table, names: _Names, defaults: Defaults) -> dict[str, RouteConfig]:
    table = root.table("routes")
    routes = {name: _read_route(name, table.table(name), names, defaults) for name in table}
    if AUTO not in routes:
        routes = {AUTO: names.route(AUTO, names.default_tiers()), **routes}
    auto = routes[AUTO]
    if auto.tiers and auto.context_tokens < MIN_AGENT_CONTEXT_TOKENS:
        message = f"its window is {auto.context_tokens} tokens; Hermes Agent needs {MIN_AGENT_CONTEXT_TOKENS}"
        root.report.warning(f"routes.{AUTO}", message)
    return routes


def _read_route(name: str, table: _Table, names: _Names, defaults: Defaults) -> RouteConfig:
    _check_name(name, table.path, table.report)
    if "models" not in table:
        table.problem("models", 'is missing; list models in order of preference: models = ["mimo-v2.6-pro"]')
    route = RouteConfig(
        name=name,
        tiers=_read_tiers(table, names),
        value_of_time_usd_per_s=table.read("prefer", _prefer, defaults.value_of_time_usd_per_s),
        delivery=table.read("delivery", _choice(get_args(Delivery)), defaults.delivery),
        budget=_read_limit(table.table("budget"), ("usd",), models=False) if "budget" in table else None,
        auxiliary=_without_repeats(table.read_each("auxiliary", names.upstreams)),
        hedge=table.read("hedge", _choice(get_args(Hedge)), "off"),
        hedge_budget=_read_limit(table.table("hedge_budget"), ("usd",), models=False)
        if "hedge_budget" in table
        else None,
    )
    if route.hedge == "paid" and "hedge_budget" not in table:
        table.problem(
            "hedge_budget", 'is missing; hedge = "paid" needs a limit: hedge_budget = { usd = 0.5, per = "day" }'
        )
    table.close()
    return route


def _read_tiers(table: _Table, names: _Names) -> tuple[tuple[Upstream, ...], ...]:
    """The tiers without upstreams an earlier tier has, and without tiers which that leaves empty."""
    written = table.take("models")
    if not isinstance(written, list):
        table.read_each("models", _text)
        return ()
    if not written:
        table.problem("models", "is empty; list at least one model")
    tiers: list[tuple[Upstream, ...]] = []
    for index, entry in enumerate(written):
        path = f"{table.at('models')}[{index}]"
        groups = (
            table.items(entry, path, names.upstreams)
            if isinstance(entry, list)
            else table.item(entry, path, names.upstreams)
        )
        tiers.append(_without_repeats(groups, [upstream for tier in tiers for upstream in tier]))
    return tuple(tier for tier in tiers if tier)


def _without_repeats(groups: Iterable[tuple[Upstream, ...]], seen: Iterable[Upstream] = ()) -> tuple[Upstream, ...]:
    known = set(map(_identity, seen))
    unique = {_identity(upstream): upstream for group in groups for upstream in group}
    return tuple(upstream for identity, upstream in unique.items() if identity not in known)


def _identity(upstream: Upstream) -> tuple[str, int, str]:
    return (upstream.provider, upstream.key, upstream.model)
