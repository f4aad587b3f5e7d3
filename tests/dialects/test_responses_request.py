"""Requests of the Responses dialect: read for routing, fitted to upstreams, chained, written anew for others."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseInputItemParam, ResponseOutputMessageParam, ResponseReasoningItemParam
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from openai.types.responses.tool_param import ToolParam

from routerd.canonical import (
    AnswerFormat,
    BadRequest,
    Document,
    End,
    Event,
    Finish,
    Fix,
    Image,
    Message,
    Price,
    Reasoning,
    ReasoningDelta,
    Remembered,
    Request,
    Start,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolDelta,
    ToolResult,
    ToolStart,
    Upstream,
    seal_key,
)
from routerd.dialects import Stamp
from routerd.dialects.responses_encoder import write_body
from routerd.dialects.responses_request import (
    chained,
    continue_request,
    input_items,
    patch_request,
    read_head,
    tool_schemas,
)
from routerd.dialects.responses_translate import decode_request, encode_request, unsaid

UPSTREAM = Upstream("vendor", 0, "model", "wire-model", "responses", 100_000, 8192, Price())
USER: ResponseInputItemParam = {"role": "user", "content": "Hi."}
CALL: Any = {"type": "function_call", "call_id": "call_1", "name": "shell", "arguments": '{"command": "ls"}'}
RESULT: Any = {"type": "function_call_output", "call_id": "call_1", "output": "a b"}
THOUGHT: ResponseReasoningItemParam = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "Hm."}],
    "encrypted_content": "gAAA",
}
SAID: ResponseOutputMessageParam = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}],
}
PARAMETERS: dict[str, object] = {"type": "object", "properties": {"command": {"type": "string"}}}
TOOL: ToolParam = {"type": "function", "name": "shell", "parameters": PARAMETERS, "strict": None}
OWN = Remembered("vendor/wire-model", (Reasoning("Hm.", "gAAA"),))
FOREIGN = Remembered("other/model", (Reasoning("Hm.", "gBBB"),))


def request(*items: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "auto", "store": False, "input": list(items) or [USER]} | fields).encode()


def patch(body: bytes, fix: Fix = Fix(), recall: Any = None, **fields: Any) -> bytes:  # noqa: B008 - frozen
    upstream = msgspec.structs.replace(UPSTREAM, fix=fix, **fields)
    return patch_request(body, read_head(body), upstream, recall)


def patched(body: bytes, fix: Fix = Fix(), recall: Any = None, **fields: Any) -> dict[str, Any]:  # noqa: B008 - frozen
    return dict(json.loads(patch(body, fix, recall, **fields)))


def history(*turn: Any, fix: Fix = Fix(), remembered: Remembered | None = None) -> list[Any]:  # noqa: B008 - frozen
    """What an upstream gets of this turn, if this is remembered of it."""
    sent = patched(request(USER, *turn, RESULT), fix, lambda _: remembered)["input"]
    assert sent[0] == USER
    assert sent[-1] == RESULT
    return list(sent[1:-1])


# --- read -------------------------------------------------------------------------------------------------------------


def test_head() -> None:
    """What routing needs to know, of a request as the vendor's own library types it."""
    params: ResponseCreateParamsNonStreaming = {
        "model": "auto",
        "instructions": "Be brief.",
        "input": "Hi.",
        "tools": [TOOL],
        "max_output_tokens": 7,
        "text": {"format": {"type": "json_schema", "name": "answer", "schema": {"type": "object"}}},
        "background": False,
        "conversation": None,
    }
    head = read_head(json.dumps(params).encode())

    assert (head.model, head.stream, head.tools, head.images, head.max_output_tokens) == ("auto", False, True, False, 7)
    assert (head.structured, head.streamable, head.include_usage) == (True, True, True)


def test_images_and_files_count_as_tokens_and_not_as_bytes() -> None:
    """A large picture does not make a long prompt, wherever it stands."""
    data = "data:image/png;base64," + "A" * 400_000
    image = {"type": "input_image", "detail": "auto", "image_url": data}
    file = {"type": "input_file", "filename": "a.pdf", "file_data": data}
    head = read_head(request({"role": "user", "content": [image]}, CALL, RESULT | {"output": [image, file]}))

    assert head.images
    assert 4800 <= head.prompt_tokens < 5100


