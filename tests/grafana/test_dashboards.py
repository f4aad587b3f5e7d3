"""The dashboards in the repository are what the code writes, and what Grafana takes."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from grafana import build
from routerd.telemetry import Telemetry
from tests.grafana import boards

# What the dashboard model leaves to the data source, or to the editor alone.
LEFT_TO_PLUGINS = re.compile(
    r"\.annotations\.list\[\d+\]\.(step|target|titleFormat|textFormat|tagKeys)|\.templating\.list\[\d+\]\.definition"
)
# Grafana's own vocabulary for overrides: https://grafana.com/docs/grafana/latest/panels-visualizations/
OVERRIDES = {"unit", "decimals", "min", "max", "color", "thresholds", "custom.cellOptions", "custom.stacking"}
UNITS = {"short", "s", "percentunit", "currencyUSD", "bytes", "dateTimeFromNow"}
SECONDS = re.compile(r"_seconds(_bucket|_sum)?\b")


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """The names of all series the daemon can export."""
    kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",), "gauge": ("",)}
    families = list(Telemetry(io.BytesIO()).registry.collect())
    return {family.name + suffix for family in families for suffix in kinds[family.type]}


def test_files_are_what_the_code_writes() -> None:
    """``python -m grafana.build`` would change nothing."""
    written = {path: path.read_text(encoding="utf-8") for path in boards.DASHBOARDS.iterdir()}

    assert build.files() == written


def test_survives_grafanas_own_model() -> None:
    """Every key is one that Grafana's models know: they read a dashboard and write it again without losing any."""
    model, plugins, encoder = (
        pytest.importorskip(f"grafana_foundation_sdk.{name}", reason="grafana-foundation-sdk is not installed")
        for name in ("models.dashboard", "cog.plugins", "cog.encoder")
    )
    plugins.register_default_plugins()
    lost = []
    for dashboard in boards.dashboards().values():
        again = json.loads(encoder.JSONEncoder().encode(model.Dashboard.from_json(dashboard)))
        lost += [path for path in _missing(dashboard, again) if not LEFT_TO_PLUGINS.match(path)]

    assert lost == []


def _missing(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where something of ``before`` is not in ``after``."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from _missing(value, after[key], f"{path}.{key}") if key in after else [f"{path}.{key}"]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _missing(one, other, f"{path}[{place}]")
    elif before != after:
        yield path


@pytest.mark.parametrize("name", boards.dashboards())
def test_grid(name: str) -> None:
    """Panels fill rows of 24 columns, none over another, and are numbered apart."""
    panels = boards.dashboards()[name]["panels"]
    taken = [cell for panel in panels for cell in _cells(panel["gridPos"])]

    assert len(set(taken)) == len(taken)
    assert len(taken) % 24 == 0
    assert max(column for column, _ in taken) == 23
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)


def _cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    columns = range(place["x"], place["x"] + place["w"])
    rows = range(place["y"], place["y"] + place["h"])
    return itertools.product(columns, rows)


@pytest.mark.parametrize("name", boards.panels())
def test_panel(name: str) -> None:
    """Each panel explains itself, asks the chosen data source, and has a unit that fits what it asks for."""
    panel = boards.panels()[name]
    defaults = panel["fieldConfig"]["defaults"]
    overrides = [change for one in panel["fieldConfig"]["overrides"] for change in one["properties"]]
    units = {defaults["unit"]} | {change["value"] for change in overrides if change["id"] == "unit"}

    assert panel["description"].endswith(".")
    assert {one["datasource"]["uid"] for one in [panel, *panel["targets"]]} == {"${datasource}"}
    assert units <= UNITS
    assert {change["id"] for change in overrides} <= OVERRIDES
    _check_unit(panel, defaults["unit"])


def _check_unit(panel: Any, unit: str) -> None:
    exprs = [one["expr"] for one in panel["targets"]]
    if panel["type"] in ("table", "state-timeline", "heatmap"):
        return
    if all("usd" in expr for expr in exprs):
        assert unit == "currencyUSD"
    elif all(SECONDS.search(expr) and "/" not in expr.split("_interval")[0] for expr in exprs):
        assert unit in ("s", "percentunit")


def test_names_only_what_is_exported(exported: set[str]) -> None:
    """No query, variable or annotation names a metric that does not exist."""
    exprs = [query.expr for where, panel in boards.panels().items() for query in boards.queries(panel, where)]
    exprs += [*boards.annotation_counts().values(), *(series for series, _ in boards.variables().values())]
    named = set().union(*(boards.metrics_in(expr) for expr in exprs))

    assert named <= exported
    assert len(named) > 30


def test_shows_all_that_routerd_counts(exported: set[str]) -> None:
    """Every metric of routerd's own stands on some panel or in some alert's rule."""
    texts = [query.expr for where, panel in boards.panels().items() for query in boards.queries(panel, where)]
    texts.append(boards.RULES.read_text())
    shown = {_family(metric) for text in texts for metric in boards.metrics_in(text)}

    assert {_family(name) for name in exported if name.startswith(("routerd_", "gen_ai_"))} - shown == set()


def _family(series: str) -> str:
    return re.sub(r"_(total|bucket|sum|count)$", "", series)


@pytest.mark.parametrize("name", boards.dashboards())
def test_frame(name: str) -> None:
    """A dashboard can be provisioned as it is: own uid, data source as a variable, choices that begin with all."""
    dashboard = boards.dashboards()[name]
    first, *others = dashboard["templating"]["list"]

    assert dashboard["uid"] == f"routerd-{name}"
    assert "id" not in dashboard
    assert "__inputs" not in dashboard
    assert (first["type"], first["query"]) == ("datasource", "prometheus")
    assert all(one["includeAll"] and one["allValue"] == ".*" and one["multi"] for one in others)
    assert {one["name"] for one in dashboard["annotations"]["list"]} == {"Breakers", "Config reloads", "Restarts"}


def test_variables_are_those_the_queries_use() -> None:
    """Every variable of a dashboard is used there, and every one used is there."""
    for dashboard in boards.dashboards().values():
        exprs = " ".join(one["expr"] for panel in dashboard["panels"] for one in panel["targets"])
        used = set(re.findall(r"\$(\w+)", exprs)) - {"__rate_interval", "__range"}

        assert {one["name"] for one in dashboard["templating"]["list"]} == used | {"datasource"}


def test_provisioning_files() -> None:
    """The provisioning files are valid YAML of the right kind, and the names in them agree with the sample config."""
    sources = yaml.safe_load((boards.FOLDER / "provisioning/datasources/prometheus.yaml").read_text())
    providers = yaml.safe_load((boards.FOLDER / "provisioning/dashboards/routerd.yaml").read_text())
    sample = yaml.safe_load((boards.FOLDER / "prometheus/prometheus.yml").read_text())

    assert sources["apiVersion"] == providers["apiVersion"] == 1
    assert sources["datasources"][0]["type"] == "prometheus"
    assert sources["datasources"][0]["jsonData"]["timeInterval"] == sample["global"]["scrape_interval"]
    assert providers["providers"][0]["options"]["path"] in (boards.FOLDER / "README.md").read_text()
    assert sample["rule_files"] == [boards.RULES.name]
