"""The simulated server says on the wire exactly what its script says, faults included."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import uvloop

from routerd.canonical import Usage
from routerd.proxy.exchange import TIMER_SLACK_S
from routerd.proxy.scripts import (
    FAULTS,
    PLACED_KINDS,
    PLACES,
    TEXT,
    Answer,
    Call,
    Fault,
    Place,
    PlacedKind,
    Script,
    Step,
    Turn,
    example,
    turn_for,
)
from routerd.proxy.simulated import SimulatedServer
from routerd.proxy.strikes import COMMENT, LAST_CHUNK

SILENCE_S = 0.03  # long enough to call a loopback connection silent; only a server that is not can fail by it

TERMINAL = {
    "type": "function",
    "function": {
        "name": "terminal",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
RICH = Answer(
    reasoning="I think about it for a while.",
    text="Let me look at the files.",
    calls=(Call("terminal", '{"command": "ls -la /"}', "call_a"), Call("terminal", '{"command": "pwd"}', "call_b")),
)


class Wire(NamedTuple):
    """What a raw client has seen: the bytes, and how they ended (``eof``, ``reset`` or ``silence``)."""

    data: bytes
    end: str

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1])

    @property
    def head(self) -> str:
        return self.data.partition(b"\r\n\r\n")[0].decode().lower()

    @property
    def body(self) -> bytes:
        body = self.data.partition(b"\r\n\r\n")[2]
        return dechunked(body) if "transfer-encoding: chunked" in self.head else body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def payloads(self) -> list[bytes]:
        """The data of the events that are whole."""
        frames = self.body.split(b"\n\n")[:-1]
        return [frame.removeprefix(b"data: ") for frame in frames if frame.startswith(b"data: ")]

    @property
    def done(self) -> bool:
        return self.payloads[-1:] == [b"[DONE]"] and self.data.endswith(LAST_CHUNK)


class Told(NamedTuple):
    """What the events of a stream add up to."""

    reasoning: str
    text: str
    arguments: list[str]
    finish: str | None


def dechunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return body


def told(wire: Wire) -> Told:
    reasoning, text, finish = "", "", None
    arguments: dict[int, str] = {}
    for payload in wire.payloads:
        if payload == b"[DONE]" or not payload.endswith(b"}"):
            continue
        for choice in json.loads(payload)["choices"]:
            delta, finish = choice["delta"], choice["finish_reason"]
            reasoning += delta.get("reasoning_content") or ""
            text += delta.get("content") or ""
            for piece in delta.get("tool_calls", ()):
                arguments[piece["index"]] = arguments.get(piece["index"], "") + piece["function"]["arguments"]
    return Told(reasoning, text, list(arguments.values()), finish)


def request_bytes(path: str = "/v1/chat/completions", headers: str = "connection: close", **body: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True} | body
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


@asynccontextmanager
async def served(*steps: Step, **options: Any) -> AsyncIterator[SimulatedServer]:
    server = SimulatedServer(Script(*steps), **options)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def connected(server: SimulatedServer) -> AsyncIterator[socket.socket]:
    port = int(server.base_url.rpartition(":")[2].removesuffix("/v1"))
    with socket.socket() as client:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        yield client


async def received(
    client: socket.socket, until: Callable[[bytes], bool] = lambda _: False, silence_s: float = 5
) -> Wire:
    """Read until the connection ends, falls silent, or the bytes so far are enough."""
    data = b""
    loop = asyncio.get_running_loop()
    try:
        while not until(data):
            if not (more := await asyncio.wait_for(loop.sock_recv(client, 65536), silence_s)):
                return Wire(data, "eof")
            data += more
    except ConnectionResetError:
        return Wire(data, "reset")
    except TimeoutError:
        return Wire(data, "silence")
    return Wire(data, "enough")


async def asked(server: SimulatedServer, raw: bytes | None = None, silence_s: float = 5, **body: Any) -> Wire:
    """What one raw request on a connection of its own brings back."""
    async with connected(server) as client:
        await asyncio.get_running_loop().sock_sendall(client, raw or request_bytes(**body))
        return await received(client, silence_s=silence_s)


async def played(turn: Turn, silence_s: float = 5, **body: Any) -> Wire:
    async with served(turn) as server:
        return await asked(server, silence_s=silence_s, **body)


# --- health ---------------------------------------------------------------------------------------------------------


async def test_a_text_answer_is_streamed_in_pieces_and_says_that_it_is_simulated() -> None:
    """Without tools the answer is a text in several events, ended by a finish reason and [DONE]."""
    wire = await played(Turn())

    assert wire.status == 200
    assert wire.done
    assert Told("", TEXT, [], "stop") == told(wire)
    assert len(wire.payloads) > 5


async def test_the_answers_model_is_marked_as_simulated_once() -> None:
    """The suffix is appended to the model's name unless it is there already."""
    first = await played(Turn(), stream=False, model="big")
    again = await played(Turn(), stream=False, model="big-simulated")

    assert first.json["model"] == "big-simulated"
    assert again.json["model"] == "big-simulated"


