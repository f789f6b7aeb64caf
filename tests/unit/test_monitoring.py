"""The alerts and the dashboard are about numbers that there are.

``make check-metrics`` has promtool check their syntax, and run the tests of the alerts.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.tools.metrics import RULES_TEST, alerts, expressions, names, panels, text


@pytest.fixture
async def told() -> set[str]:
    """The names of all samples that a daemon tells."""
    families = text_string_to_metric_families(await text())
    return {sample.name for family in families for sample in family.samples}


async def test_alerts_and_panels_ask_for_what_is_told(told: set[str]) -> None:
    asked = {name for expr in expressions() for name in names(expr)}
    asked |= {name for alert in alerts() for name in names(alert["expr"])}
    assert len(asked) > 30
    assert asked - told == set()


async def test_the_alerts_tests_are_about_what_is_told(told: set[str]) -> None:
    tests = yaml.safe_load(RULES_TEST.read_text())["tests"]
    series = {
        name for test in tests for each in test["input_series"] for name in names(each["series"])
    }
    assert series - told == set()


def test_each_alert_is_tested_and_says_what_to_do() -> None:
    tests = yaml.safe_load(RULES_TEST.read_text())["tests"]
    tested: dict[str, set[bool]] = {}
    for test in tests:
        for each in test["promql_expr_test"]:
            name = re.findall(r'alertname="(\w+)"', each["expr"])[0]
            tested.setdefault(name, set()).add(bool(each["exp_samples"]))
    for alert in alerts():
        assert True in tested[alert["alert"]], alert["alert"]
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        assert "{{ $labels.instance }}" in alert["annotations"]["summary"]
        assert len(alert["annotations"]["description"]) > 30
    assert len(tested) == len(alerts())


def _square(panel: dict[str, Any]) -> tuple[range, range]:
    at = panel["gridPos"]
    return range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])


def test_the_dashboard_can_be_shown() -> None:
    shown = panels()
    assert len({each["id"] for each in shown}) == len(shown)
    assert len({each["title"] for each in shown if each["type"] != "row"}) > 30
    for each in shown:
        assert _square(each)[0].stop <= 24
    for one, other in itertools.combinations(shown, 2):
        (x, y), (left, top) = _square(one), _square(other)
        apart = x.stop <= left.start or left.stop <= x.start
        assert apart or y.stop <= top.start or top.stop <= y.start, (one["title"], other["title"])


def test_each_panel_is_about_the_instances_that_are_chosen() -> None:
    for panel in panels():
        for target in panel.get("targets", ()):
            expr = target["expr"]
            assert expr.count('{instance=~"$instance"') == len(re.findall(r"\bkpmd_\w+", expr))
            assert "rate(" not in expr or "$__rate_interval" in expr
            assert target["datasource"]["uid"] == "${datasource}"
