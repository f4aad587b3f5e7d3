"""Limits as headers and sentences tell them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from routerd.canonical import LimitReport, Period
from routerd.providers import PROVIDERS, hooks
from routerd.providers.limit_headers import COMMON, deduce_period, read_rows
from routerd.providers.limit_prose import read_limit_prose

WALL = 1_795_262_415.0  # 2026-11-21 12:00:15 UTC


def proxy(**headers: str) -> CIMultiDictProxy[str]:
    """Headers as the HTTP client has them: case-insensitive, in the server's spelling."""
    return CIMultiDictProxy(CIMultiDict({name.replace("_", "-").title(): value for name, value in headers.items()}))


def limits(**values: str) -> CIMultiDictProxy[str]:
    return proxy(**{f"x_ratelimit_{name}": value for name, value in values.items()})


def test_the_common_headers_are_read_whatever_their_case() -> None:
    """Names are case-insensitive; a limit without a period says so."""
    headers = limits(limit_requests="100", remaining_requests="99", reset_requests="6m0s")

    assert read_rows(COMMON, headers, WALL) == (LimitReport("requests", None, 100.0, 99.0, 360.0),)


def test_a_limit_that_does_not_say_what_is_left_is_skipped() -> None:
    """Without ``remaining`` there is nothing to correct a ledger with."""
    assert read_rows(COMMON, limits(limit_requests="100"), WALL) == ()
    assert read_rows(COMMON, limits(remaining_requests="many"), WALL) == ()


@pytest.mark.parametrize("name", [*PROVIDERS, "unheard-of"])
def test_an_answer_without_limits_reports_none(name: str) -> None:
    """Most answers carry none of these headers."""
    assert hooks(name).limit_reports(200, proxy(content_type="text/event-stream"), WALL) == ()


TOLD: list[tuple[str, CIMultiDictProxy[str], tuple[LimitReport, ...]]] = [
    (
        "groq",
        limits(
            limit_requests="14400",
            remaining_requests="14369",
            reset_requests="3m6s",
            limit_tokens="6000",
            remaining_tokens="5963",
            reset_tokens="370ms",
        ),
        (
            LimitReport("requests", "day", 14_400.0, 14_369.0, 186.0),
            LimitReport("tokens", "minute", 6_000.0, 5_963.0, 0.37),
        ),
    ),
    (
        "openai",
        limits(
            limit_requests="10000",
            remaining_requests="9999",
            reset_requests="8.64s",
            limit_tokens="200000",
            remaining_tokens="199900",
            reset_tokens="30ms",
        ),
        (
            LimitReport("requests", "day", 10_000.0, 9_999.0, 8.64),
            LimitReport("tokens", "minute", 200_000.0, 199_900.0, 0.03),
        ),
    ),
    (
        "cerebras",
        limits(limit_requests_day="2400", remaining_requests_day="2390", reset_requests_day="33011.382867"),
        (LimitReport("requests", "day", 2_400.0, 2_390.0, 33_011.382867),),
    ),
    (
        "mistral",
        limits(limit_req_minute="23", remaining_req_minute="0", limit_tokens_month="9", remaining_tokens_month="8"),
        (
            LimitReport("requests", "minute", 23.0, 0.0, 45.0),
            LimitReport("tokens", "month", 9.0, 8.0, 9 * 86_400 + 43_185.0),
        ),
    ),
    (
        "anthropic",
        proxy(
            anthropic_ratelimit_requests_limit="50",
            anthropic_ratelimit_requests_remaining="49",
            anthropic_ratelimit_requests_reset="2026-11-21T12:00:16Z",
            anthropic_ratelimit_tokens_limit="40000",
            anthropic_ratelimit_tokens_remaining="39000",
            anthropic_ratelimit_tokens_reset="2026-11-21T12:00:45Z",
        ),
        (
            LimitReport("requests", "minute", 50.0, 49.0, 1.0),
            LimitReport("tokens", "minute", 40_000.0, 39_000.0, 30.0),
        ),
    ),
    (
        "nous",
        limits(limit_requests_1h="800", remaining_requests_1h="0", reset_requests_1h="1800.5"),
        (LimitReport("requests", "hour", 800.0, 0.0, 1_800.5),),
    ),
    (
        "sambanova",
        limits(
            limit_requests="20",
            remaining_requests="19",
            reset_requests=str(int(WALL) + 40),
            limit_requests_day="20",
            remaining_requests_day="3",
            reset_requests_day="4h17m",
        ),
        (
            LimitReport("requests", "minute", 20.0, 19.0, 40.0),
            LimitReport("requests", "day", 20.0, 3.0, 15_420.0),
        ),
    ),
    (
        "cohere",
        proxy(x_trial_endpoint_call_remaining="981"),
        (LimitReport("requests", "month", None, 981.0, None),),
    ),
    ("openrouter", limits(limit="50", remaining="0", reset="1795305600000"), ()),
    (
        "lab",
        limits(limit_tokens="9", remaining_tokens="8", reset_tokens="1s"),
        (LimitReport("tokens", None, 9.0, 8.0, 1.0),),
    ),
]


