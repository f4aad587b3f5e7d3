"""OpenAI's own library as a Responses client: what it makes of our answers, over upstreams of each dialect.

Most tests run over a Responses upstream, whose bytes go through as they come, and over two others, whose answers have
to be written anew.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from routerd.proxy.simulated import Answer, Fault, Turn
from routerd.state.saved import saved_totals
from tests.messages_fake import Said, after_tools, table
from tests.responses_fake import RESPONSES, SEAL, ResponsesUpstream
from tests.rig import MODEL, TOKEN, Daemon, daemon
from tests.tongues import KINDS, Kind, Upstream, bodies, rest_of, speaking

TEXT = "Seven plus five is twelve, as everybody knows."
THINKING = "Seven and five."
ARGUMENTS = '{"city": "Köln", "days": 3}'
OTHER_ARGUMENTS = '{"city": "Bonn"}'
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "strict": False,
}
QUICK = 'first_token_timeout = "400ms"\nstall_timeout = "400ms"\nmax_wait = "0s"\nkeepalive = "100ms"\n'
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA"
    "60e6kgAAAABJRU5ErkJggg=="
)
ASK: Any = {"model": "auto", "input": "Seven plus five?"}
CALLS = Said(text="Let me see.", calls=(("weather", ARGUMENTS), ("weather", OTHER_ARGUMENTS)))

every_kind = pytest.mark.parametrize("kind", KINDS)


class Sum(BaseModel):
    """What structured answers are asked to be."""

    left: int
    right: int
    total: int


def toml(
    upstreams: dict[str, tuple[Kind, str]],
    *,
    defaults: str = "",
    state: str = "memory:",
    extra: str = "",
    budget: float = 1e6,
) -> str:
    """A daemon with a token over these upstreams, tried in order."""
    tiers = ", ".join(f'"{name}/{MODEL}"' for name in upstreams)
    providers = "".join(table(name, url, kind, extra) for name, (kind, url) in upstreams.items())
    return f"""
