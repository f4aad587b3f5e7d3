"""A scripted model server on a loopback port: healthy by default, faulty exactly where a script says so.

Theory of operation
-------------------
It stands in for a vendor in three places: as the providers ``routerd serve`` starts with when it has no key at all, as
the upstream of ``routerd drill``, and as the fake the tests are built on. So it speaks HTTP/1.1 over bare transports:
a web framework would repair, or refuse to send, most of what has to go wrong here.

What it can be told to say and to do wrong is described in ``scripts``; how that looks on the wire, in ``strikes``.

What is ugly: ``refuse`` cannot be a reaction to a request, since a closed port receives none. The listener is closed as
soon as a refusing turn comes next, and the port is kept bound meanwhile so that nobody else can take it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

import msgspec
import orjson

from routerd.proxy.scripts import (
    FAULTS,
    KINDS,
    PLACED_KINDS,
    PLACES,
    TEXT,
    Answer,
    Call,
    Chat,
    Fault,
    Kind,
    Place,
    PlacedKind,
    Received,
    Script,
    Step,
    Turn,
    compose,
    example,
    turn_for,
)
from routerd.proxy.strikes import (
    CHUNKED,
    COMMENT,
    EVENT_STREAM,
    JSON,
    LAST_CHUNK,
    Streamed,
    Strike,
    chunk,
    cut_of,
    error_body,
    head,
    plain,
    replacement,
    strike_before_headers,
    strike_in_body,
    strike_in_stream,
    whole,
)

__all__ = [  # with what a script is made of, for whoever starts a server with one
    "COMMENT",
    "FAULTS",
    "KINDS",
    "LAST_CHUNK",
    "PLACED_KINDS",
    "PLACES",
    "TEXT",
    "Answer",
    "Call",
    "Fault",
    "Kind",
    "Place",
    "PlacedKind",
    "Received",
    "Script",
    "SimulatedServer",
    "Step",
    "Turn",
    "example",
    "turn_for",
]

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_CONNECTIONS = 4096
BACKLOG = 1024

# --- connections ----------------------------------------------------------------------------------------------------


class Over(Exception):
    """The script ends this answer here. ``keep``: the connection serves on."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self.keep = keep


class BadHttp(Exception):
    """The client's request is not HTTP we understand, or over a bound."""


