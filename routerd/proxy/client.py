"""The upstream call. The one module that knows aiohttp's client.

A caller sees three things: ``Client.post`` (a status and headers, or ``ConnectFailed``), ``Reply.read`` (bytes, ``b""``
at a clean end, ``ConnectionTorn`` at any other) and ``Reply.release``/``abort``. Time limits are the caller's: it alone
knows what it is waiting for. A leaner client may take this one's place behind the same three.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

CONNECT_TIMEOUT_S = 10.0
IDLE_CONNECTION_S = 55.0  # below the 60 s after which common load balancers drop an idle connection
READ_BUFFER_BYTES = 64 * 1024  # a reader this far behind stops the upstream's socket
DNS_CACHE_S = 300


class ConnectFailed(Exception):
    """No connection, or TLS did not come up: nothing of the request was taken."""


class ConnectionTorn(Exception):
    """The connection ended where HTTP says it must not."""

    def __init__(self, *, before_headers: bool) -> None:
        super().__init__("connection torn")
        self.before_headers = before_headers


class Target:
    """Where and as whom to post: made once per upstream and key, so that nothing is parsed per request."""

    __slots__ = ("headers", "url")

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url = URL(url)
        fixed = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "routerd"}
        self.headers: CIMultiDict[str] = CIMultiDict({**fixed, **headers})


class Reply:
    """An upstream's answer, from its headers on."""

    __slots__ = ("_content", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self.status = response.status
        self.headers = response.headers

    async def read(self) -> bytes:
        """The next bytes as they came, ``b""`` at the clean end of the body."""
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionTorn(before_headers=False) from error

    async def read_all(self, limit_bytes: int) -> bytes:
        """The rest of the body; more than ``limit_bytes`` of it is cut off and the connection with it."""
        parts: list[bytes] = []
        size = 0
        while data := await self.read():
            parts.append(data)
            size += len(data)
            if size > limit_bytes:
                self.abort()
                break
        return b"".join(parts)[:limit_bytes]

    @property
    def ended(self) -> bool:
        """True once the body has been read to its clean end; the connection is then already back in the pool."""
        return self._content.at_eof()

    async def release(self, grace_s: float) -> None:
        """Read what little may be left so that the connection can serve again; else close it."""
        try:
            async with asyncio.timeout(grace_s):
                while await self.read():
                    pass
        except (TimeoutError, ConnectionTorn):
            pass
        finally:
            self.abort()

    def abort(self) -> None:
        """Close the connection unless its answer was read to the end. Safe to call twice."""
        self._response.close()


class Client:
    """Connections to one provider, kept alive between requests."""

    def __init__(self, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, tls: ssl.SSLContext | None = None) -> None:
        # limit=0: aiohttp's default of 100 would queue the 101st stream for as long as the first ones last.
        connector = aiohttp.TCPConnector(
            limit=0,
            limit_per_host=0,
            keepalive_timeout=IDLE_CONNECTION_S,
            ttl_dns_cache=DNS_CACHE_S,
            ssl=tls if tls is not None else True,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=True,
            trace_configs=[_reuse_trace()],
        )

    async def post(self, target: Target, body: bytes) -> Reply:
        """Send, and wait for the headers. An idle connection found dead on use is replaced once, unseen."""
        sent = _Sent()
        try:
            return await self._post(target, body, sent)
        except ConnectionTorn:
            if not sent.on_reused_connection:
                raise
            return await self._post(target, body, sent)

    async def _post(self, target: Target, body: bytes, sent: _Sent) -> Reply:
        try:
            response = await self._session.post(
                target.url, data=_Body(body), headers=target.headers, allow_redirects=False, trace_request_ctx=sent
            )
        except aiohttp.ServerDisconnectedError as error:
            raise ConnectionTorn(before_headers=True) from error
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError, aiohttp.InvalidURL) as error:
            raise ConnectFailed(type(error).__name__) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionTorn(before_headers=True) from error
        return Reply(response)

    async def close(self) -> None:
        await self._session.close()


class _Body(aiohttp.BytesPayload):
    """A whole body in memory. aiohttp warns above 1 MiB; ours are bounded by ``server.max_body`` and already here."""

    def __init__(self, value: bytes) -> None:
        super().__init__(b"", content_type="application/json")
        self._value = value
        self._size = len(value)


class _Sent:
    """Whether a request went out on a connection that had idled: only then may its loss be the idling's fault."""

    __slots__ = ("on_reused_connection",)

    def __init__(self) -> None:
        self.on_reused_connection = False


async def _note_reuse(_session: aiohttp.ClientSession, context: Any, _params: object) -> None:
    context.trace_request_ctx.on_reused_connection = True


def _reuse_trace() -> aiohttp.TraceConfig:
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    return trace
