"""Every metric name in one place, and the one log line per exchange.

How it works
------------
Counters and histograms are fed at two points only: when an attempt settles and when an exchange ends. What is a *state*
(breakers, quotas, estimates) is not pushed but read at scrape time from one ``Live`` snapshot, so the hot path pays
nothing for it and a scrape never shows a stale gauge.

Label sets are closed: providers, models and routes come from the config; whatever a client invents is ``other``.
A counter that first appears with the value 1 looks to ``rate()`` as if nothing had happened, and on a quiet box that
first failover is the one that matters. So ``declare`` makes the children of what the named routes can use at start,
with zeros; the rest (a catalog offers a hundred models) comes with its first use. All that is shown costs about 10 µs
per sample at each scrape, hence the bounds.

prometheus_client's ``labels()`` takes a lock and builds a tuple, so children are kept in plain dicts here.
Nothing that a person wrote (prompts, completions, keys, an upstream's error text) may reach a label or a log line.
"""

from __future__ import annotations

import itertools
import logging
import math
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import orjson
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from routerd import __version__
from routerd.canonical import Outcome, Usage

# structlog imports rich wherever it is installed, for tracebacks that are never printed here: 28 ms at every start and
# 2.5 MB for as long as the daemon runs. Commands that print tables import it themselves, later.
_hidden = "rich" not in sys.modules
if _hidden:
    sys.modules["rich"] = None  # type: ignore[assignment]  # how Python is told that a module cannot be imported
import structlog  # noqa: E402 - see above

if _hidden:
    del sys.modules["rich"]

OTHER = "other"  # the label of whatever nobody configured
ACCOUNT = "*"  # stands for the model where something is a whole account's
BREAKER_STATES = ("closed", "open", "half-open")
RECOVERY_STEPS = ("retry", "continue", "wait", "hedge", "probe")
RESULTS = ("success", "failure")
TOKEN_KINDS = ("input", "cached", "output", "reasoning")
PRICE_RESULTS = ("fresh", "unchanged", "failed", "rejected")
WAIT_REASONS = ("quota", "breaker", "retry", "budget")
NEVER_HANDED_ON = (Outcome.SUCCESS, Outcome.CLIENT_ERROR, Outcome.CANCELLED)
HANDOVERS_KEPT = 50  # for the status page
MAX_DECLARED_UPSTREAMS = 32  # provider and model; the first of the routes, in order of preference
MAX_DECLARED_HANDOVERS = 20  # ordered pairs of providers: all there are between five

DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200)
FIRST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2.5, 4, 6, 10, 15, 20, 30, 45, 60, 90, 120, 180)
OVERHEAD_BUCKETS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25)
# OpenTelemetry GenAI semantic conventions (v1.41-era text); the first-chunk buckets go on to 180 s for thinking models.
GEN_AI_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
GEN_AI_FIRST_CHUNK = (*GEN_AI_SECONDS[:-1], 60.0, 81.92, 120.0, 180.0)
GEN_AI_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)


class AttemptRecord(msgspec.Struct):
    """One settled attempt. Seconds are monotonic differences; ``cost_usd`` is ours, or the upstream's if believed."""

    provider: str
    model: str
    outcome: Outcome
    status: int | None = None
    code: str = ""
    duration_s: float = 0.0
    first_token_s: float | None = None
    chunks: int = 0
    usage: Usage | None = None
    cost_usd: float = 0.0

    def log_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "provider": self.provider,
            "model": self.model,
            "outcome": self.outcome,
            "duration_s": round(self.duration_s, 4),
        }
        if self.status is not None:
            fields["status"] = self.status
        if self.code:
            fields["code"] = self.code
        if self.first_token_s is not None:
            fields["first_token_s"] = round(self.first_token_s, 4)
        return fields


class ExchangeRecord(msgspec.Struct):
    """One ended exchange, as it is counted and logged."""

    id: str
    route: str
    dialect: str
    stream: bool
    outcome: Outcome = Outcome.CANCELLED
    status: int = 0
    detail: str = ""
    duration_s: float = 0.0
    overhead_s: float | None = None
    first_content_s: float | None = None
    waited_s: float = 0.0
    dropped: list[str] = msgspec.field(default_factory=list)  # features that another dialect could not carry
    repairs: int = 0  # tool calls whose arguments were put right
    prompt_tokens: int = 0
    attempts: list[AttemptRecord] = msgspec.field(default_factory=list)


