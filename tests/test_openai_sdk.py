"""OpenAI's own library as the client: what it makes of our answers, streams, signs of life and errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk

from routerd.canonical import Usage
from routerd.proxy.simulated import TEXT, Answer, Fault, Turn
from tests.fakes import ScriptedUpstream, Upstreams, call
from tests.responses_fake import ResponsesUpstream
from tests.rig import MODEL, TOKEN, WEATHER, config_text, daemon

MESSAGES: Any = [{"role": "user", "content": "Hello."}]
TOOLS: Any = [WEATHER]
over_both = pytest.mark.parametrize("kind", [ScriptedUpstream, ResponsesUpstream], ids=["over chat", "over responses"])
TWO_CALLS = Answer(text="Let me see.", calls=(call("weather", city="Oslo"), call("weather", city="Rome")))


@asynccontextmanager
async def client_of(upstreams: Mapping[str, Any], tmp_path: Path, **options: str) -> AsyncIterator[AsyncOpenAI]:
    """The library, pointed at a daemon over these upstreams, and never retrying by itself."""
    text = config_text(upstreams, **options).replace("[server]\n", f'[server]\ntokens = ["{TOKEN}"]\n', 1)
    async with (
        daemon(text, tmp_path) as served,
        AsyncOpenAI(base_url=f"{served.url}/v1", api_key=TOKEN, max_retries=0) as client,
    ):
        yield client


async def _streamed(
    client: AsyncOpenAI, seen: list[ChatCompletionChunk] | None = None, **fields: Any
) -> list[ChatCompletionChunk]:
    """All chunks of a stream; also in ``seen``, should the stream fail."""
    chunks = [] if seen is None else seen
    async for chunk in await client.chat.completions.create(model="auto", messages=MESSAGES, stream=True, **fields):
        chunks.append(chunk)
    return chunks


def _text(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# --- answers --------------------------------------------------------------------------------------------------------


@over_both
async def test_whole_answer(kind: type[ScriptedUpstream], upstreams: Upstreams, tmp_path: Path) -> None:
    """Parsed into the library's types, with usage and our headers."""
    used = Usage(input_tokens=100, cached_tokens=40, output_tokens=20, reasoning_tokens=5)
    async with client_of({"a": await upstreams(Turn(Answer(usage=used)), kind=kind)}, tmp_path) as client:
        raw = await client.chat.completions.with_raw_response.create(model="auto", messages=MESSAGES)
        completion = raw.parse()

        assert completion.object == "chat.completion"
        assert completion.model == MODEL
        assert completion.choices[0].message.content == TEXT
        assert completion.choices[0].finish_reason == "stop"
        assert completion.usage is not None
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (100, 20)
        assert completion.usage.prompt_tokens_details is not None
        assert completion.usage.prompt_tokens_details.cached_tokens == 40
        assert completion.usage.completion_tokens_details is not None
        assert completion.usage.completion_tokens_details.reasoning_tokens == 5
        assert raw.headers["x-routerd-provider"] == "a"


@over_both
async def test_stream(kind: type[ScriptedUpstream], upstreams: Upstreams, tmp_path: Path) -> None:
    """Every chunk parses; the finish comes last, and no usage that was not asked for."""
    async with client_of({"a": await upstreams(kind=kind)}, tmp_path) as client:
        chunks = await _streamed(client)

        assert _text(chunks) == TEXT
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert all(chunk.usage is None for chunk in chunks)


@over_both
async def test_usage_of_a_stream(kind: type[ScriptedUpstream], upstreams: Upstreams, tmp_path: Path) -> None:
    """Asked for, it comes as the last chunk, which has no choices."""
    answer = Answer(usage=Usage(input_tokens=100, output_tokens=20))
    async with client_of({"a": await upstreams(Turn(answer), kind=kind)}, tmp_path) as client:
        chunks = await _streamed(client, stream_options={"include_usage": True})

        assert not chunks[-1].choices
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 120


@over_both
async def test_parallel_calls(kind: type[ScriptedUpstream], upstreams: Upstreams, tmp_path: Path) -> None:
    """Two calls in one answer, each with its own id and whole arguments."""
    async with client_of({"a": await upstreams(Turn(TWO_CALLS), kind=kind)}, tmp_path) as client:
        completion = await client.chat.completions.create(model="auto", messages=MESSAGES, tools=TOOLS)
        calls: Any = completion.choices[0].message.tool_calls

        assert completion.choices[0].finish_reason == "tool_calls"
        assert [json.loads(one.function.arguments) for one in calls] == [{"city": "Oslo"}, {"city": "Rome"}]
        assert len({one.id for one in calls}) == 2


async def test_agents_turn(upstreams: Upstreams, tmp_path: Path) -> None:
    """A call, its result, the closing answer: the history goes through as the library writes it."""
    upstream = await upstreams(Turn(), Turn(Answer(final_text="It rains.")))
    async with client_of({"a": upstream}, tmp_path) as client:
        first = await client.chat.completions.create(model="auto", messages=MESSAGES, tools=TOOLS)
        message = first.choices[0].message
        assert message.tool_calls is not None
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
        history: Any = [*MESSAGES, message.model_dump(exclude_none=True), result]
        second = await client.chat.completions.create(model="auto", messages=history, tools=TOOLS)

        assert second.choices[0].message.content == "It rains."
        assert upstream.requests[1].body["messages"] == history


# --- the library's own accumulation ---------------------------------------------------------------------------------

