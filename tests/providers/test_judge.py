"""From a refusal to a failure, a wait and limits: the vendor's hooks and the general tables together."""

from __future__ import annotations

import datetime as dt

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from routerd.canonical import Fault, Outcome
from routerd.policy.classify import CODES, Code
from routerd.providers import DEFAULT, PROVIDERS, WAITING, hooks, judge, judge_fault
from routerd.providers.durations import MAX_WAIT_S

WALL = dt.datetime(2026, 11, 21, 12, 0, 15, tzinfo=dt.UTC).timestamp()

# --- the registry -----------------------------------------------------------------------------------------------------


def test_hooks_are_found_by_name_then_host() -> None:
    """A second account of a vendor, or one under a name of the user's, gets the vendor's hooks by its host."""
    assert hooks("openrouter") is PROVIDERS["openrouter"]
    assert hooks("mimo-token-plan-sgp") is PROVIDERS["mimo"]
    assert hooks("work", "openrouter.ai") is PROVIDERS["openrouter"]
    assert hooks("plan", "token-plan-ams.xiaomimimo.com.") is PROVIDERS["mimo"]


@pytest.mark.parametrize("host", ["", "127.0.0.1", "example.com", "evil-openrouter.ai", "openrouter.ai.example.com"])
def test_strangers_get_the_defaults(host: str) -> None:
    """A server nobody wrote a file for is taken to be of the common shape."""
    assert hooks("lab", host) is DEFAULT


def test_no_two_vendors_claim_the_same_host() -> None:
    """Else the scan's order would decide."""
    each = {id(provider): provider for provider in PROVIDERS.values()}  # some have several names
    hosts = [host for provider in each.values() for host in provider.hosts]

    assert sorted(hosts) == sorted(set(hosts))


# --- waits ------------------------------------------------------------------------------------------------------------

WAITS: list[tuple[dict[str, str], dict[str, object], float | None]] = [
    ({"Retry-After-Ms": "1500", "Retry-After": "9"}, {}, 1.5),
    ({"Retry-After": "9"}, {"retry_after": 4}, 9.0),
    ({"Retry-After": "0"}, {}, 0.0),
    ({"Retry-After": "Sat, 21 Nov 2026 12:01:15 GMT"}, {}, 60.0),
    ({"Retry-After": "-3"}, {}, 0.0),
    ({"Retry-After": "31536000"}, {}, MAX_WAIT_S),
    ({}, {"retry_after": 4}, 4.0),
    ({}, {"error": {"message": "x", "retry_after": "5s"}}, 5.0),
    ({}, {"error": {"message": "x", "availability": {"code": "x", "retry_after": 6}}}, 6.0),
    ({}, {"error": {"message": "x", "metadata": {"headers": {"Retry-After": "8"}}}}, 8.0),
    ({}, {"error": {"message": "x", "metadata": {"retry_after_seconds": 11}}}, 11.0),
    ({}, {"error": {"message": "x", "details": [{"@type": "RetryInfo", "retryDelay": "37s"}]}}, 37.0),
    ({}, {"error": {"message": "Please try again in 2m59s"}}, 179.0),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "21"}, {}, 21.0),
    ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "21"}, {}, None),
    ({}, {"error": {"message": "x", "retry_after": True}}, None),
    ({}, {}, None),
]


@pytest.mark.parametrize(("headers", "body", "expected"), WAITS)
def test_a_wait_comes_from_the_first_place_that_states_one(
    headers: dict[str, str], body: dict[str, object], expected: float | None
) -> None:
    """Milliseconds, header, body, sentence; and at last the reset of a limit with nothing left."""
    failure, _ = judge(DEFAULT, 429, CIMultiDictProxy(CIMultiDict(headers)), orjson.dumps(body), WALL)

    assert failure.outcome is Outcome.RATE_LIMITED
    assert failure.retry_after_s == expected


def test_a_request_that_does_not_fit_is_not_waited_for() -> None:
    """A 413 stays one, whatever its Retry-After says."""
    failure, _ = judge(hooks("groq"), 413, {"retry-after": "13"}, b"", WALL)

    assert (failure.code, failure.retry_after_s) == (Code.TOO_LARGE, None)


def test_an_unavailable_upstream_may_state_a_wait() -> None:
    """A breaker can use it."""
    assert judge(DEFAULT, 503, {"retry-after": "20"}, b"", WALL)[0].retry_after_s == 20.0


# --- hostile input ----------------------------------------------------------------------------------------------------

VENDORS = [*PROVIDERS, "unheard-of"]
FEW = settings(max_examples=30, deadline=None)  # of each vendor
leaves = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=40)
)
KEYS = [
    "error", "code", "type", "status", "message", "detail", "details", "metadata", "headers", "availability",
    "violations", "quotaId", "quotaValue", "retryDelay", "retry_after", "reason", "limit_source", "base_resp",
    "status_code", "choices", "x-ratelimit-reset",
]  # fmt: skip
TEXTS = [
    "free-models-per-day", "generaterequestsperday", "429", "402", "1308", "[1308][reset at 9999-99-99 99:99:99]",
    "on tokens per day (tpd): limit 0, used 9, requested 1", "try again in 99999999d", "(1008)", "insufficient_quota",
]  # fmt: skip
documents = st.recursive(
    leaves | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=25,
)
header_names = st.sampled_from(
    ["retry-after", "retry-after-ms", "x-ratelimit-reset", "x-ratelimit-remaining-requests", "x-ratelimit-limit"]
)


@pytest.mark.parametrize("name", VENDORS)
@FEW
@given(
    status=st.sampled_from([200, 400, 401, 402, 403, 404, 413, 418, 422, 429, 500, 503, 529]),
    headers=st.dictionaries(header_names, st.text(max_size=70), max_size=5),
    body=st.binary(max_size=200) | documents.map(orjson.dumps),
)
def test_any_refusal_gets_a_failure_and_a_sane_wait(
    name: str, status: int, headers: dict[str, str], body: bytes
) -> None:
    """No vendor's hook raises, whatever it is handed; waits are bounded and only where waiting helps."""
    failure, reports = judge(hooks(name), status, headers, body, WALL)

    assert failure.outcome is CODES[Code(failure.code)].outcome
    assert failure.retry_after_s is None or 0 <= failure.retry_after_s <= MAX_WAIT_S
    assert failure.retry_after_s is None or failure.outcome in WAITING
    assert all(report.remaining is None or report.remaining >= 0 for report in reports)


@pytest.mark.parametrize("name", VENDORS)
@FEW
@given(
    status=st.none() | st.integers(-1, 999),
    code=st.text(max_size=20) | st.sampled_from(TEXTS),
    message=st.text(max_size=200) | st.sampled_from(TEXTS),
)
def test_any_fault_gets_a_failure_with_a_cause(name: str, status: int | None, code: str, message: str) -> None:
    """An error inside a 200 is never taken for anything else, and always has a cause."""
    failure, _ = judge_fault(hooks(name), Fault(status, code, message), WALL)

    assert failure.outcome is Outcome.IN_BAND_ERROR
    assert failure.cause is CODES[Code(failure.code)].outcome
