"""A process that spends a daily limit as fast as it can, over the real ledger and store; its test kills it.

Usage: spender.py FOLDER AMOUNT. Prints a line per request sent, and ends when nothing is left.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from routerd.canonical import Limit
from routerd.policy.meters import Amount
from routerd.policy.quota import Quota
from routerd.state import Row, open_store

AGENTS = 8


async def spend(folder: Path, amount: float) -> None:
    store = open_store("sqlite:routerd.db", folder)
    quota = Quota([Limit(amount, "requests", "day")])
    quota.restore(await store.load("quota"), time.monotonic(), time.time())

    def rows() -> list[Row]:
        return [Row("quota", key, value, time.time()) for key, value in quota.rows(time.monotonic(), time.time())]

    async def agent() -> None:
        while (reservation := quota.reserve("m", Amount(), time.monotonic(), time.time())) is not None:
            await store.write(rows())
            print("sent", flush=True)
            await asyncio.sleep(0)
            quota.settle(reservation, Amount(), time.monotonic(), time.time())
            store.enqueue(rows())

    await asyncio.gather(*(agent() for _ in range(AGENTS)))
    await store.close()


if __name__ == "__main__":
    asyncio.run(spend(Path(sys.argv[1]), float(sys.argv[2])))
