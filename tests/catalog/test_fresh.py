"""What is read of published price lists, and what of it is believed."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd import catalog
from routerd.canonical import Price
from routerd.catalog import fresh
from routerd.catalog.fresh import FeedRefused, Listing, Saved
from tests.feeds import list_body, list_entry, tree_body, tree_entry

LIST, TREE = (fresh.feeds()[name] for name in ("openrouter", "models.dev"))
KNOWN = catalog.load()
PAID = "z-ai/glm-5.3"  # 1.4 / 4.4 / 0.26 as shipped
FREE = "google/gemma-4-31b-it:free"


def listed(*entries: Any, **options: Any) -> dict[str, Price]:
    return fresh.read(LIST, list_body(*entries, **options)).prices["openrouter"]


def believed(*entries: Any, last: Listing | None = None) -> tuple[dict[str, Price], list[str]]:
    """The prices that are taken up, and the models whose price is doubted."""
    listing, doubts = fresh.believe(LIST, fresh.read(LIST, list_body(*entries)), last, KNOWN)
    return listing.prices["openrouter"], [doubt.model for doubt in doubts]


# --- the two forms --------------------------------------------------------------------------------------------------


def test_list_prices_are_strings_per_token() -> None:
    """They become USD per million tokens, without the noise of multiplying a fraction."""
    entry = list_entry(PAID, "0.00000022", "0.00000066", "0.000000007")

    assert Price(0.22, 0.66, 0.007) == listed(entry)[PAID]


def test_tree_prices_are_numbers_per_million() -> None:
    """They are taken as they are, under our names for the providers; those we have no name for are passed over."""
    body = tree_body({"groq": [tree_entry("openai/gpt-oss-120b", input=0.15, output=0.6, cache_read=0.075)]})
    listing = fresh.read(TREE, body)

    assert {"openai/gpt-oss-120b": Price(0.15, 0.6, 0.075)} == listing.prices["groq"]
    assert {"groq", "openai"} == listing.prices.keys()
    assert listing.free == {}


def test_dearest_hour_counts() -> None:
    """Where the price depends on the time of day, the estimate is that of the dearest hours."""
    hours = [
        {"utc_start": 1000, "utc_end": 100, "prompt": "0.00000066", "completion": "0.00000198"},
        {"utc_start": 100, "utc_end": 400, "prompt": "0.00000132", "completion": "0.00000396"},
    ]

    assert Price(1.32, 3.96) == listed(list_entry("d/v4", "0.00000066", "0.00000198", overrides=hours))["d/v4"]


def test_long_prompts_do_not_count() -> None:
    """What a prompt beyond a size costs is left out: windows are cut there."""
    tier = [{"min_prompt_tokens": 200000, "prompt": "0.000006", "completion": "0.00003"}]
    tree = tree_body(
        {"xai": [tree_entry("g", input=1.25, output=2.5, tiers=[{"tier": {"size": 200000}, "input": 2.5}])]}
    )

    assert Price(3, 15) == listed(list_entry("a/b", "0.000003", "0.000015", overrides=tier))["a/b"]
    assert Price(1.25, 2.5) == fresh.read(TREE, tree).prices["xai"]["g"]


@pytest.mark.parametrize("amount", ["-1", "NaN", "inf", "1", "-0.0000001", 1e9])
def test_no_price(amount: Any) -> None:
    """What is negative, no number, or beyond all bounds is no price; the model is listed all the same."""
    assert "a/b" not in listed(list_entry("a/b", amount, "0.000002"))
    assert "a/b" not in listed(list_entry("a/b", "0.000002", amount))


@pytest.mark.parametrize("amount", ["0", "-1", "0.5", "0.0000011", None])
def test_no_price_for_cache_hits(amount: Any) -> None:
    """A price for cache hits that is nothing, or more than the input's, is not given."""
    assert Price(1, 2) == listed(list_entry("a/b", "0.000001", "0.000002", amount))["a/b"]


def test_one_broken_entry_costs_only_itself() -> None:
    """An entry without prices, or that is none at all, is left out; the others are read."""
    entry = list_entry(PAID, "0.0000014", "0.0000044")

    assert PAID in listed({"id": "a/b"}, "no entry", {**entry, "id": "c/d", "pricing": None}, entry)


