"""What differs per vendor, and the one place that turns a refusal into a failure and what it says of limits.

Every module here that exposes ``PROVIDER`` is found by a scan, so a vendor costs one file. ``hooks`` finds the right
one by the provider's name, else by its host; a server nobody wrote a file for gets the defaults.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from routerd.canonical import Failure, Fault, LimitReport, Outcome
from routerd.policy.classify import (
    CODES,
    Code,
    Evidence,
    classify,
    classify_fault,
    fault_evidence,
    read_code,
    read_evidence,
)
from routerd.providers.provider import Provider

__all__ = ["DEFAULT", "PROVIDERS", "Provider", "hooks", "judge", "judge_fault"]

DEFAULT = Provider()

# After these a wait can help. A body that does not fit today does not fit tomorrow, whatever its Retry-After says.
WAITING = frozenset({Outcome.RATE_LIMITED, Outcome.EXHAUSTED, Outcome.UNAVAILABLE})


def _scan() -> dict[str, Provider]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    providers = [module.PROVIDER for module in modules if hasattr(module, "PROVIDER")]
    return {name: provider for provider in providers for name in provider.names}


PROVIDERS: dict[str, Provider] = _scan()
_BY_HOST: dict[str, Provider] = {host: provider for provider in PROVIDERS.values() for host in provider.hosts}


def hooks(name: str, host: str = "") -> Provider:
    """The hooks for a configured provider; for an unknown one, those of the vendor its host belongs to, if any."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    labels = host.lower().rstrip(".").split(".")
    suffixes = (".".join(labels[start:]) for start in range(len(labels)))
    return next((_BY_HOST[suffix] for suffix in suffixes if suffix in _BY_HOST), DEFAULT)


def judge(
    provider: Provider, status: int, headers: Mapping[str, str], body: bytes, wall: float
) -> tuple[Failure, tuple[LimitReport, ...]]:
    """What a refusal before (or in place of) a stream means. Takes any headers and bytes; never raises.

    ``wall`` is Unix time. The reports are what headers and body say of limits, for the quota to learn from.
    """
    evidence = read_evidence(status, headers, body)
    code = provider.restate(evidence) or read_code(evidence)
    told = provider.limit_reports(status, evidence.headers, wall)
    reports = told + provider.body_reports(evidence, wall)
    wait_s = _wait_s(provider, evidence, code, reports, wall)
    return classify(evidence, restated=code, retry_after_s=wait_s), reports


def judge_fault(provider: Provider, fault: Fault, wall: float) -> tuple[Failure, tuple[LimitReport, ...]]:
    """The same for an error event inside a 200, which has no headers of its own."""
    evidence = fault_evidence(fault)
    code = provider.restate(evidence) or read_code(evidence)
    reports = provider.body_reports(evidence, wall)
    wait_s = _wait_s(provider, evidence, code, reports, wall)
    return classify_fault(evidence, restated=code, retry_after_s=wait_s), reports


def _wait_s(
    provider: Provider, evidence: Evidence, code: Code, reports: tuple[LimitReport, ...], wall: float
) -> float | None:
    """The wait that is stated or customary, else the reset of the limits that have nothing left."""
    if CODES[code].outcome not in WAITING:
        return None
    wait_s = provider.retry_after_s(evidence, code, wall)
    if wait_s is not None or CODES[code].outcome is Outcome.UNAVAILABLE:
        return wait_s
    spent = (report.reset_s for report in reports if report.remaining == 0 and report.reset_s is not None)
    return max(spent, default=None)