class Handover(msgspec.Struct, frozen=True):
    """An attempt that failed, and who came next. ``target`` empty: nobody, the client was told of the failure."""

    wall: float
    exchange: str
    route: str
    source: str  # provider/model; empty: the exchange ended before any attempt
    target: str
    outcome: Outcome
    code: str
    status: int | None
    detail: str


class Spent(msgspec.Struct):
    """What one upstream was used for."""

    attempts: int = 0
    failures: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float = 0.0


class Today:
    """What was spent since midnight, as the clock on this machine's wall has it, by provider and model.

    The same is in the ledger; but who looks at a page every two seconds must not have it added up each time.
    """

    __slots__ = ("_ends", "began", "rows")

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], Spent] = {}
        self.began = self._ends = -math.inf

    @staticmethod
    def midnight(wall: float, *, days: int = 0) -> float:
        """The one before ``wall``, or so many days after that."""
        day = time.localtime(wall)
        return time.mktime((day.tm_year, day.tm_mon, day.tm_mday + days, 0, 0, 0, 0, 0, -1))

    def turn(self, wall: float) -> None:
        """Begin anew if the day is over."""
        if wall >= self._ends:
            self.rows = {}
            self.began, self._ends = self.midnight(wall), self.midnight(wall, days=1)

    def take_up(self, rows: dict[tuple[str, ...], Spent], wall: float) -> None:
        """What an earlier process spent of it."""
        self.turn(wall)
        self.rows = rows

    def add(self, record: AttemptRecord, wall: float) -> None:
        self.turn(wall)
        key = (record.provider, record.model)
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Spent()
        row.attempts += 1
        row.failures += record.outcome not in NEVER_HANDED_ON
        row.cost_usd += record.cost_usd
        usage = record.usage
        if usage is not None:
            row.input_tokens += usage.input_tokens
            row.cached_tokens += usage.cached_tokens
            row.output_tokens += usage.output_tokens
            row.reasoning_tokens += usage.reasoning_tokens


class PriceList(msgspec.Struct):
    """A source of fresh prices.

    ``checked_at``: Unix seconds of its last good answer. ``result``: of this process's last attempt; empty: none yet.
    """

    models: int = 0
    checked_at: float | None = None
    result: str = ""


class Live(msgspec.Struct):
    """The states a scrape shows. Every entry is (labels..., value)."""

    breakers: list[tuple[str, str, str]] = msgspec.field(default_factory=list)  # provider, model, state
    quotas: list[tuple[str, str, float, float, float]] = msgspec.field(default_factory=list)  # .., limit, left, reset
    latencies: list[tuple[str, str, float]] = msgspec.field(default_factory=list)
    scores: list[tuple[str, str, str, float]] = msgspec.field(default_factory=list)
    budgets: list[tuple[str, float, float, float]] = msgspec.field(default_factory=list)  # scope, limit, left, reset


class _LiveCollector(Collector):
    """Turns the snapshot into gauges at scrape time."""

    def __init__(self) -> None:
        self.snapshot: Callable[[], Live] = Live

    def collect(self) -> Iterable[Metric]:
        live = self.snapshot()
        yield _family(
            "routerd_breaker_state",
            "1 for the state the breaker is in, 0 for the others.",
            ("provider", "model", "state"),
            (((p, m, s), float(s == now)) for p, m, now in live.breakers for s in BREAKER_STATES),
        )
        quota = ("provider", "limit")
        yield _family(
            "routerd_quota_limit", "Size of the quota.", quota, (((p, n), lim) for p, n, lim, _, _ in live.quotas)
        )
        yield _family(
            "routerd_quota_remaining",
            "What is left of the quota.",
            quota,
            (((p, n), left) for p, n, _, left, _ in live.quotas),
        )
        yield _family(
            "routerd_quota_reset_timestamp_seconds",
            "When the quota is whole again.",
            quota,
            (((p, n), at) for p, n, _, _, at in live.quotas),
        )
        yield _family(
            "routerd_upstream_latency_estimate_seconds",
            "Expected time to the first content token.",
            ("provider", "model"),
            (((p, m), s) for p, m, s in live.latencies),
        )
        yield _family(
            "routerd_upstream_score_usd",
            "Expected cost of the last planned request, time included.",
            ("route", "provider", "model"),
            (((r, p, m), s) for r, p, m, s in live.scores),
        )
        yield _family(
            "routerd_budget_limit_usd",
            "Size of the budget.",
            ("scope",),
            (((scope,), limit) for scope, limit, _, _ in live.budgets),
        )
        yield _family(
            "routerd_budget_remaining_usd",
            "What is left of the budget.",
            ("scope",),
            (((scope,), left) for scope, _, left, _ in live.budgets),
        )
        yield _family(
            "routerd_budget_reset_timestamp_seconds",
            "When the budget is whole again.",
            ("scope",),
            (((scope,), at) for scope, _, _, at in live.budgets),
        )


