"""Chat requests: what routing learns of one, and what an upstream gets."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import BadRequest, Fix, Head, Price, Upstream
from routerd.dialects.chat import DIALECT
from routerd.dialects.chat_request import IMAGE_TOKENS

USER = {"role": "user", "content": "hi"}
ARGUMENTS = '{"command": "ls"}'
CALL = {"id": "call_a", "type": "function", "function": {"name": "terminal", "arguments": ARGUMENTS}}
CALLING = {"role": "assistant", "content": "ok", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_a", "name": "terminal", "content": "a b"}
TOOL = {"type": "function", "function": {"name": "terminal", "parameters": {}}}
PLAIN = Fix(thought_signatures=True, reasoning_details=True)  # changes nothing


def body(*messages: dict[str, Any], **fields: Any) -> bytes:
    request = {"model": "auto", "messages": messages or (USER,)} | fields
    return json.dumps(request, separators=(",", ":"), ensure_ascii=False).encode()


def head(*messages: dict[str, Any], **fields: Any) -> Head:
    return DIALECT.read_head(body(*messages, **fields))


def upstream(fix: Fix = PLAIN, max_output_tokens: int | None = None) -> Upstream:
    return Upstream("lab", 0, "m", "lab/m", "chat", 128_000, max_output_tokens, Price(), fix=fix)


def patched(request: bytes, fix: Fix = PLAIN, max_output_tokens: int | None = None) -> dict[str, Any]:
    result = DIALECT.patch_request(request, DIALECT.read_head(request), upstream(fix, max_output_tokens))
    fields = json.loads(result)
    assert isinstance(fields, dict)
    return fields


def patched_messages(fix: Fix, *messages: dict[str, Any]) -> Any:
    return patched(body(*messages), fix)["messages"]


# --- read -------------------------------------------------------------------------------------------------------------


def test_head_of_an_agent() -> None:
    """What an agent sends is read in full."""
    result = head(
        {"role": "system", "content": "s" * 3000},
        USER,
        tools=[TOOL],
        stream=True,
        max_tokens=65536,
        stream_options={"include_usage": True},
    )

    assert (
        result.model,
        result.stream,
        result.tools,
        result.images,
        result.include_usage,
        result.max_output_tokens,
    ) == ("auto", True, True, False, True, 65536)
    assert 750 <= result.prompt_tokens <= 850


def test_head_of_little() -> None:
    """Everything but model and messages may be missing or null."""
    for result in (head(), head(stream=None, tools=None, stream_options=None, max_tokens=None)):
        assert (
            result.stream,
            result.tools,
            result.images,
            result.include_usage,
            result.max_output_tokens,
        ) == (False, False, False, False, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"tools": []}, False), ({"tools": [TOOL]}, True), ({"functions": [{"name": "f"}]}, True)],
)
def test_tools(fields: dict[str, Any], expected: bool) -> None:
    """An empty list offers no tools; the older form offers some."""
    assert expected is head(**fields).tools


def test_newer_output_limit() -> None:
    """Of two limits the one with the newer name stands."""
    assert head(max_tokens=7, max_completion_tokens=5).max_output_tokens == 5


@pytest.mark.parametrize(
    ("request_body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "shape"),
        (b'{"messages":[{}]}', '"model" is missing'),
        (body(model=""), '"model" is missing'),
        (body(model=7), r"\$\.model"),
        (b'{"model":"auto"}', '"messages" is missing'),
        (body(messages=[]), '"messages" is missing or empty'),
        (body(messages="hi"), r"\$\.messages"),
        (body(messages=["hi"]), r"\$\.messages"),
        (body(stream="yes"), r"\$\.stream"),
        (body(max_tokens="7"), r"\$\.max_tokens"),
        (b'{"a":' + b"[" * 100_000, "not JSON"),
        (b'{"a":"\\ud83d","model":7}', r"\$\.model"),
    ],
)
def test_bad_request(request_body: bytes, words: str) -> None:
    """A refusal says what is wrong and where."""
    with pytest.raises(BadRequest, match=words):
        DIALECT.read_head(request_body)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('what is an "image_url": here', False),
        ([{"type": "text", "text": 'say "image_url": x'}], False),
        ([{"type": "text", "text": "image_url"}], False),
        ([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}], True),
    ],
)
def test_images(content: object, expected: bool) -> None:
    """An image is a part, not a word in a text."""
    assert expected is head({"role": "user", "content": content}).images


def test_image_in_a_tool_schema() -> None:
    """A tool that takes images does not make the request one with images."""
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"image_url": {"type": "string"}}}},
    }

    assert not head(tools=[tool]).images


def test_image_tokens() -> None:
    """An image counts as an image, however many bytes its data takes."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    result = head({"role": "user", "content": [{"type": "text", "text": "data: see"}, image, image]})

    assert 2 * IMAGE_TOKENS <= result.prompt_tokens <= 2 * IMAGE_TOKENS + 100


