"""The words the dashboards are written in: queries, kinds of panels, and the frame around them.

Theory of operation
-------------------
A dashboard is a list of rows, a row a list of panels that share a height, and a panel a dict as Grafana stores it, made
by a function per kind (``stat``, ``lines``, ``bars``, ``table`` ...). ``dashboard`` flows the rows into the grid of 24
columns, numbers the panels, and adds what all dashboards share: the choice of a data source, annotations, links.
Queries are given as a mapping from a legend (or a table's heading) to an expression.

Rules the queries follow
------------------------
* Only what the daemon exports itself: no recording rule has to be installed.
* Events are counted as ``increase(...[$__rate_interval])``, whose windows overlap by just one scrape, in steps of at
  least five minutes: so a single failover in a quiet night is one bar and does not fall between two windows.
* A count that may have no series yet says so in words (``rows_or_nothing``); a gauge that is not there (no quota set)
  stays empty and the panel names the reason, for a 0 would be a lie.
* ``process_*`` is exported by half the world, so it is narrowed to processes that export ``routerd_build_info`` too.

What is ugly: Grafana's table wants one query per column, and names the columns after the queries' letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Json = dict[str, Any]
Queries = Mapping[str, str]  # legend or heading -> expression
Row = tuple[int, Iterable[Json]]  # height, panels

SCHEMA_VERSION = 39  # Grafana 10.4's; every later one migrates it on loading
COLUMNS = 24
TAG = "routerd"
DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
EVENTS_STEP = "5m"
GAP_BRIDGED_MS = 3_600_000  # agents pause: points this close are joined by a line

GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "text"
NEUTRAL = ((BLUE, None),)  # thresholds of a number that is neither good nor bad

OURS = "on (job, instance) group_left (version) routerd_build_info"
IN_USE = "and on (provider, model) routerd_attempts_total"  # a catalog offers a hundred models; few are asked


# --- queries --------------------------------------------------------------------------------------------------------


def increase(metric: str, by: str = "", window: str = "$__rate_interval") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (increase({metric}[{window}]))"


def over_range(metric: str, by: str = "") -> str:
    """How many in the time shown; whole numbers, for ``increase`` extrapolates."""
    return f"round({increase(metric, by, '$__range')})"


def quantile(share: float, histogram: str, selector: str = "", by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({histogram}_bucket{{{selector}}}[$__rate_interval])))"


def ratio(part: str, whole: str) -> str:
    """A share, empty where there is nothing to share."""
    return f"{part} / ({whole} > 0)"


def rows_or_nothing(expr: str, label: str) -> str:
    """The rows above zero; failing that, one that says there are none."""
    return f'({expr} > 0) or on () label_replace(vector(0), "{label}", "none so far", "", "")'


def _targets(queries: Queries, form: str = "time_series", *, instant: bool = False) -> list[Json]:
    return [
        {
            "refId": chr(ord("A") + place),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": expr,
            "legendFormat": legend,
            "format": form,
            "instant": instant,
            "range": not instant,
        }
        for place, (legend, expr) in enumerate(queries.items())
    ]


# --- panels ---------------------------------------------------------------------------------------------------------


def _panel(width: int, kind: str, title: str, description: str, targets: list[Json], **rest: Any) -> Json:
    """What all panels have; ``dashboard`` adds the id and the place."""
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"w": width},
        "targets": targets,
        **rest,
    }


def _fields(
    unit: str,
    *,
    steps: Sequence[tuple[str, float | None]] = ((GREEN, None),),
    color: str = "thresholds",
    no_value: str = "",
    custom: Json | None = None,
    overrides: Sequence[Json] = (),
    **more: Any,
) -> Json:
    """``fieldConfig``: unit, thresholds, colours, and the words for where there is nothing."""
    defaults: Json = {"unit": unit, "color": {"mode": color}, "thresholds": _thresholds(steps), **more}
    if no_value:
        defaults["noValue"] = no_value
    if custom is not None:
        defaults["custom"] = custom
    return {"defaults": defaults, "overrides": list(overrides)}


def _thresholds(steps: Sequence[tuple[str, float | None]]) -> Json:
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}


def override(name: str, **properties: Any) -> Json:
    """Properties of one field, named as shown. ``custom.x`` is written ``custom__x``."""
    settings = [{"id": key.replace("__", "."), "value": value} for key, value in properties.items()]
    return {"matcher": {"id": "byName", "options": name}, "properties": settings}


def fixed(name: str, color: str) -> Json:
    return override(name, color={"mode": "fixed", "fixedColor": color})


def stat(width: int, title: str, description: str, expr: str, unit: str, *, time: str = "", **fields: Any) -> Json:
    """One number. ``time`` replaces the dashboard's range: ``now/d`` is the day so far."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "auto",
        "textMode": "value",
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
    }
    targets = _targets({"__auto": expr}, instant=True)
    placed = {"timeFrom": time} if time else {}
    return _panel(
        width, "stat", title, description, targets, options=options, fieldConfig=_fields(unit, **fields), **placed
    )