def test_conversation() -> None:
    """The same from the first request to the last, however the first message is written."""
    listed = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": 'Say "hi".'}]}
    first = read_head(request(input='Say "hi".', instructions="Be brief."))
    later = read_head(request(listed, SAID, USER, instructions="Be brief."))
    chain = read_head(chained(request(USER, instructions="Be brief."), [input_items(request(input='Say "hi".'))]))
    other = read_head(request(USER, instructions="Be brief."))

    assert first.conversation == later.conversation == chain.conversation != other.conversation


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL, {"type": "web_search"}]},
        {"tools": [{"type": "custom", "name": "patch"}]},
        {"top_logprobs": 2},
        {"include": ["message.output_text.logprobs"]},
    ],
)
def test_what_has_no_place_in_events_is_fetched_whole(fields: dict[str, Any]) -> None:
    """Items of servers' own tools, free-form calls and log probabilities."""
    assert not read_head(request(**fields)).streamable


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model": None}, '"model"'),
        ({"input": None}, '"input"'),
        ({"input": []}, '"input"'),
        ({"input": ""}, '"input"'),
        ({"input": 5}, "$.input"),
        ({"input": ["Hi."]}, "$.input[0]"),
        ({"input": [{"role": 5}]}, "$.input[0].role"),
        ({"instructions": [USER]}, '"instructions"'),
        ({"max_output_tokens": "many"}, "$.max_output_tokens"),
        ({"stream": "yes"}, "$.stream"),
        ({"store": "yes"}, "$.store"),
        ({"tools": {}}, "$.tools"),
        ({"background": True}, '"background"'),
        ({"conversation": "conv_1"}, '"conversation"'),
        ({"conversation": {"id": "conv_1"}}, '"conversation"'),
        ({"prompt": {"id": "pmpt_1"}}, '"prompt"'),
        ({"input": [USER, {"type": "item_reference", "id": "msg_1"}]}, '"item_reference"'),
        ({"input": [USER, {"id": "msg_1"}]}, '"item_reference"'),
    ],
)
def test_refused_by_name(fields: dict[str, Any], word: str) -> None:
    """A wrong shape, and what ties a conversation to one vendor, is told with the name of the field."""
    with pytest.raises(BadRequest) as refused:
        read_head(request(**fields))

    assert word in refused.value.failure.detail


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b'{"model":', b"[" * 100_000])
def test_refused_as_no_request(body: bytes) -> None:
    """In words, whatever it is."""
    for read in (read_head, decode_request):
        with pytest.raises(BadRequest):
            read(body)


# --- patched ----------------------------------------------------------------------------------------------------------


def test_the_rest_stays_byte_for_byte() -> None:
    """What an upstream's cache is keyed on is not touched."""
    body = (
        b'{"model": "auto", "store": false, "instructions": "B\\u00e9", "tools": [ ],'
        b' "input": [ {"role":"user",  "content":"H\\u00ef"} ]}'
    )
    sent = patch(body)

    assert b'[ {"role":"user",  "content":"H\\u00ef"} ]' in sent
    assert b'"B\\u00e9"' in sent
    assert json.loads(body) | {"model": "wire-model"} == json.loads(sent)


def test_own_turns_stay_byte_for_byte() -> None:
    """So do the turns that the upstream wrote itself, ids, seals and all."""
    body = request(USER, THOUGHT, SAID, CALL | {"id": "fc_1"}, RESULT)

    assert json.dumps(json.loads(body)["input"]).encode() in patch(body, recall=lambda _: OWN)


def test_the_upstream_keeps_nothing() -> None:
    """The next turn may go to somebody else; so thinking is to come with its seal."""
    body = request(store=True, previous_response_id="resp_1", reasoning={"effort": "low"}, include=["x"])
    sent = patched(body)

    assert sent["store"] is False
    assert sent["include"] == ["x", "reasoning.encrypted_content"]
    assert "previous_response_id" not in sent


def test_seals_are_not_asked_of_models_that_may_not_think() -> None:
    """They refuse it."""
    assert "include" not in patched(request(store=None))


@pytest.mark.parametrize(("asked", "most", "sent"), [(100_000, 8192, 8192), (10, 8192, 10), (99, None, 99)])
def test_output_limit(asked: int, most: int | None, sent: int) -> None:
    """Clamped to what the model can give."""
    assert patched(request(max_output_tokens=asked), max_output_tokens=most)["max_output_tokens"] == sent


def test_no_output_limit_stays_none() -> None:
    """Nobody's limit is the model's own."""
    assert "max_output_tokens" not in patched(request())


def test_stream_is_as_the_head_says() -> None:
    """An answer may be streamed from the upstream that the client wants whole, and the other way round."""
    body = request(stream=True, stream_options={"include_obfuscation": False})
    head = msgspec.structs.replace(read_head(body), stream=False)
    sent = json.loads(patch_request(body, head, UPSTREAM))

    assert sent["stream"] is False
    assert "stream_options" not in sent


