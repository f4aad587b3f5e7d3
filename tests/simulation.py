"""Thousands of agent tasks in virtual time: how many come through, and at what cost, with routerd and without.

Theory of operation
-------------------
What runs here is the product: ``Exchange``, ``Attempt``, ``Pool`` and all that they call, with the policies, the
dialects and the ledgers behind them. Only the two sockets are replaced (an upstream's reply and the client's response
are kept in memory), and the clock: the loop's time jumps to the next timer when nothing is left to do, and
``time.monotonic`` and ``time.time`` say the same. So an hour of an agent's work takes a fraction of a second, and the
same seed makes the same hour again.

*Upstreams* fail like real ones, at the rates in ``RATES``: one request in fifteen has some fault, at any place of the
answer; each is out of order now and then for minutes, and now and then the whole box has no network. Each has a wording
of its own for the same answer, and like a model it goes on with another one's text when it is asked to; some repeat
part of it. Some speak chat, some Messages, some Responses, so what a client asks in one crosses into the others.

*Agents* work through tasks of ``TURNS`` turns. Each behaves like Hermes 0.19.0, as measured: what it retries, how often
and after how long, what it dies of, and that in chat it patches a text that broke off together by itself, while in the
other dialects it takes a body that ends properly for the whole answer. Each task has a dialect (see ``MIXES``). Most
turns stream; some do not, some cannot, some want a document that must be JSON. A few clients take their answer slowly.

*Ways* an agent may reach a model: ``direct`` (one provider, no router), ``first byte`` (a router that moves on to the
next provider until the first byte, and no further; it is our own with the recovery taken out), ``live`` and ``whole``
(routerd). ``python -m tests.simulation`` prints the table. Tasks are worked off in days of ``DAY_TASKS``; a seed makes
one day, and the next day has the next seed. So a day that breaks a law can be had again by itself.

*Laws*, of ``live`` and ``whole``: next to every turn that anybody could serve comes whole at the first request; what
comes whole is word for word what one of the models says, once; nothing that is not whole ends like something whole;
and no client's library would stumble over it.

What it does not show: anything a model might do worse when it is asked to go on; and of course the rates are guesses.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import io
import itertools
import math
import multiprocessing
import random
import selectors
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import msgspec
import orjson

from routerd.canonical import COMPLETE, Finish, ToolStart
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
from tests.wires import WIRES, Asked, Kind, Read, Said, Wire

TURNS = 50
AGENTS = 4  # at work side by side
DAY_TASKS = 100
WALL_S = 1_800_000_000.0  # when it begins
MOMENT_S = 1e-6  # a turn of the loop: time never stands still
THINKING_S = 4.0  # an agent's own work between two turns: its tools
PATIENCE_S = 900.0  # of Hermes with a silent stream on this machine
REMOTE_PATIENCE_S = 180.0  # and elsewhere
PROMPT_TOKENS, MORE_TOKENS = 8000, 400  # at the first turn of a task, and for each that follows
CHARACTERS_PER_TOKEN = 4

# Of a hundred turns: how the answer is wanted. Whole ones are mostly calls on the side: titles, summaries.
KINDS: tuple[tuple[Kind, int], ...] = (("stream", 80), ("whole", 14), ("unstreamable", 3), ("document", 3))

# Of a hundred thousand requests so many have this fault, outside of outages.
RATES: dict[str, int] = {
    "429": 1000,
    "500": 300,
    "502": 200,
    "503": 700,
    "504": 100,
    "529": 100,
    "400": 20,
    "401": 5,
    "402": 20,
    "403": 5,
    "404": 10,
    "408": 50,
    "413": 5,
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
    "fin": 200,
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


class Answer(NamedTuple):
    """What is said, however it is cut: the text, and the arguments of the calls."""

    text: str
    calls: tuple[str, ...]


class Turn(NamedTuple):
    """One turn of one task. How it is asked, and what each upstream answers, depends on nothing else.

    ``dialect``: the client's, the same through all turns of a task.
    """

    task: int
    number: int
    dialect: str = ""

    @property
    def question(self) -> str:
        return f"{self.task} {self.number}"

    @property
    def kind(self) -> Kind:
        kind: Kind = _drawn(random.Random(f"kind {self.task} {self.number}"), KINDS)
        return kind

    @property
    def prompt_tokens(self) -> int:
        return PROMPT_TOKENS + MORE_TOKENS * self.number

    def answer(self, upstream: int) -> Answer:
        """Every upstream has a wording of its own; one turn in fifty it would rather talk than act."""
        draw = random.Random(f"{self.task} {self.number} {upstream}")
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(4, 16)))
        opening = OPENINGS[upstream % len(OPENINGS)]
        text = f"{opening} step {self.number} of task {self.task}. It needs {words}."
        if self.kind == "document":
            return Answer(orjson.dumps({"plan": text}).decode(), ())
        shared = random.Random(f"{self.task} {self.number}")
        count = 0 if self.number == TURNS - 1 or draw.random() < 0.02 else shared.choice((0, 1, 1, 1, 1, 2))
        calls = tuple(
            orjson.dumps({"command": f"echo {shared.choice(WORDS)} {place}"}).decode() for place in range(count)
        )
        return Answer("" if calls and shared.random() < 0.3 else text, calls)


def _drawn(draw: random.Random, shares: Sequence[tuple[Any, int]]) -> Any:
    names, weights = zip(*shares, strict=True)
    return draw.choices(names, weights)[0]


OPENINGS = ("I take up", "Now for", "Let me look at", "On to", "Here comes")
WORDS = (
    *("care", "time", "patience", "[brackets]", "a-list;", "some|pipes", "\n\nlines", "{curly}", "the", "files", "a"),
    *("look", "another", "word", "numbers", "12345", "to", "be", "done", "again", "and", "until", "it", "works"),
)
HTML = b"<!DOCTYPE html><html><body>Please sign in.</body></html>"
HEADERS = {"content-type": "text/event-stream"}


class Piece(NamedTuple):
    """Bytes that come after some time; ``end``: the body ends with them, cleanly or not. ``place``: in the answer."""

    after_s: float
    data: bytes
    end: Literal["", "clean", "torn"] = ""
    place: str = "opening"


def cut(answer: Answer, draw: random.Random) -> Said:
    """The answer as a model gives it: a few letters at a time."""
    texts, at = [], 0
    while at < len(answer.text):
        size = draw.randrange(3, 25)
        texts.append(answer.text[at : at + size])
        at += size
    return Said(tuple(texts), tuple((f"call_{draw.getrandbits(40):x}", arguments) for arguments in answer.calls))


def streamed(wire: Wire, said: Said, draw: random.Random) -> list[Piece]:
    """A healthy stream, in reads of one to three events."""
    chunks = wire.stream(said)
    pieces = []
    while chunks:
        count = draw.choice((1, 1, 1, 2, 3))
        now, chunks = chunks[:count], chunks[count:]
        pieces.append(Piece(draw.expovariate(5.0), b"".join([chunk.data for chunk in now]), place=now[-1].place))
    return [Piece(draw.lognormvariate(0.3, 0.5), b""), *pieces, Piece(0.0, b"", "clean")]


def at_once(body: bytes, draw: random.Random) -> list[Piece]:
    """A whole answer, which takes its time and then comes in two reads."""
    half = len(body) // 2
    spent_s = draw.lognormvariate(0.3, 0.5) + 2.0
    first, rest = Piece(0.0, body[:half], place="text"), Piece(0.01, body[half:], place="finish")
    return [Piece(spent_s, b""), first, rest, Piece(0.0, b"", "clean")]


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
    """An upstream's answer in memory, behind the three calls that a real one has. Times are those of its making."""

    def __init__(self, status: int, pieces: Sequence[Piece], headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.headers = HEADERS if headers is None else headers
        self.ended = False
        self.last_at = 0.0
        self._pieces = iter(pieces)

    async def read(self) -> bytes:
        for piece in self._pieces:
            if piece.after_s:
                await asyncio.sleep(piece.after_s)
            if piece.end == "torn":
                raise ConnectionTorn(before_headers=False)
            if piece.end == "clean":
                break
            self.last_at = time.monotonic()
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


class Vendor(NamedTuple):
    """One that can be asked. Prices are in USD per million tokens; ``limit``: requests per minute that it allows."""

    name: str
    dialects: tuple[str, ...]
    input: float
    output: float
    limit: int | None = None

    @property
    def tables(self) -> str:
        """Its part of the config."""
        price = f"input = {self.input}, output = {self.output}"
        limits = f'limits = [ {{ requests = {self.limit}, per = "minute" }} ]\n' if self.limit else ""
        return (
            f'[providers.{self.name}]\nbase_url = "http://{self.name}.invalid/v1"\n'
            f'dialect = {orjson.dumps(self.dialects).decode()}\napi_key = "k"\n{limits}'
            f'[providers.{self.name}.models]\n"model" = {{ context = 131072, {price} }}\n'
        )


VENDORS = (
    Vendor("a", ("chat",), 0.5, 2.0),
    Vendor("ollama", ("chat", "messages"), 1.0, 3.0),  # one that goes on writing a trailing turn
    Vendor("c", ("chat",), 0.0, 0.0, limit=30),
    Vendor("d", ("messages",), 3.0, 15.0),
    Vendor("e", ("responses",), 2.0, 8.0),
)


class Mix(NamedTuple):
    """Which dialects there are. ``clients``: of a hundred tasks, how many are done in which. ``routes``: for each, its
    name and its vendors in order; the first one is whom its clients ask when there is no router. ``slow``: of a hundred
    answers so many are taken slowly.
    """

    clients: tuple[tuple[str, int], ...]
    routes: dict[str, tuple[str, tuple[int, ...]]]
    slow: int = 0

    def taken_in_s(self, turn: Turn) -> float:
        """How long the client takes for each piece of the answer: a few are busy with something else."""
        draw = random.Random(f"slow {turn.question}")
        return draw.choice((0.01, 0.2, 2.0)) if draw.random() * 100 < self.slow else 0.0

    def dialect(self, task: int) -> str:
        return str(_drawn(random.Random(f"client {task}"), self.clients))

    @property
    def vendors(self) -> list[int]:
        return sorted({index for _, order in self.routes.values() for index in order})


MIXES = {
    "two": Mix(
        (("chat", 75), ("messages", 25)),
        {"chat": ("auto", (0, 1, 2, 3)), "messages": ("claude", (3, 1, 0, 2))},
    ),
    "three": Mix(
        (("chat", 60), ("messages", 20), ("responses", 20)),
        {
            "chat": ("auto", (0, 1, 4, 3, 2)),
            "messages": ("claude", (3, 0, 1, 4, 2)),
            "responses": ("codex", (4, 3, 1, 0, 2)),
        },
        slow=3,
    ),
}


class Upstream:
    """A vendor's server with its habits and its bad days."""

    def __init__(self, index: int, seed: str, network: Outages, harshness: int) -> None:
        self.index = index
        self.vendor = VENDORS[index]
        self.requests = 0
        self.spent_usd = 0.0
        self.met: Counter[str] = Counter()  # faults, by place
        self.latest: dict[str, tuple[float, Reply]] = {}  # by question: when it was asked, and what it answered
        self._draw = random.Random(f"{seed} {index}")
        self._outages = Outages(random.Random(f"{seed} outages {index}"), UPTIME_S, OUTAGE_S, OUTAGES)
        self._network = network
        self._faults = list(RATES)
        self._limits = list(itertools.accumulate(rate * harshness for rate in RATES.values()))

    def up(self, now: float) -> bool:
        return not self._network.at(now) and not self._outages.at(now)

    async def post(self, target: Any, body: bytes, *_: Any) -> Reply:
        self.requests += 1
        now = time.monotonic()
        if self._network.at(now):
            await asyncio.sleep(self._draw.choice((0.01, 10.0)))
            raise ConnectFailed("no route to host")
        wire = next(WIRES[name] for name in WIRES if DIALECTS[name].upstream_path.encode() in target.head)
        asked = wire.asked(body)
        reply = await self._answer(self._outages.at(now) or self._fault(), wire, asked)
        self.latest[asked.question] = now, reply
        return reply

    def _fault(self) -> str:
        place = bisect.bisect_right(self._limits, self._draw.randrange(100_000))
        return self._faults[place] if place < len(self._faults) else ""

    async def _answer(self, fault: str, wire: Wire, asked: Asked) -> Reply:
        if fault in _EARLY or fault.isdigit():
            self.met[fault] += 1
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
            return Reply(200, [Piece(0.5, wire.odd_body), Piece(0.0, b"", "clean")])
        task, number = asked.question.split()
        turn = Turn(int(task), int(number))
        answer = self._said(turn, asked)
        spoiled = _SPOILS[fault](answer) if fault in _SPOILS else answer
        self._bill(turn, spoiled)
        return Reply(200, self._pieces(fault, wire, cut(spoiled, self._draw), stream=asked.stream))

    def _pieces(self, fault: str, wire: Wire, said: Said, *, stream: bool) -> list[Piece]:
        if stream:
            pieces = streamed(wire, said, self._draw)
        else:
            pieces = at_once(wire.body(said, finished=fault != "no finish"), self._draw)
        if fault in _SPOILS:
            self.met[fault] += 1
        if fault not in _STRIKES or (fault == "no finish" and not stream):
            return pieces
        struck = _STRIKES[fault](wire, pieces, self._draw)
        reached = [piece.place for piece in struck if piece in pieces and piece.data]
        self.met[f"{fault} / {reached[-1] if reached else 'opening'}"] += 1
        return struck

    def _bill(self, turn: Turn, answer: Answer) -> None:
        """Whatever begins to answer is paid for."""
        tokens = (len(answer.text) + sum(map(len, answer.calls))) / CHARACTERS_PER_TOKEN
        self.spent_usd += (turn.prompt_tokens * self.vendor.input + tokens * self.vendor.output) / 1e6

    def _refusal(self, status: str) -> Reply:
        body = orjson.dumps({"error": {"message": "No.", "code": int(status)}})
        headers = {"retry-after": str(self._draw.choice((1, 2, 5, 20)))} if status == "429" else {}
        return Reply(int(status), [Piece(0.0, body), Piece(0.0, b"", "clean")], headers)

    def _said(self, turn: Turn, asked: Asked) -> Answer:
        """Its own answer, or the rest of the one it is shown: exactly, or with some of it repeated."""
        own = turn.answer(self.index)
        if asked.shown is None:
            return own
        others = (turn.answer(index) for index in range(len(VENDORS)))
        begun = next((said for said in (own, *others) if said.text.startswith(asked.shown)), Answer("", own.calls))
        rest = begun.text[len(asked.shown) :]
        if asked.prefilled:
            return Answer(asked.shown + rest if self._draw.random() < 0.1 else rest, begun.calls)
        if not rest and not begun.calls:
            return Answer(COMPLETE, ())
        habit = self._draw.random()
        if habit < 0.15:
            rest = asked.shown[-self._draw.randrange(20, 60) :] + rest
        elif habit < 0.25:
            rest = asked.shown + rest
        elif habit < 0.3:
            rest += COMPLETE
        return Answer(rest, begun.calls)


def _bad_arguments(answer: Answer) -> Answer:
    return answer._replace(calls=tuple(arguments[:-1] + ' "extra"}' for arguments in answer.calls))


def _cut_arguments(answer: Answer) -> Answer:
    return answer._replace(calls=tuple(arguments[: len(arguments) // 2] for arguments in answer.calls))


_EARLY = frozenset({"refuse", "hang", "html", "json body"})
_SPOILS: dict[str, Callable[[Answer], Answer]] = {
    "bad arguments": _bad_arguments,
    "cut arguments": _cut_arguments,
    "empty": lambda answer: Answer("", ()),
}


Strike = Callable[[Wire, list[Piece], random.Random], list[Piece]]


def _first(*following: Piece) -> Strike:
    """Before the first content."""
    return lambda wire, pieces, draw: [Piece(pieces[0].after_s, b""), *following]


def _first_error(wire: Wire, pieces: list[Piece], draw: random.Random) -> list[Piece]:
    return [Piece(pieces[0].after_s, b""), Piece(0.1, wire.error), CLEAN]


def _anywhere(*following: Piece) -> Strike:
    """Behind any of the reads but the last."""
    return lambda wire, pieces, draw: [*pieces[: draw.randrange(1, len(pieces) - 1)], *following]


def _error(wire: Wire, pieces: list[Piece], draw: random.Random) -> list[Piece]:
    return _anywhere(Piece(0.1, wire.error), CLEAN)(wire, pieces, draw)


def _malformed(wire: Wire, pieces: list[Piece], draw: random.Random) -> list[Piece]:
    return _anywhere(Piece(0.1, wire.broken), CLEAN)(wire, pieces, draw)


def _pause(wire: Wire, pieces: list[Piece], draw: random.Random) -> list[Piece]:
    at = draw.randrange(1, len(pieces) - 1)
    ping = b"" if pieces[1].data[:1] == b"{" else wire.ping  # JSON has none
    return [*pieces[:at], Piece(20.0, ping), *pieces[at:]]


def _no_finish(wire: Wire, pieces: list[Piece], draw: random.Random) -> list[Piece]:
    """The last that some vendors say is the text."""
    return [*(piece for piece in pieces if piece.place != "finish" and not piece.end), CLEAN]


TORN, CLEAN = Piece(0.1, b"", "torn"), Piece(0.1, b"", "clean")
_STRIKES: dict[str, Strike] = {
    "hang after headers": _first(FOREVER),
    "reset before content": _first(TORN),
    "error before content": _first_error,
    "stall": _anywhere(FOREVER),
    "pause": _pause,
    "reset": _anywhere(TORN),
    "fin": _anywhere(Piece(0.0, b"", "torn")),
    "eof": _anywhere(CLEAN),
    "error": _error,
    "malformed": _malformed,
    "no finish": _no_finish,
}

# --- the client's end -----------------------------------------------------------------------------------------------


class Heard(NamedTuple):
    """What came back from one request. ``status`` 0: no connection. ``whole``: a proper end of the body."""

    status: int
    data: bytes
    whole: bool
    retry_after_s: float | None = None


class _Response:
    """What the downstream takes for aiohttp's response. ``taken_in_s``: so long a write waits for the client."""

    def __init__(self, taken_in_s: float) -> None:
        self.parts: list[bytes] = []
        self.whole = False
        self._taken_in_s = taken_in_s

    async def write(self, data: bytes) -> None:
        self.parts.append(data)
        if self._taken_in_s:
            await asyncio.sleep(self._taken_in_s)

    async def write_eof(self) -> None:
        self.whole = True


class MemoryDownstream(Downstream):
    """A client in memory."""

    __slots__ = ("memory",)

    def __init__(self, arrival: Arrival, taken_in_s: float) -> None:
        head = arrival.head
        stamp = Stamp(arrival.id, head.model, int(time.time()), head.include_usage)
        keepalive_s = arrival.route.keepalive_s
        super().__init__(arrival.request, arrival.dialect, stamp, keepalive_s=keepalive_s, clock=time.monotonic)
        self.memory = _Response(taken_in_s)

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

    def _attempt(self, ticket: Any, *rest: Any) -> Attempt:
        attempt = super()._attempt(ticket, *rest)
        attempt.gate = _OpenGate(whole=False)
        return attempt

    async def _recover(self, attempt: Attempt, failure: Any) -> bool:
        if self.downstream.transcript.begun:
            await self._fail(self._last_word(failure))
            return True
        return await super()._recover(attempt, failure)


class World:
    """Upstreams, and a pool over them. ``options``: more lines for the routes of the config."""

    def __init__(self, seed: str, folder: Path, mix: Mix, delivery: str, harshness: int, options: str) -> None:
        self.mix = mix
        network = Outages(random.Random(f"{seed} network"), NETWORK_UPTIME_S, NETWORK_OUTAGE_S, (("down", 1),))
        self.upstreams = [Upstream(index, seed, network, harshness) for index in mix.vendors]
        path = folder / "routerd.toml"
        routes = "".join(
            f"[routes.{name}]\nmodels = {orjson.dumps([f'{VENDORS[index].name}/model' for index in order]).decode()}\n"
            f'delivery = "{delivery}"\n{options}'
            for name, order in mix.routes.values()
        )
        path.write_text('[state]\nurl = "memory:"\n' + routes + "".join(VENDORS[index].tables for index in mix.vendors))
        self.telemetry = Telemetry(_Nowhere())
        self.pool = Pool(load(path, {}), open_store("memory:", folder), self.telemetry, clock=time.monotonic)
        by_name = {upstream.vendor.name: upstream for upstream in self.upstreams}
        for upstream, live in self.pool._live.items():
            live.client = by_name[upstream.provider]  # type: ignore[assignment]
        self._count = 0

    def could_serve(self, begin: float, end: float) -> bool:
        """True if somebody was up at some time between."""
        steps = [begin + (end - begin) * step / 20 for step in range(21)]
        return any(upstream.up(now) for upstream in self.upstreams for now in steps)

    def needed_s(self, turn: Turn) -> float:
        """How long the answer took that a turn was delivered with: the last that somebody gave to it."""
        given = [upstream.latest[turn.question] for upstream in self.upstreams if turn.question in upstream.latest]
        began, reply = max(given, key=lambda each: (each[1].ended, each[0]))
        return reply.last_at - began

    def routed(self, kind: type[Exchange]) -> Send:
        """Through an exchange of this kind."""

        async def send(turn: Turn) -> Heard:
            dialect = DIALECTS[turn.dialect]
            body = WIRES[turn.dialect].request(turn.question, self.mix.routes[turn.dialect][0], turn.kind)
            head = dialect.read_head(body)
            route = self.pool.route(head.model)
            assert route is not None
            self._count += 1
            request: Any = SimpleNamespace(transport=_Transport(), headers={})
            arrival = Arrival(request, dialect, body, head, route, f"sim-{self._count}", time.monotonic())
            exchange = kind(arrival, self.pool, self.telemetry)
            downstream = exchange.downstream = MemoryDownstream(arrival, self.mix.taken_in_s(turn))
            await exchange.run()
            return downstream.heard

        return send

    async def direct(self, turn: Turn) -> Heard:
        """To the first upstream, and nowhere else."""
        route, order = self.mix.routes[turn.dialect]
        target = SimpleNamespace(head=DIALECTS[turn.dialect].upstream_path.encode())
        body = WIRES[turn.dialect].request(turn.question, route, turn.kind)
        parts: list[bytes] = []
        status = 0
        try:
            async with asyncio.timeout(REMOTE_PATIENCE_S) as patience:
                reply = await self.upstreams[order[0]].post(target, body)
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

    def __init__(self, *, patches: bool) -> None:
        """``patches``: it goes on by itself with a text that broke off, as in chat."""
        self.continued = 0
        self._patches = patches
        self._quick = QUICK_RETRIES
        self._outer = self._waits = self._bad_calls = 0

    def after(self, heard: Heard, got: Read | None) -> float | None:
        """Seconds until it asks again; None: it gives up."""
        if heard.status in DEADLY:
            return None
        if got is not None and self._patches and got.begun_calls:
            self._bad_calls += 1
            return 0.0 if self._bad_calls < BAD_CALLS else None
        if got is not None and self._patches and got.text:
            self.continued += 1
            return 0.0 if self.continued <= CONTINUATIONS else None
        if got is not None and self._quick and not got.text:
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
    patched: int = 0  # the agent had to patch a broken text together by itself
    corrupted: int = 0  # taken for whole, and not what any upstream says
    duplicated: int = 0  # of those: something is said twice
    false_ends: int = 0  # of all that came: not whole, but ended as if it were
    flawed: int = 0  # of all that came: a client's library may stumble over it
    requests: int = 0  # at upstreams
    spent_usd: float = 0.0
    added_s: list[float] = msgspec.field(default_factory=list)  # of each turn, beyond what its answer took
    met: Counter[str] = msgspec.field(default_factory=Counter)  # faults of the upstreams
    wrong: list[str] = msgspec.field(default_factory=list)
    seeds: list[int] = msgspec.field(default_factory=list)  # of days that broke a law

    def add(self, day: Tally) -> None:
        for name in self.__struct_fields__[1:]:
            setattr(self, name, getattr(self, name) + getattr(day, name))

    def row(self) -> str:
        ordered = sorted(self.added_s) or [math.nan]

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return (
            f"{self.way:<11} {self.finished / self.tasks:8.2%} {self.delivered / self.turns:10.4%} "
            f"{self.delivered / max(1, self.servable):11.4%} {self.patched:8d} {self.corrupted:9d} "
            f"{self.duplicated:10d} {self.false_ends:10d} {self.flawed:7d} {self.requests / self.turns:8.3f} "
            f"{at(0.5):7.2f} {at(0.99):7.2f} {at(0.999):8.1f} {ordered[-1]:7.1f} "
            f"{1000 * self.spent_usd / self.turns:8.2f}"
        )


HEADINGS = (
    f"{'way':<11} {'finished':>8} {'delivered':>10} {'of servable':>11} {'broke off':>9} {'corrupted':>9} "
    f"{'duplicated':>10} {'false ends':>10} {'ill-fmd':>7} {'req/turn':>8} "
    f"{'+p50 s':>6} {'+p99 s':>7} {'+p99.9 s':>8} {'+max s':>7} {'$/1k turns':>10}"
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
            if not await self._turn(Turn(task, number, self._world.mix.dialect(task))):
                return False
            await asyncio.sleep(THINKING_S)
        return True

    async def _turn(self, turn: Turn) -> bool:
        """One turn with all the retries that Hermes makes; False if the task died of it."""
        tally, began = self._tally, time.monotonic()
        tally.turns += 1
        habits, first = Habits(patches=turn.dialect == "chat" and _streams(turn)), True
        while True:
            heard = await self._ask(turn)
            got = understand(turn, heard) if heard.status == 200 else None
            whole = _is_whole(turn, heard, got)
            self._note(turn, heard, got)
            if first:
                self._note_first(turn, began, heard, delivered=whole)
            if whole and got is not None:
                tally.patched += habits.continued > 0
                if not habits.continued:
                    self._check(turn, got)
                tally.added_s.append(time.monotonic() - began - self._world.needed_s(turn))
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

    def _note(self, turn: Turn, heard: Heard, got: Read | None) -> None:
        """What must not be, whatever a client makes of it."""
        if got is None:
            return
        tally = self._tally
        if heard.whole and not (got.finish and got.ended and not got.failed):
            tally.false_ends += 1
            tally.wrong.append(f"{turn} ended as if it were whole: {heard.data[-300:]!r}")
        if got.flaws:
            tally.flawed += 1
            tally.wrong.append(f"{turn} {', '.join(sorted(set(got.flaws)))}: {heard.data!r}"[:2000])

    def _note_first(self, turn: Turn, began: float, heard: Heard, *, delivered: bool) -> None:
        tally = self._tally
        tally.delivered += delivered
        able = delivered or self._world.could_serve(began, time.monotonic())
        tally.servable += able
        if able and not delivered:
            what = f"{turn.dialect} {turn.kind}, {time.monotonic() - began:.0f} s"
            tally.wrong.append(f"{turn} ({what}) lost at {began:.0f} s: {heard.status} {heard.data[-300:]!r}")

    def _check(self, turn: Turn, got: Read) -> None:
        """Is it what an upstream says? The text is one's own from beginning to end, and the calls are all there."""
        answers = [turn.answer(upstream.index) for upstream in self._world.upstreams]
        called = {answer.calls for answer in answers}
        # A call without a preamble may follow another's text that broke off in front of its own.
        texts = {answer.text for answer in answers}
        if got.text not in texts or got.calls not in called or (got.finish == "tool_calls") != bool(got.calls):
            self._tally.corrupted += 1
            self._tally.duplicated += says_twice(got, answers)
            self._tally.wrong.append(f"{turn} ({turn.dialect} {turn.kind}) corrupted: {got}, none of {answers}")


def _streams(turn: Turn) -> bool:
    return turn.kind in ("stream", "document")


def understand(turn: Turn, heard: Heard) -> Read:
    """What a client makes of what it has heard."""
    wire = WIRES[turn.dialect]
    return wire.read_stream(heard.data) if _streams(turn) else wire.read_body(heard.data)


def _is_whole(turn: Turn, heard: Heard, got: Read | None) -> bool:
    """True if Hermes takes it for a whole answer."""
    if got is None or got.failed or got.finish == "error" or not (got.text or got.calls):
        return False
    believed = got.finish or (heard.whole and not WIRES[turn.dialect].tells_end)
    return bool(believed) and all(_is_json(arguments) for arguments in got.calls)


def _is_json(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


def says_twice(got: Read, answers: Sequence[Answer]) -> bool:
    """True if the text, or the calls, are an upstream's own with a piece of them repeated."""
    if len(set(got.calls)) < len(got.calls):
        return True
    return any(
        len(got.text) > len(said.text)
        and len(_common(got.text, said.text)) + len(_common(got.text[::-1], said.text[::-1])) >= len(said.text)
        for said in answers
        if said.text
    )


def _common(one: str, other: str) -> str:
    """The beginning that both have."""
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# --- runs -----------------------------------------------------------------------------------------------------------

WAYS = ("direct", "first byte", "live", "whole")


def simulate(way: str, tasks: int, seed: int, harshness: int = 1, mix: str = "three", options: str = "") -> Tally:
    """So many tasks on this way. The same seed makes the same faults; ``harshness`` multiplies their rates."""
    delivery = "whole" if way == "whole" else "live"
    loop = VirtualLoop()
    tally = Tally(way)
    with virtual_time(loop), TemporaryDirectory() as folder:
        random.seed(seed)
        try:
            world = World(f"seed {seed}", Path(folder), MIXES[mix], delivery, harshness, options)
            loop.run_until_complete(_simulate(way, tasks, world, tally))
        finally:
            loop.close()
    if laws_broken(tally, harshness):
        tally.seeds.append(seed)
    return tally


async def _simulate(way: str, tasks: int, world: World, tally: Tally) -> None:
    kind = FirstByteExchange if way == "first byte" else Exchange
    send = world.direct if way == "direct" else world.routed(kind)
    patience_s = REMOTE_PATIENCE_S if way == "direct" else PATIENCE_S
    agents = [Agent(world, send, tally, patience_s=patience_s) for _ in range(AGENTS)]
    await asyncio.gather(*(agent.work(range(place, tasks, AGENTS)) for place, agent in enumerate(agents)))
    for upstream in world.upstreams:
        tally.requests += upstream.requests
        tally.spent_usd += upstream.spent_usd
        tally.met += upstream.met


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tasks", type=int, default=2000)
    add("--seed", type=int, default=1, help="of the first day; each day of tasks has the next one")
    add("--harshness", type=int, default=1, help="multiplies the rates of all faults")
    add("--ways", nargs="+", default=WAYS, choices=WAYS)
    add("--jobs", type=int, default=1, help="processes to split the days over")
    add("--mix", choices=tuple(MIXES), default="three", help="of how many dialects")
    add("--hedge", choices=("off", "free", "paid"), default="off", help="as in a route's config")
    add("--faults", action="store_true", help="also say which faults there were, and where in the answer")
    given = parser.parse_args(arguments)
    options = "" if given.hedge == "off" else f'hedge = "{given.hedge}"\n'
    print(f"{given.tasks} tasks of {TURNS} turns, {AGENTS} at a time, from seed {given.seed}")
    print(HEADINGS)
    total = [_run(way, given, options) for way in given.ways]
    if given.faults:
        met = sum((tally.met for tally in total), Counter[str]())
        print("faults met: " + ", ".join(f"{name} {count}" for name, count in sorted(met.items())))
    return int(any(laws_broken(tally, given.harshness) for tally in total if tally.way in ("live", "whole")))


def _run(way: str, given: argparse.Namespace, options: str) -> Tally:
    """One row of the table, and what was wrong."""
    sizes = [min(DAY_TASKS, given.tasks - begun) for begun in range(0, given.tasks, DAY_TASKS)]
    days = [(way, size, given.seed + place, given.harshness, given.mix, options) for place, size in enumerate(sizes)]
    began, total = time.perf_counter(), Tally(way)
    for place, day in enumerate(_days(days, given.jobs)):
        total.add(day)
        print(f"\r{way}: day {place + 1} of {len(days)}", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    print(f"{total.row()}   ({time.perf_counter() - began:.0f} s)", flush=True)
    if way in ("live", "whole"):
        seeds = [f"seeds {total.seeds}"] if total.seeds else []
        for sentence in (laws_broken(total, given.harshness) + seeds + total.wrong)[:40]:
            print(f"  {sentence}", flush=True)
    return total


def _days(days: Sequence[tuple[str, int, int, int, str, str]], jobs: int) -> Iterator[Tally]:
    if jobs == 1:
        yield from itertools.starmap(simulate, days)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
        yield from processes.map(simulate, *zip(*days, strict=True))


DELIVERED_MIN, HARSH_DELIVERED_MIN = 0.9995, 0.999


def laws_broken(tally: Tally, harshness: int = 1) -> list[str]:
    """The laws of routerd that did not hold, in words. In harsh times some turns are lost, for attempts are bounded."""
    delivered_min = DELIVERED_MIN if harshness == 1 else HARSH_DELIVERED_MIN
    broken = []
    if tally.corrupted:
        broken.append(f"{tally.corrupted} turns were corrupted, {tally.duplicated} of them by saying something twice")
    if tally.false_ends:
        broken.append(f"{tally.false_ends} answers ended as if they were whole")
    if tally.flawed:
        broken.append(f"{tally.flawed} answers were ill-formed")
    if tally.patched and harshness == 1:
        broken.append(f"{tally.patched} texts broke off")
    if tally.delivered < delivered_min * tally.servable:
        broken.append(f"{tally.servable - tally.delivered} of {tally.servable} turns were lost")
    return broken


if __name__ == "__main__":
    sys.exit(main())
