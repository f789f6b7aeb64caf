"""``kpmd --check``: whether this machine can run kpmd, and what is missing.

Reads the machine (``read``), lets ``kpmd.core.judge_kernel`` and ``judge_service`` say what that is
worth, and shows it (``page``). A process of its own, beside the daemon.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from kpmd.check import page
from kpmd.check.read import read
from kpmd.core.judge_kernel import judge_kernel
from kpmd.core.judge_service import (
    judge_mounts,
    judge_rights,
    judge_service,
    judge_software,
)
from kpmd.core.machine import Finding, Machine, verdict


def findings(machine: Machine) -> Iterator[Finding]:
    """Everything that there is to say of a machine, in the order of the report."""
    yield from judge_kernel(machine)
    yield from judge_rights(machine)
    yield from judge_mounts(machine)
    yield from judge_software(machine)
    yield from judge_service(machine)


def run(config: Path | None, arguments: dict[str, object], as_json: bool) -> int:
    """Print the report; returns the exit status (``kpmd.core.machine.verdict``).

    ``config`` and ``arguments``: those of ``kpmd.config.load``.
    """
    machine = read(config, arguments)
    found = list(findings(machine))
    show = page.as_json if as_json else page.as_text
    sys.stdout.write(show(machine, found, colour=page.wants_colour(sys.stdout)))
    return verdict(found).status
