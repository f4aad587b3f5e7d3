"""Whatever one upstream does before content is with the client, another one's answer is all the client sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from routerd.proxy.simulated import Answer, Fault, Turn
from tests.fakes import ScriptedUpstream, Upstreams, call
from tests.proxy.wire import (
    Heard,
    RawUpstream,
    Talk,
    error_of,
    event,
    get,
    hear,
    streamed,
)
from tests.rig import HELLO, KEY, MODEL, WEATHER, Daemon, config_text, daemon

# One failure opens a breaker here, so that an open one proves a failure and a closed one proves a neutral end.
TOUCHY = """
first_token_timeout = "300ms"
stall_timeout = "300ms"
answer_timeout = "300ms"
breaker = { failures = 1 }
"""
MARKER = "marker-of-the-upstream sk-or-v1-0123456789abcdef"
TELLTALE = json.dumps({"error": {"message": MARKER, "type": MARKER, "param": MARKER, "code": MARKER}}).encode()

GOOD = Answer(text="An answer from the healthy one.")
SPOILT = Answer(text="words-of-the-faulty-one")
ASKED = (Answer(calls=(call("weather", city="Oslo"),)), Answer(calls=(call("weather", city="Nowhere"),)))


class Case(NamedTuple):
    """A fault, the outcome the verdict table gives it, and whose breaker opens: "", the model's, or "*" the account's.

    ``unstreamed``: the outcome where the upstream answers in one piece; None where it would be no fault.
    """

    fault: Fault
    outcome: str
    opens: str = ""
    unstreamed: str | None = "the same"


def _status(status: int, *headers: tuple[str, str]) -> Fault:
    return Fault("status", status=status, headers=headers, body=TELLTALE)


STATUSES = {
    "400": Case(_status(400), "unsupported"),
    "401": Case(_status(401), "unauthorized", "*"),
    "402": Case(_status(402), "exhausted"),
    "403": Case(_status(403), "unauthorized", "*"),
    "404": Case(_status(404), "unsupported"),
    "413": Case(_status(413), "unsupported"),
    "422": Case(_status(422), "unsupported"),
    "429": Case(_status(429), "rate_limited"),
    "429 for an hour": Case(_status(429, ("retry-after", "3600")), "rate_limited"),
    "500": Case(_status(500), "unavailable", MODEL),
    "502": Case(_status(502), "unavailable", MODEL),
    "503": Case(_status(503), "unavailable", MODEL),
    "529": Case(_status(529), "unavailable", MODEL),
}
CONNECTIONS = {
    "refuses": Case(Fault("refuse"), "unavailable", "*"),
    "resets": Case(Fault("reset"), "unavailable", MODEL),
    "hangs": Case(Fault("stall"), "unavailable", MODEL),
    "closes": Case(Fault("eof"), "unavailable", MODEL),
    "tears its headers": Case(Fault("tear"), "unavailable", MODEL),
    "speaks no HTTP": Case(Fault("malformed"), "unavailable", MODEL),
    "resets after headers": Case(Fault("reset", "before_content"), "unavailable", MODEL),
    "hangs after headers": Case(Fault("stall", "before_content"), "unavailable", MODEL),
    "tears before content": Case(Fault("tear", "before_content"), "unavailable", MODEL),
}
ANSWERS = {
    "HTML": Case(Fault("html"), "malformed", MODEL),
    "JSON error": Case(Fault("json_error"), "in_band_error", MODEL),
    "JSON body for a stream": Case(Fault("json_body"), "malformed", MODEL, unstreamed=None),
    "empty": Case(Fault("empty"), "truncated", MODEL, unstreamed="malformed"),
    "no content": Case(Fault("empty_content"), "malformed", MODEL),
    "error event": Case(Fault("error", "before_content"), "in_band_error", MODEL),
    "end before content": Case(Fault("eof", "before_content"), "truncated", MODEL, unstreamed="malformed"),
    "malformed event": Case(Fault("malformed", "before_content"), "malformed", MODEL),
}


def _in_mode(case: Case, mode: str) -> Case:
    unstreamed = mode == "unstreamed" and case.unstreamed != "the same"
    return case._replace(outcome=case.unstreamed or "") if unstreamed else case


# How an answer is asked for: as a stream, whole (and streamed upstream all the same), or so that it cannot be streamed.
MODES: dict[str, dict[str, Any]] = {"stream": {"stream": True}, "whole": {}, "unstreamed": {"logprobs": True}}
CASES = {
    f"{name}, {mode}": (_in_mode(case, mode), mode)
    for name, case in (STATUSES | CONNECTIONS | ANSWERS).items()
    for mode in MODES
    if case.unstreamed or mode != "unstreamed"
}
CALLS = {"bad arguments": Fault("bad_arguments"), "cut arguments": Fault("cut_arguments")}


def _attempts(served: Daemon) -> list[tuple[str, str]]:
    """Provider and outcome of every attempt of the one exchange there was."""
    (exchange,) = served.exchanges
    return [(attempt["provider"], attempt["outcome"]) for attempt in exchange["attempts"]]


def _open_breakers(served: Daemon, provider: str) -> set[str]:
    """The models, or ``*``, whose breaker is open."""
    labels = {"provider": provider, "state": "open"}
    return {name for name in ("*", MODEL) if served.metric("routerd_breaker_state", model=name, **labels)}


@pytest.mark.parametrize(("case", "mode"), CASES.values(), ids=CASES)
async def test_fault_before_content_is_hidden(case: Case, mode: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """The client gets the healthy upstream's whole answer and nothing else; the books tell what happened."""
    faulty, healthy = await upstreams(Turn(SPOILT, case.fault)), await upstreams(Turn(GOOD))
    async with daemon(config_text({"a": faulty, "b": healthy}, defaults=TOUCHY), tmp_path) as served:
        heard = await hear(served.url, HELLO | MODES[mode])

        assert heard.status == 200
        assert not heard.torn
        assert GOOD.text == (heard.text if mode == "stream" else heard.json["choices"][0]["message"]["content"])
        assert b"faulty" not in heard.data
        assert b"marker" not in heard.data
        assert b'"error"' not in heard.data
        assert len(healthy.requests) == 1
        assert _attempts(served) == [("a", case.outcome), ("b", "success")]
        assert served.exchanges[0]["outcome"] == "success"
        assert served.metric("routerd_attempts_total", provider="a", model=MODEL, outcome=case.outcome) == 1
        assert served.metric("routerd_attempts_total", provider="b", model=MODEL, outcome="success") == 1
        assert served.total("routerd_attempts_total") == 2
        labels = {"from_provider": "a", "to_provider": "b", "outcome": case.outcome}
        assert served.metric("routerd_failovers_total", **labels) == 1
        assert served.total("routerd_failovers_total") == 1
        assert served.metric("routerd_exchanges_total", route="auto", dialect="chat", outcome="success") == 1
        assert _open_breakers(served, "a") == ({case.opens} if case.opens else set())
        assert not _open_breakers(served, "b")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", CALLS.values(), ids=CALLS)