BROKEN = {
    "healthy": None,
    "refused": Fault("status", status=500),
    "stalled in thought": Fault("stall", "in_reasoning"),
    "died in the text": Fault("reset", "mid_text"),
    "died in a call": Fault("reset", "mid_call"),
    "died between calls": Fault("eof", "between_calls"),
    "spoilt call": Fault("cut_arguments"),
}


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("keepalive", ["5s", "50ms"])
@over_both
async def test_accumulated_stream(
    kind: type[ScriptedUpstream], fault: Fault | None, keepalive: str, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Whatever went wrong upstream and however often we said that we live, the message comes out whole, once."""
    answer = Answer(reasoning="Hm, the weather.", text=TWO_CALLS.text, calls=TWO_CALLS.calls, pace_s=0.01)
    several = {"a": await upstreams(Turn(answer, fault), kind=kind), "b": await upstreams(Turn(answer), kind=kind)}
    settings = f'stall_timeout = "200ms"\nkeepalive = "{keepalive}"'
    async with client_of(several, tmp_path, defaults=settings) as client:
        async with client.chat.completions.stream(model="auto", messages=MESSAGES, tools=TOOLS) as stream:
            kinds = [event.type async for event in stream]
            completion = await stream.get_final_completion()
        message = completion.choices[0].message
        calls: Any = message.tool_calls

        assert message.role == "assistant"
        assert message.content == TWO_CALLS.text
        assert [one.function.name for one in calls] == ["weather", "weather"]
        assert [json.loads(one.function.arguments) for one in calls] == [{"city": "Oslo"}, {"city": "Rome"}]
        assert completion.choices[0].finish_reason == "tool_calls"
        assert kinds.count("tool_calls.function.arguments.done") == 2


@over_both
async def test_signs_of_life(kind: type[ScriptedUpstream], upstreams: Upstreams, tmp_path: Path) -> None:
    """Chunks that say nothing are chunks to the library: it waits on, and nothing of them is in the message."""
    upstream = await upstreams(Turn(fault=Fault("pause", "before_headers", seconds=0.5)), kind=kind)
    async with client_of({"a": upstream}, tmp_path, defaults='keepalive = "50ms"') as client:
        patient = client.with_options(timeout=0.3)  # per read: without signs of life this would not do
        chunks = await _streamed(patient)

        assert _text(chunks) == TEXT
        assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
        assert len(chunks) > 10


# --- errors ---------------------------------------------------------------------------------------------------------


async def test_unknown_model(upstreams: Upstreams, tmp_path: Path) -> None:
    """The library's own class for it, with the code that agents look for."""
    async with client_of({"a": await upstreams()}, tmp_path) as client:
        with pytest.raises(openai.NotFoundError) as raised:
            await client.chat.completions.create(model="nothing", messages=MESSAGES)

        assert raised.value.code == "model_not_found"
        assert raised.value.type == "invalid_request_error"


async def test_wrong_token(upstreams: Upstreams, tmp_path: Path) -> None:
    """Authentication is between the client and us."""
    async with client_of({"a": await upstreams()}, tmp_path) as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            await client.with_options(api_key="wrong").chat.completions.create(model="auto", messages=MESSAGES)

        assert raised.value.code == "invalid_api_key"


FINAL: dict[str, tuple[Fault, type[openai.APIStatusError]]] = {
    "401": (Fault("status", status=401), openai.InternalServerError),
    "402": (Fault("status", status=402), openai.InternalServerError),  # says nothing of when it ends
    "404": (Fault("status", status=404), openai.InternalServerError),
    "429": (Fault("status", status=429, headers=(("retry-after", "3600"),)), openai.RateLimitError),
    "500": (Fault("status", status=500), openai.InternalServerError),
    "400": (Fault("status", status=400), openai.BadRequestError),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fault", "kind"), FINAL.values(), ids=FINAL)
async def test_nobody_is_left(
    fault: Fault, kind: type[openai.APIStatusError], stream: bool, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Errors are of the classes that agents retry, and a limit says when to come back."""
    both = {"a": await upstreams(Turn(fault=fault)), "b": await upstreams(Turn(fault=fault))}
    async with client_of(both, tmp_path, defaults='max_wait = "0s"') as client:
        with pytest.raises(kind) as raised:
            await client.chat.completions.create(model="auto", messages=MESSAGES, stream=stream)

        if kind is openai.RateLimitError:
            assert int(raised.value.response.headers["retry-after"]) > 2800


async def test_error_in_a_stream(upstreams: Upstreams, tmp_path: Path) -> None:
    """After text it is raised from the stream; the library never takes what came for a whole answer."""
    upstream = await upstreams(Turn(Answer(pace_s=0.01), Fault("stall", "mid_text")))
    settings = 'stall_timeout = "200ms"\nmax_attempts = 1'
    async with client_of({"a": upstream}, tmp_path, defaults=settings) as client:
        seen: list[ChatCompletionChunk] = []
        with pytest.raises(openai.APIError):
            await _streamed(client, seen)

        assert seen
        assert TEXT.startswith(_text(seen))
        assert not [chunk for chunk in seen if chunk.choices and chunk.choices[0].finish_reason]


# --- models ---------------------------------------------------------------------------------------------------------


async def test_models(upstreams: Upstreams, tmp_path: Path) -> None:
    """The list and a single card parse, and carry the window beside what the library knows."""
    async with client_of({"a": await upstreams()}, tmp_path) as client:
        listed = [model async for model in client.models.list()]
        card = await client.models.retrieve("auto")

        assert [model.id for model in listed] == ["auto", MODEL]
        assert card.object == "model"
        assert card.model_extra is not None
        assert card.model_extra["context_length"] == 131072
