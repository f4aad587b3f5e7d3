"""A simulated answer as bytes: how it is put on the wire, and what is left of it where a fault strikes.

Composed events carry marks: the index at which each place lies. A place the answer lacks falls through to the next one
it has, so that a fault always strikes. For an answer that is not streamed, places are fractions of its body.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import orjson

from routerd.canonical import Usage
from routerd.proxy.scripts import PLACES, Answer, Call, Fault, Headers, Place, Said

EVENT_STREAM = "text/event-stream"
JSON = "application/json"
COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
CHUNKED = "transfer-encoding: chunked"
UNTIL_CLOSE = "connection: close"
LAST_CHUNK = b"0\r\n\r\n"
HTML = b"<!DOCTYPE html><html><head><title>Welcome</title></head><body>Please sign in.</body></html>"

_STATUS_ERRORS: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request_error", "This deployment does not accept the request."),
    401: ("invalid_api_key", "The key is not valid."),
    402: ("insufficient_credits", "The balance is used up."),
    403: ("permission_denied", "The key may not use this."),
    404: ("model_not_found", "The model does not exist."),
    413: ("request_too_large", "The request is too large."),
    429: ("rate_limit_exceeded", "Too many requests, retry later."),
    500: ("internal_error", "The server failed."),
    503: ("overloaded", "The service is overloaded."),
    529: ("overloaded_error", "The service is overloaded."),
}


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def pieces(text: str, size: int) -> list[str]:
    """The text in pieces of ``size`` characters, but at least two pieces if it has two characters."""
    size = max(1, min(size, (len(text) + 1) // 2))
    return [text[at : at + size] for at in range(0, len(text), size)]


def error_body(status: int) -> bytes:
    code, message = _STATUS_ERRORS.get(status, ("error", "The request failed."))
    return orjson.dumps({"error": {"message": message, "type": code, "code": code}})


def head(status: int, content_type: str, framing: str, headers: Headers = ()) -> bytes:
    """The status line and the headers. ``framing`` is the header that says where the body ends."""
    lines = [
        f"HTTP/1.1 {status} {http.client.responses.get(status, 'Status')}",
        f"content-type: {content_type}",
        framing,
    ]
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def plain(status: int, content_type: str, body: bytes, headers: Headers = ()) -> bytes:
    """A whole HTTP answer."""
    return head(status, content_type, f"content-length: {len(body)}", headers) + body


class Streamed:
    """A composed answer as events, and the index at which each place lies."""

    def __init__(self, said: Said, answer: Answer, *, include_usage: bool) -> None:
        self.events: list[bytes] = []
        self.marks: dict[Place, int] = {}
        self._said = said
        self._say({"role": "assistant", "content": ""})
        self.marks["before_content"] = len(self.events)
        self._pieces("in_reasoning", pieces(said.reasoning, answer.piece), lambda text: {answer.reasoning_field: text})
        self._pieces("mid_text", pieces(said.text, answer.piece), lambda text: {"content": text})
        for index, call in enumerate(said.calls):
            self._call(index, call, answer.piece)
        self.marks["before_finish"] = len(self.events)
        self._say({}, said.finish)
        if include_usage:
            self.events.append(sse(self._envelope() | {"choices": [], "usage": wire_usage(said.usage)}))
        self.events.append(DONE)

    def position(self, place: Place) -> int:
        """The index of the event before which a fault at this place strikes."""
        following = PLACES[PLACES.index(place) :]
        return next(self.marks[later] for later in following if later in self.marks)

    def _envelope(self) -> dict[str, Any]:
        said = self._said
        return {"id": said.id, "object": "chat.completion.chunk", "created": said.created, "model": said.model}

    def _say(self, delta: dict[str, Any], finish: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self.events.append(sse(self._envelope() | {"choices": [choice]}))

    def _pieces(self, place: Place, texts: list[str], delta: Callable[[str], dict[str, Any]]) -> None:
        for text in texts:
            self._say(delta(text))
            self.marks.setdefault(place, len(self.events))

    def _call(self, index: int, call: Call, piece: int) -> None:
        if index == 1:
            self.marks["between_calls"] = len(self.events)
        self._say({"tool_calls": [{"index": index} | _wire_call(call, "")]})
        self._pieces(
            "mid_call",
            pieces(call.arguments, piece),
            lambda text: {"tool_calls": [{"index": index, "function": {"arguments": text}}]},
        )


def _wire_call(call: Call, arguments: str) -> dict[str, Any]:
    seal = {"extra_content": orjson.loads(call.signature)} if call.signature else {}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}} | seal


def whole(said: Said, answer: Answer) -> bytes:
    """A composed answer as the JSON body of a request that does not stream."""
    message: dict[str, Any] = {"role": "assistant", "content": said.text or None}
    if said.reasoning:
        message[answer.reasoning_field] = said.reasoning
    if said.calls:
        message["tool_calls"] = [_wire_call(call, call.arguments) for call in said.calls]
    choice = {"index": 0, "message": message, "finish_reason": said.finish}
    envelope = {"id": said.id, "object": "chat.completion", "created": said.created, "model": said.model}
    return orjson.dumps(envelope | {"choices": [choice], "usage": wire_usage(said.usage)})


def wire_usage(usage: Usage) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
    return counts if usage.cost_usd is None else counts | {"cost": usage.cost_usd}


# --- where faults strike --------------------------------------------------------------------------------------------


class Strike(NamedTuple):
    """Send this, then: ``wait`` some seconds and go on, ``skip`` the event, ``hang``, ``reset`` or ``close`` the
    connection, or ``keep`` it and be done.
    """

    data: bytes
    then: Literal["wait", "skip", "hang", "reset", "close", "keep"]


def strike_before_headers(fault: Fault) -> Strike:
    status = fault.status or 500
    return {
        "stall": Strike(b"", "hang"),
        "pause": Strike(b"", "wait"),
        "reset": Strike(b"", "reset"),
        "tear": Strike(b"HTTP/1.1 200 OK\r\ncontent-ty", "close"),
        "eof": Strike(b"", "close"),
        "error": Strike(plain(status, JSON, error_body(status)), "keep"),
        "malformed": Strike(b"this is not HTTP\r\n\r\n", "close"),
    }[fault.kind]


def strike_in_stream(fault: Fault, event: bytes) -> Strike:
    """``event`` is the one that would have come next."""
    half = event[: len(event) // 2]
    return {
        "stall": Strike(b"", "hang"),
        "pause": Strike(b"", "wait"),
        "reset": Strike(b"", "reset"),
        "tear": Strike(chunk(event)[: -len(half)], "close"),
        "eof": Strike(LAST_CHUNK, "keep"),
        "error": Strike(chunk(error_event(fault.status or 502)) + LAST_CHUNK, "keep"),
        "malformed": Strike(chunk(half + b"\n\n"), "skip"),
    }[fault.kind]


def strike_in_body(fault: Fault, body: bytes, headers: Headers) -> Strike:
    """Head and the part of the body that still comes; after ``wait`` the rest of it follows."""
    part = body[: cut_of(body, fault.place)]
    whole_head = head(200, JSON, f"content-length: {len(body)}", headers)
    return {
        "stall": Strike(whole_head + part, "hang"),
        "pause": Strike(whole_head + part, "wait"),
        "reset": Strike(whole_head + part, "reset"),
        "tear": Strike(whole_head + part, "close"),
        "eof": Strike(head(200, JSON, UNTIL_CLOSE, headers) + part, "close"),
        "error": Strike(plain(200, JSON, error_body(fault.status or 502), headers), "keep"),
        "malformed": Strike(plain(200, JSON, part, headers), "keep"),
    }[fault.kind]


def cut_of(body: bytes, place: Place) -> int:
    return len(body) * PLACES.index(place) // len(PLACES)


def error_event(status: int) -> bytes:
    error = {"code": status, "message": "The model failed while it answered."}
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    return sse({"id": "chatcmpl-error", "object": "chat.completion.chunk", "error": error, "choices": [choice]})


def replacement(fault: Fault, *, stream: bool) -> bytes | None:
    """The whole HTTP answer of a fault that replaces the model's, None if it does not."""
    match fault.kind:
        case "status":
            body = error_body(fault.status) if fault.body is None else fault.body
            return plain(fault.status, JSON, body, fault.headers)
        case "html":
            return plain(200, "text/html; charset=utf-8", HTML)
        case "json_error":
            return plain(200, JSON, error_body(fault.status or 503))
        case "empty":
            return head(200, EVENT_STREAM, CHUNKED) + LAST_CHUNK if stream else plain(200, JSON, b"")
        case _:
            return None
