"""The real SDKs against the daemon: one vendor's over either kind of upstream, and the other's over the first's kind.

What each test states about a client is what its SDK makes of the bytes, not what we think of them.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from routerd.proxy.simulated import Answer, Fault, Turn
from tests.fakes import Upstreams, call
from tests.messages_fake import MESSAGES, SIGNATURE, MessagesUpstream, Said, agent, mixed_config
from tests.proxy.wire import Heard, hear
from tests.responses_fake import SEAL
from tests.rig import KEY, MODEL, Daemon, daemon
from tests.tongues import KINDS, Kind, rest_of, speaking

TEXT = "Seven plus five is twelve, as everybody knows."
THINKING = "Seven and five."
ARGUMENTS = '{"city": "Köln", "days": 3}'
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
QUICK = 'first_token_timeout = "400ms"\nstall_timeout = "400ms"\nmax_wait = "0s"\nkeepalive = "100ms"\n'
ASK: Any = {"model": "auto", "max_tokens": 1024, "messages": [{"role": "user", "content": "Seven plus five?"}]}

every_kind = pytest.mark.parametrize("kind", KINDS)


@asynccontextmanager
async def served(tmp_path: Path, kind: Kind, said: Said, *, defaults: str = "") -> AsyncIterator[Daemon]:
    async with speaking(kind, said) as upstream:
        text = mixed_config({"one": (kind, upstream.base_url)}, defaults=defaults)
        async with daemon(text, tmp_path) as running:
            yield running


@asynccontextmanager
async def served_by(tmp_path: Path, *upstreams: MessagesUpstream, more: str = "") -> AsyncIterator[Daemon]:
    """A daemon over Messages upstreams, in this order, with little patience."""
    names = {f"p{place}": ("messages", upstream.base_url) for place, upstream in enumerate(upstreams)}
    async with daemon(mixed_config(names, defaults=QUICK, more=more), tmp_path) as running:
        yield running


def sdk(running: Daemon) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(api_key="local", base_url=running.url, max_retries=0)


def openai_sdk(running: Daemon) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="local", base_url=f"{running.url}/v1", max_retries=0)


async def ask(running: Daemon, **fields: Any) -> Any:
    """What the SDK's streaming helper makes of an answer."""
    async with sdk(running) as client, client.messages.stream(**ASK | fields) as stream:
        return await stream.get_final_message()


async def hear_messages(running: Daemon, **fields: Any) -> Heard:
    return await hear(running.url, ASK | {"stream": True} | fields, path=MESSAGES)


# --- Anthropic's SDK --------------------------------------------------------------------------------------------------


@every_kind
async def test_streamed_text(kind: Kind, tmp_path: Path) -> None:
    """Text, the reason of the end, and usage arrive whole through the streaming helper."""
    async with served(tmp_path, kind, Said(text=TEXT)) as running:
        message = await ask(running)

    assert [block.text for block in message.content] == [TEXT]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    assert message.usage.input_tokens > 0


@every_kind
async def test_whole_text(kind: Kind, tmp_path: Path) -> None:
    """The same without streaming."""
    async with served(tmp_path, kind, Said(text=TEXT)) as running, sdk(running) as client:
        message = await client.messages.create(**ASK)

    assert [block.text for block in message.content if block.type == "text"] == [TEXT]
    assert message.stop_reason == "end_turn"


@every_kind
@pytest.mark.parametrize("stream", [True, False])
async def test_tools(kind: Kind, tmp_path: Path, *, stream: bool) -> None:
    """Parallel calls come with names, distinct ids and arguments, streamed or not."""
    said = Said(text="Let me see.", calls=(("weather", ARGUMENTS), ("weather", '{"city": "Bonn"}')))
    async with served(tmp_path, kind, said) as running, sdk(running) as client:
        if stream:
            message = await ask(running, tools=[WEATHER])
        else:
            message = await client.messages.create(**ASK, tools=[WEATHER])

    calls = [block for block in message.content if block.type == "tool_use"]
    assert [(block.name, block.input) for block in calls] == [
        ("weather", json.loads(ARGUMENTS)),
        ("weather", {"city": "Bonn"}),
    ]
    assert len({block.id for block in calls}) == 2
    assert message.stop_reason == "tool_use"


