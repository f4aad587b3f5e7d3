"""Every alert fires where it should and not where it should not, and says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.grafana import boards

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
README = (boards.FOLDER / "README.md").read_text()


def _alerts() -> dict[str, Any]:
    groups = yaml.safe_load(boards.RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def _promtool(*arguments: str, stdin: str = "") -> tuple[int, str]:
    done = subprocess.run(
        [PROMTOOL or "", *arguments], cwd=boards.RULES.parent, input=stdin, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", _alerts())
def test_alert(name: str) -> None:
    """An alert says how bad it is, what happened, and where to read what to do."""
    alert = _alerts()[name]
    notes = alert["annotations"]

    assert name.startswith("Routerd")
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(notes) == {"summary", "description", "runbook"}
    assert notes["description"].endswith(".")
    assert notes["runbook"] == f"grafana/README.md#{name.lower()}"
    assert re.search(rf"^### {name}$", README, re.MULTILINE)


def test_readme_speaks_of_no_alert_that_is_gone() -> None:
    """The README's list of alerts is the rules' list, in the same order."""
    assert re.findall(r"^### (Routerd\w+)$", README, re.MULTILINE) == list(_alerts())


def test_each_alert_is_tested_both_ways() -> None:
    """The unit tests hold a case for each alert where it fires, and one where it does not."""
    cases = yaml.safe_load((boards.RULES.parent / "rules.test.yml").read_text())["tests"]
    tested = [one for case in cases for one in case.get("alert_rule_test", ())]

    assert {one["alertname"] for one in tested if one["exp_alerts"]} == set(_alerts())
    assert {one["alertname"] for one in tested if not one["exp_alerts"]} == set(_alerts())


@pytest.mark.real
@needs_promtool
def test_rules_and_sample_config_are_valid() -> None:
    """Prometheus takes the rules, and the sample config that loads them."""
    assert _promtool("check", "rules", boards.RULES.name)[0] == 0
    assert _promtool("check", "config", "prometheus.yml")[0] == 0


@pytest.mark.real
@needs_promtool
def test_alerts_fire() -> None:
    """The unit tests of the rules pass."""
    code, said = _promtool("test", "rules", "rules.test.yml")

    assert code == 0, said