def test_free_models_are_listed_apart() -> None:
    """Where a feed lists all there is, the names that say free are kept, whatever is wrong with their prices."""
    broken = {**list_entry("b/c:free", "0", "0"), "pricing": {"prompt": "none"}}
    listing = fresh.read(LIST, list_body(list_entry("a/b:free", "0", "0"), broken, free=()))

    assert listing.free == {"openrouter": ("a/b:free", "b/c:free")}


# --- what is refused as a whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>",
        b'{"error":{"message":"Internal Server Error","code":500}}',
        b"[]",
        b"null",
        b'{"data":{}}',
        b'{"data":[]}',
        b'{"data":[{}]}',
        b"\xff\xfe",
        b"[" * 100_000,
        list_body()[:-100],
    ],
)
@pytest.mark.parametrize("feed", [LIST, TREE], ids=["list", "tree"])
def test_other_bodies_are_refused(feed: fresh.Feed, body: bytes) -> None:
    """HTML, errors, other JSON and half a list are no price lists."""
    with pytest.raises(FeedRefused):
        fresh.read(feed, body)


def test_bounds_of_a_feed() -> None:
    """A list that is too short, too long, too large, or broken in more than a tenth of its entries is refused."""
    bodies = [
        list_body(fillers=fresh.MIN_MODELS - 2),
        list_body(*({"id": f"a/{number}"} for number in range(10))),
        json.dumps({"data": [{"id": f"a/{n}", "pricing": {}} for n in range(fresh.MAX_MODELS + 1)]}).encode(),
        list_body() + b" " * fresh.MAX_FEED_BYTES,
    ]
    for body in bodies:
        with pytest.raises(FeedRefused):
            fresh.read(LIST, body)


def test_a_list_that_shrank_is_refused() -> None:
    """Less than half of what was listed before is not believed; half of it is."""
    listing = fresh.read(LIST, list_body(fillers=60, free=()))
    fresh.believe(LIST, listing, msgspec.structs.replace(listing, models=120), KNOWN)
    with pytest.raises(FeedRefused):
        fresh.believe(LIST, listing, msgspec.structs.replace(listing, models=121), KNOWN)


@given(st.binary(max_size=200))
def test_garbage_is_refused(body: bytes) -> None:
    """Whatever the bytes, nothing but a refusal comes of them."""
    for feed in (LIST, TREE):
        with pytest.raises(FeedRefused):
            fresh.read(feed, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("1e400") | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(JSON | st.fixed_dictionaries({"id": JSON, "pricing": JSON}), max_size=5),
    st.fixed_dictionaries({"prompt": JSON, "completion": JSON, "input_cache_read": JSON, "overrides": JSON}),
)
def test_prices_are_always_within_bounds(strange: list[Any], pricing: dict[str, Any]) -> None:
    """Whatever stands in a list, a price that comes out of it is one."""
    strange = [one for one in strange if one is not None]
    entry = {**list_entry("a/b", 0, 0), "pricing": pricing}
    tree = {"openai": {"models": {str(n): {"cost": one} for n, one in enumerate([*strange, pricing])}}}
    bodies = [(LIST, list_body(entry, *strange)), (TREE, json.dumps(tree).encode())]
    for feed, body in bodies:
        try:
            listing = fresh.read(feed, body)
        except FeedRefused:
            continue
        for price in (price for models in listing.prices.values() for price in models.values()):
            assert all(0 <= one <= fresh.MAX_USD for one in (price.input, price.output, price.cached or 0.0))


# --- what is doubted ------------------------------------------------------------------------------------------------


def test_an_ordinary_change_is_believed() -> None:
    """Prices move, and then the new one holds."""
    prices, doubted = believed(list_entry(PAID, "0.0000007", "0.0000022", "0.00000013"))

    assert doubted == []
    assert Price(0.7, 2.2, 0.13) == prices[PAID]


@pytest.mark.parametrize(
    ("prompt", "completion", "cached"),
    [
        ("0.0000280001", "0.0000044", "0.00000026"),
        ("0.0000014", "0.000000219", "0.00000026"),
        ("0.0000014", "0.0000044", "0.000000012"),
        ("0", "0", "0"),
        ("0", "0.0000044", None),
        ("0.0000014", "0", None),
    ],
)
def test_a_jump_is_doubted(prompt: str, completion: str, cached: str | None) -> None:
    """More than twenty times the shipped price, less than a twentieth, or nothing at all: it is left out."""
    prices, doubted = believed(list_entry(PAID, prompt, completion, cached))

    assert doubted == [PAID]
    assert PAID not in prices