async def test_an_answer_that_is_not_streamed_is_one_json_body() -> None:
    """Text, finish reason and usage stand in one chat completion."""
    wire = await played(Turn(), stream=False)

    assert "content-type: application/json" in wire.head
    assert wire.json["choices"][0]["message"] == {"role": "assistant", "content": TEXT}
    assert wire.json["usage"]["total_tokens"] > wire.json["usage"]["completion_tokens"] > 0


async def test_an_offered_tool_is_called_with_arguments_its_schema_accepts() -> None:
    """When tools are offered the answer is a short text and a call of the first one."""
    wire = await played(Turn(), tools=[TERMINAL])

    assert told(wire).finish == "tool_calls"
    assert "simulated" in told(wire).text
    assert told(wire).arguments == ['{"command":"simulated"}']


@pytest.mark.parametrize(
    ("choice", "names"),
    [("none", []), ("required", ["terminal"]), ({"type": "function", "function": {"name": "other"}}, ["other"])],
)
async def test_tool_choice_is_obeyed(choice: Any, names: list[str]) -> None:
    """A client may forbid calls, demand one, or demand one by name."""
    other = {"type": "function", "function": {"name": "other"}}
    wire = await played(Turn(), stream=False, tools=[TERMINAL, other], tool_choice=choice)

    assert names == [made["function"]["name"] for made in wire.json["choices"][0]["message"].get("tool_calls", ())]


async def test_after_a_tools_result_the_answer_is_a_final_text() -> None:
    """A conversation that ends with a tool's result gets no further call."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "tool", "tool_call_id": "call_a", "content": "ok"}]
    wire = await played(Turn(RICH), tools=[TERMINAL], messages=messages)

    assert told(wire).finish == "stop"
    assert "the tool has answered" in told(wire).text


async def test_a_script_may_ask_for_parallel_calls() -> None:
    """``parallel`` calls are made at once, each with an id of its own."""
    wire = await played(Turn(Answer(parallel=3)), stream=False, tools=[TERMINAL])

    assert len({made["id"] for made in wire.json["choices"][0]["message"]["tool_calls"]}) == 3


async def test_usage_is_streamed_only_when_asked_for() -> None:
    """The usage event has no choices and comes between the finish and [DONE]."""
    usage = Usage(input_tokens=100, cached_tokens=60, output_tokens=20, reasoning_tokens=5, cost_usd=0.5)
    silent = await played(Turn(Answer(usage=usage)))
    asked_for = await played(Turn(Answer(usage=usage)), stream_options={"include_usage": True})

    last = json.loads(asked_for.payloads[-2])
    assert b"usage" not in silent.data
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "prompt_tokens_details": {"cached_tokens": 60},
        "completion_tokens_details": {"reasoning_tokens": 5},
        "cost": 0.5,
    }


async def test_an_answer_carries_the_headers_and_comments_of_its_script() -> None:
    """Rate-limit headers and keep-alive comments are part of a healthy answer."""
    wire = await played(Turn(Answer(headers=(("x-ratelimit-remaining-requests", "7"),), comments=True)))

    assert "x-ratelimit-remaining-requests: 7" in wire.head
    assert wire.done
    assert wire.body.count(COMMENT) == len(wire.payloads)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "enum": ["b", "a"]}, "b"),
        ({"type": "string", "minLength": 12}, "simulated---"),
        ({"type": ["null", "integer"], "minimum": 5}, 5),
        ({"type": "number", "exclusiveMaximum": 1}, 0),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [False, False]),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"const": 3}}}, 3),
        ({"properties": {"a": {"default": 1}, "b": {}}, "required": ["a"]}, {"a": 1}),
    ],
)
def test_an_example_satisfies_its_schema(schema: dict[str, Any], value: Any) -> None:
    """Arguments are the simplest value by the schema's type, with the required properties only."""
    assert value == example(schema)


