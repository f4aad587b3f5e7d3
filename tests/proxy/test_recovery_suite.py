"""Every fault at every place of an answer: the client gets one whole answer, and never learns of it.

Each test is one fault at one place. In it a daemon serves several exchanges side by side, each over upstreams of its
own: streamed or not, delivered live or whole, an answer in text or one that ends in two tool calls; with a second
upstream that is healthy, or with the faulty one alone, which is healthy from its second request on. How long that took
stands in the summary at the end of the session.

The healthy upstream behaves like a model: it has a wording of its own, but asked to go on with the other's text it goes
on with that.

Chat is taken through all of it. What the other dialects add is that answers pass as they came and are gone on with in
our own words, or are our own words from the first: for these, three ways of mixing dialects and the commonest requests.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from routerd.canonical import End, Event, Finish, ReasoningDelta, Start, TextDelta, ToolDelta, ToolStart, UsageReport
from routerd.dialects import DIALECTS
from routerd.proxy.scripts import gone_on_with
from routerd.proxy.simulated import PLACED_KINDS, PLACES, Answer, Call, Fault, Kind, Place, Received, Turn
from tests.fakes import ScriptedUpstream
from tests.proxy.wire import CHAT, Heard, hear
from tests.responses_fake import RESPONSES, ResponsesUpstream
from tests.rig import HELLO, MODEL, WEATHER, Daemon, daemon, provider

LIMIT_S = 0.6  # for the first token, and for silence after it
PACE_S = 0.002  # between the events of the faulty one, so that each is a read of its own
SPARE_S = 1.0  # what a recovery may cost beyond the limits and pauses it has to keep
PAUSE_S = 0.5  # before the only upstream there is is asked again
SETTINGS = f"""
first_token_timeout = "{int(LIMIT_S * 1000)}ms"
stall_timeout = "{int(LIMIT_S * 1000)}ms"
answer_timeout = "{int(LIMIT_S * 1000)}ms"
"""
FIRST_TEXT = "I look up the weather in both cities. It may take a moment, since the service is slow today."
OTHER_TEXT = "Let me ask the weather service about the two of them, one after the other, and compare."
CALLS = (Call("weather", '{"city": "Oslo", "days": 3}'), Call("weather", '{"city": "Reykjavik"}'))
TOOLS = {"tools": [WEATHER]}

# --- cases ----------------------------------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """The dialects of the client, the faulty upstream, and the healthy one."""

    client: str = "chat"
    faulty: str = "chat"
    healthy: str = "chat"


class Variant(NamedTuple):
    """One exchange of a test. ``alone``: there is no other upstream."""

    stream: bool
    whole: bool
    calls: bool
    alone: bool
    mixture: Mixture = Mixture()

    def __str__(self) -> str:
        words = ("stream" if self.stream else "body", "whole" if self.whole else "live")
        return " ".join((*words, "calls" if self.calls else "text", "alone" if self.alone else "pair", *self.mixture))


VARIANTS = [
    Variant(stream, whole, calls, alone)
    for stream in (True, False)
    for whole in (False, True)
    for calls in (False, True)
    for alone in (False, True)
]
PASSED_ON = Mixture("responses", "responses", "chat")
MIXTURES = (PASSED_ON, Mixture("responses", "chat", "responses"), Mixture("chat", "responses", "responses"))
MIXED_VARIANTS = [
    Variant(stream, whole=False, calls=calls, alone=alone, mixture=mixture)
    for stream in (True, False)
    for calls in (False, True)
    for alone, mixture in [(False, mixture) for mixture in MIXTURES] + [(True, PASSED_ON)] * stream
]
SPEAKERS = {"chat": ScriptedUpstream, "responses": ResponsesUpstream}
IN_CALLS: tuple[Place, ...] = ("mid_call", "between_calls")
STATUSES = (400, 401, 402, 403, 404, 413, 422, 429, 500, 502, 503, 529)
PASSING = (429, 500, 502, 503, 529)  # refusals after which the only upstream is asked again
SPOILS: tuple[Kind, ...] = (
    "html",
    "json_error",
    "json_body",
    "empty",
    "empty_content",
    "bad_arguments",
    "cut_arguments",
    "length",
)
ONLY_IN_CALLS: tuple[Kind, ...] = ("bad_arguments", "cut_arguments", "length")  # in a text they would be no fault


def _status(status: int) -> Fault:
    return Fault("status", status=status, headers=(("retry-after", "1"),) if status == 429 else ())


PLACED = {
    f"{kind} {place}": Fault(kind, place, seconds=LIMIT_S / 4)
    for kind in PLACED_KINDS
    if kind != "pause"
    for place in PLACES
}
PAUSED = {f"pause {place}": Fault("pause", place, seconds=LIMIT_S / 4) for place in PLACES}
REFUSED = {str(status): _status(status) for status in STATUSES} | {"refuse": Fault("refuse", seconds=LIMIT_S / 2)}
SPOILT: dict[str, Fault] = {kind: Fault(kind) for kind in SPOILS}
FAULTS = PLACED | PAUSED | REFUSED | SPOILT


def variants(fault: Fault, among: Sequence[Variant] = VARIANTS) -> list[Variant]:
    """Those in which it is a fault, and in which somebody can answer after it."""
    found = list(among)
    if (fault.kind in PLACED_KINDS and fault.place in IN_CALLS) or fault.kind in ONLY_IN_CALLS:
        found = [variant for variant in found if variant.calls]
    if fault.kind == "status" and fault.status not in PASSING:
        found = [variant for variant in found if not variant.alone]
    return found


# --- what is asked and answered -------------------------------------------------------------------------------------


def answer(text: str, variant: Variant) -> Answer:
    return Answer(text=text, reasoning=f"Thinking: {text}", calls=CALLS if variant.calls else ())


def model(text: str, variant: Variant) -> Callable[[Received], Turn]:
    """A healthy model with this wording."""
    return lambda request: Turn(gone_on_with(answer(text, variant), request, (answer(FIRST_TEXT, variant),)))


def faulty(fault: Fault, variant: Variant, pace_s: float) -> list[Turn | Callable[[Received], Turn]]:
    """It fails every time if there is another one, else once."""
    turn = Turn(msgspec.structs.replace(answer(FIRST_TEXT, variant), pace_s=pace_s), fault)
    return [turn, model(FIRST_TEXT, variant)] if variant.alone else [turn]


def request(variant: Variant, route: str) -> dict[str, Any]:
    if variant.mixture.client == "responses":
        asked: dict[str, Any] = {"model": route, "input": "Hello.", "stream": variant.stream}
        function: Any = WEATHER["function"]
        return asked | ({"tools": [{"type": "function", **function}]} if variant.calls else {})
    body = {"model": route, "stream": variant.stream} | (TOOLS if variant.calls else {})
    return HELLO | body | ({"stream_options": {"include_usage": True}} if variant.stream else {})


class Pair:
    """The upstreams of one exchange, and its route."""

    def __init__(self, number: int, variant: Variant, upstreams: Sequence[ScriptedUpstream]) -> None:
        self.variant = variant
        self.upstreams = dict(zip((f"first{number}", f"other{number}"), upstreams, strict=False))
        self.route = f"route{number}"

    @property
    def toml(self) -> str:
        tiers = ", ".join(f'"{name}/{MODEL}"' for name in self.upstreams)
        delivery = "whole" if self.variant.whole else "live"
        route = f'[routes.{self.route}]\nmodels = [{tiers}]\ndelivery = "{delivery}"\n'
        speakers = self.upstreams.items()
        return route + "".join(provider(name, one.base_url, dialect=one.dialect) for name, one in speakers)

    async def ask(self, served: Daemon) -> Heard:
        path = RESPONSES if self.variant.mixture.client == "responses" else CHAT
        return await hear(served.url, request(self.variant, self.route), path=path)

    @property
    def requests(self) -> int:
        return sum(len(upstream.requests) for upstream in self.upstreams.values())


@asynccontextmanager
async def serving(
    cases: Sequence[tuple[Fault, Variant]], folder: Path, *, pace_s: float = PACE_S
) -> AsyncIterator[tuple[Daemon, list[Pair]]]:
    """A daemon with a route and upstreams for each case. Leaves no task and no connection behind."""
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        pairs = []
        for number, (fault, variant) in enumerate(cases):
            scripts = [faulty(fault, variant, pace_s)] + ([] if variant.alone else [[model(OTHER_TEXT, variant)]])
            speakers = [SPEAKERS[dialect] for dialect in variant.mixture[1:]]
            started = [
                await stack.enter_async_context(speaker(*script))
                for speaker, script in zip(speakers, scripts, strict=False)
            ]
            pairs.append(Pair(number, variant, started))
        text = f'[server]\nlisten = "127.0.0.1:0"\n[state]\nurl = "memory:"\n[defaults]\n{SETTINGS}\n'
        async with daemon(text + "".join(pair.toml for pair in pairs), folder) as served:
            yield served, pairs
            for upstream in _all(pairs):
                await upstream.idle()
            assert served.total("routerd_open_exchanges") == 0
        for upstream in _all(pairs):
            await upstream.until(lambda upstream=upstream: not upstream.open_connections)  # type: ignore[misc]
    assert asyncio.all_tasks() == before


def _all(pairs: Sequence[Pair]) -> Iterator[ScriptedUpstream]:
    return (upstream for pair in pairs for upstream in pair.upstreams.values())


# --- the law --------------------------------------------------------------------------------------------------------


class Got(NamedTuple):
    """What a client makes of an answer."""

    text: str
    calls: tuple[Call, ...]
    finish: str


def got_from_events(events: Sequence[Event]) -> Got:
    """By our own decoder. One beginning, one finish, one end, one usage, and all of it in order."""
    kinds = [type(event) for event in events if not isinstance(event, ReasoningDelta | TextDelta | ToolDelta)]
    calls = [event for event in events if isinstance(event, ToolStart)]
    assert [kind for kind in kinds if kind is not ToolStart] == [Start, Finish, UsageReport, End]
    arguments = {
        call.index: "".join(
            event.arguments for event in events if isinstance(event, ToolDelta) and event.index == call.index
        )
        for call in calls
    }
    return Got(
        "".join(event.text for event in events if isinstance(event, TextDelta)),
        tuple(Call(call.name, arguments[call.index]) for call in calls),
        next(event.reason for event in events if isinstance(event, Finish)),
    )


def got_from_completion(completion: Any) -> Got:
    """By the OpenAI SDK's own types."""
    (choice,) = completion.choices
    calls = choice.message.tool_calls or ()
    assert len({call.id for call in calls}) == len(calls)
    return Got(
        choice.message.content or "",
        tuple(Call(call.function.name, call.function.arguments) for call in calls),
        choice.finish_reason,
    )


