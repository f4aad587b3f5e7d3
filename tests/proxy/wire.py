"""Both ends of the wire, bare: a client that notes how an answer came, and an upstream that says fixed bytes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, ClassVar, Self

import aiohttp
import msgspec

from tests.rig import HELLO

CHAT = "/v1/chat/completions"
WAIT_S = 10.0
DONE = b"data: [DONE]\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


# --- the client's end -----------------------------------------------------------------------------------------------


class Heard(msgspec.Struct):
    """An answer as it came. ``reads``: when (seconds since the request) and what; ``torn``: HTTP never said the end."""

    status: int
    headers: Mapping[str, str]
    reads: list[tuple[float, bytes]]
    torn: bool

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.reads)

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The stream's JSON events; keep-alives are among them, ``[DONE]`` is not."""
        return chunks(self.data)

    @property
    def deltas(self) -> list[dict[str, Any]]:
        """What the events of the stream say; keep-alives say nothing and are left out."""
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        return [choice["delta"] for choice in choices if choice["delta"]]

    @property
    def text(self) -> str:
        return "".join(delta.get("content") or "" for delta in self.deltas)

    @property
    def finishes(self) -> list[str]:
        """Every finish reason given."""
        return [
            choice["finish_reason"] for chunk in self.chunks for choice in chunk["choices"] if choice["finish_reason"]
        ]

    @property
    def keepalives(self) -> list[float]:
        """When the events that say nothing came."""
        return [at for at, data in self.reads for chunk in chunks(data) if is_keepalive(chunk)]

    @property
    def longest_silence_s(self) -> float:
        """The longest time without a byte, from the request to the last byte."""
        times = [0.0, *(at for at, _ in self.reads)]
        return max(after - before for before, after in itertools.pairwise(times))


def chunks(data: bytes) -> list[dict[str, Any]]:
    """The JSON events in a piece of a stream."""
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ") and line != DONE.strip()]
    return [json.loads(line) for line in lines]


def is_keepalive(chunk: Mapping[str, Any]) -> bool:
    """True for a chunk without text, role, call, finish, usage or error."""
    empty = all(not choice["delta"] and choice["finish_reason"] is None for choice in chunk["choices"])
    return empty and not chunk.get("usage") and "error" not in chunk


async def hear(
    url: str, body: Any = HELLO, *, path: str = CHAT, method: str = "POST", headers: Mapping[str, str] | None = None
) -> Heard:
    """Send one request on a connection of its own and note what comes until the answer ends, well or torn."""
    clock = asyncio.get_running_loop().time
    began = clock()
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | dict(headers or {})
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url + path, headers=headers, data=data and io.BytesIO(data)) as reply,
    ):
        heard = Heard(reply.status, dict(reply.headers), [], torn=False)
        try:
            async for data in reply.content.iter_any():
                heard.reads.append((clock() - began, data))
        except aiohttp.ClientPayloadError:
            heard.torn = True
    return heard


class Listener:
    """A client in the middle of an answer: reads as much as it is told to."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self.status = reply.status
        self.data = b""
        self._reply = reply

    async def until(self, condition: Callable[[bytes], bool]) -> bytes:
        """Read until this is true of all that has come; fail if the answer ends before."""
        async with asyncio.timeout(WAIT_S):
            while not condition(self.data):
                data = await self._reply.content.readany()
                assert data, f"ended with {self.data!r}"
                self.data += data
        return self.data

    async def rest(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            self.data += await self._reply.content.read()
        return self.data


@contextlib.asynccontextmanager
async def listening(url: str, body: Any, **options: Any) -> AsyncIterator[Listener]:
    """A request whose answer is read bit by bit; it is hung up on when the context ends."""
    async with aiohttp.ClientSession() as session, session.post(url + CHAT, json=body, **options) as reply:
        yield Listener(reply)
        reply.close()


async def get(url: str, path: str, headers: Mapping[str, str] | None = None) -> Heard:
    return await hear(url, None, path=path, method="GET", headers=headers)


def streamed(**fields: Any) -> dict[str, Any]:
    """The greeting as a streaming request."""
    return HELLO | {"stream": True} | fields


def error_of(heard: Heard) -> dict[str, Any]:
    """The error object of a refusal, in OpenAI's shape and no other."""
    body = heard.json
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


# --- the upstream's end ---------------------------------------------------------------------------------------------

Play = Callable[["Talk"], Awaitable[None]]


class Talk:
    """One request at a ``RawUpstream``, and the way to answer it. ``sent``: bytes the kernel has taken.

    ``path`` and ``headers`` (with lower-case names) are the request's.
    """

    def __init__(self, body: dict[str, Any], writer: asyncio.StreamWriter, head: bytes) -> None:
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        self.path = first.split(" ")[1]
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.body = body
        self.sent = 0
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()
        self.sent += len(data)

    async def stream(self, pieces: Iterable[bytes], *, end: bool = True) -> None:
        """A whole chunked answer (unless not ``end``): each piece is a chunk and, as good as always, a read."""
        await self.send(STREAM_HEAD)
        for piece in pieces:
            await self.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            await asyncio.sleep(0)
        if end:
            await self.send(LAST_CHUNK)


class RawUpstream:
    """An upstream that says, byte for byte, what a test's function writes. One request per connection."""

    dialect: ClassVar[str] = "chat"

    def __init__(self, play: Play) -> None:
        self._play = play
        self._tasks: set[asyncio.Task[None]] = set()
        self.talks: list[Talk] = []
        self.gone = asyncio.Event()  # a connection ended before its answer did
        self.base_url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        writer.transport.set_write_buffer_limits(0)  # drained means: handed to the kernel
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            talk = Talk(json.loads(await reader.readexactly(length)), writer, head)
            self.talks.append(talk)
            await self._play(talk)
        except ConnectionError:
            self.gone.set()
        finally:
            with contextlib.suppress(ConnectionError):
                writer.close()


def event(delta: Mapping[str, Any], finish: str | None = None, **fields: Any) -> bytes:
    """One chunk of a stream, with oddities of a vendor (``fields``) that must survive."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    envelope = {"id": "gen-1", "object": "chat.completion.chunk", "created": 1, "model": "vendor/model"}
    return b"data: " + json.dumps(envelope | {"choices": [choice]} | fields).encode() + b"\n\n"


def call_event(index: int, arguments: str, *, name: str = "", id: str = "") -> bytes:  # noqa: A002 - the wire's word
    """A piece of a tool call; its first one brings name and id."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    piece = {"index": index, "function": function} | ({"id": id, "type": "function"} if id else {})
    return event({"tool_calls": [piece]})
