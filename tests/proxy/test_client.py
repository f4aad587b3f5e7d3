"""The upstream client over real sockets, against servers that say exactly these bytes and then do exactly that."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import shutil
import socket
import ssl
import struct
import subprocess
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routerd.proxy.client import (
    IDLE_CONNECTIONS_MAX,
    Client,
    ConnectFailed,
    ConnectionTorn,
    Headers,
    Reply,
    Target,
    trust,
)
from routerd.proxy.connection import BARREN_BYTES_MAX, INFLATED_BYTES_MAX, READ_BUFFER_BYTES, Connection, Origin

WAIT_S = 10.0
LOOP_READ_BYTES = 256 * 1024  # what uvloop reads at once
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_EOF = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"


def sized(body: bytes, *headers: str) -> bytes:
    """A whole answer with its length."""
    lines = ["HTTP/1.1 200 OK", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# --- the other side -------------------------------------------------------------------------------------------------


class Play(NamedTuple):
    """What follows a request: these bytes, and then this is done to the connection."""

    data: bytes
    ending: str


def keep(data: bytes) -> Play:
    """Say this and await the next request."""
    return Play(data, "keep")


def close(data: bytes) -> Play:
    """Say this and hang up properly."""
    return Play(data, "close")


def reset(data: bytes) -> Play:
    """Say this and break the connection with an RST, once the test says so."""
    return Play(data, "reset")


def early(data: bytes) -> Play:
    """Say this as soon as the head of the request is in, and never read its body."""
    return Play(data, "early")


class Server:
    """Plays one thing after each request, over all connections; the last one repeats."""

    def __init__(self, *plays: Play, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self.served_by: list[int] = []  # the number of the connection each request came on
        self.alpn: str | None = None
        self.broken = asyncio.Event()  # lets a reset happen
        self._plays = plays
        self._tls = tls
        self._count = 0
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def connections(self) -> int:
        """How many there have been."""
        return self._count

    @property
    def open(self) -> list[int]:
        """The numbers of those that the client has not closed."""
        return sorted(self._writers)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._over.set()
        self.broken.set()
        for writer in tuple(self._writers.values()):
            writer.transport.abort()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    def target(self, path: str = "/v1/chat/completions", host: str = "127.0.0.1") -> Target:
        return Target(f"{'https' if self._tls else 'http'}://{host}:{self.port}{path}", {"X-Tag": "a"})

    def say(self, number: int, data: bytes) -> None:
        """Unasked, on the connection of this number."""
        self._writers[number].write(data)

    def hang_up(self, number: int) -> None:
        self._writers[number].close()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._count += 1
        number = self._count
        self._writers[number] = writer
        self._changed.set()
        if self._tls:
            self.alpn = writer.get_extra_info("ssl_object").selected_alpn_protocol()
        try:
            while await self._answer(number, reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            del self._writers[number]
            writer.transport.abort()
            self._changed.set()

    async def _answer(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """True if another request may follow."""
        head = await reader.readuntil(b"\r\n\r\n")
        play = self._plays[min(len(self.requests), len(self._plays) - 1)]
        if play.ending == "early":
            self.requests.append(head)
            self._changed.set()
            writer.write(play.data)
            await self._over.wait()
        body = await reader.readexactly(int(head.rpartition(b"Content-Length: ")[2]))
        self.requests.append(head + body)
        self.served_by.append(number)
        self._changed.set()
        writer.write(play.data)
        await writer.drain()
        if play.ending == "close":
            writer.close()
            await writer.wait_closed()
        if play.ending == "reset":
            await self.broken.wait()
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        return play.ending == "keep"


Serve = Callable[..., Awaitable[Server]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start servers that are closed after the test; called like ``Server``, and awaited."""
    async with AsyncExitStack() as stack:

        async def start(*plays: Play, tls: ssl.SSLContext | None = None) -> Server:
            return await stack.enter_async_context(Server(*plays, tls=tls))

        yield start


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    await client.close()


async def whole(reply: Reply) -> bytes:
    async with asyncio.timeout(WAIT_S):
        return await reply.read_all(1 << 30)


async def ask(client: Client, server: Server, body: bytes = b"{}") -> tuple[int, bytes]:
    reply = await client.post(server.target(), body)
    return reply.status, await whole(reply)


async def torn(reply: Reply) -> bytes:
    """What came before the connection was torn, which it must be."""
    data, error = await read_out(reply)

    assert error is not None
    return data


async def read_out(reply: Reply) -> tuple[bytes, ConnectionTorn | None]:
    """All that can be read, and how it ended; the two ways to tell agree."""
    data = b""
    try:
        async with asyncio.timeout(WAIT_S):
            while part := await reply.read():
                data += part
    except ConnectionTorn as error:
        assert (error.before_headers, reply.ended) == (False, False)  # noqa: PT017 - there may be none
        return data, error
    assert reply.ended
    return data, None


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until this is so: for what only the client's own state tells."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the product sets no event for a test's sake
            await asyncio.sleep(0)


async def cancelled(doing: Coroutine[Any, Any, Any], when: Callable[[], Awaitable[None]]) -> None:
    """Run this until then, and cancel it; nothing else may be left running."""
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(doing)
    await asyncio.sleep(0)
    await when()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    left = {task for task in asyncio.all_tasks() - before if "Server" not in repr(task)}

    assert not left