@every_kind
async def test_thinking(kind: Kind, tmp_path: Path) -> None:
    """Thinking is a block of its own, before the text, with the seal it came with."""
    async with served(tmp_path, kind, Said(thinking=THINKING, text=TEXT)) as running:
        message = await ask(running)

    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == THINKING
    assert message.content[0].signature == {"messages": SIGNATURE, "responses": SEAL, "chat": ""}[kind]


@every_kind
async def test_conversation_with_tools(kind: Kind, tmp_path: Path) -> None:
    """The SDK sends an answer back as history, with the tool's result, and gets the next one."""
    async with speaking(kind, agent("weather", ARGUMENTS, "It rains.")) as upstream:
        text = mixed_config({"one": (kind, upstream.base_url)})
        async with daemon(text, tmp_path) as running:
            first = await ask(running, tools=[WEATHER])
            (used,) = [block for block in first.content if block.type == "tool_use"]
            result = {"type": "tool_result", "tool_use_id": used.id, "content": "rain"}
            history: Any = [
                *ASK["messages"],
                {"role": "assistant", "content": [block.model_dump() for block in first.content]},
                {"role": "user", "content": [result]},
            ]
            second = await ask(running, tools=[WEATHER], messages=history)

    assert second.content[0].text == "It rains."


async def test_count_tokens(tmp_path: Path) -> None:
    """Answered here: no upstream is asked."""
    async with (
        MessagesUpstream(Said(text=TEXT)) as upstream,
        served_by(tmp_path, upstream) as running,
        sdk(running) as client,
    ):
        counted = await client.messages.count_tokens(model="auto", messages=ASK["messages"])

    assert 0 < counted.input_tokens < 100
    assert not upstream.talks


async def test_unknown_model(tmp_path: Path) -> None:
    """The SDK raises the error it has for that."""
    async with served(tmp_path, "messages", Said(text=TEXT)) as running, sdk(running) as client:
        with pytest.raises(anthropic.NotFoundError) as refused:
            await client.messages.create(**ASK | {"model": "nobody-has-this"})

    assert refused.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


async def test_everybody_down(tmp_path: Path) -> None:
    """A status that clients retry, in words of their dialect."""
    async with (
        MessagesUpstream(Said(status=500)) as upstream,
        served_by(tmp_path, upstream) as running,
        sdk(running) as client,
    ):
        with pytest.raises(anthropic.InternalServerError) as refused:
            await client.messages.create(**ASK)

    assert refused.value.status_code == 503
    assert refused.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


async def test_server_tools_need_an_upstream_of_the_dialect(tmp_path: Path) -> None:
    """What only a vendor can run is refused in words where no upstream of the route speaks its API."""
    search: Any = {"type": "web_search_20250305", "name": "web_search"}
    async with served(tmp_path, "chat", Said(text=TEXT)) as running, sdk(running) as client:
        with pytest.raises(anthropic.BadRequestError, match="web_search"):
            await client.messages.create(**ASK, tools=[search])


# --- what upstreams are sent ------------------------------------------------------------------------------------------


async def test_pass_through(tmp_path: Path) -> None:
    """Where both speak Messages, bytes go through as they are, with the key where this API has it."""
    async with (
        MessagesUpstream(Said(text=TEXT, thinking=THINKING)) as upstream,
        served_by(tmp_path, upstream) as running,
    ):
        heard = await hear(
            running.url, ASK | {"stream": True, "top_k": 3}, path=MESSAGES, headers={"anthropic-beta": "context-1m"}
        )
        (talk,) = upstream.talks

    assert b'"id":"msg_1"' in heard.data
    assert talk.path == "/v1/messages"
    assert talk.body["top_k"] == 3
    assert talk.headers["x-api-key"] == KEY
    assert "authorization" not in talk.headers
    assert talk.headers["anthropic-version"] == "2023-06-01"
    assert talk.headers["anthropic-beta"] == "context-1m"


async def test_what_cannot_cross_is_named(tmp_path: Path, upstreams: Upstreams) -> None:
    """In the log line, and in a counter by dialects and feature."""
    upstream = await upstreams(Turn(Answer(text=TEXT)))
    async with daemon(mixed_config({"one": ("chat", upstream.base_url)}), tmp_path) as running:
        await ask(running, extra_body={"top_k": 3})

    labels = {"from_dialect": "messages", "to_dialect": "chat", "feature": "top_k"}
    assert running.metric("routerd_dropped_features_total", **labels) == 1
    assert running.exchanges[0]["dropped"] == ["top_k"]
    assert "top_k" not in upstream.requests[0].body


