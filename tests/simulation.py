"""Thousands of agent tasks in virtual time: how many come through, and at what cost, with routerd and without.

Theory of operation
-------------------
What runs here is the product: ``Exchange``, ``Attempt``, ``Pool`` and all that they call, with the policies, the
dialect and the ledgers behind them. Only the two sockets are replaced (an upstream's reply and the client's response
are kept in memory), and the clock: the loop's time jumps to the next timer when nothing is left to do, and
``time.monotonic`` and ``time.time`` say the same. So an hour of an agent's work takes a fraction of a second, and the
same seed makes the same hour again.

*Upstreams* fail like real ones, at the rates in ``RATES``: one request in twenty has some fault, each is out of order
now and then for minutes, and now and then the whole box has no network. Each has a wording of its own for the same
answer, and like a model it goes on with another one's text when it is asked to; some repeat part of it.

*Agents* work through tasks of ``TURNS`` turns. Each behaves like Hermes 0.19.0 in chat mode, as measured: what it
retries, how often and after how long, what it dies of, and that it patches a text that broke off together by itself.

*Ways* an agent may reach a model: ``direct`` (one provider, no router), ``first byte`` (a router that moves on to the
next provider until the first byte, and no further; it is our own with the recovery taken out), ``live`` and ``whole``
(routerd). ``python -m tests.simulation`` prints the table.

What it does not show: anything a model might do worse when it is asked to go on; and of course the rates are guesses.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import io
import math
import random
import selectors
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import msgspec
import orjson

from routerd.canonical import COMPLETE, Finish, Frame, TextDelta, ToolDelta, ToolStart, UpstreamProtocolError
from routerd.config import load
from routerd.dialects import DIALECTS, Stamp
from routerd.policy.transcript import Gate
from routerd.proxy.attempt import Attempt
from routerd.proxy.client import ConnectFailed, ConnectionTorn
from routerd.proxy.downstream import Downstream
from routerd.proxy.exchange import Arrival, Exchange
from routerd.proxy.pool import Pool
from routerd.state import open_store
from routerd.telemetry import Telemetry

TURNS = 50
AGENTS = 4  # at work side by side
WALL_S = 1_800_000_000.0  # when it begins
MOMENT_S = 1e-6  # a turn of the loop: time never stands still
THINKING_S = 4.0  # an agent's own work between two turns: its tools
PATIENCE_S = 900.0  # of Hermes with a silent stream on this machine
REMOTE_PATIENCE_S = 180.0  # and elsewhere
TOOL = {
    "type": "function",
    "function": {
        "name": "terminal",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
CHAT = DIALECTS["chat"]

# Of a hundred thousand requests so many have this fault, outside of outages.
RATES: dict[str, int] = {
    "429": 1000,
    "500": 300,
    "503": 700,
    "529": 100,
    "400": 20,
    "402": 20,
    "refuse": 200,
    "hang": 300,
    "hang after headers": 100,
    "html": 50,
    "json body": 50,
    "empty": 300,
    "reset before content": 100,
    "error before content": 200,
    "stall": 300,
    "pause": 300,
    "reset": 400,
    "eof": 400,
    "error": 300,
    "malformed": 100,
    "bad arguments": 400,
    "cut arguments": 200,
    "no finish": 300,
}
OUTAGES: tuple[tuple[str, int], ...] = (("503", 4), ("hang", 2), ("refuse", 2), ("429", 2), ("stall", 1), ("error", 1))
UPTIME_S, OUTAGE_S = 6 * 3600.0, 8 * 60.0  # mean times, exponentially distributed
NETWORK_UPTIME_S, NETWORK_OUTAGE_S = 24 * 3600.0, 45.0  # of the box itself

# --- virtual time ---------------------------------------------------------------------------------------------------


class _Jump(selectors.DefaultSelector):
    """Nothing is ever ready: waiting is over at once, and takes the time that was asked for, or a moment."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits for something that will never happen")
        self.now += max(timeout, MOMENT_S)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop without sockets whose time passes only while everybody waits."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


@contextmanager
def virtual_time(loop: VirtualLoop) -> Iterator[None]:
    """The clocks of the standard library tell the loop's time."""
    kept = time.monotonic, time.time
    time.monotonic, time.time = loop.time, lambda: WALL_S + loop.time()
    try:
        yield
    finally:
        time.monotonic, time.time = kept


