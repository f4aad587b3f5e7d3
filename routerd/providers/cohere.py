"""Cohere trial keys: a monthly countdown, told on a 200 only (measured on a live key, 2026-07-26)."""

from routerd.providers.limit_headers import Row
from routerd.providers.provider import Provider

PROVIDER = Provider(
    names=("cohere",),
    hosts=("api.cohere.ai", "api.cohere.com"),
    rows=(Row("requests", "month", limit="", remaining="x-trial-endpoint-call-remaining"),),
)
