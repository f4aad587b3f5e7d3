"""The shipped data is sound, and nothing in it is there for nobody."""

from __future__ import annotations

import ast
import json
import time
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

import routerd
from routerd import catalog
from routerd.canonical import Fix, Limit
from routerd.catalog import Model, Offer, Provider, Rule
from routerd.providers import PROVIDERS

SOURCE = Path(routerd.__file__).parent
CATALOG = catalog.load()
DIALECTS = {"chat", "responses", "messages"}
DEAREST_USD = 200.0  # per million tokens; beyond it a decimal point has slipped
LOCAL = ("ollama", "llamacpp", "vllm", "lmstudio")

usable = [provider for provider in CATALOG.providers.values() if not provider.retired]
offers = [(model, offer) for model in CATALOG.models.values() for offer in model.offers]


def rules(provider: Provider) -> Iterator[Rule]:
    yield from provider.limits
    yield from provider.free_tier.rules if provider.free_tier else ()


def raw(name: str) -> list[dict[str, object]]:
    document = json.loads((SOURCE / "catalog" / name).read_bytes())
    found: list[dict[str, object]] = document["models"] if isinstance(document, dict) else document
    return found


@pytest.mark.parametrize("provider", usable, ids=lambda provider: provider.id)
class TestEveryProvider:
    def test_is_reached_in_dialects_there_are_over_https_or_on_this_machine(self, provider: Provider) -> None:
        """A key never travels in the clear, and a URL ends where the dialect's path begins."""
        urls = {dialect: urlsplit(url) for dialect, url in provider.base_urls.items()}

        assert urls.keys() <= DIALECTS
        assert "chat" in urls
        assert all(url.scheme == "https" or url.hostname == "127.0.0.1" for url in urls.values())
        assert all(url.path and not url.path.endswith(("/", "/messages")) for url in urls.values())

    def test_says_where_its_key_is_or_runs_on_this_machine(self, provider: Provider) -> None:
        """Only local servers need no key."""
        assert bool(provider.api_key_env) == (provider.id not in LOCAL)

    def test_has_offers_or_leaves_its_models_to_the_user(self, provider: Provider) -> None:
        """Nothing is configured by its name alone and then has no model."""
        assert bool(CATALOG.offers[provider.id]) != provider.dynamic

    def test_has_a_default_model_an_agent_can_work_with(self, provider: Provider) -> None:
        """Tools, and the 64,000 tokens Hermes Agent asks for at least; at the free tier as well."""
        tier = provider.free_tier
        names = {provider.default_model} | ({tier.default_model} if tier else set())
        offered = {model.id: (model, offer) for model, offer in CATALOG.offers[provider.id]}

        assert provider.dynamic or names <= offered.keys()
        for model, offer in (offered[name] for name in names if name):
            assert model.tools
            assert (offer.context or model.context) >= 64_000
        if tier and tier.default_model:
            assert tier.covers(offered[tier.default_model][1].model)

    def test_has_fixes_that_exist(self, provider: Provider) -> None:
        """A misspelt fix would silently fix nothing."""
        fields = set(Fix.__struct_fields__)

        assert provider.fix.keys() <= fields
        for entry in provider.fix_models:
            assert entry.fix.keys() <= fields
            assert msgspec.convert(provider.fix | entry.fix, Fix)

    def test_has_fixes_that_some_model_needs(self, provider: Provider) -> None:
        """Every glob of a fix finds a model among the offers."""
        wires = [offer.model for _, offer in CATALOG.offers[provider.id]]

        for entry in provider.fix_models:
            assert any(Rule(entry.models).covers(wire) for wire in wires), entry.models

    def test_has_limits_that_can_be_kept(self, provider: Provider) -> None:
        """Above zero, each unit and period once in a rule, and reset in a zone there is."""
        for rule in rules(provider):
            kinds = Counter((limit.unit, limit.per) for limit in rule.limits)

            assert max(kinds.values(), default=1) == 1
            for limit in rule.limits:
                assert limit.amount > 0
                assert limit.models == "*"  # the rule says for which
                assert limit.resets in {"rolling", "minute"} or zoneinfo.ZoneInfo(limit.resets)
                assert limit.resets != "minute" or limit.per == "minute"

    def test_names_hooks_that_exist(self, provider: Provider) -> None:
        """A vendor that is named has its file of quirks."""
        assert not provider.vendor or provider.vendor in PROVIDERS