@pytest.mark.parametrize(
    ("fix", "fields", "sent"),
    [
        (Fix(temperature=False), {"temperature": 0.5}, {}),
        (Fix(rejected_fields=("prompt_cache_key", "store")), {"prompt_cache_key": "k", "store": True}, {"store": None}),
        (Fix(parallel_tool_calls=False), {"tools": [TOOL]}, {"parallel_tool_calls": False, "tools": [TOOL]}),
        (Fix(parallel_tool_calls=False), {}, {}),
        (
            Fix(tool_choice_required="auto"),
            {"tools": [TOOL], "tool_choice": "required"},
            {"tools": [TOOL], "tool_choice": "auto"},
        ),
        (
            Fix(unique_tool_names=True),
            {"tools": [TOOL, TOOL, {"type": "web_search"}, {"type": "web_search"}]},
            {"tools": [TOOL, {"type": "web_search"}, {"type": "web_search"}]},
        ),
    ],
)
def test_fixes(fix: Fix, fields: dict[str, Any], sent: dict[str, Any]) -> None:
    """Top-level fields as the upstream wants them."""
    expected = {"model": "wire-model", "store": False, "input": [USER]} | sent

    assert {name: value for name, value in expected.items() if value is not None} == patched(request(**fields), fix)


def test_fixes_in_the_history() -> None:
    """Roles, arguments and results as the upstream wants them."""
    developer = {"role": "developer", "content": "Be brief."}
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "https://example.org/a.png"}]
    body = request(developer, USER, CALL | {"arguments": '{"comm'}, RESULT | {"output": parts})
    fix = Fix(developer_role=False, strict_arguments=True, string_tool_content=True)
    system, _, call, result = patched(body, fix)["input"]

    assert system == developer | {"role": "system"}
    assert call == CALL | {"arguments": "{}"}
    assert result == RESULT | {"output": "a[input_image]"}


def test_call_ids() -> None:
    """Ids of another vendor's making get a form that is accepted, the same for call and result, every time."""
    named = {"call_id": "functions.shell:0"}
    body = request(USER, CALL | named, RESULT | named)
    _, call, result = patched(body, Fix(call_id_limit=64))["input"]

    assert call["call_id"] == result["call_id"]
    assert call["call_id"].isalnum()
    assert patched(body, Fix(call_id_limit=64)) == patched(body, Fix(call_id_limit=64))


# --- thinking and ids -------------------------------------------------------------------------------------------------

SHORT = {"type": "message", "role": "assistant", "content": "Let me look."}
NAMED_CALL = CALL | {"id": "fc_1"}
NAMELESS_THOUGHT = {name: value for name, value in THOUGHT.items() if name != "id"}
PLAIN = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}


def test_foreign_turn() -> None:
    """What another upstream sealed it alone can open, and its ids lead nowhere."""
    assert history(THOUGHT, SAID, NAMED_CALL, remembered=FOREIGN) == [SHORT, CALL]


def test_turn_of_nobody_knows_whom() -> None:
    """The client is believed about the seal; the ids are of no use to anybody."""
    assert history(THOUGHT, SAID, NAMED_CALL) == [NAMELESS_THOUGHT, SHORT, CALL]


@pytest.mark.parametrize(("remembered", "sent"), [(OWN, [THOUGHT, SAID]), (FOREIGN, [SHORT])])
def test_turn_without_calls(remembered: Remembered, sent: list[Any]) -> None:
    """Whose it was is known by the seal on its thinking."""
    known = {seal_key("gAAA"): remembered}
    body = request(USER, THOUGHT, SAID, USER)

    assert patched(body, recall=known.get)["input"] == [USER, *sent, USER]


def test_thinking_without_a_seal_is_left_out() -> None:
    """It would be looked for in a store where it is not, or be refused for its text."""
    assert history(PLAIN, SAID, NAMED_CALL) == [SHORT, CALL]


def test_own_thinking_without_a_seal_stays() -> None:
    """Servers of open models think in plain text, and want it back as it was."""
    remembered = Remembered("vendor/wire-model", (Reasoning("Hm."),))

    assert history(PLAIN, NAMED_CALL, remembered=remembered) == [PLAIN, NAMED_CALL]


@pytest.mark.parametrize("left", [[], [{"type": "reasoning", "id": "rs_1", "summary": []}]])
def test_own_thinking_that_was_left_out_is_put_back(left: list[Any]) -> None:
    """With its seal, and then the ids must go: they belong to the item that is missing."""
    assert history(*left, SAID, NAMED_CALL, remembered=OWN) == [NAMELESS_THOUGHT, SHORT, CALL]


