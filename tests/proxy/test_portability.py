"""A conversation moves from vendor to vendor and back, and none of them finds anything in its history to refuse.

The vendors here check every request as the real ones do and answer 400 where a rule of theirs is broken. The client
keeps what Hermes keeps of an answer: the text, the calls, and nothing that came with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from routerd.canonical import FinishReason
from routerd.proxy.simulated import Answer, Call, Fault, Received, Turn
from tests.fakes import ScriptedUpstream
from tests.proxy.wire import RawUpstream, Talk, call_event, event, hear
from tests.rig import KEY, WEATHER, Daemon, daemon

CITY = '{"city": "Oslo"}'  # with a space, which the client's own JSON has not
SKIPPED = "skip_thought_signature_validator"  # what Google's docs give calls of other models

Message = dict[str, Any]
Rule = Callable[["Vendor", list[Message]], Iterator[str]]  # gives a complaint for each breach


# --- what vendors insist on -------------------------------------------------------------------------------------------


def calling(messages: list[Message]) -> list[Message]:
    """The turns that called tools."""
    return [message for message in messages if message["role"] == "assistant" and message.get("tool_calls")]


def calls_of(messages: list[Message]) -> list[Message]:
    return [made for message in calling(messages) for made in message["tool_calls"]]


def wants_thinking(_vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    for message in calling(messages):
        if not message.get("reasoning_content"):
            yield "The reasoning_content in the thinking mode must be passed back to the API."


def wants_no_thinking(_vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    for message in messages:
        for name in message.keys() & {"reasoning_content", "reasoning", "reasoning_details"}:
            yield f"property '{name}' is unsupported"


def wants_no_seals(_vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    for made in calls_of(messages):
        if "extra_content" in made:
            yield "Extra inputs are not permitted, field: 'extra_content'"


def wants_plain_text(_vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    for message in messages:
        if not isinstance(message.get("content"), str):
            yield "`text` is not set"


def wants_whole_arguments(_vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    for made in calls_of(messages):
        if not isinstance(json.loads(made["function"]["arguments"] or "null"), dict):
            yield "arguments must be a JSON object"


def wants_nine_characters(_vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    ids = [made["id"] for made in calls_of(messages)]
    for call_id in ids + [message["tool_call_id"] for message in messages if message["role"] == "tool"]:
        if not re.fullmatch("[a-zA-Z0-9]{9}", call_id):
            yield f"Tool call id was {call_id} but must be a-z, A-Z, 0-9, with a length of 9."


def wants_at_most_forty_characters(_vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    for made in calls_of(messages):
        if len(made["id"]) > 40:
            yield "string too long. Expected a string with maximum length 40"


def wants_its_seals(vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    """Each turn's first call is sealed: by this very model if the call is its own, else with what the docs allow."""
    for message in calling(messages):
        made = message["tool_calls"][0]
        seal = made.get("extra_content", {}).get("google", {}).get("thought_signature")
        if seal is None:
            yield "Function call is missing a thought_signature in functionCall parts."
        elif seal != vendor.seals.get(made["id"], SKIPPED):
            yield "Corrupted thought signature."


def wants_matching_results(_vendor: Vendor, messages: list[Message]) -> Iterator[str]:
    made = [call["id"] for call in calls_of(messages)]
    answered = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    if made != answered:
        yield "Not the same number of function calls and responses"


# --- vendors ----------------------------------------------------------------------------------------------------------


class Habits(NamedTuple):
    """A vendor: its preset and model, what it insists on, how it names calls, and where it puts its thinking."""

    model: str
    rules: tuple[Rule, ...]
    id: str  # ``{n}`` counts all calls it made, ``{at}`` those of the conversation
    thinking: str = ""
    field: Any = "reasoning_content"
    sealed: bool = False
    finish: FinishReason | None = None


