"""Who may ask and what: tokens, names, sizes, models; and the small answers beside the model calls."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from routerd.proxy.simulated import Fault, Turn
from tests.fakes import ScriptedUpstream, Upstreams
from tests.proxy.wire import CHAT, Heard, error_of, get, hear, streamed
from tests.rig import HELLO, KEY, MODEL, TOKEN, config_text, daemon

GUARDED = f'[server]\ntokens = ["{TOKEN}", "another-token"]\nmax_body = "2kB"\nhosts = ["box.lan"]\n'
OPEN_ON_LOOPBACK = ("/healthz", "/readyz", "/metrics")
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def guarded(upstreams: Mapping[str, Any], listen: str = "127.0.0.1:0", **options: str) -> str:
    """A config with tokens, a small body limit and a host name of its own."""
    text = config_text(upstreams, **options)
    return text.replace("[server]\n", GUARDED, 1).replace("127.0.0.1:0", listen)


# --- tokens ---------------------------------------------------------------------------------------------------------

WELCOME: dict[str, dict[str, str]] = {
    "bearer": BEARER,
    "any of them": {"Authorization": "Bearer another-token"},
    "scheme in small letters": {"Authorization": f"bearer {TOKEN}"},
    "x-api-key": {"x-api-key": TOKEN},
}
UNWELCOME: dict[str, dict[str, str]] = {
    "none": {},
    "wrong": {"Authorization": "Bearer no-token-at-all"},
    "empty": {"Authorization": "Bearer "},
    "a part": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "not a bearer": {"Authorization": f"Basic {TOKEN}"},
    "wrong x-api-key": {"x-api-key": "no-token-at-all"},
    "beyond ASCII": {"x-api-key": "clé"},
    "the upstream's": {"Authorization": f"Bearer {KEY}"},
}


@pytest.mark.parametrize("headers", WELCOME.values(), ids=WELCOME)
async def test_token_opens(headers: dict[str, str], upstreams: Upstreams, tmp_path: Path) -> None:
    """Every configured token does, as a bearer token or the way Anthropic's clients send it."""
    async with daemon(guarded({"a": await upstreams()}), tmp_path) as served:
        assert (await hear(served.url, headers=headers)).status == 200
        assert (await get(served.url, "/v1/models", headers)).status == 200


@pytest.mark.parametrize("headers", UNWELCOME.values(), ids=UNWELCOME)
async def test_nobody_else_gets_in(headers: dict[str, str], upstreams: Upstreams, tmp_path: Path) -> None:
    """No model call and no list of models without a token, and no word about what would be right."""
    upstream: ScriptedUpstream = await upstreams()
    async with daemon(guarded({"a": upstream}), tmp_path) as served:
        answers = [
            await hear(served.url, headers=headers),
            await get(served.url, "/v1/models", headers),
            await get(served.url, f"/v1/models/{MODEL}", headers),
        ]

        assert [heard.status for heard in answers] == [401] * 3
        assert {error_of(heard)["code"] for heard in answers} == {"invalid_api_key"}
        assert not upstream.requests
        assert TOKEN not in served.log_text
        assert "no-token-at-all" not in served.log_text


async def test_watching_needs_no_token_on_loopback(upstreams: Upstreams, tmp_path: Path) -> None:
    """Whoever is on this machine may see that it lives and what it counts."""
    async with daemon(guarded({"a": await upstreams()}), tmp_path) as served:
        assert [(await get(served.url, path)).status for path in OPEN_ON_LOOPBACK] == [200] * 3


async def test_without_tokens_loopback_is_open(upstreams: Upstreams, tmp_path: Path) -> None:
    """A config without tokens serves whoever asks, with whatever key."""
    async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
        assert (await hear(served.url)).status == 200
        assert (await hear(served.url, headers={"Authorization": "Bearer anything"})).status == 200