def test_ids_that_were_given_here_lead_nowhere() -> None:
    """Not even where the upstream wrote the turn: the answer was put together here, and its items were named here."""
    events: list[Event] = [Start("resp_68f1", "model"), ReasoningDelta(0, "Hm.", "gAAA")]
    events += [ToolStart(0, "call_1", "shell"), ToolDelta(0, CALL["arguments"]), Finish("tool_calls"), End()]
    answer = json.loads(write_body(events, Stamp("resp_68f1", "model", 0)))
    sent = history(*answer["output"], remembered=OWN)

    assert all("id" in item for item in answer["output"])
    assert [(item["type"], "id" in item) for item in sent] == [("reasoning", False), ("function_call", False)]
    assert sent[0]["encrypted_content"] == "gAAA"


def test_thinking_that_came_without_text_is_put_back() -> None:
    """The seal is all there is."""
    remembered = Remembered("vendor/wire-model", (Reasoning("", sealed="gCCC"),))
    thought = {"type": "reasoning", "summary": [], "encrypted_content": "gCCC"}

    assert history(CALL, remembered=remembered) == [thought, CALL]


def test_thinking_is_put_back_once() -> None:
    """Also where a client sends each call with its result, so that one answer looks like several."""
    second, result = CALL | {"call_id": "call_2"}, RESULT | {"call_id": "call_2"}
    sent = patched(request(USER, CALL, RESULT, second, result), recall=lambda _: OWN)["input"]

    assert sent == [USER, NAMELESS_THOUGHT, CALL, RESULT, second, result]


@pytest.mark.parametrize(
    ("turn", "remembered", "text"),
    [
        ([THOUGHT, CALL], None, "Hm."),
        ([PLAIN, CALL], FOREIGN, "Hm."),
        ([CALL], FOREIGN, "Hm."),
        ([CALL], None, " "),
    ],
)
def test_thinking_that_is_demanded(turn: list[Any], remembered: Remembered | None, text: str) -> None:
    """By whoever it was thought, as given, as remembered, or else a blank."""
    thought, call = history(*turn, fix=Fix(reasoning_content="require"), remembered=remembered)

    told = [{"type": "reasoning_text", "text": text}]
    assert thought == {"type": "reasoning", "id": thought["id"], "summary": [], "content": told}
    assert call == CALL


def test_thinking_that_is_rejected() -> None:
    """Whoever wrote it."""
    assert history(THOUGHT, CALL, fix=Fix(reasoning_content="reject"), remembered=OWN) == [CALL]


def test_ids_that_an_item_cannot_do_without_stay() -> None:
    """A search that the vendor made is nothing without its id."""
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed"}

    assert history(search, NAMED_CALL) == [search, CALL]


def test_refusals_keep_their_form() -> None:
    """Only what is all text has a short form."""
    refusal = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "content": [{"type": "refusal", "refusal": "No."}],
    }

    assert history(refusal, CALL) == [{name: value for name, value in refusal.items() if name != "id"}, CALL]


def test_broken_characters_do_not_stop_it() -> None:
    """Half an emoji in an old answer is no reason to send a foreign seal."""
    broken = SAID | {"content": [{"type": "output_text", "text": "\ud83d", "annotations": []}]}

    assert history(THOUGHT, broken, CALL, remembered=FOREIGN) == [SHORT | {"content": "\ufffd"}, CALL]


# --- taken up again, tools --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["Hi.", [USER]])
def test_continued(given: Any) -> None:
    """The text so far, and a wish for the rest."""
    sent = json.loads(continue_request(request(input=given), "Half a \n", "instructed"))["input"]

    assert [item["content"] for item in sent[:2]] == ["Hi.", "Half a"]
    assert [item["role"] for item in sent] == ["user", "assistant", "user"]


def test_schemas() -> None:
    """By name; a tool of another kind makes all of them unknown."""
    assert tool_schemas(request(tools=[TOOL])) == {"shell": PARAMETERS}
    assert tool_schemas(request(tools=[TOOL, {"type": "custom", "name": "patch"}])) == {}
    assert tool_schemas(b"{") == {}


# --- chained ----------------------------------------------------------------------------------------------------------


def test_chained() -> None:
    """The turns before, byte for byte and in order, and then its own; the earlier instructions do not count."""
    first = b' [ {"role":"user", "content":"One."} ] '
    second = b'[{"type":"function_call","call_id":"call_1","name":"shell","arguments":"{}"}]'
    body = request(RESULT, previous_response_id="resp_1", instructions="Be brief.")
    whole = chained(body, [first, b"[]", second])

    assert b'[{"role":"user", "content":"One."},{"type":"function_call",' in whole
    assert json.loads(whole) == {
        "model": "auto",
        "store": False,
        "input": [*json.loads(first), *json.loads(second), RESULT],
        "instructions": "Be brief.",
    }


def test_chained_text() -> None:
    """A text is a message of the user, here and where it is kept."""
    item = {"type": "message", "role": "user", "content": 'Say "hi".'}
    body = request(input='Say "hi".', previous_response_id="resp_1")

    assert json.loads(input_items(body)) == [item]
    assert json.loads(chained(body, [b"[]"]))["input"] == [item]


