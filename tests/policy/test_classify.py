"""Classifying refusals: any body becomes evidence, evidence a code, and a code what everybody learns from it."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routerd.canonical import Failure, Fault, Outcome, Side
from routerd.policy.classify import (
    CODES,
    MAX_BODY_BYTES,
    MAX_TEXT,
    NAMES,
    STATUSES,
    VERDICTS,
    WORDS,
    Code,
    Evidence,
    Verdict,
    agrees,
    blame_client,
    classify,
    classify_fault,
    effective_status,
    fault_evidence,
    read_evidence,
    verdict,
)


def classify_body(status: int, body: object) -> Failure:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return classify(read_evidence(status, {}, data))


def chat_error(message: str, kind: str | None = None, code: object = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


# --- reading bodies ---------------------------------------------------------------------------------------------------

SHAPES = {
    "object": (
        b'{"error":{"message":"No Such Thing","type":"invalid_request_error","param":"x","code":"model_not_found"}}',
        ("model_not_found", "invalid_request_error", "no such thing x"),
    ),
    "string": (b'{"error":"Model not found"}', ("", "", "model not found")),
    "string with a code beside it": (b'{"code":"a:b","error":"No money"}', ("a:b", "", "no money")),
    "array": (
        b'[{"error":{"code":429,"message":"Quota","status":"RESOURCE_EXHAUSTED"}}]',
        ("429", "resource_exhausted", "quota"),
    ),
    "flat": (
        b'{"object":"error","message":"Rate limited","type":"rate_limited","code":"1300"}',
        ("1300", "rate_limited", "rate limited"),
    ),
    "flat without a mark": (
        b'{"message":"Too many","type":"too_many_requests_error","param":"quota","code":"queue_exceeded"}',
        ("queue_exceeded", "too_many_requests_error", "too many quota"),
    ),
    "validator's list": (
        b'{"detail":[{"type":"extra_forbidden","loc":["body","x"],"msg":"Extra inputs","input":"SECRET"}]}',
        ("", "", "extra_forbidden ['body', 'x'] extra inputs"),
    ),
    "validator's text": (b'{"detail":"Function is DEGRADED"}', ("", "", "function is degraded")),
    "problem document": (
        b'{"status":429,"title":"Too Many Requests","detail":"Slow down"}',
        ("", "429", "too many requests slow down"),
    ),
    "result code in a 200": (
        b'{"base_resp":{"status_code":1008,"status_msg":"insufficient balance"}}',
        ("1008", "", "insufficient balance"),
    ),
    "messages": (
        b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"request_id":"r"}',
        ("", "overloaded_error", "overloaded"),
    ),
    "typed by a gateway": (
        b'{"error":{"code":502,"message":"Died","metadata":{"error_type":"provider_unavailable","raw":"{\\"a\\":1}"}}}',
        ("502", "provider_unavailable", 'died {"a":1}'),
    ),
    "inside a choice": (
        b'{"choices":[{"finish_reason":"error","error":{"code":502,"message":"Died"}}]}',
        ("502", "", "died"),
    ),
    "failed response": (
        (
            b'{"type":"response.failed","response":{"status":"failed","error":{"code":"server_error","message":"No"},'
            b'"error_type":"authentication"}}'
        ),
        ("server_error", "authentication", "no"),
    ),
    "string code, as an event": (
        b'data:{"error":{"code":"400","message":"Param Incorrect","param":"text is not set","type":""}}\n\n',
        ("400", "", "param incorrect text is not set"),
    ),
    "named event": (
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"No"}}\n\n',
        ("", "api_error", "no"),
    ),
    "web page": (b"<!DOCTYPE html><title>403 rate limit</title>", ("", "html", "")),
    "plain text": (b"Upstream Overloaded", ("", "", "upstream overloaded")),
    "empty": (b"", ("", "", "")),
    "number": (b"42", ("", "", "42")),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_known_shape_gives_its_code_kind_and_text(shape: str) -> None:
    """Whatever wrapper an upstream uses, code, type and message come out, lower-cased."""
    body, expected = SHAPES[shape]

    evidence = read_evidence(400, {}, body)

    assert expected == (evidence.code, evidence.kind, evidence.text)


def test_an_echoed_request_is_not_searched() -> None:
    """A validator repeats the client's own words; they must not be mistaken for the upstream's."""
    body = {"detail": [{"type": "missing", "loc": ["body"], "msg": "Field required", "input": "insufficient balance"}]}

    assert classify_body(422, body).code == Code.BAD_REQUEST


def test_header_names_are_lowered() -> None:
    """Hooks look headers up by lower-case name."""
    assert read_evidence(429, {"Retry-After": "7"}, b"").headers == {"retry-after": "7"}


def test_a_huge_body_is_cut() -> None:
    """No more of a body than the bound is read, and no more text than its bound is kept."""
    evidence = read_evidence(500, {}, b"x" * (MAX_BODY_BYTES * 2))

    assert len(evidence.text) == MAX_TEXT


@pytest.mark.parametrize(
    "body", [b"[" * 50_000, b'{"error":' * 5_000, b"\xff\xfe", b"\x00", b'{"error":{"code":1e999}}']
)
def test_hostile_bodies_are_read_as_text_or_nothing(body: bytes) -> None:
    """Deep nesting, broken encodings and impossible numbers change nothing about the status."""
    assert classify_body(500, body).outcome == Outcome.UNAVAILABLE


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["error", "code", "type", "message", "detail", "metadata", "choices", "details", "response", "status"]
            )
            | st.text(max_size=8),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(
    status=st.integers(-1, 1000) | st.none(),
    headers=st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=4),
    body=st.binary(max_size=300) | json_values.map(lambda value: orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)),
)
def test_anything_becomes_a_failure(status: int | None, headers: dict[str, str], body: bytes) -> None:
    """No status, header or body raises, and the words are always our own."""
    failure = classify(read_evidence(status, headers, body))

    assert failure.outcome is CODES[Code(failure.code)].outcome
    assert failure.detail == CODES[Code(failure.code)].detail


# --- finding the code -------------------------------------------------------------------------------------------------

OVERFLOW = "This model's maximum context length is 131072 tokens. However, you requested 140000 tokens"

REFUSALS: list[tuple[str, int, object, Code]] = [
    ("overflow by code", 400, chat_error("Too long", code="context_length_exceeded"), Code.CONTEXT_OVERFLOW),
    ("overflow by words", 400, {"object": "error", "message": OVERFLOW, "code": 400}, Code.CONTEXT_OVERFLOW),
    (
        "overflow, messages",
        400,
        chat_error("prompt is too long: 210000 tokens > 200000 maximum"),
        Code.CONTEXT_OVERFLOW,
    ),
    (
        "overflow, local server",
        400,
        {"error": {"code": 400, "message": "exceeds the available context size", "type": "exceed_context_size_error"}},
        Code.CONTEXT_OVERFLOW,
    ),
    ("overflow as 500", 500, chat_error("request exceeds the available context size"), Code.CONTEXT_OVERFLOW),
    (
        "overflow wrapped by a gateway",
        400,
        {"error": {"code": 400, "message": "Provider returned error", "metadata": {"raw": OVERFLOW}}},
        Code.CONTEXT_OVERFLOW,
    ),
    (
        "output cap is no overflow",
        400,
        chat_error("'max_tokens' is too large: 65536. This model's maximum context length is 32768 tokens"),
        Code.UNSUPPORTED_FEATURE,
    ),
    ("too large", 413, chat_error("Request too large", "tokens", "rate_limit_exceeded"), Code.TOO_LARGE),
    ("too large for any minute", 429, chat_error("Request too large for m on tokens per min (TPM)"), Code.TOO_LARGE),
    ("unknown model", 404, chat_error("The model `x` does not exist", code="model_not_found"), Code.MODEL_NOT_FOUND),
    ("unknown model as 400", 400, chat_error("x is not a valid model ID"), Code.MODEL_NOT_FOUND),
    ("unknown model as 503", 503, chat_error("No channel", code="model_not_found"), Code.MODEL_NOT_FOUND),
    ("retired model", 410, b"Gone", Code.MODEL_NOT_FOUND),
    ("wrong method", 405, b"", Code.MODEL_NOT_FOUND),
    ("missing feature", 400, chat_error("bad", code="unsupported_parameter"), Code.UNSUPPORTED_FEATURE),
    (
        "strict schema",
        422,
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "store"], "msg": "Extra inputs are not permitted"}]},
        Code.UNSUPPORTED_FEATURE,
    ),
    (
        "reasoning must come back",
        400,
        chat_error("The reasoning_content in the thinking mode must be passed back to the API."),
        Code.UNSUPPORTED_FEATURE,
    ),
    ("no prefill", 400, chat_error("This model does not support assistant message prefill."), Code.UNSUPPORTED_FEATURE),
    ("content rules", 400, chat_error("No", code="content_filter"), Code.MODERATION),
    ("content rules by words", 400, chat_error("Content Exists Risk", "invalid_request_error"), Code.MODERATION),
    ("content rules as 403", 403, chat_error("Your input was flagged by moderation"), Code.MODERATION),
    ("unknown 400", 400, chat_error("messages: roles must alternate", "invalid_request_error"), Code.BAD_REQUEST),
    ("unknown 422", 422, {"detail": "unprocessable"}, Code.BAD_REQUEST),
    ("teapot", 418, b"", Code.REJECTED),
    ("bad key", 401, chat_error("Incorrect API key provided", code="invalid_api_key"), Code.INVALID_KEY),
    ("bad key as 400", 400, chat_error("API key not valid. Please pass a valid API key."), Code.INVALID_KEY),
    ("no permission", 403, chat_error("Forbidden"), Code.NO_PERMISSION),
    ("model not in plan", 403, chat_error("this model requires a subscription, upgrade"), Code.MODEL_NOT_ALLOWED),
    ("firewall as 403", 403, b"<html><title>Just a moment...</title></html>", Code.BLOCKED),
    ("firewall as text", 403, b"error code: 1010", Code.BLOCKED),
    ("login page as 401", 401, b"  <!doctype html>", Code.BLOCKED),
    ("no money", 402, chat_error("Insufficient Balance"), Code.BALANCE),
    ("no money as 400", 400, chat_error("Your credit balance is too low to access the API."), Code.BALANCE),
    ("no money as 403", 403, chat_error("token quota is not enough", "api_error"), Code.BALANCE),
    ("no money as 429", 429, chat_error("You exceeded your current quota", code="insufficient_quota"), Code.BALANCE),
    ("billing error", 400, {"type": "error", "error": {"type": "billing_error", "message": "No"}}, Code.BALANCE),
    ("rate", 429, chat_error("Rate limit reached", "requests", "rate_limit_exceeded"), Code.QUOTA_MINUTE),
    ("rate, empty body", 429, b"", Code.QUOTA_MINUTE),
    ("rate as 400", 400, chat_error("Requests rate increased too quickly", "throttling"), Code.QUOTA_MINUTE),
    ("rate as 403", 403, chat_error("No", code="rate_limit_exceeded"), Code.QUOTA_MINUTE),
    ("per day", 429, chat_error("Rate limit reached on tokens per day (TPD): Limit 100000"), Code.QUOTA_DAY),
    ("per month", 429, chat_error("Monthly limit reached"), Code.QUOTA_MONTH),
    ("plan", 429, chat_error("You've reached your weekly usage limit"), Code.QUOTA_PLAN),
    ("concurrency", 429, chat_error("Too many concurrent requests"), Code.CONCURRENCY),
    ("crowded as 429", 429, chat_error("The engine is currently overloaded"), Code.OVERLOADED),
    ("crowded", 529, {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, Code.OVERLOADED),
    ("crowded, 503", 503, b"", Code.OVERLOADED),
    ("still loading", 503, chat_error("Loading model", "unavailable_error", 503), Code.OVERLOADED),
    ("flex capacity", 498, b"", Code.OVERLOADED),
    ("server error", 500, chat_error("Internal error"), Code.SERVER_ERROR),
    ("bad gateway", 502, b"<html>", Code.SERVER_ERROR),
    ("conflict", 409, b"", Code.SERVER_ERROR),
    ("redirect", 302, b"", Code.SERVER_ERROR),
    ("request timeout", 408, b"", Code.TIMEOUT),
    ("gateway timeout", 504, b"", Code.TIMEOUT),
    ("too early", 425, b"", Code.OVERLOADED),
    ("bad tool call", 400, chat_error("Failed to call", code="tool_use_failed"), Code.TOOL_USE_FAILED),
    ("page instead of an answer", 200, b"<html>welcome</html>", Code.NOT_AN_ANSWER),
    ("text instead of an answer", 200, b"daily limit of fun", Code.NOT_AN_ANSWER),
    ("other JSON", 200, {"hello": "world"}, Code.NOT_AN_ANSWER),
    ("nothing", 204, b"", Code.NOT_AN_ANSWER),
    ("refusal in a 200", 200, {"error": {"code": 429, "message": "Slow down"}}, Code.QUOTA_MINUTE),
    ("typed refusal in a 200", 200, {"error": {"type": "authentication_error", "message": "x"}}, Code.INVALID_KEY),
    ("unknown refusal in a 200", 200, {"error": {"message": "Oops"}}, Code.SERVER_ERROR),
]


@pytest.mark.parametrize(("name", "status", "body", "expected"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_each_refusal_finds_its_code(name: str, status: int, body: object, expected: Code) -> None:
    """The tables read what servers really send."""
    assert expected == classify_body(status, body).code, name


def test_the_vendors_own_reading_stands() -> None:
    """A restated code wins over status, names and words."""
    evidence = read_evidence(402, {}, b'{"error":{"code":"insufficient_quota","message":"x"}}')

    failure = classify(evidence, restated=Code.CONCURRENCY, retry_after_s=3.0)

    assert (failure.outcome, failure.status, failure.retry_after_s) == (Outcome.RATE_LIMITED, 402, 3.0)


@pytest.mark.parametrize("code", [Code.INVALID_KEY, Code.NO_PERMISSION, Code.BALANCE, Code.QUOTA_MONTH])
def test_what_concerns_the_account_says_so(code: Code) -> None:
    """Every model behind the same key shares these."""
    assert classify(Evidence(400), restated=code).account_wide


@pytest.mark.parametrize("code", [Code.MODEL_NOT_ALLOWED, Code.MODEL_BALANCE, Code.MODERATION, Code.QUOTA_DAY])
def test_what_concerns_one_model_leaves_the_account_alone(code: Code) -> None:
    """A model that is off limits says nothing about its neighbours."""
    assert not classify(Evidence(403), restated=code).account_wide


def test_a_telling_body_beats_a_vague_status() -> None:
    """A 400 whose body speaks of rate is a 429; a 413 stays what it is."""
    limited = Evidence(400, code="rate_limit_exceeded")

    assert effective_status(limited) == 429
    assert effective_status(Evidence(413, code="rate_limit_exceeded")) == 413


# --- our own words ----------------------------------------------------------------------------------------------------

# What agents look for in an error's text, and would act upon.
MISREAD = [
    "max_tokens", "limit exceeded", "exceeds the limit", "does not exist", "content_filter", "signature", "rate limit",
    "rate_limit", "too many requests", "try again in", "insufficient", "credit balance", "payment required", "quota",
    "usage limit", "overloaded", "at capacity", "context size", "context window", "maximum context", "token limit",
    "too many tokens", "input token", "prompt is too long", "model not found", "unknown model", "invalid model",
    "unsupported parameter", "unsupported model", "invalid_request_error", "invalid api key", "unauthorized",
    "forbidden", "authentication", "access denied", "timed out", "payload too large", "image exceeds", "flagged",
]  # fmt: skip


@pytest.mark.parametrize("code", Code)
def test_no_detail_reads_like_another_fault(code: Code) -> None:
    """An agent that greps our text must not start to compress its history because a key was retired."""
    detail = CODES[code].detail

    assert [phrase for phrase in MISREAD if phrase in detail] == []
    assert (code is Code.CONTEXT_OVERFLOW) == ("context length exceeded" in detail)


def test_every_table_speaks_of_known_codes_only() -> None:
    """The vocabulary is closed: each code has a meaning, each outcome a verdict."""
    assert set(Code) == set(CODES)
    assert set(Outcome) == set(VERDICTS)
    assert {*NAMES.values(), *STATUSES.values(), *(code for code, _ in WORDS)} <= set(Code)


def test_words_are_lower_case() -> None:
    """They are searched in lower-cased text, so a capital letter would never match."""
    assert [word for _, words in WORDS for word in words if word != word.lower()] == []


# --- verdicts ---------------------------------------------------------------------------------------------------------

TABLE = [
    (Outcome.SUCCESS, "success", "settle", "no"),
    (Outcome.RATE_LIMITED, "neutral", "empty", "yes"),
    (Outcome.EXHAUSTED, "neutral", "close", "yes"),
    (Outcome.UNAVAILABLE, "failure", "release", "yes"),
    (Outcome.STALLED, "failure", "settle", "recovery"),
    (Outcome.TRUNCATED, "failure", "settle", "recovery"),
    (Outcome.MALFORMED, "failure", "settle", "recovery"),
    (Outcome.UNAUTHORIZED, "trip", "release", "yes"),
    (Outcome.UNSUPPORTED, "neutral", "release", "elsewhere"),
    (Outcome.CLIENT_ERROR, "neutral", "release", "no"),
    (Outcome.CANCELLED, "neutral", "settle", "no"),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_the_verdict_table(row: tuple[Outcome, str, str, str]) -> None:
    """What each outcome teaches the breaker and the quota, and where to try next."""
    found = verdict(Failure(row[0], Side.UPSTREAM, "x"))

    assert row[1:] == (found.breaker, found.quota, found.retry)


IN_BAND = [
    (Fault(None, "overloaded_error", "Overloaded"), Outcome.UNAVAILABLE, "failure", "settle"),
    (Fault(429, "", "Rate limit exceeded"), Outcome.RATE_LIMITED, "neutral", "empty"),
    (Fault(None, "rate_limit_exceeded", "tokens per day (tpd)"), Outcome.EXHAUSTED, "neutral", "close"),
    (Fault(None, "402", "No money"), Outcome.EXHAUSTED, "neutral", "close"),
    (Fault(None, "authentication", "Invalid credentials"), Outcome.UNAUTHORIZED, "trip", "settle"),
    (Fault(None, "invalid_request_error", "prompt is too long"), Outcome.UNSUPPORTED, "neutral", "settle"),
    (Fault(None, "tool_use_failed", "x"), Outcome.MALFORMED, "failure", "settle"),
    (Fault(None, "server_error", "x"), Outcome.UNAVAILABLE, "failure", "settle"),
    (Fault(200, "", "Something happened"), Outcome.UNAVAILABLE, "failure", "settle"),
    (Fault(None, "", "Something happened"), Outcome.UNAVAILABLE, "failure", "settle"),
]


@pytest.mark.parametrize(("fault", "cause", "breaker", "quota"), IN_BAND)
def test_an_error_inside_a_200_teaches_by_its_cause(fault: Fault, cause: Outcome, breaker: str, quota: str) -> None:
    """The breaker learns what the code means; what was begun is settled; recovery decides where to go."""
    failure = classify_fault(fault_evidence(fault))
    found = verdict(failure)

    assert (Outcome.IN_BAND_ERROR, cause) == (failure.outcome, failure.cause)
    assert (breaker, quota, "recovery") == (found.breaker, found.quota, found.retry)


def test_an_error_of_unknown_cause_counts_against_the_upstream() -> None:
    """Without a cause the row of the table itself applies."""
    assert Verdict("failure", "settle", "recovery") == verdict(Failure(Outcome.IN_BAND_ERROR, Side.UPSTREAM, "x"))


# --- whose fault is a 400? --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_status", [400, 422])
def test_two_unexplained_refusals_are_the_clients(second_status: int) -> None:
    """The second provider that has no reason of its own turns UNSUPPORTED into CLIENT_ERROR."""
    first = classify_body(400, chat_error("roles must alternate"))
    second = classify_body(second_status, {"detail": "roles?"})

    blamed = blame_client(second)

    assert agrees(first, second)
    assert (Outcome.CLIENT_ERROR, Side.CLIENT, second_status) == (blamed.outcome, blamed.side, blamed.status)
    assert len(blamed.detail) > 30  # shorter ones are taken for an overflow


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, chat_error(OVERFLOW)),
        (404, chat_error("gone", code="model_not_found")),
        (413, b""),
        (400, chat_error("bad", code="unsupported_parameter")),
        (403, chat_error("flagged")),
        (429, b""),
    ],
)
def test_a_reason_of_its_own_is_no_agreement(status: int, body: object) -> None:
    """Overflow, unknown models, size, features and content rules differ between upstreams."""
    unexplained, explained = classify_body(400, b"{}"), classify_body(status, body)

    assert not agrees(unexplained, explained)
    assert not agrees(explained, unexplained)
    assert not agrees(explained, explained)