async def test_unusable_tool_call_is_hidden(fault: Fault, mode: str, upstreams: Upstreams, tmp_path: Path) -> None:
    """A call whose arguments are not JSON costs the upstream a failure and never reaches the agent."""
    good, spoilt = ASKED
    faulty, healthy = await upstreams(Turn(spoilt, fault)), await upstreams(Turn(good))
    async with daemon(config_text({"a": faulty, "b": healthy}, defaults=TOUCHY), tmp_path) as served:
        heard = await hear(served.url, HELLO | MODES[mode] | {"tools": [WEATHER]})

        assert _arguments(heard, mode) == ['{"city": "Oslo"}']
        assert b"Nowhere" not in heard.data
        assert _attempts(served) == [("a", "malformed"), ("b", "success")]
        assert _open_breakers(served, "a") == {MODEL}


def _arguments(heard: Heard, mode: str) -> list[str]:
    if mode != "stream":
        calls = heard.json["choices"][0]["message"]["tool_calls"]
        return [call["function"]["arguments"] for call in calls]
    joined: dict[int, str] = {}
    for delta in heard.deltas:
        for piece in delta.get("tool_calls") or ():
            joined[piece["index"]] = joined.get(piece["index"], "") + piece["function"]["arguments"]
    return list(joined.values())


