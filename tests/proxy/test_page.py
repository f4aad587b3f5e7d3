"""The status page in a real browser: what it shows when all is well and when not, by day and night, on a phone."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from routerd.proxy.simulated import Fault, Turn
from tests.fakes import ScriptedUpstream
from tests.proxy.browser import CHROMIUM, Page, Scheme, chromium
from tests.rig import HELLO, Daemon, daemon, post, provider

pytestmark = [
    pytest.mark.real,
    pytest.mark.xdist_group("chromium"),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]

AXE = "axe-core@4.10.3"
NIGHT = {"model": "night", "stream": True, "messages": HELLO["messages"]}
HELD = 3
PHONE, DESK = 390, 1280
LOOKS: tuple[tuple[int, Scheme], ...] = ((DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark"))


def _config(broken: ScriptedUpstream, refused: ScriptedUpstream, good: ScriptedUpstream) -> str:
    """Four routes: one falls back, one waits, one has nobody, one is well."""
    providers = (
        provider("broken", broken.base_url, model="large").replace("131072", "32000"),
        provider("refused", refused.base_url, model="medium"),
        provider(
            "fine", good.base_url, model="large", extra='limits = [{ requests = 5, per = "day", resets = "UTC" }]'
        ),
        provider("scarce", good.base_url, model="small", extra='limits = [{ requests = 1, per = "hour" }]'),
    )
    return f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "memory:"
[defaults]
max_wait = "2h"
breaker = {{ failures = 1, open = "300s" }}
[routes.auto]
models = ["broken/large", "refused/medium", "fine/large"]
budget = {{ usd = 0.001, per = "day", resets = "UTC" }}
[routes.night]
models = ["scarce/small"]
[routes.alone]
models = ["refused/medium"]
[routes.well]
models = ["fine/large"]
{"".join(providers)}
"""


@asynccontextmanager
async def _well(tmp_path: Path) -> AsyncIterator[tuple[Daemon, Page]]:
    """A daemon without trouble, and the page that shows it."""
    async with (
        ScriptedUpstream() as good,
        daemon(_config(good, good, good), tmp_path) as served,
        chromium(tmp_path / "profile") as browser,
    ):
        page = await browser.open(f"{served.url}/")
        await page.until(_row_says("routes", "auto", "serving"))
        yield served, page


@asynccontextmanager
async def _trouble(tmp_path: Path) -> AsyncIterator[tuple[Daemon, Page]]:
    """A daemon in trouble, and the page that shows it."""
    async with AsyncExitStack() as stack:
        broken, refused, good = [
            await stack.enter_async_context(ScriptedUpstream(turn)) for turn in (_status(503), _status(401), Turn())
        ]
        served = await stack.enter_async_context(daemon(_config(broken, refused, good), tmp_path))
        browser = await stack.enter_async_context(chromium(tmp_path / "profile"))
        page = await browser.open(f"{served.url}/")
        await page.until(_row_says("routes", "auto", "serving"))
        for _ in range(4):
            await post(served.url, HELLO | {"max_tokens": 10})
        held = [asyncio.ensure_future(post(served.url, NIGHT)) for _ in range(HELD + 1)]
        stack.push_async_callback(_give_up, held)
        await page.until(_row_says("routes", "night", f"{HELD} for a quota"))
        yield served, page


def _status(status: int) -> Turn:
    return Turn(fault=Fault("status", status=status))


