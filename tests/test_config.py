# ruff: noqa: E501 -- a message stands here in one line, as it is printed
"""What the configuration may say, what becomes of it, and what is answered to mistakes."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from routerd import config
from routerd.canonical import Limit, Price, Secret, Upstream
from routerd.config import Config, ConfigError, Listen, Problem

KEYS = {"OPENROUTER_API_KEY": "or", "MIMO_API_KEY": "mi", "GROQ_API_KEY": "gr", "LAB_KEY": "la", "HERMES_TOKEN": "he"}
ENVIRON = {"HOME": "/home/agent", **KEYS}

EXAMPLE = """
[server]
listen = "127.0.0.1:8080"
tokens = ["${HERMES_TOKEN}"]
max_body = "32MiB"

[state]
url = "sqlite:routerd.db"

[defaults]
prefer = "balanced"
first_token_timeout = "60s"
stall_timeout = "45s"
max_wait = "300s"
max_attempts = 6
delivery = "live"
breaker = { failures = 3, ratio = 0.5, min_requests = 5, window = "5m", open = "15s", open_max = "10m" }

[providers.openrouter]
[providers.mimo]
[providers.groq]
tier = "free"
[providers.lab]
base_url = "http://127.0.0.1:9001/v1"
dialect = "chat"
api_key = "${LAB_KEY}"
limits = [ { requests = 20, per = "minute" }, { requests = 50, per = "day", resets = "UTC", models = "*:free" },
           { tokens = 250000, per = "minute" }, { usd = 5.0, per = "day", resets = "Europe/Berlin" } ]
[providers.lab.models]
"mimo-v2.6-pro" = { id = "xiaomi/mimo-v2.6-pro", context = 1048576, max_output = 131072, input = 0.435, output = 0.87, cached = 0.0036 }

[routes.auto]
models = ["mimo-v2.6-pro", ["deepseek-v4-pro", "kimi-k2.6"], "groq/gpt-oss-120b"]
prefer = "balanced"
delivery = "whole"
budget = { usd = 3.0, per = "day" }
auxiliary = ["gemini-3.5-flash-lite"]
hedge = "free"
"""

LAB = '[providers.lab]\nbase_url = "http://127.0.0.1:9001/v1"\n'
LAB_MODEL = LAB + 'models = ["m"]\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def load(folder: Path, text: str, environ: Mapping[str, str] = ENVIRON) -> Config:
    path = folder / "routerd.toml"
    path.write_text(text)
    return config.load(path, environ)


def problems(folder: Path, text: str, environ: Mapping[str, str] = ENVIRON) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, environ)
    return [str(problem) for problem in caught.value.problems]


def providers_of(upstreams: tuple[Upstream, ...]) -> list[str]:
    return [upstream.provider for upstream in upstreams]


class TestExample:
    def test_is_accepted_whole(self, folder: Path) -> None:
        """Everything the README shows means what it says."""
        loaded = load(folder, EXAMPLE)
        auto = loaded.routes["auto"]

        assert loaded.server.listen == (Listen("127.0.0.1", 8080),)
        assert loaded.server.tokens == (Secret("he"),)
        assert loaded.server.max_body_bytes == 32 * 1024 * 1024
        assert list(loaded.providers) == ["openrouter", "mimo", "groq", "lab"]
        assert [providers_of(tier) for tier in auto.tiers] == [
            ["openrouter", "mimo", "lab"],
            ["openrouter", "openrouter"],
            ["groq"],
        ]
        assert auto.delivery == "whole"
        assert auto.budget == Limit(3.0, "usd", "day")
        assert providers_of(auto.auxiliary) == ["openrouter"]
        assert not loaded.simulated

    def test_asks_for_hedging_that_costs_nothing(self, folder: Path) -> None:
        """Which needs no budget."""
        loaded = load(folder, EXAMPLE)

        assert loaded.warnings == ()
        assert (loaded.routes["auto"].hedge, loaded.routes["auto"].hedge_budget) == ("free", None)

    def test_gives_the_lab_its_limits(self, folder: Path) -> None:
        """Each limit keeps its unit, period, reset and pattern."""
        assert load(folder, EXAMPLE).providers["lab"].limits == (
            Limit(20, "requests", "minute"),
            Limit(50, "requests", "day", "UTC", "*:free"),
            Limit(250_000, "tokens", "minute"),
            Limit(5, "usd", "day", "Europe/Berlin"),
        )

    def test_gives_the_lab_its_model(self, folder: Path) -> None:
        """Wire name, window and prices are the user's."""
        (upstream,) = load(folder, EXAMPLE).providers["lab"].upstreams

        assert (upstream.model, upstream.wire_model) == ("mimo-v2.6-pro", "xiaomi/mimo-v2.6-pro")
        assert (upstream.context_tokens, upstream.max_output_tokens) == (1_048_576, 131_072)
        assert upstream.price == Price(0.435, 0.87, 0.0036)
        assert upstream.dialect == "chat"


class TestFinding:
    def test_prefers_what_it_is_told(self, folder: Path) -> None:
        """``--config`` comes first, whether the file exists or not; load then says that it does not."""
        environ = {"ROUTERD_CONFIG": str(folder / "other.toml")}

        assert config.find("mine.toml", environ, folder) == folder / "mine.toml"
        assert config.find(None, environ, folder) == folder / "other.toml"

    def test_looks_in_the_working_directory_before_the_home_directory(self, folder: Path) -> None:
        """``./routerd.toml``, then ``$XDG_CONFIG_HOME/routerd/routerd.toml``."""
        environ = {"XDG_CONFIG_HOME": str(folder / "xdg")}
        own = folder / "xdg" / "routerd" / "routerd.toml"
        own.parent.mkdir(parents=True)
        own.touch()

        assert config.find(None, environ, folder) == own

        (folder / "routerd.toml").touch()

        assert config.find(None, environ, folder) == folder / "routerd.toml"

    def test_looks_in_the_home_directory_where_xdg_says_nothing(self, folder: Path) -> None:
        """``~/.config`` is the default of ``$XDG_CONFIG_HOME``."""
        own = folder / ".config" / "routerd" / "routerd.toml"
        own.parent.mkdir(parents=True)
        own.touch()

        assert config.find(None, {"HOME": str(folder)}, folder / "elsewhere") == own

    def test_finds_nothing_where_nothing_is(self, folder: Path) -> None:
        """Then the environment's keys are all there is."""
        found = config.find(None, {"HOME": str(folder)}, folder)

        assert found in {None, Path("/etc/routerd/routerd.toml")}

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (None, "cannot be read: No such file or directory"),
            (b"\xff", "is not UTF-8"),
            (b"[server", "is not TOML"),
            (b"a = " + b"9" * 5000, "is not TOML"),
            (b"a = " + b"[" * 100_000, "is not TOML"),
            (b"#" * (config.MAX_CONFIG_BYTES + 1), "is larger than"),
        ],
    )
    def test_a_file_that_is_no_config_is_one_problem(self, folder: Path, content: bytes | None, expected: str) -> None:
        """It names the file, for it may not be the one that was meant."""
        path = folder / "routerd.toml"
        if content is not None:
            path.write_bytes(content)

        with pytest.raises(ConfigError, match=expected) as caught:
            config.load(path, ENVIRON)
        assert len(caught.value.problems) == 1
        assert str(path) in str(caught.value)


