"""One connection to an upstream, and the answer that comes over it.

Theory of operation
-------------------
A ``Connection`` is the loop's protocol: it writes a request in one go, feeds what arrives to httptools' parser (llhttp,
the one node uses) and hands the body on to a ``Reply``. It is in one of four states, told by two fields:

    waiting    a request is out, ``_waiter`` is what its sender awaits
    answering  the head is in, ``_reply`` takes the body
    idle       neither, and the owner keeps it for the next request
    closed     neither, for good

    waiting -> answering on the head of a final answer; answering -> idle on its last byte if both sides keep the
    connection alive; anything else -> closed. Bytes on an idle connection answer nothing that was asked: closed.

The bytes of one read become one piece of the body, however many chunks they held: the parser's body callback is the
bare ``list.append``, and the list is joined once per read. So a streamed event costs no Python call here, a read a few.

A ``Reply`` outlives its connection: the connection is free for the next request as soon as the last byte has arrived,
read by then or not. A reader further behind than ``READ_BUFFER_BYTES`` pauses the socket, and one read empties the
buffer, so resuming waits for no second mark. Compressed bodies (never asked for, sent by some servers all the same)
wait in the buffer as they came and are inflated a portion at a time as they are read, so that a small body that
inflates to a huge one fills no memory.

How a body may end is HTTP's to say (RFC 9112, section 6.3): by its chunks, by its length, or, where neither is given,
by the end of the connection. Every other end is ``ConnectionTorn``, and so is anything the parser refuses. Bytes that
carry no body (the head, interim answers, trailers, chunk extensions) are bounded between two pieces of body.

What is ugly: the parser keeps its callbacks from its making on, so one list and one parser serve a connection for life;
and it reads on past the end of an answer, so ``on_message_begin`` must refuse what nobody asked for.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar, cast, overload

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

READ_BUFFER_BYTES = 64 * 1024  # a reader this far behind stops the upstream's socket
BARREN_BYTES_MAX = 64 * 1024  # received in a row without any body: a head, trailers, extensions. Checked per read
INFLATED_BYTES_MAX = 256 * 1024  # what one read of a compressed body gives at most
JOINED_BODY_BYTES_MAX = 64 * 1024  # up to this a copy of the body is cheaper than a second write

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP, _ZLIB, _BARE = 31, 15, -15  # zlib's names for the three wrappings of a deflated stream
_ENCODINGS = {b"gzip": _GZIP, b"x-gzip": _GZIP, b"deflate": _ZLIB}

_T = TypeVar("_T")


class ConnectionTorn(Exception):
    """The connection ended where HTTP says it must not."""

    def __init__(self, *, before_headers: bool) -> None:
        super().__init__("connection torn")
        self.before_headers = before_headers


class Origin(NamedTuple):
    """What a connection is good for."""

    tls: bool
    host: str
    port: int


class Headers(Mapping[str, str]):
    """An answer's headers under case-insensitive names. Of a repeated one the first counts. Decoded when asked for."""

    __slots__ = ("_raw",)

    def __init__(self, raw: dict[bytes, bytes]) -> None:
        """``raw`` has lower-cased names."""
        self._raw = raw

    def __repr__(self) -> str:
        return f"<Headers {', '.join(self)}>"  # values may hold account names and the like

    def __getitem__(self, name: str) -> str:
        return self._raw[name.lower().encode()].decode("latin-1")

    @overload
    def get(self, name: str, /) -> str | None: ...
    @overload
    def get(self, name: str, /, default: str | _T) -> str | _T: ...
    def get(self, name: str, /, default: object = None) -> object:
        value = self._raw.get(name.lower().encode())
        return default if value is None else value.decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._raw)

    def __len__(self) -> int:
        return len(self._raw)