async def test_a_provider_of_both_is_spoken_to_in_the_clients_dialect(tmp_path: Path, upstreams: Upstreams) -> None:
    """Chat stays chat, and Messages stays Messages."""
    chat = await upstreams(Turn(Answer(text=TEXT)))
    async with MessagesUpstream(Said(text=TEXT)) as messages:
        text = mixed_config({"both": ("chat", "URL")}).replace('dialect = "chat"\n', "")
        urls = f'{{ chat = "{chat.base_url}", messages = "{messages.base_url}" }}'
        async with daemon(text.replace('"URL"', urls), tmp_path) as running:
            await ask(running)
            async with openai_sdk(running) as client:
                await client.chat.completions.create(model="auto", messages=ASK["messages"])

    assert (len(chat.requests), len(messages.talks)) == (1, 1)


# --- OpenAI's SDK over upstreams of other dialects --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "chat"])
async def test_openai_sdk_over_others(kind: Kind, tmp_path: Path) -> None:
    """Thinking, text, calls, finish and usage, as that SDK reads them."""
    said = Said(thinking=THINKING, text=TEXT, calls=(("weather", ARGUMENTS),))
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER["input_schema"]}}
    async with served(tmp_path, kind, said) as running, openai_sdk(running) as client:
        whole = await client.chat.completions.create(model="auto", messages=ASK["messages"], tools=[tool])
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await client.chat.completions.create(model="auto", messages=ASK["messages"], tools=[tool], **options)
        chunks = [chunk async for chunk in stream]

    (choice,) = whole.choices
    (used,) = list(choice.message.tool_calls or [])
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert choice.message.content == TEXT == "".join(delta.content or "" for delta in deltas)
    assert choice.finish_reason == "tool_calls"
    assert used.function.arguments == ARGUMENTS  # type: ignore[union-attr]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == THINKING
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (40, 20)


async def test_openai_request_over_messages(tmp_path: Path) -> None:
    """System, tools, calls and results in the form this API has for them."""
    used = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    history: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [used]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER["input_schema"]}}
    async with (
        MessagesUpstream(Said(text=TEXT)) as upstream,
        served_by(tmp_path, upstream) as running,
        openai_sdk(running) as client,
    ):
        await client.chat.completions.create(model="auto", messages=history, tools=[tool])
        sent = upstream.talks[0].body

    assert sent["system"] == [{"type": "text", "text": "Be brief."}]
    assert [turn["role"] for turn in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["messages"][1]["content"][0]["input"] == json.loads(ARGUMENTS)
    assert sent["messages"][2]["content"][0]["tool_use_id"] == "call_1"
    assert sent["tools"][0]["input_schema"] == WEATHER["input_schema"]
    assert sent["max_tokens"] == 8192


# --- faults -----------------------------------------------------------------------------------------------------------

CALL = Said(text="Let me see.", calls=(("weather", ARGUMENTS),))


@pytest.mark.parametrize("how", ["tear", "eof", "stall", "error"])
async def test_death_in_a_call_is_re_run_unseen(how: Any, tmp_path: Path) -> None:
    """Half a call never reaches the client: another upstream makes it whole."""
    torn = Said(text=CALL.text, calls=CALL.calls, how=how, place="mid_call")
    async with (
        MessagesUpstream(torn) as one,
        MessagesUpstream(CALL) as two,
        served_by(tmp_path, one, two) as running,
    ):
        message = await ask(running, tools=[WEATHER])

    assert "".join(block.text for block in message.content if block.type == "text") == CALL.text
    assert [block.input for block in message.content if block.type == "tool_use"] == [json.loads(ARGUMENTS)]
    assert message.stop_reason == "tool_use"
    assert (len(one.talks), len(two.talks)) == (1, 1)


@pytest.mark.parametrize("how", ["tear", "eof", "stall", "error"])
async def test_text_is_taken_up_by_another(how: Any, tmp_path: Path) -> None:
    """The client gets the text once, in one block, and a proper end."""
    torn = Said(text=TEXT, how=how, place="mid_text")
    rest = Said(text=TEXT.removeprefix("Seven plus "))
    async with (
        MessagesUpstream(torn) as one,
        MessagesUpstream(rest) as two,
        served_by(tmp_path, one, two) as running,
    ):
        message = await ask(running)

    assert [block.text for block in message.content] == [TEXT]
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)))
async def test_text_is_taken_up_by_an_upstream_of_another_dialect(first: Kind, second: Kind, tmp_path: Path) -> None:
    """The beginning and the rest may come from any two."""
    said = Said(text=TEXT)
    async with speaking(first, Said(text=TEXT, how="tear")) as one, speaking(second, rest_of(said)) as two:
        text = mixed_config({"one": (first, one.base_url), "two": (second, two.base_url)}, defaults=QUICK)
        async with daemon(text, tmp_path) as running:
            message = await ask(running)

    assert [block.text for block in message.content] == [TEXT]