class TestEnvironmentAlone:
    def test_uses_every_key_it_finds(self) -> None:
        """One provider for each known variable that is set; ``auto`` tries their default models in order."""
        loaded = config.load(None, ENVIRON)

        assert list(loaded.providers) == ["mimo", "openrouter", "groq"]
        assert loaded.providers["mimo"].keys == (Secret("mi"),)
        assert [tier[0].provider for tier in loaded.routes["auto"].tiers] == ["mimo", "openrouter", "groq"]
        assert loaded.source is None

    def test_without_any_key_serves_from_two_simulated_providers(self) -> None:
        """So that a first try needs nothing, and no answer can be mistaken for a real one."""
        loaded = config.load(None, {"OPENROUTER_API_KEY": " "})

        assert loaded.simulated
        assert len(loaded.providers) == 2
        assert all(provider.simulated == () for provider in loaded.providers.values())
        assert all(model.endswith("-simulated") for model in loaded.models)
        assert len(loaded.routes["auto"].tiers) == 2

    def test_says_which_key_is_of_no_use_alone(self) -> None:
        """Some vendors' models are not known here and have to be listed."""
        loaded = config.load(None, {"NOUS_API_KEY": "k", "GROQ_API_KEY": "k"})

        assert list(loaded.providers) == ["groq"]
        assert "NOUS_API_KEY is set, but the models of Nous Portal must be listed" in str(loaded.warnings[0])

    def test_gives_a_key_that_several_could_use_to_the_first(self) -> None:
        """Three regions share a variable; only one of them is the account's."""
        assert list(config.load(None, {"MIMO_TOKEN_PLAN_KEY": "tp-1"}).providers) == ["mimo-token-plan-sgp"]

    def test_ignores_retired_providers(self) -> None:
        """A ``GITHUB_TOKEN`` is nothing unusual."""
        assert config.load(None, {"GITHUB_TOKEN": "k"}).simulated

    def test_is_used_too_by_a_file_that_names_no_provider(self, folder: Path) -> None:
        """A file may be about the server alone."""
        loaded = load(folder, '[server]\nlisten = "127.0.0.1:9999"\n')

        assert list(loaded.providers) == ["mimo", "openrouter", "groq"]

    def test_leaves_a_file_without_providers_and_keys_in_trouble(self, folder: Path) -> None:
        """Somebody who wrote a config does not want made-up answers."""
        assert problems(folder, "", {}) == [
            "providers: there is none; add a table like [providers.openrouter], or set OPENROUTER_API_KEY"
        ]

    def test_a_key_with_a_line_break_is_a_problem(self) -> None:
        """It could never travel in a header."""
        with pytest.raises(ConfigError, match=r"providers\.groq\.api_key: GROQ_API_KEY: a key is one line"):
            config.load(None, {"GROQ_API_KEY": "a\nb"})