@pytest.mark.parametrize(("name", "headers", "expected"), TOLD, ids=[row[0] for row in TOLD])
def test_each_vendors_headers(name: str, headers: CIMultiDictProxy[str], expected: tuple[LimitReport, ...]) -> None:
    """What each vendor's headers say, in its own periods and formats."""
    assert hooks(name).limit_reports(200, headers, WALL) == expected


@pytest.mark.parametrize(
    ("remaining", "reset_s", "expected"),
    [
        (9_999.0, 8.64, "day"),
        (9_999.0, 0.006, "minute"),
        (9_000.0, 360.0, "hour"),
        (10_000.0, 5.0, None),  # nothing used: nothing to deduce from
        (9_999.0, 0.0, None),
        (9_999.0, 43_200.0, None),  # a calendar's reset fits no period
        (None, 5.0, None),
    ],
)
def test_a_period_follows_from_an_even_refill(remaining: float | None, reset_s: float, expected: Period | None) -> None:
    """The time to refill what is used betrays the period."""
    assert deduce_period(LimitReport("requests", None, 10_000.0, remaining, reset_s)).per == expected


SENTENCES = [
    (
        "rate limit reached for model `m` on tokens per day (tpd): limit 100000, used 97050, requested 3619. please",
        (LimitReport("tokens", "day", 100_000.0, 2_950.0, 83_851.2),),
    ),
    (
        "rate limit reached for m on tokens per minute (tpm): limit 7000, used 0, requested ~12903.",
        (LimitReport("tokens", "minute", 7_000.0, 7_000.0, 0.0),),
    ),
    (
        "rate limit reached for gpt in organization org on requests per min (rpm): limit 3, used 3, requested 1.",
        (LimitReport("requests", "minute", 3.0, 0.0, 60.0),),
    ),
    (
        "request too large for gpt on tokens per min (tpm): limit 30,000, requested 33,000.",
        (LimitReport("tokens", "minute", 30_000.0, 30_000.0, 0.0),),
    ),
    ("on tokens per day (tpd): limit 0, used 0, requested 5", ()),
    ("quota exceeded", ()),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_a_limit_told_in_a_sentence(text: str, expected: tuple[LimitReport, ...]) -> None:
    """A limit no header mentions is read from the message."""
    found = read_limit_prose(text)

    assert [report.reset_s for report in found] == pytest.approx([report.reset_s for report in expected])
    assert [(r.unit, r.per, r.limit, r.remaining) for r in found] == [
        (r.unit, r.per, r.limit, r.remaining) for r in expected
    ]


@pytest.mark.parametrize("name", [*PROVIDERS, "unheard-of"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_header_value_raises(name: str, data: st.DataObject) -> None:
    """Whatever stands in a limit header, reading it gives reports with sane numbers or none."""
    rows = hooks(name).rows
    names = [header for row in rows for header in (row.limit, row.remaining, row.reset) if header]
    headers = {header: data.draw(st.text(max_size=70)) for header in names}

    for report in hooks(name).limit_reports(429, headers, WALL):
        assert all(value is None or value >= 0 for value in (report.limit, report.remaining, report.reset_s))
