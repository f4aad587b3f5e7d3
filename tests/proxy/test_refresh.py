"""Fresh prices in a whole daemon: fetched, believed or not, in force at once, kept, and never in a request's way."""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from routerd import cli
from routerd.__main__ import main
from routerd.catalog import fresh
from routerd.config import Config, load
from routerd.proxy.refresh import FILE
from routerd.proxy.service import Service
from routerd.proxy.simulated import Answer, Fault, Turn
from routerd.state import open_store
from routerd.state.files import beside, read_bounded, replace_whole
from routerd.telemetry import Telemetry
from tests.fakes import ScriptedUpstream, Upstreams
from tests.feeds import Page, ScriptedFeed, list_body, list_entry, tree_body, tree_entry
from tests.proxy.browser import CHROMIUM, chromium
from tests.proxy.wire import get, listening, streamed
from tests.rig import HELLO, Daemon, post

WAIT_S = 10.0
SOON_S = 0.05  # in place of the hours that a config may ask for
WIRE, NAME = "z-ai/glm-5.3", "openrouter/glm-5.3"  # 1.4 / 4.4 / 0.26 as shipped
FREE, FREE_NAME = "google/gemma-4-31b-it:free", "gemma-4-31b-it:free"
OTHER_FREE = "cohere/north-mini-code:free"
SHIPPED, CHEAPER = 1.4, 0.7
ENTRY = list_entry(WIRE, "0.0000007", "0.0000022", "0.00000013")
GOOD = Page(list_body(ENTRY), etag='"one"')
SLOW = Turn(Answer(text="An answer of some length, with a middle."), Fault("pause", "mid_text", seconds=0.6))


def config_text(
    upstream: ScriptedUpstream | None,
    feed: ScriptedFeed | None,
    *,
    state: str = "memory:",
    more: str = "",
    prices: str = "",
) -> str:
    """A daemon with one provider that has a price list. ``more`` goes into the provider, ``prices`` after all else."""
    url = upstream.base_url if upstream is not None else "http://127.0.0.1:9/v1"
    table = "" if feed is None else f'[prices]\nrefresh = "1h"\nurls = {{ openrouter = "{feed.url}" }}\n'
    return f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "{state}"