def got_from_response(body: Any) -> Got:
    """By the OpenAI SDK's own types."""
    response = Response.model_validate(body, strict=True)
    calls = [item for item in response.output if item.type == "function_call"]
    assert response.status == "completed"
    assert len({call.call_id for call in calls}) == len(calls)
    assert len({item.id for item in response.output}) == len(response.output)
    return Got(
        response.output_text,
        tuple(Call(call.name, call.arguments) for call in calls),
        "tool_calls" if calls else "stop",
    )


def got_in_responses(heard: Heard, variant: Variant) -> Got:
    """The last event's response says the same as the pieces before it, which are numbered."""
    if not variant.stream:
        return got_from_response(heard.json)
    numbers = [chunk["sequence_number"] for chunk in heard.chunks]
    assert numbers == sorted(numbers)
    found = got_from_response(heard.chunks[-1]["response"])
    assert found == got_from_events(events_of(heard, "responses"))
    return found


def events_of(heard: Heard, dialect: str) -> list[Event]:
    decoder = DIALECTS[dialect].decoder()
    return [event for frame in [*decoder.feed(heard.data), *decoder.close()] for event in frame.events]


def got(heard: Heard, variant: Variant) -> Got:
    """What the client has. Both readers agree on a stream."""
    assert heard.status == 200, heard.data
    assert not heard.torn
    if variant.mixture.client == "responses":
        return got_in_responses(heard, variant)
    if not variant.stream:
        return got_from_completion(ChatCompletion.model_validate(heard.json, strict=True))
    assert heard.data.endswith(b"data: [DONE]\n\n")
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in heard.chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    found = got_from_completion(state.get_final_completion())
    assert found == got_from_events(events_of(heard, "chat"))
    return found