@pytest.mark.parametrize("given", [None, "", []])
def test_chained_without_anything_new(given: Any) -> None:
    """Which is a request to go on, once the conversation is in front."""
    body = request(input=given, previous_response_id="resp_1")

    assert input_items(body) == b"[]"
    assert read_head(chained(body, [json.dumps([USER]).encode()])).model == "auto"


def test_previous() -> None:
    """Empty if there is none; where there is one, nothing need be added to it."""
    assert read_head(request(previous_response_id="resp_1")).previous == "resp_1"
    assert read_head(request(previous_response_id=None)).previous == ""
    assert read_head(request(input=None, previous_response_id="resp_1")).previous == "resp_1"


@pytest.mark.parametrize(("store", "kept"), [(True, True), (None, True), (False, False)])
def test_kept(store: bool | None, kept: bool) -> None:
    """Unless the client says no."""
    assert read_head(request(store=store)).kept is kept


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"previous_response_id": 5, "store": 5}'])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    """In words."""
    with pytest.raises(BadRequest):
        read_head(body)


@pytest.mark.parametrize("read", [input_items, lambda body: chained(body, [])])
@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"input": 5}'])
def test_what_cannot_be_chained_is_refused(read: Any, body: bytes) -> None:
    """In words."""
    with pytest.raises(BadRequest):
        read(body)


# --- written anew -----------------------------------------------------------------------------------------------------

SCHEMA = msgspec.Raw(b'{"type":"object","properties":{"path":{"type":"string"}}}')


@pytest.mark.parametrize(
    ("item", "turn"),
    [
        ({"role": "user", "content": "Hi."}, Message("user", (Text("Hi."),))),
        ({"type": "message", "role": "system", "content": "Hi."}, Message("system", (Text("Hi."),))),
        (
            {"role": "developer", "content": [{"type": "input_text", "text": "Hi."}]},
            Message("system", (Text("Hi."),)),
        ),
        (SAID, Message("assistant", (Text("Let me look."),))),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            Message("assistant", (Text("No."),)),
        ),
        (
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "detail": "low", "image_url": "https://example.org/a.png"},
                    {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"},
                    {"type": "input_file", "file_url": "https://example.org/a.pdf"},
                    {"type": "input_file", "file_data": "JVBE"},
                    {"type": "input_text", "text": "?", "prompt_cache_breakpoint": {"mode": "explicit"}},
                ],
            },
            Message(
                "user",
                (
                    Image("https://example.org/a.png"),
                    Document("data:application/pdf;base64,JVBE", name="a.pdf"),
                    Document("https://example.org/a.pdf"),
                    Document("data:application/pdf;base64,JVBE"),
                    Text("?", cached=True),
                ),
            ),
        ),
        (CALL, Message("assistant", (ToolCall("call_1", "shell", '{"command": "ls"}'),))),
        (RESULT, Message("user", (ToolResult("call_1", (Text("a b"),)),))),
        (
            RESULT | {"output": [{"type": "input_image", "image_url": "data:image/png;base64,iVBO"}]},
            Message("user", (ToolResult("call_1", (Image("data:image/png;base64,iVBO"),)),)),
        ),
        (
            {"type": "custom_tool_call", "call_id": "call_1", "name": "patch", "input": '"x"'},
            Message("assistant", (ToolCall("call_1", "patch", '{"input":"\\"x\\""}'),)),
        ),
        (
            {"type": "custom_tool_call_output", "call_id": "call_1", "output": "done"},
            Message("user", (ToolResult("call_1", (Text("done"),)),)),
        ),
        (THOUGHT, Message("assistant", (Reasoning("Hm.", signature="gAAA"),))),
        (PLAIN, Message("assistant", (Reasoning("Hm."),))),
        (THOUGHT | {"summary": []}, Message("assistant", (Reasoning("", sealed="gAAA"),))),
    ],
)
def test_items(item: Any, turn: Message) -> None:
    """Every kind of item that says something, in our words."""
    assert decode_request(request(item)).messages == (turn,)


def test_empty_thinking_says_nothing() -> None:
    """No text and no seal: only an id."""
    assert decode_request(request(USER, {"type": "reasoning", "id": "rs_1", "summary": []})).messages == (
        Message("user", (Text("Hi."),)),
    )


