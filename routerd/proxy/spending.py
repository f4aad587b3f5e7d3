"""The part of a drill that is about money: crowds ask for more than the allowances hold.

One provider has a window of so many requests a day, and another one behind it; one route has a budget in dollars. Both
providers fail now and then: one refuses, which counts as a request all the same; one breaks answers off, and bills them
as far as they went. What matters is what the upstreams received and would bill, by their own reckoning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from routerd.canonical import Usage
from routerd.dialects import DIALECTS
from routerd.proxy.laws import Verdict, judge, read, unsettled
from routerd.proxy.scripts import Fault, Received, Turn
from routerd.proxy.stage import Client, Stage, client, daemon, provider, settings
from routerd.proxy.tasks import HEALTHY, MODEL, Case, Conversation, Model, Who, sayings

WINDOW = 20  # requests a day
BUDGET_USD = 0.5
USD_PER_TOKEN = (100e-6, 200e-6)  # input, output: dear, so that figures are seen
CROWDS = (40, 20, 20)  # who asks at once, of each, one crowd after the other
PATIENCE_S = 30.0
LIMIT_S = 5.0  # of the watchdogs, which have nothing to do here
MAX_WAIT_S = 1.0  # whoever finds an allowance used up is told soon
FAILS = 4  # one request in so many
CENT_USD = 1e-4  # sums that differ by less are the same
REFUSED = Fault("status", status=503)
BROKEN_OFF = Fault("eof", "mid_text")


class Spending(NamedTuple):
    """``told``: agents that were told to come back later. ``leaked``: allowances that are still reserved for nobody.

    ``dishonest``: answers that are neither whole nor plainly broken. ``unsettled``: as in ``laws``.
    """

    asked: int
    window: int
    sent: int
    window_delivered: int
    budget_usd: float
    billed_usd: float
    budget_delivered: int
    told: int
    dishonest: int
    unsettled: int
    leaked: int


class Vendor(Model):
    """A model that counts what it is asked, and bills what it said, whether it came to the end or not."""

    def __init__(self, case: Case, who: Who, fault: Fault | None = None) -> None:
        super().__init__(case, who)
        self._sometimes = fault
        self.billed_usd = 0.0

    def __call__(self, received: Received) -> Turn:
        answer = super().__call__(received).answer
        fault = self._sometimes if self.requests % FAILS == 0 else None
        said = len(answer.reasoning) + len(answer.text or "") + sum(len(call.arguments) for call in answer.calls or ())
        usage = Usage(input_tokens=_prompt_tokens(received), output_tokens=said // 4)
        if fault is not REFUSED:
            begun = (len(answer.reasoning) + answer.piece) // 4  # where it breaks off
            output_tokens = usage.output_tokens if fault is None else begun
            self.billed_usd += usage.input_tokens * USD_PER_TOKEN[0] + output_tokens * USD_PER_TOKEN[1]
        return Turn(msgspec.structs.replace(answer, usage=usage), fault)


def _prompt_tokens(received: Received) -> int:
    """What the model reads: messages and tools."""
    return sum(len(msgspec.json.encode(received.body[part])) for part in ("messages", "tools")) // 4


async def spend(stage: Stage, seed: int) -> Spending:
    """Ask for more than there is, and count."""
    case = Case(-1, HEALTHY, "never", "chat", "live", True, seed)
    vendors = {
        "limited": Vendor(case, "a", REFUSED),
        "other": Vendor(case, "b"),
        "billing": Vendor(case, "a", BROKEN_OFF),
    }
    async with (
        daemon(settings(LIMIT_S, max_wait_s=MAX_WAIT_S) + _config(stage, vendors)) as served,
        client(PATIENCE_S) as front,
    ):
        window = [answer for size in CROWDS for answer in await _crowd(size, case, front, served.url, "window")]
        budget = [answer for size in CROWDS for answer in await _crowd(size, case, front, served.url, "budget")]
        leaked = await served.unfinished() + _leaked(await served.status(), vendors["limited"].requests)
        books = served.books(2 * sum(CROWDS), vendors)
    return _counted(window, budget, vendors, unsettled(books), leaked)


def _counted(
    window: Sequence[tuple[int, Verdict]],
    budget: Sequence[tuple[int, Verdict]],
    vendors: dict[str, Vendor],
    unsettled: int,
    leaked: int,
) -> Spending:
    return Spending(
        asked=sum(CROWDS),
        window=WINDOW,
        sent=vendors["limited"].requests,
        window_delivered=sum(verdict.delivered for _, verdict in window),
        budget_usd=BUDGET_USD,
        billed_usd=vendors["billing"].billed_usd,
        budget_delivered=sum(verdict.delivered for _, verdict in budget),
        told=sum(status == 429 for status, _ in budget),
        dishonest=sum(not verdict.honest for _, verdict in (*window, *budget)),
        unsettled=unsettled,
        leaked=leaked,
    )


def _config(stage: Stage, vendors: dict[str, Vendor]) -> str:
    routes = f"""
[routes.window]
models = ["limited/{MODEL}", "other/{MODEL}"]
[routes.budget]
models = ["billing/{MODEL}"]
budget = {{ usd = {BUDGET_USD}, per = "day" }}
"""
    price = "input = {:g}, output = {:g}".format(*(1e6 * usd for usd in USD_PER_TOKEN))
    return "".join(
        (
            routes,
            provider(
                "limited",
                stage.put("limited", vendors["limited"]),
                extra=f'limits = [ {{ requests = {WINDOW}, per = "day" }} ]',
            ),
            provider("other", stage.put("other", vendors["other"])),
            provider("billing", stage.put("billing", vendors["billing"]), price=price),
        )
    )


async def _crowd(size: int, case: Case, front: Client, url: str, route: str) -> list[tuple[int, Verdict]]:
    """Everybody at once, half of them streaming: status and verdict of each."""

    async def ask(number: int) -> tuple[int, Verdict]:
        one = msgspec.structs.replace(case, stream=number % 2 == 0)
        dialect = DIALECTS[one.dialect]
        heard = await front.ask(url + dialect.paths[0], dialect.encode_request(Conversation(one, route).request()))
        return heard.status, judge(heard, read(heard, dialect, stream=one.stream), sayings(one, 0))

    return await asyncio.gather(*(ask(number) for number in range(size)))


def _leaked(status: Any, sent: int) -> int:
    """How many of the two allowances hold back something for requests that are over."""
    (quota,) = status["quotas"]
    (budget,) = (route["budget"] for route in status["routes"] if route["budget"])
    (billing,) = (one for one in status["today"]["upstreams"] if one["provider"] == "billing")
    requests_held = quota["limit"] - quota["remaining"] - sent
    usd_held = budget["limit_usd"] - budget["remaining_usd"] - billing["cost_usd"]
    return int(requests_held > 0) + int(usd_held > CENT_USD)
