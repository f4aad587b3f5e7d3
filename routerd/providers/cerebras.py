"""Cerebras: every period has its headers, but only on a 200; and it has two kinds of 429.

``request_quota_exceeded`` and ``token_quota_exceeded`` are ours and state a generous wait. ``queue_exceeded`` is theirs
and clears in a second or two, although it says not to retry (measured on live keys, 2026-07-26).
"""

from routerd.policy.classify import Code
from routerd.providers.limit_headers import row
from routerd.providers.provider import Provider

PROVIDER = Provider(
    names=("cerebras",),
    hosts=("api.cerebras.ai",),
    codes={"queue_exceeded": Code.OVERLOADED},
    rows=(
        row("requests", "minute", "requests-minute"),
        row("requests", "hour", "requests-hour"),
        row("requests", "day", "requests-day"),
        row("tokens", "minute", "tokens-minute"),
        row("tokens", "hour", "tokens-hour"),
        row("tokens", "day", "tokens-day"),
    ),
    waits={Code.OVERLOADED: 2.0},
)
