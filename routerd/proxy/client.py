"""The upstream call: where to post, over which connection, and for how long one is kept.

A caller sees three things: ``Client.post`` (a status and headers, or ``ConnectFailed``), ``Reply.read`` (bytes, ``b""``
at a clean end, ``ConnectionTorn`` at any other) and ``Reply.release``/``abort``. Time limits are the caller's: it alone
knows what it is waiting for. Only connecting has one here.

Theory of operation
-------------------
Why not aiohttp's client, which serves everybody well: it would take a third of the whole proxy's CPU. A small request
and its answer over loopback (uvloop, 16 at a time) cost it 70 us of CPU, and cost this 14, of which 8 go to the loop
and the kernel whoever calls them. What is left out to get there is what an API call needs none of: redirects, cookies,
proxies, streamed uploads, and new objects for every step of a request. Parsing is left to a library written in C.

A ``Target`` is made once per upstream and key: everything of a request's head but its length is prepared bytes.

A ``Client`` keeps idle connections, the last used first: so a few stay warm and the others grow old and are closed,
oldest first, ``IDLE_CONNECTION_S`` after their last answer. One timer does that for all of them.

An idle connection may be dead without our knowing yet: the upstream's goodbye crosses our request on the way. So a
request that is lost on a used connection before a byte of its answer is sent once more, on a fresh one, and nobody
hears of it. On a fresh connection there is no such excuse, and the loss is the upstream's.

What is ugly: uvloop's ``create_connection`` cannot race IPv6 against IPv4, so the socket is connected beforehand, by
the library that aiohttp itself uses. And the trust store costs 20 ms and close to 1 MB to load, so all clients of the
process share one, loaded in a thread when the first of them needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, quote, urlsplit

import aiohappyeyeballs

from routerd.proxy.connection import Connection, ConnectionTorn, Headers, Origin, Reply

__all__ = ["Client", "ConnectFailed", "ConnectionTorn", "Headers", "Reply", "Target"]

CONNECT_TIMEOUT_S = 10.0  # name, TCP and TLS together
HAPPY_EYEBALLS_DELAY_S = 0.25  # the head start each address has over the next one (RFC 8305)
IDLE_CONNECTION_S = 55.0  # below the 60 s after which common load balancers drop an idle connection
IDLE_CONNECTIONS_MAX = 64  # per client
CLOSE_TIMEOUT_S = 1.0  # closing takes one turn of the loop; this is for the day it does not

_FIXED = {
    "Host": "",  # from the URL
    "Connection": "keep-alive",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": "routerd",
}
_FRAMING = {
    "connection",
    "content-length",
    "expect",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_LENGTH = b"Content-Length: "
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_SAFE_IN_PATH = "/%:@!$&'()*+,;=~"


class ConnectFailed(Exception):
    """No connection, or TLS did not come up: nothing of the request was taken."""


class Target:
    """Where and as whom to ask: made once per upstream and key, so that nothing is built per request."""

    __slots__ = ("head", "origin")

    def __init__(self, url: str, headers: Mapping[str, str], *, method: str = "POST") -> None:
        """``ValueError`` for a URL that is none, or a header that could change the request's shape."""
        parts = urlsplit(url)
        self.origin = _origin(parts)
        own = {name.lower(): (name, value) for name, value in headers.items()}
        if not own.keys().isdisjoint(_FRAMING):
            raise ValueError(f"set by the client itself: {', '.join(sorted(own.keys() & _FRAMING))}")
        fixed = {name.lower(): (name, value) for name, value in {**_FIXED, "Host": _authority(parts)}.items()}
        lines = [f"{method} {_path(parts)} HTTP/1.1", *(_line(*header) for header in {**fixed, **own}.values())]
        self.head = "\r\n".join([*lines, ""]).encode("latin-1") + _LENGTH

    def extended(self, headers: Mapping[str, str]) -> Target:
        """The same with more headers, for one request. Those that could change its shape are left out."""
        target = Target.__new__(Target)
        target.origin = self.origin
        lines = [
            f"{name}: {value.strip()}\r\n"
            for name, value in headers.items()
            if _NAME.fullmatch(name) and _VALUE.fullmatch(value) and name.lower() not in _FRAMING
        ]
        target.head = self.head.removesuffix(_LENGTH) + "".join(lines).encode("latin-1") + _LENGTH
        return target

    def __repr__(self) -> str:
        return f"<Target {self.origin.host}:{self.origin.port}>"


def _origin(parts: SplitResult) -> Origin:
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError("the URL is neither http nor https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds a user name or password")
    return Origin(parts.scheme == "https", _host(parts), parts.port or _DEFAULT_PORTS[parts.scheme])


