"""Runs the real Hermes Agent, without a terminal, against any endpoint.

Theory of operation
-------------------
Hermes pins its own dependencies, so it lives in its own virtual environment: ``$ROUTERD_HERMES_VENV``, by default
``.venv-hermes`` in the checkout, made on first use (``python -m tests.hermes_rig`` makes it beforehand). Where that is
impossible, tests that need it are skipped with the reason.

A run is one process, ``hermes -z PROMPT``, with a home directory of its own, so runs neither see each other nor the
user's. Its exit code says little (a dead task exits with 0 as well), so the usage file tells whether the task was
completed, and the session database what the conversation looked like afterwards.

Start-up is kept cheap, and the conversation deterministic, by three settings that change nothing about how models are
called: no plugin discovery, no probing of the machine's Python, and no login profile (the home is empty). What remains,
about 1.4 s, is Python importing Hermes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

REQUIREMENT = "hermes-agent[anthropic]==0.19.0"
DEFAULT_VENV = Path(__file__).parent.parent / ".venv-hermes"
INSTALL_S = 600.0
RUN_S = 90.0

ApiMode = Literal["chat_completions", "codex_responses", "anthropic_messages"]
API_MODES: tuple[ApiMode, ...] = ("chat_completions", "codex_responses", "anthropic_messages")


class HermesMissing(Exception):
    """Hermes cannot be run here; the text says why."""


class HermesResult(NamedTuple):
    """How a run ended. ``seconds`` is the wall time of the process; ``usage`` what Hermes itself reports of the run.

    ``history`` holds the session's messages in order, each with ``role``, ``content``, ``tool_calls`` and
    ``finish_reason``; ``log`` is what Hermes logged, for a failing test's message.
    """

    seconds: float
    exit_code: int
    final_text: str
    usage: dict[str, Any]
    history: list[dict[str, Any]]
    log: str

    @property
    def completed(self) -> bool:
        """Hermes says that the task was done."""
        return self.usage.get("completed") is True and not self.usage.get("failed")


# --- the virtual environment ----------------------------------------------------------------------------------------


def require_hermes() -> Path:
    """The ``hermes`` command, installed first if it has to be; skips the test if it cannot be."""
    found = _hermes_once()
    if isinstance(found, HermesMissing):
        pytest.skip(str(found))
    return found


@functools.cache
def _hermes_once() -> Path | HermesMissing:
    """One attempt for all tests of a process, failed ones too."""
    try:
        return find_hermes(Path(os.environ.get("ROUTERD_HERMES_VENV") or DEFAULT_VENV))
    except HermesMissing as error:
        return error


def find_hermes(venv: Path) -> Path:
    """The ``hermes`` command of this virtual environment, made first if it has to be. Raises HermesMissing."""
    program = venv / "bin" / "hermes"
    if program.exists():
        return program
    try:
        with _locked(venv.parent):  # test processes run side by side
            if not program.exists():
                _install(venv)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or ["no message"]
        raise HermesMissing(f"{REQUIREMENT} cannot be installed: {said[-1]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HermesMissing(f"{REQUIREMENT} cannot be installed: {error}") from error
    return program


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _install(venv: Path) -> None:
    """All or nothing: what is half made is removed."""
    python = str(venv / "bin" / "python")
    try:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(venv)],
            [python, "-m", "pip", "install", "--quiet", "--retries", "1", REQUIREMENT],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except (OSError, subprocess.SubprocessError):
        shutil.rmtree(venv, ignore_errors=True)
        raise


# --- a run ----------------------------------------------------------------------------------------------------------


def hermes_config(base_url: str, api_mode: ApiMode = "chat_completions", api_key: str = "local-key") -> dict[str, Any]:
    """The least that makes Hermes use this endpoint; ``api_mode`` counts only for a provider with a name."""
    provider = {"name": "routerd", "base_url": base_url, "api_key": api_key, "model": "auto", "api_mode": api_mode}
    return {
        "model": {"default": "auto", "provider": "custom:routerd", "context_length": 131072},
        "custom_providers": [provider],
        "agent": {"environment_probe": False},
        "memory": {"memory_enabled": False, "user_profile_enabled": False},
    }


async def run_hermes(
    base_url: str,
    prompt: str,
    *,
    hermes_home: Path,
    api_mode: ApiMode = "chat_completions",
    toolsets: str = "terminal",
    config: Mapping[str, Any] | None = None,
    as_found: bool = False,
    env: Mapping[str, str] | None = None,
    timeout_s: float = RUN_S,
) -> HermesResult:
    """Give Hermes one task and wait until it has done it, or given it up.

    ``hermes_home`` is a directory for this run alone; commands of the agent start in it. ``config`` replaces or adds
    top-level keys of ``config.yaml``; ``as_found``: the one already in ``hermes_home`` is used as it is. Skips the test
    if Hermes cannot be installed; a run that outlives ``timeout_s`` is killed with all its children and raises
    TimeoutError.
    """
    program = await asyncio.to_thread(require_hermes)
    (hermes_home / "tmp").mkdir(parents=True, exist_ok=True)
    if not as_found:
        _furnish(hermes_home, hermes_config(base_url, api_mode) | dict(config or {}))
    command = [str(program), "-z", prompt, "--usage-file", str(hermes_home / "usage.json"), "-t", toolsets]
    started = time.monotonic()
    exit_code, output = await _run(command, hermes_home, _environment(hermes_home) | dict(env or {}), timeout_s)
    seconds = time.monotonic() - started
    return HermesResult(seconds, exit_code, output.strip(), *_left_in(hermes_home))


def _furnish(home: Path, config: Mapping[str, Any]) -> None:
    (home / "config.yaml").write_text(json.dumps(config))  # JSON is YAML too


def _environment(home: Path) -> dict[str, str]:
    """Nothing of the caller's: no keys, no proxies, no profile."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "HERMES_HOME": str(home),
        "HERMES_SAFE_MODE": "1",  # no plugin discovery, no hooks
        "LANG": "C.UTF-8",
    }


async def _run(command: list[str], cwd: Path, env: dict[str, str], timeout_s: float) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):  # what the agent left running, or the agent itself
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


def _left_in(home: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """The usage report, the session's messages, and the logs."""
    usage = home / "usage.json"
    logs = sorted((home / "logs").glob("*.log"))
    return (
        json.loads(usage.read_text()) if usage.exists() else {},
        _history(home / "state.db"),
        "\n".join(path.read_text(errors="replace") for path in logs),
    )


def _history(database: Path) -> list[dict[str, Any]]:
    if not database.exists():
        return []
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute("SELECT role, content, tool_calls, finish_reason FROM messages ORDER BY id")
        return [dict(row) | {"tool_calls": json.loads(row["tool_calls"] or "[]")} for row in rows]


if __name__ == "__main__":
    try:
        print(find_hermes(Path(os.environ.get("ROUTERD_HERMES_VENV") or DEFAULT_VENV)))
    except HermesMissing as missing:
        sys.exit(str(missing))