def _family(
    name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


class _ProcessCollector(ProcessCollector):
    """The standard ``process_*`` metrics, also where a sandbox hides ``/proc/stat`` (systemd's ``ProcSubset=pid``)."""

    def _boot_time(self) -> float:
        """Unix seconds of the boot. The client library takes an OSError here for "there is no /proc"."""
        Path("/proc/self/stat").stat()
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class Telemetry:
    """Counts and logs. One per process; tests make their own."""

    def __init__(self, log_file: Any = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it unannotated
        self.registry = CollectorRegistry()
        self._lines = structlog.BytesLogger(log_file or sys.stderr.buffer)
        self.log = _logger(self._lines)
        self._define_exchange_metrics()
        self._define_attempt_metrics()
        self._define_service_metrics()
        self._live = _LiveCollector()
        self.registry.register(self._live)
        _ProcessCollector(registry=self.registry)
        self._attempt_children: dict[tuple[str, str, Outcome], _AttemptChildren] = {}
        self._exchange_children: dict[tuple[str, str, Outcome], _ExchangeChildren] = {}
        self._open_children: dict[str, Gauge] = {}
        self.handovers: deque[Handover] = deque(maxlen=HANDOVERS_KEPT)
        self.today = Today()
        self.config_refused = False
        self.prices: dict[str, PriceList] = {}  # by source; for the status page

    # --- definitions ------------------------------------------------------------------------------------------------

    def _define_exchange_metrics(self) -> None:
        by_route = ("route", "dialect")
        self.exchanges = self._counter(
            "routerd_exchanges", "Client requests, by how they ended.", (*by_route, "outcome")
        )
        self.exchange_duration = self._histogram(
            "routerd_exchange_duration_seconds", "First byte in to last byte out.", by_route, DURATION_BUCKETS
        )
        self.first_content = self._histogram(
            "routerd_first_content_seconds", "Request in to first content out.", by_route, FIRST_BUCKETS
        )
        self.overhead = self._histogram(
            "routerd_overhead_seconds", "Own time before the first dispatch.", (), OVERHEAD_BUCKETS
        )
        self.open_exchanges = Gauge(
            "routerd_open_exchanges", "Client requests being served.", ("dialect",), registry=self.registry
        )
        self.wait = self._histogram(
            "routerd_wait_seconds", "Time a request was held for capacity.", ("reason",), DURATION_BUCKETS
        )
        self.failovers = self._counter(
            "routerd_failovers",
            "Attempts handed on to another provider.",
            ("from_provider", "to_provider", "outcome"),
        )
        self.recoveries = self._counter(
            "routerd_recoveries", "What was done about a fault, and how it went.", ("step", "result")
        )
        self.dropped_features = self._counter(
            "routerd_dropped_features",
            "Request features another dialect could not carry.",
            ("from_dialect", "to_dialect", "feature"),
        )

    def _define_attempt_metrics(self) -> None:
        by_model = ("provider", "model")
        self.attempts = self._counter("routerd_attempts", "Tries at an upstream, by outcome.", (*by_model, "outcome"))
        self.first_token = self._histogram(
            "routerd_attempt_first_token_seconds", "Dispatch to first content token.", by_model, FIRST_BUCKETS
        )
        self.tokens = self._counter(
            "routerd_tokens",
            "Tokens, as the upstream counted them; cached ones are among input, reasoning among output.",
            (*by_model, "kind"),
        )
        self.cost = self._counter("routerd_cost_usd", "Dollars spent.", by_model)
        gen_ai = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
        self.gen_ai_duration = self._histogram(
            "gen_ai_client_operation_duration_seconds",
            "GenAI operation duration.",
            (*gen_ai, "error_type"),
            GEN_AI_SECONDS,
        )
        self.gen_ai_tokens = self._histogram(
            "gen_ai_client_token_usage", "Tokens used per operation.", (*gen_ai, "gen_ai_token_type"), GEN_AI_TOKENS
        )
        self.gen_ai_first = self._histogram(
            "gen_ai_client_operation_time_to_first_chunk_seconds",
            "Time to the first chunk.",
            gen_ai,
            GEN_AI_FIRST_CHUNK,
        )
        self.gen_ai_chunk = self._histogram(
            "gen_ai_client_operation_time_per_output_chunk_seconds",
            "Mean time between chunks of one answer.",
            gen_ai,
            GEN_AI_SECONDS,
        )

    def _define_service_metrics(self) -> None:
        self.breaker_transitions = self._counter(
            "routerd_breaker_transitions", "Changes of a breaker's state.", ("provider", "model", "to")
        )
        self.config_reloads = self._counter("routerd_config_reloads", "Reloads asked for.", ("result",))
        self.config_success_time = Gauge(
            "routerd_config_last_reload_success_timestamp_seconds",
            "When the config in force was taken up.",
            registry=self.registry,
        )
        self.config_successful = Gauge(
            "routerd_config_last_reload_successful",
            "1 if the config last offered was taken up, 0 if an older one is still in force.",
            registry=self.registry,
        )
        self.price_refreshes = self._counter("routerd_price_refreshes", "Price lists asked for.", ("source", "result"))
        self.price_doubts = self._counter(
            "routerd_prices_doubted", "Prices that changed too much to be believed.", ("source",)
        )
        self.price_time = Gauge(
            "routerd_prices_last_refresh_timestamp_seconds",
            "When a price list was last found to be what is in use.",
            ("source",),
            registry=self.registry,
        )
        build = Info("routerd_build", "What is running.", registry=self.registry)
        build.info({"version": __version__, "python": platform.python_version()})

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def watch(self, snapshot: Callable[[], Live]) -> None:
        """Show this snapshot's states at every scrape, in place of any watched before."""
        self._live.snapshot = snapshot

    def declare(self, routes: Iterable[str], dialects: Sequence[str], upstreams: Iterable[tuple[str, str]]) -> None:
        """Let every counter of what is used begin at 0. ``upstreams``: (provider, model), the most wanted first."""
        self._declare_service()
        for dialect in dialects:
            self.open_exchanges.labels(dialect)
        for labels in itertools.product(routes, dialects, Outcome):
            self.exchanges.labels(*labels)
        wanted = list(itertools.islice(dict.fromkeys(upstreams), MAX_DECLARED_UPSTREAMS))
        for provider, model in wanted:
            self._declare_upstream(provider, model)
        self._declare_handovers(dict.fromkeys(provider for provider, _ in wanted))

    def _declare_service(self) -> None:
        for labels in itertools.product(RECOVERY_STEPS, RESULTS):
            self.recoveries.labels(*labels)
        for result in RESULTS:
            self.config_reloads.labels(result)
        for reason in WAIT_REASONS:
            self.wait.labels(reason)

    def _declare_upstream(self, provider: str, model: str) -> None:
        self.cost.labels(provider, model)
        for outcome in Outcome:
            self.attempts.labels(provider, model, outcome)
        for kind in TOKEN_KINDS:
            self.tokens.labels(provider, model, kind)
        for state in BREAKER_STATES:
            self.breaker_transitions.labels(provider, model, state)
            self.breaker_transitions.labels(provider, ACCOUNT, state)

    def _declare_handovers(self, providers: Iterable[str]) -> None:
        pairs = itertools.islice(itertools.permutations(providers, 2), MAX_DECLARED_HANDOVERS)
        for (source, target), outcome in itertools.product(pairs, Outcome):
            if outcome not in NEVER_HANDED_ON:
                self.failovers.labels(source, target, outcome)

    # --- what happened ----------------------------------------------------------------------------------------------

    def opened(self, dialect: str) -> Gauge:
        """Count an exchange in. The caller counts it out with ``dec()`` on what this returns."""
        child = self._open_children.get(dialect)
        if child is None:
            child = self._open_children[dialect] = self.open_exchanges.labels(dialect)
        child.inc()
        return child

    def attempt(self, record: AttemptRecord) -> None:
        """Count one settled attempt."""
        key = (record.provider, record.model, record.outcome)
        children = self._attempt_children.get(key)
        if children is None:
            children = self._attempt_children[key] = _AttemptChildren(self, *key)
        children.count(record)
        self.today.add(record, time.time())

    def exchange(self, record: ExchangeRecord) -> None:
        """Count one ended exchange and write its log line."""
        key = (record.route, record.dialect, record.outcome)
        children = self._exchange_children.get(key)
        if children is None:
            children = self._exchange_children[key] = _ExchangeChildren(self, *key)
        children.count(record)
        if record.overhead_s is not None:
            self.overhead.observe(record.overhead_s)
        if record.outcome not in NEVER_HANDED_ON:
            self._note_handover(record, "")
        self._lines.msg(orjson.dumps(exchange_fields(record), option=orjson.OPT_UTC_Z))

    def reloaded(self, *, success: bool) -> None:
        """Count a config being taken up (or refused), and note since when the one in force is."""
        self.config_reloads.labels("success" if success else "failure").inc()
        self.config_in_force(success=success)

    def config_in_force(self, *, success: bool = True) -> None:
        """Note that the config last offered is in force from now on; or that it is not, and the old one stays."""
        self.config_successful.set(success)
        self.config_refused = not success
        if success:
            self.config_success_time.set_to_current_time()

    def watch_prices(self, sources: Sequence[str]) -> None:
        """Count and show these price lists from now on, and no others."""
        for source in self.prices.keys() - set(sources):
            if self.prices.pop(source).checked_at is not None:
                self.price_time.remove(source)
        for source in sources:
            self.prices.setdefault(source, PriceList())
            self.price_doubts.labels(source)
            for result in PRICE_RESULTS:
                self.price_refreshes.labels(source, result)

    def prices_known(self, source: str, models: int, checked_at: float) -> None:
        """Note how many models a price list has, and when that was last so. Nothing if the source is not watched."""
        known = self.prices.get(source)
        if known is not None:
            known.models, known.checked_at = models, checked_at
            self.price_time.labels(source).set(checked_at)

    def price_refresh(self, source: str, result: str) -> None:
        """Count an attempt to refresh a price list."""
        self.price_refreshes.labels(source, result).inc()
        if source in self.prices:
            self.prices[source].result = result

    def prices_doubted(self, source: str, count: int) -> None:
        """Count prices that were not believed."""
        self.price_doubts.labels(source).inc(count)

    def transition(self, provider: str, model: str, before: str, after: str) -> None:
        """Count and log a breaker's change of state."""
        self.breaker_transitions.labels(provider, model, after).inc()
        level = self.log.info if after == "closed" else self.log.warning
        level("breaker", provider=provider, model=model, before=before, state=after)

    def failover(self, record: ExchangeRecord, provider: str, model: str) -> None:
        """Note an exchange's last attempt being handed on, and count it if that is to another provider."""
        source = record.attempts[-1]
        self._note_handover(record, f"{provider}/{model}")
        if source.provider != provider:
            self.failovers.labels(source.provider, provider, source.outcome).inc()

    def _note_handover(self, record: ExchangeRecord, target: str) -> None:
        last = record.attempts[-1] if record.attempts else None
        self.handovers.append(
            Handover(
                time.time(),
                record.id,
                record.route,
                "" if last is None else f"{last.provider}/{last.model}",
                target,
                record.outcome if last is None else last.outcome,
                "" if last is None else last.code,
                None if last is None else last.status,
                "" if target else record.detail,
            )
        )

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics if the scraper asks for it."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class _AttemptChildren:
    """The metric children of one provider, model and outcome."""

    def __init__(self, metrics: Telemetry, provider: str, model: str, outcome: Outcome) -> None:
        gen_ai = ("chat", provider, model)
        error = "" if outcome is Outcome.SUCCESS else outcome
        self.attempts = metrics.attempts.labels(provider, model, outcome)
        self.first_token = metrics.first_token.labels(provider, model)
        self.tokens = [metrics.tokens.labels(provider, model, kind) for kind in TOKEN_KINDS]
        self.cost = metrics.cost.labels(provider, model)
        self.duration = metrics.gen_ai_duration.labels(*gen_ai, error)
        self.usage_in = metrics.gen_ai_tokens.labels(*gen_ai, "input")
        self.usage_out = metrics.gen_ai_tokens.labels(*gen_ai, "output")
        self.first_chunk = metrics.gen_ai_first.labels(*gen_ai)
        self.per_chunk = metrics.gen_ai_chunk.labels(*gen_ai)

    def count(self, record: AttemptRecord) -> None:
        self.attempts.inc()
        self.duration.observe(record.duration_s)
        if record.cost_usd:
            self.cost.inc(record.cost_usd)
        if record.first_token_s is not None:
            self._count_pace(record, record.first_token_s)
        if record.usage is not None:
            self._count_usage(record.usage)

    def _count_pace(self, record: AttemptRecord, first_token_s: float) -> None:
        self.first_token.observe(first_token_s)
        self.first_chunk.observe(first_token_s)
        if record.chunks > 1:
            self.per_chunk.observe((record.duration_s - first_token_s) / (record.chunks - 1))

    def _count_usage(self, usage: Usage) -> None:
        counts = (usage.input_tokens, usage.cached_tokens, usage.output_tokens, usage.reasoning_tokens)
        for child, count in zip(self.tokens, counts, strict=True):
            if count:
                child.inc(count)
        self.usage_in.observe(usage.input_tokens)
        self.usage_out.observe(usage.output_tokens)


class _ExchangeChildren:
    """The metric children of one route, dialect and outcome."""

    def __init__(self, metrics: Telemetry, route: str, dialect: str, outcome: Outcome) -> None:
        self.total = metrics.exchanges.labels(route, dialect, outcome)
        self.duration = metrics.exchange_duration.labels(route, dialect)
        self.first_content = metrics.first_content.labels(route, dialect)

    def count(self, record: ExchangeRecord) -> None:
        self.total.inc()
        self.duration.observe(record.duration_s)
        if record.first_content_s is not None:
            self.first_content.observe(record.first_content_s)


def exchange_fields(record: ExchangeRecord) -> dict[str, Any]:
    """The log line: ids, outcome, tokens, cost and times; never content.

    The one line per request is built here whole instead of passing the logger's processors, which cost three times as
    much; it goes out through the same structlog writer and looks the same.
    """
    fields: dict[str, Any] = {
        "event": "exchange",
        "level": "info",
        "timestamp": datetime.now(UTC),
        "exchange": record.id,
        "route": record.route,
        "dialect": record.dialect,
        "stream": record.stream,
        "outcome": record.outcome,
        "status": record.status,
        "duration_s": round(record.duration_s, 4),
        "prompt_tokens_estimate": record.prompt_tokens,
        "attempts": [attempt.log_fields() for attempt in record.attempts],
    }
    fields.update(_optional_fields(record))
    return fields


def _optional_fields(record: ExchangeRecord) -> Iterator[tuple[str, Any]]:
    usage = next((a.usage for a in reversed(record.attempts) if a.usage is not None), None)
    if record.first_content_s is not None:
        yield "first_content_s", round(record.first_content_s, 4)
    if record.overhead_s is not None:
        yield "overhead_s", round(record.overhead_s, 6)
    if record.waited_s:
        yield "waited_s", round(record.waited_s, 3)
    if record.repairs:
        yield "repairs", record.repairs
    if record.dropped:
        yield "dropped", record.dropped
    if usage is not None:
        yield "input_tokens", usage.input_tokens
        yield "cached_tokens", usage.cached_tokens
        yield "output_tokens", usage.output_tokens
        yield "cost_usd", round(sum(a.cost_usd for a in record.attempts), 8)
    if record.detail:
        yield "detail", record.detail


def _logger(lines: structlog.BytesLogger) -> structlog.stdlib.BoundLogger:
    """JSON lines on stderr (or a given binary file): journald and every log shipper read them as they are."""
    logger = structlog.wrap_logger(
        lines,
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    result: structlog.stdlib.BoundLogger = logger
    return result