FAULTS = ", ".join(config.SIMULATED_FAULTS)
MISTAKES = {
    '[server]\nlisten = "8080"': 'server.listen: "8080" is no address; write HOST:PORT, [IPv6]:PORT or unix:/PATH',
    '[server]\nlisten = ["127.0.0.1:1", "a:70000"]': 'server.listen[1]: "a:70000" is no address; write HOST:PORT, [IPv6]:PORT or unix:/PATH',
    '[server]\nlisten = "unix:routerd.sock"': 'server.listen: a unix socket needs an absolute path: "unix:/run/routerd/routerd.sock"',
    '[server]\nlisten = "0.0.0.0:8080"': 'server.tokens: 0.0.0.0:8080 is reachable from other machines; add tokens = ["${ROUTERD_TOKEN}"]',
    '[server]\nlisten = "[::]:8080"\ntokens = []': 'server.tokens: [::]:8080 is reachable from other machines; add tokens = ["${ROUTERD_TOKEN}"]',
    '[server]\ntokens = ["${NO_SUCH}"]': "server.tokens[0]: the environment variable NO_SUCH is not set; set it or change the reference",
    '[server]\ntokens = [""]': "server.tokens[0]: is empty; leave the key out or give it a value",
    "[server]\ntokens = [7]": 'server.tokens[0]: must be "${NAME}", "file:/path", "credential:NAME" or the text, not a number',
    '[server]\ntokens = "t"': "server.tokens: must be a list, not text",
    '[server]\nmax_body = "32 potatoes"': 'server.max_body: "32 potatoes" is no size; write a number and a unit: "32MiB", "500kB"',
    '[server]\nmax_body = "1TB"': 'server.max_body: "1TB" is no size; write a number and a unit: "32MiB", "500kB"',
    "[server]\nmax_body = 7": "server.max_body: must be from 1024 to 1073741824",
    '[server]\nmax_body = "2GiB"': "server.max_body: must be from 1024 to 1073741824 bytes",
    '[server]\nlisten-on = "x"': 'server.listen-on: unknown key; did you mean "listen"?',
    "server = 3": "server: must be a table, not a number",
    '[state]\nurl = "redis://x"': 'state.url: must be "sqlite:FILE" or "memory:"',
    '[defaults]\nprefer = "cheep"': "defaults.prefer: must be one of cheap, balanced, fast, or a number of USD per hour",
    "[defaults]\nprefer = -1": "defaults.prefer: must be from 0 to 100000",
    "[defaults]\nprefer = nan": "defaults.prefer: must be from 0 to 100000",
    '[defaults]\nstall_timeout = "45"': 'defaults.stall_timeout: "45" is no duration; write numbers with ms, s, m, h, d: "60s", "1h 30m"',
    "[defaults]\nstall_timeout = 45": 'defaults.stall_timeout: needs a unit, one of ms, s, m, h, d, in quotes: "60s"',
    '[defaults]\nstall_timeout = "2d"': "defaults.stall_timeout: must be from 0.05s to 3600s",
    '[defaults]\nkeepalive = "1m"': "defaults.keepalive: must be from 0.05s to 5s",
    "[defaults]\nmax_attempts = 0": "defaults.max_attempts: must be from 1 to 64",
    "[defaults]\nmax_attempts = 2.5": "defaults.max_attempts: must be a whole number, not a fraction",
    "[defaults]\nmax_attempts = true": "defaults.max_attempts: must be a whole number, not true or false",
    '[defaults]\ndelivery = "hole"': 'defaults.delivery: "hole" is none of live, whole; did you mean "whole"?',
    "[defaults]\ndelivery = 2026-01-01": "defaults.delivery: must be text in quotes, not a date or time",
    "[defaults]\nfirst-token-timeout = 1": 'defaults.first-token-timeout: unknown key; did you mean "first_token_timeout"?',
    '[defaults.breaker]\nopen = "1h"': "defaults.breaker: open must be above 0 and at most open_max",
    "[defaults.breaker]\nratio = 2": "defaults.breaker.ratio: must be from 0.01 to 1",
    "[defaults.breaker]\nzzz = 2": "defaults.breaker.zzz: unknown key; known here: failures, min_requests, open, open_max, ratio, slow_start_successes, window",
    "[server]\n[severs]": 'severs: unknown key; did you mean "server"?',
    "[providers.opnrouter]": 'providers.opnrouter: "opnrouter" is no known provider, and a server of your own needs base_url; did you mean "openrouter"?',
    "[providers.github-models]": "providers.github-models: GitHub shut this service down on 2026-07-30; remove this table",
    "[providers.deepseek]": "providers.deepseek.api_key: there is no key; set the environment variable DEEPSEEK_API_KEY, or give api_key",
    '[providers.two]\npreset = "opnrouter"\nbase_url = "http://h/v1"\nmodels = ["m"]': 'providers.two: "opnrouter" is no known provider, and a server of your own needs base_url; did you mean "openrouter"?',
    "[providers.ollama]": 'providers.ollama.models: list its models: models = ["name"], or a table with their windows and prices',
    LAB: 'providers.lab.models: list its models: models = ["name"], or a table with their windows and prices',
    '[providers."a/b"]\nbase_url = "http://h"\nmodels = ["m"]': 'providers."a/b": the name of a provider has no "/": it separates provider and model',
    '[providers.groq]\ndialect = ["chat", "messages"]': "providers.groq.base_url: there is none for messages; give one, or leave messages out of dialect",
    '[providers.x]\nbase_url = "ftp://h"\nmodels = ["m"]': 'providers.x.base_url: is no URL with a host; write it like "https://api.example.com/v1"',
    '[providers.x]\nbase_url = "http://u:p@h"\nmodels = ["m"]': "providers.x.base_url: holds a user name or password; keys belong into api_key",
    '[providers.x]\nbase_url = "http://h/v1?k=1"\nmodels = ["m"]': "providers.x.base_url: must end with the path: no ? and no #",
    '[providers.x]\nbase_url = "http://h/v1/chat/completions"\nmodels = ["m"]': 'providers.x.base_url: leave "/chat/completions" off; it is appended',
    LAB + "models = { m = { contxt = 1 } }": 'providers.lab.models.m.contxt: unknown key; did you mean "context"?',
    LAB + 'models = { "m.1" = { context = 0 } }': 'providers.lab.models."m.1".context: must be from 1 to 1000000000',
    LAB + "models = { m = { input = -1 } }": "providers.lab.models.m.input: must be from 0 to 100000",
    LAB + "models = { m = 7 }": "providers.lab.models.m: must be a table, not a number",
    LAB + "models = [7]": "providers.lab.models[0]: must be text in quotes, not a number",
    '[providers.sim]\nsimulated = true\nfaults = ["502"]': f'providers.sim.faults[0]: "502" is none of {FAULTS}; did you mean "529"?',
    "[providers.sim]\nsimulated = true\nbase_url = 1": "providers.sim.base_url: unknown key; known here: default_model, faults, first_token_timeout, limits, models, simulated, stall_timeout",
    '[providers.sim]\nsimulated = true\nmodels = ["gpt"]': 'providers.sim.models: a simulated model has a name that ends with "-simulated"',
}
# Added to a provider that is sound without them.
MORE_MISTAKES = {
    'api_key = "a"\nkeys = ["b"]': "providers.lab.keys: give either api_key or keys, not both",
    'keys = ["b", "c", "b"]': "providers.lab.keys[2]: is the same key as one before it; remove it",
    'api_key = "credential:lab"': "providers.lab.api_key: there is no $CREDENTIALS_DIRECTORY; credentials come with systemd's LoadCredential=",
    'api_key = "file:/no/such"': "providers.lab.api_key: /no/such cannot be read: No such file or directory",
    'api_key = "file:key"': 'providers.lab.api_key: needs an absolute path: "file:/etc/routerd/key"',
    'api_key = "ключ"': "providers.lab.api_key: a key is one line of ASCII characters; this one is not",
    'auth = "basic"': 'providers.lab.auth: "basic" is none of bearer, x-api-key',
    'tier = "free"': "providers.lab.tier: this server has no recurring free tier that is known here; use limits instead",
    'dialect = ["chat", "smoke"]': 'providers.lab.dialect[1]: "smoke" is none of chat, responses, messages',
    'headers = { "bad name" = "x" }': 'providers.lab.headers."bad name": is no name of an HTTP header',
    'headers = { x-team = "${NO_SUCH}" }': "providers.lab.headers.x-team: the environment variable NO_SUCH is not set; set it or change the reference",
    'default_model = "n"': 'providers.lab.default_model: "n" is not among the models of this provider',
    "simulated = 1": "providers.lab.simulated: must be true or false, not a number",
    "base-urls = 1": 'providers.lab.base-urls: unknown key; did you mean "base_url"?',
    'limits = [{ per = "day" }]': "providers.lab.limits[0]: needs exactly one of requests, tokens, usd, with its amount",
    "limits = [{ requests = 1 }]": "providers.lab.limits[0].per: is missing; it is one of minute, hour, day, month",
    'limits = [{ requests = 0, per = "day" }]': "providers.lab.limits[0].requests: must be from 1e-06 to 1e+15",
    'limits = [{ requests = 1, per = "dya" }]': 'providers.lab.limits[0].per: "dya" is none of minute, hour, day, month; did you mean "day"?',
    'limits = [{ requests = 1, per = "day", resets = "Europe/Berln" }]': 'providers.lab.limits[0].resets: unknown time zone "Europe/Berln"; did you mean "Europe/Berlin"?',
    'limits = [{ requests = 1, per = "day", resets = "minute" }]': 'providers.lab.limits[0].resets: "minute" does not go with per = "day"; write "rolling" or a time zone such as "UTC"',
    'limits = { requests = 1, per = "day" }': "providers.lab.limits: must be a list of tables, not a table",
    "[routes.auto]": 'routes.auto.models: is missing; list models in order of preference: models = ["mimo-v2.6-pro"]',
    "[routes.auto]\nmodels = []": "routes.auto.models: is empty; list at least one model",
    '[routes.auto]\nmodels = "m"': "routes.auto.models: must be a list, not text",
    '[routes.auto]\nmodels = ["m", ["m", "lob/m"]]': 'routes.auto.models[1][1]: no configured provider offers "lob/m"; did you mean "lab/m"?',
    '[routes.auto]\nmodels = ["zzz"]': 'routes.auto.models[0]: no configured provider offers "zzz"; `routerd models` lists what they offer',
    '[routes.auto]\nmodels = ["m"]\nauxiliary = ["zzz"]': 'routes.auto.auxiliary[0]: no configured provider offers "zzz"; `routerd models` lists what they offer',
    '[routes.auto]\nmodels = ["m"]\nbudget = { requests = 1, per = "day" }': "routes.auto.budget: needs exactly one of usd, with its amount",
    '[routes.auto]\nmodels = ["m"]\nhedge = "maybe"': 'routes.auto.hedge: "maybe" is none of off, free, paid',
    '[routes." x"]\nmodels = ["m"]': 'routes." x": a name has 1 to 200 printable characters and no space at its ends',
}
ALL_MISTAKES = MISTAKES | {LAB_MODEL + text: expected for text, expected in MORE_MISTAKES.items()}