[providers.openrouter]
base_url = "{url}"
api_key = "key"
dialect = "chat"
{more}
[routes.auto]
models = ["{NAME}"]
{table}{prices}
"""


class Life(Daemon):
    """A daemon whose prices can be looked at."""

    def __init__(self, service: Service, telemetry: Telemetry, log: io.BytesIO, path: Path) -> None:
        super().__init__(service.urls[0], telemetry, log)
        self.service = service
        self._path = path

    async def reload(self, text: str) -> bool:
        self._path.write_text(text)
        return await self.service.reload()

    async def price(self, name: str = NAME) -> float | None:
        """USD per million tokens of input, as a client is told; None if the model is not offered."""
        cards = (await get(self.url, "/v1/models")).json["data"]
        found = next((card for card in cards if card["id"] == name.partition("/")[2]), None)
        return None if found is None else round(float(found["pricing"]["prompt"]) * 1e6, 6)

    async def until_price(self, price: float | None, name: str = NAME) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.price(name) != price:  # noqa: ASYNC110 - a price announces itself nowhere
                await asyncio.sleep(0.01)

    async def counted(self, result: str, count: int = 1) -> None:
        """Wait until so many refreshes ended like that."""
        await until(lambda: self.refreshes(result) >= count)

    def refreshes(self, result: str, source: str = "openrouter") -> float:
        return self.metric("routerd_price_refreshes_total", source=source, result=result)

    def hurry(self) -> None:
        """Let the list be asked for now, whenever it is due."""
        refresher = self.service._prices
        for source in refresher._sources.values():
            source.due = 0.0
        refresher._woken.set()

    async def status(self) -> dict[str, Any]:
        shown: dict[str, Any] = (await get(self.url, "/status")).json["prices"]
        return shown


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for announces itself nowhere
            await asyncio.sleep(0.01)


def _loaded(path: Path, refresh_s: float) -> Config:
    config = load(path, {})
    if config.prices.refresh_s is None:
        return config
    return msgspec.structs.replace(config, prices=msgspec.structs.replace(config.prices, refresh_s=refresh_s))


@asynccontextmanager
async def living(text: str, folder: Path, *, refresh_s: float = SOON_S) -> AsyncIterator[Life]:
    path = folder / f"life-{time.monotonic_ns()}.toml"
    path.write_text(text)
    config = _loaded(path, refresh_s)
    log = io.BytesIO()
    telemetry = Telemetry(log)
    service = Service(config, open_store(config.state_url, folder), telemetry, load=lambda: _loaded(path, refresh_s))
    async with service:
        yield Life(service, telemetry, log, path)


# --- what is taken up -----------------------------------------------------------------------------------------------


async def test_off_unless_configured(tmp_path: Path) -> None:
    """Without a refresh time nobody is asked, whatever else the table says, and nothing is shown."""
    async with ScriptedFeed(GOOD) as feed:
        text = config_text(None, feed).replace('refresh = "1h"', "")
        async with living(text, tmp_path) as life:
            await asyncio.sleep(SOON_S * 4)

            assert await life.price() == SHIPPED
            assert await life.status() == {}
            assert life.total("routerd_price_refreshes_total") == 0
        assert feed.requests == []


async def test_a_source_without_configured_providers_is_not_asked(tmp_path: Path) -> None:
    """Nobody learns that there is a daemon here from whose list it needs nothing."""
    async with ScriptedFeed(GOOD) as feed, ScriptedFeed(Page(tree_body({}))) as tree:
        prices = f'urls = {{ openrouter = "{feed.url}", "models.dev" = "{tree.url}" }}'
        text = config_text(None, None, prices=f'[prices]\nrefresh = "1h"\n{prices}\n')
        async with living(text, tmp_path) as life:
            await life.counted("fresh")
            await feed.asked(3)

            assert set(await life.status()) == {"openrouter"}
        assert tree.requests == []


async def test_fresh_prices_are_in_force(upstreams: Upstreams, tmp_path: Path) -> None:
    """Cards, status, metrics and the cost of an answer have the new price; nothing but the list was asked for."""
    async with ScriptedFeed(GOOD) as feed, living(config_text(await upstreams(), feed), tmp_path) as life:
        await life.until_price(CHEAPER)
        _, headers, _ = await post(life.url, HELLO)
        upstream = next(one for one in (await get(life.url, "/status")).json["upstreams"] if one["model"] == "glm-5.3")
        shown = (await life.status())["openrouter"]

    assert upstream["usd_per_million"] == {"input": CHEAPER, "output": 2.2, "cached": 0.13}
    assert float(headers["x-routerd-cost-usd"]) > 0
    assert shown["age_s"] < WAIT_S
    assert shown["models"] == 52
    assert shown["result"] in ("fresh", "unchanged")
    assert abs(life.metric("routerd_prices_last_refresh_timestamp_seconds", source="openrouter") - time.time()) < WAIT_S
    assert "Authorization" not in feed.requests[0]


async def test_both_forms(upstreams: Upstreams, tmp_path: Path) -> None:
    """Each provider has the prices of the source that speaks of it."""
    tree = tree_body({"groq": [tree_entry("llama-3.3-70b-versatile", input=0.1, output=0.5)]})
    async with ScriptedFeed(GOOD) as feed, ScriptedFeed(Page(tree)) as other:
        more = f'[providers.groq]\napi_key = "k"\n[prices]\nrefresh = "1h"\n[prices.urls]\nopenrouter = "{feed.url}"\n'
        text = config_text(await upstreams(), None, prices=f'{more}"models.dev" = "{other.url}"\n')
        async with living(text, tmp_path) as life:
            await life.until_price(CHEAPER)
            await life.until_price(0.1, "groq/llama-3.3-70b")


async def test_an_unchanged_list_is_not_sent_again(tmp_path: Path) -> None:
    """The entity tag goes back, a 304 comes, and the prices are as good as new."""
    async with ScriptedFeed(GOOD) as feed, living(config_text(None, feed), tmp_path) as life:
        await life.counted("unchanged", 2)

        assert feed.statuses[:3] == [200, 304, 304]
        assert "If-None-Match" not in feed.requests[0]
        assert feed.requests[1]["If-None-Match"] == GOOD.etag
        assert await life.price() == CHEAPER
        assert life.refreshes("fresh") == 1


async def test_the_users_prices_hold(upstreams: Upstreams, tmp_path: Path) -> None:
    """A price in the config is not touched, nor is what a free tier makes of prices; a model without one is."""
    own = (
        '[providers.openrouter.models]\n"glm-5.3" = { output = 9 }\n"kimi-k3" = { context = 100000 }\n"new/one" = {}\n'
    )
    entries = [
        ENTRY,
        list_entry("moonshotai/kimi-k3", "0.000002", "0.00001"),
        list_entry("new/one", "0.000001", "0.000002"),
    ]
    async with (
        ScriptedFeed(Page(list_body(*entries))) as feed,
        living(config_text(None, feed, more=own), tmp_path) as life,
    ):
        await life.until_price(2.0, "openrouter/kimi-k3")

        assert await life.price() == SHIPPED
        assert await life.price("openrouter/new/one") == 1.0


async def test_a_free_tier_stays_free(tmp_path: Path) -> None:
    """What a list says of paid use does not make a free tier cost anything."""
    entries = [list_entry(OTHER_FREE, "0", "0"), list_entry(FREE, "0.000001", "0.000002")]
    text = config_text(None, None, more='tier = "free"').replace(NAME, FREE_NAME)
    async with ScriptedFeed(Page(list_body(*entries))) as feed:
        text += f'[prices]\nrefresh = "1h"\nurls = {{ openrouter = "{feed.url}" }}\n'
        async with living(text, tmp_path) as life:
            await life.counted("fresh")
            await feed.asked(3)

            assert await life.price(f"openrouter/{FREE_NAME}") == 0.0


# --- what is not believed -------------------------------------------------------------------------------------------

BAD_PAGES = {
    "error": (Page(b'{"error":"down"}', status=500), "failed"),
    "moved": (Page(b"", status=301), "failed"),
    "unasked 304": (Page(b"", status=304), "failed"),
    "cut": (Page(GOOD.body, cut=2000), "failed"),
    "html": (Page(b"<!DOCTYPE html><html></html>"), "rejected"),
    "schema": (Page(b'{"models":[]}'), "rejected"),
    "short": (Page(list_body(ENTRY, fillers=3)), "rejected"),
    "huge": (Page(list_body(ENTRY) + b" " * fresh.MAX_FEED_BYTES), "rejected"),
}


@pytest.mark.parametrize("name", BAD_PAGES)
async def test_a_bad_answer_changes_nothing(name: str, tmp_path: Path) -> None:
    """Before and after a good list: the prices are as they were, it is counted and logged, and asked again."""
    page, result = BAD_PAGES[name]
    async with ScriptedFeed(page) as feed, living(config_text(None, feed), tmp_path) as life:
        await life.counted(result, 2)
        assert await life.price() == SHIPPED
        assert (await life.status())["openrouter"]["age_s"] is None

        feed.then(Page(GOOD.body))
        await life.until_price(CHEAPER)
        feed.then(page)
        seen = life.refreshes(result)
        await life.counted(result, int(seen) + 1)
        assert await life.price() == CHEAPER
        assert (await life.status())["openrouter"]["result"] == result
    assert {"prices not refreshed"} == {line["event"] for line in life.log if line.get("result") == result}


async def test_nobody_there(tmp_path: Path) -> None:
    """A source that cannot be reached is a failure like any other, and the daemon serves."""
    async with ScriptedFeed(GOOD) as feed:
        text = config_text(None, feed)
    async with living(text, tmp_path) as life:
        await life.counted("failed", 2)

        assert (await get(life.url, "/healthz")).status == 200


async def test_failures_are_asked_about_ever_more_seldom(tmp_path: Path) -> None:
    """First after minutes, then after twice as long each time, and at most as seldom as when all is well."""
    async with (
        ScriptedFeed(Page(b"", status=503)) as feed,
        living(config_text(None, feed), tmp_path, refresh_s=1000) as life,
    ):
        for count in range(1, 5):
            life.hurry()
            await life.counted("failed", count)
        waits = [line["again_in_s"] for line in life.log if line.get("result") == "failed"]
        feed.then(GOOD)
        life.hurry()
        await life.until_price(CHEAPER)
        feed.then(Page(b"", status=503))
        life.hurry()
        await life.counted("failed", 5)

        assert waits == [300, 600, 1000, 1000]
        assert life.log[-1]["again_in_s"] == 300


@pytest.mark.parametrize(("prompt", "completion"), [("0.00003", "0.0000044"), ("0", "0"), ("0.00000005", "0.0000001")])
async def test_a_jump_is_not_taken_up(prompt: str, completion: str, tmp_path: Path) -> None:
    """Twenty times dearer or cheaper, or suddenly for nothing: the old price holds, counted and logged."""
    glitch = Page(list_body(list_entry(WIRE, prompt, completion), list_entry("z-ai/glm-5.2", "0.000001", "0.000004")))
    async with ScriptedFeed(glitch) as feed, living(config_text(None, feed), tmp_path) as life:
        await life.until_price(1.0, "openrouter/glm-5.2")

        assert await life.price() == SHIPPED
        assert life.metric("routerd_prices_doubted_total", source="openrouter") >= 1
        line = next(line for line in life.log if line["event"].startswith("prices doubted"))
        assert line["first"][0]["upstream"] == f"openrouter/{WIRE}"


async def test_a_list_that_shrinks_is_not_taken_up(tmp_path: Path) -> None:
    """Half a list is no news of the other half."""
    long, short = list_body(ENTRY, fillers=200), list_body(list_entry(WIRE, "0.000001", "0.000004"), fillers=60)
    async with ScriptedFeed(Page(long)) as feed, living(config_text(None, feed), tmp_path) as life:
        await life.until_price(CHEAPER)
        feed.then(Page(short))
        await life.counted("rejected")

        assert await life.price() == CHEAPER


# --- free models that are gone --------------------------------------------------------------------------------------


async def test_a_free_model_that_is_gone_is_withdrawn_until_it_is_back(tmp_path: Path) -> None:
    """Neither offered nor in a route; said once; and there again with the next list that has it."""
    listed, gone = (Page(list_body(free=free)) for free in ((FREE, OTHER_FREE), (OTHER_FREE,)))
    async with ScriptedFeed(listed) as feed:
        text = config_text(None, feed).replace(f'["{NAME}"]', f'["openrouter/{FREE_NAME}", "{NAME}"]')
        async with living(text, tmp_path) as life:
            await life.counted("fresh")
            assert await life.price(f"openrouter/{FREE_NAME}") == 0.0

            feed.then(gone)
            await life.until_price(None, f"openrouter/{FREE_NAME}")
            route = (await get(life.url, "/status")).json["routes"][0]
            assert [tier["upstreams"] for tier in route["tiers"]] == [[NAME]]

            feed.then(listed)
            await life.until_price(0.0, f"openrouter/{FREE_NAME}")
    events = [(line["event"].partition(":")[0], line["models"]) for line in life.log if "withdrawn" in line["event"]]
    told = [(event, f"openrouter/{FREE_NAME}" in models) for event, models in events]
    assert ("withdrawn", True) in told
    assert ("no longer withdrawn", True) in told


async def test_the_last_of_a_route_stays(upstreams: Upstreams, tmp_path: Path) -> None:
    """A route is never emptied, and who asks for the model by name is led to it: the list may be wrong."""
    async with ScriptedFeed(Page(list_body(free=(OTHER_FREE,)))) as feed:
        text = config_text(await upstreams(Turn()), feed).replace(NAME, f"openrouter/{FREE_NAME}")
        async with living(text, tmp_path) as life:
            await life.until_price(None, f"openrouter/{FREE_NAME}")

            for model in ("auto", FREE_NAME, FREE):
                assert (await post(life.url, {**HELLO, "model": model}))[0] == 200


@pytest.mark.parametrize(
    ("more", "free"),
    [(f'models = ["{FREE_NAME}"]', (OTHER_FREE,)), ("", ())],
    ids=["listed by the user", "no free model at all"],
)
async def test_not_withdrawn(more: str, free: tuple[str, ...], tmp_path: Path) -> None:
    """What the user lists is offered; and a list without one free model is not believed about them."""
    async with (
        ScriptedFeed(Page(list_body(ENTRY, free=free))) as feed,
        living(config_text(None, feed, more=more), tmp_path) as life,
    ):
        await life.until_price(CHEAPER)

        assert await life.price(f"openrouter/{FREE_NAME}") == 0.0


# --- what lasts -----------------------------------------------------------------------------------------------------


async def test_a_restart_keeps_prices_and_their_age(tmp_path: Path) -> None:
    """The next process begins with them, asks for nothing before they are due, and knows the entity tag then."""
    async with ScriptedFeed(GOOD) as feed:
        text = config_text(None, feed, state=f"sqlite:{tmp_path}/routerd.db")
        async with living(text, tmp_path, refresh_s=3600) as life:
            life.hurry()
            await life.until_price(CHEAPER)
        async with living(text, tmp_path, refresh_s=3600) as life:
            assert await life.price() == CHEAPER
            assert 0 < (await life.status())["openrouter"]["age_s"] < WAIT_S
            assert len(feed.requests) == 1
            assert life.service._prices._sources["openrouter"].due - time.monotonic() > 3600 - WAIT_S
        async with living(text, tmp_path) as life:
            await life.counted("unchanged")
            assert feed.requests[1]["If-None-Match"] == GOOD.etag


@pytest.mark.parametrize("content", [b"", b'{"version":1,"feeds":{"openrouter":', b"\xff", b'{"version":9,"feeds":{}}'])
async def test_a_broken_file_is_ignored(content: bytes, tmp_path: Path) -> None:
    """It is said, the shipped prices hold, and the next list replaces it."""
    (tmp_path / FILE).write_bytes(content)
    async with (
        ScriptedFeed(GOOD) as feed,
        living(config_text(None, feed, state=f"sqlite:{tmp_path}/routerd.db"), tmp_path) as life,
    ):
        assert "saved prices are not used" in life.log_text
        await life.until_price(CHEAPER)
    assert fresh.decode((tmp_path / FILE).read_bytes())["openrouter"].etag == GOOD.etag


async def test_an_update_of_the_catalog_wins(tmp_path: Path) -> None:
    """Saved prices that are older than the shipped ones are of no use, nor is their entity tag."""
    async with ScriptedFeed(GOOD) as feed:
        text = config_text(None, feed, state=f"sqlite:{tmp_path}/routerd.db")
        listing = fresh.read(fresh.feeds()["openrouter"], GOOD.body)
        old = fresh.Saved(feed.url, GOOD.etag, 1.7e9, listing)
        (tmp_path / FILE).write_bytes(fresh.encode({"openrouter": old}))
        async with living(text, tmp_path, refresh_s=3600) as life:
            assert await life.price() == SHIPPED
            life.hurry()
            await life.until_price(CHEAPER)

        assert feed.statuses == [200]


async def test_what_another_url_said_is_not_used(tmp_path: Path) -> None:
    """Another mirror, another list: neither its prices nor its entity tag are taken over."""
    state = f"sqlite:{tmp_path}/routerd.db"
    async with (
        ScriptedFeed(GOOD) as feed,
        ScriptedFeed(Page(list_body(ENTRY), etag='"two"')) as other,
        living(config_text(None, feed, state=state), tmp_path) as life,
    ):
        await life.until_price(CHEAPER)
        before = len(other.requests)
        assert await life.reload(config_text(None, other, state=state))
        await other.asked(before + 1)

        assert "If-None-Match" not in other.requests[0]


async def test_a_state_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    """The prices hold as long as the process; it is said that they will not be there after it."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / (FILE + ".new")).mkdir()  # where the new file would be written
    async with (
        ScriptedFeed(GOOD) as feed,
        living(config_text(None, feed, state=f"sqlite:{folder}/routerd.db"), tmp_path) as life,
    ):
        await life.until_price(CHEAPER)
        await until(lambda: "prices cannot be saved" in life.log_text)
    assert not (folder / FILE).exists()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Whoever reads while it is written again and again sees one whole content or the other."""
    path = beside(f"sqlite:{tmp_path}/routerd.db", FILE)
    assert path is not None
    contents = [letter * 100_000 for letter in (b"a", b"b")]
    replace_whole(path, contents[0])
    child = os.fork()
    if child == 0:
        for number in range(200):
            replace_whole(path, contents[number % 2])
        os._exit(0)
    seen = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        seen.add(read_bounded(path, 200_000))

    assert seen <= set(contents)
    assert {file.name for file in tmp_path.iterdir()} == {FILE}
    assert beside("memory:", FILE) is None


# --- reloads and requests -------------------------------------------------------------------------------------------


async def test_a_reload_keeps_fresh_prices(tmp_path: Path) -> None:
    """They are in force from the new config's first moment, and the list is not fetched anew for it."""
    async with ScriptedFeed(GOOD) as feed:
        text = config_text(None, feed)
        async with living(text, tmp_path) as life:
            await life.until_price(CHEAPER)
            assert await life.reload(text.replace("[routes.auto]", '[routes.auto]\ndelivery = "whole"'))

            assert await life.price() == CHEAPER
            assert feed.statuses.count(200) == 1