def test_turns() -> None:
    """The items of one answer are one turn, and results open the turn of the user that they are told in."""
    second, result = CALL | {"call_id": "call_2"}, RESULT | {"call_id": "call_2"}
    body = request(USER, THOUGHT, SAID, CALL, second, RESULT, result, USER, USER, instructions="Be brief.")
    turns = decode_request(body).messages

    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "user"]
    assert [type(block) for block in turns[2].blocks] == [Reasoning, Text, ToolCall, ToolCall]
    assert [type(block) for block in turns[3].blocks] == [ToolResult, ToolResult, Text]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "file_search_call", "id": "fs_1", "status": "completed", "queries": ["x"]},
        {"type": "code_interpreter_call", "id": "ci_1", "status": "completed", "code": "1", "container_id": "c"},
        {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "AAAA"},
        {
            "type": "computer_call",
            "id": "cu_1",
            "call_id": "call_9",
            "pending_safety_checks": [],
            "status": "completed",
        },
        {"type": "computer_call_output", "call_id": "call_9", "output": {"type": "computer_screenshot"}},
        {"type": "local_shell_call", "id": "ls_1", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}},
        {"type": "local_shell_call_output", "id": "ls_1", "output": "{}"},
        {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}},
        {"type": "shell_call_output", "call_id": "c", "output": []},
        {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "a"}},
        {"type": "apply_patch_call_output", "call_id": "c", "status": "completed"},
        {"type": "mcp_list_tools", "id": "mcpl_1", "server_label": "x", "tools": []},
        {"type": "mcp_call", "id": "mcp_1", "server_label": "x", "name": "y", "arguments": "{}"},
        {"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "x", "name": "y", "arguments": "{}"},
        {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True},
        {"type": "tool_search_call", "arguments": {"query": "x"}},
        {"type": "tool_search_output", "tools": []},
    ],
)
def test_traces_of_servers_tools_are_dropped_by_name(item: Any) -> None:
    """The conversation goes on without them."""
    crossed = decode_request(request(USER, item))

    assert crossed.messages == (Message("user", (Text("Hi."),)),)
    assert crossed.dropped == (item["type"],)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [{"type": "compaction", "encrypted_content": "gAAA"}]},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"type": "of_tomorrow"}]},
        {"input": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file_1"}]}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "custom", "name": "patch"}]},
        {"tools": [TOOL, {"type": "of_tomorrow"}]},
        {"tools": [TOOL, {"type": "web_search"}], "tool_choice": {"type": "web_search_preview"}},
        {"tools": [TOOL], "tool_choice": {"type": "mcp", "server_label": "x"}},
        {"tools": [TOOL], "tool_choice": {"type": "custom", "name": "patch"}},
        {
            "tools": [TOOL, {"type": "web_search"}],
            "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]},
        },
    ],
)
def test_what_cannot_cross_is_refused(fields: dict[str, Any]) -> None:
    """In words, where the answer would depend on it."""
    with pytest.raises(BadRequest) as refused:
        decode_request(request(**fields))

    assert refused.value.failure.code == "unsupported"


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"type": "function_call", "name": "shell", "arguments": "{}"}, "input[1]"),
        ({"type": "function_call_output", "call_id": "call_1", "output": 5}, "input[1]"),
        ({"role": "user", "content": {"text": "Hi."}}, "input[1]"),
        ({"role": "tool", "content": "Hi."}, "'tool'"),
    ],
)
def test_wrong_items_are_told_by_their_place(item: Any, place: str) -> None:
    """Among hundreds, that is what one wants to know."""
    with pytest.raises(BadRequest) as refused:
        decode_request(request(USER, item))

    assert place in refused.value.failure.detail


def test_what_is_dropped_is_named() -> None:
    """Where the answer does not depend on it; what arrives all the same is not lost."""
    crossed = decode_request(
        request(
            tools=[TOOL, {"type": "web_search_preview"}, {"type": "web_search"}],
            include=["reasoning.encrypted_content", "message.output_text.logprobs"],
            reasoning={"effort": "low", "summary": "auto"},
            text={"verbosity": "low"},
            truncation="auto",
            metadata={"a": "b"},
            service_tier="flex",
            max_tool_calls=3,
            top_logprobs=2,
            prompt_cache_key="k",
        )
    )

    options = ("metadata", "service_tier", "max_tool_calls", "top_logprobs", "prompt_cache_key")
    assert crossed.dropped == (*options, "verbosity", "truncation", "include", "web_search")
    assert crossed.reasoning_effort == "low"


def test_what_is_no_loss_is_not_named() -> None:
    """A client such as Hermes asks for nothing that is missing elsewhere."""
    fields = {"reasoning": {"effort": "medium", "summary": "auto"}, "include": ["reasoning.encrypted_content"]}

    assert decode_request(request(tools=[TOOL], tool_choice="auto", truncation="disabled", **fields)).dropped == ()


