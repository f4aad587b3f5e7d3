"""What a service manager hands over and is told: only what is meant for this very process, and never at its cost."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

import pytest

from routerd.proxy.notify import VARIABLES, Inherited, Manager, take
from tests.manager import FakeManager


def test_without_a_manager_there_is_nothing_and_nobody_minds() -> None:
    """A daemon started by hand asks nowhere whether there is one."""
    manager = take({})

    assert not manager
    assert manager.inherited == Inherited()
    assert manager.watchdog_s is None
    assert not manager.tell("READY=1")
    assert not manager.keep([0])


def test_what_the_manager_said_is_for_no_child() -> None:
    """The variables are gone from the environment once they are read."""
    environ = dict.fromkeys(VARIABLES, "1") | {"PATH": "/bin"}
    take(environ).close()

    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("process", "watchdog_s"), [("", 20.0), (str(os.getpid()), 20.0), ("1", None)], ids=["any", "this", "another"]
)
def test_the_watchdog_waits_for_one_process(process: str, watchdog_s: float | None) -> None:
    """A child that inherits the environment is not it."""
    assert take({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": process}).watchdog_s == watchdog_s


def test_sockets_of_another_process_are_not_touched() -> None:
    """The numbers then mean whatever they mean here: a log, a database."""
    assert take({"LISTEN_PID": "1", "LISTEN_FDS": "3"}).inherited == Inherited()


def test_an_abstract_address(tmp_path: Path) -> None:
    """It begins with an @, which stands for a zero byte."""
    name = f"routerd-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0{name}")
        manager = Manager(f"@{name}")
        told = manager.tell("READY=1", "STATUS=fine")
        manager.close()

        assert told
        assert heard.recv(100) == b"READY=1\nSTATUS=fine"


def test_a_manager_that_does_not_listen_costs_nothing(tmp_path: Path) -> None:
    """Its queue may be full, or it may be gone: neither blocks, neither raises."""
    with FakeManager(tmp_path) as fake:
        manager = Manager(fake.address)
        told = [manager.tell("WATCHDOG=1") for _ in range(5000)]
        assert told[0]
        assert not told[-1]
    assert not manager.tell("WATCHDOG=1")
    manager.close()
    assert not manager.tell("WATCHDOG=1")
