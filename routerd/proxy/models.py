"""The cards of ``GET /v1/models``: what Hermes and other clients read to learn a model's window and price.

Flat on purpose. Hermes looks for a window in any nested key it knows and gives up on all metadata at the first value of
an unexpected shape, takes a ``max_tokens`` for the window, and refuses to start below 64,000 tokens.
"""

from __future__ import annotations

from typing import Any

from routerd.canonical import Upstream
from routerd.config import Config

CREATED = 1767225600  # 2026-01-01; clients want a number, none reads it


def model_cards(config: Config) -> dict[str, dict[str, Any]]:
    """One card per public name, routes first."""
    return {name: _card(name, upstreams) for name in config.names() if (upstreams := _first_tier(config, name))}


def _first_tier(config: Config, name: str) -> tuple[Upstream, ...]:
    route = config.resolve(name)
    return route.tiers[0] if route is not None and route.tiers else ()


def _card(name: str, upstreams: tuple[Upstream, ...]) -> dict[str, Any]:
    outputs = [u.max_output_tokens for u in upstreams if u.max_output_tokens is not None]
    window_tokens = min(u.context_tokens for u in upstreams)
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": upstreams[0].provider if len({u.provider for u in upstreams}) == 1 else "routerd",
        "context_length": window_tokens,
        "max_completion_tokens": min(outputs, default=window_tokens),
        "pricing": _pricing(upstreams[0]),
    }


def _pricing(upstream: Upstream) -> dict[str, str]:
    price = upstream.price
    cached = price.input if price.cached is None else price.cached
    return {
        "prompt": _usd_per_token(price.input),
        "completion": _usd_per_token(price.output),
        "input_cache_read": _usd_per_token(cached),
    }


def _usd_per_token(usd_per_million: float) -> str:
    return f"{usd_per_million / 1e6:.12f}".rstrip("0").rstrip(".") or "0"
