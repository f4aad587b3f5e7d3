"""A chat request for the rest of an answer that broke off, and the schemas its calls are held against."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import COMPLETE
from routerd.dialects import DIALECTS

CHAT = DIALECTS["chat"]
SENT = "The report is written. It has three "
SHOWN = SENT.rstrip()
MANNERS = ("instructed", "trailing", "prefix", "partial", "flags")
ASKED = {
    "model": "auto",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How did it go?"}],
    "tools": [{"type": "function", "function": {"name": "now"}}],
    "stream": True,
    "seed": 7,
}


def going_on(manner: str, text: str = SENT, asked: Any = ASKED) -> dict[str, Any]:
    """The request for the rest."""
    request: dict[str, Any] = json.loads(CHAT.continue_request(json.dumps(asked).encode(), text, manner))
    return request


class TestContinue:
    @pytest.mark.parametrize("manner", MANNERS)
    def test_all_that_was_asked_still_stands(self, manner: str) -> None:
        """The conversation is the same up to the broken-off turn, and so is every other field."""
        request = going_on(manner)

        assert ASKED["messages"] == request["messages"][:2]
        assert {name: request[name] for name in ASKED} | {"messages": ASKED["messages"]} == ASKED

    @pytest.mark.parametrize(
        ("manner", "turn", "fields"),
        [
            ("trailing", {}, {}),
            ("prefix", {"prefix": True}, {}),
            ("partial", {"partial": True}, {}),
            ("flags", {}, {"continue_final_message": True, "add_generation_prompt": False}),
        ],
    )
    def test_the_turn_is_left_open(self, manner: str, turn: dict[str, Any], fields: dict[str, Any]) -> None:
        """As the vendor's documentation has it; without white space at its end, which some refuse."""
        request = going_on(manner)

        assert request["messages"][2:] == [{"role": "assistant", "content": SHOWN} | turn]
        assert request.keys() - ASKED.keys() == fields.keys()
        assert fields.items() <= request.items()

    def test_in_words_the_turn_is_closed_and_asked_about(self) -> None:
        """With its end quoted, and a word for the case that nothing is missing."""
        turn, question = going_on("instructed")["messages"][2:]

        assert turn == {"role": "assistant", "content": SHOWN}
        assert question["role"] == "user"
        assert SHOWN in question["content"]
        assert COMPLETE in question["content"]

    def test_only_the_end_of_a_long_text_is_quoted(self) -> None:
        """The turn itself has all of it."""
        text = "word " * 10_000
        turn, question = going_on("instructed", text)["messages"][2:]

        assert turn["content"] == text.rstrip()
        assert len(question["content"]) < 1000

    @given(st.text(), st.sampled_from(MANNERS))
    def test_any_text_can_be_gone_on_with(self, text: str, manner: str) -> None:
        """Quotes, line ends, other scripts."""
        assert going_on(manner, text)["messages"][2]["content"] == text.rstrip()

    def test_a_request_with_broken_characters_can_be_gone_on_with(self) -> None:
        """Half an emoji in the history is no obstacle."""
        body = b'{"model":"auto","messages":[{"role":"user","content":"\\ud83d"}]}'
        request = json.loads(CHAT.continue_request(body, SENT, "trailing"))

        assert [message["role"] for message in request["messages"]] == ["user", "assistant"]


class TestSchemas:
    def test_each_tool_has_its_schema(self) -> None:
        """By name; one without parameters has an empty one. The old form counts as well."""
        weather = {"type": "object", "required": ["city"]}
        body = {
            "tools": [
                {"type": "function", "function": {"name": "weather", "parameters": weather}},
                {"type": "function", "function": {"name": "now"}},
            ],
            "functions": [{"name": "old", "parameters": weather}],
        }

        assert CHAT.tool_schemas(json.dumps(body).encode()) == {"weather": weather, "now": {}, "old": weather}

    @pytest.mark.parametrize(
        "body",
        [
            b"{}",
            b"not JSON",
            b'{"tools": null}',
            b'{"tools": 1}',
            b'{"tools": [{"type": "web_search"}, {"type": "function", "function": {"name": "now"}}]}',
        ],
        ids=["none", "no JSON", "null", "no list", "an unknown kind of tool"],
    )
    def test_what_cannot_be_read_holds_no_call_up(self, body: bytes) -> None:
        """Half a list would make good calls look unknown."""
        assert CHAT.tool_schemas(body) == {}
