"""What is read off an answer for whoever goes on from it; the request they send then is the same conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from routerd.dialects.responses import DIALECT
from routerd.dialects.responses_chain import NOTED_BYTES_MAX, ResponsesChaining, ResponsesRecorder
from tests.dialects.streams import recordings

CHAINING = ResponsesChaining()
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]}
SEARCH = {"id": "ws_1", "type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "x"}}


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def ended(kind: str = "completed", *, output: Any = (MESSAGE,), **fields: Any) -> bytes:
    response = {"id": "resp_1", "object": "response", "status": kind, "output": list(output)}
    return event(f"response.{kind}", response=response | fields)


def found(*reads: bytes) -> tuple[str, Any] | None:
    """What the recorder gives for a stream: the id and the items."""
    recorder = ResponsesRecorder()
    results = [result for data in reads if (result := recorder.stream(data)) is not None]
    assert len(results) <= 1
    return (results[0][0], json.loads(results[0][1])) if results else None


def test_the_last_event_has_all() -> None:
    """Its list is taken byte for byte, with items of kinds nobody here knows."""
    done = event("response.output_item.done", item=MESSAGE)

    assert found(done, ended(output=[SEARCH, MESSAGE])) == ("resp_1", [SEARCH, MESSAGE])
    assert found(done + ended(output=[SEARCH, MESSAGE])) == ("resp_1", [SEARCH, MESSAGE])


def test_servers_that_leave_the_list_empty() -> None:
    """Then the items are those that ended on the way."""
    done = [event("response.output_item.done", item=item) for item in (SEARCH, MESSAGE)]

    assert found(*done, ended(output=[])) == ("resp_1", [SEARCH, MESSAGE])


def test_ends() -> None:
    """An answer that reached a limit is one; one that failed is none, nor is one that has not ended."""
    assert found(ended("incomplete")) == ("resp_1", [MESSAGE])
    assert found(ended("failed")) is None
    assert found(event("response.created", response={"id": "resp_1", "status": "in_progress"})) is None
    assert found(event("response.output_item.done", item=MESSAGE)) is None
    assert found(ended(id=None)) is None


def test_text_about_ends_is_no_end() -> None:
    """A model may speak of this very API."""
    assert found(event("response.output_text.delta", delta="response.completed, response.output_item.done")) is None


def test_too_much_to_keep() -> None:
    """Items beyond the bound are not noted; the answer is then not kept, rather than kept in part."""
    long = event("response.output_item.done", item=MESSAGE | {"x": "y" * NOTED_BYTES_MAX})

    assert found(long, event("response.output_item.done", item=MESSAGE), ended(output=[])) is None


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"nothing", b'{"id":"resp_1","status":"failed","output":[]}', b'{"id":1}']
)
def test_bodies_that_are_none(body: bytes) -> None:
    """Nothing to go on from."""
    assert ResponsesRecorder().body(body) is None


def test_body() -> None:
    """A whole answer is one too."""
    body = json.dumps({"id": "resp_1", "status": "completed", "output": [SEARCH]}).encode()

    assert ResponsesRecorder().body(body) == ("resp_1", json.dumps([SEARCH]).encode())


@pytest.mark.parametrize("path", recordings(DIALECT), ids=lambda path: path.stem)
def test_recorded_answers(path: Any) -> None:
    """What real servers send can be gone on from, wherever it is cut into events."""
    blocks = [block + b"\n\n" for block in path.read_bytes().replace(b"\r\n", b"\n").split(b"\n\n") if block]
    got = found(*blocks)

    assert got is not None
    assert got == found(b"".join(blocks))


@pytest.mark.parametrize("given", ["Hello.", [{"role": "user", "content": "Hello."}]])
def test_the_conversation_keeps_its_hash(given: Any) -> None:
    """However the first question was written, and however long it has become: warm caches stay known."""
    first = json.dumps({"model": "auto", "instructions": "Be brief.", "input": given}).encode()
    second = json.dumps(
        {"model": "auto", "instructions": "Be brief.", "input": "And now?", "previous_response_id": "resp_1"}
    ).encode()
    whole = CHAINING.chained(second, [CHAINING.input_items(first), json.dumps([MESSAGE]).encode()])

    assert DIALECT.read_head(second).previous == "resp_1"
    assert DIALECT.read_head(whole).previous == ""
    assert DIALECT.read_head(first).conversation == DIALECT.read_head(whole).conversation
    assert DIALECT.read_head(second).conversation != DIALECT.read_head(whole).conversation
    assert len(json.loads(whole)["input"]) == 3
