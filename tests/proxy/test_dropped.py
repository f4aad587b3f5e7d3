"""What cannot cross from one dialect to another is not lost in silence: it is named in the log, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from routerd.canonical import Message, Request, Text, ToolCall, ToolResult
from routerd.dialects import DIALECTS
from tests.proxy.wire import DONE, Play, RawUpstream, Talk, event, hear
from tests.rig import MODEL, config_text, daemon

CITATION = {"type": "url_citation", "url_citation": {"url": "https://example.org/", "title": "x"}}
CHAT = (
    event({"role": "assistant", "content": "Yes."}),
    event({"content": "", "annotations": [CITATION], "images": [{"type": "image_url", "image_url": {"url": "x"}}]}),
    event({}, "stop"),
    DONE,
)


def _named(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n".encode()


def _block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> tuple[bytes, ...]:
    return (
        _named("content_block_start", index=index, content_block=start),
        *(_named("content_block_delta", index=index, delta=delta) for delta in deltas),
        _named("content_block_stop", index=index),
    )


MESSAGES = (
    _named("message_start", message={"id": "msg_1", "model": "m", "content": [], "usage": {"input_tokens": 3}}),
    *_block(0, {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}}),
    *_block(1, {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": []}),
    *_block(
        2,
        {"type": "text", "text": ""},
        {"type": "text_delta", "text": "Yes."},
        {"type": "citations_delta", "citation": {"type": "web_search_result_location", "url": "https://example.org/"}},
    ),
    _named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2}),
    _named("message_stop"),
)
_SEARCH = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
_SAID = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
_PART = {"type": "output_text", "text": "Yes.", "annotations": [CITATION]}
_IN_TEXT: dict[str, Any] = {"output_index": 1, "item_id": "msg_1", "content_index": 0}
RESPONSES = (
    _named("response.created", response={"id": "resp_1", "model": "m", "status": "in_progress", "output": []}),
    _named("response.output_item.added", output_index=0, item=_SEARCH),
    _named("response.output_item.done", output_index=0, item=_SEARCH),
    _named("response.output_item.added", output_index=1, item=_SAID | {"content": []}),
    _named("response.output_text.delta", **_IN_TEXT, delta="Yes."),
    _named("response.output_text.annotation.added", **_IN_TEXT, annotation_index=0, annotation=CITATION),
    _named("response.output_item.done", output_index=1, item=_SAID | {"content": [_PART]}),
    _named("response.completed", response={"id": "resp_1", "model": "m", "status": "completed", "output": []}),
)
STREAMS = {
    "chat": (CHAT, {"citations", "pictures"}),
    "messages": (MESSAGES, {"citations", "server_tools"}),
    "responses": (RESPONSES, {"citations", "server_tools"}),
}
FAILED = Request(
    "auto",
    stream=True,
    messages=(
        Message("user", (Text("Read it."),)),
        Message("assistant", (ToolCall("call_1", "read", "{}"),)),
        Message("user", (ToolResult("call_1", (Text("No such file."),), is_error=True),)),
    ),
    max_output_tokens=100,
    stop=("END",),
)


def _playing(stream: tuple[bytes, ...]) -> Play:
    async def play(talk: Talk) -> None:
        await talk.stream(stream)

    return play


def _text(name: str, upstream: RawUpstream) -> str:
    return config_text({"a": upstream}).replace('dialect = "chat"', f'dialect = "{name}"')  # type: ignore[dict-item]  # it has what is asked for


@pytest.mark.parametrize("client", DIALECTS)
@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "body"])
async def test_what_an_answer_had_besides(name: str, client: str, stream: bool, tmp_path: Path) -> None:
    """Sources, pictures, and what the vendor's own tools did: bytes that pass lose nothing, what is said anew does."""
    answer, features = STREAMS[name]
    asked = Request("auto", stream=stream, messages=(Message("user", (Text("Is it?"),)),), max_output_tokens=100)
    async with RawUpstream(_playing(answer)) as upstream, daemon(_text(name, upstream), tmp_path) as served:
        dialect = DIALECTS[client]
        heard = await hear(served.url, dialect.encode_request(asked), path=dialect.paths[0])
        passed = stream and client == name

        assert heard.status == 200
        assert b"Yes." in heard.data
        assert (heard.data == b"".join(answer)) == passed
        assert set(served.exchanges[0].get("dropped", [])) == (set() if passed else features)
        for feature in features:
            labels = {"from_dialect": name, "to_dialect": client, "feature": feature}
            assert served.metric("routerd_dropped_features_total", **labels) == (0 if passed else 1)


@pytest.mark.parametrize(
    ("client", "name", "dropped"),
    [("messages", "chat", ["is_error"]), ("messages", "responses", ["stop"]), ("chat", "responses", ["stop"])],
)
async def test_what_a_request_had_besides(client: str, name: str, dropped: list[str], tmp_path: Path) -> None:
    """What the other dialect has no word for, and the answer does not depend on."""
    answer, _ = STREAMS[name]
    async with RawUpstream(_playing(answer)) as upstream, daemon(_text(name, upstream), tmp_path) as served:
        dialect = DIALECTS[client]
        heard = await hear(served.url, dialect.encode_request(FAILED), path=dialect.paths[0])

        assert heard.status == 200
        assert [one for one in served.exchanges[0]["dropped"] if one in ("is_error", "stop")] == dropped
        assert upstream.talks[0].body["model"] == MODEL
