"""Price lists that others publish: how they are read, and what of them is believed.

Theory of operation
-------------------
A *feed* is a public JSON document with the prices of many models; ``feeds.json`` says where each is, in which of two
forms, and which of our providers its own names stand for. Every provider is in one feed at most, so no two disagree.
``read`` makes a *listing* of a feed's text: prices in USD per million tokens by our provider and its wire name.
``believe`` compares it with what was believed before and with what is shipped. Both are functions of bytes and structs;
fetching, keeping and taking up are others' business.

Nobody looks when a price changes here, and a wrong one sends everything the wrong way. So:

* A feed is taken as a whole or not at all. It is refused if it is not of its form, if more than a tenth of its entries
  are not, if it lists fewer than ``MIN_MODELS`` or less than half of what it listed when it was last believed.
* A price that is no price (negative, as routers that choose a model themselves have it; not a number; beyond
  ``MAX_USD``) is not there: what is shipped holds.
* A price is doubted if it moved by more than a factor of ``MAX_CHANGE`` from the shipped one (or, of a model that is
  not shipped, from the last one). The old one is kept. That a model which costs something has become free is such a
  move, unless its name says so.
* Where a model's price depends on the hour, it is the dearest hour's: an estimate that is too high costs a little.
  Where it depends on the prompt's size, it is that of small prompts, for which the shipped windows are cut.
* A price for cache hits that is zero or above the input's is taken as not given.
* A feed that is ``complete`` lists all that its provider offers, so a free model that is missing there is gone; but if
  not one free model is left, the feed is not believed about them.

What is not read: windows and limits on output. The shipped ones are cut where a price rises, which no feed does.
Who is in no feed, though one has prices for him: a vendor whose prices depend on the hour, for that feed has no hours;
and those who charge for a plan or not at all, where a list price would only mislead.

Shapes as seen: OpenRouter's ``GET /api/v1/models`` (August to September 2026: prices are strings, in USD per token;
``overrides`` hold the exceptions by prompt size or UTC time) and models.dev's ``api.json`` (schema of July 2026:
numbers, in USD per million tokens, below ``models`` of each provider).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import msgspec

from routerd import catalog
from routerd.canonical import Price

MAX_FEED_BYTES = 16 * 1024 * 1024  # models.dev's is about 2 MB
MAX_SAVED_BYTES = 8 * 1024 * 1024
MAX_MODELS = 20_000  # of one feed; more is no list of models
MIN_MODELS = 50
MIN_SHARE_KEPT = 0.5  # of the models that the feed last listed
MAX_SHARE_BROKEN = 0.1  # of its entries
MAX_USD = 1000.0  # per million tokens
MAX_CHANGE = 20.0
MAX_NAME_LENGTH = 200
MAX_ETAG_LENGTH = 256
SAVED_VERSION = 1
PER_MILLION = 1e6
DIGITS = 9  # of a price after the point: what multiplying a decimal fraction by a million adds is further back

Prices = Mapping[str, Mapping[str, Price]]  # provider -> wire model -> price


class FeedRefused(ValueError):
    """Not to be believed as a whole. The text says why, in our own words."""


class Feed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A published price list. ``providers``: its names for them -> ours. ``free``: globs of names that say it."""

    id: str
    url: str
    form: str
    providers: dict[str, str]
    free: tuple[str, ...] = ()
    complete: bool = False

    def says_free(self, wire_model: str) -> bool:
        return any(fnmatchcase(wire_model, pattern) for pattern in self.free)


class Listing(msgspec.Struct, frozen=True):
    """What a feed says. ``models``: how many entries it had. ``free``: by provider, the free models it lists."""

    models: int
    prices: dict[str, dict[str, Price]]
    free: dict[str, tuple[str, ...]] = {}


class Doubt(msgspec.Struct, frozen=True):
    """A price that was not believed, and the one it was held against."""

    provider: str
    model: str
    price: Price
    reference: Price


class Saved(msgspec.Struct, frozen=True):
    """A listing as it is kept. ``checked_at``: Unix seconds when the feed last said that this is what it lists."""

    url: str
    etag: str
    checked_at: float
    listing: Listing


class _File(msgspec.Struct, frozen=True):
    version: int
    feeds: dict[str, Saved]


@cache
def feeds() -> Mapping[str, Feed]:
    """Every feed that is known, by id, in the order of the file."""
    content = Path(__file__).with_name("feeds.json").read_bytes()
    return {feed.id: feed for feed in msgspec.json.decode(content, type=tuple[Feed, ...])}


# --- what is believed -----------------------------------------------------------------------------------------------


