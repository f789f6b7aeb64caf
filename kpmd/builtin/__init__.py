"""BPF programs that ship with kpmd: C sources (GPL-2.0-only), and their objects as committed.

``make bpf`` builds the objects, ``make check-bpf`` proves that they are what the sources make.
Imports nothing of kpmd.
"""

from __future__ import annotations

import platform
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


def read(name: str, *, func_ip: bool = True) -> bytes:
    """The ELF object of a builtin.

    ``func_ip`` False: for a kernel without bpf_get_func_ip (before 5.15). That object takes the
    function's address from the registers of an x86-64, at entry: attach it as kprobe alone, a
    kretprobe counts all calls under one address of no meaning.

    Raises KeyError for a name that is not in ``BUILTINS``, and NotImplementedError where there is
    no object for this machine.
    """
    builtin = BUILTINS[name]
    if not func_ip and platform.machine() != "x86_64":
        raise NotImplementedError(f"{name} needs bpf_get_func_ip (kernel 5.15) on this machine")
    file = f"{builtin.name}.bpf.o" if func_ip else f"{builtin.name}_regs.bpf.o"
    return resources.files(__name__).joinpath(file).read_bytes()
