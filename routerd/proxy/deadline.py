"""By when a client that does not stream must have its answer.

Whoever streams is kept alive by events. Whoever does not hears nothing until the answer is there, and gives up after a
time of its own: an agent's title or memory call after half a minute, while its compression may take two. An answer that
comes later has cost money and helps nobody, so it is either there in time or the client is told before it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from routerd.canonical import Head
from routerd.proxy.live import LiveRoute

# The read timeout in seconds, as the OpenAI and Anthropic SDKs for Python and TypeScript send it along (openai-python
# ``_base_client._build_headers``).
CLIENT_LIMIT_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
MARGIN_S = 5.0  # before the client's own limit, so that it hears of it ...
MARGIN_SHARE = 1 / 6  # ... but at most this share of it
SMALL_PROMPT_TOKENS = (
    8_000  # calls on the side up to this size are asked with half a minute of patience; longer ones more
)


def answer_within_s(headers: Mapping[str, str], head: Head, route: LiveRoute) -> float | None:
    """Seconds from its arrival in which a request is to be answered; None: as long as it takes."""
    if head.stream:
        return None
    said_s = next(filter(None, (_seconds(headers.get(name, "")) for name in CLIENT_LIMIT_HEADERS)), None)
    if said_s is not None:
        return said_s - min(MARGIN_S, said_s * MARGIN_SHARE)
    small = not head.tools and head.prompt_tokens <= SMALL_PROMPT_TOKENS
    return route.auxiliary_timeout_s if route.auxiliary and small else None


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