def believe(
    feed: Feed, listing: Listing, last: Listing | None, known: catalog.Catalog
) -> tuple[Listing, tuple[Doubt, ...]]:
    """The listing without what is doubted, and that. ``last``: what was believed before.

    Raises FeedRefused if it lists far less than it did.
    """
    if last is not None and listing.models < last.models * MIN_SHARE_KEPT:
        raise FeedRefused(f"lists {listing.models} models, and listed {last.models} before")
    before: Prices = last.prices if last is not None else {}
    doubts: list[Doubt] = []
    prices: dict[str, dict[str, Price]] = {}
    for provider, listed in listing.prices.items():
        references = {**before.get(provider, {}), **_shipped(known, provider)}
        doubts += _doubts(feed, provider, listed, references)
        doubted = {doubt.model for doubt in doubts if doubt.provider == provider}
        kept = {model: price for model, price in before.get(provider, {}).items() if model in doubted}
        prices[provider] = {model: price for model, price in listed.items() if model not in doubted} | kept
    return msgspec.structs.replace(listing, prices=prices), tuple(doubts)


def credible(feed: Feed, model: str, price: Price, reference: Price) -> bool:
    """True if ``price`` may be what has become of ``reference``."""
    if price.free and feed.says_free(model):
        return True
    pairs = [(price.input, reference.input), (price.output, reference.output)]
    if price.cached is not None and reference.cached is not None:
        pairs.append((price.cached, reference.cached))
    return all(before == 0 or before / MAX_CHANGE <= now <= before * MAX_CHANGE for now, before in pairs)


def taken_up(price: Price, base: Price) -> Price:
    """The fresh price in place of another. A discount for cache hits goes on where it is not spoken of."""
    if price.cached is not None or base.cached is None:
        return price
    return Price(price.input, price.output, min(base.cached, price.input))


def _shipped(known: catalog.Catalog, provider: str) -> dict[str, Price]:
    return {offer.model: offer.price for _, offer in known.offers.get(provider, ())}


def _doubts(feed: Feed, provider: str, listed: Mapping[str, Price], references: Mapping[str, Price]) -> Iterable[Doubt]:
    for model, price in listed.items():
        reference = references.get(model)
        if reference is not None and not credible(feed, model, price, reference):
            yield Doubt(provider, model, price, reference)


# --- the two forms --------------------------------------------------------------------------------------------------

_Amount = str | float | None


class _Override(msgspec.Struct, frozen=True):
    prompt: _Amount = None
    completion: _Amount = None
    input_cache_read: _Amount = None
    min_prompt_tokens: float | None = None


class _Pricing(msgspec.Struct, frozen=True):
    prompt: str | float
    completion: str | float
    input_cache_read: _Amount = None
    overrides: tuple[_Override, ...] | None = None


class _Entry(msgspec.Struct, frozen=True):
    id: str
    pricing: msgspec.Raw


class _List(msgspec.Struct, frozen=True):
    data: list[msgspec.Raw]


class _Cost(msgspec.Struct, frozen=True):
    input: float
    output: float
    cache_read: float | None = None


class _Model(msgspec.Struct, frozen=True):
    cost: _Cost | None = None


class _Branch(msgspec.Struct, frozen=True):
    models: dict[str, msgspec.Raw]


class _Reading:
    """A listing in the making."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._models = 0
        self._broken = 0
        self._prices: dict[str, dict[str, Price]] = {}
        self._free: dict[str, dict[str, None]] = {provider: {} for provider in feed.providers.values()}

    def model(self, provider: str, name: str) -> None:
        """One is listed, whatever it costs."""
        self._models += 1
        if self._models > MAX_MODELS:
            raise FeedRefused(f"lists more than {MAX_MODELS} models")
        if self._feed.complete and self._feed.says_free(name):
            self._free[provider][name] = None

    def price(self, provider: str, name: str, price: Price | None) -> None:
        if price is not None:
            self._prices.setdefault(provider, {})[name] = price

    def broken(self) -> None:
        """An entry is not of the feed's form."""
        self._broken += 1

    def whole(self) -> Listing:
        if self._broken > (self._models + self._broken) * MAX_SHARE_BROKEN:
            raise FeedRefused(f"{self._broken} of its entries are not of the known form")
        if self._models < MIN_MODELS:
            raise FeedRefused(f"lists {self._models} models; fewer than {MIN_MODELS} are not believed")
        free = {provider: tuple(names) for provider, names in self._free.items() if names}
        return Listing(self._models, self._prices, free)