# --- what is sent ---------------------------------------------------------------------------------------------------


async def test_a_request_is_the_targets_head_and_the_body(client: Client, serve: Serve) -> None:
    """Nothing is on the wire but the fixed headers, the target's own, the length and the body."""
    server = await serve(keep(OK))
    await client.post(server.target("/v1/chat/completions?beta=true"), b'{"model":"m"}')

    assert server.requests == [
        b"POST /v1/chat/completions?beta=true HTTP/1.1\r\n"
        b"Host: 127.0.0.1:%d\r\n"
        b"Connection: keep-alive\r\n"
        b"Accept: */*\r\n"
        b"Accept-Encoding: identity\r\n"
        b"Content-Type: application/json\r\n"
        b"User-Agent: routerd\r\n"
        b"X-Tag: a\r\n"
        b"Content-Length: 13\r\n"
        b"\r\n"
        b'{"model":"m"}' % server.port
    ]


@pytest.mark.parametrize(
    ("url", "first_lines"),
    [
        ("https://api.example.com", b"POST / HTTP/1.1\r\nHost: api.example.com\r\n"),
        ("https://api.example.com:443/v1", b"POST /v1 HTTP/1.1\r\nHost: api.example.com\r\n"),
        ("http://api.example.com:443/v1", b"POST /v1 HTTP/1.1\r\nHost: api.example.com:443\r\n"),
        ("http://[::1]:8000/v1", b"POST /v1 HTTP/1.1\r\nHost: [::1]:8000\r\n"),
        ("http://[fe80::1%eth0]/v1", b"POST /v1 HTTP/1.1\r\nHost: [fe80::1]\r\n"),
        ("http://bücher.example/ü b", b"POST /%C3%BC%20b HTTP/1.1\r\nHost: xn--bcher-kva.example\r\n"),
        ("http://model_server:1/a%2Fb:c", b"POST /a%2Fb:c HTTP/1.1\r\nHost: model_server:1\r\n"),
    ],
)
def test_the_first_lines_come_from_the_url(url: str, first_lines: bytes) -> None:
    """The path is escaped where it must be, and ``Host`` names the port unless it is the scheme's own."""
    assert Target(url, {}).head.startswith(first_lines)


def test_a_targets_own_headers_replace_the_fixed_ones() -> None:
    """A header's name is the same in any case."""
    head = Target("http://a", {"user-agent": "b", "HOST": "c"}).head

    assert b"\r\nuser-agent: b\r\n" in head
    assert b"\r\nHOST: c\r\n" in head
    assert b"User-Agent" not in head
    assert b"Host" not in head


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-A", "secret\r\nX-B: c"),
        ("X-A", "secret\n"),
        ("X-A", "secret\0"),
        ("X-A", "secret\u20ac"),
        ("X-A: b\r\nX-C", "secret"),
        ("X A", "secret"),
        ("", "secret"),
        ("Content-Length", "secret"),
        ("transfer-encoding", "secret"),
        ("CONNECTION", "secret"),
    ],
)
def test_no_header_can_change_the_requests_shape(name: str, value: str) -> None:
    """Whatever would end a line, or say how long the body is, is refused without showing the value."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the messages differ
        Target("http://a", {name: value})

    assert "secret" not in str(caught.value)


def test_a_request_may_have_headers_of_its_own() -> None:
    """They are a client's, so one that would change the request's shape is left out instead of refused."""
    target = Target("http://a", {})
    extended = target.extended({"x-beta": " b ", "x-c": "d\r\nx-e: f", "x g": "h", "Transfer-Encoding": "chunked"})

    assert extended.origin == target.origin
    assert extended.head == target.head.replace(b"Content-Length: ", b"x-beta: b\r\nContent-Length: ")


@pytest.mark.parametrize(
    "url", ["ftp://a", "http://", "a/b", "http://a b/", "http://a:99999/", "http://user:secret@a/", "http://a\\b/"]
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    """The mistake shows when the target is made, not when it is used."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the messages differ
        Target(url, {})

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 64 * 1024, 64 * 1024 + 1, 5_000_000])
async def test_a_body_of_any_size_arrives_whole(client: Client, serve: Serve, size: int) -> None:
    """Small bodies go out with the head, large ones behind it."""
    server = await serve(keep(OK))
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    assert await ask(client, server, body) == (200, b"ok")
    assert server.requests[0].endswith(b"Content-Length: %d\r\n\r\n%b" % (size, body))