@pytest.mark.parametrize(
    ("choice", "names", "crossed"),
    [
        ("auto", ["a", "b"], ToolChoice("auto")),
        ("none", ["a", "b"], ToolChoice("none")),
        ("required", ["a", "b"], ToolChoice("required")),
        ({"type": "function", "name": "b"}, ["a", "b"], ToolChoice("named", "b")),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "b"}]},
            ["b"],
            ToolChoice("required"),
        ),
        (None, ["a", "b"], None),
    ],
)
def test_tool_choice(choice: Any, names: list[str], crossed: ToolChoice | None) -> None:
    """Which of the tools; where fewer are allowed, fewer are offered."""
    tools = [{"type": "function", "name": name, "parameters": None} for name in ("a", "b")]
    decoded = decode_request(request(tools=tools, tool_choice=choice))

    assert [tool.name for tool in decoded.tools] == names
    assert decoded.tool_choice == crossed


def test_broken_characters_are_mended() -> None:
    """Half an emoji is no reason to refuse a conversation."""
    assert decode_request(request({"role": "user", "content": "\ud83d"})).messages[0].blocks == (Text("\ufffd"),)


@pytest.mark.parametrize(
    ("wanted", "format_"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, AnswerFormat("json_object")),
        (
            {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True},
            AnswerFormat("json_schema", "x", msgspec.Raw(b'{"type": "object"}'), strict=True),
        ),
    ],
)
def test_answer_format(wanted: Any, format_: AnswerFormat | None) -> None:
    """What the answer's text must be."""
    assert decode_request(request(text={"format": wanted})).answer_format == format_


def test_stop_has_no_place_here() -> None:
    """And that is told by name."""
    asked = Request("auto", stream=False, messages=(Message("user", (Text("Hi."),)),), stop=("END",))

    assert unsaid(asked) == ("stop",)
    assert "stop" not in json.loads(encode_request(asked))


def test_written() -> None:
    """In the forms that every server of this API takes: nothing to be kept, no ids, strings where strings will do."""
    asked = Request(
        "auto",
        stream=True,
        messages=(
            Message("system", (Text("Be brief."), Text("Be kind."))),
            Message("user", (Text("Hi."),)),
            Message("assistant", (Reasoning("Hm.", "seal"), Text("Look."), ToolCall("c", "ls", "{}"))),
            Message("user", (ToolResult("c", (Text("a"), Image("https://example.org/a.png"))), Text("And?"))),
            Message("system", (Text("Hurry."),)),
        ),
        tools=(Tool("ls", "Lists.", SCHEMA),),
        reasoning_effort="low",
    )

    image = {"type": "input_image", "detail": "auto", "image_url": "https://example.org/a.png"}
    tool = {"type": "function", "name": "ls", "description": "Lists.", "parameters": json.loads(bytes(SCHEMA))}
    assert json.loads(encode_request(asked)) == {
        "model": "auto",
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "instructions": "Be brief.\n\nBe kind.",
        "input": [
            {"role": "user", "content": "Hi."},
            PLAIN | {"id": f"rs_{seal_key('Hm.')}"},
            {"role": "assistant", "content": "Look."},
            {"type": "function_call", "call_id": "c", "name": "ls", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}, image]},
            {"role": "user", "content": "And?"},
            {"role": "developer", "content": "Hurry."},
        ],
        "tools": [tool | {"strict": False}],
        "reasoning": {"effort": "low"},
    }


def test_thinking_of_others_does_not_arrive() -> None:
    """What was written anew for an upstream that seals its thinking has none but its own in it."""
    turns = (Message("user", (Text("Hi."),)), Message("assistant", (Reasoning("Hm."), ToolCall("call_1", "ls", "{}"))))
    body = encode_request(Request("auto", stream=False, messages=turns))
    kinds = {
        author: [item.get("type") for item in patched(body, recall=lambda _, came_with=came_with: came_with)["input"]]
        for author, came_with in (("own", OWN), ("foreign", FOREIGN), ("nobody", None))
    }

    assert kinds == {
        "own": [None, "reasoning", "function_call"],
        "foreign": [None, "function_call"],
        "nobody": [None, "function_call"],
    }


# --- anything ---------------------------------------------------------------------------------------------------------

_names = st.sampled_from(["call_1", "shell", "input_text", "reasoning", "message", "assistant", "user", "auto", ""])
_anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | _names
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "id", "text", "content", "name", "summary"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_fields = ("id", "content", "call_id", "arguments", "output", "summary", "encrypted_content", "input")
_kinds = st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "custom_tool_call"])
_items = st.fixed_dictionaries(
    {"type": _kinds, "role": st.sampled_from(["user", "assistant", "developer", "tool"])},
    optional=dict.fromkeys(_fields, _anything | _names),
)
_options = (
    *("instructions", "stream", "tools", "tool_choice", "max_output_tokens", "text", "reasoning", "include"),
    *("store", "previous_response_id", "background", "conversation", "prompt", "metadata", "stream_options"),
)
_bodies = st.fixed_dictionaries(
    {"model": st.just("auto"), "input": st.lists(_items | _anything, max_size=4) | _anything},
    optional=dict.fromkeys(_options, _anything),
)


