"""Groq: the headers count requests per day and tokens per minute; the other two limits exist in the 429's text only.

Measured on live keys, 2026-07-26. A request above the per-minute tokens is a 413: waiting never helps.
"""

from routerd.providers.limit_headers import row
from routerd.providers.provider import Provider

PROVIDER = Provider(
    names=("groq",),
    hosts=("api.groq.com",),
    rows=(row("requests", "day", "requests"), row("tokens", "minute", "tokens")),
)
