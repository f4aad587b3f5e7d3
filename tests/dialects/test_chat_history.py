"""A history as an upstream will have it: what clients dropped is put back, what others sealed is left out."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import Fix, Price, Reasoning, Recall, Remembered, Upstream
from routerd.dialects.chat import DIALECT
from routerd.dialects.chat_history import CACHE_MARKS_MAX

SYSTEM = {"role": "system", "content": "You are careful."}
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "terminal", "parameters": {}}}
MARK = {"type": "ephemeral"}

SEAL = {"google": {"thought_signature": "CpwB+/=="}}
BLANK = {"google": {"thought_signature": "any"}}
DETAILS = [{"type": "reasoning.text", "text": "Look first.", "signature": "Eq", "index": 0}]

MINE = Remembered("lab/m", (Reasoning("Look first."),), json.dumps(DETAILS), {"call_a": json.dumps(SEAL)})
THEIRS = Remembered("other/m", MINE.thinking, MINE.details, MINE.signatures)


def call(call_id: Any = "call_a", **fields: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "terminal", "arguments": "{}"}} | fields


def calling(*calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "ok", "tool_calls": list(calls or (call(),))} | fields


def result(call_id: str = "call_a", content: Any = "a b") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def request_of(*messages: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"messages": messages, "model": "auto"} | fields, separators=(",", ":")).encode()


def patch(request: bytes, fix: Fix, recall: Recall | None = None) -> bytes:
    upstream = Upstream("lab", 0, "m", "m", "chat", 128_000, None, Price(), fix=fix)
    return DIALECT.patch_request(request, DIALECT.read_head(request), upstream, recall)


def fitted(fix: Fix, *messages: dict[str, Any], recall: Recall | None = None, **fields: Any) -> Any:
    return json.loads(patch(request_of(*messages, **fields), fix, recall))["messages"]


def knows(remembered: Remembered) -> Recall:
    """A memory of the one call there is."""
    return {"call_a": remembered}.get


# --- thinking as text -------------------------------------------------------------------------------------------------

REQUIRE = Fix(reasoning_content="require")


@pytest.mark.parametrize("remembered", [MINE, THEIRS], ids=["its own", "another's"])
@pytest.mark.parametrize("left", [{}, {"reasoning_content": ""}, {"reasoning_content": " "}, {"reasoning": None}])
def test_thinking_is_put_back(left: dict[str, Any], remembered: Remembered) -> None:
    """Whoever demands thinking gets what was thought, by whichever model, for nothing or for a client's blank."""
    messages = fitted(REQUIRE, calling(**left), recall=knows(remembered))

    assert [calling(**left) | {"reasoning_content": "Look first."}] == messages


def test_the_clients_own_thinking_stands() -> None:
    """What a client did send back is not replaced."""
    for kept in ({"reasoning_content": "So."}, {"reasoning": "So."}):
        (message,) = fitted(REQUIRE, calling(**kept), recall=knows(MINE))

        assert message["reasoning_content"] == "So."


@pytest.mark.parametrize("thinking", [(), (Reasoning(""),), (Reasoning(" \n"),)])
def test_no_thinking_to_put_back(thinking: tuple[Reasoning, ...]) -> None:
    """An empty text is refused like a missing one, so it becomes a blank."""
    (message,) = fitted(REQUIRE, calling(), recall=knows(Remembered("lab/m", thinking)))

    assert message["reasoning_content"] == " "


def test_any_call_of_a_turn_leads_to_its_thinking() -> None:
    """A client may have dropped or renamed some of several parallel calls."""
    (message,) = fitted(REQUIRE, calling(call("renamed"), call(None), call()), recall=knows(MINE))

    assert message["reasoning_content"] == "Look first."


def test_thinking_is_not_put_back_for_others() -> None:
    """Where it is not demanded the messages stay byte for byte; where it is refused it stays out."""
    request = request_of(SYSTEM, USER, calling(), result())
    messages = request[: request.index(b',"model"')].removeprefix(b"{")

    for fix in (Fix(), Fix(developer_role=False), Fix(reasoning_content="reject")):
        assert messages in patch(request, fix, knows(MINE))


def test_turns_without_calls_stay() -> None:
    """Nothing is demanded of them, and nothing is known of them."""
    plain = {"role": "assistant", "content": "done"}

    assert [plain, USER] == fitted(REQUIRE, plain, USER, recall=knows(MINE))


# --- sealed thinking --------------------------------------------------------------------------------------------------

DETAILED = Fix(reasoning_details=True)