def expected(fault: Fault, variant: Variant) -> Got:
    """The first one's wording if the client had any of it, or if it came through in the end; else the other's."""
    placed = fault.kind in PLACED_KINDS
    begun = placed and PLACES.index(fault.place) >= PLACES.index("mid_text")
    kept = variant.alone or (fault.kind == "pause") or (begun and variant.stream and not variant.whole)
    text = FIRST_TEXT if kept or (not placed and _kept_text(fault, variant)) else OTHER_TEXT
    return Got(text, CALLS if variant.calls else (), "tool_calls" if variant.calls else "stop")


def _kept_text(fault: Fault, variant: Variant) -> bool:
    """Text in front of calls that turn out to be bad is out when that is seen."""
    return fault.kind in ONLY_IN_CALLS and variant.stream and not variant.whole


Counts = dict[tuple[str, str], float]  # provider and outcome


def counted(served: Daemon) -> Counts:
    """The attempts as the metrics have them."""
    (family,) = served.registry.restricted_registry(["routerd_attempts_total"]).collect()
    return {
        (sample.labels["provider"], sample.labels["outcome"]): sample.value for sample in family.samples if sample.value
    }


def check_books(served: Daemon, pair: Pair, counts: Counts) -> float:
    """Every attempt was settled once, in the log and in the metrics; gives the seconds the exchange took."""
    (line,) = (line for line in served.exchanges if line["route"] == pair.route)
    attempts = line["attempts"]
    outcomes = [(attempt["provider"], attempt["outcome"]) for attempt in attempts]
    assert line["outcome"] == "success"
    assert [outcome == "success" for _, outcome in outcomes] == [False] * (len(outcomes) - 1) + [True]
    assert {key: value for key, value in counts.items() if key[0] in pair.upstreams} == Counter(outcomes)
    sent = len(outcomes) - sum(attempt.get("code") == "connect" for attempt in attempts)
    given_up = sum(attempt.get("code") == "first_token_timeout" for attempt in attempts)  # perhaps before it was sent
    assert sent - given_up <= pair.requests <= sent, attempts
    seconds: float = line["duration_s"]
    return seconds


