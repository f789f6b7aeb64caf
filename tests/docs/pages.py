"""Reads the blocks of code out of the documentation, and where each of them is to be run.

An HTML comment before a block, which no reader sees, says it::

    <!-- run: vm as root -->          in the VM, by root's shell of the page
    <!-- run: vm fails 4 -->          the last command's exit status is 4
    <!-- run: vm daemon -->           starts the daemon: wait until it listens
    <!-- run: none: REASON -->        cannot be run at all
    <!-- run: by kernel/test_x.py -->   this test runs it
    <!-- file: first.bpf.c -->        is the content of this file

The same words behind ``page:`` in a comment hold for all of a page's blocks that say nothing.
Without any a block is run in the VM, by the shell of a user without privileges.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]

#: What shells and Python run.
SHELL, CONSOLE, PYTHON = ("sh", "bash"), ("console",), ("python",)
#: What is nothing until it is in a file.
CONTENT = ("c", "toml")
#: What the daemon answers, and what is for other programs than those that are here.
SHOWN = ("json", "text", "http", "yaml")

Place = Literal["vm", "systemd", "none", "by"]

_COMMENT = re.compile(r"<!-- (run|file|page): (.+?) -->")
#: Also in an item of a list, and a directive of Sphinx.
_FENCE = re.compile(r"( *)(`{3,})(\{?[\w+-]*\}?)(?: .*)?")
_RUN = re.compile(
    r"(?P<place>vm|systemd)(?P<daemon> daemon)?(?: as (?P<user>\w+))?(?: in (?P<folder>project))?"
    r"(?: fails (?P<status>\d+))?"
    r"|none: (?P<reason>.+)|by (?P<test>[\w/.]+)"
)


@dataclass(frozen=True)
class Block:
    """A block of code; ``line`` is its fence's."""

    page: str
    line: int
    language: str
    text: str
    place: Place = "vm"
    user: str = "user"
    in_project: bool = False
    daemon: bool = False
    status: int = 0
    #: The file that it is the content of.
    file: str = ""
    #: Why it is not run, or the test that runs it.
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """The documents whose commands are run, by their paths in the project."""
    found = sorted(each.relative_to(ROOT).as_posix() for each in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *(each for each in found if not each.startswith("docs/_"))]


def blocks(page: str) -> list[Block]:
    """All blocks of a page that could be run. Raises ValueError for what makes no sense."""
    return list(_blocks(page, (ROOT / page).read_text(encoding="utf-8").splitlines()))


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    default = Block(page, 0, "", "")
    said: dict[str, str] = {}
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if comment := _COMMENT.fullmatch(line.strip()):
            said[comment[1]] = comment[2]
            if "page" in said:
                default = _placed(default, said.pop("page"))
        elif fence := _FENCE.fullmatch(line):
            indent, begin = len(fence[1]), at
            while at < len(lines) and lines[at].strip() != fence[2]:
                at += 1
            text = "".join(f"{each[indent:]}\n" for each in lines[begin:at])
            at += 1
            if fence[3] not in SHOWN and not fence[3].startswith("{"):
                yield _block(replace(default, line=begin, language=fence[3], text=text), said)
            elif said:
                raise ValueError(f"{page}:{begin}: this is only shown, not {said}")
            said = {}
        elif line.strip() and said:
            raise ValueError(f"{page}:{at}: a comment that belongs to no block: {said}")


def _block(block: Block, said: dict[str, str]) -> Block:
    known = (*SHELL, *CONSOLE, *PYTHON, *CONTENT)
    if "run" in said:
        block = _placed(block, said["run"])
    if "file" in said:
        return replace(block, file=said["file"])
    if block.place in ("vm", "systemd") and block.language not in known:
        raise ValueError(f"{block}: no language that can be run: {block.language!r}")
    if block.place in ("vm", "systemd") and block.language in CONTENT:
        raise ValueError(f"{block}: in which file is this?")
    return block


def _placed(block: Block, words: str) -> Block:
    found = _RUN.fullmatch(words)
    if not found:
        raise ValueError(f"{block}: what is {words!r}?")
    if found["reason"]:
        return replace(block, place="none", reason=found["reason"])
    if found["test"]:
        return replace(block, place="by", reason=found["test"])
    return replace(
        block,
        place="systemd" if found["place"] == "systemd" else "vm",
        user=found["user"] or "user",
        in_project=bool(found["folder"]),
        daemon=bool(found["daemon"]),
        status=int(found["status"] or 0),
    )