class TestMistakes:
    @pytest.mark.parametrize(("text", "expected"), ALL_MISTAKES.items())
    def test_each_is_named_with_its_place_and_what_to_do(self, folder: Path, text: str, expected: str) -> None:
        """One line: the TOML path, what is wrong, and what to write instead."""
        assert expected in problems(folder, text)

    def test_all_are_reported_together(self, folder: Path) -> None:
        """Nobody has to fix one to hear of the next."""
        text = """
[server]
listen = "0.0.0.0:8080"
[defaults]
prefer = "cheep"
stall = "45s"
[providers.groq]
limits = [{ requests = 20, per = "minute" }, { requests = 50, per = "day", resets = "Europe/Berln" }]
[providers.opnrouter]
[providers.deepseek]
[routes.auto]
models = ["gpt-oss-120b", "gpt-oss-121b"]
"""
        assert problems(folder, text) == [
            'server.tokens: 0.0.0.0:8080 is reachable from other machines; add tokens = ["${ROUTERD_TOKEN}"]',
            "defaults.prefer: must be one of cheap, balanced, fast, or a number of USD per hour",
            'defaults.stall: unknown key; did you mean "stall_timeout"?',
            'providers.groq.limits[1].resets: unknown time zone "Europe/Berln"; did you mean "Europe/Berlin"?',
            'providers.opnrouter: "opnrouter" is no known provider, and a server of your own needs base_url; did you mean "openrouter"?',
            "providers.deepseek.api_key: there is no key; set the environment variable DEEPSEEK_API_KEY, or give api_key",
            'routes.auto.models[1]: no configured provider offers "gpt-oss-121b"; did you mean "gpt-oss-120b"?',
        ]

    def test_no_message_repeats_a_secret(self, folder: Path) -> None:
        """A key that is wrong is a key nonetheless."""
        text = LAB_MODEL + 'keys = ["sk-hidden", "sk-hidden", "sk-hidden\\n2"]\nbase_uri = 1\n'
        text += '[server]\ntokens = ["sk-hidden\\t"]\n[providers.b]\nbase_url = "https://sk-hidden@h"\nmodels = ["m"]'

        assert len(found := problems(folder, text)) >= 4
        assert "sk-hidden" not in "".join(found)


