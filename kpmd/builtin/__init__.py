"""BPF programs that ship with kpmd: C sources (GPL-2.0-only), and their objects as committed.

``make bpf`` builds the objects, ``make check-bpf`` proves that they are what the sources make.
Imports nothing of kpmd.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Builtin:
    """A program that a client can load by name."""

    name: str
    description: str


_ALL = (
    Builtin(
        "count",
        "Counts the calls of each function: map `counts`, function address to calls per CPU. Set"
        " `target_pid` to count for one process alone. `dropped` (in .bss) tells how many calls"
        " could not be counted.",
    ),
)

#: All builtins by name.
BUILTINS: dict[str, Builtin] = {each.name: each for each in _ALL}


def read(name: str) -> bytes:
    """The ELF object of a builtin. Raises KeyError for a name that is not in ``BUILTINS``."""
    builtin = BUILTINS[name]
    return resources.files(__name__).joinpath(f"{builtin.name}.bpf.o").read_bytes()