# --- what is said ---------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """An answer: its text, and the arguments of its calls."""

    text: str
    calls: tuple[str, ...]


class Turn(NamedTuple):
    """One turn of one task. What each upstream answers to it depends on nothing else."""

    task: int
    number: int

    @property
    def body(self) -> bytes:
        question = {"role": "user", "content": f"{self.task} {self.number}"}
        return orjson.dumps({"model": "auto", "stream": True, "messages": [question], "tools": [TOOL]})

    def answer(self, upstream: int) -> Said:
        """Every upstream has a wording of its own; one turn in fifty it would rather talk than act."""
        draw = random.Random(f"{self.task} {self.number} {upstream}")
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(4, 16)))
        opening = OPENINGS[upstream % len(OPENINGS)]
        text = f"{opening} step {self.number} of task {self.task}. It needs {words}."
        shared = random.Random(f"{self.task} {self.number}")
        count = 0 if self.number == TURNS - 1 or draw.random() < 0.02 else shared.choice((0, 1, 1, 1, 1, 2))
        calls = tuple(
            orjson.dumps({"command": f"echo {shared.choice(WORDS)} {place}"}).decode() for place in range(count)
        )
        return Said("" if calls and shared.random() < 0.3 else text, calls)


OPENINGS = ("I take up", "Now for", "Let me look at", "On to")
WORDS = (
    *("care", "time", "patience", "[brackets]", "a-list;", "some|pipes", "\n\nlines", "{curly}", "the", "files", "a"),
    *("look", "another", "word", "numbers", "12345", "to", "be", "done", "again", "and", "until", "it", "works"),
)


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + orjson.dumps({"id": "chatcmpl-1", "model": "model", "choices": [choice]}) + b"\n\n"


DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"The model failed.","code":502}}\n\n'
PING = b": ping\n\n"
HTML = b"<!DOCTYPE html><html><body>Please sign in.</body></html>"
HEADERS = {"content-type": "text/event-stream"}


class Piece(NamedTuple):
    """Bytes that come after some time; ``end``: the body ends with them, cleanly or not."""

    after_s: float
    data: bytes
    end: Literal["", "clean", "torn"] = ""


def streamed(said: Said, draw: random.Random) -> list[Piece]:
    """A healthy stream, in reads of one to three events."""
    events = [chunk({"role": "assistant", "content": ""})]
    at = 0
    while at < len(said.text):
        size = draw.randrange(3, 25)
        events.append(chunk({"content": said.text[at : at + size]}))
        at += size
    for index, arguments in enumerate(said.calls):
        function = {"name": "terminal", "arguments": ""}
        events.append(
            chunk({"tool_calls": [{"index": index, "id": f"call_{draw.getrandbits(40):x}", "function": function}]})
        )
        half = len(arguments) // 2
        events += [
            chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
            for part in (arguments[:half], arguments[half:])
        ]
    events += [chunk({}, "tool_calls" if said.calls else "stop"), DONE]
    pieces = []
    while events:
        count = draw.choice((1, 1, 1, 2, 3))
        pieces.append(Piece(draw.expovariate(5.0), b"".join(events[:count])))
        events = events[count:]
    first = draw.lognormvariate(0.3, 0.5)
    return [Piece(first, b""), *pieces, Piece(0.0, b"", "clean")]


# --- upstreams ------------------------------------------------------------------------------------------------------


class Outages:
    """When something is out of order, and how."""

    def __init__(self, draw: random.Random, uptime_s: float, outage_s: float, kinds: Sequence[tuple[str, int]]) -> None:
        self._draw, self._uptime_s, self._outage_s, self._kinds = draw, uptime_s, outage_s, kinds
        self._begins: list[float] = []
        self._outages: list[tuple[float, str]] = []  # end, kind
        self._known_s = 0.0

    def at(self, now: float) -> str:
        """The kind of outage there is; empty if there is none."""
        while self._known_s <= now:
            begin = self._known_s + self._draw.expovariate(1 / self._uptime_s)
            end = begin + self._draw.expovariate(1 / self._outage_s)
            names, weights = zip(*self._kinds, strict=True)
            self._begins.append(begin)
            self._outages.append((end, self._draw.choices(names, weights)[0]))
            self._known_s = end
        place = bisect.bisect_right(self._begins, now) - 1
        return self._outages[place][1] if place >= 0 and now < self._outages[place][0] else ""