Record = Callable[[str, object], None]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_no_turn_is_lost(fault: Fault, tmp_path: Path, record_property: Record) -> None:
    """The answer is whole, well formed, and said once; each attempt is settled once; nothing is left running."""
    await check_no_turn_is_lost(fault, variants(fault), tmp_path, record_property)


@pytest.mark.parametrize("fault", (PLACED | SPOILT).values(), ids=PLACED | SPOILT)
async def test_no_turn_is_lost_between_dialects(fault: Fault, tmp_path: Path, record_property: Record) -> None:
    """The same, however the dialects are mixed."""
    await check_no_turn_is_lost(fault, variants(fault, MIXED_VARIANTS), tmp_path, record_property)


async def check_no_turn_is_lost(fault: Fault, among: Sequence[Variant], folder: Path, record_property: Record) -> None:
    async with serving([(fault, variant) for variant in among], folder) as (served, pairs):
        heard = await asyncio.gather(*(pair.ask(served) for pair in pairs))
        counts, seconds = counted(served), dict[str, float]()
        for pair, one in zip(pairs, heard, strict=True):
            assert got(one, pair.variant) == expected(fault, pair.variant), str(pair.variant)
            took_s = check_books(served, pair, counts)
            group = "alone" if pair.variant.alone else "whole" if pair.variant.whole else "live"
            seconds[group] = max(seconds.get(group, 0.0), took_s)
            allowed_s = SPARE_S + (LIMIT_S + 2 * PAUSE_S if pair.variant.alone else LIMIT_S)
            assert took_s < allowed_s + 1.0 * (fault.status == 429), str(pair.variant)
    record_property("seconds", "  ".join(f"{group} {value:5.2f}" for group, value in seconds.items()))


@pytest.mark.parametrize("kind", [kind for kind in PLACED_KINDS if kind != "pause"])
async def test_no_turn_is_lost_when_all_comes_in_one_read(kind: Kind, tmp_path: Path) -> None:
    """What a read brings beside the fault may be sent or forgotten: the answer is whole and said once all the same."""
    faults = [Fault(kind, place) for place in PLACES[2:]]
    cases = [(fault, variant) for fault in faults for variant in variants(fault) if not variant.alone]
    async with serving(cases, tmp_path, pace_s=0.0) as (served, pairs):
        heard = await asyncio.gather(*(pair.ask(served) for pair in pairs))
        counts = counted(served)
        for (fault, variant), pair, one in zip(cases, pairs, heard, strict=True):
            either = [expected(fault, variant)._replace(text=text) for text in (FIRST_TEXT, OTHER_TEXT)]
            assert got(one, variant) in either, f"{fault.place}: {variant}"
            check_books(served, pair, counts)