def _address() -> str:
    """An address of this machine that is not loopback, empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        found = str(probe.getsockname()[0])
    return "" if found.startswith("127.") else found


async def test_from_other_machines_all_but_life_needs_a_token(upstreams: Upstreams, tmp_path: Path) -> None:
    """On an address that others can reach, only ``/healthz`` answers everybody."""
    address = _address()
    if not address:
        pytest.skip("this machine has no address beyond loopback")
    async with daemon(guarded({"a": await upstreams()}, listen="0.0.0.0:0"), tmp_path) as served:
        url = f"http://{address}:{served.url.rpartition(':')[2]}"

        assert [(await get(url, path)).status for path in OPEN_ON_LOOPBACK] == [200, 401, 401]
        assert [(await get(url, path, BEARER)).status for path in OPEN_ON_LOOPBACK] == [200] * 3
        assert (await hear(url)).status == 401
        assert (await hear(url, headers=BEARER)).status == 200


# --- names ----------------------------------------------------------------------------------------------------------

OWN_HOSTS = ("127.0.0.1", "localhost", "LOCALHOST:8080", "[::1]:8080", "hermes.localhost", "box.lan", "Box.LAN:8080")
FOREIGN_HOSTS = ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1")


@pytest.mark.parametrize("host", OWN_HOSTS)
async def test_own_names_are_known(host: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """Loopback under any of its names, and what the config adds."""
    async with daemon(guarded({"a": await upstreams()}), tmp_path) as served:
        assert (await get(served.url, "/v1/models", BEARER | {"Host": host})).status == 200


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_foreign_names_are_refused(host: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """A page whose name was re-pointed at loopback still says its own name, and learns nothing: token or not."""
    async with daemon(guarded({"a": await upstreams()}), tmp_path) as served:
        headers = BEARER | {"Host": host}
        answers = [await hear(served.url, headers=headers)]
        answers += [await get(served.url, path, headers) for path in ("/v1/models", "/metrics", "/readyz")]

        assert [heard.status for heard in answers] == [403] * 4
        assert {error_of(heard)["code"] for heard in answers} == {"bad_host"}


async def test_pages_of_other_sites_are_refused(upstreams: Upstreams, tmp_path: Path) -> None:
    """A browser says where a post comes from; only pages of this very server may."""
    upstream: ScriptedUpstream = await upstreams()
    async with daemon(config_text({"a": upstream}), tmp_path) as served:
        own = await hear(served.url, headers={"Origin": served.url})
        foreign = [await hear(served.url, headers={"Origin": origin}) for origin in ("https://evil.example", "null")]

        assert own.status == 200
        assert [heard.status for heard in foreign] == [403, 403]
        assert "access-control-allow-origin" not in {name.lower() for name in own.headers}
        assert len(upstream.requests) == 1


# --- bodies ---------------------------------------------------------------------------------------------------------

BAD_BODIES: dict[str, tuple[bytes, int, str]] = {
    "too large": (json.dumps(HELLO | {"user": "x" * 2000}).encode(), 413, "request_too_large"),
    "empty": (b"", 400, "invalid_request"),
    "not JSON": (b"hello", 400, "invalid_request"),
    "cut off": (json.dumps(HELLO).encode()[:-1], 400, "invalid_request"),
    "a list": (b"[]", 400, "invalid_request"),
    "no model": (b'{"messages": [{"role": "user", "content": "Hello."}]}', 400, "invalid_request"),
    "a model that is no name": (b'{"model": 5, "messages": []}', 400, "invalid_request"),
    "no messages": (b'{"model": "auto"}', 400, "invalid_request"),
    "deep": (b'{"model": "auto", "messages": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "invalid_request"),
}


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES.values(), ids=BAD_BODIES)
async def test_body_nobody_can_serve(body: bytes, status: int, code: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """It is refused here, in OpenAI's shape, counted under ``other``, and no upstream hears of it."""
    upstream: ScriptedUpstream = await upstreams()
    async with daemon(guarded({"a": upstream}), tmp_path) as served:
        heard = await hear(served.url, body, headers=BEARER)

        assert heard.status == status
        assert error_of(heard)["code"] == code
        assert error_of(heard)["type"] == "invalid_request_error"
        assert heard.headers["Content-Type"].startswith("application/json")
        assert not upstream.requests
        labels = {"route": "other", "dialect": "chat", "outcome": "client_error"}
        assert served.metric("routerd_exchanges_total", **labels) == 1
        assert served.exchanges[0]["status"] == status
        assert served.exchanges[0]["exchange"] == heard.headers["x-routerd-exchange"]


async def test_large_body_within_the_limit(upstreams: Upstreams, tmp_path: Path) -> None:
    """Ten megabytes of history reach the upstream as they are."""
    upstream: ScriptedUpstream = await upstreams()
    big = HELLO | {"model": MODEL, "messages": [{"role": "user", "content": "Data: " + "x" * 10_000_000}]}
    text = config_text({"a": upstream}).replace("context = 131072", "context = 10_000_000")
    async with daemon(text, tmp_path) as served:
        heard = await hear(served.url, big)

        assert heard.status == 200
        assert upstream.requests[0].body["messages"] == big["messages"]