class Reply:
    """An upstream's answer in memory, behind the three calls that a real one has."""

    def __init__(self, status: int, pieces: Sequence[Piece], headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.headers = HEADERS if headers is None else headers
        self.ended = False
        self._pieces = iter(pieces)

    async def read(self) -> bytes:
        for piece in self._pieces:
            if piece.after_s:
                await asyncio.sleep(piece.after_s)
            if piece.end == "torn":
                raise ConnectionTorn(before_headers=False)
            if piece.end == "clean":
                break
            if piece.data:
                return piece.data
        self.ended = True
        return b""

    async def read_all(self, limit_bytes: int) -> bytes:
        parts = []
        while data := await self.read():
            parts.append(data)
        return b"".join(parts)[:limit_bytes]

    async def release(self, grace_s: float) -> None:
        self.ended = True

    def abort(self) -> None:
        self._pieces = iter(())


FOREVER = Piece(1e9, b"")


class Upstream:
    """A vendor's server with its habits and its bad days."""

    def __init__(self, index: int, seed: str, network: Outages, harshness: int) -> None:
        self.index = index
        self.requests = 0
        self._draw = random.Random(f"{seed} {index}")
        self._outages = Outages(random.Random(f"{seed} outages {index}"), UPTIME_S, OUTAGE_S, OUTAGES)
        self._network = network
        self._faults = list(RATES)
        self._limits = []
        total = 0
        for rate in RATES.values():
            total += rate * harshness
            self._limits.append(total)

    def up(self, now: float) -> bool:
        return not self._network.at(now) and not self._outages.at(now)

    async def post(self, _target: Any, body: bytes) -> Reply:
        self.requests += 1
        now = time.monotonic()
        if self._network.at(now):
            await asyncio.sleep(self._draw.choice((0.01, 10.0)))
            raise ConnectFailed("no route to host")
        fault = self._outages.at(now) or self._fault()
        return await self._answer(fault, _read(body))

    def _fault(self) -> str:
        place = bisect.bisect_right(self._limits, self._draw.randrange(100_000))
        return self._faults[place] if place < len(self._faults) else ""

    async def _answer(self, fault: str, asked: Asked) -> Reply:
        if fault == "refuse":
            await asyncio.sleep(0.05)
            raise ConnectFailed("refused")
        await asyncio.sleep(0.1)
        if fault.isdigit():
            return self._refusal(fault)
        if fault == "hang":
            await asyncio.sleep(1e9)
        if fault == "html":
            return Reply(200, [Piece(0.0, HTML), Piece(0.0, b"", "clean")])
        if fault == "json body":
            return Reply(
                200, [Piece(0.5, b'{"id": "1", "object": "chat.completion", "choices": []}'), Piece(0.0, b"", "clean")]
            )
        said = self._said(asked)
        spoiled = _SPOILS[fault](said) if fault in _SPOILS else said
        pieces = streamed(spoiled, self._draw)
        return Reply(200, _STRIKES[fault](pieces, self._draw) if fault in _STRIKES else pieces)

    def _refusal(self, status: str) -> Reply:
        body = orjson.dumps({"error": {"message": "No.", "code": int(status)}})
        headers = {"retry-after": str(self._draw.choice((1, 2, 5, 20)))} if status == "429" else {}
        return Reply(int(status), [Piece(0.0, body), Piece(0.0, b"", "clean")], headers)

    def _said(self, asked: Asked) -> Said:
        """Its own answer, or the rest of the one it is shown: exactly, or with some of it repeated."""
        own = asked.turn.answer(self.index)
        if asked.shown is None:
            return own
        others = [asked.turn.answer(index) for index in range(len(OPENINGS))]
        begun = next((said for said in (own, *others) if said.text.startswith(asked.shown)), Said("", own.calls))
        rest = begun.text[len(asked.shown) :]
        if asked.prefilled:
            return Said(asked.shown + rest if self._draw.random() < 0.1 else rest, begun.calls)
        if not rest and not begun.calls:
            return Said(COMPLETE, ())
        habit = self._draw.random()
        if habit < 0.15:
            rest = asked.shown[-self._draw.randrange(20, 60) :] + rest
        elif habit < 0.25:
            rest = asked.shown + rest
        elif habit < 0.3:
            rest += COMPLETE
        return Said(rest, begun.calls)


class Asked(NamedTuple):
    """What an upstream understands of a request. ``shown``: the text it is to go on with."""

    turn: Turn
    shown: str | None
    prefilled: bool


class _Message(msgspec.Struct):
    role: str
    content: str


class _Body(msgspec.Struct):
    messages: list[_Message]


_decode_body = msgspec.json.Decoder(_Body).decode


def _read(body: bytes) -> Asked:
    messages = _decode_body(body).messages
    task, number = messages[0].content.split()
    turns = [message.content for message in messages if message.role == "assistant"]
    return Asked(Turn(int(task), int(number)), turns[-1] if turns else None, messages[-1].role == "assistant")


def _bad_arguments(said: Said) -> Said:
    return said._replace(calls=tuple(arguments[:-1] + ' "extra"}' for arguments in said.calls))


def _cut_arguments(said: Said) -> Said:
    return said._replace(calls=tuple(arguments[: len(arguments) // 2] for arguments in said.calls))


_SPOILS: dict[str, Callable[[Said], Said]] = {
    "bad arguments": _bad_arguments,
    "cut arguments": _cut_arguments,
    "empty": lambda said: Said("", ()),
}


Strike = Callable[[list[Piece], random.Random], list[Piece]]


def _first(*following: Piece) -> Strike:
    """Before the first content."""
    return lambda pieces, draw: [Piece(pieces[0].after_s, b""), *following]


def _anywhere(*following: Piece) -> Strike:
    """Behind any of the reads, the last but the end included."""
    return lambda pieces, draw: [*pieces[: draw.randrange(1, len(pieces) - 1)], *following]


def _pause(pieces: list[Piece], draw: random.Random) -> list[Piece]:
    at = draw.randrange(1, len(pieces) - 1)
    return [*pieces[:at], Piece(20.0, PING), *pieces[at:]]


def _no_finish(pieces: list[Piece], draw: random.Random) -> list[Piece]:
    """The last that some vendors say is the text."""
    data = b"".join(piece.data for piece in pieces)
    kept = data[: data.rindex(b"data: ", 0, len(data) - len(DONE))]
    return [pieces[0], Piece(1.0, kept), Piece(0.0, b"", "clean")]


TORN, CLEAN = Piece(0.1, b"", "torn"), Piece(0.1, b"", "clean")
_STRIKES: dict[str, Strike] = {
    "hang after headers": _first(FOREVER),
    "reset before content": _first(TORN),
    "error before content": _first(Piece(0.1, ERROR), CLEAN),
    "stall": _anywhere(FOREVER),
    "pause": _pause,
    "reset": _anywhere(TORN),
    "eof": _anywhere(CLEAN),
    "error": _anywhere(Piece(0.1, ERROR), CLEAN),
    "malformed": _anywhere(Piece(0.1, b'data: {"id":"chatcm\n\n'), CLEAN),
    "no finish": _no_finish,
}

# --- the client's end -----------------------------------------------------------------------------------------------


class Heard(NamedTuple):
    """What came back from one request. ``status`` 0: no connection. ``whole``: a proper end."""

    status: int
    data: bytes
    whole: bool
    retry_after_s: float | None = None


class Read(NamedTuple):
    """What an agent makes of it."""

    text: str
    calls: tuple[str, ...]
    finish: str
    begun_calls: bool


def read(heard: Heard) -> Read:
    """Decode as much as can be decoded; a chunk after a broken line is lost, as it is to an SDK."""
    decoder, frames = CHAT.decoder(), list[Frame]()
    try:
        for block in heard.data.split(b"\n\n"):
            frames += decoder.feed(block + b"\n\n")
    except UpstreamProtocolError:
        pass
    texts, finish = list[str](), ""
    arguments: dict[int, str] = {}
    for frame in frames:
        for event in frame.events:
            if isinstance(event, TextDelta):
                texts.append(event.text)
            elif isinstance(event, ToolStart):
                arguments[event.index] = ""
            elif isinstance(event, ToolDelta):
                arguments[event.index] += event.arguments
            elif isinstance(event, Finish):
                finish = event.reason
    return Read("".join(texts), tuple(arguments.values()), finish, bool(arguments))


class _Response:
    """What the downstream takes for aiohttp's response."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.whole = False

    async def write(self, data: bytes) -> None:
        self.parts.append(data)

    async def write_eof(self) -> None:
        self.whole = True


class MemoryDownstream(Downstream):
    """A client in memory."""

    __slots__ = ("memory",)

    def __init__(self, arrival: Arrival) -> None:
        head = arrival.head
        stamp = Stamp(arrival.id, head.model, int(time.time()), head.include_usage)
        super().__init__(arrival.request, CHAT, stamp, keepalive_s=arrival.route.keepalive_s, clock=time.monotonic)
        self.memory = _Response()

    async def _open(self) -> Any:
        self._response = self.memory  # type: ignore[assignment]
        self.status = 200
        return self.memory

    async def send_body(self, body: bytes, *, status: int = 200) -> None:
        self.stop_keepalive()
        self.status = status
        self.memory.parts.append(body)
        self.memory.whole = True

    @property
    def heard(self) -> Heard:
        retry_after = self._headers.get("Retry-After")
        return Heard(
            self.status,
            b"".join(self.memory.parts),
            self.memory.whole,
            None if retry_after is None else float(retry_after),
        )


# --- ways to a model ------------------------------------------------------------------------------------------------


class _OpenGate(Gate):
    """Lets everything pass from the first content on, and looks at nothing."""

    def on_tool_start(self, event: ToolStart) -> None:
        super().on_tool_start(event)
        self._open = True

    def on_finish(self, event: Finish) -> None:
        self.finished = event
        self.progress = self._open = True


class FirstByteExchange(Exchange):
    """A router as most are: it moves on until the first byte, and no further."""

    def _attempt(self, ticket: Any) -> Attempt:
        attempt = super()._attempt(ticket)
        attempt.gate = _OpenGate(whole=False)
        _OpenGate.__init__(attempt.gate, whole=False)
        return attempt

    async def _recover(self, attempt: Attempt, failure: Any) -> bool:
        if self.downstream.transcript.begun:
            await self._fail(self._last_word(failure))
            return True
        return await super()._recover(attempt, failure)


class World:
    """Upstreams, and a pool over them."""

    def __init__(self, seed: str, folder: Path, delivery: str, harshness: int) -> None:
        network = Outages(random.Random(f"{seed} network"), NETWORK_UPTIME_S, NETWORK_OUTAGE_S, (("down", 1),))
        self.upstreams = [Upstream(index, seed, network, harshness) for index in range(3)]
        names = ("a", "ollama", "c")  # the second is one that goes on writing a trailing turn
        models = '[providers.%s.models]\n"model" = { context = 131072, input = 1, output = 2 }\n'
        providers = "".join(
            f'[providers.{name}]\nbase_url = "http://{name}.invalid/v1"\ndialect = "chat"\napi_key = "k"\n'
            + models % name
            for name in names
        )
        tiers = ", ".join(f'"{name}/model"' for name in names)
        path = folder / "routerd.toml"
        path.write_text(
            f'[state]\nurl = "memory:"\n[routes.auto]\nmodels = [{tiers}]\ndelivery = "{delivery}"\n{providers}'
            '[[providers.c.limits]]\nrequests = 30\nper = "minute"\n'
        )
        config = load(path, {})
        self.telemetry = Telemetry(_Nowhere())
        self.pool = Pool(config, open_store("memory:", folder), self.telemetry, clock=time.monotonic)
        for upstream, live in self.pool._live.items():
            live.client = self.upstreams[names.index(upstream.provider)]  # type: ignore[assignment]
        self._count = 0

    def could_serve(self, begin: float, end: float) -> bool:
        """True if somebody was up at some time between."""
        steps = [begin + (end - begin) * step / 20 for step in range(21)]
        return any(upstream.up(now) for upstream in self.upstreams for now in steps)

    def routed(self, kind: type[Exchange]) -> Send:
        """Through an exchange of this kind."""

        async def send(turn: Turn) -> Heard:
            head = CHAT.read_head(turn.body)
            route = self.pool.route(head.model)
            assert route is not None
            self._count += 1
            request: Any = SimpleNamespace(transport=_Transport(), headers={})
            arrival = Arrival(request, CHAT, turn.body, head, route, f"sim-{self._count}", time.monotonic())
            exchange = kind(arrival, self.pool, self.telemetry)
            downstream = exchange.downstream = MemoryDownstream(arrival)
            await exchange.run()
            return downstream.heard

        return send

    async def direct(self, turn: Turn) -> Heard:
        """To the first upstream, and nowhere else."""
        parts: list[bytes] = []
        status = 0
        try:
            async with asyncio.timeout(REMOTE_PATIENCE_S) as patience:
                reply = await self.upstreams[0].post(None, turn.body)
                status, headers = reply.status, reply.headers
                while data := await reply.read():
                    parts.append(data)
                    patience.reschedule(asyncio.get_running_loop().time() + REMOTE_PATIENCE_S)
        except (ConnectFailed, ConnectionTorn, TimeoutError):
            return Heard(status, b"".join(parts), whole=False)
        return Heard(status, b"".join(parts), True, float(headers.get("retry-after", 0)) or None)


class _Nowhere(io.RawIOBase):
    def write(self, _data: Any) -> int:
        return 0


class _Transport:
    def close(self) -> None: ...

    def abort(self) -> None: ...


Send = Callable[[Turn], Awaitable[Heard]]

# --- agents ---------------------------------------------------------------------------------------------------------

DEADLY = frozenset({400, 401, 402, 403, 404, 413})
BACKOFF_S = (2.5, 5.0)
QUICK_RETRIES, QUICK_S = 2, 0.2
CONTINUATIONS = 4
BAD_CALLS = 4
WAITS = 2
RETRY_AFTER_MAX_S = 600.0


class Habits:
    """What Hermes does about a request that went wrong, and how often. ``continued``: texts it had to patch."""

    def __init__(self) -> None:
        self.continued = 0
        self._quick = QUICK_RETRIES
        self._outer = self._waits = self._bad_calls = 0

    def after(self, heard: Heard, got: Read | None) -> float | None:
        """Seconds until it asks again; None: it gives up."""
        if heard.status in DEADLY:
            return None
        if got is not None and got.begun_calls:
            self._bad_calls += 1
            return 0.0 if self._bad_calls < BAD_CALLS else None
        if got is not None and got.text:
            self.continued += 1
            return 0.0 if self.continued <= CONTINUATIONS else None
        if got is not None and self._quick:
            self._quick -= 1
            return QUICK_S
        self._quick = QUICK_RETRIES
        if heard.status == 429 and heard.retry_after_s:
            self._waits += 1
            return min(heard.retry_after_s, RETRY_AFTER_MAX_S) if self._waits <= WAITS else None
        self._outer += 1
        return BACKOFF_S[self._outer - 1] if self._outer <= len(BACKOFF_S) else None


class Tally(msgspec.Struct):
    """What became of tasks and turns."""

    way: str
    tasks: int = 0
    finished: int = 0
    turns: int = 0
    delivered: int = 0  # whole, at the first request
    servable: int = 0  # delivered, or somebody could have
    patched: int = 0  # finished, but the agent had to patch a broken text together by itself
    corrupted: int = 0  # taken for whole, and not what any upstream says
    requests: int = 0  # at upstreams
    seconds: list[float] = msgspec.field(default_factory=list)  # of each turn
    wrong: list[str] = msgspec.field(default_factory=list)

    def row(self) -> str:
        ordered = sorted(self.seconds) or [math.nan]

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return (
            f"{self.way:<11} {self.finished / self.tasks:8.2%} {self.delivered / self.turns:10.4%} "
            f"{self.delivered / max(1, self.servable):10.4%} {self.patched:8d} {self.corrupted:10d} "
            f"{self.requests / self.turns:9.3f} {at(0.5):6.1f} {at(0.99):7.1f} {at(0.999):8.1f} {ordered[-1]:8.1f}"
        )


HEADINGS = (
    f"{'way':<11} {'finished':>8} {'delivered':>10} {'of servable':>11} {'patched':>7} {'corrupted':>10} "
    f"{'req/turn':>9} {'p50 s':>6} {'p99 s':>7} {'p99.9 s':>8} {'max s':>8}"
)


class Agent:
    """One Hermes at one task after the other."""

    def __init__(self, world: World, send: Send, tally: Tally, *, patience_s: float) -> None:
        self._world, self._send, self._tally, self._patience_s = world, send, tally, patience_s

    async def work(self, tasks: Sequence[int]) -> None:
        for task in tasks:
            self._tally.tasks += 1
            finished = await self._do(task)
            self._tally.finished += finished

    async def _do(self, task: int) -> bool:
        for number in range(TURNS):
            if not await self._turn(Turn(task, number)):
                return False
            await asyncio.sleep(THINKING_S)
        return True

    async def _turn(self, turn: Turn) -> bool:
        """One turn with all the retries that Hermes makes; False if the task died of it."""
        tally, began = self._tally, time.monotonic()
        tally.turns += 1
        habits, first = Habits(), True
        while True:
            heard = await self._ask(turn)
            got = read(heard) if heard.status == 200 else None
            whole = self._is_whole(heard, got)
            if first:
                self._note_first(began, heard, delivered=whole)
            if whole and got is not None:
                tally.patched += habits.continued > 0
                if not habits.continued:
                    self._check(turn, got)
                tally.seconds.append(time.monotonic() - began)
                return True
            pause_s = habits.after(heard, got)
            if pause_s is None:
                return False
            first = False
            await asyncio.sleep(pause_s)

    async def _ask(self, turn: Turn) -> Heard:
        try:
            async with asyncio.timeout(self._patience_s * 4):
                return await self._send(turn)
        except TimeoutError:
            return Heard(0, b"", whole=False)

    def _is_whole(self, heard: Heard, got: Read | None) -> bool:
        if got is None or not got.finish or got.finish == "error" or not (got.text or got.calls):
            return False
        return all(_is_json(arguments) for arguments in got.calls)

    def _note_first(self, began: float, heard: Heard, *, delivered: bool) -> None:
        tally = self._tally
        tally.delivered += delivered
        able = delivered or self._world.could_serve(began, time.monotonic())
        tally.servable += able
        if able and not delivered:
            tally.wrong.append(f"lost at {began:.0f} s: {heard.status} {heard.data[-300:]!r}")

    def _check(self, turn: Turn, got: Read) -> None:
        """Is it what an upstream says? The text is one's own from beginning to end, and the calls are all there."""
        answers = [turn.answer(upstream.index) for upstream in self._world.upstreams]
        called = {said.calls for said in answers}
        # A call without a preamble may follow another's text that broke off in front of its own.
        texts = {said.text for said in answers}
        if got.text not in texts or got.calls not in called or (got.finish == "tool_calls") != bool(got.calls):
            self._tally.corrupted += 1
            self._tally.wrong.append(f"{turn}: {got}")


def _is_json(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


# --- runs -----------------------------------------------------------------------------------------------------------

WAYS = ("direct", "first byte", "live", "whole")


def simulate(way: str, tasks: int, seed: int, harshness: int = 1) -> Tally:
    """So many tasks on this way. The same seed makes the same faults; ``harshness`` multiplies their rates."""
    loop = VirtualLoop()
    tally = Tally(way)
    with virtual_time(loop), TemporaryDirectory() as folder:
        random.seed(seed)
        try:
            world = World(f"seed {seed}", Path(folder), "whole" if way == "whole" else "live", harshness)
            loop.run_until_complete(_simulate(way, tasks, world, tally))
        finally:
            loop.close()
    return tally


async def _simulate(way: str, tasks: int, world: World, tally: Tally) -> None:
    kind = FirstByteExchange if way == "first byte" else Exchange
    send = world.direct if way == "direct" else world.routed(kind)
    patience_s = REMOTE_PATIENCE_S if way == "direct" else PATIENCE_S
    agents = [Agent(world, send, tally, patience_s=patience_s) for _ in range(AGENTS)]
    await asyncio.gather(*(agent.work(range(place, tasks, AGENTS)) for place, agent in enumerate(agents)))
    tally.requests = sum(upstream.requests for upstream in world.upstreams)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--harshness", type=int, default=1, help="multiplies the rates of all faults")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    given = parser.parse_args(arguments)
    print(f"{given.tasks} tasks of {TURNS} turns, {AGENTS} at a time, seed {given.seed}")
    print(HEADINGS)
    broken = False
    for way in given.ways:
        began = time.perf_counter()
        tally = simulate(way, given.tasks, given.seed, given.harshness)
        print(f"{tally.row()}   ({time.perf_counter() - began:.0f} s)", flush=True)
        if way in ("live", "whole"):
            broken |= bool(laws_broken(tally))
            for sentence in (laws_broken(tally) + tally.wrong)[:20]:
                print(f"  {sentence}")
    return int(broken)


DELIVERED_MIN = 0.9995


def laws_broken(tally: Tally) -> list[str]:
    """The laws of routerd that did not hold, in words."""
    broken = []
    if tally.corrupted:
        broken.append(f"{tally.corrupted} turns were corrupted")
    if tally.patched:
        broken.append(f"{tally.patched} texts broke off")
    if tally.delivered < DELIVERED_MIN * tally.servable:
        broken.append(f"{tally.servable - tally.delivered} of {tally.servable} turns were lost")
    return broken


if __name__ == "__main__":
    sys.exit(main())
