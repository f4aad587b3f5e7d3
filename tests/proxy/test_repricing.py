"""What becomes of a config when price lists are held against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from routerd import config
from routerd.canonical import Price
from routerd.catalog.fresh import Listing
from routerd.config import Config
from routerd.proxy.repricing import repriced, sources

FREE, OTHER_FREE = "gemma-4-31b-it:free", "north-mini-code"
TEXT = f"""
[prices]
refresh = "24h"
[providers.openrouter]
keys = ["one", "two"]
[providers.groq]
api_key = "key"
tier = "free"
[routes.auto]
models = ["openrouter/{FREE}", ["openrouter/glm-5.3", "groq/gpt-oss-120b"]]
auxiliary = ["{FREE}", "{OTHER_FREE}"]
[routes.free]
models = ["{FREE}"]
"""


@pytest.fixture
def base(tmp_path: Path) -> Config:
    path = tmp_path / "routerd.toml"
    path.write_text(TEXT)
    return config.load(path, {"HOME": str(tmp_path)})


def listing(free: tuple[str, ...] = (), **prices: dict[str, Price]) -> Listing:
    return Listing(100, prices, {"openrouter": free} if free else {})


def price(found: Config, name: str) -> set[Price]:
    """The prices of all keys, as the name leads to them and as the provider has them."""
    route = found.resolve(name)
    assert route is not None
    named = {upstream.price for upstream in route.tiers[0]}
    wanted = {(upstream.provider, upstream.model) for upstream in route.tiers[0]}
    owned = (upstream for provider in found.providers.values() for upstream in provider.upstreams)
    return named | {upstream.price for upstream in owned if (upstream.provider, upstream.model) in wanted}


def test_nothing_new_is_the_same_config(base: Config) -> None:
    """Lists that say what is known, or nothing of what is configured, change nothing at all."""
    known = listing(
        openrouter={"z-ai/glm-5.3": Price(1.4, 4.4), "nobody/knows": Price(1, 2)}, mistral={"x": Price(1, 1)}
    )

    assert repriced(base, {"openrouter": known}).config is base
    assert repriced(base, {}).config is base


def test_every_place_has_the_new_price(base: Config) -> None:
    """All keys of a pool, in all routes, under all names; nothing else about the config is another."""
    result = repriced(base, {"openrouter": listing(openrouter={"z-ai/glm-5.3": Price(0.7, 2.2)})})
    fresh = {Price(0.7, 2.2, 0.26)}

    assert price(result.config, "glm-5.3") == price(result.config, "openrouter/z-ai/glm-5.3") == fresh
    assert {one.price for one in result.config.routes["auto"].tiers[1] if one.provider == "openrouter"} == fresh
    assert result.config.models == base.models
    assert result.withdrawn == ()
    assert repriced(base, {"openrouter": listing(openrouter={"z-ai/glm-5.3": Price(1.4, 4.4)})}).config == base


def test_a_price_is_held_against_the_one_it_replaces(base: Config) -> None:
    """It may have been believed of another catalog's model."""
    absurd = listing(openrouter={"z-ai/glm-5.3": Price(0.01, 0.02), "z-ai/glm-5.2": Price()})

    assert repriced(base, {"openrouter": absurd}).config is base


def test_free_tiers_have_no_prices(base: Config) -> None:
    """What others pay is not what a free tier costs."""
    paid = listing(groq={"openai/gpt-oss-120b": Price(0.15, 0.6)})

    assert repriced(base, {"models.dev": paid}).config is base


def test_withdrawn_models_are_left_out(base: Config) -> None:
    """From tiers and from what is offered; but no route becomes empty, and the names go on leading there."""
    result = repriced(base, {"openrouter": listing(("cohere/north-mini-code:free",))})
    found = result.config

    assert f"openrouter/{FREE}" in result.withdrawn
    assert f"openrouter/{OTHER_FREE}" not in result.withdrawn
    assert FREE not in found.models
    assert OTHER_FREE in found.models
    assert [{upstream.model for upstream in tier} for tier in found.routes["auto"].tiers] == [
        {"glm-5.3", "gpt-oss-120b"}
    ]
    assert {upstream.model for upstream in found.routes["auto"].auxiliary} == {OTHER_FREE}
    assert found.routes["free"] == base.routes["free"]
    assert found.resolve(FREE) == base.resolve(FREE)


def test_a_list_that_is_not_complete_withdraws_nothing(base: Config) -> None:
    """Only who lists all there is can say that something is gone."""
    assert repriced(base, {"models.dev": listing(("cohere/north-mini-code:free",))}).config is base


def test_sources(base: Config) -> None:
    """Off, none; on, those that have prices of a provider that is configured."""
    assert set(sources(base)) == {"openrouter", "models.dev"}
    path = base.source
    assert path is not None
    path.write_text('[providers.openrouter]\napi_key = "key"\n[prices]\nrefresh = "24h"\n')
    assert set(sources(config.load(path, {"HOME": "/"}))) == {"openrouter"}
    path.write_text('[providers.openrouter]\napi_key = "key"\n')
    assert sources(config.load(path, {"HOME": "/"})) == {}