def test_conversation_is_stable() -> None:
    """All turns of a conversation have the same hash, whatever else changes."""
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        USER,
        CALLING,
        RESULT,
        {"role": "user", "content": "b"},
    ]
    hashes = {head(*turns[:length], max_tokens=length).conversation for length in range(2, 6)}

    assert len(hashes) == 1


def test_conversation_without_system_is_stable() -> None:
    """Nor does an answer change it where the user speaks first."""
    assert head(USER).conversation == head(USER, {"role": "assistant", "content": "x"}).conversation


def test_conversations_differ() -> None:
    """Another system prompt or another first question is another conversation."""
    system, other = {"role": "system", "content": "s"}, {"role": "user", "content": "ho"}
    hashes = {head(*turns).conversation for turns in ((system, USER), (system, other), (USER,), (other,))}

    assert len(hashes) == 4


def test_conversation_fits_a_database() -> None:
    """The hash is a positive 64-bit integer."""
    assert 0 < head({"role": "user", "content": "x" * 2_000_000}).conversation < 2**63


# --- patched: fields --------------------------------------------------------------------------------------------------


def test_model() -> None:
    """The upstream is asked under its own name for the model."""
    assert patched(body())["model"] == "lab/m"


def test_messages_and_tools_keep_their_bytes() -> None:
    """What prompt caches are keyed on is not touched, not even its spaces."""
    messages = b'[ {"role":"user", "content":"\\u00e9 \xc3\xa9 1.0"} ]'
    tools = b'[{"function" : {"name":"f"}, "n":1e2}]'
    request = b'{"tools":' + tools + b',"model":"auto","messages":' + messages + b"}"
    result = DIALECT.patch_request(request, DIALECT.read_head(request), upstream(Fix(unique_tool_names=True)))

    assert messages in result
    assert tools in result


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    extra=st.dictionaries(st.from_regex(r"x_[a-z]{1,5}", fullmatch=True), _values, max_size=4),
    messages=st.lists(st.dictionaries(st.sampled_from(["role", "x"]), st.text(max_size=8), max_size=2), min_size=1),
)
def test_plain_fix_changes_nothing(extra: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Without a fix only the model's name changes."""
    request = body(*messages, **extra)

    assert json.loads(request) | {"model": "lab/m"} == patched(request)


_shapes = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]),
        "content": _values,
        "tool_calls": _values | st.just([CALL]) | st.just([{"extra_content": 1, "function": {"arguments": []}}]),
        "reasoning": _values,
    },
)


_tools = _values | st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": _values})}))


@given(messages=st.lists(_shapes, min_size=1, max_size=4), tools=_tools)
def test_every_fix_takes_every_message(messages: list[dict[str, Any]], tools: Any) -> None:
    """No shape of message or tool makes a patch fail, and a second patch has nothing left to do."""
    fix = Fix(
        developer_role=False,
        string_tool_content=True,
        null_content=False,
        strict_arguments=True,
        unique_tool_names=True,
        reasoning_content="require",
    )
    request = body(*messages, tools=tools)
    once = DIALECT.patch_request(request, DIALECT.read_head(request), upstream(fix))

    assert once == DIALECT.patch_request(once, DIALECT.read_head(once), upstream(fix))


@pytest.mark.parametrize(
    ("field", "asked", "maximum", "sent"),
    [
        (None, {"max_tokens": 65536}, 8192, {"max_tokens": 8192}),
        (None, {"max_tokens": 100}, 8192, {"max_tokens": 100}),
        (None, {"max_tokens": 65536}, None, {"max_tokens": 65536}),
        (None, {"max_completion_tokens": 65536}, 8192, {"max_completion_tokens": 8192}),
        (None, {}, 8192, {}),
        (None, {"max_tokens": None}, 8192, {"max_tokens": None}),
        ("max_completion_tokens", {"max_tokens": 65536}, 8192, {"max_completion_tokens": 8192}),
        ("max_tokens", {"max_completion_tokens": 7}, 8192, {"max_tokens": 7}),
        ("max_tokens", {"max_completion_tokens": 7, "max_tokens": 9}, None, {"max_tokens": 7}),
    ],
)
def test_output_limit(field: Any, asked: dict[str, Any], maximum: int | None, sent: dict[str, Any]) -> None:
    """The limit is clamped to the model's, under the name the upstream knows; none asked for, none sent."""
    fields = patched(body(**asked), Fix(max_tokens_field=field), maximum)

    assert sent == {name: value for name, value in fields.items() if name.startswith("max_")}


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, {"include_usage": True}),
        ({"stream_options": None}, {"include_usage": True}),
        ({"stream_options": {}}, {"include_usage": True}),
        ({"stream_options": {"include_usage": False}}, {"include_usage": True}),
        ({"stream_options": {"x": 1}}, {"x": 1, "include_usage": True}),
    ],
)
def test_usage_is_always_asked_for(options: dict[str, Any], sent: dict[str, Any]) -> None:
    """A stream reports its usage to us whether or not the client wants to know."""
    assert sent == patched(body(stream=True, **options))["stream_options"]


