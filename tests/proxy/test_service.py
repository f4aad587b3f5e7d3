"""The daemon's life: a reload swaps everything without touching what is open; a stop loses nothing."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from routerd.config import ConfigError, load
from routerd.proxy.notify import Inherited, Manager
from routerd.proxy.service import IDLE_GRACE_S, Service
from routerd.proxy.simulated import Answer, Fault, Turn
from routerd.state import open_store
from routerd.telemetry import Telemetry
from tests.fakes import Upstreams
from tests.manager import FakeManager
from tests.proxy.wire import CHAT, DONE, error_of, get, hear, listening, streamed
from tests.rig import HELLO, MODEL, Daemon, config_text, post

TEXT = "An answer of some length, so that there is a middle to be in."
WHOLE = Turn(Answer(text=TEXT))
SLOW = Turn(Answer(text=TEXT), Fault("pause", "mid_text", seconds=0.6))
ENDLESS = Turn(Answer(text=TEXT), Fault("stall", "mid_text"))
HANGING = Turn(fault=Fault("stall"))
NO_PROVIDER = '[server]\nlisten = "127.0.0.1:0"\n[state]\nurl = "memory:"\n[providers]\n'
WAIT_S = 10.0


class Life(Daemon):
    """A daemon whose configuration can be rewritten, and which can be stopped before the test is over."""

    def __init__(self, service: Service, telemetry: Telemetry, log: io.BytesIO, path: Path) -> None:
        super().__init__(service.urls[0], telemetry, log)
        self.service = service
        self._path = path

    async def reload(self, text: str) -> bool:
        self._path.write_text(text)
        return await self.service.reload()

    @asynccontextmanager
    async def stopping(self) -> AsyncIterator[asyncio.Task[None]]:
        """Stop it, and go on meanwhile; it has stopped when the context has ended."""
        task = asyncio.ensure_future(self.service.close())
        await asyncio.sleep(0)
        try:
            yield task
        finally:
            async with asyncio.timeout(WAIT_S):
                await task


@asynccontextmanager
async def living(
    text: str, folder: Path, *, manager: Manager | None = None, drain_s: float = WAIT_S
) -> AsyncIterator[Life]:
    """A daemon of this configuration, until the context ends or the test stops it."""
    path = folder / f"life-{time.monotonic_ns()}.toml"
    path.write_text(text)
    config = load(path, {})
    log = io.BytesIO()
    telemetry = Telemetry(log)
    store = open_store(config.state_url, folder)
    service = Service(config, store, telemetry, load=lambda: load(path, {}), manager=manager, drain_s=drain_s)
    async with service:
        life = Life(service, telemetry, log, path)
        yield life


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it is true; fail after a while."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for announces itself nowhere
            await asyncio.sleep(0.01)


def began(data: bytes) -> bool:
    return b'"content"' in data


class TestReload:
    async def test_new_exchanges_use_the_new_config_and_open_ones_keep_the_old(
        self, upstreams: Upstreams, tmp_path: Path
    ) -> None:
        """The open stream ends whole, from where it began; only then are the old connections closed."""
        old, new = await upstreams(SLOW), await upstreams(WHOLE)
        async with (
            living(config_text({"old": old}), tmp_path) as life,
            listening(life.url, streamed()) as stream,
        ):
            await stream.until(began)
            assert await life.reload(config_text({"new": new}))
            status, headers, _ = await post(life.url, HELLO)

            assert (status, headers["x-routerd-provider"]) == (200, "new")
            assert old.open_connections == 1
            assert (await stream.rest()).endswith(DONE)
            await old.until(lambda: old.open_connections == 0)
            assert [line["outcome"] for line in life.exchanges] == ["success", "success"]

    async def test_a_bad_config_changes_nothing_and_every_problem_is_logged(
        self, upstreams: Upstreams, tmp_path: Path
    ) -> None:
        """The old one stays in force, the failure is counted, and a good one mends it."""
        upstream = await upstreams(WHOLE)
        text = config_text({"a": upstream})
        async with living(text, tmp_path) as life:
            took = life.metric("routerd_config_last_reload_success_timestamp_seconds")

            assert not await life.reload(text.replace("[defaults]", '[defaults]\nprefer = "cheep"\nmax_attempts = 0'))
            problems = [line["path"] for line in life.log if line["event"] == "config" and line["level"] == "error"]
            assert problems == ["defaults.prefer", "defaults.max_attempts"]
            assert (await post(life.url, HELLO))[0] == 200
            assert life.metric("routerd_config_reloads_total", result="failure") == 1
            assert life.metric("routerd_config_last_reload_success_timestamp_seconds") == took
            assert await life.reload(text)
            assert life.metric("routerd_config_reloads_total", result="success") == 1
            assert life.metric("routerd_config_last_reload_success_timestamp_seconds") > took

    async def test_a_file_that_is_gone_is_a_bad_config(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """A half-finished edit costs nothing."""
        async with living(config_text({"a": await upstreams(WHOLE)}), tmp_path) as life:
            life._path.unlink()

            assert not await life.service.reload()
            assert (await post(life.url, HELLO))[0] == 200

    @pytest.mark.parametrize(("size", "left"), [(3, 1), (5, 3)], ids=["the same limit", "a larger limit"])
    async def test_what_was_spent_stays_spent(self, upstreams: Upstreams, tmp_path: Path, size: int, left: int) -> None:
        """Of three requests a day two are gone; the new limit counts them, too."""
        upstream = await upstreams(WHOLE)

        def text(requests: int) -> str:
            limits = f'limits = [{{ requests = {requests}, per = "day", resets = "UTC" }}]'
            return config_text({"a": upstream}, defaults='max_wait = "0s"', extra=limits)

        async with living(text(3), tmp_path) as life:
            for _ in range(2):
                await post(life.url, HELLO)
            assert await life.reload(text(size))
            statuses = [(await post(life.url, HELLO))[0] for _ in range(left + 1)]

            assert statuses == [200] * left + [429]

    async def test_a_request_in_flight_counts_in_both_configs(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """What the old config's exchange holds of a limit is not there for the new one's, and is given back to it."""
        upstream = await upstreams(SLOW, WHOLE)
        limits = 'limits = [{ requests = 1, per = "day", resets = "UTC" }]'
        text = config_text({"a": upstream}, defaults='max_wait = "0s"', extra=limits)
        async with living(text, tmp_path) as life, listening(life.url, streamed()) as stream:
            await stream.until(began)
            assert await life.reload(text)

            assert (await post(life.url, HELLO))[0] == 429
            assert (await stream.rest()).endswith(DONE)

    @pytest.mark.parametrize("failures", [1, 2], ids=["the same breakers", "other breakers"])
    async def test_an_open_breaker_stays_open(self, upstreams: Upstreams, tmp_path: Path, failures: int) -> None:
        """What is known to be broken is not tried anew because a line was edited elsewhere."""
        broken, healthy = await upstreams(Turn(fault=Fault("status", status=500))), await upstreams(WHOLE)
        text = config_text({"a": broken, "b": healthy}, defaults="breaker = { failures = 1 }")
        async with living(text, tmp_path) as life:
            await post(life.url, HELLO)
            assert await life.reload(text.replace("failures = 1", f"failures = {failures}"))
            await post(life.url, HELLO)

            assert life.metric("routerd_breaker_state", provider="a", model=MODEL, state="open") == 1
            assert len(broken.requests) == 1

    async def test_latencies_and_budgets_stay_known(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """The estimates of the upstreams and the money spent are the same before and after."""
        upstream = await upstreams(WHOLE)
        text = config_text({"a": upstream}, more='budget = { usd = 1.0, per = "day" }')
        known = {
            "routerd_upstream_latency_estimate_seconds": {"provider": "a", "model": MODEL},
            "routerd_budget_remaining_usd": {"scope": "auto"},
        }
        async with living(text, tmp_path) as life:
            await post(life.url, HELLO)
            before = {name: life.metric(name, **labels) for name, labels in known.items()}
            assert await life.reload(text)
            after = {name: life.metric(name, **labels) for name, labels in known.items()}

            assert before["routerd_budget_remaining_usd"] < 1.0
            assert after == pytest.approx(before, rel=0.01)

    async def test_what_a_config_left_out_is_known_again_to_a_later_one(
        self, upstreams: Upstreams, tmp_path: Path
    ) -> None:
        """A provider that is commented out for a while has not got its daily requests back."""
        a, b = await upstreams(WHOLE), await upstreams(WHOLE)
        limits = 'limits = [{ requests = 1, per = "day", resets = "UTC" }]'
        text = config_text({"a": a}, defaults='max_wait = "0s"', extra=limits)
        async with living(text, tmp_path) as life:
            await post(life.url, HELLO)
            assert await life.reload(config_text({"b": b}))
            assert await life.reload(text)

            assert (await post(life.url, HELLO))[0] == 429

    async def test_those_who_wait_stand_in_one_line(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Whichever config they came in under, they go in the order they came."""
        upstream = await upstreams(WHOLE)
        text = config_text({"a": upstream}, extra='limits = [{ requests = 1, per = "minute" }]')
        async with living(text, tmp_path) as life:
            await post(life.url, HELLO)
            waiting = [asyncio.ensure_future(post(life.url, HELLO))]
            await until(lambda: _waiting(life) == 1)
            assert await life.reload(text)
            waiting.append(asyncio.ensure_future(post(life.url, HELLO)))
            await until(lambda: _waiting(life) == 2)

            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            await until(lambda: _waiting(life) == 0)

    async def test_tokens_are_exchanged(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """A token taken from the file opens nothing from then on."""
        upstream = await upstreams(WHOLE)
        text = config_text({"a": upstream}).replace("[server]", '[server]\ntokens = ["first"]')
        async with living(text, tmp_path) as life:
            first, second = ({"Authorization": f"Bearer {token}"} for token in ("first", "second"))
            assert (await post(life.url, HELLO, headers=first))[0] == 200
            assert await life.reload(text.replace('"first"', '"second"'))

            assert (await post(life.url, HELLO, headers=first))[0] == 401
            assert (await post(life.url, HELLO, headers=second))[0] == 200

    async def test_what_takes_a_restart_is_said(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Addresses, the body limit and the state file stay as they are."""
        text = config_text({"a": await upstreams(WHOLE)})
        async with living(text, tmp_path) as life:
            changed = text.replace('listen = "127.0.0.1:0"', 'listen = "127.0.0.1:1"\nmax_body = "1MiB"')
            assert await life.reload(changed)
            warned = [line["path"] for line in life.log if line["event"] == "config"]

            assert warned == ["server.listen", "server.max_body"]
            assert (await post(life.url, HELLO))[0] == 200

    async def test_simulated_providers_are_replaced(self, tmp_path: Path) -> None:
        """They are servers of this process, and follow the config like everything else."""
        text = NO_PROVIDER + "[providers.first]\nsimulated = true\n"
        async with living(text, tmp_path) as life:
            assert (await post(life.url, HELLO))[1]["x-routerd-provider"] == "first"
            assert await life.reload(text.replace("first", "second"))
            assert (await post(life.url, HELLO))[1]["x-routerd-provider"] == "second"

    async def test_signals_in_a_burst_end_with_the_last_file(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """A signal during a reload is not lost: the file may have changed since it was read."""
        upstream = await upstreams(WHOLE)
        async with living(config_text({"a": upstream}), tmp_path) as life:
            for name in ("b", "c", "d"):
                life._path.write_text(config_text({name: upstream}))
                life.service.reload_soon()
                await asyncio.sleep(0)
            await until(lambda: life.service._reloading is None)

            assert (await post(life.url, HELLO))[1]["x-routerd-provider"] == "d"

    async def test_a_service_without_providers_waits_for_its_first(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """It runs, says that it is not ready and why, makes nothing up, and a reload is all it takes."""
        async with living(NO_PROVIDER, tmp_path) as life:
            refused = await hear(life.url)
            assert (refused.status, error_of(refused)["code"]) == (503, "no_provider")
            assert (await get(life.url, "/readyz")).status == 503
            assert (await get(life.url, "/healthz")).status == 200

            assert await life.reload(config_text({"a": await upstreams(WHOLE)}))
            assert (await get(life.url, "/readyz")).status == 200
            assert (await post(life.url, HELLO))[0] == 200


class TestDrain:
    async def test_an_open_stream_ends_whole(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Not a byte is missing; afterwards nobody listens any more."""
        upstream = await upstreams(SLOW)
        async with (
            living(config_text({"a": upstream}), tmp_path) as life,
            listening(life.url, streamed()) as stream,
        ):
            await stream.until(began)
            async with life.stopping() as stopped:
                data = await stream.rest()

            assert data.endswith(DONE)
            assert TEXT in "".join(_texts(data))
            assert stopped.done()
            with pytest.raises(aiohttp.ClientConnectorError):
                await post(life.url, HELLO)

    async def test_a_request_on_a_kept_connection_is_served_and_is_its_last(
        self, upstreams: Upstreams, tmp_path: Path
    ) -> None:
        """A client that cannot know of the stop gets its answer, and learns of it from the answer."""
        upstream = await upstreams(WHOLE, SLOW, WHOLE)
        async with living(config_text({"a": upstream}), tmp_path) as life, aiohttp.ClientSession() as session:
            first = await session.post(life.url + CHAT, json=HELLO)
            await first.read()
            assert "Connection" not in first.headers
            async with listening(life.url, streamed()) as stream:
                await stream.until(began)
                async with life.stopping():
                    second = await session.post(life.url + CHAT, json=HELLO)

                    assert (second.status, second.headers["Connection"]) == (200, "close")
                    await stream.rest()

    async def test_an_idle_connection_does_not_hold_it_up(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """With nobody to hand it to, it is closed after a moment of quiet."""
        async with (
            living(config_text({"a": await upstreams(WHOLE)}), tmp_path) as life,
            aiohttp.ClientSession() as session,
        ):
            await (await session.post(life.url + CHAT, json=HELLO)).read()
            began_at = time.monotonic()
            async with life.stopping():
                pass

            assert IDLE_GRACE_S <= time.monotonic() - began_at < IDLE_GRACE_S + 1

    async def test_after_the_limit_what_is_open_ends_with_an_error(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """In the protocol and torn where the answer had begun, a plain 503 where it had not; never a clean end."""
        upstream = await upstreams(ENDLESS, HANGING)
        async with (
            living(config_text({"a": upstream}), tmp_path, drain_s=0.3) as life,
            listening(life.url, streamed()) as stream,
        ):
            await stream.until(began)
            waiting = asyncio.ensure_future(hear(life.url))
            await upstream.requested(2)
            async with life.stopping():
                with pytest.raises(aiohttp.ClientPayloadError):
                    await stream.until(lambda _: False)
                refused = await waiting

            assert b"restarting" in stream.data
            assert DONE not in stream.data
            assert (refused.status, error_of(refused)["code"]) == (503, "restarting")
            assert refused.headers["Retry-After"] == "2"
            assert [line["outcome"] for line in life.exchanges] == ["cancelled", "cancelled"]

    async def test_a_second_signal_ends_the_wait(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Whoever presses Ctrl-C twice means it."""
        upstream = await upstreams(ENDLESS)
        async with (
            living(config_text({"a": upstream}), tmp_path) as life,
            listening(life.url, streamed()) as stream,
        ):
            await stream.until(began)
            life.service.stop()
            began_at = time.monotonic()
            async with life.stopping():
                life.service.stop()

            assert time.monotonic() - began_at < 1

    async def test_what_was_learned_is_saved(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """The next process knows which upstream is broken."""
        broken, healthy = await upstreams(Turn(fault=Fault("status", status=500))), await upstreams(WHOLE)
        text = config_text({"a": broken, "b": healthy}, defaults="breaker = { failures = 1 }")
        text = text.replace('"memory:"', f'"sqlite:{tmp_path}/state.db"')
        async with living(text, tmp_path) as life:
            await post(life.url, HELLO)
        async with living(text, tmp_path) as life:
            await post(life.url, HELLO)

            assert len(broken.requests) == 1


class TestUnderAManager:
    async def test_it_says_how_it_is(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Ready once it listens, alive again and again, what it is about, and when it stops."""
        with FakeManager(tmp_path) as manager:
            text = config_text({"a": await upstreams(WHOLE)})
            async with living(text, tmp_path, manager=manager.start(watchdog_s=0.15)):
                assert manager.said("READY") == ["1"]
                assert manager.said("STATUS") == ["1 of 1 upstreams admissible, 0 open exchanges"]
                await until(lambda: len(manager.said("WATCHDOG")) >= 3)
            assert manager.said("STOPPING") == ["1"]

    async def test_a_stuck_loop_starves_the_watchdog(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """The sign of life comes from the loop that serves, so there is none while that is blocked."""
        with FakeManager(tmp_path) as manager:
            text = config_text({"a": await upstreams(WHOLE)})
            async with living(text, tmp_path, manager=manager.start(watchdog_s=0.15)):
                await until(lambda: bool(manager.said("WATCHDOG")))
                heard = len(manager.said("WATCHDOG"))
                time.sleep(0.3)  # noqa: ASYNC251 - that is the point

                assert len(manager.said("WATCHDOG")) == heard

    async def test_a_reload_begins_and_ends(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """With RELOADING and READY, also when the config is bad, which the status then says."""
        with FakeManager(tmp_path) as manager:
            text = config_text({"a": await upstreams(WHOLE)})
            async with living(text, tmp_path, manager=manager.start()) as life:
                manager.hear().clear()
                assert await life.reload(text)
                assert [set(message) for message in manager.hear()] == [
                    {"RELOADING", "MONOTONIC_USEC"},
                    {"READY", "STATUS"},
                ]
                manager.messages.clear()
                assert not await life.reload("nonsense")
                assert manager.said("RELOADING") == manager.said("READY") == ["1"]
                assert "is bad" in manager.said("STATUS")[-1]

    async def test_clients_wait_for_the_next_process(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """While nobody runs, the address still takes connections; whoever comes then is served by the next one."""
        text = config_text({"a": await upstreams(WHOLE)})
        with FakeManager(tmp_path) as manager:
            async with living(text, tmp_path, manager=manager.start()):
                pass
            waiting = asyncio.ensure_future(post(manager.url, HELLO))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            async with living(text, tmp_path, manager=manager.start()):
                assert (await waiting)[0] == 200

    async def test_an_idle_connection_outlives_the_process(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """It is handed over, and a request sent into it while nobody runs is answered by the next process."""
        text = config_text({"a": await upstreams(WHOLE)})
        with FakeManager(tmp_path) as manager:
            async with living(text, tmp_path, manager=manager.start()):
                reader, writer = await asyncio.open_connection(*manager.listening.getsockname())
                writer.write(request())
                assert await answer(reader) == 200
            writer.write(request())
            await asyncio.sleep(0.05)
            async with living(text, tmp_path, manager=manager.start()) as life:
                assert await answer(reader) == 200
                assert manager.said("FDSTOREREMOVE")
                assert not manager.connections
                assert [line["count"] for line in life.log if line["event"] == "connections taken over"] == [1]
                writer.close()

    async def test_a_connection_that_has_said_nothing_yet_is_handed_over_too(
        self, upstreams: Upstreams, tmp_path: Path
    ) -> None:
        """Accepted is not served: its first request may come at any moment."""
        text = config_text({"a": await upstreams(WHOLE)})
        with FakeManager(tmp_path) as manager:
            async with living(text, tmp_path, manager=manager.start()) as life:
                reader, writer = await asyncio.open_connection(*manager.listening.getsockname())
                await until(lambda: bool(life.service._connector.connections))
            async with living(text, tmp_path, manager=manager.start()):
                writer.write(request())
                assert await answer(reader) == 200
                writer.close()

    async def test_a_connection_whose_client_has_left_is_none(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """The manager may still hold it: it is taken, found dead, and closed."""
        text = config_text({"a": await upstreams(WHOLE)})
        with FakeManager(tmp_path) as manager:
            async with living(text, tmp_path, manager=manager.start()) as life:
                _, writer = await asyncio.open_connection(*manager.listening.getsockname())
                await until(lambda: bool(life.service._connector.connections))
            writer.close()
            await writer.wait_closed()
            async with living(text, tmp_path, manager=manager.start()) as life:
                await until(lambda: not life.service._connector.connections)
                assert (await post(life.url, HELLO))[0] == 200

    async def test_an_address_open_to_others_needs_tokens(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """The manager's address is not the config's, so the config's check does not cover it."""
        text = config_text({"a": await upstreams(WHOLE)})
        with socket.create_server(("0.0.0.0", 0)) as open_to_all:
            manager = Manager(inherited=Inherited((open_to_all,)))

            with pytest.raises(ConfigError, match=r"server\.tokens: .*is open to other machines"):
                async with living(text, tmp_path, manager=manager):
                    pass

    async def test_a_reload_may_not_take_the_tokens_from_it(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Else one edit would open it to everybody."""
        text = config_text({"a": await upstreams(WHOLE)})
        guarded = text.replace("[server]", '[server]\ntokens = ["secret"]')
        open_to_all = socket.create_server(("0.0.0.0", 0))
        manager = Manager(inherited=Inherited((open_to_all,)))
        async with living(guarded, tmp_path, manager=manager) as life:
            url = life.url.replace("0.0.0.0", "127.0.0.1")

            assert not await life.reload(text)
            assert (await post(url, HELLO))[0] == 401

    async def test_a_unix_socket_is_inherited_like_any_other(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Its path is shown as where it listens."""
        path = tmp_path / "routerd.sock"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen()
        text = config_text({"a": await upstreams(WHOLE)})
        async with (
            living(text, tmp_path, manager=Manager(inherited=Inherited((listening,)))) as life,
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
        ):
            assert life.url == f"unix:{path}"
            assert (await session.post("http://localhost" + CHAT, json=HELLO)).status == 200


def _waiting(life: Life) -> int:
    """How many stand in the line of the config in force."""
    route = life.service._in_force.pool.route("auto")
    assert route is not None
    return len(route.line)


def request() -> bytes:
    """The greeting, as bytes on a connection that is to be kept."""
    body = json.dumps(HELLO).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


async def answer(reader: asyncio.StreamReader) -> int:
    """Read one whole answer; its status."""
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
    return int(head.split()[1])


def _texts(data: bytes) -> list[str]:
    """The pieces of text in a stream."""
    events: list[dict[str, Any]] = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]
    return [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
