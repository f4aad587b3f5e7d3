"""What vendors' servers say and what clients understand of it, dialect by dialect, written and read by hand.

The simulation and the bench need answers that our own encoders have not written, and a reader that our own decoders are
not: what both get wrong in the same way would otherwise pass. ``Wire`` is one dialect from both ends. ``WIRES`` holds
those the product speaks.

A reader is strict where a client's library would stumble, or show something twice: each such thing is a *flaw*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from routerd.dialects import DIALECTS

TOOL = "terminal"
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
DOCUMENT = {"type": "object", "properties": {"plan": {"type": "string"}}, "required": ["plan"]}

Place = Literal["opening", "text", "call", "finish"]
Kind = Literal["stream", "whole", "unstreamable", "document"]


class Said(NamedTuple):
    """An answer: its text in pieces, and the arguments of its calls, each with its id."""

    texts: tuple[str, ...]
    calls: tuple[tuple[str, str], ...] = ()

    @property
    def reason(self) -> str:
        return "tool_calls" if self.calls else "stop"


class Chunk(NamedTuple):
    """One event of a stream, and where in the answer it stands."""

    place: Place
    data: bytes


class Asked(NamedTuple):
    """What an upstream understands of a request. ``shown``: the text it is to go on with."""

    question: str
    shown: str | None
    prefilled: bool
    stream: bool


class Read(NamedTuple):
    """What a client makes of an answer. ``finish`` is in our words, ``ended``: the terminal marker came."""

    text: str = ""
    calls: tuple[str, ...] = ()
    finish: str = ""
    begun_calls: bool = False
    ended: bool = False
    failed: bool = False  # an error was reported, or a line that is none
    flaws: tuple[str, ...] = ()


class Wire(Protocol):
    """One dialect. ``error``, ``broken`` and ``ping``: bytes of a stream; ``odd_body``: a 200 that is no answer."""

    name: str
    error: bytes
    broken: bytes
    ping: bytes
    odd_body: bytes
    tells_end: bool  # clients here believe an answer only with its finish; elsewhere a proper end of the body will do

    def request(self, question: str, model: str, kind: Kind) -> bytes:
        """What an agent sends."""

    def asked(self, body: bytes) -> Asked:
        """What a server reads of it."""

    def stream(self, said: Said) -> list[Chunk]:
        """A healthy stream."""

    def body(self, said: Said, *, finished: bool = True) -> bytes:
        """A whole answer."""

    def read_stream(self, data: bytes) -> Read:
        """What a client understands of a stream, up to where it cannot go on."""

    def read_body(self, data: bytes) -> Read:
        """What a client understands of a whole answer."""


# --- both ends --------------------------------------------------------------------------------------------------------


def lines(data: bytes) -> Iterator[bytes]:
    """The payload of each event that came whole."""
    for block in data.split(b"\n\n")[:-1]:
        for line in block.split(b"\n"):
            if line.startswith(b"data: "):
                yield line[6:]


def plain(content: Any) -> str:
    """The text of a message, whether it is a string or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def asked(messages: Sequence[dict[str, Any]], *, stream: bool) -> Asked:
    turns = [plain(message["content"]) for message in messages if message["role"] == "assistant"]
    question = next(plain(message["content"]) for message in messages if message["role"] == "user")
    return Asked(question, turns[-1] if turns else None, messages[-1]["role"] == "assistant", stream)


