"""What an upstream's refusal means: for the breaker, for the quota, and for the next attempt.

Theory of operation
-------------------
Two tables decide everything. ``CODES`` lists every reason a refusal can have, in our own closed vocabulary, with the
outcome it stands for. ``VERDICTS`` says what an outcome teaches the breaker and the quota, and where to try next.
The rest of this module only finds the code.

1. ``read_evidence`` brings the many shapes of an error body down to five fields. It takes any bytes and never raises.
2. ``read_code`` asks, in this order: the vendor's own hook (``restated``); ``NAMES``, the codes and types that mean one
   thing wherever they appear; ``WORDS``, fragments of the message, but only those that the status admits; and last
   the status itself.
3. ``classify`` wraps the code in a ``Failure``. Its text is ours: nothing an upstream wrote goes past this module,
   neither to the log nor to the client.

Three lines are drawn on purpose:

* *Our allowance or their capacity.* Both arrive as 429. Spent allowance is ``RATE_LIMITED`` or ``EXHAUSTED`` and the
  quota learns from it; a crowded upstream is ``UNAVAILABLE`` and the breaker does.
* *Key or model.* ``UNAUTHORIZED`` is account-wide, except where the body says that only this model is off limits.
* *Whose fault is a 400?* Every upstream has rules of its own, so the first unknown 400 is ``UNSUPPORTED`` and the
  request goes elsewhere. Only when another provider also refuses it, without naming a feature it lacks, is it
  the client's (``agrees``, ``blame_client``).

What is ugly: messages are prose and change without notice. So words only refine what a status has already said, each
status has a sane default, and a wrong guess costs one more attempt rather than a turn.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec
import orjson

from routerd.canonical import Failure, Fault, Outcome, Side

MAX_BODY_BYTES = 65_536  # of an error body; a longer one is cut, so it is read as text
MAX_TEXT = 2_048  # characters of message that are searched
MAX_NAME = 128  # characters of a code or type
MAX_HEADERS = 128
MAX_ITEMS = 16  # of a list inside an error body

# --- what each reason means -------------------------------------------------------------------------------------------


class Code(enum.StrEnum):
    """Why an upstream refused, in our words. Goes into ``Failure.code``, the log and the status page."""

    CONTEXT_OVERFLOW = "context_overflow"
    TOO_LARGE = "too_large"
    MODEL_NOT_FOUND = "model_not_found"
    UNSUPPORTED_FEATURE = "unsupported_feature"
    MODERATION = "moderation"
    BAD_REQUEST = "bad_request"
    REJECTED = "rejected"
    INVALID_KEY = "invalid_key"
    NO_PERMISSION = "no_permission"
    MODEL_NOT_ALLOWED = "model_not_allowed"
    BALANCE = "balance"
    MODEL_BALANCE = "model_balance"
    QUOTA_MONTH = "quota_month"
    QUOTA_PLAN = "quota_plan"
    QUOTA_DAY = "quota_day"
    QUOTA_MINUTE = "quota_minute"
    CONCURRENCY = "concurrency"
    OVERLOADED = "overloaded"
    DEGRADED = "degraded"
    SERVER_ERROR = "server_error"
    TIMEOUT = "timeout"
    BLOCKED = "blocked"
    TOOL_USE_FAILED = "tool_use_failed"
    NOT_AN_ANSWER = "not_an_answer"


class Meaning(msgspec.Struct, frozen=True):
    """``detail`` is what a log or a client may read."""

    outcome: Outcome
    detail: str
    account_wide: bool = False


# Agents read an error's text to decide whether to wait, to compress their history, or to give up. So each
# detail avoids the stock phrases of other faults, and only the overflow speaks of context.
CODES: dict[Code, Meaning] = {
    Code.CONTEXT_OVERFLOW: Meaning(Outcome.UNSUPPORTED, "context length exceeded"),
    Code.TOO_LARGE: Meaning(Outcome.UNSUPPORTED, "the request is larger than the upstream takes in one piece"),
    Code.MODEL_NOT_FOUND: Meaning(Outcome.UNSUPPORTED, "the upstream does not offer this model"),
    Code.UNSUPPORTED_FEATURE: Meaning(Outcome.UNSUPPORTED, "the upstream lacks a feature this request uses"),
    Code.MODERATION: Meaning(Outcome.UNSUPPORTED, "the upstream's content rules turned the request down"),
    Code.BAD_REQUEST: Meaning(Outcome.UNSUPPORTED, "the upstream could not accept the request as it stands"),
    Code.REJECTED: Meaning(Outcome.UNSUPPORTED, "the upstream turned the request down without a known reason"),
    Code.INVALID_KEY: Meaning(Outcome.UNAUTHORIZED, "the upstream did not accept its key", account_wide=True),
    Code.NO_PERMISSION: Meaning(Outcome.UNAUTHORIZED, "the upstream's key may not be used here", account_wide=True),
    Code.MODEL_NOT_ALLOWED: Meaning(Outcome.UNAUTHORIZED, "the upstream's key does not include this model"),
    Code.BALANCE: Meaning(Outcome.EXHAUSTED, "the upstream's account has no money left", account_wide=True),
    Code.MODEL_BALANCE: Meaning(Outcome.EXHAUSTED, "the upstream's account cannot pay for this model"),
    Code.QUOTA_MONTH: Meaning(Outcome.EXHAUSTED, "the upstream's monthly allowance is used up", account_wide=True),
    Code.QUOTA_PLAN: Meaning(Outcome.EXHAUSTED, "the upstream's plan is used up until it renews", account_wide=True),
    Code.QUOTA_DAY: Meaning(Outcome.EXHAUSTED, "the upstream's allowance for the day is used up"),
    Code.QUOTA_MINUTE: Meaning(Outcome.RATE_LIMITED, "the upstream asked us to slow down"),
    Code.CONCURRENCY: Meaning(Outcome.RATE_LIMITED, "the upstream runs no more requests of ours at the same time"),
    Code.OVERLOADED: Meaning(Outcome.UNAVAILABLE, "the upstream is too busy"),
    Code.DEGRADED: Meaning(Outcome.UNAVAILABLE, "the upstream reports this model as out of order"),
    Code.SERVER_ERROR: Meaning(Outcome.UNAVAILABLE, "the upstream failed"),
    Code.TIMEOUT: Meaning(Outcome.UNAVAILABLE, "the upstream gave up waiting for its model"),
    Code.BLOCKED: Meaning(Outcome.UNAVAILABLE, "something in front of the upstream answered in its place"),
    Code.TOOL_USE_FAILED: Meaning(Outcome.MALFORMED, "the model wrote a tool call that cannot be read"),
    Code.NOT_AN_ANSWER: Meaning(Outcome.MALFORMED, "the upstream sent something that is not an answer"),
}

# --- what each outcome teaches ----------------------------------------------------------------------------------------

BreakerLesson = Literal["success", "failure", "neutral", "trip"]
QuotaLesson = Literal["settle", "empty", "close", "release"]
RetryPlace = Literal["no", "yes", "elsewhere", "recovery"]


class Verdict(msgspec.Struct, frozen=True):
    """What to do about an attempt.

    breaker: ``neutral`` leaves the count alone and frees a probe, ``trip`` opens at once.
    quota: ``settle`` with the usage seen (or the estimate), ``release`` the reservation; on top of a release,
    ``empty`` the bucket until its reset or ``close`` the window until its own.
    retry: ``yes`` anywhere, ``elsewhere`` where the request may fit, ``recovery`` decides by what the client has.
    """

    breaker: BreakerLesson
    quota: QuotaLesson
    retry: RetryPlace


VERDICTS: dict[Outcome, Verdict] = {
    Outcome.SUCCESS: Verdict("success", "settle", "no"),
    Outcome.RATE_LIMITED: Verdict("neutral", "empty", "yes"),
    Outcome.EXHAUSTED: Verdict("neutral", "close", "yes"),
    Outcome.UNAVAILABLE: Verdict("failure", "release", "yes"),
    Outcome.STALLED: Verdict("failure", "settle", "recovery"),
    Outcome.TRUNCATED: Verdict("failure", "settle", "recovery"),
    Outcome.IN_BAND_ERROR: Verdict("failure", "settle", "recovery"),  # of unknown cause; see verdict()
    Outcome.MALFORMED: Verdict("failure", "settle", "recovery"),
    Outcome.UNAUTHORIZED: Verdict("trip", "release", "yes"),
    Outcome.UNSUPPORTED: Verdict("neutral", "release", "elsewhere"),
    Outcome.CLIENT_ERROR: Verdict("neutral", "release", "no"),
    Outcome.CANCELLED: Verdict("neutral", "settle", "no"),
}


def _in_band(cause: Verdict) -> Verdict:
    """The request was begun, so it is settled and not released; the rest is as its cause has it."""
    return Verdict(cause.breaker, "settle" if cause.quota == "release" else cause.quota, "recovery")


IN_BAND_VERDICTS: dict[Outcome, Verdict] = {cause: _in_band(found) for cause, found in VERDICTS.items()}


def verdict(failure: Failure) -> Verdict:
    """The row of the table for this failure; where a cause is named (errors inside a 200), that of the cause."""
    if failure.cause is not None:
        return IN_BAND_VERDICTS[failure.cause]
    return VERDICTS[failure.outcome]


def agrees(first: Failure, second: Failure) -> bool:
    """True when two providers refused the same request and neither had a reason of its own.

    The caller sees to it that they are different providers. Overflow, an unknown model, a missing feature, size and
    content rules differ from one upstream to the next, so they never count.
    """
    return first.code == Code.BAD_REQUEST == second.code


def blame_client(second: Failure) -> Failure:
    """What two agreeing refusals become. The text is long on purpose: agents take a very short 400 for an overflow."""
    detail = "two providers independently refused this request as invalid"
    return Failure(Outcome.CLIENT_ERROR, Side.CLIENT, detail, status=second.status or 400, code=Code.BAD_REQUEST)


# --- evidence ---------------------------------------------------------------------------------------------------------


class Evidence(msgspec.Struct, frozen=True):
    """An error body and what came with it, brought down to one shape.

    ``code`` and ``kind`` are lower-cased (a number as its digits), ``text`` is the lower-cased, bounded message,
    ``body`` the JSON object the rest came from, ``headers`` has lower-cased names. ``kind`` is ``html`` for a web page.
    """

    status: int | None
    code: str = ""
    kind: str = ""
    text: str = ""
    body: dict[str, Any] | None = None
    headers: Mapping[str, str] = {}

    @property
    def error(self) -> dict[str, Any]:
        """The part of the body that speaks of the error; empty if there is none."""
        return {} if self.body is None else error_object(self.body)


def read_evidence(status: int | None, headers: Mapping[str, str], body: bytes) -> Evidence:
    """Read any error response. Never raises; what cannot be read is left empty."""
    lowered = {name.lower(): value for name, value in _first(headers.items(), MAX_HEADERS)}
    data = _strip_framing(body[:MAX_BODY_BYTES])
    document = _decode(data)
    if document is None:
        kind, text = _read_plain(data)
        return Evidence(status, kind=kind, text=text, headers=lowered)
    error = error_object(document)
    return Evidence(
        status,
        code=_name(error, ("code", "status_code", "http_code"), document),
        kind=_name(error, ("error_type", "type", "status", "title"), document),
        text=_message(error, document),
        body=document,
        headers=lowered,
    )


def fault_evidence(fault: Fault) -> Evidence:
    """An error event inside a 200 as evidence. A status that is no error's says nothing."""
    status = fault.status if fault.status is not None and fault.status >= 400 else None
    return Evidence(status, code=fault.code[:MAX_NAME].lower(), text=fault.message[:MAX_TEXT].lower())