HABITS = {
    "mimo": Habits(
        "mimo-v2.6-pro", (wants_thinking, wants_plain_text, wants_whole_arguments), "call_{n:032x}", "MiMo thinks {n}."
    ),
    "groq": Habits("gpt-oss-120b", (wants_no_thinking, wants_no_seals), "fc_{n:08d}", "Groq thinks {n}.", "reasoning"),
    "gemini": Habits(
        "gemini-3.8-flash",
        (wants_no_thinking, wants_its_seals),
        "function-call-{n:019d}",
        sealed=True,
        finish="stop",
    ),
    "mistral": Habits("mistral-large-4", (wants_no_thinking, wants_no_seals, wants_nine_characters), "D{n:08d}"),
    "moonshot": Habits("kimi-k3.1-pro", (wants_thinking,), "functions.weather:{at}", "Kimi thinks {n}."),
    "deepseek": Habits("deepseek-flash", (wants_thinking,), "call_00_{n:020d}", "DeepSeek thinks {n}."),
    "openai": Habits(
        "gpt-6.1-terra", (wants_no_thinking, wants_no_seals, wants_at_most_forty_characters), "call_{n:024d}"
    ),
    "vllm": Habits("local", (), "chatcmpl-tool-{n:032x}", "The local one thinks {n}."),
}


class Vendor:
    """An upstream with habits. ``heard``: each request's turns with calls; ``thoughts``: what led to its own calls."""

    def __init__(self, name: str) -> None:
        self.habits = HABITS[name]
        self.up = True
        self.complaints: list[str] = []
        self.heard: list[list[Message]] = []
        self.thoughts: dict[str, str] = {}
        self.seals: dict[str, str] = {}
        self.answered = 0
        self.upstream = ScriptedUpstream(self._turn)

    def _turn(self, request: Received) -> Turn:
        messages = request.body["messages"]
        self.heard.append(calling(messages))
        complaints = [said for rule in (wants_matching_results, *self.habits.rules) for said in rule(self, messages)]
        self.complaints += complaints
        if complaints:
            body = json.dumps({"error": {"code": "400", "message": "Param Incorrect", "param": complaints[0]}})
            return Turn(fault=Fault("status", status=400, body=body.encode()))
        if not self.up:
            return Turn(fault=Fault("status", status=503))
        self.answered += 1
        thinking = self.habits.thinking.format(n=self.answered)
        if request.chat.after_tools:
            return Turn(Answer(reasoning=thinking, reasoning_field=self.habits.field))
        return Turn(self._call(thinking, len(calls_of(messages))))

    def _call(self, thinking: str, at: int) -> Answer:
        habits, n = self.habits, self.answered
        call_id = habits.id.format(n=n, at=at)
        self.thoughts[call_id] = thinking
        seal = f"Seal{n:04d}+/="
        if habits.sealed:
            self.seals[call_id] = seal
        signature = json.dumps({"google": {"thought_signature": seal}}) if habits.sealed else ""
        made = Call("weather", CITY, call_id, signature)
        return Answer(text="", calls=(made,), reasoning=thinking, reasoning_field=habits.field, finish=habits.finish)


class World:
    """Vendors behind a route that prefers them in this order."""

    def __init__(self, vendors: Mapping[str, Vendor]) -> None:
        self.vendors = vendors

    @property
    def complaints(self) -> dict[str, list[str]]:
        return {name: vendor.complaints for name, vendor in self.vendors.items() if vendor.complaints}

    @property
    def thoughts(self) -> dict[str, str]:
        """Everything anybody thought, by the call it led to."""
        return {call_id: text for vendor in self.vendors.values() for call_id, text in vendor.thoughts.items()}

    def only(self, name: str) -> None:
        """From now on all but one are down."""
        for other, vendor in self.vendors.items():
            vendor.up = other == name

    def config(self, folder: Path) -> str:
        tables = "".join(self._table(name, vendor) for name, vendor in self.vendors.items())
        tiers = ", ".join(f'"{name}/{vendor.habits.model}"' for name, vendor in self.vendors.items())
        return f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "sqlite:{folder}/state.db"