def read(feed: Feed, body: bytes) -> Listing:
    """What the feed's text says. Raises FeedRefused."""
    if len(body) > MAX_FEED_BYTES:
        raise FeedRefused(f"is larger than {MAX_FEED_BYTES} bytes")
    reading = _Reading(feed)
    try:
        _FORMS[feed.form](feed, body, reading)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise FeedRefused("is not of the known form") from None
    return reading.whole()


def _read_list(feed: Feed, body: bytes, reading: _Reading) -> None:
    """``{"data": [{"id", "pricing": {"prompt", "completion", ...}}]}``, all of one provider."""
    (provider,) = feed.providers.values()
    for raw in msgspec.json.decode(body, type=_List).data:
        try:
            entry = msgspec.json.decode(raw, type=_Entry)
        except (msgspec.DecodeError, UnicodeDecodeError):
            reading.broken()
            continue
        if not _is_name(entry.id):
            reading.broken()
            continue
        reading.model(provider, entry.id)
        try:
            reading.price(provider, entry.id, _dearest(msgspec.json.decode(entry.pricing, type=_Pricing)))
        except (msgspec.DecodeError, ValueError, OverflowError):
            reading.broken()


def _read_tree(feed: Feed, body: bytes, reading: _Reading) -> None:
    """``{provider: {"models": {id: {"cost": {"input", "output", ...}}}}}``; providers unknown to us as well."""
    branches = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    for name, provider in feed.providers.items():
        if name not in branches:
            continue
        for model, raw in msgspec.json.decode(branches[name], type=_Branch).models.items():
            try:
                cost = msgspec.json.decode(raw, type=_Model).cost
            except (msgspec.DecodeError, UnicodeDecodeError):
                reading.broken()
                continue
            if not _is_name(model):
                reading.broken()
                continue
            reading.model(provider, model)
            if cost is not None:
                reading.price(provider, model, _price(cost.input, cost.output, cost.cache_read))


_FORMS: dict[str, Callable[[Feed, bytes, _Reading], None]] = {"list": _read_list, "tree": _read_tree}


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME_LENGTH and text.isprintable()


def _dearest(pricing: _Pricing) -> Price | None:
    """The price at the dearest hour. Raises ValueError for text that is no number."""
    hours = [one for one in pricing.overrides or () if one.min_prompt_tokens is None]
    inputs = _amounts(pricing.prompt, *(one.prompt for one in hours))
    outputs = _amounts(pricing.completion, *(one.completion for one in hours))
    hits = _amounts(pricing.input_cache_read, *(one.input_cache_read for one in hours))
    return _price(_most(inputs), _most(outputs), _most(hits) if hits else None)


def _amounts(*per_token: _Amount) -> list[float]:
    """Those that are given, in USD per million tokens."""
    return [float(amount) * PER_MILLION for amount in per_token if amount is not None]


def _most(amounts: list[float]) -> float:
    """The largest; what is no amount at all if one of them is none."""
    return next((amount for amount in amounts if not 0 <= amount <= MAX_USD), max(amounts))


def _price(input_usd: float, output_usd: float, cached_usd: float | None) -> Price | None:
    """A price within bounds, or None. ``nan`` is in no bounds."""
    if not (0 <= input_usd <= MAX_USD and 0 <= output_usd <= MAX_USD):
        return None
    cached = cached_usd if cached_usd is not None and 0 < cached_usd <= input_usd else None
    return Price(round(input_usd, DIGITS), round(output_usd, DIGITS), None if cached is None else round(cached, DIGITS))


# --- what is kept ---------------------------------------------------------------------------------------------------


def encode(saved: Mapping[str, Saved]) -> bytes:
    """The text of the file that outlives the process."""
    return msgspec.json.encode(_File(SAVED_VERSION, dict(saved)))


def decode(content: bytes) -> dict[str, Saved]:
    """What ``encode`` wrote. Raises FeedRefused for any other text."""
    try:
        file = msgspec.json.decode(content, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise FeedRefused("is not what was written") from None
    if file.version != SAVED_VERSION or not all(map(_sound, file.feeds.values())):
        raise FeedRefused("is not what this version writes")
    return file.feeds


def _sound(saved: Saved) -> bool:
    prices = [price for listed in saved.listing.prices.values() for price in listed.values()]
    amounts = [amount for one in prices for amount in (one.input, one.output, one.cached or 0.0)]
    return all(0 <= amount <= MAX_USD for amount in amounts) and saved.listing.models >= MIN_MODELS


def outdated(saved: Saved, known: catalog.Catalog) -> bool:
    """True if what is shipped is younger: after an update."""
    return saved.checked_at < datetime.fromisoformat(known.as_of).replace(tzinfo=UTC).timestamp()
