"""The ledger: one entry for every settled attempt, and what they add up to. Never a word of what was said.

An entry is written once and never changed; ``KEEP_S`` and ``ROWS_MAX`` bound how many there are. Totals are computed
where the entries are, by one SQL statement: a reader never sees single entries, so a store may keep them as it likes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Literal

import msgspec

from routerd.canonical import Outcome

KEEP_S = 90 * 86_400.0
ROWS_MAX = 1_000_000  # about 150 MB
NO_FAILURE = (Outcome.SUCCESS, Outcome.CLIENT_ERROR, Outcome.CANCELLED)  # nothing an upstream can be blamed for

Column = Literal["day", "route", "provider", "model"]


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One settled attempt. ``wall``: when it ended, Unix seconds; ``status``: the upstream's, where it refused."""

    wall: float
    exchange: str
    route: str
    dialect: str
    provider: str
    model: str
    outcome: str
    code: str
    status: int | None
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_usd: float
    duration_s: float
    first_token_s: float | None


class Total(msgspec.Struct, frozen=True):
    """What the attempts of one group add up to. ``group``: the values of the columns asked for.

    ``requests``: exchanges that had an attempt here; one that was tried at two upstreams counts at both.
    """

    group: tuple[str, ...]
    requests: int
    attempts: int
    failures: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_usd: float


# --- as SQL ---------------------------------------------------------------------------------------------------------

SCHEMA = """
    CREATE TABLE ledger (
        wall REAL NOT NULL,
        exchange TEXT NOT NULL,
        route TEXT NOT NULL,
        dialect TEXT NOT NULL,
        provider TEXT NOT NULL,
        model TEXT NOT NULL,
        outcome TEXT NOT NULL,
        code TEXT NOT NULL,
        status INTEGER,
        input_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        reasoning_tokens INTEGER NOT NULL,
        cost_usd REAL NOT NULL,
        duration_s REAL NOT NULL,
        first_token_s REAL
    );
    CREATE INDEX ledger_by_age ON ledger (wall);
"""
INSERT = f"INSERT INTO ledger VALUES ({', '.join('?' * len(Entry.__struct_fields__))})"  # noqa: S608 - only marks
PRUNE_OLD = "DELETE FROM ledger WHERE rowid IN (SELECT rowid FROM ledger WHERE wall < ? ORDER BY wall LIMIT ?)"
PRUNE_MANY = """
    DELETE FROM ledger WHERE rowid IN (
        SELECT rowid FROM ledger WHERE rowid <= (SELECT max(rowid) FROM ledger) - ? ORDER BY rowid LIMIT ?
    )
"""
_EXPRESSIONS: dict[Column, str] = {
    "day": "date(wall, 'unixepoch', 'localtime')",
    "route": "route",
    "provider": "provider",
    "model": "model",
}
_FAILED = f"outcome NOT IN ({', '.join(repr(str(outcome)) for outcome in NO_FAILURE)})"


def totals(database: sqlite3.Connection, since: float, by: Sequence[Column]) -> list[Total]:
    """Add up what ended at or after ``since``, group by group, in the order of the groups."""
    columns = ", ".join(_EXPRESSIONS[column] for column in by)
    places = ", ".join(str(place) for place in range(1, len(by) + 1))
    query = f"""
        SELECT {columns}, count(DISTINCT exchange), count(*), sum({_FAILED}), sum(input_tokens), sum(cached_tokens),
            sum(output_tokens), sum(reasoning_tokens), sum(cost_usd)
        FROM ledger WHERE wall >= ? GROUP BY {places} ORDER BY {places}
    """  # noqa: S608 - columns come from the table above
    return [Total(tuple(row[: len(by)]), *row[len(by) :]) for row in database.execute(query, (since,))]
