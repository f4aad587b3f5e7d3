"""Fresh prices: fetched now and then, kept on disk, handed to whoever takes them up.

Theory of operation
-------------------
* One task, whatever is configured. It sleeps until the next source is due, or until another config is taken up.
* A source is due ``refresh_s`` after it was last heard, also over a restart: the file has the time. Each wait is
  lengthened by a random part, so that daemons that began together do not ask together. After a failure it is asked
  again soon, then more and more seldom, never more often than when all is well.
* What is fetched is conditional: with the entity tag of what is kept, an unchanged list costs a few hundred bytes.
* A listing is kept as it was believed (``catalog/fresh.py``), in one file beside the state; without such a place, in
  memory. A file that cannot be read or written costs the prices a restart, and a warning, nothing else.
* Nothing that goes wrong here touches a request: old prices stay, their age grows, and that is shown.
* What another URL said, or what is older than the shipped prices (after an update), is not used.

The body comes from a stranger. It is bounded, decoded off the loop, and nothing but numbers for models that are
configured leaves it: no name of it becomes a route or a label.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from routerd import catalog
from routerd.catalog import fresh
from routerd.catalog.fresh import Doubt, Feed, FeedRefused, Listing, Saved
from routerd.config import Config
from routerd.proxy.client import Client, ConnectFailed, ConnectionTorn, Reply, Target
from routerd.proxy.repricing import Repriced, repriced, sources
from routerd.state.files import beside, read_bounded, replace_whole
from routerd.telemetry import Telemetry

FILE = "prices.json"
FETCH_LIMIT_S = 60.0  # for all of it
RETRY_S = 300.0  # after the first failure; doubled after each further one, up to the usual time
SPREAD = 0.1  # a wait is longer by up to this part of it
FIRST_SPREAD_S = 3.0  # the first one of a process
DOUBTS_SHOWN = 5  # in one log line
HEADERS = {"Accept": "application/json", "Accept-Encoding": "gzip"}


class _Failed(Exception):
    """No listing, and nothing said about the one that is kept. The text says why, in our own words."""


class SavedUnusable(Exception):
    """There are saved prices, and they cannot be used. The text says why."""


def at_saved_prices(config: Config, state_url: str) -> tuple[Config, dict[str, float]]:
    """The config as a daemon with this state would begin, and the time of each source. Raises SavedUnusable."""
    usable = _usable(_read_saved(beside(state_url, FILE)), sources(config))
    return repriced(config, _listings(usable)).config, {source: saved.checked_at for source, saved in usable.items()}


def _read_saved(path: Path | None) -> dict[str, Saved]:
    if path is None:
        return {}
    try:
        content = read_bounded(path, fresh.MAX_SAVED_BYTES)
        return {} if content is None else fresh.decode(content)
    except OSError as error:
        raise SavedUnusable(f"saved prices cannot be read: {error}") from None
    except FeedRefused as error:
        raise SavedUnusable(f"saved prices are not used: {path} {error}") from None


def _usable(saved: Mapping[str, Saved], wanted: Mapping[str, str]) -> dict[str, Saved]:
    """What the wanted URLs said, unless the shipped prices are younger."""
    known = catalog.load()
    return {
        source: one for source, one in saved.items() if wanted.get(source) == one.url and not fresh.outdated(one, known)
    }


def _listings(saved: Mapping[str, Saved]) -> dict[str, Listing]:
    return {source: one.listing for source, one in saved.items()}


class _Source:
    """One feed, as it is configured now."""

    __slots__ = ("due", "failures", "feed", "target", "url")

    def __init__(self, feed: Feed, url: str, due: float) -> None:
        self.feed = feed
        self.url = url
        self.target = Target(url, HEADERS, method="GET")
        self.due = due  # monotonic seconds
        self.failures = 0  # in a row

    def __repr__(self) -> str:
        return f"<Source {self.feed.id}, due in {self.due - time.monotonic():.0f} s, failed {self.failures} times>"


class Refresher:
    """Keeps price lists fresh. ``take_up`` is for every config that comes into force, ``adopt`` called with news."""

    def __init__(self, state_url: str, telemetry: Telemetry, adopt: Callable[[], Awaitable[None]]) -> None:
        self._path = beside(state_url, FILE)
        self._telemetry = telemetry
        self._adopt = adopt
        self._saved: dict[str, Saved] | None = None  # None: the file has not been read yet
        self._sources: dict[str, _Source] = {}
        self._refresh_s = 0.0
        self._withdrawn: tuple[str, ...] = ()
        self._woken = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Refresher {list(self._sources.values())}>"

    # --- for the config -------------------------------------------------------------------------------------------

    async def priced(self, config: Config) -> Repriced:
        """The config at the prices that are known now."""
        wanted = sources(config)
        if not wanted:
            return Repriced(config)
        if self._saved is None:
            self._saved = await asyncio.to_thread(self._restored)
        return repriced(config, _listings(self._kept(wanted)))

    def take_up(self, base: Config, priced: Repriced) -> None:
        """``base`` is in force now, at the prices of ``priced``."""
        self._tell_withdrawn(priced.withdrawn)
        wanted = sources(base)
        self._refresh_s = base.prices.refresh_s or 0.0
        self._sources = {source: self._source(source, url) for source, url in wanted.items()}
        self._telemetry.watch_prices(tuple(wanted))
        for source, saved in self._kept(wanted).items():
            self._telemetry.prices_known(source, saved.listing.models, saved.checked_at)
        self._woken.set()

    def _kept(self, wanted: Mapping[str, str]) -> dict[str, Saved]:
        return _usable(self._saved or {}, wanted)

    def _source(self, source: str, url: str) -> _Source:
        """The one there is, if nothing about it has changed; its time is counted anew."""
        feed, now = fresh.feeds()[source], time.monotonic()
        former = self._sources.get(source)
        one = former if former is not None and former.url == url else _Source(feed, url, now)
        if one.failures:
            return one
        saved = self._kept({source: url}).get(source)
        age_s = self._refresh_s if saved is None else max(0.0, time.time() - saved.checked_at)
        left_s = self._refresh_s - age_s
        spread_s = self._refresh_s * SPREAD if left_s > 0 else min(FIRST_SPREAD_S, self._refresh_s * SPREAD)
        one.due = now + max(0.0, left_s) + spread_s * random.random()
        return one

    def _tell_withdrawn(self, withdrawn: tuple[str, ...]) -> None:
        gone = [name for name in withdrawn if name not in self._withdrawn]
        back = [name for name in self._withdrawn if name not in withdrawn]
        if gone:
            self._telemetry.log.warning("withdrawn: their provider no longer lists these free models", models=gone)
        if back:
            self._telemetry.log.info("no longer withdrawn", models=back)
        self._withdrawn = withdrawn

    # --- the task ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Refresh for as long as the context lasts."""
        task = asyncio.ensure_future(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:
            await self._until_due()
            now = time.monotonic()
            due = [source for source in self._sources.values() if source.due <= now]
            changes = [await self._refresh(source) for source in due]
            if any(changes):
                await self._adopt()

    async def _until_due(self) -> None:
        self._woken.clear()
        due = min((source.due for source in self._sources.values()), default=None)
        wait_s = None if due is None else max(0.0, due - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._woken.wait()

    async def _refresh(self, source: _Source) -> bool:
        """True if there is something new to take up."""
        name, log = source.feed.id, self._telemetry.log
        before = self._kept({name: source.url}).get(name)
        try:
            saved, doubts = await self._fetch(source, before)
        except _Failed as error:
            self._put_off(source, "failed", str(error))
            return False
        except FeedRefused as error:
            self._put_off(source, "rejected", str(error))
            return False
        except Exception as error:  # noqa: BLE001 - the last boundary: a mistake here must not end the refreshing
            frames = traceback.extract_tb(error.__traceback__)
            log.error("bug", kind=type(error).__name__, at=f"{frames[-1].filename}:{frames[-1].lineno}")
            self._put_off(source, "failed", "an error inside routerd")
            return False
        if self._sources.get(name) is not source:
            return False  # another config has come into force meanwhile, and does not want it
        source.failures = 0
        source.due = time.monotonic() + self._refresh_s * (1 + SPREAD * random.random())
        news = before is None or saved.listing != before.listing
        self._telemetry.prices_known(name, saved.listing.models, saved.checked_at)
        self._telemetry.price_refresh(name, "fresh" if news else "unchanged")
        self._tell_doubts(name, doubts)
        await self._keep(name, saved)
        if news:
            log.info("prices", source=name, models=saved.listing.models)
        return news

    def _put_off(self, source: _Source, result: str, why: str) -> None:
        source.failures += 1
        wait_s = min(self._refresh_s, RETRY_S * 2 ** min(source.failures - 1, 16))
        source.due = time.monotonic() + wait_s * (1 + SPREAD * random.random())
        self._telemetry.price_refresh(source.feed.id, result)
        self._telemetry.log.warning(
            "prices not refreshed", source=source.feed.id, result=result, why=why, again_in_s=round(wait_s)
        )

    def _tell_doubts(self, source: str, doubts: tuple[Doubt, ...]) -> None:
        if not doubts:
            return
        self._telemetry.prices_doubted(source, len(doubts))
        shown = [
            {"upstream": f"{one.provider}/{one.model}", "input": one.price.input, "output": one.price.output}
            for one in doubts[:DOUBTS_SHOWN]
        ]
        self._telemetry.log.warning("prices doubted: the old ones hold", source=source, count=len(doubts), first=shown)

    # --- fetching ---------------------------------------------------------------------------------------------------

    async def _fetch(self, source: _Source, before: Saved | None) -> tuple[Saved, tuple[Doubt, ...]]:
        """What is listed now. Raises FeedRefused for a list that is not believed, _Failed where there is none."""
        client = Client()  # a connection kept for a day would be of no use
        try:
            async with asyncio.timeout(FETCH_LIMIT_S):
                reply = await client.get(_conditional(source.target, before))
                if reply.status == 304 and before is not None and before.etag:
                    return msgspec.structs.replace(before, checked_at=time.time()), ()
                if reply.status != 200:
                    raise _Failed(f"answered with status {reply.status}")
                body = await reply.read_all(fresh.MAX_FEED_BYTES + 1)
        except TimeoutError:
            raise _Failed(f"took more than {FETCH_LIMIT_S:g} s") from None
        except ConnectFailed:
            raise _Failed("cannot be reached") from None
        except ConnectionTorn:
            raise _Failed("broke off") from None
        finally:
            await client.close()
        last = before.listing if before is not None else None
        listing, doubts = await asyncio.to_thread(_believed, source.feed, body, last)
        return Saved(source.url, _entity_tag(reply), time.time(), listing), doubts

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _restored(self) -> dict[str, Saved]:
        try:
            return _read_saved(self._path)
        except SavedUnusable as error:
            self._telemetry.log.warning("prices", message=str(error))
            return {}

    async def _keep(self, source: str, saved: Saved) -> None:
        self._saved = {**(self._saved or {}), source: saved}
        if self._path is None:
            return
        try:
            await asyncio.to_thread(replace_whole, self._path, fresh.encode(self._saved))
        except OSError as error:
            self._telemetry.log.warning("prices cannot be saved", message=str(error))


def _conditional(target: Target, before: Saved | None) -> Target:
    return target.extended({"If-None-Match": before.etag}) if before is not None and before.etag else target


def _entity_tag(reply: Reply) -> str:
    tag = reply.headers.get("etag", "")
    return tag if len(tag) <= fresh.MAX_ETAG_LENGTH and tag.isprintable() else ""


def _believed(feed: Feed, body: bytes, last: Listing | None) -> tuple[Listing, tuple[Doubt, ...]]:
    return fresh.believe(feed, fresh.read(feed, body), last, catalog.load())
