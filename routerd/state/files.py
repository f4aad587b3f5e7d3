"""Small files beside the state: read whole, replaced whole.

A reader sees the file before a change or after it, never in between, whenever the process or the machine stops: what is
new is written beside it, forced to disk, and then given its name.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

MODE = 0o600


def beside(state_url: str, name: str) -> Path | None:
    """The path of a file in the folder of the state; None for state that is in memory only."""
    scheme, _, place = state_url.partition(":")
    return Path(place).parent / name if scheme == "sqlite" and place else None


def read_bounded(path: Path, limit_bytes: int) -> bytes | None:
    """The content; None if there is no such file. Raises OSError, also for a file beyond the limit."""
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except FileNotFoundError:
        return None
    if len(content) > limit_bytes:
        raise OSError(f"{path}: larger than {limit_bytes} bytes")
    return content


def replace_whole(path: Path, content: bytes) -> None:
    """Give the file a new content. Raises OSError; the old content is then still there."""
    fresh = path.with_name(path.name + ".new")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """So that the new name is on disk as well."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
