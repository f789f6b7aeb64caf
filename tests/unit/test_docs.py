"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{each.name}" for each in DOCS.glob("*.md"))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / name).parent / target).exists(), target


def test_each_attack_has_a_test() -> None:
    text = (ROOT / "docs/threat-model.md").read_text()
    named = re.findall(r"\b(unit|http|process|fuzz|kernel|systemd)/(test_\w+)", text)
    assert len(named) > 30
    missing = {f"{a}/{b}" for a, b in named if not (ROOT / "tests" / a / f"{b}.py").exists()}
    assert missing == set()
    attacks = text[text.index("## What stops what") : text.index("### A daemon that is taken over")]
    rows = [line for line in attacks.splitlines() if re.match(r"\| (?!attack)\w", line)]
    assert len(rows) > 20
    assert [row for row in rows if "test_" not in row.rpartition(" | ")[2]] == []
