"""The service manager's side: what it hands over at start, and what it wants to be told.

Both halves are systemd's documented interfaces, sd_listen_fds(3) and sd_notify(3), in a few lines over a datagram
socket. Without a manager in the environment nothing is inherited and nothing is sent, and nobody has to ask which.

Two kinds of sockets come in: *listening* ones, which the manager holds open across restarts, so that a client is never
refused; and *connections*, which the process before this one was keeping alive when it had to go. It hands those over
through the manager's file descriptor store instead of closing them, since a client may be writing its next request
into one at that very moment.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections.abc import MutableMapping, Sequence

import msgspec

FIRST_FD = 3  # sd_listen_fds(3): inherited descriptors begin here
FDS_MAX = 200  # in one message; Linux allows 253
CONNECTION = "connection"  # the name of handed-over connections in the manager's store
READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"
FORGET_CONNECTIONS = f"FDSTOREREMOVE=1\nFDNAME={CONNECTION}"
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Inherited(msgspec.Struct, frozen=True):
    """The sockets that were there before this process."""

    listening: tuple[socket.socket, ...] = ()
    connections: tuple[socket.socket, ...] = ()


class Manager:
    """The service manager, or nobody. ``watchdog_s``: how long it lets pass without a sign of life; None: for ever."""

    def __init__(self, address: str = "", watchdog_s: float | None = None, inherited: Inherited | None = None) -> None:
        self.watchdog_s = watchdog_s
        self.inherited = inherited or Inherited()
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if address else None

    def __repr__(self) -> str:
        return f"<Manager {self._address!r}, {len(self.inherited.listening)} sockets>"

    def __bool__(self) -> bool:
        return self._socket is not None

    def tell(self, *lines: str) -> bool:
        """Send one message; False if nobody took it. Lines are assignments like ``STATUS=...``."""
        return self._send("\n".join(lines), ())

    def reloading(self) -> None:
        """A reload begins; ``READY`` ends it, whatever came of it."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def keep(self, fds: Sequence[int]) -> bool:
        """Hand at most ``FDS_MAX`` connections over to the next process; False if the manager took none of them."""
        return self._send(f"FDSTORE=1\nFDNAME={CONNECTION}", fds)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str, fds: Sequence[int]) -> bool:
        if self._socket is None:
            return False
        try:
            # Not socket.send_fds: up to Python 3.11 it drops the address.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self._socket.sendmsg([message.encode()], rights, 0, self._address)
        except OSError:  # a manager that is busy or gone: the service itself must not suffer from it
            return False
        return True


def take(environ: MutableMapping[str, str]) -> Manager:
    """The manager this process was started by. What it said is removed from ``environ``: it is for no child."""
    said = {name: environ.pop(name, "") for name in VARIABLES}
    ours = said["WATCHDOG_PID"] in ("", str(os.getpid()))
    watchdog_s = int(said["WATCHDOG_USEC"]) / 1e6 if said["WATCHDOG_USEC"].isdecimal() and ours else None
    return Manager(said["NOTIFY_SOCKET"], watchdog_s, _inherited(said))


def _inherited(said: MutableMapping[str, str]) -> Inherited:
    if said["LISTEN_PID"] != str(os.getpid()) or not said["LISTEN_FDS"].isdecimal():
        return Inherited()
    count = int(said["LISTEN_FDS"])
    names = said["LISTEN_FDNAMES"].split(":")
    listening: list[socket.socket] = []
    connections: list[socket.socket] = []
    for fd, name in zip(range(FIRST_FD, FIRST_FD + count), names + [""] * count, strict=False):
        taken = _socket(fd)
        if taken is None:
            continue
        (connections if name == CONNECTION else listening).append(taken)
    return Inherited(tuple(listening), tuple(connections))


def _socket(fd: int) -> socket.socket | None:
    """The descriptor as a stream socket; None, and closed, if it is anything else."""
    with contextlib.suppress(OSError):
        taken = socket.socket(fileno=fd)
        if taken.type == socket.SOCK_STREAM:
            taken.setblocking(False)
            taken.set_inheritable(False)
            return taken
        taken.detach()
    with contextlib.suppress(OSError):
        os.close(fd)
    return None