async def test_a_reload_turns_it_off_and_on(tmp_path: Path) -> None:
    """Without the table the shipped prices are back and nothing is shown; with it the fresh ones are."""
    async with ScriptedFeed(GOOD) as feed:
        on, off = config_text(None, feed), config_text(None, None)
        async with living(off, tmp_path) as life:
            assert await life.reload(on)
            await life.until_price(CHEAPER)
            assert await life.reload(off)

            assert await life.price() == SHIPPED
            assert await life.status() == {}
            series = {sample.name for family in life.registry.collect() for sample in family.samples}
            assert "routerd_prices_last_refresh_timestamp_seconds" not in series


async def test_a_refresh_does_not_read_the_config_again(tmp_path: Path) -> None:
    """Somebody may be in the middle of writing it: it comes into force when it is told to."""
    async with ScriptedFeed(Page(b"", status=500)) as feed, living(config_text(None, feed), tmp_path) as life:
        await life.counted("failed")
        life._path.write_text("[half a")
        feed.then(GOOD)
        await life.until_price(CHEAPER)

        assert life.metric("routerd_config_reloads_total", result="failure") == 0


async def test_open_exchanges_are_not_touched(upstreams: Upstreams, tmp_path: Path) -> None:
    """A stream that began at the old price ends whole; breakers, and what was learned, are those of before."""
    upstream = await upstreams(SLOW)
    async with ScriptedFeed(Page(b"", status=500)) as feed, living(config_text(upstream, feed), tmp_path) as life:
        breaker = next(iter(life.service._in_force.pool._live.values())).breaker
        async with listening(life.url, streamed()) as stream:
            await stream.until(lambda data: b'"content"' in data)
            feed.then(GOOD)
            await life.until_price(CHEAPER)
            heard = await stream.rest()

        assert heard.endswith(b"data: [DONE]\n\n")
        assert next(iter(life.service._in_force.pool._live.values())).breaker is breaker
        assert (await life.status())["openrouter"]["models"] == 52


