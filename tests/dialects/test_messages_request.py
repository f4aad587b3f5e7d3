"""Requests of the Messages dialect: read for routing, fitted to upstreams, written anew for other dialects."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from routerd.canonical import BadRequest, Document, Fix, Image, Price, Reasoning, Remembered, Text, Upstream, seal_key
from routerd.dialects.messages import DIALECT

UPSTREAM = Upstream("vendor", 0, "model", "wire-model", "messages", 100_000, 8192, Price())
USER = {"role": "user", "content": "Hi."}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "shell", "input": {}}
RESULT: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}]}
TOOL = {"name": "shell", "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "seal"}


def request(*turns: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "auto", "max_tokens": 100, "messages": list(turns) or [USER]} | fields).encode()


def patched(body: bytes, fix: Fix = Fix(), recall: Any = None, **fields: Any) -> dict[str, Any]:  # noqa: B008 - frozen
    upstream = msgspec.structs.replace(UPSTREAM, fix=fix, **fields)
    return dict(json.loads(DIALECT.patch_request(body, DIALECT.read_head(body), upstream, recall)))


# --- read -------------------------------------------------------------------------------------------------------------


def test_head() -> None:
    """What routing needs to know."""
    head = DIALECT.read_head(request(tools=[TOOL], stream=True, max_tokens=7))

    assert (head.model, head.stream, head.tools, head.images, head.max_output_tokens) == ("auto", True, True, False, 7)
    assert head.streamable


def test_images_count_as_tokens_and_not_as_bytes() -> None:
    """A large picture does not make a long prompt."""
    source = {"type": "base64", "media_type": "image/png", "data": "A" * 400_000}
    head = DIALECT.read_head(request({"role": "user", "content": [{"type": "image", "source": source}]}))

    assert head.images
    assert 1600 <= head.prompt_tokens < 1800


def test_conversation_is_the_same_while_cache_marks_wander() -> None:
    """A mark makes a list of a string, and that is the same conversation all the same."""
    marked = {"role": "user", "content": [{"type": "text", "text": "Hi.", "cache_control": {"type": "ephemeral"}}]}
    plain = DIALECT.read_head(request(USER, system="Be brief."))
    later = DIALECT.read_head(request(marked, {"role": "assistant", "content": "Yes?"}, USER, system="Be brief."))
    other = DIALECT.read_head(request({"role": "user", "content": "Ho."}, system="Be brief."))

    assert plain.conversation == later.conversation != other.conversation


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"mcp_servers": [{"type": "url", "url": "https://example.org", "name": "x"}]},
    ],
)
def test_what_servers_do_cannot_be_streamed_for_a_client_that_does_not(fields: dict[str, Any]) -> None:
    """Their results have no place in events, so such an answer is fetched whole."""
    assert not DIALECT.read_head(request(**fields)).streamable


# --- patched ----------------------------------------------------------------------------------------------------------


def test_history_stays_byte_for_byte() -> None:
    """What an upstream's cache is keyed on is not touched."""
    body = b'{"model": "auto", "messages": [ {"role":"user",  "content":"H\\u00ef"} ], "tools": [ ], "max_tokens": 5}'
    sent = DIALECT.patch_request(body, DIALECT.read_head(body), UPSTREAM)

    assert b'[ {"role":"user",  "content":"H\\u00ef"} ]' in sent


@pytest.mark.parametrize(("asked", "most", "sent"), [(100_000, 8192, 8192), (10, 8192, 10), (None, 8192, 8192)])
def test_output_limit(asked: int | None, most: int, sent: int) -> None:
    """Clamped to what the model can give; required here, so it is there even if nobody asked."""
    assert patched(request(max_tokens=asked), max_output_tokens=most)["max_tokens"] == sent


def test_thinking_gets_room() -> None:
    """A budget must stay below the limit of the whole answer."""
    body = request(max_tokens=100_000, thinking={"type": "enabled", "budget_tokens": 50_000})

    assert patched(body)["thinking"]["budget_tokens"] == 4096


def test_thinking_by_effort() -> None:
    """Where a budget is refused, effort says the same."""
    body = request(max_tokens=20_000, thinking={"type": "enabled", "budget_tokens": 5000})
    sent = patched(body, Fix(thinking="adaptive"))

    assert sent["thinking"] == {"type": "adaptive"}
    assert sent["output_config"] == {"effort": "medium"}


