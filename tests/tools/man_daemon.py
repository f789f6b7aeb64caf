"""The manual pages of the daemon, kpmd(8), and of the two files that it reads.

kpmd(8) is made of its arguments, as argparse has them; the pages of the files show those that ship
with kpmd, which have every setting with its default, and say in comments what it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kpmd.__main__ import _parser

DEPLOY = Path(__file__).parents[2] / "deploy"

_FILES = """
Signals
-------

SIGHUP
    puts the policy in force anew, and opens the audit file anew.

SIGTERM, SIGINT
    end it: it finishes the requests that it has, and detaches everything (but over a restart by
    systemd).

Files
-----

/etc/kpmd/kpmd.toml
    the configuration, see :manpage:`kpmd.toml(5)`.

/etc/kpmd/policy.toml
    who may do what, see :manpage:`kpmd-policy.toml(5)`.

/run/kpmd.sock
    the socket.

See also
--------

:manpage:`kpmctl(1)`, :manpage:`kpmd.toml(5)`, :manpage:`kpmd-policy.toml(5)`
"""


class Page(NamedTuple):
    """A page: its name, section, what NAME says of it, and its reStructuredText."""

    name: str
    section: int
    what: str
    text: str


def pages() -> Iterator[Page]:
    """All of them."""
    yield Page("kpmd", 8, "attach BPF programs to kernel functions as a service", _daemon())
    yield _shown("kpmd.toml", "kpmd.toml", "configuration of kpmd")
    yield _shown("kpmd-policy.toml", "policy.toml", "who may do what with kpmd")


def _daemon() -> str:
    parser = _parser()
    options = "\n".join(map(_option, parser._actions))
    usage = f"**{parser.prog}** [*option* ...]"
    title = f"kpmd\n====\n\nSynopsis\n--------\n\n{usage}\n\nDescription\n-----------\n\n"
    said = "\n\n".join(filter(None, (parser.description, parser.epilog))).replace("`", "``")
    return f"{title}{said}\n\nOptions\n-------\n\n{options}\n{_FILES}"


def _option(action: argparse.Action) -> str:
    value = action.metavar or (action.choices and "|".join(map(str, action.choices)))
    names = [f"**{name}**" + (f" *{value}*" if value else "") for name in action.option_strings]
    return f"{', '.join(names)}\n    {(action.help or '').replace('`', '``')}\n"


def _shown(name: str, file: str, what: str) -> Page:
    content = (DEPLOY / file).read_text(encoding="utf-8")
    indented = "".join(f"    {line}".rstrip() + "\n" for line in content.splitlines())
    text = (
        f"{name}\n{'=' * len(name)}\n\nDescription\n-----------\n\n/etc/kpmd/{file} is TOML. "
        f"The file that comes with kpmd::\n\n{indented}\n"
        "See also\n--------\n\n:manpage:`kpmd(8)`\n"
    )
    return Page(name, 5, what, text)
