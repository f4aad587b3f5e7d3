"""Hugging Face router: a spent allowance is a 402, and stays so until the month turns (docs, "Pricing and billing")."""

from __future__ import annotations

from routerd.policy.classify import Code, Evidence, effective_status
from routerd.providers.durations import until_month_s
from routerd.providers.provider import Provider


class HuggingFace(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        return Code.QUOTA_MONTH if effective_status(evidence) == 402 else super().restate(evidence)

    def retry_after_s(self, evidence: Evidence, code: Code, wall: float) -> float | None:
        if code is Code.QUOTA_MONTH:
            return until_month_s("UTC", wall)
        return super().retry_after_s(evidence, code, wall)


PROVIDER = HuggingFace(names=("huggingface",), hosts=("router.huggingface.co",), rows=())