class TestValues:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("500ms", 0.5), ("90s", 90), ("1.5m", 90), ("1h", 3600), ("1m 30s", 90), ("1_000ms", 1)],
    )
    def test_durations_have_units(self, folder: Path, text: str, seconds: float) -> None:
        """Numbers may have fractions and underscores, and several parts add up."""
        loaded = load(folder, f'[defaults]\nstall_timeout = "{text}"')

        assert loaded.defaults.stall_timeout_s == pytest.approx(seconds)

    @pytest.mark.parametrize(
        ("value", "size"),
        [('"32MiB"', 2**25), ('"500kB"', 500_000), ("1_048_576", 2**20), ('"1_024"', 1024), ('"1.5 mib"', 3 * 2**19)],
    )
    def test_sizes_have_units(self, folder: Path, value: str, size: int) -> None:
        """Thousands for kB and 1024s for KiB; a bare number is bytes."""
        assert load(folder, f"[server]\nmax_body = {value}").server.max_body_bytes == size

    @pytest.mark.parametrize(
        ("value", "usd_per_hour"), [('"cheap"', 0), ('"balanced"', 2), ('"fast"', 60), ("7.2", 7.2), ("36", 36)]
    )
    def test_a_preference_is_a_value_of_time(self, folder: Path, value: str, usd_per_hour: float) -> None:
        """Three words for numbers of USD per hour, or the number itself."""
        defaults = load(folder, f"[defaults]\nprefer = {value}").defaults

        assert defaults.value_of_time_usd_per_s == pytest.approx(usd_per_hour / 3600)

    @pytest.mark.parametrize(
        ("text", "listen", "local"),
        [
            ("127.0.0.1:8080", Listen("127.0.0.1", 8080), True),
            ("localhost:0", Listen("localhost", 0), True),
            ("[::1]:8080", Listen("::1", 8080), True),
            ("unix:/run/r.sock", Listen(path="/run/r.sock"), True),
            ("0.0.0.0:80", Listen("0.0.0.0", 80), False),
            (":8080", Listen("", 8080), False),
            ("192.168.1.5:8080", Listen("192.168.1.5", 8080), False),
            ("router.lan:8080", Listen("router.lan", 8080), False),
        ],
    )
    def test_addresses(self, folder: Path, text: str, listen: Listen, local: bool) -> None:
        """Loopback and unix sockets are local; everything else needs tokens."""
        loaded = load(folder, f'[server]\ntokens = ["t"]\nlisten = "{text}"')

        assert loaded.server.listen == (listen,)
        assert listen.local == local
        assert str(listen) == text

    def test_the_command_line_replaces_the_addresses_and_is_held_to_the_same_rules(self, folder: Path) -> None:
        """``--listen 0.0.0.0:8080`` without tokens is no less open than in the file."""
        path = folder / "routerd.toml"
        path.write_text('[server]\nlisten = "10.0.0.1:80"\n')

        assert config.load(path, ENVIRON, ["127.0.0.1:9"]).server.listen == (Listen("127.0.0.1", 9),)
        with pytest.raises(ConfigError, match="reachable from other machines"):
            config.load(path, ENVIRON, ["0.0.0.0:8080"])
        with pytest.raises(ConfigError, match=r"--listen\[0\]: \"x\" is no address"):
            config.load(path, ENVIRON, ["x"])

    @pytest.mark.parametrize(
        ("url", "environ", "expected"),
        [
            (None, {"HOME": "/h"}, "sqlite:/h/.local/state/routerd/routerd.db"),
            ("sqlite:x.db", {"XDG_STATE_HOME": "/s"}, "sqlite:/s/routerd/x.db"),
            ("sqlite:x.db", {"STATE_DIRECTORY": "/var/lib/routerd:/b"}, "sqlite:/var/lib/routerd/x.db"),
            ("sqlite:/x/y.db", {}, "sqlite:/x/y.db"),
            ("sqlite:///x/y.db", {}, "sqlite:/x/y.db"),
            ("memory:", {}, "memory:"),
        ],
    )
    def test_where_the_state_is(self, folder: Path, url: str | None, environ: dict[str, str], expected: str) -> None:
        """Relative files lie where systemd says, else in the user's folder for state."""
        text = f'[state]\nurl = "{url}"\n' if url else ""

        assert load(folder, text + LAB_MODEL, environ).state_url == expected


class TestSecrets:
    def test_come_from_the_environment_a_file_or_a_credential(self, folder: Path) -> None:
        """A pool may mix them; space around a key in a file does not belong to it."""
        (folder / "credentials").mkdir()
        (folder / "credentials" / "lab").write_text("from-credential\n")
        (folder / "key").write_text("  from-file\n")
        text = f'keys = ["${{LAB_KEY}}", "file:{folder / "key"}", "credential:lab", "literal"]'
        environ = ENVIRON | {"CREDENTIALS_DIRECTORY": str(folder / "credentials")}

        keys = load(folder, LAB_MODEL + text, environ).providers["lab"].keys

        assert [key.reveal() for key in keys] == ["la", "from-file", "from-credential", "literal"]

    @pytest.mark.parametrize("name", ["", "..", "../key", "a/b"])
    def test_a_credential_has_no_path(self, folder: Path, name: str) -> None:
        """The folder systemd makes holds plain names."""
        found = problems(folder, LAB_MODEL + f'api_key = "credential:{name}"', {"CREDENTIALS_DIRECTORY": str(folder)})

        assert found == ['providers.lab.api_key: a credential is named without a path: "credential:NAME"']

    @pytest.mark.parametrize("content", [b"", b"  \n", b"k" * (config.MAX_SECRET_BYTES + 1)])
    def test_a_key_file_holds_a_key(self, folder: Path, content: bytes) -> None:
        """An empty file is a mistake, and a huge one is not a key."""
        (folder / "key").write_bytes(content)

        assert "is empty or larger" in problems(folder, LAB_MODEL + f'api_key = "file:{folder / "key"}"')[0]

    def test_never_show_in_the_config(self, folder: Path) -> None:
        """Whoever prints it prints stars."""
        text = repr(load(folder, LAB_MODEL + 'api_key = "sk-hidden"\n[server]\ntokens = ["sk-hidden"]'))

        assert "sk-hidden" not in text
        assert "***" in text

    @pytest.mark.parametrize(("token", "reference"), [("${HERMES_TOKEN}", "${HERMES_TOKEN}"), ("literal", "")])
    def test_a_token_can_be_referred_to_as_the_file_does(self, folder: Path, token: str, reference: str) -> None:
        """So that it can be shown to others without being given away."""
        assert load(folder, f'[server]\ntokens = ["{token}"]').server.token_reference == reference


