"""A route's budget: reached, it ends with a clear 429; it is the route's own; and a restart does not refill it."""

from __future__ import annotations

from pathlib import Path

import pytest

from routerd.proxy.simulated import Answer, Fault, Turn
from tests.fakes import ScriptedUpstream, Upstreams
from tests.proxy.wire import error_of, get, hear
from tests.rig import HELLO, MODEL, config_text, daemon, provider

ASKED = HELLO | {"max_tokens": 20}
BUDGET = 'budget = {{ usd = {usd}, per = "day", resets = "UTC" }}'
TWO = BUDGET.format(usd=0.00015)  # one request costs 0.000074, and twice that is expected of it


def _config(upstream: ScriptedUpstream, budget: str = TWO, *, more: str = "") -> str:
    return config_text({"a": upstream}, more=f"{budget}\n{more}", defaults='max_wait = "0s"')


async def test_a_spent_budget_is_a_429(upstreams: Upstreams, tmp_path: Path) -> None:
    """With the time until it has room again, and not a word that an agent would take for a lost cause."""
    upstream = await upstreams()
    async with daemon(_config(upstream), tmp_path) as served:
        statuses = [(await hear(served.url, ASKED)).status for _ in range(4)]
        heard = await hear(served.url, ASKED)

        assert statuses == [200, 200, 429, 429]
        assert heard.status == 429
        assert 0 < int(heard.headers["Retry-After"]) <= 86_401
        assert "the budget of auto is spent" in error_of(heard)["message"]
        assert error_of(heard)["code"] == "over_budget"
        assert len(upstream.requests) == 2


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_other_routes_are_not_affected(stream: bool, upstreams: Upstreams, tmp_path: Path) -> None:
    """A budget is its route's own: the same upstream serves others, and the model by its name, as before."""
    text = _config(await upstreams(), more=f'[routes.other]\nmodels = ["a/{MODEL}"]')
    async with daemon(text, tmp_path) as served:
        for _ in range(3):
            await hear(served.url, ASKED)
        asked = ASKED | {"stream": stream}

        assert (await hear(served.url, asked)).status == 429
        assert (await hear(served.url, asked | {"model": "other"})).status == 200
        assert (await hear(served.url, asked | {"model": MODEL})).status == 200


async def test_going_on_is_paid_for_or_not_begun(upstreams: Upstreams, tmp_path: Path) -> None:
    """An answer that broke off costs more to go on with than it did to begin. If that is too much, the client is told:
    in the stream, at once, and by a connection that does not end as if all were well.
    """
    torn = Turn(Answer(text="word " * 4_000, piece=4_000), fault=Fault("eof", "mid_text"))
    first, second = await upstreams(torn), await upstreams()
    text = config_text(
        {"a": first, "b": second},
        more='budget = { usd = 0.003, per = "day", resets = "UTC" }',
        defaults='max_wait = "0s"',
    )
    async with daemon(text, tmp_path) as served:
        heard = await hear(served.url, ASKED | {"stream": True})

        assert heard.torn
        assert "the budget of auto is spent" in heard.chunks[-1]["error"]["message"]
        assert second.requests == []
        assert heard.reads[-1][0] < 5


async def test_what_costs_nothing_goes_on(upstreams: Upstreams, tmp_path: Path) -> None:
    """A spent budget closes the paid upstreams of a route, not its free ones."""
    paid, free = await upstreams(), await upstreams()
    text = _config(paid).replace(f'models = ["a/{MODEL}"]', f'models = ["a/{MODEL}", "free/gratis"]')
    text += provider("free", free.base_url, model="gratis", price="input = 0, output = 0")
    async with daemon(text, tmp_path) as served:
        served_by = [(await hear(served.url, ASKED)).headers["x-routerd-provider"] for _ in range(4)]

        assert served_by == ["a", "a", "free", "free"]


async def test_a_request_dearer_than_the_budget_is_told_so(upstreams: Upstreams, tmp_path: Path) -> None:
    """It would wait for good: that is a 429 without a time, and nothing is sent."""
    upstream = await upstreams()
    async with daemon(_config(upstream, BUDGET.format(usd=0.000001)), tmp_path) as served:
        heard = await hear(served.url, ASKED)

        assert heard.status == 429
        assert "Retry-After" not in heard.headers
        assert "more than the budget" in error_of(heard)["message"]
        assert upstream.requests == []


async def test_a_restart_does_not_refill_it(upstreams: Upstreams, tmp_path: Path) -> None:
    """What was spent of it is on disk."""
    text = _config(await upstreams()).replace("memory:", f"sqlite:{tmp_path}/budget.db")
    async with daemon(text, tmp_path) as served:
        for _ in range(2):
            assert (await hear(served.url, ASKED)).status == 200
        before = served.metric("routerd_budget_remaining_usd", scope="auto")
    async with daemon(text, tmp_path) as served:
        assert before == served.metric("routerd_budget_remaining_usd", scope="auto")
        assert (await hear(served.url, ASKED)).status == 429


async def test_what_is_left_is_shown(upstreams: Upstreams, tmp_path: Path) -> None:
    """As a metric and on the status page: the budget less what the answers really cost."""
    async with daemon(_config(await upstreams(), BUDGET.format(usd=1)), tmp_path) as served:
        assert served.metric("routerd_budget_remaining_usd", scope="auto") == 1
        cost_usd = float((await hear(served.url, ASKED)).headers["x-routerd-cost-usd"])
        budget = (await get(served.url, "/status")).json["routes"][0]["budget"]

        assert cost_usd > 0
        assert served.metric("routerd_budget_remaining_usd", scope="auto") == pytest.approx(1 - cost_usd)
        assert budget["remaining_usd"] == pytest.approx(1 - cost_usd)
        assert (budget["name"], budget["limit_usd"]) == ("usd/day", 1)
        assert 0 < budget["reset_in_s"] <= 86_401