def _over_time(
    width: int, title: str, description: str, queries: Queries, unit: str, *, step: str, legend: Json, **fields: Any
) -> Json:
    options = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    config = _fields(unit, color="palette-classic", **{"min": 0, **fields})
    placed = {"interval": step} if step else {}
    return _panel(
        width, "timeseries", title, description, _targets(queries), options=options, fieldConfig=config, **placed
    )


_PLAIN_LEGEND: Json = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
_TOTALS_LEGEND: Json = {**_PLAIN_LEGEND, "displayMode": "table", "calcs": ["sum"], "sortBy": "Total", "sortDesc": True}


def lines(width: int, title: str, description: str, queries: Queries, unit: str, **fields: Any) -> Json:
    """Rates and quantiles over time."""
    custom = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": 8,
        "showPoints": "auto",
        "spanNulls": GAP_BRIDGED_MS,
    }
    settings = {"step": EVENTS_STEP, "legend": _PLAIN_LEGEND, "custom": custom, **fields}
    return _over_time(width, title, description, queries, unit, **settings)


def levels(width: int, title: str, description: str, queries: Queries, unit: str, **fields: Any) -> Json:
    """Gauges, which jump."""
    custom = {
        "drawStyle": "line",
        "lineInterpolation": "stepAfter",
        "lineWidth": 1,
        "fillOpacity": 8,
        "showPoints": "never",
    }
    settings = {"step": "", "legend": _PLAIN_LEGEND, "custom": custom, **fields}
    return _over_time(width, title, description, queries, unit, **settings)


def bars(width: int, title: str, description: str, queries: Queries, unit: str, **fields: Any) -> Json:
    """Events counted per step, on top of each other."""
    stacking = {"mode": "normal", "group": "A"}
    custom = {"drawStyle": "bars", "barAlignment": -1, "lineWidth": 0, "fillOpacity": 80, "stacking": stacking}
    settings = {"step": EVENTS_STEP, "legend": _TOTALS_LEGEND, "custom": custom, **fields}
    return _over_time(width, title, description, queries, unit, **settings)


def table(
    width: int,
    title: str,
    description: str,
    columns: Queries,
    *,
    labels: Mapping[str, str],
    sort: str,
    descending: bool = False,
    hidden: Sequence[str] = (),
    **fields: Any,
) -> Json:
    """A row for each set of labels, a column for each query. ``labels``: label -> heading, in order."""
    several = len(columns) > 1
    letters = [f"Value #{chr(ord('A') + place)}" if several else "Value" for place in range(len(columns))]
    headings = {**labels, **dict(zip(letters, columns, strict=True))}
    organize = {
        "excludeByName": dict.fromkeys(("Time", *hidden), True),
        "indexByName": {name: place for place, name in enumerate(headings)},
        "renameByName": headings,
    }
    return _panel(
        width,
        "table",
        title,
        description,
        _targets(columns, "table", instant=True),
        options={"showHeader": True, "cellHeight": "sm", "sortBy": [{"displayName": sort, "desc": descending}]},
        fieldConfig=_fields("short", custom={"align": "auto"}, **fields),
        transformations=[{"id": "merge", "options": {}}, {"id": "organize", "options": organize}],
    )


def counts(width: int, title: str, description: str, counter: str, labels: Mapping[str, str]) -> Json:
    """How often what happened in the time shown, the most frequent first; the last label says "none so far"."""
    *_, last = labels
    expr = rows_or_nothing(over_range(counter, ", ".join(labels)), last)
    times = override("Times", decimals=0)
    return table(
        width, title, description, {"Times": expr}, labels=labels, sort="Times", descending=True, overrides=[times]
    )


