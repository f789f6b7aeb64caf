"""The report of ``kpmd --check``: a page for people, or JSON."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TextIO

from kpmd import __version__
from kpmd.core.machine import Finding, Level, Machine, verdict

_WIDTH = 80

#: Words that can be told apart without colour, and the colours (SGR).
_MARKS: dict[Level, tuple[str, str]] = {
    "ok": ("ok", "32"),
    "note": ("note", "36"),
    "less": ("LESS", "33"),
    "unknown": ("?", "35"),
    "missing": ("MISSING", "31;1"),
}
_MARK_WIDTH = max(len(word) for word, _ in _MARKS.values())


def wants_colour(out: TextIO) -> bool:
    """Whether to write colours: on a terminal, unless NO_COLOR is set."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def as_json(machine: Machine, findings: Sequence[Finding], *, colour: bool = False) -> str:
    """The report as one JSON document. ``colour`` means nothing here."""
    all_ = verdict(findings)
    document = {
        "kpmd": __version__,
        "kernel": machine.release,
        "machine": machine.machine,
        "uid": machine.process.uid,
        "verdict": all_.word,
        "status": all_.status,
        "summary": all_.sentence,
        "findings": [asdict(each) for each in findings],
    }
    return json.dumps(document, indent=2) + "\n"


def as_text(machine: Machine, findings: Sequence[Finding], *, colour: bool = False) -> str:
    """The report in 80 columns."""
    names = max(len(each.name) for each in findings)
    who = "root" if machine.process.uid == 0 else f"uid {machine.process.uid}"
    lines = [f"kpmd {__version__} on Linux {machine.release}, looked at as {who}"]
    for group, members in groupby(findings, key=lambda each: each.group):
        lines += ["", group]
        for each in members:
            lines += _lines(each, names, colour)
    sentence = verdict(findings).sentence
    lines += ["", *textwrap.wrap(sentence, _WIDTH, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def _lines(finding: Finding, names: int, colour: bool) -> list[str]:
    word, code = _MARKS[finding.level]
    mark = f"{word:<{_MARK_WIDTH}}"
    left = f"  {mark}  {finding.name:<{names}}  "
    first, *rest = textwrap.wrap(
        finding.found, _WIDTH - len(left), break_long_words=False, break_on_hyphens=False
    ) or [""]
    lines = [(left + first).rstrip(), *(" " * len(left) + each for each in rest)]
    if colour:
        lines[0] = lines[0].replace(mark, f"\033[{code}m{mark}\033[0m", 1)
    indent = " " * (_MARK_WIDTH + 6)
    for start, text in (("", finding.means), ("> ", finding.do)):
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=indent + start,
            subsequent_indent=indent + " " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines
