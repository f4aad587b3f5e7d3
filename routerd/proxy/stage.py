"""Everybody who takes part in a drill: the upstreams that fail by script, the daemon between, and the agents.

The daemon is the product, whole: ``Service`` with a config, a state in memory and a port of its own. It shares nothing
with a daemon that may run beside it. The upstreams are simulated servers, and the agents are plain HTTP clients that
work through a task of ``tasks`` turn by turn. What they hear is judged by ``laws``.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import aiohttp
import orjson

from routerd.config import load
from routerd.dialects import DIALECTS
from routerd.proxy.attempt import TIMEOUT_CODES
from routerd.proxy.laws import Books, Heard, Verdict, judge, read
from routerd.proxy.scripts import Fault, Received, Script, Turn
from routerd.proxy.service import Service
from routerd.proxy.simulated import SimulatedServer
from routerd.proxy.tasks import MODEL, REFUSE_S, TURNS, Case, Conversation, Model, sayings
from routerd.state import open_store
from routerd.telemetry import Telemetry

LEAVE_S = 3.0  # for everything to be gone after the end
TICK_S = 0.01
ASKED = ""  # stands in the books for the exchanges themselves
MAYBE_NOT_RECEIVED = {"connect", *TIMEOUT_CODES}
RETRIED = frozenset({408, 409, 429})  # and whatever is 500 or more; as the OpenAI and Anthropic SDKs have it, 2026


def settings(limit_s: float, *, max_wait_s: float = 10.0) -> str:
    """TOML for a daemon whose watchdogs all bark after ``limit_s``."""
    limit = f"{limit_s * 1000:.0f}ms"
    return f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "memory:"
[defaults]
first_token_timeout = "{limit}"
stall_timeout = "{limit}"
answer_timeout = "{limit}"
keepalive = "100ms"
max_wait = "{max_wait_s:g}s"
"""


class Done(NamedTuple):
    """One turn of a task as it went. ``struck``: something went wrong in it, whether the agent noticed or not."""

    case: Case
    turn: int
    verdict: Verdict
    seconds: float
    struck: bool
    heard: Heard


# --- upstreams ------------------------------------------------------------------------------------------------------


class Stage:
    """The upstreams: one server for all models, told apart by their paths, and more for the ports that get closed."""

    def __init__(self) -> None:
        self._models: dict[str, Callable[[Received], Turn]] = {}
        self._servers: list[SimulatedServer] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._root = (await self._serve(Script(self._play))).removesuffix("/v1")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _play(self, received: Received) -> Turn:
        return self._models[received.path.split("/")[1]](received)

    async def _serve(self, script: Script) -> str:
        server = SimulatedServer(script, model_suffix="")
        url = await server.start()
        self._stack.push_async_callback(server.close)
        self._servers.append(server)
        return url

    def put(self, name: str, model: Callable[[Received], Turn]) -> str:
        """Add a model; its base URL."""
        self._models[name] = model
        return f"{self._root}/{name}/v1"

    async def put_refusing(self, model: Model, case: Case) -> str:
        """Add one behind a port of its own, which is closed from the start, or for a while after the first answer."""
        closed = Turn(fault=Fault("refuse", seconds=REFUSE_S if case.pattern == "once" else 0.0))
        return await self._serve(Script(model, closed, model) if case.pattern == "once" else Script(closed))

    async def connections(self) -> int:
        """Those still open, after a moment in which they may end."""
        return await settled(lambda: sum(server.open_connections for server in self._servers))


async def settled(count: Callable[[], int]) -> int:
    """The count when it has come down to nothing, or has not for too long."""
    until = time.monotonic() + LEAVE_S
    while (found := count()) and time.monotonic() < until:  # noqa: ASYNC110 - many things end, and none of them tells
        await asyncio.sleep(TICK_S)
    return found


# --- agents ---------------------------------------------------------------------------------------------------------


class Client:
    """Whoever asks, over real sockets."""

    def __init__(self, session: aiohttp.ClientSession, *, retries: int = 0) -> None:
        self._session = session
        self._retries = retries

    async def ask(self, url: str, body: bytes) -> Heard:
        """What comes back."""
        heard = await self._ask(url, body)
        for _ in range(self._retries):
            if heard.status and heard.status < 500 and heard.status not in RETRIED:
                break
            heard = await self._ask(url, body)
        return heard

    async def _ask(self, url: str, body: bytes) -> Heard:
        body_so_far = bytearray()
        status, ended = 0, False
        try:
            async with self._session.post(url, data=body, headers={"content-type": "application/json"}) as reply:
                status = reply.status
                async for data in reply.content.iter_any():
                    body_so_far += data
                ended = True
        except (aiohttp.ClientError, TimeoutError):
            pass  # what came before that counts
        return Heard(status, bytes(body_so_far), ended)