def remaining(
    width: int, title: str, description: str, unit: str, columns: Queries, labels: Mapping[str, str], **rest: Any
) -> Json:
    """A table of what is left of something. ``columns``: left, size, and when it is whole again (Unix seconds)."""
    left, size, reset = columns.values()
    headings = {"Left %": ratio(left, size), "Left": left, "Of": size, "Whole again": f"{reset} * 1000"}
    bar = {"type": "gauge", "mode": "basic", "valueDisplayMode": "text"}
    steps = _thresholds(((RED, None), (ORANGE, 0.1), (GREEN, 0.25)))
    overrides = [
        override("Left %", unit="percentunit", min=0, max=1, thresholds=steps, custom__cellOptions=bar),
        override("Left", unit=unit),
        override("Of", unit=unit),
        override("Whole again", unit="dateTimeFromNow"),
    ]
    return table(width, title, description, headings, labels=labels, sort="Left %", overrides=overrides, **rest)


def timeline(width: int, title: str, description: str, queries: Queries, states: Sequence[tuple[str, str]]) -> Json:
    """States over time. ``states``: name and colour of the values 0, 1, 2 ..."""
    mapping = {str(at): {"text": text, "color": color, "index": at} for at, (text, color) in enumerate(states)}
    options = {
        "showValue": "never",
        "mergeValues": True,
        "rowHeight": 0.8,
        "alignValue": "left",
        "legend": _PLAIN_LEGEND,
        "tooltip": {"mode": "single", "sort": "none"},
    }
    config = _fields(
        "short", custom={"fillOpacity": 70, "lineWidth": 0}, mappings=[{"type": "value", "options": mapping}]
    )
    return _panel(width, "state-timeline", title, description, _targets(queries), options=options, fieldConfig=config)


def heatmap(width: int, title: str, description: str, buckets: str, unit: str, no_value: str) -> Json:
    """A histogram over time. ``buckets``: the selector of its ``_bucket`` series."""
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 32, "exponent": 0.5, "reverse": False},
        "filterValues": {"le": 1e-9},
        "yAxis": {"axisPlacement": "left", "unit": unit},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": False},
        "legend": {"show": True},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
    }
    targets = _targets({"{{le}}": increase(buckets, "le")}, "heatmap")
    config = _fields("short", no_value=no_value)
    return _panel(
        width, "heatmap", title, description, targets, interval=EVENTS_STEP, options=options, fieldConfig=config
    )


# --- the frame ------------------------------------------------------------------------------------------------------


def dashboard(name: str, title: str, description: str, variables: Sequence[Json], rows: Iterable[Row]) -> Json:
    return {
        "uid": f"routerd-{name}",
        "title": f"routerd: {title}",
        "description": description,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": "now-24h", "to": "now"},
        "refresh": "1m",
        "links": [_LINKS],
        "annotations": {"list": list(_annotations())},
        "templating": {"list": [_DATASOURCE_VARIABLE, *variables]},
        "panels": list(_placed(rows)),
    }


def _placed(rows: Iterable[Row]) -> Iterator[Json]:
    top, number = 0, 0
    for height, row in rows:
        left = 0
        for panel in row:
            number += 1
            width = panel["gridPos"]["w"]
            yield {"id": number, **panel, "gridPos": {"h": height, "w": width, "x": left, "y": top}}
            left += width
        if left != COLUMNS:
            raise ValueError(f"the row at {top} is {left} columns wide, not {COLUMNS}")
        top += height


_LINKS: Json = {
    "title": "routerd",
    "type": "dashboards",
    "tags": [TAG],
    "asDropdown": False,
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "icon": "external link",
    "tooltip": "",
    "url": "",
}


def _annotations() -> Iterator[Json]:
    moved = increase("routerd_breaker_transitions_total", "provider, model, to")
    yield _annotation("Breakers", RED, moved, "{{provider}} {{model}}: {{to}}", "provider,model,to")
    reloads = increase("routerd_config_reloads_total", "instance, result")
    yield _annotation("Config reloads", BLUE, reloads, "config reload: {{result}}", "instance,result")
    restarts = f"sum by (instance) (changes(process_start_time_seconds[$__rate_interval]) * {OURS})"
    yield _annotation("Restarts", YELLOW, restarts, "routerd was restarted", "instance")