class _Inflater:
    """Undoes gzip and deflate, a bounded portion at a time."""

    __slots__ = ("_garbage", "_input", "_stream", "_wrapping")

    def __init__(self, wrapping: int) -> None:
        self._wrapping = wrapping
        self._stream: zlib._Decompress | None = None
        self._input = b""
        self._garbage = False  # what follows a whole stream is no other one: not for any reader

    @property
    def whole(self) -> bool:
        """True if nothing was begun that has not ended. A single byte behind a stream begins nothing."""
        return self._stream is None or (self._stream.eof and len(self._input) < len(_GZIP_MAGIC))

    def put(self, data: bytes) -> None:
        if not self._garbage:
            self._input += data

    def take(self) -> bytes:
        """The next portion; ``b""`` if more must be put in first. ``zlib.error`` on bytes that are no such stream."""
        while (stream := self._current()) is not None:
            portion = stream.decompress(self._input, INFLATED_BYTES_MAX)
            self._input = stream.unused_data if stream.eof else stream.unconsumed_tail
            if portion or not stream.eof:
                return portion
        return b""

    def _current(self) -> zlib._Decompress | None:
        """The stream under way, or a new one if the input begins one: gzip allows several in a row."""
        if self._stream is not None:
            if not self._stream.eof:
                return self._stream
            if not self._input.startswith(_GZIP_MAGIC):
                self._drop_garbage()
                return None
        elif not self._input:
            return None
        elif self._wrapping == _ZLIB and self._input[0] & 0x0F != zlib.DEFLATED:
            self._wrapping = _BARE  # servers that took the name "deflate" at its word
        self._stream = zlib.decompressobj(self._wrapping)
        return self._stream

    def _drop_garbage(self) -> None:
        if len(self._input) >= len(_GZIP_MAGIC):
            self._garbage = True
            self._input = b""