def _strip_framing(data: bytes) -> bytes:
    """Some upstreams answer a streaming request with a refusal framed as one server-sent event."""
    data = data.removeprefix(b"\xef\xbb\xbf").strip()
    if not data.startswith((b"data:", b"event:", b"id:", b":")):
        return data
    lines = (line.strip() for line in data.splitlines())
    return next((line[5:].strip() for line in lines if line.startswith(b"data:")), data)


def _decode(data: bytes) -> dict[str, Any] | None:
    """The first JSON object, or None. Some upstreams wrap it in an array."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if isinstance(document, list):
        document = next((item for item in document[:MAX_ITEMS] if isinstance(item, dict)), None)
    return document if isinstance(document, dict) else None


def _read_plain(data: bytes) -> tuple[str, str]:
    """Kind and text of a body that is not JSON. A web page's words are about the page, so they are not searched."""
    text = data[:MAX_TEXT].decode("utf-8", "replace").lower()
    return ("html", "") if text.startswith("<") else ("", text)


def error_object(document: dict[str, Any]) -> dict[str, Any]:
    """The innermost object that speaks of the error, wherever the shape at hand keeps it; empty if none does."""
    for candidate in _candidates(document):
        if isinstance(candidate, dict) and candidate:
            return candidate
        if isinstance(candidate, str) and candidate:
            return {"message": candidate}
    return document if _looks_flat(document) else {}