def test_the_last_price_holds_where_the_new_one_is_doubted() -> None:
    """A believed price is kept through a glitch, and the glitch cannot creep: the shipped price stays the measure."""
    last, _ = fresh.believe(LIST, fresh.read(LIST, list_body(list_entry(PAID, "0.0000002", "0.000001"))), None, KNOWN)
    prices, doubted = believed(list_entry(PAID, "0.00000002", "0.0000001"), last=last)

    assert doubted == [PAID]
    assert Price(0.2, 1.0) == prices[PAID]


def test_what_is_not_shipped_is_held_against_its_last_price() -> None:
    """A model the catalog does not know is believed at first, and then doubted when it jumps."""
    last = fresh.read(LIST, list_body(list_entry("new/one", "0.000001", "0.000002")))
    prices, doubted = believed(list_entry("new/one", "0", "0"), last=last)

    assert doubted == ["new/one"]
    assert Price(1, 2) == prices["new/one"]


def test_free_is_believed_of_what_says_so() -> None:
    """A name that says free may cost nothing, whatever it cost before; and one that was free may cost something."""
    prices, doubted = believed(list_entry(FREE, "0.000001", "0.000002"), list_entry("glm:free", "0", "0"))

    assert doubted == []
    assert Price(1, 2) == prices[FREE]
    assert fresh.credible(LIST, "glm:free", Price(), Price(1, 2))
    assert not fresh.credible(LIST, "glm", Price(), Price(1, 2))


def test_a_known_discount_goes_on() -> None:
    """A list that does not speak of cache hits does not end the discount, which is never above the input's price."""
    assert Price(2, 4, 0.1) == fresh.taken_up(Price(2, 4), Price(1, 2, 0.1))
    assert Price(0.05, 4, 0.05) == fresh.taken_up(Price(0.05, 4), Price(1, 2, 0.1))
    assert Price(2, 4, 0.3) == fresh.taken_up(Price(2, 4, 0.3), Price(1, 2, 0.1))


# --- what is kept ---------------------------------------------------------------------------------------------------


def saved(**changes: Any) -> Saved:
    listing = fresh.read(LIST, list_body(list_entry(PAID, "0.0000014", "0.0000044", "0.00000026")))
    return msgspec.structs.replace(Saved("https://example.com/", '"tag"', 1.8e9, listing), **changes)


def test_what_is_kept_comes_back() -> None:
    """The file holds all there is to know."""
    assert {"openrouter": saved()} == fresh.decode(fresh.encode({"openrouter": saved()}))


def test_another_file_is_refused() -> None:
    """Garbage, half a file, another version, and prices nobody could have written."""
    whole = fresh.encode({"openrouter": saved()})
    absurd = saved(listing=Listing(100, {"openrouter": {PAID: Price(-1, 1)}}))
    for content in (b"", b"{}", whole[:-1], whole.replace(b'"version":1', b'"version":2'), fresh.encode({"a": absurd})):
        with pytest.raises(FeedRefused):
            fresh.decode(content)


def test_an_update_makes_older_prices_outdated() -> None:
    """Prices fetched before those that are shipped were looked up are of no use."""
    assert fresh.outdated(saved(checked_at=1.7e9), KNOWN)
    assert not fresh.outdated(saved(checked_at=1.9e9), KNOWN)


# --- the data -------------------------------------------------------------------------------------------------------


def test_feeds_speak_of_known_providers() -> None:
    """Every provider a feed is mapped to is in the catalog, and is in one feed only."""
    mapped = [provider for feed in fresh.feeds().values() for provider in feed.providers.values()]

    assert set(mapped) <= KNOWN.providers.keys()
    assert len(set(mapped)) == len(mapped)
    assert all(feed.url.startswith("https://") for feed in fresh.feeds().values())


def test_no_feed_speaks_of_plans_and_hours() -> None:
    """Whose price depends on the hour, or is a plan's, has none that a list could tell."""
    mapped = {provider for feed in fresh.feeds().values() for provider in feed.providers.values()}

    assert not {name for name in mapped if name.startswith("mimo-token-plan") or name == "deepseek"}
