"""``GET /status`` and ``GET /``: who may see them, what they say, and what they must never say."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from routerd.proxy.simulated import Answer, Fault, Turn
from tests.fakes import Upstreams
from tests.proxy.wire import get, hear
from tests.rig import KEY, MODEL, TOKEN, Daemon, config_text, daemon, post, provider

SECRET = "words that somebody said"
ASKED = {"model": "auto", "max_tokens": 10, "messages": [{"role": "user", "content": SECRET}]}
DOWN = Turn(fault=Fault("status", status=503))
TOUCHY = "breaker = { failures = 1, open = '300s' }"


async def status(served: Daemon) -> dict[str, Any]:
    heard = await get(served.url, "/status")
    assert heard.status == 200, heard.data
    return dict(heard.json)


def only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    (row,) = rows
    return row


async def held_up(served: Daemon, count: int) -> dict[str, Any]:
    """Wait until so many requests wait on the only route, and return what is said of them."""
    while True:
        waiting = only((await status(served))["routes"])["waiting"]
        if waiting is not None and waiting["count"] == count:
            return dict(waiting)


class TestWhoMaySee:
    @pytest.mark.parametrize("path", ["/", "/status"])
    async def test_on_loopback_no_token_is_needed(self, path: str, upstreams: Upstreams, tmp_path: Path) -> None:
        """Whoever is on this machine may look, even where requests need a token."""
        text = config_text({"a": await upstreams()}).replace("[server]", f'[server]\ntokens = ["{TOKEN}"]')
        async with daemon(text, tmp_path) as served:
            assert (await get(served.url, path)).status == 200

    @pytest.mark.parametrize("path", ["/", "/status"])
    async def test_another_name_for_this_host_is_refused(self, path: str, upstreams: Upstreams, tmp_path: Path) -> None:
        """A page that has its own name point here cannot read it."""
        async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
            assert (await get(served.url, path, {"Host": "evil.example"})).status == 403

    @pytest.mark.parametrize("path", ["/", "/status"])
    async def test_nothing_can_be_changed(self, path: str, upstreams: Upstreams, tmp_path: Path) -> None:
        """There is GET and HEAD; anything else is no path of ours."""
        async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
            statuses = [(await _send(served, method, path)) for method in ("POST", "PUT", "PATCH", "DELETE")]

            assert statuses == [404] * 4


async def _send(served: Daemon, method: str, path: str) -> int:
    return (await hear(served.url, {}, path=path, method=method)).status


class TestPage:
    async def test_only_its_own_style_and_script_may_run(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """The policy names both by their hashes, allows nothing else, and the page needs nothing else."""
        async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
            heard = await get(served.url, "/")

        policy = dict(part.split(" ", 1) for part in heard.headers["Content-Security-Policy"].split("; "))
        page = heard.data.decode()
        for name in ("style", "script"):
            contents = re.findall(rf"<{name}[^>]*>(.*?)</{name}>", page, re.DOTALL)
            digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents]
            assert [f"'sha256-{digest}'" for digest in digests] == [policy[f"{name}-src"]]
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert not re.search(r"\son\w+=|\sstyle=|innerHTML|(src|href)=\"(https?:)?//", page)

    async def test_it_is_not_kept_nor_taken_for_something_else(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """No copy in a cache, no guessing of types."""
        async with daemon(config_text({"a": await upstreams()}), tmp_path) as served:
            heard = await get(served.url, "/")

            assert heard.headers["Content-Type"] == "text/html; charset=utf-8"
            assert heard.headers["Cache-Control"] == "no-store"
            assert heard.headers["X-Content-Type-Options"] == "nosniff"
            assert (await get(served.url, "/status")).headers["Cache-Control"] == "no-store"


class TestWhatItSays:
    async def test_all_is_well(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Who there is, at what price, and that everybody would take a request."""
        async with daemon(config_text({"a": await upstreams(), "b": await upstreams()}), tmp_path) as served:
            said = await status(served)

        assert said["version"]
        assert said["uptime_s"] < 60
        assert (said["simulated"], said["open_requests"], said["failovers"], said["warnings"]) == (False, 0, [], [])
        route = only(said["routes"])
        assert (route["name"], route["configured"], route["state"]) == ("auto", True, "serving")
        assert [(tier["upstreams"], tier["admissible"], tier["total"]) for tier in route["tiers"]] == [
            ([f"a/{MODEL}"], 1, 1),
            ([f"b/{MODEL}"], 1, 1),
        ]
        first = said["upstreams"][0]
        assert (first["provider"], first["breaker"], first["obstacle"]) == ("a", "closed", None)
        assert first["usd_per_million"] == {"input": 1.0, "output": 2.0, "cached": None}
        assert first["context_tokens"] == 131072

    async def test_a_breaker_says_when_it_is_tried_again(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """And its route, that only a later tier serves."""
        text = config_text({"a": await upstreams(DOWN), "b": await upstreams()}, defaults=TOUCHY)
        async with daemon(text, tmp_path) as served:
            await post(served.url, ASKED)
            said = await status(served)

        one = said["upstreams"][0]
        assert (one["breaker"], one["admissible"], one["obstacle"]["reason"]) == ("open", False, "breaker")
        assert one["obstacle"]["wait_s"] == one["reopens_in_s"] == pytest.approx(300, rel=0.25)
        assert only(said["routes"])["state"] == "fallback"

    async def test_a_refused_key_closes_all_its_models(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """It is told apart from a breaker of one model."""
        refusing = await upstreams(Turn(fault=Fault("status", status=401)))
        async with daemon(config_text({"a": refusing, "b": await upstreams()}), tmp_path) as served:
            await post(served.url, ASKED)
            said = await status(served)

        assert said["upstreams"][0]["obstacle"]["reason"] == "account"

    async def test_a_quota_says_what_is_left_and_when_it_is_whole(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """And an upstream without any, which one it is that is used up."""
        extra = 'limits = [{ requests = 2, per = "day" }]'
        text = config_text({"a": await upstreams()}, extra=extra)
        async with daemon(text, tmp_path) as served:
            for _ in range(2):
                await post(served.url, ASKED)
            said = await status(served)

        quota = only(said["quotas"])
        assert (quota["provider"], quota["name"], quota["limit"], quota["remaining"]) == ("a", "requests/day", 2, 0)
        assert quota["reset_in_s"] == pytest.approx(86_400, rel=0.05)
        obstacle = only(said["upstreams"])["obstacle"]
        assert (obstacle["reason"], obstacle["text"]) == ("limit", "used up: requests/day")
        assert obstacle["wait_s"] == pytest.approx(86_400, rel=0.05)
        assert only(said["routes"])["state"] == "down"

    async def test_who_waits_for_what(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """How many are held, why, until when, and since when."""
        text = config_text(
            {"a": await upstreams()}, extra='limits = [{ requests = 1, per = "hour" }]', defaults='max_wait = "2h"'
        )
        async with daemon(text, tmp_path) as served:
            await post(served.url, ASKED)
            held = [asyncio.ensure_future(post(served.url, ASKED | {"stream": True})) for _ in range(2)]
            waiting = await held_up(served, 2)
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)

        assert (waiting["count"], waiting["reason"]) == (2, "quota")
        assert waiting["next_try_in_s"] == pytest.approx(3600, rel=0.05)
        assert 0 <= waiting["longest_s"] < 60

    async def test_keys_of_a_pool_are_one_upstream(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Which is as good as the best of them; their limits add up."""
        upstream = await upstreams(Turn(fault=Fault("status", status=401)), Turn())
        text = config_text({"a": upstream}, extra='limits = [{ requests = 7, per = "day" }]')
        async with daemon(text.replace(f'api_key = "{KEY}"', f'keys = ["{KEY}", "{KEY}2"]'), tmp_path) as served:
            await post(served.url, ASKED)
            said = await status(served)

        one = only(said["upstreams"])
        assert (one["keys"], one["keys_admissible"], one["admissible"], one["breaker"]) == (2, 1, True, "closed")
        assert only(said["quotas"])["limit"] == 14

    async def test_failovers_are_told_with_their_reasons(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """The latest first: from whom, to whom, why; and where nobody was left, what the client was told."""
        refusing = Turn(fault=Fault("status", status=401))
        both = {"a": await upstreams(DOWN), "b": await upstreams(refusing)}
        async with daemon(config_text(both, defaults='max_wait = "0s"'), tmp_path) as served:
            assert (await post(served.url, ASKED))[0] == 503
            last, first = (await status(served))["failovers"]

        assert (first["route"], first["source"], first["target"]) == ("auto", "a/model", "b/model")
        assert (first["outcome"], first["status"], first["detail"]) == ("unavailable", 503, "")
        assert (last["route"], last["source"], last["target"]) == ("auto", "b/model", "")
        assert (last["outcome"], last["status"], last["code"]) == ("unauthorized", 401, "invalid_key")
        assert last["detail"]

    async def test_only_the_last_failovers_are_kept(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """However long the daemon has been failing over."""
        text = config_text(
            {"a": await upstreams(DOWN), "b": await upstreams()},
            defaults="breaker = { failures = 500, min_requests = 500 }",
        )
        async with daemon(text, tmp_path) as served:
            for _ in range(55):
                await post(served.url, ASKED)
            said = (await status(served))["failovers"]

        assert len(said) == 50
        assert {(one["source"], one["target"]) for one in said} == {("a/model", "b/model")}

    async def test_models_appear_when_somebody_asks_for_them(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """A catalog offers hundreds; nobody wants to see those nobody uses."""
        spare = provider("spare", (await upstreams()).base_url, model="other")
        async with daemon(config_text({"a": await upstreams()}) + spare, tmp_path) as served:
            before = await status(served)
            await post(served.url, ASKED | {"model": "other"})
            after = await status(served)

        assert [one["name"] for one in before["routes"]] == ["auto"]
        assert [(one["name"], one["configured"]) for one in after["routes"]] == [("auto", True), ("other", False)]
        assert [one["model"] for one in after["upstreams"]] == [MODEL, "other"]

    async def test_config_warnings_are_shown(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """With their place in the file."""
        text = config_text({"a": await upstreams()}).replace("context = 131072", "context = 32000")
        async with daemon(text, tmp_path) as served:
            warning = only((await status(served))["warnings"])

        assert warning["path"] == "routes.auto"

    async def test_nothing_that_was_said_and_no_key_is_in_it(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Neither a prompt, nor an answer, nor an upstream's own words, nor any secret."""
        telltale = json.dumps({"error": {"message": SECRET, "code": SECRET}}).encode()
        bad = await upstreams(Turn(fault=Fault("status", status=500, body=telltale)))
        good = await upstreams(Turn(Answer(text=f"Here are {SECRET}.")))
        text = config_text({"a": bad, "b": good}).replace("[server]", f'[server]\ntokens = ["{TOKEN}"]')
        async with daemon(text, tmp_path) as served:
            await post(served.url, ASKED, headers={"Authorization": f"Bearer {TOKEN}"})
            shown = (await get(served.url, "/status")).data.decode() + (await get(served.url, "/")).data.decode()

        assert '"failovers":[{' in shown
        for secret in (SECRET, KEY, TOKEN):
            assert secret not in shown


class TestToday:
    async def test_what_was_spent(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """Tries, failures, tokens and dollars of each upstream since midnight, the dearest first."""
        text = config_text({"a": await upstreams(DOWN), "b": await upstreams()}, defaults=TOUCHY)
        async with daemon(text, tmp_path) as served:
            costs = [float((await post(served.url, ASKED))[1]["x-routerd-cost-usd"]) for _ in range(2)]
            today = (await status(served))["today"]

        fine, broken = today["upstreams"]
        assert (fine["provider"], fine["attempts"], fine["failures"]) == ("b", 2, 0)
        assert (broken["provider"], broken["attempts"], broken["failures"]) == ("a", 1, 1)
        assert fine["input_tokens"] > 0
        assert fine["output_tokens"] > 0
        assert today["cost_usd"] == fine["cost_usd"] == pytest.approx(sum(costs))

    async def test_a_restart_does_not_forget_it(self, upstreams: Upstreams, tmp_path: Path) -> None:
        """It is taken up from the ledger."""
        text = config_text({"a": await upstreams()}).replace("memory:", f"sqlite:{tmp_path}/a.db")
        async with daemon(text, tmp_path) as served:
            await post(served.url, ASKED)
            before = (await status(served))["today"]
        async with daemon(text, tmp_path) as served:
            after = (await status(served))["today"]

        assert before == after
        assert only(after["upstreams"])["attempts"] == 1