def _candidates(document: dict[str, Any]) -> Iterator[Any]:
    yield document.get("error")
    for item in _items(document.get("choices")):
        yield item.get("error")
    response = document.get("response")
    if isinstance(response, dict):
        yield response.get("error")
    base = document.get("base_resp")
    if isinstance(base, dict) and base.get("status_code"):
        yield base
    yield from _items(document.get("errors"))
    detail = document.get("detail")
    if isinstance(detail, dict):
        yield detail


def _looks_flat(document: dict[str, Any]) -> bool:
    """An error without a wrapper: a marked one, a problem document, a validator's list, or code and message."""
    if document.get("object") == "error" or "detail" in document:
        return True
    has_message = "message" in document or "msg" in document or "title" in document
    return has_message and any(document.get(key) for key in ("code", "type", "status", "error"))


def _items(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (item for item in value[:MAX_ITEMS] if isinstance(item, dict))


def _name(error: dict[str, Any], keys: Iterable[str], document: dict[str, Any]) -> str:
    """The first of ``keys`` with a usable value: in the error's metadata, in the error, or beside it."""
    metadata = error.get("metadata")
    places = (metadata if isinstance(metadata, dict) else {}, error, _response_of(document), document)
    for key in keys:
        for place in places if error else ():
            value = place.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)[:MAX_NAME]
            if isinstance(value, str) and value and value != "error":
                return value[:MAX_NAME].lower()
    return ""


