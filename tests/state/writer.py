"""A process that writes as fast as it can and says what was acknowledged; its test kills it.

Usage: writer.py FOLDER ROUND. Prints ``key value`` lines, each after its write returned.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

from routerd.state import Row, open_store

WRITERS = 8


async def write_for_ever(folder: Path, number: str) -> None:
    store = open_store("sqlite:routerd.db", folder)

    async def write(name: str) -> None:
        for count in itertools.count(1):
            value = f"{number}.{count}"
            await store.write([Row("quota", name, value.encode(), 0.0), Row("log", f"{name}.{value}", b"-", 4e9)])
            print(name, value, flush=True)

    await asyncio.gather(*(write(f"writer{index}") for index in range(WRITERS)))


if __name__ == "__main__":
    asyncio.run(write_for_ever(Path(sys.argv[1]), sys.argv[2]))
