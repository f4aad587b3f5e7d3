"""Recovery after the first word, one behaviour at a time; ``test_recovery_suite`` has every fault at every place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from routerd.canonical import COMPLETE
from routerd.proxy.scripts import gone_on_with
from routerd.proxy.simulated import Answer, Call, Fault, Received, Turn
from tests.fakes import Upstreams, call
from tests.proxy.wire import Heard, RawUpstream, Talk, call_event, event, hear, streamed
from tests.rig import HELLO, MODEL, WEATHER, Daemon, config_text, daemon

PATIENT = "breaker = { failures = 1000, ratio = 1.0, min_requests = 512 }\n"  # no breaker opens here
TEXT = "The report is written to disk. It has three parts, and the second of them needs a look."
ANSWER = Answer(text=TEXT, piece=8, pace_s=0.002, calls=())
OTHER = Answer(text="Other words for the same report.", calls=())
BROKEN = Turn(ANSWER, Fault("reset", "mid_text"))
SHOWN = TEXT[:8]  # what is out when it breaks
ASKING = HELLO | {"stream": True, "tools": [WEATHER]}
OSLO = call("weather", city="Oslo")

Habit = Callable[[str, str], str]  # what was shown, what is missing -> what the model says
HABITS: dict[str, Habit] = {
    "goes on": lambda shown, rest: rest,
    "repeats all of it": lambda shown, rest: shown + rest,
    "repeats the last words": lambda shown, rest: shown[-20:] + rest,
    "says so at the end": lambda shown, rest: rest + COMPLETE,
}


def model(answer: Answer = ANSWER, habit: Habit = HABITS["goes on"]) -> Callable[[Received], Turn]:
    """A model that goes on with what it is shown, in its own way."""

    def step(request: Received) -> Turn:
        given = gone_on_with(answer, request, (ANSWER,))
        if given is answer or not given.text or given.text == COMPLETE:
            return Turn(given)
        shown = TEXT[: len(TEXT) - len(given.text)]
        return Turn(msgspec.structs.replace(given, text=habit(shown, given.text)))

    return step


def said(heard: Heard) -> str:
    """A whole answer's text."""
    assert heard.status == 200
    assert not heard.torn
    assert heard.data.endswith(b"data: [DONE]\n\n")
    assert heard.finishes in (["stop"], ["tool_calls"], ["length"])
    return heard.text


def arguments(heard: Heard) -> list[str]:
    """Of each call."""
    joined: dict[int, str] = {}
    for delta in heard.deltas:
        for piece in delta.get("tool_calls") or ():
            joined[piece["index"]] = joined.get(piece["index"], "") + piece["function"]["arguments"]
    return list(joined.values())


def attempts(served: Daemon) -> list[tuple[str, str]]:
    (line,) = served.exchanges
    return [(attempt["provider"], attempt["outcome"]) for attempt in line["attempts"]]


def recoveries(served: Daemon) -> dict[tuple[str, str], float]:
    """Those that were made."""
    family = served.registry.restricted_registry(["routerd_recoveries_total"]).collect()
    samples = [sample for metric in family for sample in metric.samples if sample.value]
    return {(sample.labels["step"], sample.labels["result"]): sample.value for sample in samples}


# --- going on with a text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS)
async def test_a_model_that_is_asked_to_go_on(habit: Habit, upstreams: Upstreams, tmp_path: Path) -> None:
    """Whatever it repeats, the client has the text once; the question shows it how the text ended."""
    cut = Answer(text=TEXT[:60], piece=8, pace_s=0.002, calls=())
    faulty = await upstreams(Turn(cut, Fault("reset", "before_finish")))
    healthy = await upstreams(model(habit=habit))
    async with daemon(config_text({"a": faulty, "b": healthy}), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert attempts(served) == [("a", "truncated"), ("b", "success")]
        assert recoveries(served) == {("continue", "success"): 1}
        shown, question = healthy.requests[0].body["messages"][-2:]
        assert shown == {"role": "assistant", "content": TEXT[:60].rstrip()}
        assert question["role"] == "user"
        assert TEXT[:60].rstrip() in question["content"]


PREFILLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek": ({"prefix": True}, {}),
    "mistral": ({"prefix": True}, {}),
    "moonshot": ({"partial": True}, {}),
    "ollama": ({}, {}),
    "vllm": ({}, {"continue_final_message": True, "add_generation_prompt": False}),
}