[server]
listen = "127.0.0.1:0"
tokens = ["{TOKEN}", "another-token"]
[state]
url = "{state}"
[defaults]
{defaults}
[routes.auto]
models = [{tiers}]
budget = {{ usd = {budget:f}, per = "day" }}
{providers}
"""


class Served:
    """A daemon, the library pointed at it, and the upstreams behind it."""

    def __init__(self, daemon: Daemon, client: AsyncOpenAI, upstreams: list[Upstream]) -> None:
        self.daemon = daemon
        self.client = client
        self.upstreams = upstreams

    @property
    def sent(self) -> list[dict[str, Any]]:
        """What the first upstream was sent."""
        return bodies(self.upstreams[0])

    async def create(self, **fields: Any) -> Any:
        return await self.client.responses.create(**ASK | fields)

    async def hear(self, seen: list[Any], **fields: Any) -> None:
        """All events of a stream into ``seen``, should it fail."""
        async for event in await self.create(stream=True, **fields):
            seen += [event]

    async def stream(self, **fields: Any) -> tuple[list[Any], Any]:
        """All events of a stream, and what the library makes of them."""
        async with self.client.responses.stream(**ASK | fields) as stream:
            events = [event async for event in stream]
            return events, await stream.get_final_response()


def library(served: Daemon, token: str = TOKEN) -> AsyncOpenAI:
    """Never retrying by itself."""
    return AsyncOpenAI(base_url=f"{served.url}/v1", api_key=token, max_retries=0)


@asynccontextmanager
async def serving(folder: Path, *speakers: tuple[Kind, Any], **options: Any) -> AsyncIterator[Served]:
    """A daemon over one upstream for each of these: its kind, and what it says."""
    async with AsyncExitStack() as stack:
        upstreams = [speaking(kind, *(said if isinstance(said, list) else [said])) for kind, said in speakers]
        for upstream in upstreams:
            await stack.enter_async_context(upstream)
        places = {f"p{place}": (kind, upstreams[place].base_url) for place, (kind, _) in enumerate(speakers)}
        served = await stack.enter_async_context(daemon(toml(places, **options), folder))
        client = await stack.enter_async_context(library(served))
        yield Served(served, client, upstreams)


def calls_of(response: Any) -> list[tuple[str, Any]]:
    return [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]


def kinds_of(events: list[Any]) -> list[str]:
    return [event.type for event in events]


# --- answers ----------------------------------------------------------------------------------------------------------


@every_kind
async def test_whole_answer(kind: Kind, tmp_path: Path) -> None:
    """Parsed into the library's types, with usage, an id of this API's form, and our headers."""
    async with serving(tmp_path, (kind, Said(text=TEXT))) as served:
        raw = await served.client.responses.with_raw_response.create(**ASK)
        response = raw.parse()

    assert response.output_text == TEXT
    assert (response.object, response.status, response.error) == ("response", "completed", None)
    assert response.id.startswith("resp_")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (40, 20, 60)
    assert response.usage.input_tokens_details.cached_tokens == 8
    assert raw.headers["x-routerd-provider"] == "p0"


@every_kind
async def test_streamed_answer(kind: Kind, tmp_path: Path) -> None:
    """Events in the order that the library demands, numbered without a gap; the last one holds the whole."""
    async with serving(tmp_path, (kind, Said(text=TEXT, thinking=THINKING))) as served:
        events, response = await served.stream()

    kinds = kinds_of(events)
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    assert response.output_text == TEXT
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].summary[0].text == THINKING
    assert response.usage.output_tokens == 20


@every_kind
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_parallel_calls(kind: Kind, stream: bool, tmp_path: Path) -> None:
    """Names, distinct ids and whole arguments, streamed or not."""
    async with serving(tmp_path, (kind, CALLS)) as served:
        response = (await served.stream(tools=[WEATHER]))[1] if stream else await served.create(tools=[WEATHER])

    calls = [item for item in response.output if item.type == "function_call"]
    assert calls_of(response) == [("weather", json.loads(ARGUMENTS)), ("weather", json.loads(OTHER_ARGUMENTS))]
    assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == 2
    assert response.output_text == CALLS.text
    assert response.status == "completed"


def rainy(body: dict[str, Any]) -> Said:
    """A model that calls the tool once, and closes when it has the result."""
    return Said(text="It rains.") if after_tools(body) else Said(thinking=THINKING, calls=(("weather", ARGUMENTS),))


@every_kind
@pytest.mark.parametrize("named", [True, False], ids=["named", "in full"])
async def test_tool_loop(kind: Kind, named: bool, tmp_path: Path) -> None:
    """The result of a call leads to the closing answer, whether the client names the first one or sends it back."""
    async with serving(tmp_path, (kind, rainy)) as served:
        first = await served.create(tools=[WEATHER])
        (used,) = [item for item in first.output if item.type == "function_call"]
        result: Any = {"type": "function_call_output", "call_id": used.call_id, "output": "rain"}
        if named:
            second = await served.create(tools=[WEATHER], previous_response_id=first.id, input=[result])
        else:
            told = [item.model_dump(exclude_none=True) for item in first.output]
            history = [{"role": "user", "content": ASK["input"]}, *told, result]
            second = await served.create(tools=[WEATHER], input=history, store=False)
        sent = served.sent[1]

    assert second.output_text == "It rains."
    assert named is (second.previous_response_id == first.id) or kind == "responses"  # whose own words these are
    assert "previous_response_id" not in sent
    assert "rain" in json.dumps(sent)
    assert ASK["input"] in json.dumps(sent)


@every_kind
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_structured_answer(kind: Kind, stream: bool, tmp_path: Path) -> None:
    """The schema reaches the upstream, and the library parses what comes back."""
    told = Said(text='{"left": 7, "right": 5, "total": 12}')
    async with serving(tmp_path, (kind, told)) as served:
        if stream:
            _, response = await served.stream(text_format=Sum)
        else:
            response = await served.client.responses.parse(**ASK, text_format=Sum)
        sent = served.sent[0]

    assert response.output_parsed == Sum(left=7, right=5, total=12)
    assert '"total"' in json.dumps(sent)


@every_kind
async def test_images(kind: Kind, tmp_path: Path) -> None:
    """They reach the upstream in its own form."""
    parts = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": PIXEL, "detail": "auto"},
    ]
    async with serving(tmp_path, (kind, Said(text=TEXT))) as served:
        response = await served.create(input=[{"role": "user", "content": parts}])
        sent = json.dumps(served.sent[0])

    assert response.output_text == TEXT
    assert PIXEL.partition(",")[2] in sent
    assert {"responses": "input_image", "chat": "image_url", "messages": "base64"}[kind] in sent


@every_kind
async def test_a_length_limit(kind: Kind, tmp_path: Path) -> None:
    """An answer that reached it says so, in a stream as well, and can be gone on from."""
    async with serving(tmp_path, (kind, Said(text=TEXT, finish="length"))) as served:
        *_, last = [event async for event in await served.create(stream=True)]
        again = await served.create(previous_response_id=last.response.id, input="Go on.")
        sent = json.dumps(served.sent[1])

    assert last.type == "response.incomplete"
    assert last.response.status == again.status == "incomplete"
    assert again.incomplete_details.reason == "max_output_tokens"
    assert TEXT in sent


# --- thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False], ids=["named", "in full"])
async def test_sealed_thinking_comes_back(named: bool, tmp_path: Path) -> None:
    """The upstream that sealed it gets it back with the call it led to, whether the client sends it or not."""
    asked = {"tools": [WEATHER], "reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"]}
    async with serving(tmp_path, ("responses", rainy)) as served:
        first = await served.create(**asked)
        thought, used = first.output
        result: Any = {"type": "function_call_output", "call_id": used.call_id, "output": "rain"}
        if named:
            await served.create(**asked, previous_response_id=first.id, input=[result])
        else:
            told = [item.model_dump(exclude_none=True) for item in first.output]
            await served.create(**asked, input=[{"role": "user", "content": "Weather?"}, *told, result], store=False)
        sent = served.sent[1]["input"]

    assert thought.encrypted_content == SEAL
    assert [item["encrypted_content"] for item in sent if item.get("type") == "reasoning"] == [SEAL]
    assert [item.get("type", "message") for item in sent] == [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]


@every_kind
async def test_thinking_can_always_be_sent_back(kind: Kind, tmp_path: Path) -> None:
    """Whoever thought it, and whoever is asked next: nobody is sent what only somebody else could open."""
    other: Kind = KINDS[(KINDS.index(kind) + 1) % len(KINDS)]
    async with serving(
        tmp_path, (kind, [rainy, Said(status=500)]), (other, rainy), defaults='max_wait = "0s"'
    ) as served:
        first = await served.create(tools=[WEATHER], include=["reasoning.encrypted_content"])
        (used,) = [item for item in first.output if item.type == "function_call"]
        result: Any = {"type": "function_call_output", "call_id": used.call_id, "output": "rain"}
        second = await served.create(tools=[WEATHER], previous_response_id=first.id, input=[result])
        (sent,) = bodies(served.upstreams[1])

    assert second.output_text == "It rains."
    assert SEAL not in json.dumps(sent)


@pytest.mark.parametrize("fails", [False, True], ids=["stays", "moves"])
async def test_seals_without_calls(fails: bool, tmp_path: Path) -> None:
    """Thinking that led to words alone goes back to who sealed it, as it came, and to nobody else."""
    thought = Said(text="Twelve.", thinking=THINKING)
    asked = {"reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"]}
    speakers: list[tuple[Kind, Any]] = [
        ("responses", [thought, Said(status=500) if fails else thought]),
        ("responses", thought),
    ]
    async with serving(tmp_path, *speakers, defaults='max_wait = "0s"') as served:
        first = await served.create(**asked)
        told = [item.model_dump(exclude_none=True) for item in first.output]
        question = {"role": "user", "content": "Sum?"}
        await served.create(**asked, input=[question, *told, question])
        sent = bodies(served.upstreams[1 if fails else 0])[-1]["input"]

    assert [item["encrypted_content"] for item in sent if item.get("type") == "reasoning"] == ([] if fails else [SEAL])
    assert all("id" not in item for item in sent) or not fails


# --- conversations by name --------------------------------------------------------------------------------------------


def texts_of(sent: dict[str, Any]) -> str:
    return json.dumps(sent, ensure_ascii=False)


@every_kind
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_several_turns(kind: Kind, stream: bool, tmp_path: Path) -> None:
    """Each names the one before, as soon as that has ended; the upstream gets all of them each time, in order."""
    said = [Said(text=f"Answer {number}.") for number in range(1, 4)]
    async with serving(tmp_path, (kind, said)) as served:
        previous: Any = openai.omit
        for number in range(1, 4):
            fields = {"input": f"Question {number}?", "previous_response_id": previous}
            response = (await served.stream(**fields))[1] if stream else await served.create(**fields)
            if kind != "responses":  # what is passed on says what the upstream says, which knows of no earlier answer
                assert response.previous_response_id == (previous or None)
            previous = response.id
        sent = texts_of(served.sent[2])

    told = ["Question 1?", "Answer 1.", "Question 2?", "Answer 2.", "Question 3?"]
    places = [sent.find(text) for text in told]
    assert response.output_text == "Answer 3."
    assert -1 not in places
    assert places == sorted(places)


@every_kind
async def test_across_a_restart(kind: Kind, tmp_path: Path) -> None:
    """What was said before it is still there after it."""
    async with speaking(kind, Said(text="Answer 1."), Said(text="Answer 2.")) as upstream:
        text = toml({"one": (kind, upstream.base_url)}, state=f"sqlite:{tmp_path}/routerd.db")
        async with daemon(text, tmp_path) as before, library(before) as client:
            first = await client.responses.create(model="auto", input="Question 1?")
        async with daemon(text, tmp_path) as after, library(after) as client:
            second = await client.responses.create(model="auto", input="Question 2?", previous_response_id=first.id)
        sent = texts_of(bodies(upstream)[1])

    assert second.output_text == "Answer 2."
    assert "Question 1?" in sent
    assert "Answer 1." in sent


async def test_a_conversation_wanders(tmp_path: Path) -> None:
    """Between upstreams of all dialects, since none of them is asked to remember it."""
    speakers = [(kind, [Said(text=f"Answer {place}."), Said(status=503)]) for place, kind in enumerate(KINDS)]
    async with serving(tmp_path, *speakers, defaults='max_wait = "0s"') as served:
        previous: Any = openai.omit
        for number in range(3):
            response = await served.create(input=f"Question {number}?", previous_response_id=previous)
            previous = response.id
        sent = texts_of(bodies(served.upstreams[2])[-1])

    assert response.output_text == "Answer 2."
    assert all(text in sent for text in ("Question 0?", "Answer 0.", "Question 1?", "Answer 1.", "Question 2?"))


async def test_branches(tmp_path: Path) -> None:
    """The same answer can be gone on from twice; neither branch hears of the other."""
    async with serving(tmp_path, ("responses", Said(text=TEXT))) as served:
        first = await served.create(input="The trunk.")
        for branch in ("The left one.", "The right one."):
            await served.create(input=branch, previous_response_id=first.id)
        sent = texts_of(served.sent[2])

    assert "The trunk." in sent
    assert "The left one." not in sent


async def test_instructions_do_not_carry_over(tmp_path: Path) -> None:
    """Each request has its own, as with OpenAI."""
    async with serving(tmp_path, ("responses", Said(text=TEXT))) as served:
        first = await served.create(instructions="Speak like a pirate.")
        await served.create(previous_response_id=first.id, instructions="Speak plainly.")
        sent = texts_of(served.sent[1])

    assert "pirate" not in sent
    assert "plainly" in sent


async def test_nothing_is_left_with_the_vendor(tmp_path: Path) -> None:
    """An upstream that speaks this API is told to store nothing, and never to look for an earlier answer."""
    async with serving(tmp_path, ("responses", Said(text=TEXT))) as served:
        first = await served.create(store=True)
        await served.create(previous_response_id=first.id)

    assert [sent["store"] for sent in served.sent] == [False, False]
    assert not [sent for sent in served.sent if sent.get("previous_response_id")]


async def refused_previous(client: AsyncOpenAI, response_id: str) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.responses.create(**ASK, previous_response_id=response_id)
    return raised.value


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_not_stored(stream: bool, tmp_path: Path) -> None:
    """The client said no; the error is the vendor's own, and says what to do."""
    async with serving(tmp_path, ("responses", Said(text=TEXT))) as served:
        first = (await served.stream(store=False))[1] if stream else await served.create(store=False)
        error = await refused_previous(served.client, first.id)

    assert error.code == "previous_response_not_found"
    assert error.param == "previous_response_id"
    assert error.type == "invalid_request_error"
    assert "whole conversation" in str(error)
    assert len(served.sent) == 1


