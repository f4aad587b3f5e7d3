"""The daemon's life: take up the state, listen, serve, drain, save.

One process, one loop. SIGTERM and SIGINT stop it: listeners close first, open exchanges are given ``DRAIN_S`` to
finish, what was learned is saved, and only then does it end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import uvloop
from aiohttp import web

from routerd import __version__
from routerd.config import Config, Listen, ProviderConfig
from routerd.proxy.app import App
from routerd.proxy.pool import Pool
from routerd.proxy.simulated import Script, SimulatedServer, turn_for
from routerd.state import Store, open_store
from routerd.telemetry import Telemetry

DRAIN_S = 30.0  # open exchanges get this long to finish after a stop was asked for
IDLE_CLIENT_S = 75.0  # a kept-alive client connection without a request
CHECKPOINT_S = 30.0  # estimates and breakers are saved this often
BACKLOG = 4096


def serve(config: Config, state_dir: Path) -> None:
    """Run until told to stop. Raises StateError if the state cannot be used, OSError if an address cannot be had."""
    uvloop.run(_serve(config, state_dir))


async def _serve(config: Config, state_dir: Path) -> None:
    telemetry = Telemetry()
    async with running(config, open_store(config.state_url, state_dir), telemetry):
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        await stopped.wait()
        telemetry.log.info("stopping", drain_s=DRAIN_S)


@asynccontextmanager
async def running(config: Config, store: Store, telemetry: Telemetry) -> AsyncIterator[list[str]]:
    """A whole daemon while the context lasts. Gives the URLs it listens at."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        simulated = await _start_simulated(config, stack)
        pool = Pool(config, store, telemetry, simulated=simulated)
        stack.push_async_callback(pool.close)
        await pool.restore()
        telemetry.watch(pool.snapshot)
        telemetry.config_success_time.set_to_current_time()
        stack.callback(pool.checkpoint)
        await stack.enter_async_context(_checkpoints(pool))
        runner = await _start_runner(App(config, pool, telemetry), stack)
        urls = [await _listen(runner, listen) for listen in config.server.listen]
        _announce(config, store, telemetry, urls)
        yield urls


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
async def _checkpoints(pool: Pool) -> AsyncIterator[None]:
    """Save estimates and breakers now and then, until the context ends."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_S)
            pool.checkpoint()

    task = asyncio.ensure_future(repeat())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _start_runner(app: App, stack: AsyncExitStack) -> web.AppRunner:
    # handler_cancellation: a client's hang-up must reach the exchange at once, wherever it stands.
    # access_log: one line per exchange is written by telemetry; aiohttp's own costs more than the routing.
    runner = web.AppRunner(
        app.build(),
        access_log=None,
        handler_cancellation=True,
        handle_signals=False,
        keepalive_timeout=IDLE_CLIENT_S,
        shutdown_timeout=DRAIN_S,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return runner


async def _listen(runner: web.AppRunner, listen: Listen) -> str:
    if listen.path:
        await web.UnixSite(runner, listen.path, backlog=BACKLOG).start()
        return str(listen)
    site = web.TCPSite(runner, listen.host, listen.port, backlog=BACKLOG, reuse_address=True)
    await site.start()
    return f"http://{Listen(listen.host, _bound_port(site, listen))}"


def _bound_port(site: web.TCPSite, listen: Listen) -> int:
    """The port really bound, for ``listen`` may ask for any with 0."""
    server = site._server  # noqa: SLF001 - aiohttp has no public way to ask a site for its port
    sockets = getattr(server, "sockets", None) or ()
    return next((sock.getsockname()[1] for sock in sockets), listen.port)


def _announce(config: Config, store: Store, telemetry: Telemetry, urls: list[str]) -> None:
    telemetry.log.info(
        "serving",
        version=__version__,
        listen=urls,
        config=str(config.source) if config.source else "environment",
        providers=list(config.providers),
        routes=list(config.routes),
    )
    for sentence in store.warnings:
        telemetry.log.warning("state", message=sentence)
    for warning in config.warnings:
        telemetry.log.warning("config", path=warning.path, message=warning.message)
    if config.simulated:
        telemetry.log.warning(
            "SIMULATED: no provider key and no config were found, so every answer is made up by routerd itself; "
            "set OPENROUTER_API_KEY (or another provider's key) and start again"
        )