def test_an_example_of_a_recursive_schema_ends() -> None:
    """A schema that requires itself is followed to a bounded depth."""
    schema = {"properties": {"next": {"$ref": "#"}}, "required": ["next"]}

    assert "simulated" in json.dumps(example(schema))


# --- HTTP -----------------------------------------------------------------------------------------------------------


async def test_a_connection_serves_several_requests() -> None:
    """Connections are kept alive, after streams too."""
    async with served() as server, connected(server) as client:
        for _ in range(2):
            await asyncio.get_running_loop().sock_sendall(client, request_bytes(headers="accept: */*"))
            wire = await received(client, lambda data: data.endswith(LAST_CHUNK))
            assert wire.done
        assert (server.requests, server.open_connections) == (2, 1)


async def test_a_chunked_request_body_is_understood() -> None:
    """Clients may send their body in chunks, with extensions and trailers."""
    raw = b'{"messages":[],"model":"m"}'
    chunks = b"5;x=y\r\n" + raw[:5] + b"\r\n%x\r\n" % len(raw[5:]) + raw[5:] + b"\r\n0\r\ntrailer: 1\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    async with served() as server:
        assert (await asked(server, head + chunks)).status == 200


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /v1/models HTTP/1.1\r\nconnection: close\r\n\r\n", 200),
        (b"GET /v1/models/simulated?x=1 HTTP/1.1\r\nconnection: close\r\n\r\n", 200),
        (b"GET /v1/models/other HTTP/1.1\r\nconnection: close\r\n\r\n", 404),
        (b"GET /api/tags HTTP/1.1\r\nconnection: close\r\n\r\n", 404),
        (b"nonsense\r\n\r\n", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: many\r\n\r\n", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 2\r\nconnection: close\r\n\r\n[]", 400),
        (b"POST / HTTP/1.1\r\nx: " + b"x" * 70_000 + b"\r\n\r\n", 400),
    ],
)
async def test_other_requests_are_answered_plainly(raw: bytes, status: int) -> None:
    """Models are listed, what is not HTTP or too large is refused, and none of it plays a turn."""
    async with served(Turn(fault=Fault("reset"))) as server:
        assert status == (await asked(server, raw)).status
        assert server.requests == 0


async def test_models_carry_a_context_length() -> None:
    """Agents read the window from the model's card."""
    async with served(models=("a", "b")) as server:
        wire = await asked(server, b"GET /v1/models HTTP/1.1\r\nconnection: close\r\n\r\n")

    assert [(card["id"], card["context_length"]) for card in wire.json["data"]] == [("a", 131072), ("b", 131072)]


# --- scripts --------------------------------------------------------------------------------------------------------


async def test_turns_are_played_in_order_and_the_last_repeats() -> None:
    """Each chat request plays the next turn."""
    async with served(turn_for("503"), turn_for("429"), Turn()) as server:
        assert [(await asked(server)).status for _ in range(4)] == [503, 429, 200, 200]


async def test_a_step_may_be_a_function_of_the_request() -> None:
    """What it returns is the turn of that request."""
    async with served(lambda request: turn_for("ok" if request.headers["x-lucky"] == "yes" else "500")) as server:
        statuses = [
            (await asked(server, request_bytes(headers=f"connection: close\r\nx-lucky: {luck}"))).status
            for luck in ("no", "yes")
        ]

    assert statuses == [500, 200]


@pytest.mark.parametrize("name", ["nonsense", "503:mid_text", "stall:nowhere", ""])
def test_a_faults_name_must_exist(name: str) -> None:
    """A config's typing error is an error that lists the names there are."""
    with pytest.raises(ValueError, match="bad_arguments"):
        turn_for(name)


def test_a_faults_name_may_carry_its_place() -> None:
    """A colon and a place move a fault that has one."""
    assert Fault("stall", "mid_call") == turn_for("stall:mid_call").fault
    assert set(PLACED_KINDS) <= set(FAULTS)


# --- faults at a place ----------------------------------------------------------------------------------------------


def cut(part: str, full: str) -> bool:
    return 0 < len(part) < len(full) and full.startswith(part)