async def test_other_tokens_answers(tmp_path: Path) -> None:
    """Whoever has another token is told that there is no such answer."""
    async with serving(tmp_path, ("responses", Said(text=TEXT))) as served:
        mine = await served.create()
        async with library(served.daemon, "another-token") as other:
            error = await refused_previous(other, mine.id)
            yours = await other.responses.create(**ASK)
        await refused_previous(served.client, yours.id)
        again = await served.create(previous_response_id=mine.id)

    assert error.code == "previous_response_not_found"
    assert again.output_text == TEXT


async def test_a_failed_answer_cannot_be_gone_on_from(tmp_path: Path) -> None:
    """It was never whole."""
    dying = Said(text=TEXT, how="eof")
    async with serving(tmp_path, ("responses", dying), defaults=QUICK) as served:
        events: list[Any] = []
        with pytest.raises(openai.APIError):
            await served.hear(events)
        error = await refused_previous(served.client, events[0].response.id)

    assert error.code == "previous_response_not_found"


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_unknown_model(tmp_path: Path) -> None:
    """The library's own class for it, with the code that agents look for."""
    async with serving(tmp_path, ("responses", Said(text=TEXT))) as served:
        with pytest.raises(openai.NotFoundError) as raised:
            await served.create(model="nothing")

    assert raised.value.code == "model_not_found"