@pytest.mark.parametrize("place", ["mid_text", "mid_call"])
async def test_nobody_left_is_an_error_and_no_end(place: Any, tmp_path: Path) -> None:
    """When nobody can go on, the stream says so and is torn: no stop reason, no ``message_stop``, no half call."""
    torn = Said(text=CALL.text, calls=CALL.calls, how="eof", place=place)
    async with MessagesUpstream(torn) as one, served_by(tmp_path, one) as running:
        heard = await hear_messages(running, tools=[WEATHER])
        with pytest.raises(anthropic.APIStatusError):
            await ask(running, tools=[WEATHER])

    assert heard.torn
    assert b"event: error" in heard.data
    assert b"message_stop" not in heard.data
    assert b'stop_reason":"' not in heard.data
    assert b"tool_use" not in heard.data


@pytest.mark.parametrize("place", ["first", "mid_thinking", "mid_text", "mid_call"])
async def test_keepalives(place: Any, tmp_path: Path) -> None:
    """While the upstream is silent, the client hears empty deltas in an open block; the answer stays as it was."""
    patient = QUICK.replace("400ms", "5s")
    thinking = THINKING if place == "mid_thinking" else ""
    said = Said(thinking=thinking, text=TEXT, calls=CALL.calls, how="pause", place=place, pause_s=0.6)
    async with MessagesUpstream(said) as one:
        text = mixed_config({"one": ("messages", one.base_url)}, defaults=patient)
        async with daemon(text, tmp_path) as running:
            heard, message = await asyncio.gather(
                hear_messages(running, tools=[WEATHER]), ask(running, tools=[WEATHER])
            )

    empty = [b'"text":""}' in data or b'"thinking":""}' in data for _, data in heard.reads if b"_delta" in data]
    assert sum(empty) >= 3
    assert "".join(block.text for block in message.content if block.type == "text") == TEXT
    assert [block.input for block in message.content if block.type == "tool_use"] == [json.loads(ARGUMENTS)]
    assert message.stop_reason == "tool_use"


async def test_keepalive_before_a_refusal(tmp_path: Path) -> None:
    """Where a keep-alive has opened the message, the second upstream's answer goes on in it."""
    silent = Said(text=TEXT, how="stall", place="first")
    async with (
        MessagesUpstream(silent) as one,
        MessagesUpstream(Said(text=TEXT)) as two,
        served_by(tmp_path, one, two) as running,
    ):
        message = await ask(running)

    assert [block.text for block in message.content] == [TEXT]


async def test_empty_blocks_do_not_come_back(tmp_path: Path) -> None:
    """What keep-alives leave in a client's history is taken out: the vendor refuses text that says nothing."""
    history = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "Hello."}]},
        {"role": "user", "content": "Again."},
    ]
    async with MessagesUpstream(Said(text=TEXT)) as one, served_by(tmp_path, one) as running:
        await ask(running, messages=history)

    assert one.talks[0].body["messages"][1]["content"] == [{"type": "text", "text": "Hello."}]


async def test_chat_upstream_dies_in_a_call(tmp_path: Path, upstreams: Upstreams) -> None:
    """The same guard holds over a chat upstream."""
    answer = Answer(text="Let me see.", calls=(call("weather", city="Köln"),))
    one = await upstreams(Turn(answer, Fault("eof", "mid_call")))
    two = await upstreams(Turn(answer))
    text = mixed_config({"one": ("chat", one.base_url), "two": ("chat", two.base_url)}, defaults=QUICK)
    async with daemon(text, tmp_path) as running:
        message = await ask(running, tools=[WEATHER])

    assert [block.input for block in message.content if block.type == "tool_use"] == [{"city": "Köln"}]
    assert message.model == MODEL