REASONING, SAID, (FIRST, SECOND) = RICH.reasoning, RICH.text or "", (made.arguments for made in RICH.calls or ())
REACHED: dict[Place, Callable[[Told], bool]] = {
    "before_headers": lambda told: told[:3] == ("", "", []),
    "before_content": lambda told: told[:3] == ("", "", []),
    "in_reasoning": lambda told: cut(told.reasoning, REASONING) and told[1:3] == ("", []),
    "mid_text": lambda told: told.reasoning == REASONING and cut(told.text, SAID) and told.arguments == [],
    "mid_call": lambda told: told.text == SAID and len(told.arguments) == 1 and cut(told.arguments[0], FIRST),
    "between_calls": lambda told: told.arguments == [FIRST],
    "before_finish": lambda told: told.arguments == [FIRST, SECOND],
}
IN_STREAM: dict[PlacedKind, Callable[[Wire], bool]] = {
    "stall": lambda wire: wire.end == "silence" and not wire.data.endswith(LAST_CHUNK),
    "pause": lambda wire: wire.done,
    "reset": lambda wire: wire.end == "reset" and not wire.data.endswith(LAST_CHUNK),
    "tear": lambda wire: wire.end == "eof" and not wire.data.endswith(b"\r\n"),
    "eof": lambda wire: wire.end == "eof" and wire.data.endswith(LAST_CHUNK) and not wire.done,
    "error": lambda wire: json.loads(wire.payloads[-1])["error"]["code"] == 502 and wire.data.endswith(LAST_CHUNK),
    "malformed": lambda wire: wire.done and sum(not payload.endswith((b"}", b"]")) for payload in wire.payloads) == 1,
}
BEFORE_HEADERS: dict[PlacedKind, Callable[[Wire], bool]] = {
    "stall": lambda wire: wire == Wire(b"", "silence"),
    "pause": lambda wire: wire.done,
    "reset": lambda wire: wire == Wire(b"", "reset"),
    "tear": lambda wire: wire == Wire(b"HTTP/1.1 200 OK\r\ncontent-ty", "eof"),
    "eof": lambda wire: wire == Wire(b"", "eof"),
    "error": lambda wire: wire.status == 500,
    "malformed": lambda wire: wire.end == "eof" and not wire.data.startswith(b"HTTP"),
}
IN_BODY: dict[PlacedKind, Callable[[Wire], bool]] = {
    "stall": lambda wire: wire.end == "silence" and missing(wire) > 0,
    "pause": lambda wire: wire.end == "eof" and "choices" in wire.json,
    "reset": lambda wire: wire.end == "reset" and missing(wire) > 0,
    "tear": lambda wire: wire.end == "eof" and missing(wire) > 0,
    "eof": lambda wire: wire.end == "eof" and "content-length" not in wire.head and not whole_json(wire.body),
    "error": lambda wire: wire.status == 200 and wire.json["error"]["code"] == "error",
    "malformed": lambda wire: missing(wire) == 0 and not whole_json(wire.body),
}


def missing(wire: Wire) -> int:
    """Bytes that the length in the head promised and that have not come."""
    return int(wire.head.partition("content-length: ")[2].split()[0]) - len(wire.body)


def whole_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def placed(kind: PlacedKind, place: Place) -> tuple[Turn, float]:
    """The turn of such a fault, and how long a silence is its last word."""
    return Turn(RICH, Fault(kind, place, seconds=0.01)), SILENCE_S if kind == "stall" else 5.0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", PLACED_KINDS)
async def test_a_fault_strikes_a_stream_at_its_place(kind: PlacedKind, place: Place) -> None:
    """Of any kind and at any place, exactly this happens on the wire, after exactly what comes before that place."""
    turn, silence_s = placed(kind, place)
    wire = await played(turn, silence_s)

    expected = BEFORE_HEADERS if place == "before_headers" else IN_STREAM
    assert expected[kind](wire), wire
    if kind not in ("pause", "malformed") and place != "before_headers":
        assert REACHED[place](told(wire)), told(wire)


@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("kind", PLACED_KINDS)
async def test_a_fault_strikes_a_whole_answer_too(kind: PlacedKind, place: Place) -> None:
    """For a request that does not stream, places are fractions of the JSON body."""
    turn, silence_s = placed(kind, place)
    wire = await played(turn, silence_s, stream=False)

    assert IN_BODY[kind](wire), wire


async def test_a_place_the_answer_lacks_falls_through_to_the_next() -> None:
    """A fault between calls strikes before the finish of an answer that only talks."""
    wire = await played(Turn(fault=Fault("eof", "between_calls")))

    assert told(wire).text == TEXT
    assert not wire.done


