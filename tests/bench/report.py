"""The one table, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from tests.bench.figures import DIRECT, ROWS, Row, Samples, planning_rows

OURS = "routerd"
EMPTY = "-"
HEAD_COLUMNS = 1


@dataclass(frozen=True)
class Report:
    """What a run found. ``skipped``: what was not measured and why, by name."""

    machine: str
    versions: Mapping[str, str]  # of every target that was to be measured, in the order of the columns
    settings: Mapping[str, Any]
    samples: Samples
    skipped: Mapping[str, str]

    @property
    def targets(self) -> list[str]:
        """The columns: whoever has been measured."""
        return [name for name in self.versions if any(name in by_target for by_target in self.samples.values())]

    def rows(self) -> list[Row]:
        """Those anybody has a figure for."""
        found = [*ROWS, *planning_rows(self.samples)]
        return [row for row in found if any(row.rounds(self.samples, target) for target in self.targets)]

    def missed(self) -> list[str]:
        return [row.title for row in self.rows() if self.verdict(row) == "MISS"]

    def verdict(self, row: Row) -> str:
        value = row.median(self.samples, OURS)
        if row.goal is None or value is None:
            return ""
        return "ok" if row.goal.met(value) else "MISS"

    def ratio(self, row: Row, peer: str) -> str:
        """How many times routerd's figure the peer's is."""
        ours, theirs = row.median(self.samples, OURS), row.median(self.samples, peer)
        if not ours or theirs is None or ours < 0 or theirs <= 0:
            return ""
        return f"{shown(theirs / ours)}x"

    def table(self) -> str:
        """Markdown, aligned for a terminal."""
        peers = [target for target in self.targets if target not in (DIRECT, OURS)] if OURS in self.targets else []
        head = ["median of the rounds", *self.targets, "±", *(f"{peer} / {OURS}" for peer in peers), "goal", ""]
        lines = [self._line(row, peers) for row in self.rows()]
        return "\n".join([*aligned([head, *lines]), *self._notes()])

    def _line(self, row: Row, peers: Sequence[str]) -> list[str]:
        spread = row.spread_percent(self.samples, OURS)
        return [
            row.title,
            *(shown(row.median(self.samples, target)) for target in self.targets),
            "" if spread is None else f"{spread:.0f} %",
            *(self.ratio(row, peer) for peer in peers),
            str(row.goal or ""),
            self.verdict(row),
        ]

    def _notes(self) -> list[str]:
        versions = "".join(f", {name} {version}" for name, version in self.versions.items() if version)
        notes = ["", f"{self.machine}{versions}"]
        notes.append(f"±: half the spread of {OURS}'s rounds; NAME / {OURS}: their figure as a multiple of {OURS}'s")
        notes += [
            f"{target}: {errors:,.0f} answers were wrong, or not whole in time"
            for target, errors in self._errors().items()
        ]
        notes += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return [*notes, *self._judgement()]

    def _judgement(self) -> list[str]:
        missed = self.missed()
        if not any(self.verdict(row) for row in self.rows()):
            return []
        return [f"goals missed: {'; '.join(missed)}" if missed else "every goal that was measured is met"]

    def _errors(self) -> dict[str, float]:
        errors = dict.fromkeys(self.targets, 0.0)
        for by_target in self.samples.values():
            for target, rounds in by_target.items():
                errors[target] = errors.get(target, 0.0) + sum(figures.get("errors", 0.0) for figures in rounds)
        return {target: count for target, count in errors.items() if count}

    def json(self) -> bytes:
        rows = [
            {
                "title": row.title,
                "scenario": row.scenario,
                "figure": row.figure,
                "medians": {target: row.median(self.samples, target) for target in self.targets},
                "goal": row.goal and asdict(row.goal),
                "verdict": self.verdict(row),
            }
            for row in self.rows()
        ]
        return msgspec.json.format(msgspec.json.encode({**vars(self), "rows": rows}))


def shown(value: float | None) -> str:
    """Three digits that matter."""
    if value is None or math.isnan(value):
        return EMPTY
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return (
        f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
        if abs(value) >= 1
        else f"{value:.3f}".rstrip("0").rstrip(".")
    )


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells as a Markdown table: words to the left, figures to the right."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]

    def row(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place < HEAD_COLUMNS else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    ruler = [f"-{'-' * width}-" if place < HEAD_COLUMNS else f"-{'-' * width}:" for place, width in enumerate(widths)]
    return [row(lines[0]), f"|{'|'.join(ruler)}|", *map(row, lines[1:])]