# --- answers and their ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("play", "status", "body"),
    [
        (keep(sized(b"hello")), 200, b"hello"),
        (keep(sized(b"")), 200, b""),
        (keep(CHUNKED + chunk(b"hel") + chunk(b"lo") + b"0\r\n\r\n"), 200, b"hello"),
        (keep(CHUNKED + b"5;name=value\r\nhello\r\n0\r\nTrailer: x\r\n\r\n"), 200, b"hello"),
        (keep(b"HTTP/1.1 204 No Content\r\n\r\n"), 204, b""),
        (keep(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"), 304, b""),
        (keep(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"), 302, b""),
        (keep(b"HTTP/1.1 429 \r\nContent-Length: 1\r\n\r\n!"), 429, b"!"),
        (keep(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK), 200, b"ok"),
        (keep(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"), 200, b"ok"),
    ],
)
async def test_an_answer_that_ends_by_itself(
    client: Client, serve: Serve, play: Play, status: int, body: bytes
) -> None:
    """Its connection serves the next request."""
    server = await serve(play)

    assert [await ask(client, server) for _ in range(2)] == [(status, body)] * 2
    assert server.connections == 1


async def test_trailers_are_nobodys_headers(client: Client, serve: Serve) -> None:
    """Neither those of the answer they follow nor those of the next one."""
    server = await serve(keep(CHUNKED + b"0\r\nX-Trailer: x\r\n\r\n"), keep(OK))
    replies = [await client.post(server.target(), b"{}") for _ in range(2)]

    assert server.connections == 1
    assert [list(reply.headers) for reply in replies] == [["transfer-encoding"], ["content-length"]]


@pytest.mark.parametrize(
    "play",
    [
        close(UNTIL_EOF + b"hello"),
        close(b"HTTP/1.0 200 OK\r\n\r\nhello"),
        close(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nhello"),
        keep(sized(b"hello", "Connection: close")),
        keep(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
        keep(sized(b"hello") + b"more than was said"),
        keep(sized(b"hello") + OK),
        close(sized(b"hello")),
    ],
)
async def test_an_answer_whose_connection_ends_with_it(client: Client, serve: Serve, play: Play) -> None:
    """The answer is whole; the next request gets another connection, and none of the first one's bytes."""
    server = await serve(play)

    for number in (1, 2):
        assert await ask(client, server) == (200, b"hello")
        await server.until(lambda number=number: server.connections == number and not server.open)  # type: ignore[misc]


async def test_an_answer_to_an_unread_request_spoils_the_connection(client: Client, serve: Serve) -> None:
    """An upstream that refuses before it has read everything cannot find the next request's beginning."""
    server = await serve(early(OK))

    assert await ask(client, server, b"x" * 50_000_000) == (200, b"ok")
    await until(lambda: repr(client) == "<Client 0 open, 0 idle>")


@pytest.mark.parametrize(
    ("data", "before"),
    [
        (CHUNKED, b""),
        (CHUNKED + chunk(b"hello"), b"hello"),
        (CHUNKED + b"9\r\nhello", b"hello"),
        (CHUNKED + chunk(b"hello") + b"0\r\n", b"hello"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\nhello", b"hello"),
    ],
)
async def test_an_answer_that_ends_too_early_is_torn(client: Client, serve: Serve, data: bytes, before: bytes) -> None:
    """What came is handed over first."""
    server = await serve(close(data))
    reply = await client.post(server.target(), b"{}")

    assert await torn(reply) == before


@pytest.mark.parametrize("head", [CHUNKED, UNTIL_EOF, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"])
async def test_a_reset_is_never_a_clean_end(client: Client, serve: Serve, head: bytes) -> None:
    """Not even where the end of the connection is the end of the body."""
    server = await serve(reset(head))
    reply = await client.post(server.target(), b"{}")
    server.broken.set()

    assert await torn(reply) == b""


@pytest.mark.parametrize("rubbish", [b"hello", b"-1\r\n", b"5\r\nhello world", b"fffffffffffffffff\r\n"])
async def test_chunks_that_are_none_tear_the_answer(client: Client, serve: Serve, rubbish: bytes) -> None:
    """There is no finding back to where the body goes on."""
    server = await serve(keep(CHUNKED + chunk(b"hello ") + rubbish))
    reply = await client.post(server.target(), b"{}")

    assert (await torn(reply)).startswith(b"hello ")


@pytest.mark.parametrize(
    "play",
    [
        close(b""),
        close(b"HTTP/1.1 200 OK\r\nContent-Le"),
        close(b"HTTP/1.1 100 Continue\r\n\r\n"),
        keep(b"SSH-2.0-OpenSSH_9.2\r\n"),
        keep(b"<html>no HTTP at all</html>"),
        keep(b"\x15\x03\x03\x00\x02\x02\x50"),
        keep(b"HTTP/1.1 abc OK\r\n\r\n"),
        keep(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        keep(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
        keep(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
        keep(b"HTTP/1.1 200 OK\r\n" + b"X-Padding: abcdefgh\r\n" * (2 * LOOP_READ_BYTES // 21)),
        keep(b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 2 * LOOP_READ_BYTES),
        keep(b"HTTP/1.1 100 Continue\r\n\r\n" * (2 * LOOP_READ_BYTES // 25)),
    ],
)
async def test_what_is_no_head_is_torn_before_the_headers(client: Client, serve: Serve, play: Play) -> None:
    """Too little, too much and nonsense are all the same; on a fresh connection nothing is sent again."""
    server = await serve(play)
    with pytest.raises(ConnectionTorn) as caught:
        await client.post(server.target(), b"{}")

    assert caught.value.before_headers
    assert server.connections == 1


@pytest.mark.parametrize("filler", [b"0\r\n" + b"Trailer: x\r\n" * 50_000, b"5;" + b"x" * 600_000])
async def test_what_carries_no_body_is_bounded(client: Client, serve: Serve, filler: bytes) -> None:
    """Endless trailers or chunk extensions fill no memory."""
    assert len(filler) > BARREN_BYTES_MAX + LOOP_READ_BYTES
    server = await serve(keep(CHUNKED + chunk(b"hello") + filler))
    reply = await client.post(server.target(), b"{}")

    assert await torn(reply) == b"hello"


async def test_bytes_without_body_may_add_up(client: Client, serve: Serve) -> None:
    """Only what comes in a row is bounded: a long answer has many chunks."""
    heads = [b"1;" + b"x" * 10_000 + b"\r\n"] * 20
    seen = await observe([CHUNKED, *(part for head in heads for part in (head, b"a\r\n")), b"0\r\n\r\n"], eof=False)

    assert sum(map(len, heads)) > BARREN_BYTES_MAX
    assert (seen.body, seen.whole) == (b"a" * 20, True)


async def test_headers_are_found_by_any_spelling(client: Client, serve: Serve) -> None:
    """Of a repeated header the first counts, as for a single ``get`` elsewhere."""
    lines = ("Retry-After: 7", "RETRY-AFTER: 8", "x-name:  caf\xe9 ", "X-Empty:")
    head = "\r\n".join(["HTTP/1.1 204 No Content", *lines, "", ""]).encode("latin-1")
    server = await serve(keep(head))
    headers = (await client.post(server.target(), b"{}")).headers

    assert (headers["retry-AFTER"], headers.get("Retry-After"), headers.get("X-Empty")) == ("7", "7", "")
    assert (headers.get("nothing"), headers.get("nothing", "x"), headers.get("\u20ac")) == (None, "x", None)
    assert dict(headers) == {"retry-after": "7", "x-name": "caf\xe9", "x-empty": ""}
    assert ("X-NAME" in headers, len(headers)) == (True, 3)


# --- connections that are kept --------------------------------------------------------------------------------------


async def test_the_connection_used_last_is_used_next(client: Client, serve: Serve) -> None:
    """So the others can grow old."""
    server = await serve(keep(OK))
    first, second = await asyncio.gather(*(client.post(server.target(), b"{}") for _ in range(2)))
    for reply in (first, second):
        await whole(reply)
    newest = server.served_by[-1]
    for _ in range(3):
        await ask(client, server)

    assert server.served_by[2:] == [newest] * 3


async def test_another_origin_gets_another_connection(client: Client, serve: Serve) -> None:
    """Two base URLs of one provider never mix."""
    servers = [await serve(keep(sized(name))) for name in (b"a", b"b")]
    bodies = [(await ask(client, server))[1] for server in servers * 2]

    assert bodies == [b"a", b"b"] * 2
    assert [server.connections for server in servers] == [1, 1]


async def test_a_connection_is_free_before_its_answer_is_read(client: Client, serve: Serve) -> None:
    """The reader takes its time, with nothing of the next answer in its bytes."""
    server = await serve(keep(sized(b"first")), keep(sized(b"second")))
    first = await client.post(server.target(), b"{}")
    second = await client.post(server.target(), b"{}")

    assert (await whole(first), await whole(second)) == (b"first", b"second")
    assert server.connections == 1


async def test_idle_connections_grow_old(serve: Serve) -> None:
    """Each is closed when its own time is over, also if no request ever comes again."""
    client = Client(idle_s=0.05)
    server = await serve(keep(OK))
    await asyncio.gather(*(ask(client, server) for _ in range(3)))
    await server.until(lambda: not server.open)
    await ask(client, server)
    await server.until(lambda: not server.open)
    await client.close()

    assert server.connections == 4


async def test_only_what_is_old_is_closed(serve: Serve) -> None:
    """The sweep that closes one connection leaves a younger one, and comes back for it."""
    client = Client(idle_s=0.05)
    server = await serve(keep(OK))
    for reply in await asyncio.gather(*(client.post(server.target(), b"{}") for _ in range(2))):
        await whole(reply)
    newest = next(reversed(client._idle))
    client._idle[newest] += 60
    await server.until(lambda: len(server.open) == 1)
    sweep = client._sweep

    assert list(client._idle) == [newest]
    assert sweep is not None
    await client.close()
    assert sweep.cancelled()


async def test_idle_connections_are_counted(client: Client, serve: Serve) -> None:
    """A burst leaves no more than the bound behind."""
    server = await serve(keep(OK))
    replies = await asyncio.gather(*(client.post(server.target(), b"{}") for _ in range(IDLE_CONNECTIONS_MAX + 3)))
    for reply in replies:
        await whole(reply)
    await server.until(lambda: len(server.open) <= IDLE_CONNECTIONS_MAX)

    assert server.connections >= len(server.open) == IDLE_CONNECTIONS_MAX
    assert f"{IDLE_CONNECTIONS_MAX} idle" in repr(client)


async def test_an_idle_connection_that_speaks_is_closed(client: Client, serve: Serve) -> None:
    """Its bytes answer nothing, and must not answer the next request."""
    server = await serve(keep(OK))
    await ask(client, server)
    server.say(1, sized(b"to nobody"))
    await server.until(lambda: not server.open)

    assert repr(client) == "<Client 0 open, 0 idle>"
    assert await ask(client, server) == (200, b"ok")


async def test_an_idle_connection_that_the_upstream_closes_is_forgotten(client: Client, serve: Serve) -> None:
    """No request is wasted on finding out."""
    server = await serve(keep(OK))
    await ask(client, server)
    server.hang_up(1)
    await until(lambda: repr(client) == "<Client 0 open, 0 idle>")

    assert await ask(client, server) == (200, b"ok")
    assert server.served_by == [1, 2]


@pytest.mark.parametrize("first", [OK, b"220 ready\r\n"])
async def test_a_server_that_speaks_first_is_not_asked(first: bytes) -> None:
    """What it says answers no request, however well it is formed."""
    wire = Wire()
    connection = Connection(Keeper(), Origin(tls=False, host="a", port=1))
    connection.connection_made(wire)
    connection.data_received(first)
    with pytest.raises(ConnectionTorn) as caught:
        await connection.post(b"", b"")

    assert (caught.value.before_headers, connection.heard, wire.closed) == (True, False, True)


@pytest.mark.parametrize("loss", [close, reset])
async def test_a_request_lost_on_a_used_connection_is_sent_again(
    client: Client, serve: Serve, loss: Callable[[bytes], Play]
) -> None:
    """The upstream's goodbye may have crossed it on the way; nobody hears of it."""
    server = await serve(keep(OK), loss(b""), keep(sized(b"again")))
    server.broken.set()
    await ask(client, server)

    assert await ask(client, server, b"body") == (200, b"again")
    assert server.served_by == [1, 1, 2]
    assert server.requests[1] == server.requests[2]


async def test_a_request_is_sent_again_only_once(client: Client, serve: Serve) -> None:
    """On the fresh connection there is no excuse."""
    server = await serve(keep(OK), close(b""))
    await ask(client, server)
    with pytest.raises(ConnectionTorn):
        await ask(client, server)

    assert server.served_by == [1, 1, 2]


async def test_a_request_that_was_heard_is_not_sent_again(client: Client, serve: Serve) -> None:
    """One byte of an answer proves that the connection was alive."""
    server = await serve(keep(OK), close(b"H"))
    await ask(client, server)
    with pytest.raises(ConnectionTorn) as caught:
        await ask(client, server)

    assert caught.value.before_headers
    assert server.served_by == [1, 1]


# --- compressed bodies ----------------------------------------------------------------------------------------------

TEXT = b"The same again, and the same again. " * 1000
_bare = zlib.compressobj(wbits=-15)
BARE = _bare.compress(TEXT) + _bare.flush()
COMPRESSED = [
    ("gzip", gzip.compress(TEXT)),
    ("X-GZip", gzip.compress(TEXT)),
    ("gzip", gzip.compress(TEXT[:99]) + gzip.compress(b"") + gzip.compress(TEXT[99:])),
    ("gzip", gzip.compress(TEXT) + b"\0\0\0"),
    ("gzip", gzip.compress(TEXT) + b"\x1f"),
    ("deflate", zlib.compress(TEXT)),
    ("deflate", BARE),
]


@pytest.mark.parametrize(("encoding", "body"), COMPRESSED)
async def test_a_compressed_body_is_inflated(client: Client, serve: Serve, encoding: str, body: bytes) -> None:
    """Though it was not asked for; and the connection serves on."""
    server = await serve(keep(sized(body, f"Content-Encoding: {encoding}")))

    assert [await ask(client, server) for _ in range(2)] == [(200, TEXT)] * 2
    assert server.connections == 1


@pytest.mark.parametrize("encoding", ["br", "identity", "", "gzip, gzip"])
async def test_an_unknown_encoding_is_passed_on(client: Client, serve: Serve, encoding: str) -> None:
    """Whoever reads it will say what is wrong with it."""
    server = await serve(keep(sized(b"as is", f"Content-Encoding: {encoding}")))

    assert await ask(client, server) == (200, b"as is")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_body_of_nothing_is_nothing(client: Client, serve: Serve, encoding: str) -> None:
    """Some servers label every answer."""
    server = await serve(keep(f"HTTP/1.1 204 No Content\r\nContent-Encoding: {encoding}\r\n\r\n".encode()))

    assert await ask(client, server) == (204, b"")


async def test_a_compressed_stream_is_read_as_it_comes(client: Client, serve: Serve) -> None:
    """Every flush of the upstream's is one event for the reader."""
    server = await serve(keep(CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")))
    reply = await client.post(server.target(), b"{}")
    stream = zlib.compressobj(wbits=31)
    events = []
    for event in (b"data: 1\n\n", b"data: 2\n\n"):
        server.say(1, chunk(stream.compress(event) + stream.flush(zlib.Z_SYNC_FLUSH)))
        events.append(await reply.read())
    server.say(1, chunk(stream.flush()) + b"0\r\n\r\n")

    assert events == [b"data: 1\n\n", b"data: 2\n\n"]
    assert await reply.read() == b""
    assert reply.ended


@pytest.mark.parametrize("body", [gzip.compress(TEXT)[:-9], gzip.compress(TEXT)[:3], b"no gzip at all"])
async def test_a_broken_compressed_body_is_torn(client: Client, serve: Serve, body: bytes) -> None:
    """HTTP's end was clean, but the text's was not."""
    server = await serve(keep(sized(body, "Content-Encoding: gzip")))
    reply = await client.post(server.target(), b"{}")

    assert TEXT.startswith(await torn(reply))


async def test_a_body_that_inflates_to_a_huge_one_comes_in_portions(client: Client, serve: Serve) -> None:
    """A kilobyte that means a megabyte fills no memory unless somebody wants it."""
    zeros = gzip.compress(bytes(4_000_000))
    server = await serve(keep(sized(zeros, "Content-Encoding: gzip")))
    reply = await client.post(server.target(), b"{}")
    sizes: list[int] = []
    while portion := await reply.read():
        assert not reply.ended or sum(sizes) + len(portion) == 4_000_000
        sizes.append(len(portion))

    assert max(sizes) == INFLATED_BYTES_MAX
    assert sum(sizes) == 4_000_000
    assert reply.ended


# --- reading --------------------------------------------------------------------------------------------------------


async def test_one_read_gives_all_that_has_come(client: Client, serve: Serve) -> None:
    """However many chunks it came in; and the end is told again and again."""
    server = await serve(keep(CHUNKED + chunk(b"a") + chunk(b"b") + chunk(b"c") + b"0\r\n\r\n"))
    reply = await client.post(server.target(), b"{}")
    await until(lambda: "whole" in repr(reply))

    before = reply.ended

    assert await reply.read() == b"abc"
    assert (before, reply.ended) == (False, True)
    assert [await reply.read() for _ in range(2)] == [b"", b""]


async def test_a_slow_reader_stops_the_upstream(client: Client, serve: Serve) -> None:
    """What is held for it stays near the mark, and nothing is lost."""
    body = bytes(range(256)) * 80_000
    server = await serve(keep(sized(body)))
    reply = await client.post(server.target(), b"{}")
    await until(lambda: reply._size > READ_BUFFER_BYTES)
    held = reply._size
    for _ in range(20):
        await asyncio.sleep(0.001)

    assert held == reply._size <= READ_BUFFER_BYTES + LOOP_READ_BYTES
    assert await whole(reply) == body
    assert await ask(client, server) == (200, body)
    assert server.connections == 1


async def test_an_answer_that_is_cut_off_closes_its_connection(client: Client, serve: Serve) -> None:
    """Of a body that is too long only its beginning is taken."""
    server = await serve(keep(sized(b"x" * 1_000_000)))
    reply = await client.post(server.target(), b"{}")

    assert await reply.read_all(10) == b"x" * 10
    await server.until(lambda: not server.open)
    assert await torn(reply) == b""


async def test_a_reply_has_one_reader(client: Client, serve: Serve) -> None:
    """Two would each get half of it."""
    server = await serve(keep(CHUNKED))
    reply = await client.post(server.target(), b"{}")
    reading = asyncio.ensure_future(reply.read())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await reply.read()
    server.say(1, chunk(b"a"))

    assert await reading == b"a"


async def test_an_aborted_reply_closes_its_connection(client: Client, serve: Serve) -> None:
    """Its reader is told, and a second time changes nothing."""
    server = await serve(keep(CHUNKED + chunk(b"a")))
    reply = await client.post(server.target(), b"{}")
    await reply.read()
    reading = asyncio.ensure_future(reply.read())
    await asyncio.sleep(0)
    reply.abort()
    reply.abort()
    with pytest.raises(ConnectionTorn):
        await reading
    await server.until(lambda: not server.open)

    assert await torn(reply) == b""


async def test_aborting_a_whole_answer_keeps_the_connection(client: Client, serve: Serve) -> None:
    """It may by then be serving somebody else."""
    server = await serve(keep(OK))
    reply = await client.post(server.target(), b"{}")
    other = await client.post(server.target(), b"{}")
    reply.abort()

    assert await whole(other) == b"ok"
    assert server.connections == 1


async def test_a_released_reply_gives_its_connection_back(client: Client, serve: Serve) -> None:
    """What little was left of it is read."""
    server = await serve(keep(CHUNKED + chunk(b"data: [DONE]\n\n")))
    reply = await client.post(server.target(), b"{}")
    await reply.read()
    releasing = asyncio.ensure_future(reply.release(WAIT_S))
    await asyncio.sleep(0)
    server.say(1, b"0\r\n\r\n")
    await releasing
    await client.post(server.target(), b"{}")

    assert server.served_by == [1, 1]


@pytest.mark.parametrize("play", [keep(CHUNKED), close(CHUNKED), reset(CHUNKED)])
async def test_a_reply_that_does_not_end_in_time_is_closed(client: Client, serve: Serve, play: Play) -> None:
    """A release never raises and never takes longer than it may."""
    server = await serve(play)
    server.broken.set()
    reply = await client.post(server.target(), b"{}")
    async with asyncio.timeout(WAIT_S):
        await reply.release(0.02)
    await server.until(lambda: not server.open)

    assert not reply.ended


# --- giving up ------------------------------------------------------------------------------------------------------


async def test_a_cancelled_post_leaves_nothing_behind(client: Client, serve: Serve) -> None:
    """The upstream sees the hang-up and can stop working."""
    server = await serve(keep(b""))
    await cancelled(client.post(server.target(), b"{}"), lambda: server.until(lambda: bool(server.requests)))
    await server.until(lambda: not server.open)

    assert repr(client) == "<Client 0 open, 0 idle>"


async def test_a_cancelled_read_leaves_nothing_behind(client: Client, serve: Serve) -> None:
    """The same in mid-answer."""
    server = await serve(keep(CHUNKED))
    reply = await client.post(server.target(), b"{}")
    await cancelled(reply.read(), lambda: asyncio.sleep(0))
    await server.until(lambda: not server.open)

    assert await torn(reply) == b""


async def test_a_cancelled_connect_leaves_nothing_behind(
    client: Client, serve: Serve, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """Here in the middle of the handshake: the server speaks no TLS and waits for more."""
    server = await serve(keep(OK))
    target = Target(f"https://127.0.0.1:{server.port}/", {})
    await cancelled(client.post(target, b"{}"), lambda: server.until(lambda: bool(server.open)))
    await server.until(lambda: not server.open)


async def test_a_closed_client_has_closed_everything(serve: Serve) -> None:
    """Idle, waiting and answering alike, even with a body nobody reads; whoever waits is told."""
    client = Client()
    idle, waiting, answering, stuck = [await serve(play) for play in (keep(OK), keep(b""), keep(CHUNKED), early(b""))]
    await ask(client, idle)
    reply = await client.post(answering.target(), b"{}")
    posts = [asyncio.ensure_future(client.post(waiting.target(), b"{}"))]
    posts.append(asyncio.ensure_future(client.post(stuck.target(), b"x" * 50_000_000)))
    await waiting.until(lambda: bool(waiting.requests))
    await stuck.until(lambda: bool(stuck.requests))
    async with asyncio.timeout(WAIT_S):
        await client.close()

    assert repr(client) == "<Client 0 open, 0 idle, closed>"
    assert [type(outcome) for outcome in await asyncio.gather(*posts, return_exceptions=True)] == [ConnectionTorn] * 2
    assert await torn(reply) == b""


async def test_a_closed_client_connects_no_more(serve: Serve) -> None:
    """Neither for a new request nor for one that was connecting as it closed."""
    client = Client()
    server = await serve(keep(OK))
    connecting = asyncio.ensure_future(client.post(server.target(), b"{}"))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ConnectFailed):
        await connecting
    with pytest.raises(ConnectFailed):
        await client.post(server.target(), b"{}")
    await client.close()
    await server.until(lambda: not server.open)

    assert repr(client) == "<Client 0 open, 0 idle, closed>"
    assert not server.requests


# --- connecting and TLS ---------------------------------------------------------------------------------------------


def unused_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


@pytest.mark.parametrize("host", ["127.0.0.1", "no..name", "x" * 70])
async def test_what_cannot_be_reached_is_a_failure_to_connect(client: Client, host: str) -> None:
    """Nobody listens there, or there is no such place."""
    with pytest.raises(ConnectFailed):
        await client.post(Target(f"http://{host}:{unused_port()}/", {}), b"{}")


async def test_every_address_of_a_name_is_tried(client: Client, serve: Serve) -> None:
    """``localhost`` is ``::1`` too on most machines, where this server does not listen."""
    server = await serve(keep(OK))
    reply = await client.post(server.target(host="localhost"), b"{}")

    assert await whole(reply) == b"ok"


async def test_connecting_has_its_own_time_limit(serve: Serve) -> None:
    """TLS is part of it: this server listens, and never answers the handshake."""
    client = Client(connect_timeout_s=0.05)
    server = await serve(keep(OK))
    with pytest.raises(ConnectFailed, match="TimeoutError"):
        await client.post(Target(f"https://127.0.0.1:{server.port}/", {}), b"{}")
    await server.until(lambda: not server.open)

    assert repr(client) == "<Client 0 open, 0 idle>"
    await client.close()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that vouches for itself, and its key, in one folder."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=routerd-test"
        " -addext subjectAltName=DNS:localhost -keyout key.pem -out certificate.pem".split(),
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def tls(authority: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's side and the client's."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(authority / "certificate.pem", authority / "key.pem")
    server.set_alpn_protocols(["h2", "http/1.1"])
    trusting = ssl.create_default_context(cafile=str(authority / "certificate.pem"))
    return server, trusting


async def test_over_tls_everything_is_the_same(
    serve: Serve, authority: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``SSL_CERT_FILE`` names whom to trust, HTTP/1.1 is what is agreed on, and the connection is kept."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "certificate.pem"))
    client = Client(tls=trust())
    server = await serve(keep(OK), tls=tls[0])
    for _ in range(2):
        reply = await client.post(server.target(host="localhost"), b"x" * 1_000_000)
        assert await whole(reply) == b"ok"
    await client.close()

    assert (server.connections, server.alpn) == (1, "http/1.1")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_certificate_that_does_not_prove_it_is_a_failure_to_connect(
    serve: Serve, tls: tuple[ssl.SSLContext, ssl.SSLContext], host: str
) -> None:
    """Signed by nobody known, or for another name: no byte of the request is sent."""
    client = Client(tls=None if host == "localhost" else tls[1])
    server = await serve(keep(OK), tls=tls[0])
    with pytest.raises(ConnectFailed, match="SSLCertVerificationError"):
        await client.post(server.target(host=host), b"{}")
    await client.close()

    assert not server.requests


async def test_a_server_without_tls_is_a_failure_to_connect(client: Client, serve: Serve) -> None:
    """An ``https`` URL on a plain port."""
    server = await serve(keep(OK))
    posting = asyncio.ensure_future(client.post(Target(f"https://127.0.0.1:{server.port}/", {}), b"{}"))
    await server.until(lambda: bool(server.open))
    server.say(1, OK)
    with pytest.raises(ConnectFailed):
        await posting


@pytest.mark.parametrize("size", [5, 5_000_000])
async def test_a_body_until_the_end_of_a_tls_connection(
    serve: Serve, tls: tuple[ssl.SSLContext, ssl.SSLContext], size: int
) -> None:
    """Nothing of it is lost, though the end arrives while a slow reader has paused the socket."""
    client = Client(tls=tls[1])
    server = await serve(close(UNTIL_EOF + b"x" * size), tls=tls[0])
    reply = await client.post(server.target(host="localhost"), b"{}")
    for _ in range(20):
        await asyncio.sleep(0.001)

    assert len(await whole(reply)) == size
    assert reply.ended
    await client.close()


@pytest.mark.parametrize("data", [CHUNKED + chunk(b"hello"), sized(b"hello")[:-1]])
async def test_an_answer_cut_short_over_tls_is_torn(
    serve: Serve, tls: tuple[ssl.SSLContext, ssl.SSLContext], data: bytes
) -> None:
    """A proper goodbye in the wrong place is none."""
    client = Client(tls=tls[1])
    server = await serve(close(data), tls=tls[0])
    reply = await client.post(server.target(host="localhost"), b"{}")

    assert b"hello".startswith(await torn(reply))
    await client.close()


# --- any bytes in any portions --------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """A transport that takes everything and remembers whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, _data: object) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Keeper:
    """An owner that only counts what came back to it."""

    def __init__(self) -> None:
        self.free = 0

    def opened(self, connection: Connection) -> None:
        pass

    def freed(self, connection: Connection) -> None:
        self.free += 1

    def dropped(self, connection: Connection) -> None:
        pass

    def lost(self, connection: Connection) -> None:
        pass


class Seen(NamedTuple):
    """Everything a caller can observe of an answer."""

    status: int | None
    headers: dict[str, str]
    body: bytes
    whole: bool
    kept: bool


async def observe(portions: list[bytes], *, eof: bool) -> Seen:
    """Let an answer arrive like this."""
    keeper, wire = Keeper(), Wire()
    connection = Connection(keeper, Origin(tls=False, host="a", port=1))
    connection.connection_made(wire)
    posting = asyncio.ensure_future(connection.post(b"", b""))
    await asyncio.sleep(0)
    for portion in portions:
        if not wire.closed:
            connection.data_received(portion)
    if eof and not wire.closed:
        connection.eof_received()
    dropped = wire.closed
    connection.connection_lost(None)
    try:
        reply = await posting
    except ConnectionTorn as error:
        assert error.before_headers  # noqa: PT017 - there may be none
        return Seen(None, {}, b"", whole=False, kept=False)
    body, tear = await read_out(reply)
    return Seen(reply.status, dict(reply.headers), body, whole=tear is None, kept=bool(keeper.free) and not dropped)


ANSWERS = [
    sized(b"hello", "X-A: b", "x-a: c"),
    sized(gzip.compress(TEXT) + gzip.compress(b"more"), "Content-Encoding: gzip"),
    sized(BARE, "Content-Encoding: deflate"),
    CHUNKED + chunk(b"data: 1\n\n") + b"00A;x=y\r\ndata: 22\n\n\r\n0\r\nTrailer: x\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + CHUNKED + b"0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    UNTIL_EOF + b"hello",
    sized(b"hello", "Connection: close") + b"more",
]


@given(
    answer=st.sampled_from(ANSWERS),
    length=st.integers(0, 300),
    cuts=st.lists(st.integers(0, 300), max_size=20),
    eof=st.booleans(),
)
@settings(deadline=None)
async def test_portions_make_no_difference(answer: bytes, length: int, cuts: list[int], *, eof: bool) -> None:
    """An answer, or any beginning of one, is the same however its bytes are divided."""
    data = answer[: length or None]
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    portions = [data[start:end] for start, end in itertools.pairwise(places)]

    assert await observe(portions, eof=eof) == await observe([data], eof=eof)


@given(
    beginning=st.sampled_from([b"", *ANSWERS]),
    length=st.integers(0, 120),
    rubbish=st.lists(st.binary(max_size=60), max_size=6),
    eof=st.booleans(),
)
@settings(deadline=None)
async def test_rubbish_only_tears(beginning: bytes, length: int, rubbish: list[bytes], *, eof: bool) -> None:
    """Whatever an upstream says, the worst that comes of it is ``ConnectionTorn``: ``observe`` lets nothing else by."""
    seen = await observe([beginning[:length], *rubbish], eof=eof)

    assert seen.status is None or 200 <= seen.status <= 999


def test_states_can_be_read() -> None:
    """For whoever debugs; no key and no text is in them."""
    origin = Origin(tls=True, host="a", port=443)

    assert repr(Target("https://a", {"X-Key": "secret"})) == "<Target a:443>"
    assert repr(Connection(Keeper(), origin)) == "<Connection a:443 idle>"
    assert repr(Headers({b"x-key": b"secret"})) == "<Headers x-key>"
    assert repr(Client()) == "<Client 0 open, 0 idle>"
