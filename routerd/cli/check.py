"""``routerd check``: is the configuration sound? Starts nothing and connects to nothing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

from routerd import cli, config
from routerd.canonical import Upstream

NAME = "check"
HELP = "validate the configuration without starting; every problem goes to stderr with its TOML path"


def configure(parser: argparse.ArgumentParser) -> None:
    cli.add_config_argument(parser)


def run(args: argparse.Namespace) -> int:
    path = cli.find_config(args)
    try:
        loaded = config.load(path, os.environ)
    except config.ConfigError as error:
        cli.print_problems(error.problems)
        count = len(error.problems)
        print(f"{count} problem{'s' * (count != 1)} in {path or 'the environment'}", file=sys.stderr)
        return cli.EXIT_WRONG
    cli.print_problems(loaded.warnings, "warning: ")
    print("\n".join(_summary(loaded)))
    return cli.EXIT_FINE


def _summary(loaded: config.Config) -> Iterator[str]:
    yield f"config     {loaded.source or 'none: keys from the environment'}"
    yield f"listen     {', '.join(map(str, loaded.server.listen))}"
    yield f"tokens     {len(loaded.server.tokens) or 'none'}"
    yield f"state      {loaded.state_url}"
    if loaded.simulated:
        yield "providers  SIMULATED: no provider and no key was found, so every answer is made up"
    for provider in loaded.providers.values():
        yield f"provider   {_provider(provider)}"
    for route in loaded.routes.values():
        yield f"route      {_route(route)}"
    yield "fine"


def _provider(provider: config.ProviderConfig) -> str:
    keys = f"{len(provider.keys)} key{'s' * (len(provider.keys) != 1)}" if any(provider.keys) else "no key"
    models = len({upstream.model for upstream in provider.upstreams})
    where = "simulated" if provider.simulated is not None else next(iter(provider.base_urls.values()), "")
    limits = f", {len(provider.limits)} limits" if provider.limits else ""
    return f"{provider.name}: {where}, {keys}, {models} model{'s' * (models != 1)}{limits}"


def _route(route: config.RouteConfig) -> str:
    tiers = " > ".join(_tier(tier) for tier in route.tiers)
    return f"{route.name}: {tiers} ({route.context_tokens:,} tokens)"


def _tier(tier: tuple[Upstream, ...]) -> str:
    return " | ".join(dict.fromkeys(f"{upstream.provider}/{upstream.model}" for upstream in tier))
