"""What the documents name is there, and their commands say where they are run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import ROOT, SHOWN, Block, blocks, pages
from tests.docs.transcript import pattern, steps

DOCS = ROOT / "docs"
DOCUMENTS = ["CONTRIBUTING.md", "BENCHMARKS.md", *pages()]

#: As many as there may be: what cannot be run even in a VM of one's own.
MOST_NOT_RUN = 10


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / name).parent / target).exists(), target


def test_each_attack_has_a_test() -> None:
    text = (ROOT / "docs/threat-model.md").read_text()
    named = re.findall(r"\b(unit|http|process|fuzz|kernel|systemd|browser)/(test_\w+)", text)
    assert len(named) > 30
    missing = {f"{a}/{b}" for a, b in named if not (ROOT / "tests" / a / f"{b}.py").exists()}
    assert missing == set()
    attacks = text[text.index("## What stops what") : text.index("### A daemon that is taken over")]
    rows = [line for line in attacks.splitlines() if re.match(r"\| (?!attack)\w", line)]
    assert len(rows) > 20
    assert [row for row in rows if "test_" not in row.rpartition(" | ")[2]] == []


@pytest.mark.parametrize("page", pages())
def test_each_block_of_code_is_run_somewhere(page: str) -> None:
    for block in blocks(page):  # which raises where it does not know
        if block.place == "by":
            test = ROOT / "tests" / block.reason
            assert page in test.read_text(), f"{block}: {test} does not name it"
        if block.language == "console":
            assert steps(block.text), block
        assert block.place != "none" or len(block.reason) > 20, f"{block}: why not?"


def test_hardly_anything_is_not_run() -> None:
    found = [each for page in pages() for each in blocks(page)]
    left_out = [str(each) for each in found if each.place == "none"]
    assert len(found) > 60
    assert len(left_out) <= MOST_NOT_RUN, left_out


@pytest.mark.parametrize("page", pages())
def test_no_code_hides_from_the_tests(page: str) -> None:
    """Blocks are fenced: code that is only indented has no language, and no place."""
    lines = re.sub(r"(?ms)^ *```.*?^ *```$", "", (ROOT / page).read_text()).splitlines()
    shown = [b for a, b in zip(["", *lines], lines, strict=False) if not a and b[:4] == "    "]
    assert shown == []


def test_each_page_is_in_the_table_of_contents() -> None:
    text = (DOCS / "index.md").read_text()
    listed = {line for line in text.splitlines() if re.fullmatch(r"[\w/-]+", line)}
    found = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert found - {"index"} == listed


def test_the_reference_has_all_calls() -> None:
    contract = yaml.safe_load((ROOT / "openapi.yaml").read_text())
    tags = {
        tag
        for methods in contract["paths"].values()
        for call in methods.values()
        for tag in call["tags"]
    }
    assert set(re.findall(r"\{kpmd-api\} (\w+)", (DOCS / "reference/api.md").read_text())) == tags


def _page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> list[Block]:
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    (tmp_path / "a.md").write_text(text)
    return blocks("a.md")


def test_what_comments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _page(
        tmp_path,
        monkeypatch,
        "```sh\na\n```\n<!-- page: systemd as root in project -->\n\n```sh\nb\n```\n"
        "<!-- run: vm as ada fails 4 -->\n```console\n$ c\n```\n"
        "- x\n  <!-- file: d.c -->\n  ```c\n  d\n    d\n  ```\n"
        "<!-- run: none: no reason at all -->\n```sh\n```\n```json\n{}\n```\n",
    )
    assert [(each.place, each.user, each.in_project, each.status) for each in found] == [
        ("vm", "user", False, 0),
        ("systemd", "root", True, 0),
        ("vm", "ada", False, 4),
        ("systemd", "root", True, 0),
        ("none", "root", True, 0),
    ]
    assert (found[3].file, found[3].text) == ("d.c", "d\n  d\n")
    assert found[4].reason == "no reason at all"


@pytest.mark.parametrize(
    "text",
    [
        "```rust\n```\n",
        "```\n```\n",
        "```c\n```\n",
        "<!-- run: where -->\n```sh\n```\n",
        "<!-- run: vm -->\nwords\n```sh\n```\n",
        f"<!-- run: vm -->\n```{SHOWN[0]}\n```\n",
    ],
)
def test_what_makes_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with pytest.raises(ValueError, match=r"a\.md"):
        _page(tmp_path, monkeypatch, text)


def test_transcripts() -> None:
    first, second = steps("$ one \\\n> more\n1 …\n^C\n…\nend\n# two\n")
    assert (first.command, second.command) == ("one \\\nmore", "two")
    assert first.before_interrupt == ["1 …"]
    assert second.before_interrupt is None
    whole = pattern(first.printed)
    assert whole.fullmatch("1  2 3\nend\n")
    assert whole.fullmatch("4,096.5   2\nx\n\ny\n  end  \n")
    assert not whole.fullmatch("one 2\nend\n")
    assert not whole.fullmatch("1 2\nend\nx\n")
    ids = pattern(["lnk-12ab at 2026-01-02T03:04:05Z: 0x00ff vfs_read"])
    assert ids.fullmatch("lnk-98 at 2027-11-12T13:14:15.167Z: 0xabcd vfs_read\n")
    assert not ids.fullmatch("lnk-98 at noon: 0xabcd vfs_read\n")
    assert not ids.fullmatch("lnk-98 at 2027-11-12T13:14:15.167Z: 0xabcd vfs_write\n")