# --- what the commands show -----------------------------------------------------------------------------------------


async def test_commands_show_fresh_prices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``models``, ``explain`` and ``status`` agree with the daemon; a broken file is said, and does not stop them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    async with ScriptedFeed(GOOD) as feed:
        text = config_text(None, feed, state=f"sqlite:{tmp_path}/routerd.db")
        path = tmp_path / "routerd.toml"
        path.write_text(text)
        async with living(text, tmp_path) as life:
            await life.until_price(CHEAPER)
            await until((tmp_path / FILE).exists)
            status = ["status", "--config", str(path), "--url", life.url]
            assert await asyncio.to_thread(main, status) == cli.EXIT_FINE
            assert "prices of openrouter: 52 models, 0s old" in capsys.readouterr().out
    for command in (["models"], ["explain", NAME]):
        assert await asyncio.to_thread(main, [*command, "--config", str(path), "--json"]) == cli.EXIT_FINE
        assert f'"input": {CHEAPER}' in capsys.readouterr().out
    (tmp_path / FILE).write_bytes(b"garbage")
    assert await asyncio.to_thread(main, ["models", "--config", str(path), "--json"]) == cli.EXIT_FINE
    out, err = capsys.readouterr()
    assert json.loads(out)["refreshed"] == {}
    assert "saved prices are not used" in err


@pytest.mark.real
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
async def test_the_page_says_how_old_prices_are(tmp_path: Path) -> None:
    """One line, with the source, how many models it has, its age, and a last attempt that went wrong."""
    async with (
        ScriptedFeed(GOOD) as feed,
        living(config_text(None, feed), tmp_path) as life,
        chromium(tmp_path / "profile") as browser,
    ):
        await life.until_price(CHEAPER)
        page = await browser.open(f"{life.url}/")
        await page.until("/openrouter: 52 models, \\d+ ?s old/.test(document.querySelector('#catalog').innerText)")
        feed.then(Page(b"", status=500))
        await page.until("document.querySelector('#catalog').innerText.includes('last attempt failed')")

        assert page.complaints == []
