"""A client that does not stream has its answer, or an honest error, before it gives up."""

from __future__ import annotations

from pathlib import Path

import msgspec
import openai
import pytest

from routerd.canonical import Head
from routerd.config import load
from routerd.policy.quota import Quota
from routerd.proxy.deadline import SMALL_PROMPT_TOKENS, answer_within_s
from routerd.proxy.live import LiveRoute
from routerd.proxy.simulated import TEXT, Fault, Turn
from tests.fakes import Upstreams
from tests.proxy.test_waiting import limited
from tests.proxy.wire import error_of, hear, streamed
from tests.rig import HELLO, MODEL, WEATHER, config_text, daemon

SILENT = Turn(fault=Fault("stall", "before_headers"))
ASKED = Head(
    "auto",
    stream=False,
    tools=False,
    images=False,
    include_usage=False,
    max_output_tokens=None,
    prompt_tokens=100,
    conversation=1,
)


def patience(seconds: float) -> dict[str, str]:
    """What the SDKs of OpenAI and Anthropic say of their own limit."""
    return {"x-stainless-read-timeout": str(seconds)}


@pytest.fixture
def route(tmp_path: Path) -> LiveRoute:
    """A route with an auxiliary model."""
    return _route(tmp_path, f'auxiliary = ["a/{MODEL}"]')


def _route(tmp_path: Path, more: str) -> LiveRoute:
    path = tmp_path / "routerd.toml"
    path.write_text(
        f'[providers.a]\nbase_url = "http://127.0.0.1:9/v1"\nmodels = ["{MODEL}"]\n'
        f'[routes.auto]\nmodels = ["{MODEL}"]\n{more}\n'
    )
    config = load(path, {})
    plain = config.routes["auto"]
    return LiveRoute(plain, config.defaults, (), ((),) if plain.auxiliary else (), Quota(()), Quota(()))


class TestTheTimeThereIs:
    @pytest.mark.parametrize(("said", "left"), [("30", 25.0), ("30.0", 25.0), ("600", 595.0), ("12", 10.0)])
    def test_is_what_the_client_says_less_a_margin(self, route: LiveRoute, said: str, left: float) -> None:
        """So that our error is there before its own."""
        assert answer_within_s({"x-stainless-read-timeout": said}, ASKED, route) == left
        assert answer_within_s({"x-stainless-timeout": said}, ASKED, route) == left

    @pytest.mark.parametrize("said", ["", "NOT_GIVEN", "nan", "inf", "-1", "0"])
    def test_is_not_read_out_of_nonsense(self, tmp_path: Path, said: str) -> None:
        """Then it takes as long as it takes."""
        assert answer_within_s({"x-stainless-read-timeout": said}, ASKED, _route(tmp_path, "")) is None

    def test_is_half_a_minute_for_a_small_call_on_the_side(self, route: LiveRoute) -> None:
        """Where the route has a model for such calls. Compressing a long history is given more."""
        replace = msgspec.structs.replace

        assert answer_within_s({}, ASKED, route) == 25.0
        assert answer_within_s({}, replace(ASKED, prompt_tokens=SMALL_PROMPT_TOKENS + 1), route) is None
        assert answer_within_s({}, replace(ASKED, tools=True), route) is None

    def test_is_none_of_our_business_in_a_stream(self, route: LiveRoute) -> None:
        """It is kept alive instead."""
        assert answer_within_s(patience(30), msgspec.structs.replace(ASKED, stream=True), route) is None


async def test_half_of_it_is_left_for_somebody_else(upstreams: Upstreams, tmp_path: Path) -> None:
    """A silent upstream is given up early enough for the next one to answer in time."""
    silent, ready = await upstreams(SILENT), await upstreams()
    async with daemon(config_text({"a": silent, "b": ready}), tmp_path) as served:
        heard = await hear(served.url, headers=patience(1.2))

        assert heard.json["choices"][0]["message"]["content"] == TEXT
        assert 0.45 <= heard.reads[-1][0] < 1.2
        assert heard.headers["x-routerd-provider"] == "b"


async def test_the_only_one_has_all_of_it(upstreams: Upstreams, tmp_path: Path) -> None:
    """There is nobody to turn to: a slow answer is better than none."""
    slow = await upstreams(Turn(fault=Fault("pause", "before_headers", seconds=0.8)))
    async with daemon(config_text({"a": slow}), tmp_path) as served:
        heard = await hear(served.url, headers=patience(1.5))

        assert heard.json["choices"][0]["message"]["content"] == TEXT
        assert len(slow.requests) == 1


@pytest.mark.parametrize("tools", [False, True])
async def test_the_client_is_told_before_it_leaves(upstreams: Upstreams, tmp_path: Path, tools: bool) -> None:
    """When nobody answers in time; what was asked of the last one is called off."""
    first, second = await upstreams(SILENT), await upstreams(SILENT)
    asked = HELLO | ({"tools": [WEATHER]} if tools else {})
    async with daemon(config_text({"a": first, "b": second}), tmp_path) as served:
        heard = await hear(served.url, asked, headers=patience(1.2))
        await first.idle()
        await second.idle()

        assert heard.status == 503
        assert error_of(heard)["code"] == "too_late"
        assert 0.9 <= heard.reads[-1][0] < 1.2
        assert [one["outcome"] for one in served.exchanges[0]["attempts"]] == ["unavailable", "cancelled"]


async def test_a_wait_that_would_take_too_long_is_not_begun(upstreams: Upstreams, tmp_path: Path) -> None:
    """Better to hear at once when there will be room than to wait for it in vain."""
    upstream = await upstreams(limited(30))
    async with daemon(config_text({"a": upstream}), tmp_path) as served:
        heard = await hear(served.url, headers=patience(6))

        assert heard.status == 429
        assert 25 <= int(heard.headers["Retry-After"]) <= 31
        assert heard.reads[-1][0] < 3


async def test_a_stream_is_held_all_the_same(upstreams: Upstreams, tmp_path: Path) -> None:
    """Its client hears signs of life, each of which begins its limit anew."""
    upstream = await upstreams(Turn(fault=Fault("pause", "before_headers", seconds=1.0)))
    async with daemon(config_text({"a": upstream}, defaults='keepalive = "100ms"'), tmp_path) as served:
        heard = await hear(served.url, streamed(), headers=patience(0.6))

        assert heard.text == TEXT


async def test_the_real_sdk_hears_an_error_and_no_timeout(upstreams: Upstreams, tmp_path: Path) -> None:
    """It says how patient it is by itself."""
    upstream = await upstreams(SILENT)
    async with daemon(config_text({"a": upstream}), tmp_path) as served:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=1.2, max_retries=0)
        async with client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "Hello."}])

        assert caught.value.status_code == 503