async def test_a_model_says_what_a_faults_place_needs() -> None:
    """Left to itself the model reasons, or calls twice, where a fault would otherwise miss its place."""
    reasoned = await played(Turn(fault=Fault("pause", "in_reasoning")))
    called = await played(Turn(fault=Fault("pause", "between_calls")), tools=[TERMINAL])

    assert "pretends" in told(reasoned).reasoning
    assert len(told(called).arguments) == 2


async def test_a_pause_goes_on_after_its_time() -> None:
    """Nothing comes for so many seconds, then the rest does."""
    started = time.monotonic()
    wire = await played(Turn(fault=Fault("pause", "mid_text", seconds=0.1)))

    assert wire.done
    assert told(wire).text == TEXT
    assert time.monotonic() - started >= 0.1 - TIMER_SLACK_S


@pytest.mark.parametrize("kind", ["stall", "pause"])
async def test_silence_may_be_filled_with_comments(kind: PlacedKind) -> None:
    """Comments keep the connection alive and say nothing."""
    turn = Turn(fault=Fault(kind, "before_content", seconds=0.1, comment_s=0.02))
    async with served(turn) as server, connected(server) as client:
        await asyncio.get_running_loop().sock_sendall(client, request_bytes())
        wire = await received(client, lambda data: data.count(COMMENT) >= 2)

    assert told(wire).text == ""


async def test_an_error_event_carries_the_scripts_code() -> None:
    """The vendor's code inside a 200 decides what a router learns."""
    wire = await played(Turn(fault=Fault("error", "before_content", status=429)))

    assert json.loads(wire.payloads[-1])["error"]["code"] == 429


def test_a_reset_is_a_reset_on_uvloop_too() -> None:
    """The loop the product runs on closes with a RST as well, after all bytes that came before."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        wire = runner.run(played(Turn(RICH, Fault("reset", "mid_text"))))

    assert IN_STREAM["reset"](wire)
    assert REACHED["mid_text"](told(wire))


# --- faults of a whole answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["400", "401", "402", "403", "404", "413", "429", "500", "503", "529"])
async def test_a_status_is_a_short_json_error(name: str) -> None:
    """Statuses come with an error object, and 429 with a Retry-After."""
    wire = await played(turn_for(name))

    assert int(name) == wire.status
    assert {"message", "type", "code"} == set(wire.json["error"])
    assert ("retry-after: 1" in wire.head) == (name == "429")


async def test_a_status_may_carry_any_headers_and_body() -> None:
    """A script can imitate any vendor's error."""
    fault = Fault("status", status=402, headers=(("retry-after", "30"),), body=b"[]")
    wire = await played(Turn(fault=fault))

    assert (wire.status, wire.body) == (402, b"[]")
    assert "retry-after: 30" in wire.head


def arguments_of(wire: Wire) -> str:
    (arguments,) = told(wire).arguments
    return arguments


SPOILED: dict[str, Callable[[Wire], bool]] = {
    "ok": lambda wire: wire.done and json.loads(arguments_of(wire)) == {"command": "simulated"},
    "hang": lambda wire: wire == Wire(b"", "silence"),
    "stall": lambda wire: wire.end == "silence" and wire.status == 200,
    "reset": lambda wire: wire.end == "reset",
    "eof": lambda wire: wire.data.endswith(LAST_CHUNK) and not wire.done,
    "error": lambda wire: b'"error"' in wire.data and not wire.done,
    "html": lambda wire: "text/html" in wire.head and wire.body.startswith(b"<!DOCTYPE html>"),
    "json": lambda wire: "application/json" in wire.head and "error" in wire.json,
    "json_body": lambda wire: wire.json["choices"][0]["finish_reason"] == "tool_calls",
    "empty": lambda wire: "text/event-stream" in wire.head and wire.body == b"" and wire.data.endswith(LAST_CHUNK),
    "empty_content": lambda wire: wire.done and told(wire) == Told("", "", [], "stop"),
    "length": lambda wire: told(wire).finish == "length" and not whole_json(arguments_of(wire).encode()),
    "bad_arguments": lambda wire: told(wire).finish == "tool_calls" and '"extra"' in arguments_of(wire),
    "cut_arguments": lambda wire: (
        told(wire).finish == "tool_calls" and cut(arguments_of(wire), '{"command":"simulated"}')
    ),
}


@pytest.mark.parametrize("name", SPOILED)
async def test_a_named_fault_really_happens(name: str) -> None:
    """The names a config may use stand for what they say."""
    wire = await played(turn_for(name), SILENCE_S if name in ("hang", "stall") else 5, tools=[TERMINAL])

    assert SPOILED[name](wire), wire