STRICT = Fix(
    reasoning_content="require",
    call_id_limit=9,
    strict_arguments=True,
    string_tool_content=True,
    unique_tool_names=True,
    developer_role=False,
)


def _came_with(remembered: Remembered | None, _: str) -> Remembered | None:
    return remembered


def _everything(body: bytes) -> None:
    for read in (input_items, decode_request):
        try:
            read(body)
        except BadRequest:
            continue
    head = read_head(body)
    tool_schemas(body)
    for upstream, remembered in product(
        (UPSTREAM, msgspec.structs.replace(UPSTREAM, fix=STRICT)), (None, OWN, FOREIGN)
    ):
        json.loads(patch_request(body, head, upstream, partial(_came_with, remembered)))
    json.loads(continue_request(chained(body, [b"[]"]), "Half a", "instructed"))


@given(_bodies | _anything)
def test_any_json_is_served_or_refused(body: Any) -> None:
    """And nothing else comes of it."""
    try:
        _everything(json.dumps(body).encode())
    except BadRequest:
        return


_sound = st.fixed_dictionaries(
    {"type": _kinds, "role": st.sampled_from(["user", "assistant"])},
    optional=dict.fromkeys(("id", "content", "call_id", "encrypted_content"), _names),
)


@given(st.lists(_sound, max_size=6), st.lists(_sound, max_size=3), st.sampled_from([None, OWN, FOREIGN]))
def test_a_history_that_grows_begins_as_before(items: list[Any], more: list[Any], came_with: Remembered | None) -> None:
    """What is done to a turn is done to it in every later request as well, so prompt caches hold."""
    first = patched(request(*items, USER), recall=lambda _: came_with)["input"]
    later = patched(request(*items, USER, *more), recall=lambda _: came_with)["input"]

    assert later[: len(first)] == first


_texts = st.text(min_size=1, max_size=8, alphabet=st.characters(exclude_categories=["Cs"]))
_told = _texts.map(Text)
_results = st.builds(
    ToolResult,
    _texts,
    st.lists(_told | st.builds(Image, _texts), max_size=2).map(tuple),
)
_calls = st.builds(ToolCall, _texts, _texts, st.just('{"a": 1.50}'))
_asked = st.lists(_told | st.builds(Image, _texts), min_size=1, max_size=2)
_questions = st.tuples(st.lists(_results, max_size=2), _asked).map(lambda pair: Message("user", (*pair[0], *pair[1])))
_answers = st.lists(_told | _texts.map(Reasoning) | _calls, min_size=1, max_size=4).map(
    lambda blocks: Message("assistant", tuple(blocks))
)
_requests = st.builds(
    Request,
    model=st.just("auto"),
    stream=st.booleans(),
    messages=st.tuples(
        st.none() | _told.map(lambda text: Message("system", (text,))),
        st.lists(st.tuples(_questions, _answers), min_size=1, max_size=3),
    ).map(lambda pair: tuple(turn for turn in (pair[0], *[turn for two in pair[1] for turn in two]) if turn)),
    tools=st.just((Tool("read", "Reads.", SCHEMA, strict=True), Tool("write", "", SCHEMA))),
    tool_choice=st.sampled_from([None, ToolChoice("auto"), ToolChoice("required"), ToolChoice("named", "read")]),
    parallel_tool_calls=st.none() | st.booleans(),
    max_output_tokens=st.none() | st.integers(16, 10_000),
    temperature=st.none() | st.just(0.5),
    top_p=st.none() | st.just(0.9),
    reasoning_effort=st.sampled_from([None, "none", "minimal", "high", "max"]),
    answer_format=st.sampled_from([None, AnswerFormat("json_object"), AnswerFormat("json_schema", "x", SCHEMA)]),
    user=st.none() | _texts,
)


@given(_requests)
def test_what_crosses_crosses_whole(asked: Request) -> None:
    """Written and read again, a request is the same."""
    assert decode_request(encode_request(asked)) == asked


@given(st.lists(st.lists(_items, max_size=3), max_size=3), st.lists(_items, max_size=2))
def test_chains_join_everything(turns: list[list[Any]], own: list[Any]) -> None:
    """Every item of every turn, once and in order."""
    body = json.dumps({"model": "auto", "input": own, "previous_response_id": "resp_1"}).encode()
    whole = chained(body, [json.dumps(turn).encode() for turn in turns])

    assert json.loads(whole)["input"] == [item for turn in turns for item in turn] + own
