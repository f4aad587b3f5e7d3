"""An upstream that speaks Responses, driven by the same scripts as the one that speaks chat, over real sockets.

The events are those of OpenAI's own servers (API reference and recordings, 2026), written by hand: what our encoder
says is not what our decoder should be tested with.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import orjson

from routerd.proxy.scripts import PLACED_KINDS, PLACES, Answer, Call, Chat, Fault, Place, Received, Said, Turn, compose
from routerd.proxy.simulated import LAST_CHUNK, Connection, SimulatedServer
from routerd.proxy.strikes import (
    CHUNKED,
    EVENT_STREAM,
    JSON,
    Strike,
    chunk,
    error_body,
    head,
    pieces,
    plain,
    replacement,
    strike_before_headers,
    strike_in_stream,
)
from tests.fakes import ScriptedUpstream

RESPONSES = "/v1/responses"
SEAL = "gAAAAABoISw4fEYGZy0rJTiHl0kYxVsYlCTF"
SEALS_ASKED = "reasoning.encrypted_content"
FAILED = "The model failed while it answered."
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


# --- requests ---------------------------------------------------------------------------------------------------------


class Asked(Received, frozen=True):
    """A request as it came; ``body`` also has the conversation as ``messages``, as the scripts look at it."""

    @property
    def body(self) -> Any:
        body = orjson.loads(self.raw)
        return body | {"messages": messages_of(body)}


def messages_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation as chat has it: roles and texts, calls and results."""
    given = body["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [message for item in items for message in _message_of(item)]


def _message_of(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind = item.get("type", "message")
    if kind == "message":
        yield {"role": item["role"], "content": text_of(item["content"])}
    elif kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        yield {"role": "assistant", "content": None, "tool_calls": [{"id": item["call_id"], "function": function}]}
    elif kind == "function_call_output":
        yield {"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item["output"])}


def text_of(content: Any) -> str:
    """The text of a message, whether it is a string or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def _chat_of(body: dict[str, Any]) -> Chat:
    choice = body.get("tool_choice")
    return msgspec.convert(
        {
            "messages": messages_of(body),
            "model": body["model"],
            "stream": body.get("stream"),
            "tools": [{"function": tool} for tool in body.get("tools") or () if tool["type"] == "function"],
            "tool_choice": {"function": choice} if isinstance(choice, dict) else choice,
        },
        Chat,
    )


# --- answers ----------------------------------------------------------------------------------------------------------


class Told:
    """A composed answer in this dialect: the events of a stream, the index at which each place lies, and the whole."""

    def __init__(self, said: Said, answer: Answer, body: dict[str, Any]) -> None:
        self.events: list[bytes] = []
        self.marks: dict[Place, int] = {}
        self._said = said
        self._piece = answer.piece
        self._sealed = SEALS_ASKED in (body.get("include") or ())
        self._numbers = itertools.count()
        self._id = f"resp_{uuid.uuid4().hex}"
        self._items: list[dict[str, Any]] = []
        self._say("response.created", response=self._response("in_progress"))
        self._say("response.in_progress", response=self._response("in_progress"))
        self.marks["before_content"] = len(self.events)
        if said.reasoning:
            self._reason(said.reasoning)
        if said.text or not said.calls:
            self._speak(said.text)
        for place, call in enumerate(said.calls):
            if place == 1:
                self.marks["between_calls"] = len(self.events)
            self._call(call)
        self.marks["before_finish"] = len(self.events)
        self.whole = self._response("incomplete" if said.finish in _INCOMPLETE else "completed")
        self._say(f"response.{self.whole['status']}", response=self.whole)

    def position(self, place: Place) -> int:
        """The index of the event before which a fault at this place strikes."""
        following = PLACES[PLACES.index(place) :]
        return next(self.marks[later] for later in following if later in self.marks)

    def error(self, status: int) -> bytes:
        """An error in mid-stream: with a status the answer's own end, without one an event that stands alone."""
        if not status:
            return self._event("error", code="server_error", message=FAILED, param=None)
        error = {"code": "rate_limit_exceeded" if status == 429 else "server_error", "message": FAILED}
        return self._event("response.failed", response=self._response("failed") | {"error": error})

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = orjson.dumps({"type": kind, "sequence_number": next(self._numbers), **fields})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def _say(self, kind: str, **fields: Any) -> None:
        self.events.append(self._event(kind, **fields))

    def _response(self, status: str) -> dict[str, Any]:
        said = self._said
        ended = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": said.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": _INCOMPLETE[said.finish]} if status == "incomplete" else None,
            "instructions": None,
            "max_output_tokens": None,
            "model": said.model,
            "output": list(self._items) if ended else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "temperature": 1.0,
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": None,
            "metadata": {},
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._said.usage
        return {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        }

    def _reason(self, text: str) -> None:
        index, item = len(self._items), {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": []}
        at = {"item_id": item["id"], "output_index": index, "summary_index": 0}
        part = {"type": "summary_text", "text": text}
        self._say("response.output_item.added", output_index=index, item=item)
        self._say("response.reasoning_summary_part.added", **at, part=part | {"text": ""})
        self._pieces("in_reasoning", text, "response.reasoning_summary_text.delta", at)
        self._say("response.reasoning_summary_text.done", **at, text=text)
        self._say("response.reasoning_summary_part.done", **at, part=part)
        self._done(item | {"summary": [part]} | ({"encrypted_content": SEAL} if self._sealed else {}))

    def _speak(self, text: str) -> None:
        index = len(self._items)
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": "in_progress", "content": []}
        item["role"] = "assistant"
        at = {"item_id": item["id"], "output_index": index, "content_index": 0}
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
        self._say("response.output_item.added", output_index=index, item=item)
        self._say("response.content_part.added", **at, part=part | {"text": ""})
        self._pieces("mid_text", text, "response.output_text.delta", at | {"logprobs": []})
        self._say("response.output_text.done", **at, text=text, logprobs=[])
        self._say("response.content_part.done", **at, part=part)
        self._done(item | {"status": "completed", "content": [part]})

    def _call(self, call: Call) -> None:
        index = len(self._items)
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress", "arguments": ""}
        item |= {"call_id": call.id, "name": call.name}
        at = {"item_id": item["id"], "output_index": index}
        self._say("response.output_item.added", output_index=index, item=item)
        self._pieces("mid_call", call.arguments, "response.function_call_arguments.delta", at)
        self._say("response.function_call_arguments.done", **at, arguments=call.arguments)
        self._done(item | {"status": "completed", "arguments": call.arguments})

    def _pieces(self, place: Place, text: str, kind: str, at: dict[str, Any]) -> None:
        for piece in pieces(text, self._piece):
            self._say(kind, **at, delta=piece, obfuscation="x" * 8)
            self.marks.setdefault(place, len(self.events))

    def _done(self, item: dict[str, Any]) -> None:
        self._say("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)


# --- the server -------------------------------------------------------------------------------------------------------


class ResponsesServer(SimulatedServer):
    """Plays a script in this dialect."""

    async def answer(self, connection: Connection, method: str, path: str, headers: dict[str, str], raw: bytes) -> None:
        if method != "POST" or not path.endswith("/responses"):
            await connection.send(plain(404, JSON, error_body(404)))
            return
        self.requests += 1
        self.answering += 1
        body = orjson.loads(raw)
        request = Asked(self.requests, path, headers, raw, _chat_of(body))
        try:
            turn = self._next_turn(request)
            self._on_change()
            await self._play(connection, turn, request, body)
        finally:
            self.answering -= 1
            self._on_change()

    async def _play(self, connection: Connection, turn: Turn, request: Received, body: dict[str, Any]) -> None:
        fault, stream = turn.fault, bool(body.get("stream"))
        if fault and fault.kind in PLACED_KINDS and fault.place == "before_headers":
            await connection._strike(strike_before_headers(fault), fault)
            fault = None
        replaced = replacement(fault, stream=stream) if fault else None
        if replaced is not None:
            await connection.send(replaced)
            return
        told = Told(compose(turn, request, self._suffix), turn.answer, body)
        placed = fault if fault and fault.kind in PLACED_KINDS else None
        if stream and not (fault and fault.kind == "json_body"):
            await self._play_stream(connection, told, turn.answer, placed)
        else:
            await connection._play_body(orjson.dumps(told.whole), turn.answer, placed)

    async def _play_stream(self, connection: Connection, told: Told, answer: Answer, placed: Fault | None) -> None:
        position = told.position(placed.place) if placed else -1
        await connection.send(head(200, EVENT_STREAM, CHUNKED, answer.headers))
        for index, event in enumerate(told.events):
            if placed and index == position:
                strike = self._strike(told, placed, event)
                await connection._strike(strike, placed)
                if strike.then == "skip":
                    continue
            await connection.send(chunk(event))
            if answer.pace_s:
                await asyncio.sleep(answer.pace_s)
        await connection.send(LAST_CHUNK)

    def _strike(self, told: Told, fault: Fault, event: bytes) -> Strike:
        if fault.kind == "error":
            return Strike(chunk(told.error(fault.status)) + LAST_CHUNK, "keep")
        return strike_in_stream(fault, event)


class ResponsesUpstream(ScriptedUpstream):
    """An upstream that plays turns, one for each Responses request; the last one repeats."""

    server: ClassVar[type[SimulatedServer]] = ResponsesServer
    dialect: ClassVar[str] = "responses"
