"""The HTTP face: paths, admission, and the small answers. Whatever needs an upstream goes to an ``Exchange``.

Paths are a table. Anything not in it is a 404 in JSON at once: Hermes probes half a dozen foreign endpoints at start,
and a friendly answer to any of them would make it take this for another kind of server.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import orjson
from aiohttp import web

from routerd.canonical import BadRequest, Failure, Head, Outcome, Side
from routerd.config import Config
from routerd.dialects import DIALECTS, Dialect
from routerd.policy.answers import owner_of
from routerd.proxy.chain import Chains, Link
from routerd.proxy.downstream import ClientGone
from routerd.proxy.exchange import Arrival, Exchange
from routerd.proxy.guard import Guard
from routerd.proxy.models import model_cards
from routerd.proxy.page import PAGE, PAGE_HEADERS
from routerd.proxy.pool import Pool
from routerd.proxy.status import Moment, snapshot
from routerd.telemetry import OTHER, ExchangeRecord, Telemetry

JSON_TYPE = "application/json"
NEAR_NAMES_MAX = 5
OPEN_EXCHANGES_MAX = 8192  # at once; far above any agent host's, and within what one process holds in memory

_ENDING = Failure(
    Outcome.CANCELLED,
    Side.ROUTER,
    "connection lost: routerd is restarting and could wait no longer; ask again",
    status=503,
    code="restarting",
    retry_after_s=1.0,
)
_BUG = Failure(
    Outcome.UNAVAILABLE, Side.ROUTER, "an error inside routerd; its log says where", status=500, code="internal"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class App:
    """Everything a request can reach. ``pool`` is replaced as a whole when the config is reloaded."""

    def __init__(self, config: Config, pool: Pool, telemetry: Telemetry, chains: Chains) -> None:
        self._telemetry = telemetry
        self._chains = chains
        self._ids = _id_source()
        self._open = 0
        self._began = time.monotonic()
        self._running: dict[asyncio.Task[Any], Exchange] = {}
        self._cut = False
        self.closing = False  # every answer from now on is the last one of its connection
        self.adopt(config, pool)

    def adopt(self, config: Config, pool: Pool) -> None:
        """Take up a config and its pool. Exchanges already open keep the ones they began with."""
        self.config = config
        self.pool = pool
        self._guard = Guard(config.server.tokens, config.server.hosts)
        self._cards = model_cards(config)

    def build(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=self.config.server.max_body_bytes)
        for dialect in DIALECTS.values():
            for path in dialect.paths:
                app.router.add_post(path, self._exchange_handler(dialect))
            for path in dialect.count_paths:
                app.router.add_post(path, self._count_handler(dialect))
        for path, handler in self._small_answers().items():
            app.router.add_get(path, handler)
        app.router.add_route("*", "/{path:.*}", self._not_found)
        app.on_response_prepare.append(self._on_prepare)
        return app

    def _small_answers(self) -> dict[str, Handler]:
        return {
            "/v1/models": self._models,
            "/v1/models/{id:.+}": self._model,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/status": self._status,
            "/": self._page,
        }

    # --- exchanges --------------------------------------------------------------------------------------------------

    def _exchange_handler(self, dialect: Dialect) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            arrived = time.monotonic()
            failure = self._guard.check(request) or self._full()
            if failure is not None:
                return self._refuse(dialect, failure, arrived)
            self._open += 1
            try:
                arrival = await self._accept(request, dialect, arrived)
                return await self._run(Exchange(arrival, self.pool, self._telemetry), self.pool)
            except BadRequest as error:
                return self._refuse(dialect, error.failure, arrived)
            finally:
                self._open -= 1

        return handle

    def _count_handler(self, dialect: Dialect) -> Handler:
        """How many tokens a request has, by our own estimate: no upstream is asked."""

        async def handle(request: web.Request) -> web.StreamResponse:
            arrived = time.monotonic()
            failure = self._guard.check(request)
            if failure is not None:
                return self._refuse(dialect, failure, arrived)
            try:
                _, head, _ = await self._read_whole(request, dialect)
            except BadRequest as error:
                return self._refuse(dialect, error.failure, arrived)
            return web.Response(body=dialect.encode_count(head), content_type=JSON_TYPE)

        return handle

    async def _run(self, exchange: Exchange, pool: Pool) -> web.StreamResponse:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._running[task] = exchange
        pool.enter()
        try:
            await exchange.run()
        except asyncio.CancelledError:
            if not self._cut:
                raise
            with contextlib.suppress(ClientGone):
                await exchange.downstream.fail(_ENDING)
        except Exception as error:  # noqa: BLE001 - the last boundary: a mistake of ours is told in the client's dialect
            self._telemetry.log.error("bug", exchange=exchange.record.id, kind=type(error).__name__, at=_place(error))
            with contextlib.suppress(ClientGone):
                await exchange.downstream.fail(_BUG)
        finally:
            pool.leave()
            del self._running[task]
        return exchange.downstream.response

    async def cut(self, limit_s: float) -> int:
        """End the exchanges that are still open, each with an honest error. Returns how many there were."""
        self._cut = True
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=limit_s)
        return len(tasks)

    @property
    def open_exchanges(self) -> int:
        return self._open

    async def _on_prepare(self, _request: web.Request, response: web.StreamResponse) -> None:
        if self.closing:
            response.force_close()
            response.headers["Connection"] = "close"

    async def _accept(self, request: web.Request, dialect: Dialect, arrived: float) -> Arrival:
        """Steps one and two: what is asked, and of which route. Raises BadRequest."""
        body, head, link = await self._read_whole(request, dialect)
        if not self.config.providers:
            detail = "no provider is configured yet: add one to the configuration and reload"
            raise BadRequest(detail, status=503, code="no_provider")
        route = self.pool.route(head.model)
        if route is None:
            raise BadRequest(self._unknown_model(head.model), status=404, code="model_not_found")
        asked = b"" if dialect.chaining is None else await self._read(request)  # again, out of memory
        return Arrival(request, dialect, body, head, route, next(self._ids), arrived, link, asked)

    async def _read_whole(self, request: web.Request, dialect: Dialect) -> tuple[bytes, Head, Link | None]:
        """The request with all of its conversation, whether the client sent that or named it."""
        body = await self._read(request)
        head = dialect.read_head(body)
        chaining = dialect.chaining
        if chaining is None or not (head.previous or head.kept):
            return body, head, None
        owner, previous, whole = owner_of(self._guard.token_of(request)), head.previous, body
        if previous:
            limit = self.config.server.max_body_bytes
            whole = await self._chains.whole(chaining, body, previous, owner, limit)
            head = dialect.read_head(whole)
        return whole, head, Link(self._chains, chaining, owner, previous, body, whole) if head.kept else None

    async def _read(self, request: web.Request) -> bytes:
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            limit = self.config.server.max_body_bytes
            detail = f"the request body is larger than server.max_body ({limit} bytes)"
            raise BadRequest(detail, status=413, code="request_too_large") from error

    def _unknown_model(self, name: str) -> str:
        near = ", ".join(self.config.near(name)[:NEAR_NAMES_MAX])
        hint = f"; near it: {near}" if near else "; GET /v1/models lists what is offered"
        return f"the model {name[:100]!r} is not offered here{hint}"

    def _full(self) -> Failure | None:
        if self._open < OPEN_EXCHANGES_MAX:
            return None
        detail = f"more than {OPEN_EXCHANGES_MAX} requests are open"
        return Failure(Outcome.UNAVAILABLE, Side.ROUTER, detail, status=503, code="overloaded", retry_after_s=1.0)

    def _refuse(self, dialect: Dialect, failure: Failure, arrived: float) -> web.Response:
        """An answer for what never became an exchange; counted and logged all the same."""
        status = failure.status or 400
        record = ExchangeRecord(next(self._ids), OTHER, dialect.name, stream=False, outcome=failure.outcome)
        record.status, record.detail = status, failure.code
        record.duration_s = time.monotonic() - arrived
        self._telemetry.exchange(record)
        headers = {"x-routerd-exchange": record.id}
        if failure.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(failure.retry_after_s)))
        return web.Response(body=dialect.encode_error(failure), status=status, content_type=JSON_TYPE, headers=headers)

    # --- small answers ----------------------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.Response:
        return self._guarded(request) or _json({"object": "list", "data": list(self._cards.values())})

    async def _model(self, request: web.Request) -> web.Response:
        refused = self._guarded(request)
        if refused is not None:
            return refused
        card = self._cards.get(request.match_info["id"])
        return (
            _error(404, "model_not_found", "no such model; GET /v1/models lists them") if card is None else _json(card)
        )

    async def _healthz(self, _request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        refused = self._guarded(request, open_on_loopback=True)
        if refused is not None:
            return refused
        reasons = self.pool.unready(time.monotonic(), time.time())
        if reasons:
            return _json({"status": "unavailable", "upstreams": reasons}, status=503)
        return _json({"status": "ok"})

    async def _metrics(self, request: web.Request) -> web.Response:
        refused = self._guarded(request, open_on_loopback=True)
        if refused is not None:
            return refused
        body, content_type = self._telemetry.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _status(self, request: web.Request) -> web.Response:
        refused = self._guarded(request, open_on_loopback=True)
        if refused is not None:
            return refused
        now = time.monotonic()
        moment = Moment(now, time.time(), now - self._began)
        status = snapshot(self.config, self.pool, self._telemetry, moment, open_requests=self._open)
        body = msgspec.json.encode(status)
        return web.Response(body=body, content_type=JSON_TYPE, headers={"Cache-Control": "no-store"})

    async def _page(self, request: web.Request) -> web.Response:
        refused = self._guarded(request, open_on_loopback=True)
        return refused or web.Response(body=PAGE, headers=PAGE_HEADERS)

    def _guarded(self, request: web.Request, *, open_on_loopback: bool = False) -> web.Response | None:
        failure = self._guard.check(request, open_on_loopback=open_on_loopback)
        if failure is None:
            return None
        return _error(failure.status or 403, failure.code, failure.detail)

    async def _not_found(self, request: web.Request) -> web.Response:
        return _error(404, "not_found", f"nothing is served at {request.method} {request.path[:200]}")


def _place(error: BaseException) -> str:
    """Where an exception was raised; its text may quote what a person wrote, so that is left out."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _json(value: object, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type=JSON_TYPE)


def _error(status: int, code: str, detail: str) -> web.Response:
    body = {"error": {"message": detail, "type": "invalid_request_error", "param": None, "code": code}}
    return _json(body, status=status)


class _id_source:  # noqa: N801 - used like a generator
    """Exchange ids: a random start per process and a count, unique across restarts without a system call each."""

    def __init__(self) -> None:
        self._prefix = f"chatcmpl-rd{secrets.token_hex(5)}"
        self._count = 0

    def __next__(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count:06x}"
