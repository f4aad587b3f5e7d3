"""Looking things up in the catalog."""

from __future__ import annotations

import json

import msgspec
import pytest

from routerd import catalog
from routerd.canonical import Limit
from routerd.catalog import Rule, limits_for

CATALOG = catalog.load()


@pytest.mark.parametrize(
    "name",
    [
        "mimo-v2.6-pro",
        "MiMo-V2.6-Pro",
        "xiaomi/mimo-v2.6-pro",
        "Xiaomi/MiMo-V2.6-Pro",
    ],
)
def test_a_model_is_found_by_each_of_its_names(name: str) -> None:
    """Its public name, its vendor's and aggregators' names for it, in any case."""
    model = CATALOG.model(name)

    assert model is not None
    assert model.id == "mimo-v2.6-pro"


def test_a_model_is_found_by_its_alias() -> None:
    """Vendors rename models; old names go on leading to them."""
    model = CATALOG.model("deepseek-v4-flash")

    assert model is not None
    assert model.id == "deepseek-flash"


@pytest.mark.parametrize("name", ["google/gemma-4-31b-it:free", "mimo-v2.6-flash-free", "no-such-model", ""])
def test_a_variant_is_not_the_model_itself(name: str) -> None:
    """A name that stands for another price never leads to the model in general."""
    found = CATALOG.model(name)

    assert found is None or found.id.endswith(":free")


def test_a_provider_is_found_by_its_alias() -> None:
    """People say Qwen where the vendor says DashScope."""
    provider = CATALOG.provider("qwen")

    assert provider is not None
    assert provider.id == "dashscope"
    assert CATALOG.provider("nobody") is None


@pytest.mark.parametrize(
    ("provider", "wire_model", "field", "expected"),
    [
        ("openai", "gpt-6.1-terra", "max_tokens_field", "max_completion_tokens"),
        ("openai", "gpt-6.1-terra", "temperature", False),
        ("openai", "gpt-4.1", "temperature", True),
        ("openai", "gpt-4.1", "developer_role", True),
        ("moonshot", "kimi-k3", "temperature", False),
        ("moonshot", "kimi-k3", "rejected_fields", ("store",)),
        ("moonshot", "kimi-k2.6", "rejected_fields", ("store", "reasoning_effort")),
        ("moonshot", "kimi-k2.6", "tool_choice_required", "auto"),
        ("openrouter", "openai/gpt-6.1-sol", "developer_role", True),
        ("openrouter", "xiaomi/mimo-v2.6-pro", "developer_role", False),
        ("anthropic", "claude-opus-4-5", "temperature", True),
        ("anthropic", "claude-opus-4-8", "temperature", False),
        ("anthropic", "claude-sonnet-5-5", "temperature", False),
        ("mimo", "mimo-v2.6-pro", "reasoning_content", "require"),
        ("mimo-token-plan-ams", "mimo-v2.6-pro", "string_tool_content", True),
        ("mistral", "mistral-large-4", "tool_choice_required", "any"),
        ("groq", "openai/gpt-oss-120b", "reasoning_content", "reject"),
        ("gemini", "gemini-3.8-flash", "thought_signatures", True),
        ("gemini", "gemini-2.5-pro", "blank_signature", ""),
        ("mistral", "mistral-large-4", "call_id_length", 9),
        ("openai", "gpt-6.1-terra", "call_id_limit", 40),
        ("openrouter", "anthropic/claude-sonnet-5.5", "call_id_limit", 64),
        ("openrouter", "anthropic/claude-sonnet-5.5", "cache_markers", True),
        ("openrouter", "xiaomi/mimo-v2.6-pro", "reasoning_content", "require"),
        ("openrouter", "xiaomi/mimo-v2.6-pro", "reasoning_details", True),
        ("nvidia", "moonshotai/kimi-k2.6", "parallel_tool_calls", False),
    ],
)
def test_fixes_are_those_of_the_provider_and_then_of_the_model(
    provider: str, wire_model: str, field: str, expected: object
) -> None:
    """What a model needs beyond its provider's rules is added to them."""
    assert expected == getattr(CATALOG.providers[provider].fix_for(wire_model), field)


def test_a_blank_seal_is_json() -> None:
    """It is put into requests as it stands."""
    assert json.loads(CATALOG.providers["gemini"].fix_for("gemini-3.8-flash").blank_signature)["google"]


def test_limits_hold_for_each_model_by_itself() -> None:
    """One limit per model, whose pattern matches this model only."""
    rule = Rule(("flash-*",), limits=(Limit(5, "requests", "minute"),))

    limits = limits_for([rule], ["flash-1", "flash-2", "pro"])

    assert [limit.models for limit in limits] == ["flash-1", "flash-2"]


def test_shared_limits_hold_for_the_whole_pattern() -> None:
    """One limit for all the models together."""
    rule = Rule(("*:free",), shared=True, limits=(Limit(50, "requests", "day", "UTC"),))

    assert (Limit(50, "requests", "day", "UTC", "*:free"),) == limits_for([rule], ["a:free", "b:free", "c"])


def test_the_first_rule_that_names_a_model_holds() -> None:
    """The narrow rule stands before the wide one."""
    narrow = Rule(("*-lite",), limits=(Limit(500, "requests", "day"),))
    wide = Rule(("*",), limits=(Limit(20, "requests", "day"),))

    limits = limits_for([narrow, wide], ["flash", "flash-lite"])

    assert {limit.models: limit.amount for limit in limits} == {"flash-lite": 500, "flash": 20}


def test_a_model_with_pattern_characters_in_its_name_limits_only_itself() -> None:
    """Some wire names hold brackets."""
    rule = Rule(("*",), limits=(Limit(5, "requests", "minute"),))

    assert limits_for([rule], ["claude[1m]"])[0].models == "claude[[]1m]"


def test_rules_without_a_model_of_theirs_give_no_limits() -> None:
    """A limit nothing can use up would only clutter the metrics."""
    assert limits_for([Rule(("a-*",), shared=True, limits=(Limit(5, "requests", "minute"),))], ["b-1"]) == ()


def test_a_tier_with_dollars_is_a_credit() -> None:
    """Its models keep their prices, since these use the credit up."""
    tiers = {name: CATALOG.providers[name].free_tier for name in ("mistral", "groq")}

    assert {name: tier is not None and tier.credit for name, tier in tiers.items()} == {"mistral": True, "groq": False}


def test_unknown_fields_are_refused() -> None:
    """Whatever stands in the data is declared."""
    with pytest.raises(msgspec.ValidationError, match="unknown field `typo`"):
        catalog.decode(b'[{"id":"a","name":"A","typo":1}]', b'{"as_of":"2026-01-01","models":[]}')
