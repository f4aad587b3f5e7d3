"""A target as a running server: started, awaited, asked, warmed, ended."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import machine
from tests.bench.bodies import Body
from tests.bench.front import Upstream
from tests.bench.instruments import Unavailable
from tests.bench.targets import Launch, Target

FIRST_ANSWER_S = 90.0
ASK_AGAIN_S = 0.003
WRONG_ANSWERS_S = 10.0  # so long after a first wrong answer there may be more
ONE_ANSWER_S = 30.0
LOG_TAIL_BYTES = 600
SMALL = Body("small")


@dataclass(frozen=True)
class Server:
    """A running server. ``pid`` is None for no server at all. ``start_s``: from the spawn to the first proxied 200."""

    target: Target
    launch: Launch
    pid: int | None
    start_s: float
    directory: Path

    def address(self, body: Body) -> list[str]:
        """Where to and what to send, as the load generator's options."""
        file = self.directory / f"{body.name}.json"
        if not file.exists():
            file.write_bytes(body.encode(self.launch.model(body)))
        options = ["-p", str(self.launch.port), "-u", self.launch.path(body), "-b", str(file)]
        for header in self.launch.headers:
            options += ["-H", header]
        return options

    def cpu_s(self) -> float:
        return machine.cpu_s(self.pid) if self.pid else 0.0

    def pss_kb(self) -> float:
        return machine.pss_kb(self.pid) if self.pid else 0.0


@contextlib.contextmanager
def running(target: Target, upstream: Upstream, core: int) -> Iterator[Server]:
    """Start the target in front of an upstream (or find it, if it is not ours to start); end it afterwards.

    Raises Unavailable, with the end of its log, if it does not come to answer.
    """
    with tempfile.TemporaryDirectory(prefix=f"bench-{target.name}-") as name:
        directory = Path(name)
        launch = target.launch(upstream, machine.free_port(), directory)
        if not launch.command:
            pid = None if launch.port == upstream.port else machine.listener_of(launch.port)
            yield Server(target, launch, pid, 0.0, directory)
            return
        begun = time.monotonic()
        process = machine.spawn(launch.command, core, directory / "server.log", launch.env)
        try:
            wait_for_answer(target, launch, process, directory)
            yield Server(target, launch, process.pid, time.monotonic() - begun, directory)
        finally:
            machine.stop(process)


def wait_for_answer(target: Target, launch: Launch, process: subprocess.Popen[bytes], directory: Path) -> None:
    """Ask again and again until the first 200."""
    body = SMALL.encode(launch.model(SMALL))
    deadline = time.monotonic() + FIRST_ANSWER_S
    problem = "does not listen"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            status = ask(launch, body)
        except (OSError, http.client.HTTPException):
            time.sleep(ASK_AGAIN_S)
            continue
        if status == http.HTTPStatus.OK:
            return
        problem = f"answers {status}"
        deadline = min(deadline, time.monotonic() + WRONG_ANSWERS_S)
        time.sleep(ASK_AGAIN_S)
    if process.poll() is not None:
        problem = f"ended with status {process.returncode}"
    log = (directory / "server.log").read_text(errors="replace")[-LOG_TAIL_BYTES:].strip()
    msg = f"{target.name} {problem}; the end of its log:\n{log}"
    raise Unavailable(msg)


def ask(launch: Launch, body: bytes) -> int:
    """Send one request; give the status of the answer, read to its end."""
    connection = http.client.HTTPConnection("127.0.0.1", launch.port, timeout=ONE_ANSWER_S)
    with contextlib.closing(connection):
        headers = dict(header.split(": ", 1) for header in launch.headers)
        connection.request("POST", launch.path(SMALL), body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        answer.read()
        return answer.status