class TestProviders:
    def test_a_known_one_comes_with_everything(self, folder: Path) -> None:
        """URL, key variable, hooks, fixes, limits and models."""
        mimo = load(folder, "[providers.mimo]").providers["mimo"]

        assert mimo.base_urls["chat"] == "https://api.xiaomimimo.com/v1"
        assert mimo.vendor == "mimo"
        assert mimo.keys == (Secret("mi"),)
        assert mimo.auth == "bearer"
        assert Limit(100, "requests", "minute", models="mimo-v2.6-pro") in mimo.limits
        assert all(upstream.fix.reasoning_content == "require" for upstream in mimo.upstreams)
        assert mimo.default_model == "mimo-v2.6-pro"
        assert mimo.simulated is None

    def test_a_known_one_can_be_reached_elsewhere(self, folder: Path) -> None:
        """One URL is that of chat; the rest of the preset stays."""
        text = '[providers.mimo]\nbase_url = "http://127.0.0.1:1/v1/"'
        mimo = load(folder, text).providers["mimo"]

        assert mimo.base_urls == {"chat": "http://127.0.0.1:1/v1"}
        assert mimo.default_model == "mimo-v2.6-pro"

    def test_each_dialect_can_have_its_url(self, folder: Path) -> None:
        """Where a server speaks several dialects, chat is the one requests are sent in."""
        urls = 'base_url = { messages = "http://h/anthropic/v1", chat = "http://h/${LAB_KEY}" }'
        lab = load(folder, f'[providers.lab]\nmodels = ["m"]\n{urls}').providers["lab"]

        assert lab.base_urls == {"chat": "http://h/la", "messages": "http://h/anthropic/v1"}
        assert lab.upstreams[0].dialect == "chat"

    def test_an_alias_is_as_good_as_the_name(self, folder: Path) -> None:
        """The user's name for it is the one in metrics and pins."""
        loaded = load(folder, "[providers.qwen]", {"DASHSCOPE_API_KEY": "k"})

        assert loaded.providers["qwen"].vendor == "dashscope"
        assert loaded.resolve("qwen/qwen3.8-max") is not None

    def test_two_accounts_at_one_vendor(self, folder: Path) -> None:
        """``preset`` says whose account a table of another name is."""
        text = '[providers.openrouter]\n[providers.spare]\npreset = "openrouter"\napi_key = "k2"'
        loaded = load(folder, text)

        assert loaded.providers["spare"].vendor == "openrouter"
        assert loaded.providers["spare"].keys == (Secret("k2"),)

    def test_a_pool_has_an_upstream_for_each_key(self, folder: Path) -> None:
        """And each of them is in the model's tier."""
        loaded = load(folder, LAB_MODEL + 'keys = ["a", "b"]')
        route = loaded.resolve("m")

        assert route is not None
        assert [(upstream.model, upstream.key) for upstream in route.tiers[0]] == [("m", 0), ("m", 1)]

    def test_a_server_of_ones_own_needs_no_key(self, folder: Path) -> None:
        """It has one that is empty, so that everything has a key."""
        lab = load(folder, LAB_MODEL).providers["lab"]

        assert lab.keys == (Secret(""),)
        assert not lab.upstreams[0].fix.developer_role

    def test_timeouts_are_the_provider_s_the_preset_s_or_the_default(self, folder: Path) -> None:
        """A local server may load its model first, so its preset is patient."""
        text = '[defaults]\nfirst_token_timeout = "9s"\n[providers.ollama]\nmodels = ["q"]\n' + LAB_MODEL
        loaded = load(folder, text + 'stall_timeout = "8s"\n[providers.b]\nbase_url = "http://h"\nmodels = ["m"]')

        assert loaded.providers["ollama"].first_token_timeout_s == 300
        assert loaded.providers["lab"].first_token_timeout_s == 9
        assert loaded.providers["lab"].stall_timeout_s == 8
        assert loaded.providers["b"].stall_timeout_s == 45

    def test_limits_of_the_user_replace_those_of_the_preset(self, folder: Path) -> None:
        """An empty list means that there are none."""
        text = '[providers.openrouter]\nlimits = [{ requests = 200, per = "day" }]\n[providers.mimo]\nlimits = []'
        loaded = load(folder, text)

        assert loaded.providers["openrouter"].limits == (Limit(200, "requests", "day"),)
        assert loaded.providers["mimo"].limits == ()

    def test_limits_in_dollars_need_prices(self, folder: Path) -> None:
        """Otherwise nothing would ever be counted, which is worth a word."""
        loaded = load(folder, LAB_MODEL + 'limits = [{ usd = 5, per = "month" }]')

        assert [problem.path for problem in loaded.warnings] == ["providers.lab.limits[0].usd"]

    def test_limits_go_by_the_names_of_the_provider(self, folder: Path) -> None:
        """One that goes by the public name would never count; one for models to come is fine."""
        text = LAB + 'models = { m = "their/m" }\nlimits = [{ requests = 1, per = "day", models = "%s" }]'

        assert load(folder, text % "their/*").providers["lab"].limits
        assert load(folder, text % "*:free").providers["lab"].limits
        assert problems(folder, text % "m") == [
            'providers.lab.limits[0].models: goes by the names this provider uses: "their/m", not "m"'
        ]

    @pytest.mark.parametrize(
        ("provider", "variable", "covered", "absent"),
        [
            ("openrouter", "OPENROUTER_API_KEY", "nemotron-3-ultra", "mimo-v2.6-pro"),
            ("gemini", "GEMINI_API_KEY", "gemini-3.5-flash-lite", "gemini-4-argon"),
            ("groq", "GROQ_API_KEY", "gpt-oss-120b", None),
            ("zai", "ZAI_API_KEY", "glm-4.7-flash", "glm-5.3"),
        ],
    )
    def test_a_free_tier_offers_what_it_covers_for_nothing(
        self, folder: Path, provider: str, variable: str, covered: str, absent: str | None
    ) -> None:
        """What would cost money is not on offer, and the default model is one that is free."""
        loaded = load(folder, f'[providers.{provider}]\ntier = "free"', {variable: "k"})

        assert loaded.providers[provider].default_model == covered
        assert loaded.models.count(covered) == 1
        assert absent not in loaded.models
        assert all(upstream.price.free for upstream in loaded.providers[provider].upstreams)
        assert loaded.providers[provider].limits

    def test_gemini_s_free_day_ends_at_midnight_on_the_pacific(self, folder: Path) -> None:
        """Each model has its own count."""
        limits = load(folder, '[providers.gemini]\ntier = "free"', {"GEMINI_API_KEY": "k"}).providers["gemini"].limits

        assert Limit(500, "requests", "day", "America/Los_Angeles", "gemini-3.5-flash-lite") in limits
        assert Limit(20, "requests", "day", "America/Los_Angeles", "gemini-3.8-flash") in limits

    def test_a_credit_keeps_its_prices(self, folder: Path) -> None:
        """They are what uses it up."""
        mistral = load(folder, '[providers.mistral]\ntier = "free"', {"MISTRAL_API_KEY": "k"}).providers["mistral"]

        assert Limit(10, "usd", "month", "UTC") in mistral.limits
        assert not any(upstream.price.free for upstream in mistral.upstreams)

    def test_a_vendor_without_a_free_tier_says_so(self, folder: Path) -> None:
        """What ended in 2026 is not applied silently."""
        assert problems(folder, '[providers.cerebras]\ntier = "free"', {"CEREBRAS_API_KEY": "k"}) == [
            "providers.cerebras.tier: Cerebras has no recurring free tier that is known here; use limits instead"
        ]

    def test_a_simulated_one_brings_its_model_and_follows_its_script(self, folder: Path) -> None:
        """Its answers have a price, so that costs can be seen."""
        text = '[providers.sim]\nsimulated = true\nfaults = ["503", "ok", "stall"]\nmodels = ["big-simulated"]'
        sim = load(folder, text).providers["sim"]

        assert sim.simulated == ("503", "ok", "stall")
        assert [upstream.model for upstream in sim.upstreams] == ["model-simulated", "big-simulated"]
        assert sim.upstreams[0].price.output > 0
        assert sim.upstreams[0].tools


