"""DeepSeek: no request or token limits; a 429 means too many requests at the same time (docs, "Rate Limit")."""

from __future__ import annotations

from routerd.policy.classify import Code, Evidence, effective_status
from routerd.providers.provider import Provider


class DeepSeek(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        return Code.CONCURRENCY if effective_status(evidence) == 429 else super().restate(evidence)


PROVIDER = DeepSeek(names=("deepseek",), hosts=("api.deepseek.com",), rows=(), waits={Code.CONCURRENCY: 2.0})