class Connection(asyncio.Protocol):
    """One client connection: reads a request, plays its turn, and so on until either side has had enough.

    A client that closes its sending side has hung up: whatever is being answered is cancelled at once.
    """

    def __init__(self, server: SimulatedServer) -> None:
        self._server = server
        self._reader = asyncio.StreamReader(limit=MAX_HEAD_BYTES)
        self._writable = asyncio.Event()
        self.answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # not isinstance: uvloop's is none
        self._reader.set_transport(self._transport)
        self._transport.set_write_buffer_limits(0)  # drained means: handed to the kernel
        self._writable.set()
        self.task = asyncio.get_running_loop().create_task(self._serve())
        self.lost = asyncio.get_running_loop().create_future()
        self.task.add_done_callback(self._ended)
        self._server.joined(self)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A script's own function has failed: say so, and let no client wait."""
        if not task.cancelled() and (error := task.exception()):
            self.abort()
            task.get_loop().call_exception_handler({"message": "a script has failed", "exception": error})

    def data_received(self, data: bytes) -> None:
        self._reader.feed_data(data)

    def eof_received(self) -> None:
        self._reader.feed_eof()
        if self.answering:
            self.task.cancel()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._reader.feed_eof()
        self.task.cancel()
        self.lost.set_result(None)
        self._server.left(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def send(self, data: bytes) -> None:
        """Returns when the kernel has the bytes."""
        if data:
            self._transport.write(data)
            await self._writable.wait()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        """Close without sending what is still buffered."""
        self._transport.abort()

    def reset(self) -> None:
        """Close with a TCP RST."""
        found = self._transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(found.fileno())) as shared:  # some loops hide setsockopt on their own object
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # reading

    async def _serve(self) -> None:
        try:
            while await self._serve_one():
                pass
        except asyncio.IncompleteReadError:
            pass  # the client left between or inside requests
        except BadHttp:
            await self.send(plain(400, JSON, error_body(400), (("connection", "close"),)))
        self.close()

    async def _serve_one(self) -> bool:
        """Serve the next request; False if the connection ends with it."""
        try:
            method, path, headers = await self._read_head()
            raw = await self._read_body(headers)
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise BadHttp(str(error)) from error
        self.answering, keep = True, True
        try:
            await self._server.answer(self, method, path, headers, raw)
        except Over as over:
            keep = over.keep
        finally:
            self.answering = False
        return keep and headers.get("connection", "").lower() != "close" and not self._server.refusing

    async def _read_head(self) -> tuple[str, str, dict[str, str]]:
        raw = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        method, path, _version = first.split(" ")
        fields = (line.partition(":") for line in lines)
        return method, path.partition("?")[0], {name.lower(): value.strip() for name, _, value in fields}

    async def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("expect", "").lower() == "100-continue":
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in headers.get("transfer-encoding", ""):
            return await self._read_chunks()
        length = int(headers.get("content-length") or 0)
        if not 0 <= length <= MAX_BODY_BYTES:
            raise ValueError("the body is too long")
        return await self._reader.readexactly(length)

    async def _read_chunks(self) -> bytes:
        body = bytearray()
        while size := int((await self._reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            if not 0 < size <= MAX_BODY_BYTES - len(body):
                raise ValueError("the body is too long")
            body += (await self._reader.readexactly(size + 2))[:-2]
        while await self._reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return bytes(body)

    # playing

    async def play(self, turn: Turn, request: Received, model_suffix: str) -> None:
        """Answer as the turn says. Raises Over where the script ends the answer early."""
        fault = turn.fault
        if fault and fault.kind in PLACED_KINDS and fault.place == "before_headers":
            await self._strike(strike_before_headers(fault), fault)
            fault = None
        replaced = replacement(fault, stream=bool(request.chat.stream)) if fault else None
        if replaced is not None:
            await self.send(replaced)
            return
        said = compose(turn, request, model_suffix)
        if request.chat.stream and not (fault and fault.kind == "json_body"):
            streamed = Streamed(said, turn.answer, include_usage=request.chat.include_usage)
            await self._play_stream(streamed, turn.answer, fault)
        else:
            await self._play_body(whole(said, turn.answer), turn.answer, fault)

    async def _play_stream(self, streamed: Streamed, answer: Answer, fault: Fault | None) -> None:
        placed = fault if fault and fault.kind in PLACED_KINDS else None
        position = streamed.position(placed.place) if placed else -1
        await self.send(head(200, EVENT_STREAM, CHUNKED, answer.headers))
        for index, event in enumerate(streamed.events):
            if answer.comments:
                await self.send(chunk(COMMENT))
            if placed and index == position:
                strike = strike_in_stream(placed, event)
                await self._strike(strike, placed, chunk(COMMENT))
                if strike.then == "skip":
                    continue
            await self.send(chunk(event))
            if answer.pace_s:
                await asyncio.sleep(answer.pace_s)
        await self.send(LAST_CHUNK)

    async def _play_body(self, body: bytes, answer: Answer, fault: Fault | None) -> None:
        if fault and fault.kind in PLACED_KINDS:
            await self._strike(strike_in_body(fault, body, answer.headers), fault)
            await self.send(body[cut_of(body, fault.place) :])
        else:
            await self.send(plain(200, JSON, body, answer.headers))

    async def _strike(self, strike: Strike, fault: Fault, comment: bytes = b"") -> None:
        """Returns if the answer goes on, else raises Over (or hangs until the client leaves)."""
        await self.send(strike.data)
        match strike.then:
            case "skip":
                return
            case "wait":
                await self._silence(fault.seconds, fault.comment_s, comment)
                return
            case "hang":
                await self._silence(float("inf"), fault.comment_s, comment)
            case "reset":
                self.reset()
        raise Over(keep=strike.then == "keep")

    async def _silence(self, seconds: float, comment_s: float | None, comment: bytes) -> None:
        every_s = comment_s if comment_s and comment else float("inf")
        until = asyncio.get_running_loop().time() + seconds
        while (left := until - asyncio.get_running_loop().time()) > 0:
            await _sleep(min(left, every_s))
            if left > every_s:
                await self.send(comment)


async def _sleep(seconds: float) -> None:
    """Sleep; infinity is until cancelled."""
    if seconds == float("inf"):
        await asyncio.get_running_loop().create_future()
    await asyncio.sleep(seconds)


# --- the server -----------------------------------------------------------------------------------------------------


class SimulatedServer:
    """A chat-completions server on an ephemeral loopback port that plays a script.

    ``model_suffix`` ends the model's name in every answer. ``on_change`` is called whenever a request has arrived, or
    ``open_connections``, ``answering`` or ``refusing`` (true while the port is closed) has changed.
    """

    def __init__(
        self,
        script: Script,
        *,
        model_suffix: str = "-simulated",
        models: tuple[str, ...] = ("simulated",),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.requests = 0
        self.answering = 0
        self.refusing = True
        self.base_url = ""
        self._script = script
        self._suffix = model_suffix
        self._models = models
        self._on_change = on_change
        self._connections: set[Connection] = set()
        self._joining: set[asyncio.Task[Any]] = set()
        self._port = 0
        self._reopening: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        state = "refusing" if self.refusing else "listening"
        return f"<SimulatedServer {self.base_url} {state}, {self.requests} requests, {self.answering} answering>"

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    async def start(self) -> str:
        """Open the port (unless the script begins by refusing) and return the base URL, which ends in ``/v1``."""
        self._socket = self._bind()
        self.base_url = f"http://127.0.0.1:{self._port}/v1"
        self._listen()
        self._follow_script()
        return self.base_url

    async def close(self) -> None:
        """Close the port and every connection, and wait until nothing of it runs."""
        if self._reopening:
            self._reopening.cancel()
        self._stop_listening()
        await asyncio.gather(*self._joining)
        tasks = [connection.task for connection in self._connections]
        lost = [connection.lost for connection in self._connections]
        for connection in self._connections:
            connection.task.cancel()
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*lost)

    def _bind(self) -> socket.socket:
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", self._port))
        self._port = bound.getsockname()[1]
        return bound

    def _listen(self) -> None:
        self._socket.listen(BACKLOG)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)
        self.refusing = False

    def _stop_listening(self) -> None:
        if not self.refusing:
            asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self.refusing = True

    def _accept(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            accepted.close()
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(lambda: Connection(self), accepted))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    # refusing

    def _follow_script(self) -> None:
        """Close the port if the next turn is to refuse, and open it again when that is over."""
        turn = self._script.upcoming()
        if turn is None or turn.fault is None or turn.fault.kind != "refuse":
            return
        self._stop_listening()
        self._socket = self._bind()  # a listening socket cannot be made to refuse; one that is only bound does
        for connection in self._connections:
            if not connection.answering:
                connection.close()
        if turn.fault.seconds:
            self._reopening = asyncio.get_running_loop().call_later(turn.fault.seconds, self._reopen)

    def _reopen(self) -> None:
        self._script.skip()
        self._listen()
        self._follow_script()
        self._on_change()

    # answering

    async def answer(self, connection: Connection, method: str, path: str, headers: dict[str, str], raw: bytes) -> None:
        if method == "POST" and path.endswith("/chat/completions"):
            await self._answer_chat(connection, path, headers, raw)
        elif method == "GET" and "/models" in path:
            await connection.send(self._answer_models(path))
        else:
            await connection.send(plain(404, JSON, error_body(404)))

    async def _answer_chat(self, connection: Connection, path: str, headers: dict[str, str], raw: bytes) -> None:
        try:
            chat = msgspec.json.decode(raw, type=Chat)
        except msgspec.MsgspecError:
            await connection.send(plain(400, JSON, error_body(400)))
            return
        if self.refusing:  # it slipped in while the port was closing
            connection.reset()
            raise Over(keep=False)
        self.requests += 1
        self.answering += 1
        request = Received(self.requests, path, headers, raw, chat)
        try:
            turn = self._next_turn(request)
            self._on_change()
            await connection.play(turn, request, self._suffix)
        finally:
            self.answering -= 1
            self._on_change()

    def _next_turn(self, request: Received) -> Turn:
        turn = self._script.play(request)
        if turn.fault and turn.fault.kind == "refuse":
            raise ValueError("a function of the request cannot refuse it: it has come already")
        self._follow_script()
        if not self.refusing:
            return turn
        headers = (*turn.answer.headers, ("connection", "close"))
        return msgspec.structs.replace(turn, answer=msgspec.structs.replace(turn.answer, headers=headers))

    def _answer_models(self, path: str) -> bytes:
        name = path.partition("/models")[2].removeprefix("/")
        if name and name not in self._models:
            return plain(404, JSON, error_body(404))
        cards = [self._card(model) for model in self._models]
        return plain(200, JSON, orjson.dumps(self._card(name) if name else {"object": "list", "data": cards}))

    def _card(self, model: str) -> dict[str, Any]:
        return {
            "id": model,
            "object": "model",
            "created": 0,
            "owned_by": "routerd",
            "context_length": 131072,
            "max_completion_tokens": 32768,
        }

    def joined(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._on_change()

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._on_change()