async def test_wrong_token(tmp_path: Path) -> None:
    """Authentication is between the client and us."""
    async with serving(tmp_path, ("responses", Said(text=TEXT))) as served:
        with pytest.raises(openai.AuthenticationError):
            await served.client.with_options(api_key="wrong").responses.create(**ASK)


AUDIO: Any = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
UNSUPPORTED: dict[str, tuple[Kind, dict[str, Any]]] = {
    "background": ("responses", {"background": True}),
    "conversation": ("responses", {"conversation": "conv_1"}),
    "prompt": ("responses", {"prompt": {"id": "pmpt_1"}}),
    "item_reference": ("responses", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
    "input_audio": ("messages", {"input": [{"role": "user", "content": [AUDIO]}]}),
    "web_search": ("chat", {"tools": [{"type": "web_search"}]}),
}


@pytest.mark.parametrize(("kind", "fields"), UNSUPPORTED.values(), ids=UNSUPPORTED)
async def test_unsupported(kind: Kind, fields: dict[str, Any], tmp_path: Path, request: Any) -> None:
    """What cannot be served is refused at once and by name, in the vendor's shape."""
    name = request.node.callspec.id
    async with serving(tmp_path, (kind, Said(text=TEXT))) as served:
        with pytest.raises(openai.BadRequestError, match=name) as raised:
            await served.create(**fields)

    assert raised.value.type == "invalid_request_error"
    assert set(raised.value.body) == {"message", "type", "param", "code"}  # type: ignore[call-overload]
    assert not served.sent


@every_kind
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_nobody_is_left(kind: Kind, stream: bool, tmp_path: Path) -> None:
    """A status that clients retry."""
    async with serving(tmp_path, (kind, Said(status=500)), defaults='max_wait = "0s"') as served:
        with pytest.raises(openai.InternalServerError) as raised:
            await served.create(stream=stream)

    assert raised.value.status_code == 503


# --- faults -----------------------------------------------------------------------------------------------------------

MID_CALL = [("tear", "mid_call"), ("eof", "mid_call"), ("stall", "mid_call"), ("error", "mid_call")]
MID_TEXT = [("tear", "mid_text"), ("eof", "mid_text"), ("stall", "mid_text"), ("error", "mid_text")]
EARLY = [("stall", "first"), ("tear", "first"), ("eof", "mid_thinking"), ("error", "mid_thinking")]
SPOKEN = Said(text=CALLS.text, thinking=THINKING, calls=CALLS.calls)


def breaking(how: Any, place: Any) -> Said:
    return Said(text=SPOKEN.text, thinking=SPOKEN.thinking, calls=SPOKEN.calls, how=how, place=place)


@pytest.mark.parametrize("always", [True, False], ids=["always", "once"])
@pytest.mark.parametrize(("how", "place"), MID_CALL + MID_TEXT + EARLY, ids=lambda value: value)
async def test_breaks(how: str, place: str, always: bool, tmp_path: Path) -> None:
    """Whatever it is and whoever takes over: one whole answer, once, in a stream that the library can follow.

    Always: the first provider is faulty each time, and one of another dialect takes over. Once: there is no other.
    """
    fault, healthy = breaking(how, place), rest_of(SPOKEN)
    speakers: list[tuple[Kind, Any]] = (
        [("responses", fault), ("messages", healthy)] if always else [("responses", [fault, healthy])]
    )
    defaults = QUICK if always else QUICK.replace('"0s"', '"5s"')
    async with serving(tmp_path, *speakers, defaults=defaults) as served:
        (events, response), whole = await asyncio.gather(served.stream(tools=[WEATHER]), served.create(tools=[WEATHER]))

    for got in (response, whole):
        assert got.status == "completed"
        assert got.output_text == SPOKEN.text
        assert calls_of(got) == [("weather", json.loads(ARGUMENTS)), ("weather", json.loads(OTHER_ARGUMENTS))]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == SPOKEN.text
    assert kinds_of(events).count("response.completed") == kinds_of(events).count("response.created") == 1
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(numbers)


@every_kind
async def test_text_is_taken_up_by_an_upstream_of_any_dialect(kind: Kind, tmp_path: Path) -> None:
    """In the item that the first one had opened; the conversation then goes on from the answer as the client has it."""
    async with serving(
        tmp_path, ("responses", Said(text=TEXT, how="eof")), (kind, rest_of(Said(text=TEXT))), defaults=QUICK
    ) as served:
        _, response = await served.stream()
        again = await served.create(previous_response_id=response.id, input="Once more.")
        sent = texts_of(bodies(served.upstreams[1])[-1])

    assert [item.type for item in response.output] == ["message"]
    assert response.output_text == again.output_text == TEXT
    assert sent.count(TEXT) == 1


@pytest.mark.parametrize("place", ["before_content", "mid_text"])
@pytest.mark.parametrize("status", [429, 500])
async def test_a_response_that_failed(status: int, place: Any, tmp_path: Path) -> None:
    """The vendor's own way to end an answer badly is never passed on while somebody else can answer."""
    failed = Turn(Answer(text=TEXT, pace_s=0.005), Fault("error", place, status=status))
    async with ResponsesUpstream(failed) as one, speaking("responses", rest_of(Said(text=TEXT))) as two:
        text = toml({"one": ("responses", one.base_url), "two": ("responses", two.base_url)})
        async with daemon(text, tmp_path) as running, library(running) as client:
            _, response = await Served(running, client, [one, two]).stream()

    assert response.output_text == TEXT


@pytest.mark.parametrize("place", ["mid_text", "mid_call"])
async def test_nobody_left_is_an_error_and_no_end(place: str, tmp_path: Path) -> None:
    """The library raises; no end was said, and no half call."""
    async with serving(tmp_path, ("responses", breaking("eof", place)), defaults=QUICK) as served:
        events: list[Any] = []
        with pytest.raises(openai.APIError):
            await served.hear(events, tools=[WEATHER])

    assert events
    assert not {"response.completed", "response.incomplete"} & set(kinds_of(events))
    assert not [event for event in events if "function_call" in event.type]


@every_kind
@pytest.mark.parametrize("place", ["first", "mid_text", "mid_call"])
async def test_signs_of_life(kind: Kind, place: Any, tmp_path: Path) -> None:
    """While the upstream is silent the library hears that the answer is in progress, and the answer stays as it was."""
    said = Said(text=CALLS.text, calls=CALLS.calls, how="pause", place=place, pause_s=0.6)
    async with serving(tmp_path, (kind, said), defaults='keepalive = "100ms"') as served:
        patient = served.client.with_options(timeout=0.4)  # per read: without signs of life this would not do
        async with patient.responses.stream(**ASK, tools=[WEATHER]) as stream:
            events = [event async for event in stream]
            response = await stream.get_final_response()

    assert kinds_of(events).count("response.in_progress") > 3
    assert kinds_of(events).count("response.created") == 1
    assert response.output_text == CALLS.text
    assert calls_of(response) == [("weather", json.loads(ARGUMENTS)), ("weather", json.loads(OTHER_ARGUMENTS))]


# --- the books --------------------------------------------------------------------------------------------------------


async def test_exchanges_are_counted_like_all_others(tmp_path: Path) -> None:
    """Quotas move the traffic on, the log and the metrics name the dialect, tokens and dollars are booked."""
    limits = 'limits = [ { requests = 1, per = "day", resets = "UTC" } ]'
    async with serving(
        tmp_path, ("responses", Said(text=TEXT)), ("responses", Said(text=TEXT)), extra=limits
    ) as served:
        for _ in range(2):
            await served.create()
        with pytest.raises(openai.RateLimitError) as refused:
            await served.create(extra_headers={"x-test": "1"})
        lines = served.daemon.exchanges

    assert int(refused.value.response.headers["retry-after"]) > 0
    assert [line["dialect"] for line in lines] == ["responses"] * 3
    assert [line["outcome"] for line in lines] == ["success", "success", "rate_limited"]
    assert [line["attempts"][0]["provider"] for line in lines[:2]] == ["p0", "p1"]
    booked = served.daemon.metric("routerd_tokens_total", provider="p0", model=MODEL, kind="input")
    assert booked == 40
    assert served.daemon.total("routerd_cost_usd_total") > 0
    labels = {"route": "auto", "dialect": "responses", "outcome": "success"}
    assert served.daemon.metric("routerd_exchanges_total", **labels) == 2


async def test_a_budget_ends_them(tmp_path: Path) -> None:
    """With a status that clients wait after, and in this API's shape."""
    async with serving(tmp_path, ("responses", Said(text=TEXT)), defaults='max_wait = "0s"', budget=1e-4) as served:
        await served.create(max_output_tokens=16)
        with pytest.raises(openai.RateLimitError) as refused:
            await served.create(max_output_tokens=16)

    assert refused.value.code == "over_budget"
    assert len(served.sent) == 1


async def test_the_ledger_has_them(tmp_path: Path) -> None:
    """With what they used."""
    url = f"sqlite:{tmp_path}/routerd.db"
    async with serving(tmp_path, ("responses", Said(text=TEXT)), state=url) as served:
        await served.create()
        await served.stream()
    (total,) = saved_totals(url, 0.0, ("route", "provider"))

    assert total.group == ("auto", "p0")
    assert (total.attempts, total.input_tokens, total.output_tokens) == (2, 80, 40)


async def test_a_breaker_opens_for_them(tmp_path: Path) -> None:
    """After three failures the first provider is left in peace."""
    speakers: list[tuple[Kind, Any]] = [("responses", Said(status=500)), ("responses", Said(text=TEXT))]
    async with serving(tmp_path, *speakers) as served:
        for _ in range(5):
            await served.create()

    assert [len(bodies(upstream)) for upstream in served.upstreams] == [3, 5]
    labels = {"provider": "p0", "model": MODEL, "to": "open"}
    assert served.daemon.metric("routerd_breaker_transitions_total", **labels) == 1


async def test_tokens_are_counted_here(tmp_path: Path) -> None:
    """With the conversation that is named; no upstream is asked."""
    async with serving(tmp_path, ("responses", Said(text=TEXT * 100))) as served:
        first = await served.create()
        alone = await served.client.responses.input_tokens.count(**ASK)
        chained = await served.client.responses.input_tokens.count(**ASK, previous_response_id=first.id)

    assert 0 < alone.input_tokens < 100
    assert chained.input_tokens > 1000
    assert len(served.sent) == 1


async def test_pass_through(tmp_path: Path) -> None:
    """Where both speak this API, what the upstream says beyond what we know of goes through, and so do fields."""
    async with serving(tmp_path, ("responses", Said(text=TEXT))) as served:
        events, _ = await served.stream(extra_body={"verbosity_of_tomorrow": "low"})

    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert served.sent[0]["verbosity_of_tomorrow"] == "low"
    assert served.upstreams[0].requests[0].path == RESPONSES  # type: ignore[union-attr]
    assert all(event.model_extra == {} or event.obfuscation for event in deltas)