class TestModels:
    def test_a_listed_one_takes_over_what_is_known_of_it(self, folder: Path) -> None:
        """Window and abilities from the catalog; at a server of one's own it costs nothing unless that is said."""
        lab = load(folder, LAB + 'models = ["xiaomi/mimo-v2.6-pro"]').providers["lab"]
        upstream = lab.upstreams[0]

        assert (upstream.model, upstream.wire_model) == ("mimo-v2.6-pro", "xiaomi/mimo-v2.6-pro")
        assert upstream.context_tokens == 1_048_576
        assert upstream.images
        assert upstream.price.free

    def test_a_listed_one_at_a_vendor_has_the_price_of_its_maker(self, folder: Path) -> None:
        """A vendor charges something, and that is the best guess."""
        mixroute = load(folder, '[providers.mixroute]\nmodels = ["kimi-k3"]', {"MIXROUTE_API_KEY": "k"}).providers[
            "mixroute"
        ]
        prices = {upstream.model: upstream.price for upstream in mixroute.upstreams}

        assert prices["kimi-k3"] == Price(3, 15, 0.3)

    def test_an_unknown_one_has_the_common_window(self, folder: Path) -> None:
        """Enough for an agent; a server with less should say so."""
        assert load(folder, LAB_MODEL).providers["lab"].upstreams[0].context_tokens == 131_072

    def test_what_is_written_changes_the_shipped_offer_and_nothing_else(self, folder: Path) -> None:
        """A new input price makes the shipped price of a cache hit obsolete."""
        text = '[providers.mimo.models]\n"mimo-v2.6-pro" = { input = 0.2, context = 100_000, tools = false }'
        upstream = load(folder, text).providers["mimo"].upstreams[0]

        assert upstream.price == Price(0.2, 0.87, None)
        assert upstream.context_tokens == 100_000
        assert not upstream.tools
        assert upstream.max_output_tokens == 131_072

    def test_a_word_instead_of_a_table_is_the_wire_name(self, folder: Path) -> None:
        """``mine = "their/name"`` is all an alias needs."""
        upstream = load(folder, LAB + 'models = { mine = "their/name" }').providers["lab"].upstreams[0]

        assert (upstream.model, upstream.wire_model) == ("mine", "their/name")

    @pytest.mark.parametrize(
        ("models", "expected"),
        [
            ("{ small = { context = 8_000 }, mute = { tools = false }, fit = {} }", "fit"),
            ("{ a = {}, b = {} }", "a"),
            ("{ small = { context = 8_000 } }", ""),
        ],
    )
    def test_the_default_is_the_first_that_suits_an_agent(self, folder: Path, models: str, expected: str) -> None:
        """With tools, and a window of 64,000 tokens or more."""
        assert load(folder, LAB + f"models = {models}").providers["lab"].default_model == expected

    def test_the_default_can_be_told_by_any_of_its_names(self, folder: Path) -> None:
        """It is kept under its public name."""
        text = '[providers.openrouter]\ndefault_model = "moonshotai/kimi-k2.6"'

        assert load(folder, text).providers["openrouter"].default_model == "kimi-k2.6"


class TestNames:
    @pytest.mark.parametrize(
        ("name", "route", "providers"),
        [
            ("auto", "auto", ["openrouter", "mimo", "lab"]),
            ("AUTO", "auto", ["openrouter", "mimo", "lab"]),
            ("mimo-v2.6-pro", "mimo-v2.6-pro", ["openrouter", "mimo", "lab"]),
            ("MiMo-V2.6-Pro", "mimo-v2.6-pro", ["openrouter", "mimo", "lab"]),
            ("xiaomi/mimo-v2.6-pro", "mimo-v2.6-pro", ["openrouter", "mimo", "lab"]),
            ("mimo/mimo-v2.6-pro", "mimo/mimo-v2.6-pro", ["mimo"]),
            ("openrouter/xiaomi/mimo-v2.6-pro", "openrouter/mimo-v2.6-pro", ["openrouter"]),
            ("openrouter/mimo-v2.6-pro", "openrouter/mimo-v2.6-pro", ["openrouter"]),
            ("gpt-oss-120b", "gpt-oss-120b", ["openrouter", "groq"]),
            ("openai/gpt-oss-120b", "gpt-oss-120b", ["openrouter", "groq"]),
            ("groq/openai/gpt-oss-120b", "groq/gpt-oss-120b", ["groq"]),
            ("deepseek-v4-flash", "deepseek-flash", ["openrouter"]),
            ("google/gemma-4-31b-it:free", "gemma-4-31b-it:free", ["openrouter"]),
        ],
    )
    def test_a_name_leads_to_a_route(self, folder: Path, name: str, route: str, providers: list[str]) -> None:
        """A route, a model, a model as others call it, or a model pinned to a provider."""
        found = load(folder, EXAMPLE).resolve(name)

        assert found is not None
        assert found.name == route
        assert providers_of(found.tiers[0]) == providers

    @pytest.mark.parametrize("name", ["", "gpt-2", "openrouter/some/new-model", "openrouter", "nobody/mimo-v2.6-pro"])
    def test_a_name_nobody_listed_leads_nowhere(self, folder: Path, name: str) -> None:
        """Pinning a provider does not make up a model."""
        assert load(folder, EXAMPLE).resolve(name) is None

    def test_a_pin_goes_before_a_vendor_of_the_same_name(self, folder: Path) -> None:
        """``deepseek/...`` is the provider where there is one, and else the vendor, whoever offers the model."""
        keys = {"OPENROUTER_API_KEY": "k", "DEEPSEEK_API_KEY": "k"}
        pinned = load(folder, "[providers.openrouter]\n[providers.deepseek]", keys).resolve("deepseek/deepseek-v4-pro")
        vendor = load(folder, "[providers.openrouter]", keys).resolve("deepseek/deepseek-v4-pro")

        assert pinned is not None
        assert vendor is not None
        assert providers_of(pinned.tiers[0]) == ["deepseek"]
        assert providers_of(vendor.tiers[0]) == ["openrouter"]

    def test_a_route_goes_before_a_model_of_the_same_name(self, folder: Path) -> None:
        """So a user can say how a well-known name is served."""
        text = '[providers.openrouter]\n[providers.mimo]\n[routes."mimo-v2.6-pro"]\nmodels = ["mimo/mimo-v2.6-pro"]'
        loaded = load(folder, text)
        found = loaded.resolve("mimo-v2.6-pro")

        assert found is not None
        assert providers_of(found.tiers[0]) == ["mimo"]
        assert loaded.names().count("mimo-v2.6-pro") == 1

    def test_a_variant_is_the_offer_itself(self, folder: Path) -> None:
        """Whoever asks for the free one does not get the one that costs."""
        keys = {"OPENCODE_API_KEY": "k", "MIMO_API_KEY": "k"}
        found = load(folder, "[providers.mimo]\n[providers.opencode-zen]", keys).resolve("mimo-v2.6-flash-free")

        assert found is not None
        assert providers_of(found.tiers[0]) == ["opencode-zen"]

    def test_the_nearest_names_are_suggested(self, folder: Path) -> None:
        """However a name is misspelt, and however long it is."""
        loaded = load(folder, EXAMPLE)

        assert "mimo-v2.6-pro" in loaded.near("mimo-2.6-pro")
        assert "openrouter/mimo-v2.6-pro" in loaded.near("Openrouter/mimo-v2.6-por")
        assert loaded.near("x" * 1_000_000) == []

    def test_the_list_has_routes_and_then_models(self, folder: Path) -> None:
        """Pinned names work but are not listed."""
        names = load(folder, EXAMPLE).names()

        assert names[:2] == ["auto", "mimo-v2.6-pro"]
        assert not [name for name in names if "/" in name]
        assert len(names) == len(set(names))


