"""NVIDIA NIM (build.nvidia.com): no headers, a 429 that clears in about a minute, and a sick model that answers 400.

Measured on live keys, 2026-07-26.
"""

from routerd.policy.classify import Code
from routerd.providers.provider import Provider

PROVIDER = Provider(
    names=("nvidia",),
    hosts=("integrate.api.nvidia.com",),
    phrases=(
        ("degraded function", Code.DEGRADED),
        ("single tool-call", Code.UNSUPPORTED_FEATURE),
    ),
    rows=(),
    waits={Code.QUOTA_MINUTE: 62.0},
)