# --- models ---------------------------------------------------------------------------------------------------------


async def test_unknown_model(upstreams: Upstreams, tmp_path: Path) -> None:
    """404 in the words clients know, with the names that come near; an invented name is no label anywhere."""
    async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
        heard = await hear(served.url, HELLO | {"model": "modell"})

        assert heard.status == 404
        assert error_of(heard)["code"] == "model_not_found"
        assert error_of(heard)["type"] == "invalid_request_error"
        assert "'modell'" in error_of(heard)["message"]
        assert "near it: model" in error_of(heard)["message"]
        assert served.metric("routerd_exchanges_total", route="other", dialect="chat", outcome="client_error") == 1
        assert "modell" not in served.log_text


async def test_invented_models_make_no_series(upstreams: Upstreams, tmp_path: Path) -> None:
    """However many names a client makes up, the number of time series stays what it is."""
    async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
        await hear(served.url)
        await hear(served.url, HELLO | {"model": "invented"})
        before = (await get(served.url, "/metrics")).data
        for number in range(50):
            await hear(served.url, HELLO | {"model": f"invented-{number}"})
        after = (await get(served.url, "/metrics")).data

        assert len(after.splitlines()) == len(before.splitlines())
        assert b"invented" not in after


@pytest.mark.parametrize("name", ["auto", MODEL, f"a/{MODEL}", f"b/{MODEL}", MODEL.upper()])
async def test_names_a_client_may_use(name: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """A route, a model, a model pinned to its provider, and in any case; the upstream hears its own name for it."""
    both: dict[str, ScriptedUpstream] = {"a": await upstreams(), "b": await upstreams()}
    async with daemon(config_text(both), tmp_path) as served:
        heard = await hear(served.url, HELLO | {"model": name})

        assert heard.status == 200
        provider = heard.headers["x-routerd-provider"]
        assert provider == {"auto": "a", f"a/{MODEL}": "a", f"b/{MODEL}": "b"}.get(name, provider)
        assert [request.body["model"] for request in both[provider].requests] == [MODEL]


async def test_pinned_model_stays_where_it_is_pinned(upstreams: Upstreams, tmp_path: Path) -> None:
    """Who names a provider wants that one: its failure is told, not hidden by another's answer."""
    faulty, other = await upstreams(Turn(fault=Fault("status", status=500))), await upstreams()
    async with daemon(config_text({"a": faulty, "b": other}, defaults='max_wait = "0s"'), tmp_path) as served:
        heard = await hear(served.url, HELLO | {"model": f"a/{MODEL}"})

        assert heard.status == 503
        assert not other.requests


CARDS = """
[providers.a]
base_url = "http://127.0.0.1:1/v1"
api_key = "k"
[providers.a.models]
"large" = { context = 1000000, max_output = 64000, input = 0.435, output = 0.87, cached = 0.0036 }
"small" = { context = 128000, max_output = 8192, input = 3, output = 15 }
"free" = { context = 65536 }
[routes.auto]
models = [["large", "small"], "free"]
"""


async def test_model_cards(tmp_path: Path) -> None:
    """Every card has just what agents look for; a route promises no more than all of its first tier can do."""
    async with daemon('[server]\nlisten = "127.0.0.1:0"\n[state]\nurl = "memory:"\n' + CARDS, tmp_path) as served:
        listed = (await get(served.url, "/v1/models")).json
        single = await get(served.url, "/v1/models/large")

        cards = {card["id"]: card for card in listed["data"]}
        assert listed["object"] == "list"
        assert list(cards) == ["auto", "large", "small", "free"]
        assert {frozenset(card) for card in cards.values()} == {
            frozenset(
                ("id", "object", "created", "owned_by", "context_length", "max_completion_tokens", "pricing"),
            )
        }
        assert single.json == cards["large"]
        assert cards["large"]["object"] == "model"
        assert isinstance(cards["large"]["created"], int)
        assert cards["large"]["owned_by"] == "a"
        assert cards["large"]["pricing"] == {
            "prompt": "0.000000435",
            "completion": "0.00000087",
            "input_cache_read": "0.0000000036",
        }
        assert (cards["auto"]["context_length"], cards["auto"]["max_completion_tokens"]) == (128000, 8192)
        assert (cards["free"]["context_length"], cards["free"]["pricing"]["prompt"]) == (65536, "0")


@pytest.mark.parametrize("name", ["nothing", "a/nothing", "large%2Fmore", "..", "auto/"])
async def test_no_such_card(name: str, tmp_path: Path) -> None:
    """404 in JSON, like everything that is not there."""
    async with daemon('[server]\nlisten = "127.0.0.1:0"\n[state]\nurl = "memory:"\n' + CARDS, tmp_path) as served:
        heard = await get(served.url, f"/v1/models/{name}")

        assert heard.status == 404
        assert error_of(heard)["code"] in ("model_not_found", "not_found")


# --- paths ----------------------------------------------------------------------------------------------------------

PROBES = ("/api/v1/models", "/api/tags", "/props", "/v1/props", "/version", "/api/show", "/v1", "/v1/embeddings")


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"])
async def test_nothing_is_served_elsewhere(method: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """A friendly answer to a foreign path would make an agent take this for another kind of server: 404 at once."""
    async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
        answers = [await hear(served.url, None, path=path, method=method) for path in PROBES]

        assert [heard.status for heard in answers] == [404] * len(PROBES)
        assert all(heard.headers["Content-Type"].startswith("application/json") for heard in answers)
        if method != "HEAD":
            assert {error_of(heard)["code"] for heard in answers} == {"not_found"}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
async def test_known_path_with_another_method(method: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """Is as little served as an unknown path, and lets no other site's page in."""
    async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
        heard = await hear(served.url, None, path=CHAT, method=method)

        assert heard.status in (404, 405)
        assert heard.headers["Content-Type"].startswith("application/json")
        assert "Access-Control-Allow-Origin" not in heard.headers


async def test_head_of_the_small_answers(upstreams: Upstreams, tmp_path: Path) -> None:
    """Monitors ask for heads: the same status, no body."""
    async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
        answers = [await hear(served.url, None, path=path, method="HEAD") for path in (*OPEN_ON_LOOPBACK, "/v1/models")]

        assert [(heard.status, heard.data) for heard in answers] == [(200, b"")] * 4


async def test_one_connection_serves_many(upstreams: Upstreams, tmp_path: Path) -> None:
    """Refusals, answers and streams follow each other on a kept-alive connection."""
    async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(connector=connector) as session:
            ports, statuses = set(), []
            for body in (HELLO, HELLO | {"model": "nothing"}, streamed(), {}, HELLO):
                async with session.post(served.url + CHAT, json=body) as reply:
                    assert reply.connection is None or reply.connection.transport is not None
                    if reply.connection is not None and reply.connection.transport is not None:
                        ports.add(reply.connection.transport.get_extra_info("sockname"))
                    statuses.append(reply.status)
                    await reply.read()

        assert statuses == [200, 404, 200, 400, 200]
        assert len(ports) <= 1


# --- metrics --------------------------------------------------------------------------------------------------------


def _parsed(parser: Callable[[str], Iterable[Metric]], heard: Heard) -> list[Metric]:
    """The families of an exposition, if it is one."""
    return list(parser(heard.data.decode()))


async def test_metrics_in_both_formats(upstreams: Upstreams, tmp_path: Path) -> None:
    """Plain text for every scraper, OpenMetrics for one that asks; both parse and hold what the contract names."""
    async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
        await hear(served.url)
        plain = await get(served.url, "/metrics")
        modern = await get(served.url, "/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"})

        assert plain.headers["Content-Type"].startswith("text/plain")
        assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
        families = {family.name for family in _parsed(read_text, plain)}
        assert families >= {family.name for family in _parsed(read_openmetrics, modern)} - {"routerd_build"}
        assert families >= {"routerd_exchanges", "routerd_attempts", "routerd_breaker_state", "routerd_cost_usd"}


async def test_secrets_are_nowhere(upstreams: Upstreams, tmp_path: Path) -> None:
    """Neither keys nor tokens nor what was said show in any answer, in the log or in the metrics."""
    upstream: ScriptedUpstream = await upstreams(Turn(fault=Fault("status", status=401)))
    private = "a prompt that is nobody's business"
    async with daemon(guarded({"a": upstream}, defaults='max_wait = "0s"'), tmp_path) as served:
        asked = HELLO | {"messages": [{"role": "user", "content": private}]}
        answers: list[Heard] = [await hear(served.url, asked, headers=BEARER), await hear(served.url, asked)]
        answers += [await get(served.url, path) for path in (*OPEN_ON_LOOPBACK, "/nothing")]

        everything = served.log_text + "".join(f"{heard.headers} {heard.data.decode()}" for heard in answers)
        assert answers[0].status == 503
        for secret in (KEY, TOKEN, "another-token", private):
            assert secret not in everything
