"""A config at fresh prices: a function of the config as it is written and of what the price lists say.

In order of weight a price is the user's, else a fresh one that is credible, else the shipped one. A fresh price is held
against the one it replaces once more here, for it may have been fetched for another catalog.

A free model that its provider no longer lists is *withdrawn*: no route leads to it and ``GET /v1/models`` does not show
it. That is undone by the next list that has it. Since a list may be wrong, it never takes the last upstream of a route,
and whoever asks for the model by name is still led to it. What the user listed is never withdrawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from routerd.canonical import Upstream
from routerd.catalog import fresh
from routerd.catalog.fresh import Feed, Listing
from routerd.config import Config, ProviderConfig, RouteConfig

Identity = tuple[str, int, str]  # provider, key, model


class Repriced(msgspec.Struct, frozen=True):
    """The config to be in force, and what it no longer offers: ``provider/model``, in order."""

    config: Config
    withdrawn: tuple[str, ...] = ()


def sources(config: Config) -> dict[str, str]:
    """The feeds that are to be fetched and their URLs: those that speak of a provider that is configured."""
    if config.prices.refresh_s is None:
        return {}
    presets = {provider.preset for provider in config.providers.values()}
    feeds = fresh.feeds()
    return {
        source: url
        for source, url in config.prices.urls.items()
        if not presets.isdisjoint(feeds[source].providers.values())
    }


def repriced(config: Config, listings: Mapping[str, Listing]) -> Repriced:
    """The config at the prices of these feeds. The very same if they change nothing."""
    changed: dict[Identity, Upstream] = {}
    withdrawn: dict[Identity, None] = {}
    for provider in config.providers.values():
        for source, listing in listings.items():
            feed = fresh.feeds()[source]
            changed |= _changed(provider, feed, listing)
            withdrawn |= dict.fromkeys(_withdrawn(provider, feed, listing))
    if not changed and not withdrawn:
        return Repriced(config)
    names = dict.fromkeys(f"{provider}/{model}" for provider, _, model in withdrawn)
    return Repriced(_Rewriting(changed, withdrawn).config(config), tuple(names))


def _changed(provider: ProviderConfig, feed: Feed, listing: Listing) -> dict[Identity, Upstream]:
    prices = listing.prices.get(provider.preset, {})
    changed = {}
    for upstream in provider.upstreams:
        price = prices.get(upstream.wire_model)
        if price is None or upstream.wire_model not in provider.list_priced:
            continue
        price = fresh.taken_up(price, upstream.price)
        if price != upstream.price and fresh.credible(feed, upstream.wire_model, price, upstream.price):
            changed[_identity(upstream)] = msgspec.structs.replace(upstream, price=price)
    return changed


def _withdrawn(provider: ProviderConfig, feed: Feed, listing: Listing) -> Iterable[Identity]:
    roster = listing.free.get(provider.preset)
    if not feed.complete or not roster:
        return
    for upstream in provider.upstreams:
        name = upstream.wire_model
        if name in provider.rostered and feed.says_free(name) and name not in roster:
            yield _identity(upstream)


def _identity(upstream: Upstream) -> Identity:
    return upstream.provider, upstream.key, upstream.model


class _Rewriting:
    """Puts other upstreams in the place of some, and leaves some out."""

    def __init__(self, changed: Mapping[Identity, Upstream], withdrawn: Mapping[Identity, None]) -> None:
        self._changed = changed
        self._withdrawn = withdrawn

    def config(self, config: Config) -> Config:
        routes = {name: self._route(route) for name, route in config.routes.items()}
        table = {name: self._route(route) for name, route in config.table.items()}
        offered = tuple(name for name in config.models if self._offered(config.table[name]))
        in_use = {
            _identity(upstream)
            for route in (*routes.values(), *table.values())
            for tier in (*route.tiers, route.auxiliary)
            for upstream in tier
        }
        providers = {name: self._provider(provider, in_use) for name, provider in config.providers.items()}
        return msgspec.structs.replace(
            config, providers=providers, routes=routes, table=table, models=offered or config.models
        )

    def _provider(self, provider: ProviderConfig, in_use: set[Identity]) -> ProviderConfig:
        left = (one for one in provider.upstreams if _identity(one) in in_use)
        return msgspec.structs.replace(provider, upstreams=tuple(map(self._upstream, left)))

    def _route(self, route: RouteConfig) -> RouteConfig:
        tiers = tuple(filter(None, map(self._left, route.tiers)))
        if not tiers:
            tiers = tuple(tuple(map(self._upstream, tier)) for tier in route.tiers)
        return msgspec.structs.replace(route, tiers=tiers, auxiliary=self._left(route.auxiliary))

    def _left(self, tier: tuple[Upstream, ...]) -> tuple[Upstream, ...]:
        return tuple(self._upstream(one) for one in tier if _identity(one) not in self._withdrawn)

    def _upstream(self, upstream: Upstream) -> Upstream:
        return self._changed.get(_identity(upstream), upstream)

    def _offered(self, route: RouteConfig) -> bool:
        return any(_identity(one) not in self._withdrawn for tier in route.tiers for one in tier)