def _response_of(document: dict[str, Any]) -> dict[str, Any]:
    response = document.get("response")
    return response if isinstance(response, dict) else {}


def _message(error: dict[str, Any], document: dict[str, Any]) -> str:
    """Every sentence the body has about the error, in one string."""
    metadata = error.get("metadata")
    parts = [error.get(key) for key in ("message", "status_msg", "msg", "error", "title", "detail", "param", "reason")]
    parts += [metadata.get("raw")] if isinstance(metadata, dict) else []
    parts += [document.get(key) for key in ("detail",) if error and document is not error]
    return " ".join(_sentences(parts))[:MAX_TEXT].lower()


def _sentences(parts: Iterable[Any]) -> Iterator[str]:
    """Texts as they are; a validator's list as its types, places and messages (never the echoed input)."""
    for part in parts:
        if isinstance(part, str):
            yield part[:MAX_TEXT]
        for item in _items(part):
            yield from (str(item[key])[:MAX_NAME] for key in ("type", "loc", "msg", "message") if key in item)


def _first(pairs: Iterable[tuple[str, str]], count: int) -> Iterator[tuple[str, str]]:
    return (pair for _, pair in zip(range(count), pairs, strict=False))


# --- finding the code -------------------------------------------------------------------------------------------------

# Codes and types that mean one thing wherever they appear.
NAMES: dict[str, Code] = {
    "context_length_exceeded": Code.CONTEXT_OVERFLOW,
    "exceed_context_size_error": Code.CONTEXT_OVERFLOW,
    "string_above_max_length": Code.CONTEXT_OVERFLOW,
    "string_too_long": Code.CONTEXT_OVERFLOW,
    "request_too_large": Code.TOO_LARGE,
    "payload_too_large": Code.TOO_LARGE,
    "token_limit_exceeded": Code.TOO_LARGE,
    "model_not_found": Code.MODEL_NOT_FOUND,
    "unsupported_model": Code.MODEL_NOT_FOUND,
    "unsupported_parameter": Code.UNSUPPORTED_FEATURE,
    "unsupported_value": Code.UNSUPPORTED_FEATURE,
    "unknown_parameter": Code.UNSUPPORTED_FEATURE,
    "unsupported_image_format": Code.UNSUPPORTED_FEATURE,
    "max_tokens_exceeded": Code.UNSUPPORTED_FEATURE,
    "content_filter": Code.MODERATION,
    "content_policy_violation": Code.MODERATION,
    "image_content_policy_violation": Code.MODERATION,
    "responsibleaipolicyviolation": Code.MODERATION,
    "data_inspection_failed": Code.MODERATION,
    "prompt_blocked": Code.MODERATION,
    "refusal": Code.MODERATION,
    "invalid_api_key": Code.INVALID_KEY,
    "incorrect_api_key_error": Code.INVALID_KEY,
    "invalid_authentication_error": Code.INVALID_KEY,
    "unsupported_country_region_territory": Code.NO_PERMISSION,
    "insufficient_quota": Code.BALANCE,
    "insufficient_balance": Code.BALANCE,
    "insufficient_balance_error": Code.BALANCE,
    "insufficient_credits": Code.BALANCE,
    "insufficient_user_quota": Code.BALANCE,
    "pre_consume_token_quota_failed": Code.BALANCE,
    "billing_hard_limit_reached": Code.BALANCE,
    "billing_not_active": Code.BALANCE,
    "arrearage": Code.BALANCE,
    "overloaded_error": Code.OVERLOADED,
    "engine_overloaded_error": Code.OVERLOADED,
    "server_overloaded": Code.OVERLOADED,
    "provider_overloaded": Code.OVERLOADED,
    "tool_use_failed": Code.TOOL_USE_FAILED,
}

