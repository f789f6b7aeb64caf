"""Transcripts of a terminal: commands behind ``$ `` or ``# ``, and what they print."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: Stands for whatever there is: in a line for part of it, alone for any number of lines.
ANY = "…"
#: A line that says that here somebody pressed Ctrl-C.
INTERRUPT = "^C"


@dataclass
class Step:
    """A command, and the lines that it prints."""

    command: str
    expected: list[str] = field(default_factory=list)

    @property
    def before_interrupt(self) -> list[str] | None:
        """What is printed before Ctrl-C; None where nobody presses it."""
        if INTERRUPT not in self.expected:
            return None
        return self.expected[: self.expected.index(INTERRUPT)]

    @property
    def printed(self) -> list[str]:
        """All that is printed."""
        return [line for line in self.expected if line != INTERRUPT]


def steps(text: str) -> list[Step]:
    """The commands of a transcript. Raises ValueError where it begins with anything else."""
    made: list[Step] = []
    more = False
    for line in text.splitlines():
        if line.startswith(("$ ", "# ")):
            made.append(Step(line[2:]))
        elif not made:
            raise ValueError(f"a transcript begins with a command, not with {line!r}")
        elif more:
            made[-1].command += f"\n{line.removeprefix('> ')}"
        else:
            made[-1].expected.append(line)
        more = line.endswith("\\") and not made[-1].expected
    return made


def pattern(lines: list[str]) -> re.Pattern[str]:
    """What output that begins with these lines matches.

    Numbers, ids, addresses and times are examples: any others will do. Columns may be wider.
    """
    return re.compile("".join(map(_line, lines)))


#: Each example, and what may stand in its place. The first that fits counts.
_EXAMPLES = {
    ANY: ".*?",
    r"(?:prg|lnk|map|cli|lse)-[0-9a-f]+": r"(?:prg|lnk|map|cli|lse)-[0-9a-f]+",
    r"\d{4}-\d\d-\d\dT[\d:.]+Z": r"\d{4}-\d\d-\d\dT[\d:.]+Z",
    r"0x[0-9a-f]+": r"0x[0-9a-f]+",
    r"\d+(?:[.,]\d+)*": r"\d+(?:[.,]\d+)*",
}
_EXAMPLE = re.compile("|".join(f"({each})" for each in _EXAMPLES))


def _line(line: str) -> str:
    if line.strip() == ANY:
        return r"(?:.*\n)*?"
    return r"[ \t]*" + r"[ \t]+".join(map(_word, line.split())) + r"[ \t]*\n"


def _word(word: str) -> str:
    made, at = "", 0
    for found in _EXAMPLE.finditer(word):
        assert found.lastindex
        made += re.escape(word[at : found.start()]) + [*_EXAMPLES.values()][found.lastindex - 1]
        at = found.end()
    return made + re.escape(word[at:])