[defaults]
max_attempts = 20
max_wait = "1s"
breaker = {{ failures = 1000, ratio = 1.0, min_requests = 500 }}
[routes.auto]
models = [{tiers}]
{tables}
"""

    def _table(self, name: str, vendor: Vendor) -> str:
        table = f'[providers.{name}]\nbase_url = "{vendor.upstream.base_url}"\ndialect = "chat"\napi_key = "{KEY}"\n'
        return table + (
            f'[providers.{name}.models]\n"{vendor.habits.model}" = {{ context = 131072 }}\n' * (name == "vllm")
        )


@asynccontextmanager
async def world(*names: str) -> Any:
    async with AsyncExitStack() as stack:
        vendors = {name: Vendor(name) for name in names}
        for vendor in vendors.values():
            await stack.enter_async_context(vendor.upstream)
        yield World(vendors)


# --- the client -------------------------------------------------------------------------------------------------------


class Client:
    """Hermes in little: it streams, and of an answer it keeps the text and the calls, their arguments written anew."""

    def __init__(self, name: str = "") -> None:
        self.messages: list[Message] = [{"role": "system", "content": f"You are {name or 'careful'}."}]

    async def ask(self, url: str, **message: Any) -> Message:
        """Say something, and return the answer as it is kept."""
        self.messages.append(message)
        request = {"model": "auto", "messages": self.messages, "tools": [WEATHER], "max_tokens": 65536, "stream": True}
        heard = await hear(url, request | {"stream_options": {"include_usage": True}})
        assert (heard.status, heard.torn) == (200, False), heard.data
        assert heard.finishes in (["stop"], ["tool_calls"])
        answer = kept(heard.deltas, heard.text)
        self.messages.append(answer)
        return answer

    async def turn(self, served: Daemon, between: Callable[[], None] = lambda: None) -> None:
        """A question, the call it leads to, the call's result, and the closing words."""
        answer = await self.ask(served.url, role="user", content="And now?")
        (made,) = answer["tool_calls"]
        between()
        closing = await self.ask(served.url, role="tool", name="weather", tool_call_id=made["id"], content="Rain.")
        assert closing["content"]
        assert "tool_calls" not in closing


def kept(deltas: list[Message], text: str) -> Message:
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls") or ()]
    answer: Message = {"role": "assistant", "content": text or None}
    for piece in pieces:
        if piece.get("id"):
            function = {"name": piece["function"]["name"], "arguments": ""}
            answer.setdefault("tool_calls", []).append({"id": piece["id"], "type": "function", "function": function})
        answer["tool_calls"][-1]["function"]["arguments"] += piece["function"].get("arguments") or ""
    for made in answer.get("tool_calls", ()):
        made["function"]["arguments"] = json.dumps(json.loads(made["function"]["arguments"]), separators=(",", ":"))
    return answer


# --- moving about -----------------------------------------------------------------------------------------------------

TOURS = {
    "there and back": ("mimo", "groq", "mimo", "gemini", "mimo", "mistral") * 2,
    "all of them": ("mimo", "groq", "gemini", "mistral", "moonshot", "deepseek", "vllm", "openai") * 2,
}


@pytest.mark.parametrize("mid_turn", [False, True], ids=["between turns", "with every request"])
@pytest.mark.parametrize("tour", TOURS.values(), ids=TOURS)
async def test_no_vendor_finds_anything_to_refuse(tour: tuple[str, ...], mid_turn: bool, tmp_path: Path) -> None:
    """Whoever goes down and whoever takes over: no turn is lost, and no upstream ever has cause for a 400."""
    async with world(*dict.fromkeys(tour)) as vendors, daemon(vendors.config(tmp_path), tmp_path) as served:
        client = Client()
        for now, after in zip(tour, tour[1:] + tour[:1], strict=True):
            vendors.only(now)
            await client.turn(served, partial(vendors.only, after if mid_turn else now))

        assert vendors.complaints == {}
        assert [line["outcome"] for line in served.exchanges] == ["success"] * (2 * len(tour))
        assert all(vendor.answered for vendor in vendors.vendors.values())


async def test_thinking_comes_back_after_a_restart(tmp_path: Path) -> None:
    """The daemon is restarted in the middle; still, whoever demands thinking gets all there ever was, word for word."""
    async with world("mimo", "groq", "gemini") as vendors:
        client = Client()
        for part in (("mimo", "groq", "gemini", "mimo"), ("groq", "gemini", "mimo")):
            async with daemon(vendors.config(tmp_path), tmp_path) as served:
                for name in part:
                    vendors.only(name)
                    await client.turn(served)
        last = vendors.vendors["mimo"].heard[-1]
        made = [turn["tool_calls"][0]["id"] for turn in last]

        assert vendors.complaints == {}
        assert len(made) == 7
        assert [turn["reasoning_content"] for turn in last] == [vendors.thoughts[call_id] or " " for call_id in made]