async def _give_up(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _row_says(table: str, name: str, words: str) -> str:
    """JavaScript: the row of that name has these words."""
    said = f"row.innerText.startsWith({json.dumps(name)}) && row.innerText.includes({json.dumps(words)})"
    return f"[...document.querySelectorAll('#{table} tbody tr')].some((row) => {said})"


def _save(path: Path, picture: bytes) -> None:
    path.write_bytes(picture)


async def _says(page: Page, table: str, name: str, *words: str) -> None:
    for one in words:
        await page.until(_row_says(table, name, one))


async def test_all_is_well(tmp_path: Path) -> None:
    """Everything is listed as serving and ready, nothing is out of the ordinary, and nothing else is asked for."""
    async with _well(tmp_path) as (served, page):
        await page.until(_row_says("routes", "well", "serving"))

        assert "every route is serving" in await page.text("#verdict")
        assert await page.evaluate("document.title") == "routerd"
        for model in ("large", "medium", "small"):
            await _says(page, "upstreams", model, "ready")
        await _says(page, "quotas", "fine: requests/day", "5 of 5 left")
        assert "None since the start" in await page.text("#failovers")
        assert {f"{served.url}/", f"{served.url}/status"} == set(page.requests)
        assert page.complaints == []


async def test_trouble_is_shown_with_its_reasons(tmp_path: Path) -> None:
    """Breakers, a refused key, quotas, a budget, who waits for what and how long, and what became of each failure."""
    async with _trouble(tmp_path) as (_, page):
        await page.until("document.querySelector('#verdict').innerText.includes('down: night, alone; 3 waiting')")

        await _says(page, "routes", "auto", "fallback only", "✕broken/large", "fine/large", " of $0.001 left")
        await _says(page, "routes", "night", "down", "next try in ", "longest wait")
        await _says(page, "routes", "alone", "down")
        await _says(page, "upstreams", "large\nbroken", "breaker open", "next try in ")
        await _says(page, "upstreams", "medium", "breaker open", "its key, for all models")
        await _says(page, "upstreams", "small", "quota used up", "requests/hour")
        await _says(page, "quotas", "fine: requests/day", "1 of 5 left", "in ")
        await _says(page, "spent", "broken/large", "$0.00")
        await _says(page, "failovers", "auto", "refused/medium", "unauthorized", "HTTP 401", "fine/large")
        assert "its window is 32000 tokens" in await page.text("#warnings")
        assert (await page.evaluate("document.title")).startswith("✕ routerd: down: night, alone")
        assert page.complaints == []


async def test_changes_are_announced(tmp_path: Path) -> None:
    """Whoever does not see the page hears of each change of a state, and of nothing else."""
    async with _trouble(tmp_path) as (_, page):
        news = await page.text("#news")

        assert await page.evaluate("document.querySelector('#news').ariaLive") == "polite"
        assert "Route night: down." in news
        assert "scarce/small: quota used up." in news
        assert "well" not in news


async def test_it_fits_the_screen(tmp_path: Path) -> None:
    """By day and by night, on a phone and on a desk, nothing sticks out to the side."""
    async with _trouble(tmp_path) as (_, page):
        for width, scheme in LOOKS:
            await page.look(width=width, scheme=scheme)
            _save(tmp_path / f"trouble-{width}-{scheme}.png", await page.picture())

            assert await page.evaluate("document.documentElement.scrollWidth") == width
            ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (min(map(int, ground[4:-1].split(","))) > 128) == (scheme == "light")


async def test_no_answer_is_told(tmp_path: Path) -> None:
    """A daemon that stops is not mistaken for one that is well; when it is back the page goes on by itself."""
    async with ScriptedUpstream() as good, chromium(tmp_path / "profile") as browser:
        text = _config(good, good, good)
        async with daemon(text, tmp_path) as served:
            page = await browser.open(f"{served.url}/")
            await page.until(_row_says("routes", "auto", "serving"))
        await page.until("!document.querySelector('#lost').hidden")

        assert "no answer" in await page.text("#verdict")
        assert "This is how it was at" in await page.text("#lost")

        port = served.url.rpartition(":")[2]
        async with daemon(text.replace("127.0.0.1:0", f"127.0.0.1:{port}"), tmp_path):
            await page.until("document.querySelector('#lost').hidden")

            assert "every route is serving" in await page.text("#verdict")


async def test_it_rests_while_nobody_looks(tmp_path: Path) -> None:
    """Behind another tab it asks for nothing; looked at again, it asks at once."""
    async with _well(tmp_path) as (_, page):
        await page.evaluate(_LOOK.replace("HIDDEN", "true"))
        before = len(page.requests)
        await page.evaluate("new Promise((resolve) => setTimeout(resolve, 3 * EVERY_MS))")

        assert before == len(page.requests)

        await page.evaluate(_LOOK.replace("HIDDEN", "false"))
        assert before + 1 == len(page.requests)


_LOOK = """
Object.defineProperty(document, "hidden", { configurable: true, get: () => HIDDEN });
document.dispatchEvent(new Event("visibilitychange"));
"""


@pytest.fixture(scope="session")
def axe(pytestconfig: pytest.Config) -> str:
    """The source of axe-core, the accessibility checker, from the npm registry."""
    folder = (
        Path(pytestconfig.cache.mkdir("axe-core")) if pytestconfig.cache else pytest.skip("there is no cache folder")
    )
    script = folder / f"{AXE}.js"
    if not script.exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed: axe-core cannot be had")
        packed = subprocess.run(
            ["npm", "pack", "--silent", AXE], check=False, cwd=folder, capture_output=True, text=True, timeout=90
        )
        if packed.returncode:
            pytest.skip("the npm registry cannot be reached: axe-core cannot be had")
        archive = folder / packed.stdout.split()[-1]
        source = subprocess.run(["tar", "-xzOf", archive, "package/axe.min.js"], capture_output=True, check=True)
        script.write_bytes(source.stdout)
    return script.read_text()


async def test_it_is_accessible(axe: str, tmp_path: Path) -> None:
    """axe-core finds nothing, in any look: names, roles, landmarks, headings, contrast."""
    async with _trouble(tmp_path) as (_, page):
        await page.evaluate(axe)
        for width, scheme in LOOKS:
            await page.look(width=width, scheme=scheme)
            report = json.loads(await page.evaluate("axe.run().then((report) => JSON.stringify(report))"))

            assert [(one["id"], one["nodes"][0]["html"]) for one in report["violations"]] == []
            assert len(report["passes"]) > 15