def unfit(fit: Callable[[Model, Offer], bool]) -> list[str]:
    """The offers that fail a test, so that a failure names them all."""
    return [f"{offer.provider}/{offer.model}" for model, offer in offers if not fit(model, offer)]


def test_every_price_is_sane() -> None:
    """A cache hit costs less than a miss, input no more than output, and nothing absurdly much."""
    assert unfit(lambda _, offer: 0 <= offer.input <= offer.output <= DEAREST_USD) == []
    assert unfit(lambda _, offer: offer.cached is None or 0 < offer.cached <= offer.input) == []
    assert unfit(lambda _, offer: offer.price.free or offer.output <= 20 * offer.input) == []


def test_no_price_is_a_promotion() -> None:
    """Nobody who charges sells a model for less than a seventh of what the first on its list asks."""
    assert unfit(lambda model, offer: offer.price.free or offer.input >= model.offers[0].input / 7) == []


def test_every_window_is_sane() -> None:
    """Room for a prompt, and no answer longer than the window it has to fit in."""
    assert unfit(lambda model, offer: 8192 <= (offer.context or model.context) <= 2**21) == []
    assert unfit(lambda model, offer: (offer.max_output or model.max_output or 4096) >= 4096) == []
    assert unfit(lambda model, offer: (offer.max_output or 0) <= (offer.context or model.context)) == []


def test_public_names_are_lower_case_and_without_a_slash() -> None:
    """A slash pins a provider, and a name in unusual case is looked up in lower case."""
    assert [name for name in CATALOG.models if name != name.lower() or "/" in name] == []


def test_every_model_is_offered_by_somebody() -> None:
    """A model without an offer could be asked for and never answered."""
    assert [model.id for model in CATALOG.models.values() if not model.offers] == []


def test_no_provider_offers_a_model_twice() -> None:
    """Upstreams are told apart by provider, key and public model."""
    public = Counter((offer.provider, model.id) for model, offer in offers)
    wire = Counter((offer.provider, offer.model) for _, offer in offers)

    assert max(public.values()) == 1
    assert max(wire.values()) == 1


def test_ids_and_aliases_are_unique() -> None:
    """Every name leads to one thing."""
    models = raw("models.json")
    names = Counter(name for model in CATALOG.models.values() for name in (model.id, *model.aliases))
    ids = Counter(name for provider in CATALOG.providers.values() for name in (provider.id, *provider.aliases))

    assert len(models) == len(CATALOG.models)
    assert max(names.values()) == 1
    assert max(ids.values()) == 1


def test_a_retired_provider_says_so_and_nothing_else() -> None:
    """It is kept for its message alone."""
    retired = [provider for provider in CATALOG.providers.values() if provider.retired]

    assert [provider.id for provider in retired] == ["github-models"]
    assert not retired[0].base_urls


def test_limits_in_the_file_have_no_field_a_limit_has_not() -> None:
    """The struct of a limit is shared and forgiving; the data is not."""
    text = (SOURCE / "catalog" / "providers.json").read_text()
    fields = set(Limit.__struct_fields__)

    def keys(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value if "amount" in value else ()
            for item in value.values():
                yield from keys(item)
        elif isinstance(value, list):
            for item in value:
                yield from keys(item)

    assert set(keys(json.loads(text))) <= fields


def test_every_field_is_read_somewhere() -> None:
    """Data nobody reads is data nobody keeps right. (The decoder refuses fields that are not declared.)"""
    structs = (Provider, Model, Offer, Rule, catalog.FreeTier, catalog.ModelFix)
    declared = {field for struct in structs for field in struct.__struct_fields__}
    trees = (ast.parse(path.read_text()) for path in SOURCE.rglob("*.py"))
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    assert declared - read == set()


def test_every_declared_field_is_used_by_some_entry() -> None:
    """A field no entry sets is no part of the data; two are there for the providers to come."""
    to_come = {"auth", "headers"}
    used = {key for entry in (*raw("providers.json"), *raw("models.json")) for key in entry}

    assert set(Provider.__struct_fields__) | set(Model.__struct_fields__) == used | to_come | {"tools"}


def test_loading_is_quick_and_happens_once() -> None:
    """The daemon has 0.6 s to be up; the catalog may take a sixtieth of it."""
    folder = SOURCE / "catalog"
    begun = time.perf_counter()
    catalog.decode((folder / "providers.json").read_bytes(), (folder / "models.json").read_bytes())

    assert time.perf_counter() - begun < 0.05  # generous: the machine may be busy
    assert catalog.load() is catalog.load()
