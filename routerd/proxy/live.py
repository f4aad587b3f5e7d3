"""What is alive: an account, its upstreams, and the routes over them.

The config is frozen; these change while it is in force. An ``Account`` is a provider's key: it owns the quota and the
breaker for whatever all its models share (a refused key, a host that does not answer). A ``LiveUpstream`` is an
account's model: it owns a breaker, a latency estimate and,
for each dialect, the prepared URL and headers. A ``LiveRoute`` owns the line
of those who wait for it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import msgspec

from routerd.canonical import Head, Secret, Upstream
from routerd.config import Defaults, ProviderConfig, RouteConfig
from routerd.dialects import Dialect
from routerd.policy.balance import Latency
from routerd.policy.breaker import Breaker
from routerd.policy.patience import Patience
from routerd.policy.quota import Quota
from routerd.providers import Provider, hooks
from routerd.proxy.client import Client, Target
from routerd.proxy.queue import WaitingLine


class Limits(msgspec.Struct, frozen=True):
    """The time limits of an attempt, in seconds."""

    first_token_s: float
    stall_s: float
    answer_s: float  # for an answer that comes whole

    def within(self, seconds: float) -> Limits:
        """The same, with content, or a whole answer, in so many seconds at the latest."""
        return Limits(min(self.first_token_s, seconds), self.stall_s, min(self.answer_s, seconds))


class Account:
    """One key of one provider."""

    __slots__ = ("breaker", "hooks", "id", "limits", "provider", "quota")

    def __init__(
        self, config: ProviderConfig, key: Secret, quota: Quota, breaker: Breaker, answer_timeout_s: float
    ) -> None:
        digest = hashlib.blake2b(key.reveal().encode(), digest_size=6, person=b"routerd").hexdigest()
        self.id = f"{config.name}#{digest}"  # the key's place may change in the config; its digest does not
        self.provider = config.name
        host = next((urlsplit(url).hostname or "" for url in config.base_urls.values()), "")
        self.hooks: Provider = hooks(config.vendor, host)
        self.limits = Limits(config.first_token_timeout_s, config.stall_timeout_s, answer_timeout_s)
        self.quota = quota
        self.breaker = breaker


class Face(msgspec.Struct, frozen=True):
    """An upstream in one of the dialects its provider speaks. ``upstream`` holds what it demands in this one.

    ``continuation_target``: for taking up a broken-off answer.
    """

    dialect: Dialect
    upstream: Upstream
    target: Target
    continuation_target: Target

    @property
    def prefills(self) -> bool:
        """True if a broken-off answer can be taken up in the vendor's own way."""
        return self.upstream.fix.continuation in self.dialect.continuations


class LiveUpstream:
    """One upstream and all that is known of it. ``faces``: by dialect."""

    __slots__ = (
        "account",
        "breaker",
        "client",
        "faces",
        "id",
        "in_flight",
        "latency",
        "patience",
        "scores",
        "upstream",
    )

    def __init__(
        self,
        upstream: Upstream,
        account: Account,
        breaker: Breaker,
        client: Client,
        faces: Mapping[str, Face],
    ) -> None:
        self.id = f"{account.id} {upstream.wire_model}"  # the same across reloads and restarts
        self.upstream = upstream
        self.account = account
        self.breaker = breaker
        self.client = client
        self.faces = faces
        self.latency = Latency()
        self.patience = Patience()
        self.in_flight = 0
        self.scores: dict[str, float] = {}  # route -> the last planned total, for metrics

    def __repr__(self) -> str:
        return f"<LiveUpstream {self.upstream.provider}/{self.upstream.model} {self.breaker.state}>"

    def face(self, dialect: str) -> Face:
        """The one for requests in this dialect: the same if it is spoken there, else the one it is written in anew."""
        return self.faces.get(dialect) or self.faces[self.upstream.dialect]

    def allows(self, now: float) -> bool:
        return self.breaker.allows(now) and self.account.breaker.allows(now)

    def reopens_in_s(self, now: float) -> float:
        return max(self.breaker.reopens_in_s(now), self.account.breaker.reopens_in_s(now))

    @property
    def suspect(self) -> bool:
        """True if the next request would be a probe."""
        return self.breaker.state != "closed" or self.account.breaker.state != "closed"


def hedge_scope(route: str) -> str:
    """The budget for hedging of this route; no space, which ends an owner's name in the store."""
    return f"{route}:hedge"


Group = tuple[LiveUpstream, ...]  # the keys of one provider and model
Tier = tuple[Group, ...]


class LiveRoute:
    """A route with its live upstreams."""

    __slots__ = (
        "auxiliary",
        "auxiliary_timeout_s",
        "budget",
        "headers",
        "headers_at",
        "hedge",
        "hedge_after_s",
        "hedge_budget",
        "keepalive_s",
        "line",
        "max_attempts",
        "max_wait_s",
        "name",
        "tiers",
        "value_of_time_usd_per_s",
        "whole",
    )

    def __init__(
        self,
        config: RouteConfig,
        defaults: Defaults,
        tiers: tuple[Tier, ...],
        auxiliary: tuple[Tier, ...],
        budget: Quota,
        hedge_budget: Quota,
    ) -> None:
        self.name = config.name
        self.tiers = tiers
        self.auxiliary = auxiliary
        self.budget = budget
        self.hedge = config.hedge
        self.hedge_after_s = defaults.hedge_after_s
        self.hedge_budget = hedge_budget
        self.auxiliary_timeout_s = defaults.auxiliary_timeout_s
        self.value_of_time_usd_per_s = config.value_of_time_usd_per_s
        self.whole = config.delivery == "whole"
        self.max_attempts = defaults.max_attempts
        self.max_wait_s = defaults.max_wait_s
        self.keepalive_s = defaults.keepalive_s
        self.line = WaitingLine()
        self.headers: dict[str, str] = {}  # what the quotas add up to, as of ``headers_at``
        self.headers_at = -math.inf

    @property
    def hedge_scope(self) -> str:
        """What the budget for hedging is called, in metrics and in the store."""
        return hedge_scope(self.name)

    def upstreams(self) -> Iterator[LiveUpstream]:
        """Every upstream of the route's own tiers."""
        return (live for tier in self.tiers for group in tier for live in group)

    def tiers_for(self, head: Head) -> tuple[Tier, ...]:
        """Calls without tools and stream (titles, compression) have tiers of their own in front, where configured."""
        if self.auxiliary and not head.tools and not head.stream:
            return self.auxiliary + self.tiers
        return self.tiers

    def lives_for(self, head: Head) -> Iterator[LiveUpstream]:
        """Every upstream of those tiers."""
        return (live for tier in self.tiers_for(head) for group in tier for live in group)
