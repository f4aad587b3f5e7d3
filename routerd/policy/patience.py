"""How long to wait for an upstream, learned from how long it usually takes.

A fixed limit is wrong twice: it cuts a slow thinker, and it waits a minute for a fast model that has died. So per
prompt size the last waits are remembered, and the limit is their 99th percentile times ``FACTOR``, never under the
configured floor nor above the configured ceiling. Until ``SAMPLES_MIN`` were seen the ceiling holds.

Two limits are learned: until the first content, and the longest silence between two pieces of content.

The same waits say when somebody else may be asked as well (a hedge): after the 95th percentile, which one request in
twenty exceeds. While too little is known, a multiple of the expected wait stands for it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque

from routerd.policy.balance import CLASS_BOUNDS_TOKENS

FACTOR = 4.0
SAMPLES_MIN = 10
SAMPLES_MAX = 100  # per prompt size: with so few, the 99th percentile is the largest but one
HEDGE_FACTOR = 3.0  # waits for a first token are skewed: few take more than three times the mean


class Waits:
    """The last waits of one kind, kept in order of arrival and in order of size: a request must not cost a sort."""

    __slots__ = ("_arrived", "_ascending")

    def __init__(self) -> None:
        self._arrived: deque[float] = deque()
        self._ascending: list[float] = []

    def note(self, wait_s: float) -> None:
        if len(self._arrived) == SAMPLES_MAX:
            del self._ascending[bisect_left(self._ascending, self._arrived.popleft())]
        self._arrived.append(wait_s)
        insort(self._ascending, wait_s)

    def limit_s(self, floor_s: float, ceiling_s: float) -> float:
        """The limit to set; the ceiling while too little is known."""
        p99_s = self.quantile_s(0.99)
        return ceiling_s if p99_s is None else min(ceiling_s, max(floor_s, FACTOR * p99_s))

    def quantile_s(self, share: float) -> float | None:
        """The wait that this share of all does not exceed; None while too little is known."""
        count = len(self._ascending)
        return None if count < SAMPLES_MIN else self._ascending[int(share * (count - 1) + 0.5)]


class Patience:
    """What one upstream's waits have been, by prompt size."""

    __slots__ = ("_first", "_gap")

    def __init__(self) -> None:
        self._first: dict[int, Waits] = {}
        self._gap: dict[int, Waits] = {}

    def observe(self, prompt_tokens: int, first_s: float, longest_gap_s: float) -> None:
        """Note a whole answer's waits: for its first content, and the longest between two pieces of it."""
        size = bisect_right(CLASS_BOUNDS_TOKENS, prompt_tokens)
        self._first.setdefault(size, Waits()).note(first_s)
        self._gap.setdefault(size, Waits()).note(longest_gap_s)

    def first_token_s(self, prompt_tokens: int, floor_s: float, ceiling_s: float) -> float:
        """The limit for the first content."""
        return _limit_s(self._first, prompt_tokens, floor_s, ceiling_s)

    def stall_s(self, prompt_tokens: int, floor_s: float, ceiling_s: float) -> float:
        """The limit for silence in mid-answer."""
        return _limit_s(self._gap, prompt_tokens, floor_s, ceiling_s)

    def hedge_after_s(self, prompt_tokens: int, expected_s: float, floor_s: float, limit_s: float) -> float:
        """After which wait for the first content another upstream may be asked.

        ``expected_s`` is the usual wait. Half of ``limit_s``, after which the wait is given up, is always enough.
        """
        known = self._first.get(bisect_right(CLASS_BOUNDS_TOKENS, prompt_tokens))
        p95_s = known.quantile_s(0.95) if known is not None else None
        usual_s = HEDGE_FACTOR * expected_s if p95_s is None else p95_s
        return max(floor_s, min(usual_s, limit_s / 2))


def _limit_s(waits: dict[int, Waits], prompt_tokens: int, floor_s: float, ceiling_s: float) -> float:
    known = waits.get(bisect_right(CLASS_BOUNDS_TOKENS, prompt_tokens))
    return ceiling_s if known is None else known.limit_s(floor_s, ceiling_s)
