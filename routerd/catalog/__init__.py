"""What is known of the world's providers and models, shipped as data.

Theory of operation
-------------------
Two JSON files beside this module hold facts and nothing else: ``providers.json`` says how to reach a vendor and what it
demands, ``models.json`` who offers which model under which name, for how much. ``load()`` decodes both once, into
frozen structs that refuse unknown fields, so whatever stands in the files is declared here and read by somebody. A
third, ``feeds.json``, says where fresher prices are published; ``fresh.py`` reads it, and them.

* A *public* name is ours and lower-case (``mimo-v2.6-pro``); a *wire* name is what one provider calls the same model
  (``xiaomi/mimo-v2.6-pro``). One provider offers one public name at most once: a free variant is a model of its own.
* A wire name with a slash and without a variant mark (``:free``) is what people know a model by, so it leads to the
  public name as well; and so does ``vendor/model``. A variant or a bare wire name does not: it may have another price.
* An offer is listed up to the prompt size at which its price rises, so that the price shown is the price paid.
* Where a price list showed a passing promotion (input hardly dearer than a cache hit), the vendor's own price is
  listed: an estimate that is too high costs a little, one that is far too low sends everything the wrong way.
* DeepSeek's prices are those of its peak hours; off peak it bills half.
* A rule about limits holds for each model by itself, unless it says that the models share it.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from routerd.canonical import Fix, Limit, Price

Auth = Literal["bearer", "x-api-key"]
VARIANT_MARK = ":"


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of the wire models that one of the globs names: for each by itself, or ``shared`` between them."""

    models: tuple[str, ...]
    shared: bool = False
    limits: tuple[Limit, ...] = ()

    def covers(self, wire_model: str) -> bool:
        return any(fnmatchcase(wire_model, pattern) for pattern in self.models)


class FreeTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What costs nothing at a provider: the models its rules name, within their limits.

    A tier with a limit in dollars is a credit: its models keep their prices, for these use it up.
    """

    rules: tuple[Rule, ...]
    default_model: str = ""

    def covers(self, wire_model: str) -> bool:
        return any(rule.covers(wire_model) for rule in self.rules)

    @property
    def credit(self) -> bool:
        return any(limit.unit == "usd" for rule in self.rules for limit in rule.limits)


class ModelFix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What differs from the provider's ``fix`` for the wire models that one of the globs names."""

    models: tuple[str, ...]
    fix: dict[str, Any]


