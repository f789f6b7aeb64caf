"""What ``make check-metrics`` gives to promtool.

``python -m tests.tools.metrics text``: what a daemon answers to a scrape, over the fake kernel.
``python -m tests.tools.metrics rules``: the dashboard's expressions, as rules for recording.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.fakes.kernel import FakeKernel
from tests.http.samples import a_link
from tests.http.serving import Client, Served

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana/kpmd.json"
RULES = DEPLOY / "prometheus/kpmd.rules.yml"
RULES_TEST = DEPLOY / "prometheus/kpmd.rules.test.yml"

#: What Grafana puts in the place of variables.
_VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, rows among them."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def expressions() -> Iterator[str]:
    """What the panels ask for, as Grafana sends it."""
    for panel in panels():
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for variable, value in _VARIABLES.items():
                expr = expr.replace(variable, value)
            yield expr


def alerts() -> list[dict[str, Any]]:
    """The rules that alert."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names(expr: str) -> set[str]:
    """The metrics that an expression names: all of kpmd's begin with ``kpmd_``."""
    return set(re.findall(r"\bkpmd_\w+", re.sub(r'"[^"]*"', "", expr)))


def rules() -> str:
    """The dashboard's expressions as a file of rules."""
    made = [
        {"record": f"kpmd:panel_{number}", "expr": expr}
        for number, expr in enumerate(expressions())
    ]
    return yaml.safe_dump({"groups": [{"name": "dashboard", "rules": made}]})


async def text() -> str:
    """What a daemon tells that has been used a little."""
    served = await Served.start(FakeKernel())
    try:
        async with Client(served.path) as client:
            await a_link(client)
            await client.get("/capabilities")
            await client.get("/symbols?limit=1")
            await client.request("GET", "/links/lnk-1")
            return (await client.request("GET", "/metrics")).body.decode()
    finally:
        await served.stop()


def main() -> None:
    """Write what is asked for to standard output."""
    sys.stdout.write(rules() if sys.argv[1:] == ["rules"] else asyncio.run(text()))


if __name__ == "__main__":
    main()