def test_no_thinking_behind_a_call_without_it() -> None:
    """A turn that called tools without thinking cannot be taken up with it."""
    turns = (USER, {"role": "assistant", "content": [CALL]}, RESULT)
    body = request(*turns, max_tokens=8000, thinking={"type": "enabled", "budget_tokens": 2000})

    assert "thinking" not in patched(body)


def _assistant(*blocks: Any) -> tuple[Any, ...]:
    return USER, {"role": "assistant", "content": list(blocks)}, RESULT


def _kinds(sent: dict[str, Any]) -> list[str]:
    return [block["type"] for block in sent["messages"][1]["content"]]


STRICT = Fix(reasoning_content="reject")


@pytest.mark.parametrize(
    ("thought", "author", "kinds"),
    [
        (THOUGHT, "vendor/wire-model", ["thinking", "tool_use"]),
        (THOUGHT, "other/wire-model", ["tool_use"]),
        (THOUGHT, None, ["thinking", "tool_use"]),
        (THOUGHT | {"signature": ""}, "vendor/wire-model", ["thinking", "tool_use"]),
        (THOUGHT | {"signature": ""}, None, ["tool_use"]),
    ],
)
def test_seals(thought: Any, author: str | None, kinds: list[str]) -> None:
    """Who checks seals gets its own; what is not its own is taken out, and its own that was left out put back."""
    remembered = author and Remembered(author, (Reasoning("Hm.", "seal"),))
    sent = patched(request(*_assistant(thought, CALL)), STRICT, lambda _: remembered or None)

    assert _kinds(sent) == kinds
    assert all(block.get("signature", "seal") == "seal" for block in sent["messages"][1]["content"])


@pytest.mark.parametrize(
    ("author", "kinds"),
    [
        ("vendor/wire-model", ["thinking", "redacted_thinking", "tool_use"]),
        ("other/wire-model", ["tool_use"]),
    ],
)
def test_thinking_that_only_its_author_can_read_is_put_back(author: str, kinds: list[str]) -> None:
    """In its place among the rest of the thinking, for its author alone."""
    remembered = Remembered(author, (Reasoning("Hm.", "seal"), Reasoning("", sealed="gAAA")))
    sent = patched(request(*_assistant(CALL)), STRICT, lambda _: remembered)

    assert _kinds(sent) == kinds
    redacted = [block for block in sent["messages"][1]["content"] if block["type"] == "redacted_thinking"]
    assert all(block == {"type": "redacted_thinking", "data": "gAAA"} for block in redacted)


def test_sealed_thinking_of_others_is_no_thinking_that_is_demanded() -> None:
    """Who demands any gets what has words."""
    remembered = Remembered("other/model", (Reasoning("", sealed="gAAA"), Reasoning("Hm.", "seal")))
    sent = patched(request(*_assistant(CALL)), Fix(reasoning_content="require"), lambda _: remembered)

    assert _kinds(sent) == ["thinking", "tool_use"]


@pytest.mark.parametrize("thought", [THOUGHT, {"type": "redacted_thinking", "data": "seal"}])
@pytest.mark.parametrize(("author", "kept"), [("vendor/wire-model", True), ("other/model", False)])
def test_seals_of_a_turn_without_calls(thought: Any, author: str, *, kept: bool) -> None:
    """Whose it was is known by the seal itself."""
    known = {seal_key("seal"): Remembered(author, (Reasoning("", "seal"),))}
    body = request(USER, {"role": "assistant", "content": [thought, {"type": "text", "text": "Yes?"}]}, USER)

    assert (thought["type"] in _kinds(patched(body, STRICT, known.get))) is kept


def test_thinking_that_is_demanded_is_put_back() -> None:
    """By whoever it was thought; a foreign seal stays away."""
    remembered = Remembered("other/model", (Reasoning("Hm.", "seal"),))
    sent = patched(request(*_assistant(CALL)), Fix(reasoning_content="require"), lambda _: remembered)

    assert sent["messages"][1]["content"][0] == {"type": "thinking", "thinking": "Hm.", "signature": ""}