@asynccontextmanager
async def client(patience_s: float, *, retries: int = 0) -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience_s, sock_read=patience_s)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield Client(session, retries=retries)


class Agent:
    """One agent at one task: it goes on until a turn is lost. ``faulty`` is the model behind the fault."""

    def __init__(self, case: Case, front: Client, base_url: str, model: str, faulty: Model) -> None:
        self._case = case
        self._front = front
        self._dialect = DIALECTS[case.dialect]
        self._url = base_url + self._dialect.paths[0].removeprefix("/v1")
        self._conversation = Conversation(case, model)
        self._faulty = faulty
        self.asked = 0

    async def work(self) -> list[Done]:
        done: list[Done] = []
        for turn in range(TURNS):
            body = self._dialect.encode_request(self._conversation.request())
            strikes, began = self._faulty.strikes, time.monotonic()
            heard = await self._front.ask(self._url, body)
            self.asked += 1
            seconds = time.monotonic() - began
            found = read(heard, self._dialect, stream=self._case.stream)
            verdict = judge(heard, found, sayings(self._case, turn))
            struck = self._faulty.strikes > strikes or (self._case.trouble.refuses and turn in self._case.struck)
            done.append(Done(self._case, turn, verdict, seconds, struck, heard))
            if not verdict.delivered:
                break
            self._conversation.answered(found, turn)
        return done


# --- the daemon -----------------------------------------------------------------------------------------------------


class Daemon:
    """A running routerd, and what it says of itself."""

    def __init__(self, telemetry: Telemetry, log: io.BytesIO, url: str) -> None:
        self._telemetry = telemetry
        self._log = log
        self.url = url

    @property
    def exchanges(self) -> list[dict[str, Any]]:
        """The log's lines of ended exchanges."""
        lines = map(orjson.loads, self._log.getvalue().splitlines())
        return [line for line in lines if line["event"] == "exchange"]

    def counted(self, metric: str, label: str) -> Counter[str]:
        """The samples of a metric, by one of its labels."""
        found: Counter[str] = Counter()
        for family in self._telemetry.registry.restricted_registry([metric]).collect():
            for sample in family.samples:
                if sample.name == metric:
                    found[sample.labels[label]] += int(sample.value)
        return found

    async def status(self) -> Any:
        """What it answers on its status page."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/status") as reply:
            return await reply.json()

    def books(self, asked: int, models: Mapping[str, Model]) -> Books:
        """Its own two witnesses, and the third: what agents have asked, and what upstreams have received.

        A refused connection is received by nobody, and a request that was given up may not have been. What was lost on
        a used connection before a byte of its answer is sent once more within the same attempt, for the connection may
        have been dead already. So much an upstream may have received less, or more.
        """
        lines = self.exchanges
        logged, less = Counter({ASKED: len(lines)}), Counter[str]()
        for line in lines:
            logged.update(attempt["provider"] for attempt in line["attempts"])
            less.update(one["provider"] for one in line["attempts"] if one.get("code") in MAYBE_NOT_RECEIVED)
        received = {ASKED: asked}
        for name, model in models.items():
            most, least = model.requests + less[name], model.requests - model.unanswered
            received[name] = min(max(logged[name], least), most)
        counted = self.counted("routerd_attempts_total", "provider")
        counted[ASKED] = self.counted("routerd_exchanges_total", "route").total()
        return Books(logged, counted, received)

    async def unfinished(self) -> int:
        """Exchanges it still serves, and requests that it believes to be in flight at an upstream, after a moment."""
        for _ in range(round(LEAVE_S / TICK_S)):
            if not await self._unfinished():
                return 0
            await asyncio.sleep(TICK_S)
        return await self._unfinished()

    async def _unfinished(self) -> int:
        in_flight: int = sum(one["in_flight"] for one in (await self.status())["upstreams"])
        return self.counted("routerd_open_exchanges", "dialect").total() + in_flight


@asynccontextmanager
async def daemon(text: str) -> AsyncIterator[Daemon]:
    """A daemon with this configuration and nothing else while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="routerd-drill-") as folder:
        path = Path(folder) / "routerd.toml"
        path.write_text(text)
        config = load(path, {})
        log = io.BytesIO()
        telemetry = Telemetry(log)
        store = open_store(config.state_url, Path(folder))
        async with Service(config, store, telemetry) as service:
            yield Daemon(telemetry, log, service.urls[0])


def provider(name: str, base_url: str, *, extra: str = "", price: str = "input = 1, output = 2") -> str:
    return f"""
[providers.{name}]
base_url = "{base_url}"
dialect = "chat"
api_key = "drill"
{extra}
[providers.{name}.models]
"{MODEL}" = {{ context = 131072, max_output = 8192, {price} }}
"""
