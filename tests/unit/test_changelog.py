"""The changelog has an entry of each version, the newest first, and of this one."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

import kpmd

TEXT = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^## (?P<version>\S+) - (?P<date>\d{4}-\d\d-\d\d|unreleased)$", re.MULTILINE)
#: As keepachangelog.com names them.
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_this_version_comes_first() -> None:
    found = [Version(each["version"]) for each in ENTRY.finditer(TEXT)]
    assert str(found[0]) == kpmd.__version__
    assert found == sorted(set(found), reverse=True)


def test_every_heading_is_known() -> None:
    headings = re.findall(r"^#{2,3} .*$", TEXT, re.MULTILINE)
    versions = [each for each in headings if each.startswith("## ")]
    assert all(ENTRY.fullmatch(each) for each in versions), versions
    assert {each[4:] for each in headings if each.startswith("### ")} <= SECTIONS


def test_only_the_newest_may_be_unreleased() -> None:
    assert "unreleased" not in [each["date"] for each in list(ENTRY.finditer(TEXT))[1:]]