def test_ids() -> None:
    """Ids of another vendor's making get a form that is accepted, the same for call and result, every time."""
    call = CALL | {"id": "functions.shell:0"}
    result = {"role": "user", "content": [RESULT["content"][0] | {"tool_use_id": "functions.shell:0"}]}
    body = request(USER, {"role": "assistant", "content": [call]}, result)
    first, second = patched(body, Fix(call_id_limit=64)), patched(body, Fix(call_id_limit=64))

    identity = first["messages"][1]["content"][0]["id"]
    assert identity.isascii()
    assert "." not in identity
    assert identity == first["messages"][2]["content"][0]["tool_use_id"]
    assert first == second


def test_cache_marks() -> None:
    """A client that knows of no caches gets the marks: on the system prompt and on the end of the conversation."""
    sent = patched(request(USER, system="Be brief."), Fix(cache_markers=True))

    mark = {"type": "ephemeral"}
    assert sent["system"] == [{"type": "text", "text": "Be brief.", "cache_control": mark}]
    assert sent["messages"][-1]["content"] == [{"type": "text", "text": "Hi.", "cache_control": mark}]


def test_cache_marks_of_the_client_stand() -> None:
    """Who sets marks knows better where."""
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]

    assert patched(request(USER, system=system), Fix(cache_markers=True))["messages"] == [USER]


# --- taken up again, tools --------------------------------------------------------------------------------------------


def test_continued_by_a_trailing_turn() -> None:
    """No white space at its end, and no thinking: the vendor refuses both."""
    body = request(thinking={"type": "enabled", "budget_tokens": 1024})
    sent = json.loads(DIALECT.continue_request(body, "Half a \n", "trailing"))

    assert sent["messages"][-1] == {"role": "assistant", "content": "Half a"}
    assert "thinking" not in sent


def test_schemas() -> None:
    """By name; a tool without one makes all of them unknown."""
    assert DIALECT.tool_schemas(request(tools=[TOOL])) == {"shell": TOOL["input_schema"]}
    assert DIALECT.tool_schemas(request(tools=[TOOL, {"type": "bash_20250124", "name": "bash"}])) == {}


# --- written anew -----------------------------------------------------------------------------------------------------


def test_documents() -> None:
    """Data and addresses cross; a text crosses as a text; what only the vendor holds does not."""
    blocks = [
        {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"},
            "title": "a",
        },
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
    ]
    (turn,) = DIALECT.decode_request(request({"role": "user", "content": blocks})).messages

    assert turn.blocks == (
        Image("https://example.org/a.png"),
        Document("data:application/pdf;base64,JVBE", name="a"),
        Text("words"),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"mcp_servers": [{"type": "url", "url": "https://example.org", "name": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "search_result", "source": {}}]}]},
    ],
)
def test_what_cannot_cross_is_refused(fields: dict[str, Any]) -> None:
    """In words, where the answer would depend on it."""
    with pytest.raises(BadRequest) as refused:
        DIALECT.decode_request(request(**fields))

    assert refused.value.failure.code == "unsupported"


def test_what_is_dropped_is_named() -> None:
    """Where the answer does not depend on it."""
    assert DIALECT.decode_request(request(top_k=5, service_tier="auto")).dropped == ("top_k", "service_tier")


def test_odd_history_is_written_as_the_vendor_takes_it() -> None:
    """No text that says nothing, neighbours of one role in one turn, results in front."""
    body = request(
        {"role": "user", "content": [{"type": "text", "text": " "}, {"type": "text", "text": "a"}]},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, RESULT["content"][0]]},
    )
    turns = json.loads(DIALECT.encode_request(DIALECT.decode_request(body)))["messages"]

    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert [block["text"] for block in turns[0]["content"]] == ["a", "b"]
    assert [block["type"] for block in turns[2]["content"]] == ["tool_result", "text"]


def test_arguments_that_are_none_become_an_empty_object() -> None:
    """A history that went wrong elsewhere is no reason to refuse the conversation."""
    body = DIALECT.encode_request(DIALECT.decode_request(request(*_assistant(CALL | {"input": [1]}))))

    assert json.loads(body)["messages"][1]["content"][0]["input"] == {}