def _annotation(name: str, color: str, counted: str, title: str, tags: str) -> Json:
    """The query stands twice: as the editor saves it (``target``), and as it used to be saved (``expr``, ``step``)."""
    expr = f"{counted} > 0"
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": color,
        "expr": expr,
        "step": "1m",
        "target": {
            "refId": "Anno",
            "editorMode": "code",
            "expr": expr,
            "interval": "1m",
            "instant": False,
            "range": True,
        },
        "titleFormat": title,
        "textFormat": "",
        "tagKeys": tags,
    }


_DATASOURCE_VARIABLE: Json = {
    "name": "datasource",
    "label": "Prometheus",
    "type": "datasource",
    "query": "prometheus",
    "current": {},
    "hide": 0,
    "includeAll": False,
    "multi": False,
    "options": [],
    "refresh": 1,
    "regex": "",
    "skipUrlSync": False,
}


def _variable(name: str, label: str, expr: str) -> Json:
    """A choice of several, all at first. ``.*`` stands for all, so that what comes later is shown too."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": expr,
        "query": {"query": expr, "refId": f"variable-{name}"},
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "allValue": ".*",
        "includeAll": True,
        "multi": True,
        "hide": 0,
        "options": [],
        "refresh": 2,
        "regex": "",
        "skipUrlSync": False,
        "sort": 1,
    }


ROUTES = _variable("route", "Route", "label_values(routerd_exchanges_total, route)")
PROVIDERS = _variable("provider", "Provider", "label_values(routerd_breaker_state, provider)")
MODELS = _variable("model", "Model", 'label_values(routerd_attempts_total{provider=~"$provider"}, model)')

ROUTE = 'route=~"$route"'
SCOPE = 'scope=~"$route"'
PROVIDER = 'provider=~"$provider"'
UPSTREAM = 'provider=~"$provider",model=~"$model"'
GEN_AI = 'gen_ai_provider_name=~"$provider",gen_ai_request_model=~"$model"'


# --- panels that stand on more than one dashboard -------------------------------------------------------------------


def spent_today(width: int) -> Json:
    return stat(
        width,
        "Spent today",
        "Dollars since midnight in the browser's time zone, over all providers.",
        increase("routerd_cost_usd_total", window="$__range"),
        "currencyUSD",
        time="now/d",
        decimals=2,
        steps=NEUTRAL,
    )


def quotas(width: int, selector: str) -> Json:
    return remaining(
        width,
        "Quotas: what is left, and until when",
        "Each limit of each provider, configured or learned from its headers. The keys of a pool are added up.",
        "short",
        {
            "left": f"min by (provider, limit) (routerd_quota_remaining{{{selector}}})",
            "size": f"max by (provider, limit) (routerd_quota_limit{{{selector}}})",
            "reset": f"max by (provider, limit) (routerd_quota_reset_timestamp_seconds{{{selector}}})",
        },
        {"provider": "Provider", "limit": "Limit"},
        no_value="No quota is configured, and none has been learned from a provider's headers",
    )


def budgets(width: int) -> Json:
    return remaining(
        width,
        "Budgets: what is left, and until when",
        "Routes with a budget. Once it is spent, requests for the route wait for its reset, or are refused. "
        "What ends in :hedge is for second requests against a slow first one; once it is spent there are none.",
        "currencyUSD",
        {
            "left": f"min by (scope) (routerd_budget_remaining_usd{{{SCOPE}}})",
            "size": f"max by (scope) (routerd_budget_limit_usd{{{SCOPE}}})",
            "reset": f"max by (scope) (routerd_budget_reset_timestamp_seconds{{{SCOPE}}})",
        },
        {"scope": "Route"},
        no_value='No route has a budget; set one with budget = { usd = 3.0, per = "day" }',
    )


def failovers(width: int) -> Json:
    return counts(
        width,
        "Failovers: from whom, to whom, and why",
        "Attempts that were handed on to another provider in the time shown.",
        "routerd_failovers_total",
        {"from_provider": "From", "to_provider": "To", "outcome": "Because it was"},
    )
