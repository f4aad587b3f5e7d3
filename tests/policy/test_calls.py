"""Is a tool call fit to be acted upon? What is not is refused, and repaired only where nothing is guessed."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.policy.calls import BAD_ARGUMENTS, Checked, check

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": ["string", "null"]}},
    "required": ["city"],
}
SCHEMAS = {"weather": WEATHER, "now": {"type": "object"}, "any": {}}
GOOD = '{"city": "Oslo"}'
FINE = Checked()


class TestCheck:
    @pytest.mark.parametrize(
        "arguments",
        [GOOD, '{"city": "Oslo", "days": 3.0}', '{"city": "Oslo", "unit": null}', '{"city": "Oslo", "more": [1]}'],
        ids=["plain", "a whole number with a point", "null where it is allowed", "what the schema does not name"],
    )
    def test_a_fitting_call_passes(self, arguments: str) -> None:
        """Untouched."""
        assert check("weather", arguments, SCHEMAS) == FINE

    @pytest.mark.parametrize(
        ("name", "arguments", "code"),
        [
            ("whether", GOOD, "unknown_tool"),
            ("weather", "{}", "missing_argument"),
            ("weather", '{"city": 1}', "wrong_type"),
            ("weather", '{"city": "Oslo", "days": 1.5}', "wrong_type"),
            ("weather", '{"city": "Oslo", "days": true}', "wrong_type"),
            ("weather", '{"city": "Os', BAD_ARGUMENTS),
            ("weather", '{"city": "Oslo" "extra"}', BAD_ARGUMENTS),
            ("weather", '["Oslo"]', BAD_ARGUMENTS),
            ("weather", "Oslo", BAD_ARGUMENTS),
            ("weather", "null", BAD_ARGUMENTS),
            ("weather", '{"city": NaN}', BAD_ARGUMENTS),
        ],
    )
    def test_what_is_wrong_is_named(self, name: str, arguments: str, code: str) -> None:
        """In a closed vocabulary."""
        assert check(name, arguments, SCHEMAS) == Checked(code)

    def test_without_schemas_only_the_json_counts(self) -> None:
        """The tools could not be read, or none were offered."""
        assert check("whatever", GOOD, {}) == FINE
        assert check("whatever", GOOD[:-1], {}) == Checked(BAD_ARGUMENTS)

    @pytest.mark.parametrize("schema", [{}, {"properties": 1}, {"required": "city"}, {"properties": {"city": 1}}])
    def test_a_schema_that_is_wrong_itself_refuses_nothing(self, schema: dict[str, Any]) -> None:
        """Whatever a client sent as one."""
        assert check("weather", GOOD, {"weather": schema}) == FINE

    def test_half_an_emoji_is_no_reason_to_refuse(self) -> None:
        """Agents read such JSON, though strict parsers do not."""
        assert check("weather", '{"city": "\\ud83d"}', SCHEMAS) == FINE

    def test_numbers_of_any_size_are_numbers(self) -> None:
        """Four hundred digits included."""
        assert check("weather", '{"city": "Oslo", "days": 1' + "0" * 400 + "}", SCHEMAS) == FINE

    @given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
    def test_any_text_gets_an_answer(self, arguments: str) -> None:
        """And what passes is a JSON object."""
        checked = check("any", arguments, SCHEMAS)

        if not checked.code:
            assert isinstance(json.loads(checked.repaired or arguments), dict)


class TestRepair:
    @pytest.mark.parametrize(
        "arguments",
        [
            json.dumps(GOOD),
            f"```json\n{GOOD}\n```",
            f"```\n{GOOD}```",
            f"```json\n{json.dumps(GOOD)}\n```",
            '{"city": "Oslo",}',
            '{"city": "Oslo"\n,\n}',
        ],
        ids=["encoded twice", "in a fence", "in a bare fence", "both", "comma", "comma on a line of its own"],
    )
    def test_what_can_only_mean_one_thing_is_put_right(self, arguments: str) -> None:
        """The arguments are what the model plainly meant."""
        checked = check("weather", arguments, SCHEMAS)

        assert not checked.code
        assert json.loads(checked.repaired or "") == json.loads(GOOD)

    def test_no_arguments_at_all_are_an_empty_object(self) -> None:
        """Some vendors spell it so; an agent's JSON parser does not."""
        assert check("now", "", SCHEMAS) == Checked(repaired="{}")
        assert check("now", " \n", SCHEMAS) == Checked(repaired="{}")
        assert check("weather", "", SCHEMAS) == Checked("missing_argument", repaired="{}")

    def test_text_inside_strings_is_left_alone(self) -> None:
        """Commas, brackets and escaped quotes there are the model's own."""
        checked = check("weather", '{"city": "a,} \\",]",}', SCHEMAS)

        assert checked.repaired == '{"city": "a,} \\",]"}'

    @pytest.mark.parametrize(
        "arguments", ["{,}", '{"city":,}', '{"city": "Oslo",,}', '{"city": [,]}', '{"city": "Oslo",']
    )
    def test_a_comma_after_nothing_may_mean_anything(self, arguments: str) -> None:
        """Something is missing there, and nobody knows what."""
        assert check("weather", arguments, SCHEMAS) == Checked(BAD_ARGUMENTS)

    @pytest.mark.parametrize("arguments", [json.dumps("{}"), "```\n{}\n```", '{"days": 1,}'])
    def test_what_then_does_not_fit_the_schema_was_no_repair(self, arguments: str) -> None:
        """The city is still missing."""
        assert check("weather", arguments, SCHEMAS) == Checked(BAD_ARGUMENTS)

    def test_without_a_schema_nothing_is_repaired(self) -> None:
        """There would be nothing to tell that it came out right."""
        assert check("any", json.dumps(GOOD), SCHEMAS) == Checked(BAD_ARGUMENTS)

    @pytest.mark.parametrize("filler", ['\\"x', ", ", ",   ", "[{", "```", " "])
    def test_a_megabyte_of_broken_arguments_is_judged_quickly(self, filler: str) -> None:
        """The time is linear: half a file that a model was writing must not hold up all other exchanges."""
        began = time.perf_counter()
        check("weather", '{"city": "' + filler * (1_000_000 // len(filler)), SCHEMAS)

        assert time.perf_counter() - began < 2.0

    @given(
        st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers() | st.lists(st.booleans(), max_size=3))
    )
    def test_repair_gives_back_what_was_encoded(self, more: dict[str, Any]) -> None:
        """Whatever the arguments are, a fence, a second encoding or a last comma changes nothing in them."""
        arguments = {**more, "city": "Oslo", "days": 1, "unit": None}
        text = json.dumps(arguments)

        for spoilt in (json.dumps(text), f"```json\n{text}\n```", text[:-1] + ",}"):
            checked = check("weather", spoilt, SCHEMAS)
            assert json.loads(checked.repaired or "") == arguments