# Broad types: they stand for a status where there is none, or where the HTTP one is vaguer.
NAMED_STATUSES: dict[str, int] = {
    "invalid_request_error": 400,
    "invalid_request": 400,
    "invalid_prompt": 400,
    "invalid_argument": 400,
    "authentication_error": 401,
    "authentication": 401,
    "unauthenticated": 401,
    "billing_error": 402,
    "payment_required": 402,
    "permission_error": 403,
    "permission_denied": 403,
    "not_found_error": 404,
    "not_found": 404,
    "timeout": 504,
    "timeout_error": 504,
    "deadline_exceeded": 504,
    "unprocessable": 422,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "rate_limited": 429,
    "too_many_requests": 429,
    "too_many_requests_error": 429,
    "resource_exhausted": 429,
    "api_error": 500,
    "server_error": 500,
    "internal": 500,
    "internal_error": 500,
    "internal_server_error": 500,
    "server": 500,
    "unmapped": 500,
    "provider_unavailable": 502,
    "unavailable": 503,
    "unavailable_error": 503,
    "service_unavailable": 503,
}

VAGUE_STATUSES = frozenset({400, 403, 422, 500})
TELLING_STATUSES = frozenset({402, 429})

# Fragments of messages, searched in this order. "Output too long" precedes the overflow: both speak of context.
WORDS: tuple[tuple[Code, tuple[str, ...]], ...] = (
    (
        Code.UNSUPPORTED_FEATURE,
        (
            "tokens is too large",
            "tokens' is too large",
            "tokens must be",
            "maximum allowed number of output tokens",
        ),
    ),
    (
        Code.CONTEXT_OVERFLOW,
        (
            "maximum context",
            "context length",
            "context_length",
            "context window",
            "context size",
            "context limit",
            "prompt is too long",
            "prompt exceeds max length",
            "input is too long",
            "length too long",
            "input token count",
            "exceeded model token limit",
            "maximum prompt length",
            "max_model_len",
            "reduce the length of the messages",
            "上下文长度",
        ),
    ),
    (
        Code.TOO_LARGE,
        ("request too large", "payload too large", "entity too large", "body too large", "reduce your message size"),
    ),
    (
        Code.MODERATION,
        (
            "moderation",
            "content policy",
            "content management policy",
            "content_filter",
            "content filter",
            "flagged",
            "guardrail",
            "prompt injection",
            "considered high risk",
            "content exists risk",
            "inappropriate content",
            "sensitive content",
            "safety system",
            "usage policies",
        ),
    ),
    (
        Code.INVALID_KEY,
        ("api key not valid", "api_key_invalid", "invalid api key", "incorrect api key", "invalid x-api-key"),
    ),
    (
        Code.BALANCE,
        (
            "insufficient balance",
            "insufficient credit",
            "insufficient fund",
            "insufficient account",
            "insufficient_quota",
            "credit balance is too low",
            "out of credits",
            "payment required",
            "billing hard limit",
            "spending limit",
            "spending-limit",
            "quota is not enough",
            "in arrears",
            "arrearage",
            "good standing",
            "余额不足",
            "欠费",
        ),
    ),
    (Code.QUOTA_MONTH, ("per month", "monthly")),
    (Code.QUOTA_PLAN, ("weekly", "5-hour", "5 hour", "billing cycle", "usage limit")),
    (Code.QUOTA_DAY, ("per day", "per-day", "perday", "daily", "(tpd)", "(rpd)")),
    (
        Code.OVERLOADED,
        (
            "overloaded",
            "at capacity",
            "over capacity",
            "capacity exceeded",
            "server is busy",
            "loading model",
            "saturated",
            "负载已饱和",
        ),
    ),
    (Code.CONCURRENCY, ("concurren", "simultaneous", "并发")),
    (
        Code.QUOTA_MINUTE,
        ("rate limit", "rate_limit", "rate-limit", "too many requests", "throttl", "rate increased too quickly"),
    ),
    (
        Code.MODEL_NOT_ALLOWED,
        (
            "subscription",
            "upgrade",
            "plan does not include",
            "access to model",
            "access to the model",
            "access this model",
            "not available in your",
            "region",
            "country",
            "location",
        ),
    ),
    (Code.BLOCKED, ("error code: 10",)),  # a content network's own refusals, as plain text
    (
        Code.MODEL_NOT_FOUND,
        (
            "model not found",
            "not a valid model",
            "invalid model",
            "unknown model",
            "no such model",
            "model not exist",
            "model does not exist",
            "unsupported model",
            "not supported model",
            "model_not_found",
        ),
    ),
    (
        Code.UNSUPPORTED_FEATURE,
        (
            "not support",
            "unsupported",
            "unrecognized",
            "unknown parameter",
            "unknown field",
            "unknown name",
            "unexpected keyword",
            "additional properties",
            "extra inputs",
            "extra_forbidden",
            "not permitted",
            "must be passed back",
            "signature",
            "prefill",
        ),
    ),
)