def halves(text: str) -> Iterable[str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


class Notes:
    """What a reader has gathered."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.calls: dict[int, list[str]] = {}
        self.ids: set[str] = set()
        self.finish = ""
        self.started = self.ended = self.failed = False
        self.flaws: list[str] = []

    def flaw(self, found: object, name: str) -> None:
        if found:
            self.flaws.append(name)

    def open_call(self, index: int, identity: str, name: str) -> None:
        self.flaw(index != len(self.calls), "calls out of order")
        self.flaw(not identity or identity in self.ids, "a call without an id of its own")
        self.flaw(name != TOOL, "a call of no tool")
        self.calls[index] = []
        self.ids.add(identity)

    def read(self) -> Read:
        calls = tuple("".join(parts) for parts in self.calls.values())
        text = "".join(self.texts)
        return Read(text, calls, self.finish, bool(calls), self.ended, self.failed, tuple(self.flaws))


# --- chat -------------------------------------------------------------------------------------------------------------


def _chat_chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + orjson.dumps({"id": "chatcmpl-1", "model": "model", "choices": [choice]}) + b"\n\n"


class ChatWire:
    """Chat completions."""

    name = "chat"
    error = b'data: {"error":{"message":"The model failed.","code":502}}\n\n'
    broken = b'data: {"id":"chatcm\n\n'
    ping = b": ping\n\n"
    odd_body = b'{"id": "1", "object": "chat.completion", "choices": []}'
    tells_end = True

    def request(self, question: str, model: str, kind: Kind) -> bytes:
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}]}
        if kind in ("stream", "document"):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if kind == "unstreamable":
            body["logprobs"] = True
        if kind == "document":
            schema = {"name": "plan", "schema": DOCUMENT}
            return orjson.dumps(body | {"response_format": {"type": "json_schema", "json_schema": schema}})
        return orjson.dumps(body | {"tools": [{"type": "function", "function": {"name": TOOL, "parameters": SCHEMA}}]})

    def asked(self, body: bytes) -> Asked:
        request = orjson.loads(body)
        return asked(request["messages"], stream=request.get("stream") is True)

    def stream(self, said: Said) -> list[Chunk]:
        chunks = [Chunk("opening", _chat_chunk({"role": "assistant", "content": ""}))]
        chunks += [Chunk("text", _chat_chunk({"content": text})) for text in said.texts]
        for index, (identity, arguments) in enumerate(said.calls):
            opening = {"index": index, "id": identity, "function": {"name": TOOL, "arguments": ""}}
            chunks.append(Chunk("call", _chat_chunk({"tool_calls": [opening]})))
            chunks += [
                Chunk("call", _chat_chunk({"tool_calls": [{"index": index, "function": {"arguments": half}}]}))
                for half in halves(arguments)
            ]
        chunks.append(Chunk("finish", _chat_chunk({}, said.reason)))
        usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        report = orjson.dumps({"id": "chatcmpl-1", "model": "model", "choices": [], "usage": usage})
        return [*chunks, Chunk("finish", b"data: " + report + b"\n\ndata: [DONE]\n\n")]

    def body(self, said: Said, *, finished: bool = True) -> bytes:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(said.texts) or None}
        if said.calls:
            message["tool_calls"] = [
                {"id": identity, "type": "function", "function": {"name": TOOL, "arguments": arguments}}
                for identity, arguments in said.calls
            ]
        choice = {"index": 0, "message": message, "finish_reason": said.reason if finished else None}
        return orjson.dumps({"id": "1", "object": "chat.completion", "model": "model", "choices": [choice]})

    def read_stream(self, data: bytes) -> Read:
        notes, roles = Notes(), 0
        for line in lines(data):
            notes.flaw(notes.ended or notes.failed, "something after the end")
            if line == b"[DONE]":
                notes.ended = True
                continue
            try:
                chunk = orjson.loads(line)
            except orjson.JSONDecodeError:
                notes.failed = True
                break
            if chunk.get("error"):
                notes.failed = True
                continue
            for choice in chunk["choices"]:
                roles += "role" in choice["delta"]
                self._read_choice(notes, choice)
        notes.flaw(roles > 1, "a second role")
        return notes.read()

    def _read_choice(self, notes: Notes, choice: dict[str, Any]) -> None:
        delta = choice["delta"]
        if delta.get("content"):
            notes.flaw(notes.finish, "text after the finish")
            notes.texts.append(delta["content"])
        for call in delta.get("tool_calls", ()):
            notes.flaw(notes.finish, "a call after the finish")
            if "id" in call:
                notes.open_call(call["index"], call["id"], call["function"].get("name", ""))
            notes.calls[call["index"]].append(call["function"].get("arguments", ""))
        if choice["finish_reason"]:
            notes.flaw(notes.finish, "a second finish")
            notes.finish = choice["finish_reason"]

    def read_body(self, data: bytes) -> Read:
        try:
            choice = orjson.loads(data)["choices"][0]
        except (orjson.JSONDecodeError, LookupError):
            return Read(failed=True)
        message, notes = choice["message"], Notes()
        notes.texts.append(message.get("content") or "")
        for index, call in enumerate(message.get("tool_calls") or ()):
            notes.open_call(index, call["id"], call["function"]["name"])
            notes.calls[index].append(call["function"]["arguments"])
        notes.finish, notes.ended = choice["finish_reason"] or "", True
        return notes.read()


# --- messages ---------------------------------------------------------------------------------------------------------


def _messages_event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + orjson.dumps({"type": kind, **fields}) + b"\n\n"


_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use"}
_FINISHES = {"end_turn": "stop", "tool_use": "tool_calls"}


class MessagesWire:
    """Messages."""

    name = "messages"
    error = _messages_event("error", error={"type": "api_error", "message": "The model failed."})
    broken = b'event: content_block_delta\ndata: {"type":"content_block\n\n'
    ping = _messages_event("ping")
    odd_body = b'{"id": "1", "object": "list", "data": []}'
    tells_end = False

    def request(self, question: str, model: str, kind: Kind) -> bytes:
        messages = [{"role": "user", "content": question}]
        tools = [{"name": TOOL, "input_schema": SCHEMA}]
        streams = kind in ("stream", "document")
        body = {"model": model, "max_tokens": 4096, "stream": streams, "messages": messages}
        if kind == "document":
            return orjson.dumps(body | {"output_config": {"format": {"type": "json_schema", "schema": DOCUMENT}}})
        return orjson.dumps(body | {"tools": tools})

    def asked(self, body: bytes) -> Asked:
        request = orjson.loads(body)
        return asked(request["messages"], stream=request.get("stream") is True)

    def stream(self, said: Said) -> list[Chunk]:
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "model", "content": []}
        opening = _messages_event("message_start", message=message | {"usage": {"input_tokens": 100}})
        chunks = [Chunk("opening", opening + self.ping)]
        index = 0
        if said.texts:
            chunks += self._block("text", index, {"type": "text", "text": ""}, "text_delta", "text", said.texts)
            index += 1
        for identity, arguments in said.calls:
            block = {"type": "tool_use", "id": identity, "name": TOOL, "input": {}}
            chunks += self._block("call", index, block, "input_json_delta", "partial_json", halves(arguments))
            index += 1
        delta = {"stop_reason": _STOP_REASONS[said.reason], "stop_sequence": None}
        chunks.append(Chunk("finish", _messages_event("message_delta", delta=delta, usage={"output_tokens": 20})))
        return [*chunks, Chunk("finish", _messages_event("message_stop"))]

    def _block(
        self, place: Place, index: int, block: dict[str, Any], kind: str, field: str, pieces: Iterable[str]
    ) -> Iterator[Chunk]:
        yield Chunk(place, _messages_event("content_block_start", index=index, content_block=block))
        for piece in pieces:
            delta = {"type": kind, field: piece}
            yield Chunk(place, _messages_event("content_block_delta", index=index, delta=delta))
        yield Chunk(place, _messages_event("content_block_stop", index=index))

    def body(self, said: Said, *, finished: bool = True) -> bytes:
        content: list[dict[str, Any]] = [{"type": "text", "text": "".join(said.texts)}] if said.texts else []
        for identity, arguments in said.calls:
            content.append({"type": "tool_use", "id": identity, "name": TOOL, "input": _loads(arguments)})
        reason = _STOP_REASONS[said.reason] if finished else None
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "model", "content": content}
        return orjson.dumps(message | {"stop_reason": reason, "usage": {"input_tokens": 100, "output_tokens": 20}})

    def read_stream(self, data: bytes) -> Read:
        notes, blocks = Notes(), list[dict[str, Any]]()
        for line in lines(data):
            notes.flaw(notes.ended or notes.failed, "something after the end")
            try:
                event = orjson.loads(line)
            except orjson.JSONDecodeError:
                notes.failed = True
                break
            self._read_event(notes, blocks, event)
        return notes.read()

    def _read_event(self, notes: Notes, blocks: list[dict[str, Any]], event: dict[str, Any]) -> None:
        kind = event["type"]
        is_open = bool(blocks) and "closed" not in blocks[-1]
        if kind == "error":
            notes.failed = True
        elif kind == "message_start":
            notes.flaw(notes.started, "a second start")
            notes.started = True
        elif kind == "content_block_start":
            notes.flaw(is_open or event["index"] != len(blocks) or notes.finish, "a block out of order")
            block = event["content_block"]
            blocks.append({"type": block["type"]})
            if block["type"] == "tool_use":
                notes.open_call(len(notes.calls), block["id"], block["name"])
        elif kind == "content_block_delta":
            notes.flaw(not is_open or event["index"] != len(blocks) - 1, "a delta of no open block")
            self._read_delta(notes, blocks[-1]["type"] if blocks else "", event["delta"])
        elif kind == "content_block_stop":
            notes.flaw(not is_open, "a second end of a block")
            blocks[-1]["closed"] = True
        elif kind == "message_delta":
            notes.flaw(is_open, "a finish within a block")
            reason = event["delta"].get("stop_reason") or ""
            notes.finish = _FINISHES.get(reason, reason)
        elif kind == "message_stop":
            notes.flaw(not notes.finish, "an end without a reason")
            notes.ended = True

    def _read_delta(self, notes: Notes, kind: str, delta: dict[str, Any]) -> None:
        if delta["type"] == "text_delta":
            notes.flaw(kind != "text", "text in another block")
            notes.texts.append(delta["text"])
        elif delta["type"] == "input_json_delta":
            notes.flaw(kind != "tool_use", "arguments in another block")
            if notes.calls:
                notes.calls[len(notes.calls) - 1].append(delta["partial_json"])

    def read_body(self, data: bytes) -> Read:
        try:
            message = orjson.loads(data)
            content = message["content"]
        except (orjson.JSONDecodeError, LookupError):
            return Read(failed=True)
        notes = Notes()
        for block in content:
            if block["type"] == "text":
                notes.texts.append(block["text"])
            elif block["type"] == "tool_use":
                notes.open_call(len(notes.calls), block["id"], block["name"])
                notes.calls[len(notes.calls) - 1].append(orjson.dumps(block["input"]).decode())
        reason = message["stop_reason"] or ""
        notes.finish, notes.ended = _FINISHES.get(reason, reason), True
        return notes.read()


# --- responses --------------------------------------------------------------------------------------------------------


class _Numbered:
    """Writes events with their numbers."""

    def __init__(self) -> None:
        self._number = -1

    def event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        data = orjson.dumps({"type": kind, "sequence_number": self._number, **fields})
        return f"event: {kind}\ndata: ".encode() + data + b"\n\n"


_RESPONSE = {"id": "resp_1", "object": "response", "created_at": 1_763_680_000, "model": "model"}
_RESPONSES_USAGE = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}


class ResponsesWire:
    """Responses."""

    name = "responses"
    error = b'event: error\ndata: {"type":"error","code":"server_error","message":"The model failed.","param":null}\n\n'
    broken = b'event: response.output_text.delta\ndata: {"type":"response.outp\n\n'
    ping = b": ping\n\n"
    odd_body = b'{"id": "1", "object": "list", "data": []}'
    tells_end = False

    def request(self, question: str, model: str, kind: Kind) -> bytes:
        body: dict[str, Any] = {"model": model, "input": [{"role": "user", "content": question}], "store": False}
        if kind in ("stream", "document"):
            body["stream"] = True
        if kind == "unstreamable":
            body["top_logprobs"] = 2
        if kind == "document":
            return orjson.dumps(
                body | {"text": {"format": {"type": "json_schema", "name": "plan", "schema": DOCUMENT}}}
            )
        return orjson.dumps(body | {"tools": [{"type": "function", "name": TOOL, "parameters": SCHEMA}]})

    def asked(self, body: bytes) -> Asked:
        request = orjson.loads(body)
        given = request["input"]
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        return asked([item for item in items if "role" in item], stream=request.get("stream") is True)

    def stream(self, said: Said) -> list[Chunk]:
        write, output = _Numbered().event, list[dict[str, Any]]()
        begun = _RESPONSE | {"status": "in_progress", "output": []}
        opening = write("response.created", response=begun) + write("response.in_progress", response=begun)
        chunks = [Chunk("opening", opening)]
        if said.texts:
            chunks += self._text(write, output, said.texts)
        for identity, arguments in said.calls:
            chunks += self._call(write, output, identity, arguments)
        last = _RESPONSE | {"status": "completed", "output": output, "usage": _RESPONSES_USAGE}
        return [*chunks, Chunk("finish", write("response.completed", response=last))]

    def _text(self, write: Any, output: list[dict[str, Any]], texts: Sequence[str]) -> Iterator[Chunk]:
        place = {"item_id": "msg_1", "output_index": len(output), "content_index": 0}
        item: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant"}
        part = {"type": "output_text", "annotations": [], "text": "".join(texts)}
        opened = item | {"status": "in_progress", "content": []}
        data = write("response.output_item.added", output_index=len(output), item=opened)
        yield Chunk("text", data + write("response.content_part.added", **place, part=part | {"text": ""}))
        for text in texts:
            yield Chunk("text", write("response.output_text.delta", **place, delta=text))
        item |= {"status": "completed", "content": [part]}
        done = write("response.output_text.done", **place, text=part["text"])
        done += write("response.content_part.done", **place, part=part)
        yield Chunk("text", done + write("response.output_item.done", output_index=len(output), item=item))
        output.append(item)

    def _call(self, write: Any, output: list[dict[str, Any]], identity: str, arguments: str) -> Iterator[Chunk]:
        place = {"item_id": f"fc_{identity}", "output_index": len(output)}
        item = {"id": f"fc_{identity}", "type": "function_call", "call_id": identity, "name": TOOL}
        opened = item | {"status": "in_progress", "arguments": ""}
        yield Chunk("call", write("response.output_item.added", output_index=len(output), item=opened))
        for half in halves(arguments):
            yield Chunk("call", write("response.function_call_arguments.delta", **place, delta=half))
        item |= {"status": "completed", "arguments": arguments}
        done = write("response.function_call_arguments.done", **place, arguments=arguments)
        yield Chunk("call", done + write("response.output_item.done", output_index=len(output), item=item))
        output.append(item)

    def body(self, said: Said, *, finished: bool = True) -> bytes:
        output: list[dict[str, Any]] = []
        if said.texts:
            list(self._text(_Numbered().event, output, said.texts))
        for identity, arguments in said.calls:
            list(self._call(_Numbered().event, output, identity, arguments))
        status = "completed" if finished else "in_progress"
        return orjson.dumps(_RESPONSE | {"status": status, "output": output, "usage": _RESPONSES_USAGE})

    def read_stream(self, data: bytes) -> Read:
        notes, items, number = Notes(), dict[int, dict[str, Any]](), -1
        for line in lines(data):
            notes.flaw(notes.ended or notes.failed, "something after the end")
            try:
                event = orjson.loads(line)
            except orjson.JSONDecodeError:
                notes.failed = True
                break
            notes.flaw(event.get("sequence_number", number) < number, "numbers that go back")
            number = event.get("sequence_number", number)
            self._read_event(notes, items, event)
        return notes.read()

    def _read_event(self, notes: Notes, items: dict[int, dict[str, Any]], event: dict[str, Any]) -> None:
        kind, index = event["type"], event.get("output_index", 0)
        if kind == "response.created":
            notes.flaw(notes.started, "a second start")
            notes.started = True
        elif kind in ("error", "response.failed"):
            notes.failed = True
        elif kind == "response.output_item.added":
            notes.flaw(index in items or not notes.started, "an item out of order")
            items[index] = event["item"] | {"said": ""}
            if event["item"]["type"] == "function_call":
                notes.open_call(len(notes.calls), event["item"]["call_id"], event["item"]["name"])
        elif kind in ("response.output_text.delta", "response.function_call_arguments.delta"):
            self._read_delta(notes, items.get(index), event)
        elif kind == "response.output_item.done":
            self._read_done(notes, items.get(index), event["item"])
        elif kind in ("response.completed", "response.incomplete"):
            response = event["response"]
            notes.flaw(any("done" not in item for item in items.values()), "an end within an item")
            notes.flaw(len(response["output"]) != len(items), "another output at the end")
            notes.finish = "length" if kind == "response.incomplete" else "tool_calls" if notes.calls else "stop"
            notes.ended = True

    def _read_delta(self, notes: Notes, item: dict[str, Any] | None, event: dict[str, Any]) -> None:
        notes.flaw(item is None or "done" in item or event["item_id"] != item["id"], "a delta of no open item")
        if item is None:
            return
        item["said"] += event["delta"]
        if event["type"] == "response.output_text.delta":
            notes.texts.append(event["delta"])
        elif notes.calls:
            notes.calls[len(notes.calls) - 1].append(event["delta"])

    def _read_done(self, notes: Notes, opened: dict[str, Any] | None, item: dict[str, Any]) -> None:
        notes.flaw(opened is None or "done" in opened, "a second end of an item")
        said = item["arguments"] if item["type"] == "function_call" else plain(item["content"])
        notes.flaw(opened is not None and opened["said"] != said, "an item that says something else at its end")
        if opened is not None:
            opened["done"] = True

    def read_body(self, data: bytes) -> Read:
        try:
            response = orjson.loads(data)
            output = response["output"]
        except (orjson.JSONDecodeError, LookupError):
            return Read(failed=True)
        notes = Notes()
        for item in output:
            if item["type"] == "message":
                notes.texts.append(plain(item["content"]))
            elif item["type"] == "function_call":
                notes.open_call(len(notes.calls), item["call_id"], item["name"])
                notes.calls[len(notes.calls) - 1].append(item["arguments"])
        finish = "tool_calls" if notes.calls else "stop"
        notes.finish, notes.ended = finish if response["status"] == "completed" else "", True
        return notes.read()


def _loads(arguments: str) -> Any:
    """Arguments as a server that parses them would give them; those that are no JSON stay a string."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments


_KNOWN: tuple[Wire, ...] = (ChatWire(), MessagesWire(), ResponsesWire())
WIRES: dict[str, Wire] = {wire.name: wire for wire in _KNOWN if wire.name in DIALECTS}