async def test_history_grows_only_at_its_end(tmp_path: Path) -> None:
    """What a vendor is sent of earlier turns never changes, so its prompt cache holds through all of it."""
    async with (
        world("mimo", "groq", "gemini", "mistral") as vendors,
        daemon(vendors.config(tmp_path), tmp_path) as served,
    ):
        client = Client()
        for name in ("mimo", "gemini", "groq", "mistral", "gemini", "mimo"):
            vendors.only(name)
            await client.turn(served)

        for vendor in vendors.vendors.values():
            for before, after in zip(vendor.heard, vendor.heard[1:], strict=False):
                assert before == after[: len(before)]


async def test_conversations_do_not_mix(tmp_path: Path) -> None:
    """A vendor that counts its calls gives two agents the same ids; neither is sent what the other's model thought."""
    async with world("mimo", "moonshot") as vendors, daemon(vendors.config(tmp_path), tmp_path) as served:
        clients = Client("Ann"), Client("Bob")
        vendors.only("moonshot")
        for client in clients:
            await client.turn(served)
        vendors.only("mimo")
        for client in clients:
            await client.turn(served)
        sent = [turns[0]["reasoning_content"] for turns in vendors.vendors["mimo"].heard if turns]

        assert {"functions.weather:0"} == set(vendors.vendors["moonshot"].thoughts)
        assert sent == ["Kimi thinks 1.", "Kimi thinks 3."] + ["Kimi thinks 1."] * 2 + ["Kimi thinks 3."] * 2
        assert vendors.complaints == {}


async def test_messages_keep_their_bytes(tmp_path: Path) -> None:
    """Where nothing has to be done the upstream gets the messages as the client wrote them, spaces and all."""
    messages = b'[ {"role":"user", "content":"\\u00e9 1.0"} ,{"content":"ok","role":"assistant"}, {"role":"user"}]'
    async with world("vllm") as vendors, daemon(vendors.config(tmp_path), tmp_path) as served:
        heard = await hear(served.url, b'{"model":"auto","messages":' + messages + b"}")

        assert heard.status == 200
        assert messages in vendors.vendors["vllm"].upstream.requests[0].raw


PIECES = (
    {"type": "reasoning.text", "text": "Look ", "format": "anthropic-claude-v1", "index": 0},
    {"type": "reasoning.text", "text": "first.", "format": "anthropic-claude-v1", "index": 0},
    {"type": "reasoning.text", "signature": "EqQ+/=", "format": "anthropic-claude-v1", "index": 0},
)
JOINED = [PIECES[0] | {"text": "Look first.", "signature": "EqQ+/="}]


@pytest.mark.parametrize("stream", [True, False])
async def test_sealed_thinking_goes_back_to_the_model_that_sealed_it(stream: bool, tmp_path: Path) -> None:
    """An aggregator's sealed thinking is put back whole for the same model, and for no other."""

    async def play(talk: Talk) -> None:
        pieces = [event({"content": "", "reasoning_details": [piece]}) for piece in PIECES]
        await talk.stream([*pieces, call_event(0, CITY, name="weather", id="toolu_1"), event({}, "tool_calls")])

    def turns(talks: list[Talk]) -> list[Message]:
        return [calling(talk.body["messages"])[0] for talk in talks if calling(talk.body["messages"])]

    async with RawUpstream(play) as aggregator:
        text = f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "memory:"
[providers.openrouter]
base_url = "{aggregator.base_url}"
dialect = "chat"
api_key = "{KEY}"
"""
        async with daemon(text, tmp_path) as served:
            asked = [{"role": "user", "content": "And now?"}]
            request = {"tools": [WEATHER], "messages": asked, "stream": stream}
            heard = await hear(served.url, request | {"model": "openrouter/claude-sonnet-5-5"})
            answer = kept(heard.deltas, "") if stream else heard.json["choices"][0]["message"]
            if not stream:
                assert answer.pop("reasoning_details") == JOINED
            history = [*asked, answer, {"role": "tool", "tool_call_id": "toolu_1", "content": "Rain."}]
            for model in ("claude-sonnet-5-5", "claude-opus-5"):
                await hear(served.url, request | {"model": f"openrouter/{model}", "messages": history})
        own, other = turns(aggregator.talks)

        assert own["reasoning_details"] == JOINED
        assert "reasoning_details" not in other
