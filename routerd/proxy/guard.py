"""Who may ask: local tokens, the ``Host`` check against DNS rebinding, the ``Origin`` check against cross-site posts.

A page in the user's browser can post to 127.0.0.1 and, by re-pointing its own name, can even read the answer. So on a
loopback listener the ``Host`` must be a loopback name, and whatever carries an ``Origin`` must come from this very
host. On other listeners a token is always demanded (the config refuses to have none), and names are the operator's
business.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from routerd.canonical import Failure, Outcome, Secret, Side

KNOWN_HOSTS_MAX = 256  # verdicts on Host headers kept; more distinct ones than this are an attack, and only cost time

_NO_TOKEN = Failure(
    Outcome.CLIENT_ERROR, Side.CLIENT, "send one of server.tokens as a bearer token", status=401, code="invalid_api_key"
)
_BAD_HOST = Failure(
    Outcome.CLIENT_ERROR, Side.CLIENT, "this Host name is not one of this server's", status=403, code="bad_host"
)
_BAD_ORIGIN = Failure(
    Outcome.CLIENT_ERROR, Side.CLIENT, "requests from other sites' pages are refused", status=403, code="bad_origin"
)


class Guard:
    """Checks requests against the tokens and host names in force."""

    __slots__ = ("_hosts", "_known", "_tokens")

    def __init__(self, tokens: tuple[Secret, ...], hosts: tuple[str, ...]) -> None:
        self._tokens = tokens
        self._hosts = frozenset(host.lower() for host in hosts)
        self._known: dict[str, bool] = {}

    def check(self, request: web.Request, *, open_on_loopback: bool = False) -> Failure | None:
        """None if the request may pass. ``open_on_loopback``: no token is needed where only this machine can ask."""
        headers = request.headers
        local = is_local(request)
        if local and not self._host_known(headers.get("Host", "")):
            return _BAD_HOST
        origin = headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("Host"):
            return _BAD_ORIGIN
        if not self._tokens or (open_on_loopback and local):
            return None
        return None if self._token_fits(headers) else _NO_TOKEN

    def token_of(self, request: web.Request) -> str:
        """Whose request this is, where that is asked for; else ``""``. Only for one that has passed the check."""
        return _given(request.headers) if self._tokens else ""

    def _token_fits(self, headers: Mapping[str, str]) -> bool:
        text = _given(headers)
        fits = [token.matches(text) for token in self._tokens]  # all of them, whichever fits: no early way out
        return any(fits)

    def _host_known(self, host: str) -> bool:
        known = self._known.get(host)
        if known is None:
            known = is_loopback_name(_name_of(host)) or _name_of(host) in self._hosts
            if len(self._known) < KNOWN_HOSTS_MAX:
                self._known[host] = known
        return known


def _given(headers: Mapping[str, str]) -> str:
    given = headers.get("Authorization", "")
    return given[7:].strip() if given[:7].lower() == "bearer " else headers.get("x-api-key", "")


def _name_of(host: str) -> str:
    """``[::1]:8080`` and ``localhost:8080`` without the port, in lower case."""
    return (urlsplit(f"//{host}").hostname or "") if host.count("[") <= 1 and "/" not in host else ""


@functools.lru_cache(maxsize=KNOWN_HOSTS_MAX)
def is_loopback_name(name: str) -> bool:
    """True for localhost and every loopback address. An empty Host comes from HTTP/1.0 probes, never from a browser."""
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_local(request: web.Request) -> bool:
    """True if the request came in where only this machine can ask: a loopback address or a Unix socket."""
    transport = request.transport
    address: Any = transport.get_extra_info("sockname") if transport is not None else None
    if isinstance(address, tuple):
        return is_loopback_name(address[0])
    return True