class TestRoutes:
    def test_auto_always_exists(self, folder: Path) -> None:
        """A tier for each provider's default model, in the order of the file."""
        loaded = load(folder, "[providers.groq]\n[providers.mimo]\n" + LAB_MODEL)

        assert [[repr(upstream) for upstream in tier] for tier in loaded.routes["auto"].tiers] == [
            ["<Upstream groq/gpt-oss-120b#0>"],
            ["<Upstream mimo/mimo-v2.6-pro#0>"],
            ["<Upstream lab/m#0>"],
        ]

    def test_auto_takes_what_there_is_if_nothing_suits_an_agent(self, folder: Path) -> None:
        """And says that Hermes will not start with it."""
        loaded = load(folder, LAB + "models = { small = { context = 8_000 } }")

        assert loaded.routes["auto"].context_tokens == 8_000
        assert "Hermes Agent needs 64000" in str(loaded.warnings[0])

    def test_an_upstream_stands_in_one_tier_only(self, folder: Path) -> None:
        """The first; a tier with nothing new in it disappears."""
        text = LAB + 'models = ["a", "b"]\n[routes.r]\nmodels = ["a", "lab/a", ["b", "a", "b"]]'
        tiers = load(folder, text).routes["r"].tiers

        assert [[upstream.model for upstream in tier] for tier in tiers] == [["a"], ["b"]]

    def test_a_route_says_how_it_differs(self, folder: Path) -> None:
        """What it leaves out is as in ``[defaults]``."""
        text = '[defaults]\nprefer = "cheap"\ndelivery = "whole"\n' + LAB_MODEL
        text += '[routes.a]\nmodels = ["m"]\n[routes.b]\nmodels = ["m"]\nprefer = "fast"\ndelivery = "live"\n'
        routes = load(folder, text).routes

        assert (routes["a"].value_of_time_usd_per_s, routes["a"].delivery) == (0.0, "whole")
        assert (routes["b"].value_of_time_usd_per_s, routes["b"].delivery) == (60 / 3600, "live")

    def test_its_window_is_the_smallest_of_its_first_tier(self, folder: Path) -> None:
        """An agent that fills it must fit wherever it is sent."""
        text = LAB + "models = { a = { context = 90_000, max_output = 9_000 }, b = { context = 80_000 }, c = {} }\n"
        route = load(folder, text + '[routes.r]\nmodels = [["a", "b"], "c"]').routes["r"]

        assert route.context_tokens == 80_000
        assert route.max_output_tokens == 9_000

    def test_hedging_that_costs_money_has_a_budget(self, folder: Path) -> None:
        """Without one it is not begun."""
        text = LAB_MODEL + '[routes.r]\nmodels = ["m"]\nhedge = "paid"\n'

        assert load(folder, text + 'hedge_budget = { usd = 1, per = "day" }').routes["r"].hedge_budget == Limit(
            1.0, "usd", "day"
        )
        assert "routes.r.hedge_budget: is missing" in problems(folder, text)[0]


# --- anything goes in, only a Config or a ConfigError comes out ------------------------------------------------------


def toml(value: object) -> str:
    """A value in TOML's inline notation."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if not isinstance(value, float) else repr(value)


WORDS = st.sampled_from(
    sorted({*re.findall("[a-z_]+", EXAMPLE), "hosts", "keys", "headers", "simulated", "faults", "preset"})
)
TEXTS = st.one_of(
    WORDS,
    st.sampled_from(["60s", "1m", "UTC", "day", "minute", "free", "chat", "127.0.0.1:1", "unix:/x", "http://h/v1"]),
    st.sampled_from(["${LAB_KEY}", "${}", "file:/", "credential:x", "mimo-v2.6-pro", "groq/gpt-oss-120b", "Europe"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | TEXTS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def spoilt_examples(draw: st.DrawFn) -> dict[str, Any]:
    """The example with some of its values replaced and some keys added."""
    document = tomllib.loads(EXAMPLE)
    for _ in range(draw(st.integers(1, 4))):
        place: Any = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else None
            deeper = key is not None and isinstance(place[key], (dict, list)) and draw(st.booleans())
            if not deeper:
                break
            place = place[key]
        if key is None or (isinstance(place, dict) and draw(st.booleans())):
            key = draw(WORDS | TEXTS) if isinstance(place, dict) else None
        if key is not None:
            place[key] = draw(VALUES)
    return document


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(document=st.one_of(spoilt_examples(), st.dictionaries(WORDS, VALUES, max_size=4)))
def test_whatever_stands_in_the_file_it_is_a_config_or_a_list_of_problems(
    folder: Path, document: dict[str, Any]
) -> None:
    """Nothing else is ever raised, and every problem has words."""
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in document.items())
    found = outcome(folder, text)

    if isinstance(found, Config):
        assert all(route.tiers and all(route.tiers) for route in found.table.values())
    else:
        assert found.problems
        assert all(isinstance(problem, Problem) and problem.message for problem in found.problems)


def outcome(folder: Path, text: str) -> Config | ConfigError:
    try:
        return load(folder, text)
    except ConfigError as error:
        return error
