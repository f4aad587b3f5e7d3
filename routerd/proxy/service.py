"""The daemon's life: take up the state, listen, serve, reload, drain, save.

Rules
-----
* One process, one loop. What a reload replaces is one object, ``InForce``; all else lives as long as the process.
* **A reload** (SIGHUP) reads the same file again. A bad one changes nothing and is said loudly. A good one serves every
  exchange from then on; those already open keep what they began with, and when the last of them has ended, that is
  closed. What is known of the upstreams (ledgers, breakers, latencies, warm caches, the line of those who wait) is
  handed over in memory. Addresses, the body limit and the state file are fixed until a restart, and a change is said.
* **Fresh prices** are taken up in the same way, but into the config in force: the file is not read again for them.
* **A stop** (SIGTERM, SIGINT) drains. Nothing new is accepted, but a listening socket that was inherited is not closed:
  whoever connects waits there for the next process. Exchanges that are open end in their own time, up to ``DRAIN_S``;
  what is then still open ends with an honest error. A second signal ends the wait.
* **No request is lost to a restart.** A request that arrives on a kept-alive connection during the drain is served, and
  told that the connection ends with it. A connection that is idle cannot simply be closed, since a request may be on
  its way into it: the service manager keeps it, and the next process goes on with it. Without a manager there is nobody
  to go on, so it is closed, after a while in which nothing came.
* The watchdog is fed by a timer of the very loop that serves: if that is stuck, so is the food.

What is ugly
------------
aiohttp does not say whether a connection is idle; ``_idle`` looks. The bytes of a request's head that aiohttp has read
before the head is whole cannot be seen at all: a client that pauses for a drain's first moment in the middle of its
head, and is handed over just then, gets a 400.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import uvloop
from aiohttp import web

from routerd import __version__
from routerd.config import Config, ConfigError, Listen, Problem, ProviderConfig
from routerd.proxy.app import App
from routerd.proxy.chain import Chains
from routerd.proxy.notify import FDS_MAX, FORGET_CONNECTIONS, READY, STOPPING, WATCHDOG, Manager, take
from routerd.proxy.pool import Pool
from routerd.proxy.refresh import Refresher
from routerd.proxy.repricing import Repriced
from routerd.proxy.simulated import Script, SimulatedServer, turn_for
from routerd.state import StateError, Store, open_store
from routerd.telemetry import Telemetry

# The longest restart, and so the longest anybody waits in front of one: the Responses clients of some agents give a
# silent server 120 s, and all others more. Whoever changes it changes TimeoutStopSec= of the units with it.
DRAIN_S = 90.0
LAST_WORDS_S = 5.0  # then, to tell the clients that are left
FORCE_S = 0.1  # after those, connections are closed whatever they do
DRAIN_TICK_S = 0.05  # while draining, connections are looked at this often
IDLE_GRACE_S = 0.5  # without a manager, a connection idle for so long in a drain is closed
IDLE_CLIENT_S = 75.0  # a kept-alive client connection without a request
CHECKPOINT_S = 30.0  # estimates and breakers are saved this often
STATUS_S = 5.0  # the manager is told at most this often how things are
FEEDINGS = 3  # of the watchdog within its time
BACKLOG = 4096
COLLECTOR_THRESHOLDS = (2_000, 20, 50)  # objects made, and collections of the generation before


def serve(config: Config, state_dir: Path, load: Callable[[], Config]) -> None:
    """Run until told to stop. ``load`` reads the configuration anew.

    Raises StateError if the state cannot be used, OSError if an address cannot be had, ConfigError if an inherited
    address does not go with the configuration.
    """
    manager = take(os.environ)
    uvloop.run(_serve(config, state_dir, load, manager))


async def _serve(config: Config, state_dir: Path, load: Callable[[], Config], manager: Manager) -> None:
    store = open_store(config.state_url, state_dir)
    service = Service(config, store, Telemetry(), load=load, manager=manager)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, service.reload_soon)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    async with service:
        _calm_collector()
        await service.stopping.wait()


def _calm_collector() -> None:
    """What is there when the daemon serves stays for good, and requests leave no cycles behind: with its usual settings
    Python's collector goes through all of it again and again, which was seen as pauses of several milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


