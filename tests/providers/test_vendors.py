"""Each vendor's quirks, by bodies seen on its API or printed in its docs."""

from __future__ import annotations

import datetime as dt

import orjson
import pytest

from routerd.canonical import Failure, Fault, LimitReport, Outcome
from routerd.policy.classify import Code
from routerd.providers import hooks, judge, judge_fault

WALL = dt.datetime(2026, 11, 21, 12, 0, 15, tzinfo=dt.UTC).timestamp()
UTC_MIDNIGHT_S = 12 * 3600 - 15.0
PACIFIC_MIDNIGHT_S = 20 * 3600 - 15.0
MONTH_END_S = 9 * 86_400 + UTC_MIDNIGHT_S


def refuse(name: str, status: int, body: object = b"", **headers: str) -> Failure:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return judge(hooks(name), status, {key.replace("_", "-"): text for key, text in headers.items()}, data, WALL)[0]


def reports(name: str, status: int, body: object, **headers: str) -> tuple[LimitReport, ...]:
    lowered = {key.replace("_", "-"): text for key, text in headers.items()}
    return judge(hooks(name), status, lowered, orjson.dumps(body), WALL)[1]


def error(message: str = "x", **fields: object) -> dict[str, object]:
    return {"error": {"message": message, **fields}}


def openrouter(message: str, code: int, **metadata: object) -> dict[str, object]:
    return error(message, code=code, metadata=metadata)


def quota_failure(*violations: tuple[str, str | None], delay: str = "2s") -> list[dict[str, object]]:
    found = [{"quotaId": quota_id, **({"quotaValue": value} if value else {})} for quota_id, value in violations]
    details = [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": found},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay},
    ]
    return [{"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED", "details": details}}]


PER_DAY = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"
PER_MINUTE = "GenerateContentInputTokensPerModelPerMinute-FreeTier"
MIMO_BURST = {"type": "server_error", "message": "Upstream request failed: Insufficient account funds"}
ZAI_PLAN = error("Usage limit reached for 5 hour. Your limit will reset at 2026-11-21 21:00:15", code="1308")
ZAI_PLAN_MESSAGES = {
    "type": "error",
    "error": {
        "type": "1308",
        "message": "[1308][已达到 5 小时的使用上限。您的限额将在 2026-11-21 21:00:15 重置。][20261121]",
    },
}
NEW_API_503 = error("No available channel for model m under group default (request id: 1)", type="new_api_error")