@pytest.mark.parametrize(
    ("kept", "remembered", "sent"),
    [
        ({}, MINE, {"reasoning_details": DETAILS}),
        ({"reasoning_details": [1]}, MINE, {"reasoning_details": [1]}),
        ({}, THEIRS, {}),
        ({"reasoning_details": DETAILS}, THEIRS, {}),
        ({"reasoning_details": DETAILS}, None, {"reasoning_details": DETAILS}),
        ({}, None, {}),
    ],
)
def test_sealed_thinking_goes_to_its_author(
    kept: dict[str, Any], remembered: Remembered | None, sent: dict[str, Any]
) -> None:
    """Only the model that sealed it can open it; where the author is unknown the client is believed."""
    recall = knows(remembered) if remembered is not None else None

    assert [calling(**sent)] == fitted(DETAILED, calling(**kept), recall=recall)


def test_sealed_thinking_goes_to_nobody_else() -> None:
    """Upstreams that never seal any refuse the field or ignore it."""
    for fix in (Fix(), REQUIRE, Fix(reasoning_content="reject")):
        (message,) = fitted(fix, calling(reasoning_details=DETAILS), recall=knows(MINE))

        assert "reasoning_details" not in message


# --- sealed calls -----------------------------------------------------------------------------------------------------

SEALED = call(extra_content=SEAL)
SIGNED = Fix(thought_signatures=True)
STRICT = Fix(thought_signatures=True, blank_signature=json.dumps(BLANK))


@pytest.mark.parametrize("fix", [SIGNED, STRICT])
def test_seals_are_put_back(fix: Fix) -> None:
    """Each call gets its own; of parallel calls only the first has one, and that is right."""
    messages = fitted(fix, calling(call(), call("call_b")), recall=knows(MINE))

    assert [calling(SEALED, call("call_b"))] == messages


@pytest.mark.parametrize(
    ("kept", "remembered", "sent"),
    [
        (call(), None, call(extra_content=BLANK)),
        (call(), THEIRS, call(extra_content=BLANK)),
        (SEALED, THEIRS, call(extra_content=BLANK)),
        (call(), Remembered("lab/m", MINE.thinking), call(extra_content=BLANK)),
        (SEALED, MINE, SEALED),
        (SEALED, None, SEALED),
    ],
)
def test_a_blank_stands_for_a_missing_seal(
    kept: dict[str, Any], remembered: Remembered | None, sent: dict[str, Any]
) -> None:
    """A model that insists on seals takes other models' calls with the blank its vendor has for that."""
    recall = knows(remembered) if remembered is not None else None

    assert [calling(sent, call("b"))] == fitted(STRICT, calling(kept, call("b")), recall=recall)


def test_no_blank_where_the_vendor_has_none() -> None:
    """Models that do not insist are sent nothing made up, and nobody else's seals."""
    assert fitted(SIGNED, calling(), recall=knows(THEIRS)) == [calling()]
    assert fitted(SIGNED, calling(SEALED), recall=knows(THEIRS)) == [calling()]


# --- ids --------------------------------------------------------------------------------------------------------------

NINE, FORTY = Fix(call_id_length=9), Fix(call_id_limit=40)
LONG = "chatcmpl-tool-" + "0123456789abcdef" * 2
COUNTED = "functions.terminal:0"


@pytest.mark.parametrize(
    ("fix", "call_id"),
    [
        (NINE, "D681PevKs"),
        (NINE, "123456789"),
        (FORTY, "call_8c1f0e55aa0912cd"),
        (FORTY, "toolu-A_9"),
        (FORTY, "x" * 40),
        (Fix(), LONG),
        (Fix(), COUNTED),
    ],
)
def test_fitting_ids_stay(fix: Fix, call_id: str) -> None:
    """An upstream's own ids come back to it as they were."""
    messages = [calling(call(call_id)), result(call_id)]

    assert messages == fitted(fix, *messages)


@pytest.mark.parametrize(
    ("fix", "call_id", "length"),
    [
        (NINE, "call_8c1f0e55aa0912cd", 9),
        (NINE, "call_1234", 9),
        (NINE, "1", 9),
        (NINE, "é" * 9, 9),
        (FORTY, LONG, 21),
        (FORTY, COUNTED, 21),
        (Fix(call_id_limit=12), LONG, 12),
    ],
)
def test_other_ids_are_replaced(fix: Fix, call_id: str, length: int) -> None:
    """A call and its result get the same new id, and the next request gives it to them again."""
    call_of, result_of = fitted(fix, calling(call(call_id)), result(call_id))
    new = call_of["tool_calls"][0]["id"]

    assert (calling(call(new)), result(new)) == (call_of, result_of)
    assert len(new) == length
    assert new.isascii()
    assert new.isalnum()
    assert [call_of, result_of, USER] == fitted(fix, calling(call(call_id)), result(call_id), USER)


def test_new_ids_differ() -> None:
    """Parallel calls stay apart."""
    (message,) = fitted(NINE, calling(*(call(f"call_{number}") for number in range(500))))

    assert len({made["id"] for made in message["tool_calls"]}) == 500


def test_new_ids_hide_nothing_from_memory() -> None:
    """Memory is asked under the ids the client knows."""
    fix = Fix(reasoning_content="require", call_id_length=9)
    (message,) = fitted(fix, calling(), recall=knows(MINE))

    assert message["reasoning_content"] == "Look first."


