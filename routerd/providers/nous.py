"""Nous Portal: per-minute and per-hour buckets in the headers, resets in plain seconds.

A 429 is the account's own only if one of those buckets is empty and stays so for a minute or more; any other
is a shortage behind the portal.
"""

from __future__ import annotations

from routerd.policy.classify import Code, Evidence, effective_status
from routerd.providers.limit_headers import read_rows, row
from routerd.providers.provider import Provider

SHORTEST_OWN_RESET_S = 60.0


class Nous(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        if effective_status(evidence) != 429:
            return super().restate(evidence)
        reports = read_rows(self.rows, evidence.headers, 0.0)
        own = any(report.remaining == 0 and (report.reset_s or 0) >= SHORTEST_OWN_RESET_S for report in reports)
        return Code.QUOTA_MINUTE if own else Code.OVERLOADED


PROVIDER = Nous(
    names=("nous",),
    hosts=("inference-api.nousresearch.com",),
    rows=(
        row("requests", "minute", "requests"),
        row("requests", "hour", "requests-1h"),
        row("tokens", "minute", "tokens"),
        row("tokens", "hour", "tokens-1h"),
    ),
)