_ALLOWANCE = frozenset({Code.QUOTA_MONTH, Code.QUOTA_PLAN, Code.QUOTA_DAY})
_MISFIT = frozenset(
    {Code.CONTEXT_OVERFLOW, Code.TOO_LARGE, Code.MODERATION, Code.MODEL_NOT_FOUND, Code.UNSUPPORTED_FEATURE}
)
_BAD_REQUEST_WORDS = _MISFIT | {Code.INVALID_KEY, Code.BALANCE, Code.QUOTA_MINUTE}
_ANY = frozenset(Code)

# What the words of a message may turn a status into. A status that is missing here means only what it says.
ADMITTED: dict[int | None, frozenset[Code]] = {
    None: _ANY - {Code.MODEL_NOT_ALLOWED},
    400: _BAD_REQUEST_WORDS,
    422: _BAD_REQUEST_WORDS,
    403: _ALLOWANCE | {Code.MODERATION, Code.BALANCE, Code.QUOTA_MINUTE, Code.MODEL_NOT_ALLOWED, Code.BLOCKED},
    404: frozenset({Code.UNSUPPORTED_FEATURE}),
    413: frozenset({Code.CONTEXT_OVERFLOW}),
    429: _ALLOWANCE | {Code.TOO_LARGE, Code.BALANCE, Code.OVERLOADED, Code.CONCURRENCY},
    500: frozenset({Code.CONTEXT_OVERFLOW, Code.OVERLOADED}),
}

