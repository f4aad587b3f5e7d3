"""What differs per vendor: the hooks, and their defaults for a server that copies the common shapes.

Theory of operation
-------------------
Most quirks are data: a code or a phrase that means something else at this vendor, the headers of its limits, the wait
it never states. A vendor's file fills in those fields of ``Provider``; where that is not enough it overrides a hook.

``restate`` comes first and stands: it gives the vendor's own reading of a refusal, or None where the general tables
are right. A wait comes from the first place that states one: ``retry-after-ms``, ``retry-after``, the body, the
sentence, and last the vendor's customary wait for that reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from routerd.canonical import LimitReport
from routerd.policy.classify import Code, Evidence
from routerd.providers.durations import clamp_wait, find_wait, read_number, read_wait
from routerd.providers.limit_headers import COMMON, Row, read_rows
from routerd.providers.limit_prose import read_limit_prose

MAX_DETAILS = 16  # of an error's list of details


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """One vendor's hooks.

    names: the providers of the catalog this speaks for. hosts: its API's host names, for providers configured by URL.
    codes: its own codes or types, lower-case. phrases: lower-case fragments of its messages, searched in order.
    rows: the headers of its limits. waits: seconds it customarily takes, where it states none.
    """

    names: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    codes: Mapping[str, Code] = {}
    phrases: tuple[tuple[str, Code], ...] = ()
    rows: tuple[Row, ...] = COMMON
    waits: Mapping[Code, float] = {}

    def limit_reports(
        self,
        status: int,  # noqa: ARG002 - a hook is given what a vendor might need
        headers: Mapping[str, str],
        wall: float,
    ) -> tuple[LimitReport, ...]:
        """Limits from the headers of any response. On the hot path: one lookup per row when there are none."""
        return read_rows(self.rows, headers, wall)

    def body_reports(self, evidence: Evidence, wall: float) -> tuple[LimitReport, ...]:  # noqa: ARG002 - see above
        """Limits from the body of a refusal."""
        return read_limit_prose(evidence.text)

    def restate(self, evidence: Evidence) -> Code | None:
        """The vendor's own reading of a refusal, or None."""
        for name in (evidence.code, evidence.kind):
            if name in self.codes:
                return self.codes[name]
        return next((code for fragment, code in self.phrases if fragment in evidence.text), None)

    def retry_after_s(self, evidence: Evidence, code: Code, wall: float) -> float | None:
        """Seconds until another try makes sense, or None where nothing says so."""
        stated = stated_wait_s(evidence, wall)
        return self.waits.get(code) if stated is None else stated


def stated_wait_s(evidence: Evidence, wall: float) -> float | None:
    """The wait a refusal states, wherever it does."""
    milliseconds = read_number(evidence.headers.get("retry-after-ms"))
    if milliseconds is not None:
        return clamp_wait(milliseconds / 1e3)
    for value in (evidence.headers.get("retry-after"), *_body_waits(evidence)):
        seconds = read_wait(_as_text(value), wall)
        if seconds is not None:
            return seconds
    return find_wait(evidence.text)


def _body_waits(evidence: Evidence) -> Iterator[Any]:
    """The fields of a body that can hold a wait."""
    error = evidence.error
    metadata = child(error, "metadata")
    for place in (error, evidence.body or {}, child(error, "availability"), metadata):
        yield place.get("retry_after")
        yield place.get("retry_after_seconds")
    for name, value in child(metadata, "headers").items():
        if isinstance(name, str) and name.lower() == "retry-after":
            yield value
    for detail in details(evidence):
        yield detail.get("retryDelay")


def child(place: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under ``key``; empty if it is anything else."""
    value = place.get(key)
    return value if isinstance(value, dict) else {}


def details(evidence: Evidence) -> Iterator[dict[str, Any]]:
    """The objects of the error's ``details`` list (google.rpc.Status)."""
    items = evidence.error.get("details")
    if isinstance(items, list):
        yield from (item for item in items[:MAX_DETAILS] if isinstance(item, dict))


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
