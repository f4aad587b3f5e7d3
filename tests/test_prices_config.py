# ruff: noqa: E501 -- a message stands here in one line, as it is printed
"""What ``[prices]`` may say, what becomes of it, and what is answered to mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from routerd import cli, config
from routerd.__main__ import main
from routerd.config import Config, ConfigError, Prices

PROVIDER = '[providers.openrouter]\napi_key = "key"\n'
LIST, TREE = "https://openrouter.ai/api/v1/models", "https://models.dev/api.json"


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "routerd.toml"
    path.write_text(text)
    return config.load(path, {"HOME": str(tmp_path)})


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("table", "prices"),
    [
        ("", Prices(None, {"openrouter": LIST, "models.dev": TREE})),
        ('refresh = "24h"', Prices(86400.0, {"openrouter": LIST, "models.dev": TREE})),
        ('refresh = "1h"\nsources = ["models.dev", "models.dev"]', Prices(3600.0, {"models.dev": TREE})),
        (
            'refresh = "2d"\nsources = ["openrouter"]\nurls = { openrouter = "https://mirror.lan/prices.json" }',
            Prices(172800.0, {"openrouter": "https://mirror.lan/prices.json"}),
        ),
    ],
)
def test_prices(table: str, prices: Prices, tmp_path: Path) -> None:
    """Off without a refresh time; both sources and their own addresses unless told otherwise."""
    loaded = load(tmp_path, f'{PROVIDER}[providers.groq]\napi_key = "key"\n[prices]\n{table}\n')

    assert loaded.prices == prices
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('refresh = "10m"', "prices.refresh: must be from 3600s to 2.592e+06s"),
        ("refresh = 24", 'prices.refresh: needs a unit, one of ms, s, m, h, d, in quotes: "60s"'),
        ('refresh = "1h"\nsources = []', "prices.sources: is empty; leave refresh out if no prices are to be fetched"),
        (
            'refresh = "1h"\nsources = ["openruter"]',
            'prices.sources[0]: "openruter" is none of openrouter, models.dev; did you mean "openrouter"?',
        ),
        ('refesh = "1h"', 'prices.refesh: unknown key; did you mean "refresh"?'),
        (
            'refresh = "1h"\nurls = { models = "http://a.lan/x" }',
            'prices.urls.models: unknown key; did you mean "models.dev"?',
        ),
        (
            'refresh = "1h"\nurls = { openrouter = "ftp://a" }',
            'prices.urls.openrouter: is no URL with a host; write it like "https://api.example.com/v1"',
        ),
    ],
)
def test_mistakes(table: str, message: str, tmp_path: Path) -> None:
    """Each is told with its place and what to do about it."""
    assert problems(tmp_path, f"{PROVIDER}[prices]\n{table}\n") == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f'{PROVIDER}[prices]\nsources = ["openrouter"]\n',
            'prices.refresh: is missing, so no prices are fetched; write refresh = "24h"',
        ),
        (
            f'{PROVIDER}[prices]\nrefresh = "1h"\nsources = ["openrouter"]\nurls = {{ "models.dev" = "http://a.lan/x" }}\n',
            'prices.urls."models.dev": is not used: sources leaves it out',
        ),
        (
            f'{PROVIDER}[prices]\nrefresh = "1h"\nsources = ["models.dev"]\n',
            "prices.refresh: fetches nothing: these sources have no prices of any provider that is configured",
        ),
    ],
)
def test_what_has_no_effect_is_said(text: str, message: str, tmp_path: Path) -> None:
    """It is no mistake, and surely not what was meant."""
    assert [str(warning) for warning in load(tmp_path, text).warnings] == [message]


def test_whose_prices_they_are(tmp_path: Path) -> None:
    """A price in the config is the user's, and a free tier's is none; all others are the catalog's, to be refreshed."""
    loaded = load(
        tmp_path,
        f"""{PROVIDER}
[providers.openrouter.models]
"kimi-k3" = {{ input = 1, output = 2 }}
"glm-5.3" = {{ context = 100_000 }}
[providers.groq]
api_key = "key"
tier = "free"
[providers.mine]
preset = "mimo"
api_key = "key"
models = ["mimo-v2.6-pro"]
""",
    )
    listed, free, mine = loaded.providers.values()

    assert "moonshotai/kimi-k3" not in listed.list_priced
    assert {"z-ai/glm-5.3", "z-ai/glm-5.2"} <= listed.list_priced
    assert "z-ai/glm-5.2" in listed.rostered
    assert listed.rostered.isdisjoint({"moonshotai/kimi-k3", "z-ai/glm-5.3"})
    assert free.list_priced == frozenset()
    assert mine.preset == "mimo"
    assert mine.rostered == {"mimo-v2.6-flash", "mimo-v2.6-pro-ultraspeed"}


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``routerd check`` accepts the table and refuses mistakes in it, without asking anybody."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "routerd.toml"
    path.write_text(f'{PROVIDER}[prices]\nrefresh = "24h"\n')
    assert main(["check", "--config", str(path)]) == cli.EXIT_FINE
    path.write_text(f'{PROVIDER}[prices]\nrefresh = "24 hours"\n')
    assert main(["check", "--config", str(path)]) == cli.EXIT_WRONG
    assert "prices.refresh" in capsys.readouterr().err
