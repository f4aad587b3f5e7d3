"""A small service manager: it holds a listening socket and what a service hands over, and hears what it says."""

from __future__ import annotations

import array
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from routerd.proxy.notify import CONNECTION, FDS_MAX, Inherited, Manager

MESSAGE_BYTES = 4096


class FakeManager:
    """Speaks sd_notify(3)'s protocol over a real socket. ``messages``: everything it was told, one per datagram."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.messages: list[dict[str, str]] = []
        self.connections: list[socket.socket] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(self.address)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for sock in (self._socket, self.listening, *self.connections):
            sock.close()

    @property
    def notify_fd(self) -> int:
        return self._socket.fileno()

    def hear(self) -> list[dict[str, str]]:
        """Read what has been said since; returns all that was ever said."""
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(FDS_MAX * 4))
            except BlockingIOError:
                return self.messages
            message = dict(line.split("=", 1) for line in data.decode().splitlines())
            self._keep(message, [fd for _, _, data in ancillary for fd in array.array("i", data)])
            self.messages.append(message)

    def _keep(self, message: dict[str, str], fds: list[int]) -> None:
        if "FDSTORE" in message and message.get("FDNAME") == CONNECTION:
            self.connections += [socket.socket(fileno=fd) for fd in fds]
        if "FDSTOREREMOVE" in message:
            for sock in self.connections:
                sock.close()
            self.connections = []

    def said(self, name: str) -> list[str]:
        """Every value that was given to this name."""
        return [message[name] for message in self.hear() if name in message]

    def start(self, *, watchdog_s: float | None = None) -> Manager:
        """What a service that is started now gets: copies of all that is held for it."""
        self.hear()
        listening = socket.socket(fileno=os.dup(self.listening.fileno()))
        listening.setblocking(False)
        connections = tuple(socket.socket(fileno=os.dup(sock.fileno())) for sock in self.connections)
        for sock in connections:
            sock.setblocking(False)
        return Manager(self.address, watchdog_s, Inherited((listening,), connections))