class Provider(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vendor's account as it comes out of the box.

    ``base_urls`` maps a dialect to the URL its path (``/chat/completions``, ``/responses``, ``/messages``) is appended
    to. ``dialect_auth`` and ``dialect_fix`` hold what differs from ``auth`` and ``fix`` in one of them; without the
    former, Messages takes its keys as its own vendor does. ``vendor`` names the hooks that know its quirks, if it has
    any; usually the id. ``dynamic``: its models are the user's to list. No ``api_key_env``: a local server that needs
    no key. ``retired``: why it is of no use any more.
    """

    id: str
    name: str
    base_urls: dict[str, str] = {}
    aliases: tuple[str, ...] = ()
    vendor: str = ""
    api_key_env: tuple[str, ...] = ()
    auth: Auth = "bearer"
    dialect_auth: dict[str, Auth] = {}
    headers: dict[str, str] = {}
    default_model: str = ""
    dynamic: bool = False
    retired: str = ""
    first_token_timeout_s: float | None = None
    fix: dict[str, Any] = {}
    fix_models: tuple[ModelFix, ...] = ()
    dialect_fix: dict[str, dict[str, Any]] = {}
    limits: tuple[Rule, ...] = ()
    free_tier: FreeTier | None = None

    def fix_for(self, wire_model: str, dialect: str = "") -> Fix:
        """What this provider demands of a request for that model; later entries win, and the dialect's own over all."""
        values = dict(self.fix)
        for entry in self.fix_models:
            if any(fnmatchcase(wire_model, pattern) for pattern in entry.models):
                values.update(entry.fix)
        values.update(self.dialect_fix.get(dialect, {}))
        return msgspec.convert(values, Fix)


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model at one provider. Prices in USD per million tokens; None: as the model itself says."""

    provider: str
    model: str  # the wire name
    input: float
    output: float
    cached: float | None = None
    context: int | None = None
    max_output: int | None = None

    @property
    def price(self) -> Price:
        return Price(self.input, self.output, self.cached)


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model under its public name. ``context`` and ``max_output`` in tokens; the first offer is the vendor's own."""

    id: str
    vendor: str
    context: int
    offers: tuple[Offer, ...]
    max_output: int | None = None
    tools: bool = True
    reasoning: bool = False
    images: bool = False
    aliases: tuple[str, ...] = ()


class _ModelFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    as_of: str
    models: tuple[Model, ...]


class Catalog(msgspec.Struct, frozen=True):
    """Everything shipped, by id. ``as_of`` is the date of the prices; ``names`` maps any other name to a public one."""

    as_of: str
    providers: Mapping[str, Provider]
    provider_aliases: Mapping[str, str]
    models: Mapping[str, Model]
    names: Mapping[str, str]
    offers: Mapping[str, tuple[tuple[Model, Offer], ...]]

    def provider(self, name: str) -> Provider | None:
        return self.providers.get(self.provider_aliases.get(name, name))

    def model(self, name: str) -> Model | None:
        """By public name, alias, ``vendor/model`` or well-known wire name, in any case."""
        return self.models.get(name) or self.models.get(self.names.get(name.lower(), ""))


def limits_for(rules: Iterable[Rule], wire_models: Iterable[str]) -> tuple[Limit, ...]:
    """The rules as limits for these models. The first rule that names a model holds for it."""
    remaining = tuple(wire_models)
    limits: list[Limit] = []
    for rule in rules:
        covered = tuple(model for model in remaining if rule.covers(model))
        remaining = tuple(model for model in remaining if model not in covered)
        patterns = rule.models if rule.shared else tuple(glob.escape(model) for model in covered)
        limits += [
            msgspec.structs.replace(limit, models=pattern) for pattern in patterns for limit in rule.limits if covered
        ]
    return tuple(limits)


def public_wire_name(wire_model: str) -> bool:
    """True for a wire name people know the model itself by: ``vendor/model`` without a variant mark."""
    return "/" in wire_model and VARIANT_MARK not in wire_model


def decode(providers: bytes, models: bytes) -> Catalog:
    """The catalog from the text of both files. Raises ``msgspec.DecodeError`` for what does not fit the structs."""
    known = msgspec.json.decode(providers, type=tuple[Provider, ...])
    file = msgspec.json.decode(models, type=_ModelFile)
    offers: dict[str, list[tuple[Model, Offer]]] = {provider.id: [] for provider in known}
    for model in file.models:
        for offer in model.offers:
            offers[offer.provider].append((model, offer))
    return Catalog(
        as_of=file.as_of,
        providers={provider.id: provider for provider in known},
        provider_aliases={alias: provider.id for provider in known for alias in provider.aliases},
        models={model.id: model for model in file.models},
        names=_names(file.models),
        offers={provider: tuple(offered) for provider, offered in offers.items()},
    )


def _names(models: Iterable[Model]) -> dict[str, str]:
    names: dict[str, str] = {}
    for model in models:
        wire_names = (offer.model for offer in model.offers if public_wire_name(offer.model))
        for name in (model.id, *model.aliases, f"{model.vendor}/{model.id}", *wire_names):
            names.setdefault(name.lower(), model.id)
    return names


@cache
def load() -> Catalog:
    """The shipped catalog, decoded at the first call."""
    folder = Path(__file__).parent
    return decode((folder / "providers.json").read_bytes(), (folder / "models.json").read_bytes())