class Reply:
    """An upstream's answer, from its headers on. One reader at a time."""

    __slots__ = ("_connection", "_inflater", "_parts", "_size", "_torn", "_waiter", "headers", "status")

    def __init__(self, connection: Connection, status: int, headers: dict[bytes, bytes]) -> None:
        """``headers`` has lower-cased names."""
        self.status = status
        self.headers = Headers(headers)
        encoding = headers.get(b"content-encoding")
        wrapping = None if encoding is None else _ENCODINGS.get(encoding.lower())
        self._inflater = None if wrapping is None else _Inflater(wrapping)
        self._connection: Connection | None = connection  # None from the last byte on
        self._torn = False
        self._parts: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = "open" if self._connection is not None else "torn" if self._torn else "whole"
        return f"<Reply {self.status} {state}, {self._size} bytes to read>"

    async def read(self) -> bytes:
        """All that has come since the last read, ``b""`` at the clean end of the body."""
        if self._inflater is not None:
            return await self._read_inflated(self._inflater)
        return await self._read()

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
        """True once the body has been read to its clean end."""
        over = self._connection is None and not self._parts and not self._torn
        return over and (self._inflater is None or self._inflater.whole)

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
        """Close the connection unless its answer came to an end. Safe to call twice."""
        if self._connection is not None:
            self._parts.clear()
            self._size = 0
            self._connection.drop()

    async def _read(self) -> bytes:
        parts = self._parts
        if not parts and self._connection is not None:
            await self._arrival()
        if not parts:
            if self._torn:
                raise ConnectionTorn(before_headers=False)
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._size > READ_BUFFER_BYTES and self._connection is not None:
            self._connection.resume()
        self._size = 0
        return data

    async def _arrival(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("a reply has one reader at a time")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._waiter = None

    async def _read_inflated(self, inflater: _Inflater) -> bytes:
        try:
            while not (data := inflater.take()):
                if not (raw := await self._read()):
                    break
                inflater.put(raw)
        except zlib.error as error:
            self.abort()
            self._torn = True
            raise ConnectionTorn(before_headers=False) from error
        if not data and not inflater.whole:
            raise ConnectionTorn(before_headers=False)
        return data

    # --- the connection's side --------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> bool:
        """More of the body. True if the reader is too far behind for yet more."""
        self._parts.append(data)
        self._size += len(data)
        self._wake()
        return self._size > READ_BUFFER_BYTES

    def finish(self, *, torn: bool) -> None:
        """Nothing more will come."""
        self._connection = None
        self._torn = torn
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Owner(Protocol):
    """Whoever keeps connections, and is told where they stand."""

    def opened(self, connection: Connection) -> None:
        """It is up."""

    def freed(self, connection: Connection) -> None:
        """Its answer is in; it can take another request."""

    def dropped(self, connection: Connection) -> None:
        """It will take no more requests. Told at once, and perhaps twice."""

    def lost(self, connection: Connection) -> None:
        """Its socket is closed. Told once, a little later."""


class Connection(asyncio.Protocol):
    """One connection: a request at a time."""

    __slots__ = (
        "_barren_bytes",
        "_closed",
        "_complete",
        "_headers",
        "_interim",
        "_keep_alive",
        "_owner",
        "_parser",
        "_parts",
        "_reply",
        "_transport",
        "_waiter",
        "heard",
        "on_body",
        "origin",
    )

    def __init__(self, owner: Owner, origin: Origin) -> None:
        self.origin = origin
        self.heard = False  # anything of the answer to the last request
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Reply | None] | None = None  # None: torn
        self._reply: Reply | None = None
        self._closed = False
        self._headers: dict[bytes, bytes] = {}
        self._interim = False
        self._complete = False
        self._keep_alive = False
        self._barren_bytes = 0
        self._parts: list[bytes] = []
        self.on_body = self._parts.append  # bound before the parser looks for it
        self._parser = HttpResponseParser(self)
        # What real servers get wrong without leaving a doubt about where the body ends.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )

    def __repr__(self) -> str:
        answering = "waiting" if self._waiter is not None else "answering" if self._reply is not None else "idle"
        return f"<Connection {self.origin.host}:{self.origin.port} {'closed' if self._closed else answering}>"

    async def post(self, head: bytes, body: bytes) -> Reply:
        """Send a request whose ``head`` ends with ``Content-Length: ``, and wait for the head of its answer."""
        transport = self._transport
        if transport is None or self._closed:
            raise ConnectionTorn(before_headers=True)
        self.heard = self._complete = False
        self._barren_bytes = 0
        waiter: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        if len(body) <= JOINED_BODY_BYTES_MAX:
            transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), body))
        else:
            transport.write(b"%b%d\r\n\r\n" % (head, len(body)))
            transport.write(body)
        try:
            reply = await waiter
        except asyncio.CancelledError:
            self.drop()
            raise
        if reply is None:
            raise ConnectionTorn(before_headers=True)
        return reply

    def drop(self) -> None:
        """Close at once, without flushing: whoever waits for an answer is told that it is torn. Safe to call twice."""
        self._closed = True
        self._owner.dropped(self)
        if self._transport is not None:
            self._transport.abort()
        self._tear()

    def resume(self) -> None:
        """Read on after a pause."""
        if self._transport is not None:
            self._transport.resume_reading()

    def _tear(self) -> None:
        waiter, self._waiter = self._waiter, None
        reply, self._reply = self._reply, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if reply is not None:
            reply.finish(torn=True)

    def _finish(self, reply: Reply, transport: asyncio.Transport, *, reusable: bool) -> None:
        """The answer is whole. An upstream that answered before it had read the request cannot take another."""
        self._reply = None
        if reusable and not transport.get_write_buffer_size():
            self._owner.freed(self)
        else:
            self.drop()
        reply.finish(torn=False)

    # --- the loop's side --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or (self._reply is None and self._waiter is None):
            self.drop()  # nobody asked
            return
        self.heard = sound = True
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            sound = False
        reply, parts, behind = self._reply, self._parts, False
        if parts and reply is not None:
            behind = reply.feed(parts[0] if len(parts) == 1 else b"".join(parts))
            parts.clear()
            self._barren_bytes = 0
        else:
            self._barren_bytes += len(data)
        if self._complete and reply is not None:
            self._finish(reply, transport, reusable=sound and self._keep_alive)
        elif not sound or self._barren_bytes > BARREN_BYTES_MAX:
            self.drop()
        elif behind:
            transport.pause_reading()

    def eof_received(self) -> None:
        reply = self._reply
        if reply is not None and _ends_with_connection(reply.headers):
            self._reply = None
            reply.finish(torn=False)
        self.drop()

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None
        self.drop()
        self._owner.lost(self)

    # --- the parser's side ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            raise HttpParserError("an answer to nothing")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.setdefault(name.lower(), value.rstrip())  # the parser strips the front only

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, {}  # the new one takes the trailers, which nobody reads
        status = self._parser.get_status_code()
        self._interim = status < 200
        if self._interim:
            return
        self._reply = reply = Reply(self, status, headers)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(reply)

    def on_message_complete(self) -> None:
        self._complete = not self._interim
        self._keep_alive = self._parser.should_keep_alive()  # it knows until the next answer begins
        self._headers.clear()


def _ends_with_connection(headers: Headers) -> bool:
    """Neither chunks nor a length say where the body ends."""
    return "content-length" not in headers and headers.get("transfer-encoding", "identity").lower() == "identity"
