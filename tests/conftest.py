"""What every test gets: the event loop of the product, and the scripted upstreams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

pytest_plugins = ["tests.fakes"]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test on the loop that serves in production."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured and recorded as ``seconds``; unlike what they print, it also comes from workers."""
    rows = [
        (report.head_line, value)
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, value in report.user_properties
        if name == "seconds"
    ]
    if rows:
        terminalreporter.section("seconds")
    width = max((len(test) for test, _ in rows), default=0)
    for test, value in rows:
        terminalreporter.write_line(f"{test:{width}}  {value}")