@pytest.mark.parametrize(("stream", "fix"), [(True, Fix(stream_usage=False)), (False, Fix())])
def test_no_stream_options(stream: bool, fix: Fix) -> None:
    """The options go where nobody understands them or nothing streams."""
    assert "stream_options" not in patched(body(stream=stream, stream_options={"include_usage": True}), fix)


@pytest.mark.parametrize(("asked", "wanted"), [({}, True), ({"stream": False}, True), ({"stream": True}, False)])
def test_stream_is_what_the_head_says(asked: dict[str, Any], wanted: bool) -> None:
    """An upstream can be made to stream for a client that does not, and the other way round."""
    request = body(**asked)
    result = json.loads(
        DIALECT.patch_request(request, msgspec.structs.replace(DIALECT.read_head(request), stream=wanted), upstream())
    )

    assert wanted is result["stream"]
    assert wanted is ("stream_options" in result)


def test_temperature() -> None:
    """A server that fixes the temperature is not told another one."""
    assert patched(body(temperature=0.3))["temperature"] == 0.3
    assert "temperature" not in patched(body(temperature=0.3), Fix(temperature=False))


@pytest.mark.parametrize(
    ("spelling", "choice", "sent"),
    [
        ("required", "required", "required"),
        ("any", "required", "any"),
        ("auto", "required", "auto"),
        ("any", "none", "none"),
    ],
)
def test_tool_choice(spelling: Any, choice: str, sent: str) -> None:
    """``required`` is spelled as the upstream spells it."""
    assert sent == patched(body(tools=[TOOL], tool_choice=choice), Fix(tool_choice_required=spelling))["tool_choice"]


def test_parallel_tool_calls() -> None:
    """An upstream that cannot call in parallel is told not to, where tools are offered."""
    fix = Fix(parallel_tool_calls=False)

    assert False is patched(body(tools=[TOOL], parallel_tool_calls=True), fix)["parallel_tool_calls"]
    assert "parallel_tool_calls" not in patched(body(), fix)
    assert "parallel_tool_calls" not in patched(body(tools=[TOOL]))


def test_unique_tool_names() -> None:
    """Of tools with the same name the first stays."""
    other = {"type": "function", "function": {"name": "other"}}
    again = {"type": "function", "function": {"name": "terminal", "description": "again"}}
    request = body(tools=[TOOL, other, again])

    assert [TOOL, other] == patched(request, Fix(unique_tool_names=True))["tools"]
    assert [TOOL, other, again] == patched(request)["tools"]


def test_rejected_fields() -> None:
    """Fields the upstream refuses are left out."""
    fields = patched(body(think=False, seed=1, store=True), Fix(rejected_fields=("think", "store", "absent")))

    assert {"model", "messages", "seed"} == set(fields)


def test_last_of_equal_keys_wins() -> None:
    """As in every JSON library, the last of equal keys counts, once."""
    request = b'{"model":"a","messages":[{"role":"user"}],"n":1,"n":2,"model":"b"}'

    assert DIALECT.read_head(request).model == "b"
    assert patched(request) == {"model": "lab/m", "messages": [{"role": "user"}], "n": 2}


def test_half_a_character() -> None:
    """Half an emoji in a tool's output does not cost the request."""
    request = b'{"model":"auto","messages":[{"role":"user","content":"a\\ud83db"}]}'

    assert patched(request)["messages"] == [{"role": "user", "content": "a\ufffdb"}]


# --- patched: messages ------------------------------------------------------------------------------------------------


def test_developer_role() -> None:
    """Where nobody knows developers they are the system; a text that names them stays."""
    developer = {"role": "developer", "content": 'the "developer" role'}

    assert patched_messages(Fix(developer_role=False), developer, USER) == [
        {"role": "system", "content": 'the "developer" role'},
        USER,
    ]
    assert [developer, USER] == patched_messages(Fix(), developer, USER)


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        ("a", "a"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "text", "text": "a "}, {"type": "image_url", "image_url": {"url": "x"}}], "a [image_url]"),
        ([], ""),
        (None, ""),
        ({"ok": True}, '{"ok":true}'),
    ],
)
def test_string_tool_content(content: Any, sent: str) -> None:
    """A tool's result becomes one string; other messages keep their parts."""
    parts = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    messages = patched_messages(Fix(string_tool_content=True), parts, RESULT | {"content": content})

    assert [parts, RESULT | {"content": sent}] == messages