STATUSES: dict[int, Code] = {
    400: Code.BAD_REQUEST,
    401: Code.INVALID_KEY,
    402: Code.BALANCE,
    403: Code.NO_PERMISSION,
    404: Code.MODEL_NOT_FOUND,
    405: Code.MODEL_NOT_FOUND,
    408: Code.TIMEOUT,
    409: Code.SERVER_ERROR,
    410: Code.MODEL_NOT_FOUND,
    413: Code.TOO_LARGE,
    414: Code.TOO_LARGE,
    422: Code.BAD_REQUEST,
    425: Code.OVERLOADED,
    429: Code.QUOTA_MINUTE,
    431: Code.TOO_LARGE,
    451: Code.MODEL_NOT_ALLOWED,
    498: Code.OVERLOADED,
    499: Code.TIMEOUT,
    503: Code.OVERLOADED,
    504: Code.TIMEOUT,
    522: Code.TIMEOUT,
    524: Code.TIMEOUT,
    529: Code.OVERLOADED,
}


def effective_status(evidence: Evidence) -> int | None:
    """The HTTP status, or what the body states in its place: in a 200, and where the body is the more telling one."""
    http = evidence.status if evidence.status is not None and evidence.status >= 300 else None
    stated = _stated_status(evidence)
    if http is None or (http in VAGUE_STATUSES and stated in TELLING_STATUSES):
        return stated
    return http


def _stated_status(evidence: Evidence) -> int | None:
    for name in (evidence.code, evidence.kind):
        if name in NAMED_STATUSES:
            return NAMED_STATUSES[name]
        if len(name) == 3 and name.isascii() and name.isdigit() and "400" <= name <= "599":
            return int(name)
    return None


def read_code(evidence: Evidence) -> Code:
    """The reason, by the tables: names, then words the status admits, then the status."""
    for name in (evidence.code, evidence.kind):
        if name in NAMES:
            return NAMES[name]
    if evidence.status is not None and evidence.status < 300 and not evidence.error:
        return Code.NOT_AN_ANSWER
    status = effective_status(evidence)
    if evidence.kind == "html" and status in (400, 401, 403):
        return Code.BLOCKED  # no model API answers in HTML: a firewall or a captive portal did
    return read_words(evidence.text, ADMITTED.get(status, frozenset())) or _status_code(status)


def read_words(text: str, admitted: frozenset[Code]) -> Code | None:
    """The first entry of ``WORDS`` among the admitted codes that occurs in ``text``."""
    for code, fragments in WORDS if text else ():
        if code in admitted and any(fragment in text for fragment in fragments):
            return code
    return None


def _status_code(status: int | None) -> Code:
    if status in STATUSES:
        return STATUSES[status]
    return Code.REJECTED if status is not None and 400 <= status < 500 else Code.SERVER_ERROR


# --- failures ---------------------------------------------------------------------------------------------------------


def classify(evidence: Evidence, *, restated: Code | None = None, retry_after_s: float | None = None) -> Failure:
    """A refusal before, or in place of, a stream. ``restated`` is the vendor's own reading, which stands."""
    code = restated or read_code(evidence)
    meaning = CODES[code]
    return Failure(
        meaning.outcome,
        Side.UPSTREAM,
        meaning.detail,
        status=evidence.status,
        code=code,
        retry_after_s=retry_after_s,
        account_wide=meaning.account_wide,
    )


def classify_fault(evidence: Evidence, *, restated: Code | None = None, retry_after_s: float | None = None) -> Failure:
    """An error event inside a 200: ``IN_BAND_ERROR``, with what its code maps to as the cause."""
    code = restated or read_code(evidence)
    meaning = CODES[code]
    return Failure(
        Outcome.IN_BAND_ERROR,
        Side.UPSTREAM,
        meaning.detail,
        status=evidence.status,
        code=code,
        retry_after_s=retry_after_s,
        cause=meaning.outcome,
        account_wide=meaning.account_wide,
    )
