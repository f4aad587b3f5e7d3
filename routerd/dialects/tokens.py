"""Numbers that servers report, read the same in all dialects: what is not a sane number counts as nothing."""

from __future__ import annotations

from typing import Any, Final

COST_USD_MAX: Final = 1e9  # no answer costs as much: the unit is another one


def count(value: Any) -> int:
    """A number of tokens; 0 for anything else."""
    return value if isinstance(value, int) and value > 0 else 0


def cost_usd(value: Any) -> float | None:
    """What an upstream says it billed, in dollars; None for anything else."""
    return float(value) if isinstance(value, int | float) and 0 <= value < COST_USD_MAX else None