# vendor, status, body, headers, code, wait
QUIRKS: list[tuple[str, int, object, dict[str, str], Code, float | None]] = [
    # A burst on a token plan is no empty account; an empty account is.
    ("mimo-token-plan-cn", 402, MIMO_BURST, {}, Code.CONCURRENCY, None),
    ("mimo", 402, error("Insufficient account balance", code="402"), {}, Code.BALANCE, None),
    ("mimo", 429, error("Too many requests", code="429", type="limitation"), {}, Code.QUOTA_MINUTE, None),
    (
        "mimo",
        400,
        b'data:{"error":{"code":"400","message":"Param Incorrect","param":"`text` is not set","type":""}}',
        {},
        Code.UNSUPPORTED_FEATURE,
        None,
    ),
    ("mimo", 400, error("Not supported model mimo-v2-pro", code="400"), {}, Code.MODEL_NOT_FOUND, None),
    ("mimo", 401, error("Invalid API Key", code="401"), {}, Code.INVALID_KEY, None),
    # Credits close a model, not the account: free models live on.
    ("openrouter", 402, openrouter("Insufficient credits", 402), {}, Code.MODEL_BALANCE, None),
    (
        "openrouter",
        402,
        openrouter("in-flight", 402, limit_source="openrouter_in_flight_budget", reason="in_flight_budget_exhausted"),
        {"retry_after": "20"},
        Code.CONCURRENCY,
        20.0,
    ),
    (
        "openrouter",
        402,
        openrouter("too dear", 402, limit_source="openrouter_credits", reason="weight_exceeds_budget"),
        {},
        Code.TOO_LARGE,
        None,
    ),
    ("openrouter", 402, openrouter("key", 402, limit_source="openrouter_key_limit"), {}, Code.MODEL_BALANCE, None),
    (
        "openrouter",
        429,
        openrouter("Rate limit exceeded: free-models-per-day-high-balance. ", 429),
        {},
        Code.QUOTA_DAY,
        UTC_MIDNIGHT_S,
    ),
    (
        "openrouter",
        429,
        openrouter("x", 429, limit_source="openrouter_free_tier_daily", headers={"X-RateLimit-Reset": "1795305600000"}),
        {},
        Code.QUOTA_DAY,
        UTC_MIDNIGHT_S,
    ),
    (
        "openrouter",
        429,
        openrouter("Rate limit exceeded: free-models-per-min.", 429),
        {"x_ratelimit_remaining": "0", "x_ratelimit_reset": "1795262460000"},
        Code.QUOTA_MINUTE,
        45.0,
    ),
    (
        "openrouter",
        429,
        openrouter("Provider returned error", 429, provider_name="P", raw="m is temporarily rate-limited upstream."),
        {},
        Code.OVERLOADED,
        None,
    ),
    ("openrouter", 429, openrouter("Rate limit exceeded", 429), {}, Code.QUOTA_MINUTE, None),
    ("openrouter", 400, openrouter("x/y is not a valid model ID", 400), {}, Code.MODEL_NOT_FOUND, None),
    ("openrouter", 400, error("x", code=400, type="model_not_found"), {}, Code.MODEL_NOT_FOUND, None),
    ("openrouter", 404, openrouter("No endpoints found for x/y.", 404), {}, Code.MODEL_NOT_FOUND, None),
    ("openrouter", 403, openrouter("x", 403, reasons=["violence"], flagged_input="…"), {}, Code.MODERATION, None),
    (
        "openrouter",
        403,
        openrouter("Request blocked: prompt injection patterns detected", 403, patterns=["p"]),
        {},
        Code.MODERATION,
        None,
    ),
    ("openrouter", 403, openrouter("Provider returned error", 403, provider_name="P"), {}, Code.SERVER_ERROR, None),
    ("openrouter", 403, openrouter("Key disabled", 403), {}, Code.NO_PERMISSION, None),
    (
        "openrouter",
        503,
        {"error": {"code": 503, "message": "none", "availability": {"retryable": True, "retry_after": 9}}},
        {},
        Code.OVERLOADED,
        9.0,
    ),
    ("openrouter", 200, openrouter("x", 502, error_type="provider_unavailable"), {}, Code.SERVER_ERROR, None),
    # Money, rate and size share one status.
    ("openai", 429, error("You exceeded your current quota", code="insufficient_quota"), {}, Code.BALANCE, None),
    (
        "openai",
        429,
        error("Rate limit reached on tokens per min (TPM): Limit 30000, Used 28000, Requested 5000.", type="tokens"),
        {"retry_after_ms": "6000", "retry_after": "7"},
        Code.QUOTA_MINUTE,
        6.0,
    ),
    ("openai", 429, error("Request too large for gpt on tokens per min (TPM)"), {}, Code.TOO_LARGE, None),
    # A subscription has windows of its own.
    (
        "anthropic",
        429,
        {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}},
        {"retry_after": "12"},
        Code.QUOTA_MINUTE,
        12.0,
    ),
    (
        "anthropic",
        429,
        {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}},
        {
            "anthropic_ratelimit_unified_status": "rejected",
            "anthropic_ratelimit_unified_reset": str(int(WALL) + 600),
        },
        Code.QUOTA_PLAN,
        600.0,
    ),
    (
        "anthropic",
        429,
        error("Extra usage is required for long context requests.", type="rate_limit_error"),
        {},
        Code.TOO_LARGE,
        None,
    ),
    ("anthropic", 400, error("prompt is too long: 210000 tokens > 200000 maximum"), {}, Code.CONTEXT_OVERFLOW, None),
    # The quota's name decides, not the retry delay.
    ("gemini", 429, quota_failure((PER_DAY, "20")), {}, Code.QUOTA_DAY, PACIFIC_MIDNIGHT_S),
    ("gemini", 429, quota_failure((PER_MINUTE, "250000"), delay="37s"), {}, Code.QUOTA_MINUTE, 37.0),
    ("gemini", 429, quota_failure((PER_MINUTE, "9"), (PER_DAY, "20")), {}, Code.QUOTA_DAY, PACIFIC_MIDNIGHT_S),
    ("gemini", 429, quota_failure((PER_DAY, "0")), {}, Code.MODEL_NOT_ALLOWED, None),
    (
        "gemini",
        429,
        error(
            "Quota exceeded for metric: m, limit: 20, model: f. Please retry in 20h17m16.2s.", code="too_many_requests"
        ),
        {},
        Code.QUOTA_DAY,
        PACIFIC_MIDNIGHT_S,
    ),
    (
        "gemini",
        429,
        [error("You exceeded your current quota. Please retry in 4.2s.", code=429, status="RESOURCE_EXHAUSTED")],
        {},
        Code.QUOTA_MINUTE,
        4.2,
    ),
    (
        "gemini",
        400,
        [error("API key not valid.", code=400, status="INVALID_ARGUMENT", details=[{"reason": "API_KEY_INVALID"}])],
        {},
        Code.INVALID_KEY,
        None,
    ),
    ("gemini", 503, [error("The model is overloaded.", code=503, status="UNAVAILABLE")], {}, Code.OVERLOADED, None),
    # The day's tokens are told in the sentence only; what never fits is a 413.
    (
        "groq",
        429,
        error(
            "Rate limit reached for model `m` on tokens per day (TPD): Limit 100000, Used 97050, Requested 3619. "
            "Please try again in 9m38.016s.",
            type="tokens",
            code="rate_limit_exceeded",
        ),
        {},
        Code.QUOTA_DAY,
        578.016,
    ),
    ("groq", 413, error("Request too large for model", code="rate_limit_exceeded"), {}, Code.TOO_LARGE, None),
    (
        "groq",
        400,
        error("Failed to call a function.", code="tool_use_failed", failed_generation="<function"),
        {},
        Code.TOOL_USE_FAILED,
        None,
    ),
    ("groq", 404, error("The model `m` does not exist", code="model_not_found"), {}, Code.MODEL_NOT_FOUND, None),
    ("groq", 498, b"", {}, Code.OVERLOADED, None),
    # Two kinds of 429.
    (
        "cerebras",
        429,
        {
            "message": "Requests per minute limit exceeded",
            "type": "too_many_requests_error",
            "code": "request_quota_exceeded",
        },
        {"retry_after": "58"},
        Code.QUOTA_MINUTE,
        58.0,
    ),
    (
        "cerebras",
        429,
        {"message": "Tokens per day limit exceeded", "type": "too_many_tokens_error", "code": "token_quota_exceeded"},
        {},
        Code.QUOTA_DAY,
        None,
    ),
    (
        "cerebras",
        429,
        {"message": "High traffic", "type": "too_many_requests_error", "param": "queue", "code": "queue_exceeded"},
        {"x_should_retry": "false"},
        Code.OVERLOADED,
        2.0,
    ),
    # Never a Retry-After: the minute turns by itself.
    (
        "mistral",
        429,
        {"object": "error", "message": "Rate limit exceeded", "type": "rate_limited", "code": "1300"},
        {"x_ratelimit_remaining_req_minute": "0"},
        Code.QUOTA_MINUTE,
        45.0,
    ),
    (
        "mistral",
        429,
        {"object": "error", "message": "Service tier capacity exceeded", "type": "x", "code": "3505"},
        {},
        Code.OVERLOADED,
        None,
    ),
    (
        "mistral",
        429,
        {"message": "x", "code": "1300"},
        {"x_ratelimit_remaining_tokens_month": "0"},
        Code.QUOTA_MONTH,
        MONTH_END_S,
    ),
    (
        "mistral",
        422,
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "messages", 1, "reasoning_content"], "msg": "Extra"}]},
        {},
        Code.UNSUPPORTED_FEATURE,
        None,
    ),
    # A sick model answers 400.
    ("nvidia", 400, {"detail": "Function id 'f': DEGRADED function cannot be invoked"}, {}, Code.DEGRADED, None),
    ("nvidia", 400, error("This model only supports single tool-calls at once!"), {}, Code.UNSUPPORTED_FEATURE, None),
    ("nvidia", 429, {"status": 429, "title": "Too Many Requests"}, {}, Code.QUOTA_MINUTE, 62.0),
    # Business codes, in three places.
    ("zai", 429, error("Your account is in arrears", code="1113"), {}, Code.BALANCE, None),
    ("zai", 429, error("High concurrency usage of this API", code="1302"), {}, Code.CONCURRENCY, 2.0),
    ("zai", 429, error("High frequency usage of this API", code=1303), {}, Code.QUOTA_MINUTE, None),
    ("zai", 429, error("Daily call limit reached", code="1304"), {}, Code.QUOTA_DAY, None),
    ("zai", 429, error("Overloaded", code="1305"), {}, Code.OVERLOADED, 30.0),
    ("zai", 429, ZAI_PLAN, {}, Code.QUOTA_PLAN, 3_600.0),
    ("zai", 429, ZAI_PLAN_MESSAGES, {}, Code.QUOTA_PLAN, 3_600.0),
    ("zai", 429, error("Usage limit reached", code="1308"), {}, Code.QUOTA_PLAN, None),
    ("zai", 400, error("Tokens in request more than max tokens allowed", code="1210"), {}, Code.CONTEXT_OVERFLOW, None),
    ("zai", 400, error("Incorrect API call parameters", code="1210"), {}, Code.BAD_REQUEST, None),
    ("zai", 400, error("unsafe or sensitive content", code="1301"), {}, Code.MODERATION, None),
    ("zai", 400, error("Model does not exist", code="1211"), {}, Code.MODEL_NOT_FOUND, None),
    ("zai", 200, error("expired", code="1003"), {}, Code.INVALID_KEY, None),
    # Codes inside a 200, or in brackets.
    ("minimax", 200, {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, {}, Code.QUOTA_MINUTE, None),
    (
        "minimax",
        200,
        {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
        {},
        Code.BALANCE,
        None,
    ),
    ("minimax", 200, {"base_resp": {"status_code": 2013, "status_msg": "invalid params"}}, {}, Code.BAD_REQUEST, None),
    ("minimax", 200, {"base_resp": {"status_code": 0, "status_msg": ""}}, {}, Code.NOT_AN_ANSWER, None),
    ("minimax", 500, error("insufficient balance (1008)", type="api_error"), {}, Code.BALANCE, None),
    ("minimax", 400, error("invalid params, context window exceeds limit (2013)"), {}, Code.CONTEXT_OVERFLOW, None),
    # The type says more than the status.
    (
        "moonshot",
        403,
        error("organization exceeded current quota", type="exceeded_current_quota_error"),
        {},
        Code.BALANCE,
        None,
    ),
    ("moonshot", 429, error("exceeded current quota", type="exceeded_current_quota_error"), {}, Code.BALANCE, None),
    ("moonshot", 429, error("overloaded", type="engine_overloaded_error"), {"retry_after": "3"}, Code.OVERLOADED, 3.0),
    (
        "moonshot",
        429,
        error("reached max RPM: 3, please try again after 1 seconds", type="rate_limit_reached_error"),
        {},
        Code.QUOTA_MINUTE,
        1.0,
    ),
    ("moonshot", 429, error("reached max concurrency: 1", type="rate_limit_reached_error"), {}, Code.CONCURRENCY, None),
    ("moonshot", 429, error("reached TPD: 1500000", type="rate_limit_reached_error"), {}, Code.QUOTA_DAY, None),
    ("moonshot", 400, error("Your request exceeded model token limit : 262144"), {}, Code.CONTEXT_OVERFLOW, None),
    ("moonshot", 400, error("considered high risk", type="content_filter"), {}, Code.MODERATION, None),
    # Ours only if one of our buckets is empty for a minute or more.
    (
        "nous",
        429,
        error("Rate limited"),
        {"x_ratelimit_remaining_requests_1h": "0", "x_ratelimit_reset_requests_1h": "1800"},
        Code.QUOTA_MINUTE,
        1_800.0,
    ),
    ("nous", 429, error("Rate limited"), {"x_ratelimit_remaining_requests_1h": "700"}, Code.OVERLOADED, None),
    ("xai", 403, {"code": "personal-team-blocked:spending-limit", "error": "Out of credits"}, {}, Code.BALANCE, None),
    ("xai", 429, {"code": "subscription:free-usage-exhausted", "error": "Used up"}, {}, Code.QUOTA_PLAN, None),
    ("xai", 403, {"code": "unauthorized:blocked-user", "error": "No"}, {}, Code.NO_PERMISSION, None),
    (
        "huggingface",
        402,
        {"error": "You have depleted your monthly included credits."},
        {"x_error_message": "depleted"},
        Code.QUOTA_MONTH,
        MONTH_END_S,
    ),
    ("deepseek", 429, error("Too many", type="rate_limit_error"), {}, Code.CONCURRENCY, 2.0),
    ("deepseek", 402, error("Insufficient Balance", code="invalid_request_error"), {}, Code.BALANCE, None),
    ("deepseek", 400, error("Content Exists Risk"), {}, Code.MODERATION, None),
    # Not money, whatever the code says; money is a 400.
    (
        "dashscope",
        429,
        error("You exceeded your current quota", code="insufficient_quota"),
        {},
        Code.QUOTA_MINUTE,
        None,
    ),
    ("dashscope", 400, error("Access denied", code="Arrearage"), {}, Code.BALANCE, None),
    ("dashscope", 400, error("Requests rate increased too quickly"), {}, Code.QUOTA_MINUTE, None),
    ("mixroute", 503, NEW_API_503, {}, Code.MODEL_NOT_FOUND, None),
    ("mixroute", 403, error("token quota is not enough", type="new_api_error"), {}, Code.BALANCE, None),
    ("sambanova", 402, error("Payment method required"), {}, Code.BALANCE, None),
]


@pytest.mark.parametrize("quirk", QUIRKS, ids=[f"{row[0]}-{row[1]}-{row[4]}" for row in QUIRKS])
def test_each_refusal_is_read_as_its_vendor_means_it(
    quirk: tuple[str, int, object, dict[str, str], Code, float | None],
) -> None:
    """The reason, and how long to wait."""
    name, status, body, headers, code, wait_s = quirk

    failure = refuse(name, status, body, **headers)

    assert (failure.code, failure.status) == (code, status)
    assert failure.retry_after_s == (None if wait_s is None else pytest.approx(wait_s))


FAULTS = [
    ("mimo", Fault(None, "402", "Upstream request failed: Insufficient account funds"), Outcome.RATE_LIMITED),
    ("openrouter", Fault(None, "provider_overloaded", "busy"), Outcome.UNAVAILABLE),
    ("openrouter", Fault(402, "402", "Insufficient credits"), Outcome.EXHAUSTED),
    ("groq", Fault(None, "tool_use_failed", "Failed to call a function"), Outcome.MALFORMED),
    ("minimax", Fault(None, "", "output new_sensitive (1027)"), Outcome.UNSUPPORTED),
    ("minimax", Fault(None, "", "output new_sensitive"), Outcome.UNSUPPORTED),
    ("zai", Fault(None, "1302", "High concurrency"), Outcome.RATE_LIMITED),
    ("gemini", Fault(503, "UNAVAILABLE", "The model is overloaded"), Outcome.UNAVAILABLE),
    ("cerebras", Fault(None, "queue_exceeded", "High traffic"), Outcome.UNAVAILABLE),
]


@pytest.mark.parametrize(("name", "fault", "cause"), FAULTS)
def test_vendors_read_faults_inside_a_200_too(name: str, fault: Fault, cause: Outcome) -> None:
    """The same quirks hold for an error event in a stream."""
    assert judge_fault(hooks(name), fault, WALL)[0].cause is cause


def test_an_empty_openrouter_balance_leaves_the_free_models_alone() -> None:
    """Only the model that asked for money is closed."""
    assert not refuse("openrouter", 402, openrouter("Insufficient credits", 402)).account_wide


def test_a_wrong_key_in_a_gemini_400_is_account_wide() -> None:
    """It is a 400 in name only."""
    failure = refuse("gemini", 400, [error("API key not valid.", code=400)])

    assert (failure.outcome, failure.account_wide) == (Outcome.UNAUTHORIZED, True)


# --- limits told by a body --------------------------------------------------------------------------------------------


def test_gemini_names_the_spent_limit() -> None:
    """The violated quota has nothing left; a daily one is whole again at midnight Pacific time."""
    body = quota_failure((PER_DAY, "20"), (PER_MINUTE, None), delay="37s")

    assert reports("gemini", 429, body) == (
        LimitReport("requests", "day", 20.0, 0.0, PACIFIC_MIDNIGHT_S),
        LimitReport("tokens", "minute", None, 0.0, 37.0),
    )


def test_openrouter_tells_its_free_limit_in_headers_or_body() -> None:
    """Reset is epoch milliseconds; a per-day limit without one ends with the UTC day."""
    expected = (LimitReport("requests", "day", 50.0, 0.0, UTC_MIDNIGHT_S),)
    triple = {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1795305600000"}
    lowered = {name.replace("-", "_").lower(): value for name, value in triple.items()}
    message = "Rate limit exceeded: free-models-per-day."

    assert reports("openrouter", 429, openrouter(message, 429), **lowered) == expected
    assert reports("openrouter", 429, openrouter(message, 429, headers=triple)) == expected
    assert reports("openrouter", 429, openrouter(message, 429))[0].reset_s == UTC_MIDNIGHT_S
    assert reports("openrouter", 429, openrouter("Provider returned error", 429, raw="x"), **lowered) == ()


def test_groq_tells_of_a_limit_no_header_has() -> None:
    """Headers give the day's requests and the minute's tokens, the sentence the day's tokens."""
    body = error("on tokens per day (TPD): Limit 200000, Used 200000, Requested 9. Please try again in 4s")
    headers = {
        "x_ratelimit_remaining_tokens": "8000",
        "x_ratelimit_limit_tokens": "8000",
        "x_ratelimit_reset_tokens": "0s",
    }

    assert reports("groq", 429, body, **headers) == (
        LimitReport("tokens", "minute", 8_000.0, 8_000.0, 0.0),
        LimitReport("tokens", "day", 200_000.0, 0.0, 86_400.0),
    )