@pytest.mark.parametrize("name", PREFILLS)
async def test_a_vendor_with_a_way_of_its_own(name: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """It is given the turn to go on writing, marked as it wants it; one that gives the turn back is not heard twice."""
    echo = HABITS["repeats all of it" if name == "mistral" else "goes on"]
    faulty, healthy = await upstreams(BROKEN), await upstreams(model(habit=echo))
    async with daemon(config_text({"a": faulty, name: healthy}), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        (request,) = healthy.requests
        marks, fields = PREFILLS[name]
        assert request.body["messages"][-1] == {"role": "assistant", "content": SHOWN.rstrip()} | marks
        assert fields.items() <= request.body.items()
        assert request.path == ("/beta/chat/completions" if name == "deepseek" else "/v1/chat/completions")


async def test_a_vendor_that_refuses_its_own_way_is_asked_in_words(upstreams: Upstreams, tmp_path: Path) -> None:
    """At once, and its refusal says nothing about it, nor about the client."""

    def refuses_prefill(request: Received) -> Turn:
        prefill = request.body["messages"][-1]["role"] == "assistant"
        return Turn(fault=Fault("status", status=400)) if prefill else model()(request)

    faulty, healthy = await upstreams(BROKEN), await upstreams(refuses_prefill)
    async with daemon(config_text({"a": faulty, "ollama": healthy}), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert attempts(served) == [("a", "truncated"), ("ollama", "unsupported"), ("ollama", "success")]
        assert served.total("routerd_breaker_transitions_total") == 0


async def test_one_break_after_the_other(upstreams: Upstreams, tmp_path: Path) -> None:
    """Each goes on where the one before it fell silent."""
    broken_again = lambda request: Turn(  # noqa: E731 - as short as a step can be
        msgspec.structs.replace(gone_on_with(ANSWER, request), pace_s=0.002), Fault("error", "mid_text")
    )
    scripts = {"a": BROKEN, "b": broken_again, "c": broken_again, "d": model()}
    servers = {name: await upstreams(step) for name, step in scripts.items()}
    async with daemon(config_text(servers), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert [provider_name for provider_name, _ in attempts(served)] == ["a", "b", "c", "d"]
        assert recoveries(served) == {("continue", "failure"): 2, ("continue", "success"): 1}


@pytest.mark.parametrize("silent", [False, True], ids=["says so", "says nothing"])
async def test_a_text_that_was_whole_stays_as_it_is(silent: bool, upstreams: Upstreams, tmp_path: Path) -> None:
    """Only its end was missing. A model that says so is believed; of those that just say nothing it takes two."""
    faulty = await upstreams(Turn(ANSWER, Fault("eof", "before_finish")))
    healthy = await upstreams(Turn(Answer(text="", calls=())) if silent else model())
    async with daemon(config_text({"a": faulty, "b": healthy}), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert attempts(served) == [("a", "truncated"), ("b", "malformed")] * silent + [
            ("a", "truncated"),
            ("b", "success"),
        ]


async def test_nothing_after_half_a_sentence_is_not_believed(upstreams: Upstreams, tmp_path: Path) -> None:
    """Not even from two. Either may have been right, so their breakers learn nothing; the next is asked in words."""
    nothing = Turn(Answer(text="", calls=()))
    servers = {"a": await upstreams(BROKEN), "b": await upstreams(nothing), "c": await upstreams(nothing)}
    servers["ollama"] = await upstreams(model())
    async with daemon(config_text(servers, defaults="breaker = { failures = 1 }"), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert attempts(served) == [("a", "truncated"), ("b", "malformed"), ("c", "malformed"), ("ollama", "success")]
        assert served.metric("routerd_breaker_state", provider="b", model=MODEL, state="closed") == 1
        assert COMPLETE in servers["ollama"].requests[0].body["messages"][-1]["content"]


async def test_calls_may_follow_what_is_gone_on_with(upstreams: Upstreams, tmp_path: Path) -> None:
    """The rest of the text, then the calls."""
    faulty = await upstreams(BROKEN)
    healthy = await upstreams(model(Answer(text=OTHER.text, calls=(OSLO,))))
    async with daemon(config_text({"a": faulty, "b": healthy}), tmp_path) as served:
        heard = await hear(served.url, ASKING)

        assert said(heard) == TEXT
        assert arguments(heard) == [OSLO.arguments]
        assert heard.finishes == ["tool_calls"]


# --- making the request again ---------------------------------------------------------------------------------------


async def test_a_call_that_broke_off_is_made_anew(upstreams: Upstreams, tmp_path: Path) -> None:
    """By the unchanged request: the client has the first one's words and the other one's call."""
    faulty = await upstreams(
        Turn(Answer(text=TEXT, calls=(call("weather", city="Nowhere"),), pace_s=0.002), Fault("reset", "mid_call"))
    )
    healthy = await upstreams(Turn(Answer(text=OTHER.text, calls=(OSLO,))))
    async with daemon(config_text({"a": faulty, "b": healthy}), tmp_path) as served:
        heard = await hear(served.url, ASKING)

        assert said(heard) == TEXT
        assert arguments(heard) == [OSLO.arguments]
        assert healthy.requests[0].body["messages"] == HELLO["messages"]
        assert recoveries(served) == {("continue", "success"): 1}


async def test_one_that_now_says_something_else_is_asked_to_go_on(upstreams: Upstreams, tmp_path: Path) -> None:
    """It was right in its way, so its breaker learns nothing; and nothing of it is heard."""
    faulty = await upstreams(Turn(Answer(text=TEXT, calls=(OSLO,), pace_s=0.002), Fault("reset", "mid_call")))

    def talks_first(request: Received) -> Turn:
        going_on = COMPLETE in request.body["messages"][-1]["content"]
        return Turn(Answer(text="", calls=(OSLO,)) if going_on else OTHER)

    healthy = await upstreams(talks_first)
    async with daemon(
        config_text({"a": faulty, "b": healthy}, defaults="breaker = { failures = 1 }"), tmp_path
    ) as served:
        heard = await hear(served.url, ASKING)

        assert said(heard) == TEXT
        assert arguments(heard) == [OSLO.arguments]
        assert attempts(served) == [("a", "truncated"), ("b", "malformed"), ("b", "success")]
        assert served.metric("routerd_breaker_state", provider="b", model=MODEL, state="closed") == 1


async def test_the_text_in_front_of_a_bad_call_is_delivered_to_its_end(tmp_path: Path) -> None:
    """Even where its last words came in the same read as the call that cannot be used."""
    spoilt = (
        event({"content": "second half."}) + call_event(0, '{"city', name="weather", id="call_1") + event({}, "stop")
    )

    async def play(talk: Talk) -> None:
        await talk.stream([event({"role": "assistant", "content": "First half, "}), spoilt])

    async def other(talk: Talk) -> None:
        good = call_event(0, OSLO.arguments, name="weather", id="call_2") + event({}, "tool_calls")
        await talk.stream([event({"role": "assistant", "content": "Words. "}), good, b"data: [DONE]\n\n"])

    async with RawUpstream(play) as faulty, RawUpstream(other) as healthy:
        servers: dict[str, Any] = {"a": faulty, "b": healthy}
        async with daemon(config_text(servers), tmp_path) as served:
            heard = await hear(served.url, ASKING)

    assert said(heard) == "First half, second half."
    assert arguments(heard) == [OSLO.arguments]


DOCUMENT = '{"city": "Oslo", "days": 3}'
AS_JSON = streamed(response_format={"type": "json_object"})


async def test_a_document_is_made_anew_if_it_begins_the_same(upstreams: Upstreams, tmp_path: Path) -> None:
    """Then only the rest is sent."""
    document = Answer(text=DOCUMENT, piece=8, pace_s=0.002, calls=())
    faulty, healthy = await upstreams(Turn(document, Fault("reset", "mid_text"))), await upstreams(Turn(document))
    async with daemon(config_text({"a": faulty, "b": healthy}), tmp_path) as served:
        heard = await hear(served.url, AS_JSON)

        assert said(heard) == DOCUMENT
        assert healthy.requests[0].body["messages"] == HELLO["messages"]


async def test_a_document_that_is_gone_on_with_is_checked(upstreams: Upstreams, tmp_path: Path) -> None:
    """One that begins otherwise cannot be used; of its continuations the first that makes a document is sent."""
    document = Answer(text=DOCUMENT, piece=8, pace_s=0.002, calls=())
    anew = Answer(text='{ "town": "Oslo" }', calls=())
    replies = [Turn(anew), Turn(anew), lambda request: Turn(gone_on_with(document, request))]
    faulty, healthy = await upstreams(Turn(document, Fault("reset", "mid_text"))), await upstreams(*replies)
    async with daemon(config_text({"a": faulty, "b": healthy}, defaults=PATIENT), tmp_path) as served:
        heard = await hear(served.url, AS_JSON)

        assert json.loads(said(heard)) == json.loads(DOCUMENT)
        assert ("b", "malformed") in attempts(served)


# --- what is passed on nevertheless ---------------------------------------------------------------------------------


async def test_arguments_that_could_be_repaired_are(upstreams: Upstreams, tmp_path: Path) -> None:
    """Without another attempt; the log says how many."""
    spoilt = Answer(calls=(Call("weather", '{"city": "Oslo",}'), Call("weather", json.dumps('{"city": "Rome"}'))))
    upstream = await upstreams(Turn(spoilt))
    body = ASKING | {"stream_options": {"include_usage": True}}
    async with daemon(config_text({"a": upstream}), tmp_path) as served:
        heard = await hear(served.url, body)

        assert arguments(heard) == ['{"city": "Oslo"}', '{"city": "Rome"}']
        assert [chunk["usage"]["prompt_tokens"] > 0 for chunk in heard.chunks if chunk.get("usage")] == [True]
        assert served.exchanges[0]["repairs"] == 2
        assert len(upstream.requests) == 1


async def test_a_tool_that_two_models_call_wrongly_is_called_wrongly(upstreams: Upstreams, tmp_path: Path) -> None:
    """The agent can tell the model what is wrong; nobody else can."""
    wrong = Turn(Answer(calls=(call("weather", town="Oslo"),)))
    servers = {"a": await upstreams(wrong), "b": await upstreams(wrong)}
    async with daemon(config_text(servers), tmp_path) as served:
        heard = await hear(served.url, ASKING)

        assert arguments(heard) == ['{"town": "Oslo"}']
        assert attempts(served) == [("a", "malformed"), ("b", "success")]


async def test_a_call_that_the_limit_cuts_everywhere_is_left_out(upstreams: Upstreams, tmp_path: Path) -> None:
    """The client gets the text, and learns about the limit; it does not get half a call."""
    cut = Turn(Answer(text=TEXT, calls=(OSLO,)), Fault("length"))
    servers = {"a": await upstreams(cut), "b": await upstreams(cut)}
    async with daemon(config_text(servers), tmp_path) as served:
        heard = await hear(served.url, ASKING)

        assert said(heard) == TEXT
        assert arguments(heard) == []
        assert heard.finishes == ["length"]


# --- when it cannot be recovered ------------------------------------------------------------------------------------


def assert_honest(heard: Heard) -> None:
    """No end, no finish, but an error that an agent takes for a reason to ask again, and a torn connection."""
    assert heard.torn
    assert b"[DONE]" not in heard.data
    assert heard.finishes == ["error"]
    message = heard.chunks[-1]["error"]["message"]
    assert message.startswith("Network error")
    # Hermes compresses a long history away when it reads these.
    assert not any(words in message.lower() for words in ("connection lost", "disconnected", "closed", "context"))


async def test_nobody_can_go_on(upstreams: Upstreams, tmp_path: Path) -> None:
    """What was said was said; the rest is an honest failure, after as many attempts as are allowed."""
    stubborn = lambda request: Turn(  # noqa: E731
        msgspec.structs.replace(gone_on_with(ANSWER, request), pace_s=0.002), Fault("reset", "mid_text")
    )
    upstream = await upstreams(stubborn)
    async with daemon(config_text({"a": upstream}, defaults=PATIENT + "max_attempts = 3"), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert_honest(heard)
        assert heard.text
        assert TEXT.startswith(heard.text)
        assert len(upstream.requests) == 3
        assert served.exchanges[0]["outcome"] == "truncated"


async def test_several_choices_cannot_be_put_together(upstreams: Upstreams, tmp_path: Path) -> None:
    """Nor can log probabilities: once some of it is out, a break is the end."""
    servers = {"a": await upstreams(BROKEN), "b": await upstreams(Turn(ANSWER))}
    async with daemon(config_text(servers), tmp_path) as served:
        heard = await hear(served.url, streamed(logprobs=True))

        assert_honest(heard)
        assert heard.text == SHOWN
        assert not servers["b"].requests


# --- how long it goes on --------------------------------------------------------------------------------------------


async def test_refusals_use_up_time_and_not_attempts(upstreams: Upstreams, tmp_path: Path) -> None:
    """An outage of everybody is sat out: what a refusal costs is a moment."""
    down = Turn(fault=Fault("status", status=503))
    servers = {name: await upstreams(down, down, Turn(ANSWER)) for name in ("a", "b")}
    settings = PATIENT + 'max_attempts = 1\nkeepalive = "200ms"'
    async with daemon(config_text(servers, defaults=settings), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert len(served.exchanges[0]["attempts"]) == 5
        assert recoveries(served) == {
            ("retry", "failure"): 3,
            ("retry", "success"): 1,
            ("wait", "failure"): 1,
            ("wait", "success"): 1,
        }


async def test_a_limit_that_was_learned_is_not_the_last_word(upstreams: Upstreams, tmp_path: Path) -> None:
    """Who suddenly takes longer is cut off once, and then waited for as long as the config allows."""
    slow = Turn(ANSWER, Fault("pause", "before_headers", seconds=0.5))
    upstream = await upstreams(*[Turn(OTHER)] * 10, slow, slow)
    settings = 'first_token_timeout = "2s"\nmin_first_token_timeout = "250ms"\nmin_stall_timeout = "250ms"'
    async with daemon(config_text({"a": upstream}, defaults=settings), tmp_path) as served:
        for _ in range(10):
            await hear(served.url, streamed())
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert [attempt["outcome"] for attempt in served.exchanges[-1]["attempts"]] == ["unavailable", "success"]


async def test_a_probe_is_counted(upstreams: Upstreams, tmp_path: Path) -> None:
    """It is a real request; who has lost time already makes none while somebody healthy is there."""
    faulty = await upstreams(Turn(fault=Fault("status", status=500)), Turn(ANSWER))
    healthy = await upstreams(Turn(OTHER))
    settings = 'breaker = { failures = 1, open = "100ms" }'
    async with daemon(config_text({"a": faulty, "b": healthy}, defaults=settings), tmp_path) as served:
        await hear(served.url, streamed())
        while not served.metric("routerd_recoveries_total", step="probe", result="success"):
            await hear(served.url, streamed())

        assert served.metric("routerd_breaker_state", provider="a", model=MODEL, state="closed") == 1
        assert len(faulty.requests) == 2


async def test_a_guess_about_a_quota_is_tested_when_nobody_else_is_left(upstreams: Upstreams, tmp_path: Path) -> None:
    """A refusal for want of money shuts an upstream out for an hour; but not if that would be the end."""
    broke = Turn(fault=Fault("status", status=402))
    servers = {"a": await upstreams(broke, Turn(ANSWER)), "b": await upstreams(broke, broke)}
    async with daemon(config_text(servers), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert attempts(served) == [("a", "exhausted"), ("b", "exhausted"), ("a", "success")]
        assert served.exchanges[0]["duration_s"] < 1.0


async def test_a_refusal_without_a_reason_is_doubted_when_nobody_else_is_left(
    upstreams: Upstreams, tmp_path: Path
) -> None:
    """It may have been an accident; with all others shut out for long it is worth a second question."""
    limited = Turn(fault=Fault("status", status=429, headers=(("retry-after", "3600"),)))
    odd = Turn(fault=Fault("status", status=400))
    servers = {"a": await upstreams(limited), "b": await upstreams(odd, Turn(ANSWER))}
    async with daemon(config_text(servers), tmp_path) as served:
        heard = await hear(served.url, streamed())

        assert said(heard) == TEXT
        assert attempts(served) == [("a", "rate_limited"), ("b", "unsupported"), ("b", "success")]