@pytest.mark.parametrize("message", [CALLING | {"content": None}, {"role": "assistant", "tool_calls": [CALL]}])
def test_null_content(message: dict[str, Any]) -> None:
    """An assistant turn without text gets an empty one."""
    assert patched_messages(Fix(null_content=False), USER, message) == [USER, CALLING | {"content": ""}]
    assert [USER, message] == patched_messages(PLAIN, USER, message)


def with_arguments(arguments: Any) -> dict[str, Any]:
    return CALLING | {"tool_calls": [CALL, CALL | {"function": {"name": "terminal", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (ARGUMENTS, ARGUMENTS),
        ('{"a": "\\ud83d"}', '{"a": "\\ud83d"}'),
        ({"command": "ls"}, '{"command":"ls"}'),
        ("", "{}"),
        ('{"command": "l', "{}"),
        ("[1]", "{}"),
        (None, "{}"),
        ([1], "{}"),
    ],
)
def test_strict_arguments(arguments: Any, sent: str) -> None:
    """Arguments in history are a JSON object in a string, or an empty one."""
    assert [with_arguments(sent)] == patched_messages(Fix(strict_arguments=True), with_arguments(arguments))


@pytest.mark.parametrize("calls", [None, [], "x", [1], [{}], [{"function": 7}], {"extra_content": 1}])
def test_odd_tool_calls(calls: Any) -> None:
    """Tool calls of another shape are for the upstream to refuse."""
    message = CALLING | {"tool_calls": calls}

    assert [message] == patched_messages(Fix(strict_arguments=True), message)


def test_thought_signatures() -> None:
    """Signatures go only to whoever signs."""
    signed = CALLING | {"tool_calls": [CALL | {"extra_content": {"google": {"thought_signature": "s"}}}, CALL]}

    assert patched_messages(Fix(), signed) == [CALLING | {"tool_calls": [CALL, CALL]}]
    assert [signed] == patched_messages(Fix(thought_signatures=True), signed)


def test_reasoning_rejected() -> None:
    """Reasoning leaves the assistant's turns in all its forms, and only them."""
    thought = CALLING | {"reasoning_content": "a", "reasoning": "a", "reasoning_details": [{"text": "a"}]}
    odd = USER | {"reasoning": "mine"}

    assert [odd, CALLING] == patched_messages(Fix(reasoning_content="reject"), odd, thought)
    assert [odd, thought] == patched_messages(PLAIN, odd, thought)


@pytest.mark.parametrize(
    ("given_fields", "sent"),
    [
        ({}, {"reasoning_content": " "}),
        ({"reasoning_content": ""}, {"reasoning_content": " "}),
        ({"reasoning_content": None}, {"reasoning_content": " "}),
        ({"reasoning_content": " "}, {"reasoning_content": " "}),
        ({"reasoning_content": "so"}, {"reasoning_content": "so"}),
        ({"reasoning": "so"}, {"reasoning": "so", "reasoning_content": "so"}),
        ({"reasoning": ""}, {"reasoning": "", "reasoning_content": " "}),
    ],
)
def test_reasoning_required(given_fields: dict[str, Any], sent: dict[str, Any]) -> None:
    """Turns that called tools carry reasoning, a blank if it is lost; turns that did not stay."""
    plain = {"role": "assistant", "content": "a"}

    assert [plain, CALLING | sent] == patched_messages(Fix(reasoning_content="require"), plain, CALLING | given_fields)


def test_untouched_messages_keep_their_bytes() -> None:
    """A fix that finds nothing to do leaves the messages as they came."""
    messages = b'[ {"role":"user","content":"the \\"tool_calls\\" field"} ]'
    request = b'{"model":"auto","messages":' + messages + b"}"
    fix = Fix(strict_arguments=True, reasoning_content="require", null_content=False, string_tool_content=True)

    assert messages in DIALECT.patch_request(request, DIALECT.read_head(request), upstream(fix))


def test_broken_bytes_are_left_to_the_upstream() -> None:
    """Messages that are not UTF-8 go on as they came: a patch never fails."""
    messages = b'[{"role":"assistant","content":null,"tool_calls":[{"function":{"arguments":"\xff"}}]}]'
    request = b'{"model":"auto","messages":' + messages + b"}"
    fix = Fix(strict_arguments=True)

    assert messages in DIALECT.patch_request(request, DIALECT.read_head(request), upstream(fix))
