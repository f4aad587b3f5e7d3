"""Alibaba Model Studio (Qwen): ``insufficient_quota`` in a 429 is tokens per minute, not money.

Money is ``Arrearage`` (a 400). A rate limit lifts within a minute (docs, "Rate limiting best practices", 2026-04).
"""

from __future__ import annotations

from routerd.policy.classify import Code, Evidence, effective_status
from routerd.providers.provider import Provider

BILLING_CODES = ("commoditynotpurchased", "prepaidbilloverdue", "postpaidbilloverdue")


class DashScope(Provider, frozen=True):
    def restate(self, evidence: Evidence) -> Code | None:
        own = super().restate(evidence)
        return Code.QUOTA_MINUTE if own is None and effective_status(evidence) == 429 else own


PROVIDER = DashScope(
    names=("dashscope",),
    hosts=("dashscope.aliyuncs.com", "dashscope-intl.aliyuncs.com", "maas.aliyuncs.com"),
    codes={**dict.fromkeys(BILLING_CODES, Code.BALANCE), "arrearage": Code.BALANCE},
    rows=(),
)