def _host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    if not host.isascii():
        host = host.encode("idna").decode()
    if not _HOST.fullmatch(host):
        raise ValueError("the URL has no usable host")
    return host


def _authority(parts: SplitResult) -> str:
    """The ``Host`` header: no default port, and no zone, which means something on this machine only."""
    host = _host(parts).partition("%")[0]
    name = f"[{host}]" if ":" in host else host
    return name if parts.port in (None, _DEFAULT_PORTS[parts.scheme]) else f"{name}:{parts.port}"


def _path(parts: SplitResult) -> str:
    path = quote(parts.path or "/", safe=_SAFE_IN_PATH)
    return f"{path}?{quote(parts.query, safe=_SAFE_IN_PATH + '?')}" if parts.query else path


def _line(name: str, value: str) -> str:
    """The message shows no value: it may be a key."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"no name of a header: {name!r}")
    if not _VALUE.fullmatch(value):
        raise ValueError(f"the value of the header {name} does not fit on a line of Latin-1")
    return f"{name}: {value.strip()}"


def trust() -> ssl.SSLContext:
    """What upstreams are verified against: the system's store, or the file that ``SSL_CERT_FILE`` names."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


_shared_trust = functools.cache(trust)


class Client:
    """Connections to one provider, kept alive between requests. Belongs to one event loop."""

    def __init__(
        self,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        idle_s: float = IDLE_CONNECTION_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``idle_s``: how long a connection is kept for another request. ``tls`` replaces the system's trust store."""
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._tls = tls
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}  # until when each is kept; the last used comes last
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Client {len(self._open)} open, {len(self._idle)} idle{', closed' if self._closed else ''}>"

    async def post(self, target: Target, body: bytes, on_resend: Callable[[], None] | None = None) -> Reply:
        """Send, and wait for the headers. An idle connection found dead on use is replaced once, unseen.

        ``on_resend`` is called then, for the other side may have taken the first one too.
        """
        connection = self._take(target.origin)
        if connection is not None:
            try:
                return await connection.post(target.head, body)
            except ConnectionTorn:
                if connection.heard:
                    raise
                if on_resend is not None:
                    on_resend()
        connection = await self._connect(target.origin)
        return await connection.post(target.head, body)

    async def get(self, target: Target) -> Reply:
        """Ask, and wait for the headers. ``target`` is made for the method GET."""
        return await self.post(target, b"")

    async def close(self) -> None:
        """Close everything; whoever still waits for an answer is told that it is torn."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for connection in tuple(self._open):
            connection.drop()
        if self._open:
            self._emptied = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._emptied

    # --- connecting -------------------------------------------------------------------------------------------------

    async def _connect(self, origin: Origin) -> Connection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = await self._open_connection(origin)
        # Time-outs, unknown names and TLS's refusals are OSErrors; names that cannot even be asked for are
        # UnicodeErrors, and uvloop reports some failures to connect as RuntimeErrors.
        except (OSError, UnicodeError, RuntimeError) as error:
            raise ConnectFailed(type(error).__name__) from error
        if self._closed:
            connection.drop()
            raise ConnectFailed("the client was closed")
        return connection

    async def _open_connection(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        tls = await self._trust() if origin.tls else None
        addresses = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        connected = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S, loop=loop
        )
        _, connection = await loop.create_connection(
            lambda: Connection(self, origin),
            sock=connected,  # from here on the loop's, also if it fails
            ssl=tls,
            server_hostname=origin.host if origin.tls else None,
        )
        return connection

    async def _trust(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await asyncio.to_thread(_shared_trust)
        return self._tls

    # --- keeping ----------------------------------------------------------------------------------------------------

    def _take(self, origin: Origin) -> Connection | None:
        """The idle connection that was used last. A provider has one origin, rarely two."""
        for connection in reversed(self._idle):
            if connection.origin == origin:
                del self._idle[connection]
                return connection
        return None

    def _drop_expired(self) -> None:
        """Close what has idled long enough, and come back for the next."""
        self._sweep = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection, until in tuple(self._idle.items()):
            if until > now:
                self._sweep = loop.call_at(until, self._drop_expired)
                break
            connection.drop()

    # --- what connections tell their owner --------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)

    def freed(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._idle[connection] = until = loop.time() + self._idle_s
        if len(self._idle) > IDLE_CONNECTIONS_MAX:
            next(iter(self._idle)).drop()
        if self._sweep is None:
            self._sweep = loop.call_at(until, self._drop_expired)

    def dropped(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if not self._open and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)