async def test_answer_names_the_upstream_it_came_from(upstreams: Upstreams, tmp_path: Path) -> None:
    """The headers tell who answered in the end, as which attempt, and under which id the log has it."""
    faulty, healthy = await upstreams(Turn(fault=Fault("status", status=500))), await upstreams()
    async with daemon(config_text({"a": faulty, "b": healthy}), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.headers["x-routerd-provider"] == "b"
        assert heard.headers["x-routerd-model"] == MODEL
        assert heard.headers["x-routerd-attempts"] == "2"
        assert heard.headers["x-routerd-exchange"] == served.exchanges[0]["exchange"]
        assert float(heard.headers["x-routerd-cost-usd"]) == pytest.approx(served.exchanges[0]["cost_usd"])


# --- what is learned ------------------------------------------------------------------------------------------------

LESSONS = {
    "400": (_status(400), 2),
    "401": (_status(401), 1),
    "402": (_status(402), 1),
    "404": (_status(404), 2),
    "429": (_status(429), 1),
    "429 for an hour": (_status(429, ("retry-after", "3600")), 1),
    "500": (_status(500), 2),
}


@pytest.mark.parametrize(("fault", "asked"), LESSONS.values(), ids=LESSONS)
async def test_lesson_for_the_next_request(fault: Fault, asked: int, upstreams: Upstreams, tmp_path: Path) -> None:
    """A refused key, an empty account or a spent allowance keeps the next request away; a mere misfit does not."""
    faulty, healthy = await upstreams(Turn(fault=fault)), await upstreams()
    async with daemon(config_text({"a": faulty, "b": healthy}), tmp_path) as served:
        statuses = [(await hear(served.url)).status for _ in range(2)]

        assert statuses == [200, 200]
        assert len(faulty.requests) == asked
        assert len(healthy.requests) == 2


@pytest.mark.parametrize("status", [400, 402, 404, 413, 429])
async def test_refusals_that_are_no_failures(status: int, upstreams: Upstreams, tmp_path: Path) -> None:
    """Being out of quota, or unfit for a request, never opens a breaker, however often it happens."""
    faulty, healthy = await upstreams(Turn(fault=_status(status))), await upstreams()
    async with daemon(config_text({"a": faulty, "b": healthy}, defaults=TOUCHY), tmp_path) as served:
        for _ in range(4):
            await hear(served.url)

        assert served.total("routerd_breaker_transitions_total") == 0


async def test_refused_key_opens_the_account_at_once(upstreams: Upstreams, tmp_path: Path) -> None:
    """One 401 is enough, whatever the policy, and it speaks of the key and not of the model."""
    faulty, healthy = await upstreams(Turn(fault=_status(401))), await upstreams()
    patient = "breaker = { failures = 1000, min_requests = 500 }"
    async with daemon(config_text({"a": faulty, "b": healthy}, defaults=patient), tmp_path) as served:
        await hear(served.url)

        assert _open_breakers(served, "a") == {"*"}
        assert served.metric("routerd_breaker_transitions_total", provider="a", model="*", to="open") == 1


async def test_failing_upstream_is_left_alone(upstreams: Upstreams, tmp_path: Path) -> None:
    """After three failures in a row its breaker is open and it is asked no more."""
    faulty, healthy = await upstreams(Turn(fault=_status(503))), await upstreams()
    async with daemon(config_text({"a": faulty, "b": healthy}), tmp_path) as served:
        statuses = [(await hear(served.url)).status for _ in range(6)]

        assert statuses == [200] * 6
        assert len(faulty.requests) == 3
        assert _open_breakers(served, "a") == {MODEL}


async def test_connection_that_died_while_idle_costs_nothing(upstreams: Upstreams, tmp_path: Path) -> None:
    """A kept-alive connection found dead on use is replaced unseen: no failure, no failover."""
    upstream = await upstreams(Turn(GOOD), Turn(fault=Fault("reset")), Turn(GOOD))
    async with daemon(config_text({"a": upstream}), tmp_path) as served:
        statuses = [(await hear(served.url)).status for _ in range(2)]

        assert statuses == [200, 200]
        assert len(upstream.requests) == 3
        assert served.total("routerd_attempts_total") == 2
        assert served.metric("routerd_attempts_total", provider="a", model=MODEL, outcome="success") == 2


# --- when nobody is left --------------------------------------------------------------------------------------------

HASTY = 'max_wait = "1s"\nmax_attempts = 3\n' + TOUCHY
LEFT_WITH_NOTHING = {
    "401": (_status(401), 503),
    "402": (_status(402), 429),
    "403": (_status(403), 503),
    "404": (_status(404), 503),
    "429 for an hour": (_status(429, ("retry-after", "3600")), 429),
    "500": (_status(500), 503),
    "503": (_status(503), 503),
    "529": (_status(529), 503),
    "refuses": (Fault("refuse"), 503),
    "hangs": (Fault("stall"), 503),
    "resets": (Fault("reset"), 503),
    "HTML": (Fault("html"), 503),
    "JSON error": (Fault("json_error"), 503),
    "no content": (Fault("empty_content"), 503),
}


@pytest.mark.parametrize("pair", [False, True], ids=["alone", "both"])
@pytest.mark.parametrize(("fault", "status"), LEFT_WITH_NOTHING.values(), ids=LEFT_WITH_NOTHING)
async def test_nobody_is_left(fault: Fault, status: int, pair: bool, upstreams: Upstreams, tmp_path: Path) -> None:
    """The client is told to come back, never something it would die of: 429 and when, or 503. No answer, no words."""
    names = ("a", "b") if pair else ("a",)
    faulty = {name: await upstreams(Turn(SPOILT, fault)) for name in names}
    async with daemon(config_text(faulty, defaults=HASTY), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == status
        assert len(error_of(heard)["message"]) < 120
        assert b"faulty" not in heard.data
        if status == 429:
            assert 2800 < int(heard.headers["Retry-After"]) <= 4320
        assert served.exchanges[0]["status"] == status
        assert served.exchanges[0]["outcome"] != "success"


async def test_known_reset_beyond_the_patience_is_told_at_once(upstreams: Upstreams, tmp_path: Path) -> None:
    """An hour is longer than ``max_wait``: no use in holding the request until that is over."""
    limited = await upstreams(Turn(fault=_status(429, ("retry-after", "3600"))))
    async with daemon(config_text({"a": limited}, defaults='max_wait = "300s"'), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 429
        assert heard.headers["Retry-After"] == "3600"
        assert heard.reads[-1][0] < 5
        assert len(limited.requests) == 1
        assert served.exchanges[0]["outcome"] == "rate_limited"


async def test_two_providers_agree_that_the_request_is_wrong(upstreams: Upstreams, tmp_path: Path) -> None:
    """An unknown 400 from a second provider is the client's own: told as 400, and nobody else is asked."""
    refusing = {name: await upstreams(Turn(fault=_status(400))) for name in ("a", "b", "c")}
    async with daemon(config_text(refusing, defaults=TOUCHY), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 400
        assert error_of(heard)["type"] == "invalid_request_error"
        assert _attempts(served) == [("a", "unsupported"), ("b", "client_error")]
        assert served.exchanges[0]["outcome"] == "client_error"
        assert not refusing["c"].requests
        assert served.total("routerd_breaker_transitions_total") == 0


async def test_only_provider_refuses_the_request(upstreams: Upstreams, tmp_path: Path) -> None:
    """With nobody else to ask, its 400 is final, but told in our words."""
    refusing = await upstreams(Turn(fault=_status(400)))
    async with daemon(config_text({"a": refusing}), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 400
        assert error_of(heard)["code"] == "invalid_request"
        assert "malformed" in error_of(heard)["message"]
        assert len(refusing.requests) == 1


async def test_request_longer_than_the_window(upstreams: Upstreams, tmp_path: Path) -> None:
    """An overflow is told in the words by which agents shorten their history, with the window's size."""
    overflow = json.dumps({"error": {"message": f"maximum context length is 8 tokens {MARKER}", "code": None}}).encode()
    upstream = await upstreams(Turn(fault=Fault("status", status=400, body=overflow)))
    async with daemon(config_text({"a": upstream}), tmp_path) as served:
        heard = await hear(served.url)

        assert heard.status == 400
        assert error_of(heard)["code"] == "context_length_exceeded"
        assert "maximum context length is 131072 tokens" in error_of(heard)["message"]
        assert b"marker" not in heard.data


# --- what never travels ---------------------------------------------------------------------------------------------

LOOSE_TONGUES: dict[str, bytes] = {
    "status 400": b"HTTP/1.1 400 Bad\r\ncontent-length: %d\r\n\r\n%b" % (len(TELLTALE), TELLTALE),
    "status 401": b"HTTP/1.1 401 No\r\ncontent-length: %d\r\n\r\n%b" % (len(TELLTALE), TELLTALE),
    "status 500": b"HTTP/1.1 500 No\r\ncontent-length: %d\r\n\r\n%b" % (len(TELLTALE), TELLTALE),
    "text": b"HTTP/1.1 502 %b\r\nx-reason: %b\r\nconnection: close\r\n\r\n%b" % ((MARKER.encode(),) * 3),
    "200": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n" + TELLTALE,
    "error event": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    + event({}, error={"message": MARKER, "code": MARKER}),
    "broken event": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ndata: {" + MARKER.encode() + b"\n\n",
    "after text": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    + event({"role": "assistant", "content": "Hi"})
    + event({}, error={"message": MARKER, "code": MARKER}),
}


@pytest.mark.parametrize("answer", LOOSE_TONGUES.values(), ids=LOOSE_TONGUES)
async def test_no_word_of_an_upstream_travels(answer: bytes, tmp_path: Path) -> None:
    """Error texts, and keys echoed in them, reach neither the client nor the log nor the metrics."""

    async def play(talk: Talk) -> None:
        await talk.send(answer)

    async with RawUpstream(play) as loose:
        upstreams: dict[str, Any] = {"a": loose}
        async with daemon(config_text(upstreams, defaults='max_wait = "0s"\nmax_attempts = 1'), tmp_path) as served:
            heard = await hear(served.url, streamed())
            metrics = await get(served.url, "/metrics")
            ready = await get(served.url, "/readyz")

            assert loose.talks
            everything = heard.data + str(heard.headers).encode() + metrics.data + ready.data + served.log_text.encode()
            for secret in ("marker-of-the-upstream", "sk-or-v1", KEY):
                assert secret.encode() not in everything
            assert served.exchanges


async def test_upstream_is_asked_with_its_own_key_only(upstreams: Upstreams, tmp_path: Path) -> None:
    """The client's credentials and headers stop here; the upstream gets its key and nothing of the client's."""
    upstream: ScriptedUpstream = await upstreams()
    mine = {"Authorization": "Bearer sk-of-the-client", "Cookie": "session=1", "X-Forwarded-For": "10.0.0.1"}
    async with daemon(config_text({"a": upstream}), tmp_path) as served:
        await hear(served.url, headers=mine)

        (request,) = upstream.requests
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert "sk-of-the-client" not in str(request.headers)
        assert not {"cookie", "x-forwarded-for"} & set(request.headers)