@asynccontextmanager
async def running(config: Config, store: Store, telemetry: Telemetry) -> AsyncIterator[list[str]]:
    """A whole daemon while the context lasts. Gives the URLs it listens at."""
    async with Service(config, store, telemetry) as service:
        yield service.urls


class InForce:
    """What a reload replaces: a config, its pool, and the servers of its simulated providers."""

    __slots__ = ("_stack", "config", "pool")

    def __init__(self, config: Config, pool: Pool, stack: AsyncExitStack) -> None:
        self.config = config
        self.pool = pool
        self._stack = stack

    @classmethod
    async def begin(cls, config: Config, store: Store, telemetry: Telemetry, previous: InForce | None = None) -> Self:
        """Build it, with all that is known. Raises StateError and OSError, and leaves nothing behind then."""
        async with AsyncExitStack() as stack:
            simulated = await _start_simulated(config, stack)
            pool = Pool(config, store, telemetry, simulated=simulated)
            stack.push_async_callback(pool.close)
            await pool.restore(previous.pool if previous is not None else None)
            return cls(config, pool, stack.pop_all())

    async def end(self) -> None:
        """Close its connections. Only when no exchange uses them any more."""
        await self._stack.aclose()


class Service:
    """A whole daemon, from ``async with`` to the end of its drain.

    ``urls``: where it listens. ``stopping`` is set by ``stop``, which is safe to call from a signal handler, as is
    ``reload_soon``. ``load`` may block; it is called on a thread.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        telemetry: Telemetry,
        *,
        load: Callable[[], Config] | None = None,
        manager: Manager | None = None,
        drain_s: float = DRAIN_S,
    ) -> None:
        self.urls: list[str] = []
        self.stopping = asyncio.Event()
        self._config = config
        self._store = store
        self._telemetry = telemetry
        self._load = load or (lambda: config)
        self._manager = Manager() if manager is None else manager
        self._drain_s = drain_s
        self._stack = AsyncExitStack()
        self._servers: list[asyncio.Server] = []
        self._exposed: list[str] = []  # inherited addresses that other machines can reach
        self._hurry = asyncio.Event()
        self._closing = False
        self._serving = False
        self._base = config  # what is in force, at the prices it is written with
        self._prices = Refresher(config.state_url, telemetry, self.reprice)
        self._changing = asyncio.Lock()  # what is in force is changed by one at a time
        self._reload_wanted = False
        self._reloading: asyncio.Task[None] | None = None
        self._reload_failed = False
        self._retiring: set[asyncio.Task[None]] = set()
        self._status = ""
        self._idle_since: dict[web.RequestHandler, float] = {}

    def __repr__(self) -> str:
        return f"<Service {self.urls} {self._status or 'not serving'}>"

    # --- start and stop ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self._store.close)
        self._stack.callback(self._manager.close)
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._hurry.set()
        await self.close()

    async def close(self) -> None:
        """Drain and end. A second call does nothing."""
        if self._closing:
            return
        self._closing = True
        try:
            await self._drain()
        finally:
            await self._stack.aclose()

    async def _start(self) -> None:
        priced = await self._prices.priced(self._config)
        self._in_force = await InForce.begin(priced.config, self._store, self._telemetry)
        self._prices.take_up(self._config, priced)
        self._stack.push_async_callback(self._end_all)
        self._chains = Chains(self._store)
        await self._chains.restore()
        self._app = App(self._in_force.config, self._in_force.pool, self._telemetry, self._chains)
        self._telemetry.watch(self._in_force.pool.snapshot)
        self._telemetry.config_in_force()
        self._stack.callback(self._checkpoint)
        await self._stack.enter_async_context(_every(CHECKPOINT_S, self._checkpoint))
        self._connector = await _start_connector(self._app, self._stack)
        await self._listen()
        self._announce()
        self._manager.tell(READY, f"STATUS={self._describe()}")
        if self._manager:
            await self._stack.enter_async_context(_every(STATUS_S, self._tell_status))
        if self._manager.watchdog_s is not None:
            feed = _every(self._manager.watchdog_s / FEEDINGS, lambda: self._manager.tell(WATCHDOG))
            await self._stack.enter_async_context(feed)
        await self._stack.enter_async_context(self._prices.running())
        self._serving = True
        if self._reload_wanted:
            self.reload_soon()

    async def _end_all(self) -> None:
        if self._reloading is not None:
            await self._reloading
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await self._in_force.end()

    def _checkpoint(self) -> None:
        self._in_force.pool.checkpoint()
        self._chains.checkpoint()

    def stop(self) -> None:
        """Begin to stop; a second call ends the wait for open exchanges."""
        if self.stopping.is_set():
            self._hurry.set()
        self.stopping.set()

    # --- listening --------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        inherited = self._manager.inherited
        if inherited.listening:
            self._exposed = [str(address) for address in map(_address, inherited.listening) if not address.local]
            self._check_exposed(self._config)
            for sock in inherited.listening:
                await self._listen_on(sock)
        else:
            for listen in self._config.server.listen:
                await self._listen_at(listen)
        self._manager.tell(FORGET_CONNECTIONS)  # before one of them is served: the manager's copy would keep it open
        for sock in inherited.connections:
            await self._go_on_with(sock)

    def _check_exposed(self, config: Config) -> None:
        """An inherited address may be open to more than the one in the config. Raises ConfigError."""
        if self._exposed and not config.server.tokens:
            where = ", ".join(self._exposed)
            message = f'{where}, given by the service manager, is open to other machines; add tokens = ["${{NAME}}"]'
            raise ConfigError([Problem("server.tokens", message)])

    async def _listen_on(self, sock: socket.socket) -> None:
        loop, address = asyncio.get_running_loop(), _address(sock)
        if address.path:
            server = await loop.create_unix_server(self._connector, sock=sock, backlog=BACKLOG)
        else:
            server = await loop.create_server(self._connector, sock=sock, backlog=BACKLOG)
        self._add_server(server, address)

    async def _listen_at(self, listen: Listen) -> None:
        loop = asyncio.get_running_loop()
        if listen.path:
            server = await loop.create_unix_server(self._connector, listen.path, backlog=BACKLOG)
        else:
            server = await loop.create_server(
                self._connector, listen.host, listen.port, backlog=BACKLOG, reuse_address=True
            )
            port = server.sockets[0].getsockname()[1]  # it may have been 0, which means any
            listen = Listen(listen.host, port)
        self._add_server(server, listen)

    def _add_server(self, server: asyncio.Server, listen: Listen) -> None:
        self._servers.append(server)
        self.urls.append(str(listen) if listen.path else f"http://{listen}")

    async def _go_on_with(self, sock: socket.socket) -> None:
        """Serve a connection that the process before this one kept alive."""
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._connector, sock)
        except OSError:
            sock.close()  # its client has left in between

    # --- what the manager and the operator are told -----------------------------------------------------------------

    def _announce(self) -> None:
        config, log = self._config, self._telemetry.log
        log.info(
            "serving",
            version=__version__,
            listen=self.urls,
            config=str(config.source) if config.source else "environment",
            providers=list(config.providers),
            routes=list(config.routes),
        )
        if self._manager.inherited.listening:
            log.info("listening where the service manager says; server.listen is not used")
        if self._manager.inherited.connections:
            log.info("connections taken over", count=len(self._manager.inherited.connections))
        for sentence in self._store.warnings:
            log.warning("state", message=sentence)
        self._warn(config)

    def _warn(self, config: Config) -> None:
        for warning in config.warnings:
            self._telemetry.log.warning("config", path=warning.path, message=warning.message)
        if config.simulated:
            self._telemetry.log.warning(
                "SIMULATED: no provider key and no config were found, so every answer is made up by routerd itself; "
                "set OPENROUTER_API_KEY (or another provider's key) and start again"
            )

    def _describe(self) -> str:
        able, count = self._in_force.pool.admissible(time.monotonic(), time.time())
        exchanges = self._app.open_exchanges
        text = f"{able} of {count} upstreams admissible, {exchanges} open exchange{'' if exchanges == 1 else 's'}"
        if self.stopping.is_set():
            return f"Draining: {text}"
        return f"{text}; the configuration file is bad, an older one is in force" if self._reload_failed else text

    def _tell_status(self) -> None:
        status = self._describe()
        if status != self._status:
            self._status = status
            self._manager.tell(f"STATUS={status}")

    # --- reloading --------------------------------------------------------------------------------------------------

    def reload_soon(self) -> None:
        """Reload; if that is under way, once more after it, for the file may have changed since it was read."""
        self._reload_wanted = True
        if self._serving and self._reloading is None:
            self._reloading = asyncio.ensure_future(self._reload_while_wanted())

    async def _reload_while_wanted(self) -> None:
        while self._reload_wanted and not self.stopping.is_set():
            self._reload_wanted = False
            await self.reload()
        self._reloading = None

    async def reload(self) -> bool:
        """Take up the configuration as it is now; False if it is bad and the old one stays in force."""
        self._manager.reloading()
        problems = await self._try_reload()
        for problem in problems:
            self._telemetry.log.error("config", path=problem.path, message=problem.message)
        self._reload_failed = bool(problems)
        self._telemetry.reloaded(success=not problems)
        if problems:
            self._telemetry.log.error("reload failed: the old configuration stays in force", problems=len(problems))
        self._manager.tell(READY, f"STATUS={self._describe()}")
        return not problems

    async def _try_reload(self) -> tuple[Problem, ...]:
        """Every reason why the configuration is not in force now; none if it is."""
        async with self._changing:
            try:
                config = await asyncio.to_thread(self._load)
                self._check_exposed(config)
                await self._bring_in_force(config, await self._prices.priced(config))
            except ConfigError as error:
                return error.problems
            except (StateError, OSError) as error:
                return (Problem("", str(error)),)
        self._tell_reloaded(config)
        return ()

    async def reprice(self) -> None:
        """Take up fresh prices, with the configuration that is in force."""
        async with self._changing:
            if self.stopping.is_set():
                return
            priced = await self._prices.priced(self._base)
            if priced.config == self._in_force.config:
                self._prices.take_up(self._base, priced)
                return
            try:
                await self._bring_in_force(self._base, priced)
            except (StateError, OSError) as error:
                self._telemetry.log.error("the fresh prices are not taken up", message=str(error))

    async def _bring_in_force(self, config: Config, priced: Repriced) -> None:
        """Replace what is in force with this configuration at these prices. Raises StateError and OSError."""
        self._take_up(await InForce.begin(priced.config, self._store, self._telemetry, self._in_force))
        self._base = config
        self._prices.take_up(config, priced)

    def _take_up(self, in_force: InForce) -> None:
        former, self._in_force = self._in_force, in_force
        self._app.adopt(in_force.config, in_force.pool)
        self._telemetry.watch(in_force.pool.snapshot)
        task = asyncio.ensure_future(self._retire(former))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _tell_reloaded(self, config: Config) -> None:
        self._telemetry.log.info(
            "reloaded",
            config=str(config.source) if config.source else "environment",
            providers=list(config.providers),
            routes=list(config.routes),
            open_exchanges=self._app.open_exchanges,
        )
        self._warn(config)
        self._warn_fixed(config)

    def _warn_fixed(self, config: Config) -> None:
        """Say which changes wait for a restart."""
        began, now = self._config, config
        changes = {
            "server.listen": (began.server.listen, now.server.listen),
            "server.max_body": (began.server.max_body_bytes, now.server.max_body_bytes),
            "state.url": (began.state_url, now.state_url),
        }
        for path, (before, after) in changes.items():
            if before != after:
                self._telemetry.log.warning("config", path=path, message="a change takes a restart; it is as it was")

    async def _retire(self, former: InForce) -> None:
        try:
            await former.pool.last_has_left()
            self._in_force.pool.checkpoint()  # where both wrote the same rows, the pool in force has the last word
        finally:
            await former.end()

    # --- draining ---------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Let everything that is open end, up to the limit, and lose nothing of what comes meanwhile."""
        self.stopping.set()
        self._manager.tell(STOPPING, f"STATUS={self._describe()}")
        self._telemetry.log.info("stopping", open_exchanges=self._app.open_exchanges, drain_s=self._drain_s)
        self._app.closing = True
        for server in self._servers:
            server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await self._let_go()
        cut = await self._app.cut(LAST_WORDS_S)
        if cut:
            self._telemetry.log.warning("drain ended", cut_exchanges=cut)

    async def _let_go(self) -> None:
        """Until no connection is left, or nobody wants to wait any longer."""
        while connections := self._connector.connections:
            idle = [connection for connection in connections if _idle(connection)]
            for connection in self._handed_over(idle) or self._forsaken(idle):
                connection.force_close()
            if await self._hurried(DRAIN_TICK_S):
                return

    async def _hurried(self, wait_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                return await self._hurry.wait()
        return False

    def _handed_over(self, idle: list[web.RequestHandler]) -> list[web.RequestHandler]:
        """Those of the idle that the manager has taken: all, if there is one that will start the next process."""
        if not self._manager.inherited.listening:
            return []
        batches = [idle[start : start + FDS_MAX] for start in range(0, len(idle), FDS_MAX)]
        return [one for batch in batches if self._manager.keep([_fd(one) for one in batch]) for one in batch]

    def _forsaken(self, idle: list[web.RequestHandler]) -> list[web.RequestHandler]:
        """Those that have been idle for long enough to be closed."""
        now = time.monotonic()
        self._idle_since = {one: self._idle_since.get(one, now) for one in idle}
        return [one for one in idle if now - self._idle_since[one] >= IDLE_GRACE_S and not _readable(_fd(one))]


def _idle(connection: web.RequestHandler) -> bool:
    """True if it is waiting for a request and has nothing of one: aiohttp has no public word for that."""
    waiter = connection._waiter  # noqa: SLF001
    waiting = waiter is not None and not waiter.done() and not connection._messages  # noqa: SLF001
    return waiting and connection.transport is not None


def _fd(connection: web.RequestHandler) -> int:
    transport = cast("asyncio.Transport", connection.transport)
    return cast("int", transport.get_extra_info("socket").fileno())


def _readable(fd: int) -> bool:
    """True if bytes have arrived that the loop has not yet read."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False


def _address(sock: socket.socket) -> Listen:
    name = sock.getsockname()
    return Listen(name[0], name[1]) if isinstance(name, tuple) else Listen(path=str(name) or "unnamed")


async def _start_simulated(config: Config, stack: AsyncExitStack) -> dict[str, str]:
    """Each simulated provider is a real server on a loopback port, so that its answers pass through every layer."""
    return {
        provider.name: await _start_one_simulated(provider, stack)
        for provider in config.providers.values()
        if provider.simulated is not None
    }


async def _start_one_simulated(provider: ProviderConfig, stack: AsyncExitStack) -> str:
    turns = itertools.cycle([turn_for(fault) for fault in provider.simulated or ("ok",)])
    server = SimulatedServer(Script(lambda _request: next(turns)))
    url = await server.start()
    stack.push_async_callback(server.close)
    return url


@asynccontextmanager
async def _every(period_s: float, act: Callable[[], object]) -> AsyncIterator[None]:
    """Do it again and again, until the context ends."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(period_s)
            act()

    task = asyncio.ensure_future(repeat())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _start_connector(app: App, stack: AsyncExitStack) -> web.Server:
    """What makes an aiohttp connection of a socket's, and knows those that are open."""
    # handler_cancellation: a client's hang-up must reach the exchange at once, wherever it stands.
    # access_log: one line per exchange is written by telemetry; aiohttp's own costs more than the routing.
    runner = web.AppRunner(
        app.build(),
        access_log=None,
        handler_cancellation=True,
        handle_signals=False,
        keepalive_timeout=IDLE_CLIENT_S,
        shutdown_timeout=FORCE_S,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return cast("web.Server", runner.server)