@pytest.mark.parametrize("call_id", [None, 7, ""])
def test_odd_ids(call_id: Any) -> None:
    """What is no id is for the upstream to refuse."""
    messages = [calling(call(call_id)), result() | {"tool_call_id": call_id}]

    assert messages == fitted(NINE, *messages)


# --- marks for caches -------------------------------------------------------------------------------------------------

MARKS = Fix(cache_markers=True)


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": text} | fields


def marked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a mark behind its text."""
    return message | {"content": [part(message["content"], cache_control=MARK)]}


def marks_of(messages: list[dict[str, Any]]) -> list[int]:
    return [place for place, message in enumerate(messages) if "cache_control" in json.dumps(message)]


def agents(turns: int, parallel: int = 1) -> list[dict[str, Any]]:
    """A conversation of so many turns with tools."""
    messages = [SYSTEM, USER]
    for turn in range(turns):
        ids = [f"call_{turn}_{number}" for number in range(parallel)]
        messages += [calling(*map(call, ids), content=None), *(result(call_id, f"of {call_id}") for call_id in ids)]
    return messages


def test_marks() -> None:
    """The system prompt and the last three turns are marked; nothing else of the request changes."""
    messages = [SYSTEM, USER, calling(content=None), result(), calling(content="x"), USER]

    assert fitted(MARKS, *messages, tools=[TOOL]) == [
        marked(SYSTEM),
        marked(USER),
        messages[2],
        marked(result()),
        messages[4],
        marked(USER),
    ]


@pytest.mark.parametrize("parallel", [1, 5, 30])
def test_each_request_finds_the_cache_of_the_one_before(parallel: int) -> None:
    """The last mark of a request is among those of the next, whatever the number of calls."""
    sent = [marks_of(fitted(MARKS, *agents(turns, parallel), tools=[TOOL])) for turns in range(8)]

    assert all(before[-1] in after for before, after in itertools.pairwise(sent))
    assert all(len(marks) <= CACHE_MARKS_MAX for marks in sent)
    assert all(marks[0] == 0 for marks in sent)


_contents = st.none() | st.text(max_size=3) | st.lists(st.text(max_size=3).map(part) | st.just({"type": "image_url"}))
_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": _contents}
)


@given(messages=st.lists(_messages, min_size=1, max_size=12))
def test_never_more_than_four(messages: list[dict[str, Any]]) -> None:
    """Whatever the conversation; never on a text that is empty, and never on the assistant's own words."""
    for message in fitted(MARKS, *messages, tools=[TOOL]):
        for content in message["content"] if isinstance(message["content"], list) else ():
            assert "cache_control" not in content or (content["text"].strip() and message["role"] != "assistant")

    assert json.dumps(fitted(MARKS, *messages, tools=[TOOL])).count("cache_control") <= CACHE_MARKS_MAX


def test_mark_on_parts() -> None:
    """In a list the last text is marked, and empty ones cannot be."""
    image = {"type": "image_url", "image_url": {"url": "x"}}
    seen = {"role": "user", "content": [part("a"), part("b"), part(" "), image]}
    sent = {"role": "user", "content": [part("a"), part("b", cache_control=MARK), part(" "), image]}

    assert [sent] == fitted(MARKS, seen, tools=[TOOL])


def test_message_without_text_passes_its_mark_on() -> None:
    """An empty result is marked at the message before it."""
    messages = [SYSTEM, calling(call("a"), call("b"), content=None), result("a"), result("b", "")]

    assert marks_of(fitted(MARKS, *messages, tools=[TOOL])) == [0, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL | {"cache_control": MARK}]},
        {"tools": [TOOL], "cache_control": MARK},
        {"tools": [TOOL], "messages": [SYSTEM, {"role": "user", "content": [part("a", cache_control=MARK)]}]},
    ],
)
def test_the_clients_own_marks_stand(fields: dict[str, Any]) -> None:
    """Who marks knows better, and a fifth mark would be refused."""
    request = request_of(SYSTEM, USER, calling(), result(), **fields)

    assert request.count(b"cache_control") == patch(request, MARKS).count(b"cache_control") == 1


def test_a_question_asked_once_is_not_marked() -> None:
    """Storing costs more than it saves when nobody comes back; a second turn shows that somebody does."""
    assert fitted(MARKS, SYSTEM, USER) == [SYSTEM, USER]
    assert marks_of(fitted(MARKS, SYSTEM, USER, {"role": "assistant", "content": "a"}, USER)) == [0, 1, 3]


def test_marks_on_results_that_must_be_strings() -> None:
    """A result is made one string first; only the marked ones are a list again, of one part."""
    fix = Fix(cache_markers=True, string_tool_content=True)
    sent = fitted(fix, SYSTEM, USER, calling(), result(content=[part("a"), part("b")]), tools=[TOOL])

    assert sent[-1]["content"] == [part("ab", cache_control=MARK)]
