"""The dashboards as Grafana reads them: their panels, and every query in them with its variables filled in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import grafana

FOLDER = Path(grafana.__file__).parent
DASHBOARDS = FOLDER / "dashboards"
RULES = FOLDER / "prometheus" / "rules.yml"
METRIC = re.compile(r"\b(?:routerd|gen_ai|process)_[a-z_]+\b(?=\{|\[|\)| |$)")
GROUPING = re.compile(r"\b(by|on|group_left|without) ?\([^)]*\)")
VARIABLES = {
    "$__rate_interval": "5s",
    "$__range": "60s",
    "$route": ".*",
    "$provider": ".*",
    "$model": ".*",
}
LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), (?P<label>\w+)\)")


class Query(NamedTuple):
    """An expression, ready to be run. ``where`` names dashboard, panel and column; ``instant``: at one moment."""

    where: str
    expr: str
    instant: bool


def dashboards() -> dict[str, Any]:
    """The files by their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels() -> dict[str, Any]:
    """Every panel, by the name it has in a message."""
    return {f"{name}: {panel['title']}": panel for name, board in dashboards().items() for panel in board["panels"]}


def queries(panel: Any, where: str = "") -> list[Query]:
    return [Query(f"{where} {one['refId']}", filled(one["expr"]), one["instant"]) for one in panel["targets"]]


def annotation_counts() -> dict[str, str]:
    """The count behind each annotation; Grafana marks where it is above zero."""
    found = (one for dashboard in dashboards().values() for one in dashboard["annotations"]["list"])
    return {one["name"]: filled(one["expr"]).removesuffix(" > 0") for one in found}


def variables() -> dict[str, tuple[str, str]]:
    """Name -> series and label of each variable that asks Prometheus."""
    found = (one for dashboard in dashboards().values() for one in dashboard["templating"]["list"])
    return {one["name"]: _label_values(one["query"]["query"]) for one in found if one["type"] == "query"}


def _label_values(text: str) -> tuple[str, str]:
    match = LABEL_VALUES.fullmatch(filled(text))
    assert match is not None, text
    return match["series"], match["label"]


def filled(expr: str) -> str:
    """With the variables as they are at first: everything, and a range of a minute."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


def metrics_in(expr: str) -> set[str]:
    """The daemon's metrics that an expression names."""
    return set(METRIC.findall(GROUPING.sub("", expr)))