@pytest.mark.parametrize("name", ["bad_arguments", "cut_arguments"])
async def test_spoiled_arguments_never_parse(name: str) -> None:
    """Broken arguments are broken for any tool, whether streamed or not."""
    wire = await played(turn_for(name), stream=False, tools=[{"function": {"name": "no_parameters"}}])
    (made,) = wire.json["choices"][0]["message"]["tool_calls"]

    assert not whole_json(made["function"]["arguments"].encode())


async def test_the_output_limit_cuts_a_text() -> None:
    """Without a call, the text stops in the middle and the finish reason is ``length``."""
    wire = await played(turn_for("length"))

    assert told(wire).finish == "length"
    assert cut(told(wire).text, TEXT)


# --- refusing -------------------------------------------------------------------------------------------------------


async def test_a_script_may_begin_with_a_closed_port() -> None:
    """Connecting is refused from the start, and for good."""
    async with served(turn_for("refuse")) as server:
        with pytest.raises(ConnectionRefusedError):
            await asked(server)


async def test_a_port_closes_after_the_turn_before() -> None:
    """The answer that is under way says ``connection: close``; idle connections are closed and new ones refused."""
    async with served(Turn(), turn_for("refuse")) as server, connected(server) as idle:
        wire = await asked(server, request_bytes(headers="accept: */*"))

        assert wire.done
        assert "connection: close" in wire.head
        assert Wire(b"", "eof") == await received(idle)
        with pytest.raises(ConnectionRefusedError):
            await asked(server)


async def test_a_closed_port_opens_again_after_its_time() -> None:
    """The same port serves the next turn."""
    changed = asyncio.Event()
    async with served(Turn(fault=Fault("refuse", seconds=0.05)), Turn(), on_change=changed.set) as server:
        with pytest.raises(ConnectionRefusedError):
            await asked(server)
        while server.refusing:
            changed.clear()
            await asyncio.wait_for(changed.wait(), 5)
        assert (await asked(server)).done


# --- leaving --------------------------------------------------------------------------------------------------------


async def answering_is(server: SimulatedServer, count: int, changed: asyncio.Event) -> None:
    while server.answering != count:
        changed.clear()
        await asyncio.wait_for(changed.wait(), 5)


@pytest.mark.parametrize("linger", [None, struct.pack("ii", 1, 0)], ids=["fin", "rst"])
@pytest.mark.parametrize("place", ["before_headers", "mid_text"])
async def test_a_client_that_leaves_frees_the_server(place: Place, linger: bytes | None) -> None:
    """Whether it closes or resets its connection, its stalled answer ends at once."""
    changed = asyncio.Event()
    async with served(Turn(fault=Fault("stall", place)), on_change=changed.set) as server:
        async with connected(server) as client:
            await asyncio.get_running_loop().sock_sendall(client, request_bytes())
            await answering_is(server, 1, changed)
            if linger:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await answering_is(server, 0, changed)


async def test_closing_the_server_ends_what_hangs() -> None:
    """No task and no connection outlives ``close``."""
    changed = asyncio.Event()
    async with served(turn_for("hang"), on_change=changed.set) as server, connected(server) as client:
        await asyncio.get_running_loop().sock_sendall(client, request_bytes())
        await answering_is(server, 1, changed)
        await server.close()

        assert (server.answering, server.open_connections) == (0, 0)
        assert (await received(client)).end == "eof"
        assert len(asyncio.all_tasks()) == 1


async def test_a_reader_that_stops_stops_the_server() -> None:
    """What the kernel does not take is not piled up in memory: the answer waits."""
    changed = asyncio.Event()
    endless = Turn(Answer(text="x" * 16_000_000, piece=1_000_000))
    async with served(endless, on_change=changed.set) as server, connected(server) as client:
        await asyncio.get_running_loop().sock_sendall(client, request_bytes())
        await answering_is(server, 1, changed)
        await asyncio.sleep(SILENCE_S)

        assert server.answering == 1


@pytest.mark.parametrize(
    ("step", "error"),
    [(lambda request: turn_for(request.headers["x-missing"]), KeyError), (lambda _: turn_for("refuse"), ValueError)],
)
async def test_a_failing_step_is_reported_and_hangs_nobody(step: Step, error: type[Exception]) -> None:
    """A script's own mistake closes the connection and reaches the loop's exception handler."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
    async with served(step) as server:
        assert await asked(server) == Wire(b"", "eof")

    assert [type(context["exception"]) for context in reported] == [error]
