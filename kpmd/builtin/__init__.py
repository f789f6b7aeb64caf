"""BPF programs that ship with kpmd: C sources (GPL-2.0-only), and their objects as committed.

``make bpf`` builds the objects, ``make check-bpf`` proves that they are what the sources make.
docs/builtins.md tells what each does. Imports nothing of kpmd.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal

Kind = Literal["kprobe", "kretprobe", "session"]

#: What an object takes that looks at registers: they are those of this machine.
_X86_64 = "x86_64"


@dataclass(frozen=True)
class Variant:
    """A builtin as kernels with certain features run it.

    ``objects``: the first that the kernel takes; they differ in what its functions look like.
    ``links``: its programs, and the kinds of links that each is made for. ``needs``: features, as
    ``GET /capabilities`` names them. ``machine`` None: any.
    """

    objects: tuple[str, ...]
    links: Mapping[str, tuple[Kind, ...]]
    needs: frozenset[str] = frozenset()
    machine: str | None = None
    #: The programs that cannot tell at a function's return which function it was.
    entry_only: frozenset[str] = frozenset()

    @property
    def session(self) -> bool:
        """Whether it is one program for both entry and return."""
        return any("session" in kinds for kinds in self.links.values())

    def read(self) -> list[bytes]:
        """Its ELF objects.

        Raises NotImplementedError where there is none for this machine.
        """
        if self.machine not in (None, platform.machine()):
            raise NotImplementedError(f"{self.objects[0]} is made for {self.machine} alone")
        folder = resources.files(__name__)
        return [folder.joinpath(f"{each}.bpf.o").read_bytes() for each in self.objects]


@dataclass(frozen=True)
class Builtin:
    """Programs that a client can load by name. ``variants``: the best first."""

    name: str
    description: str
    variants: tuple[Variant, ...]

    @property
    def by_session(self) -> bool:
        """Whether there is a variant for sessions."""
        return any(each.session for each in self.variants)

    def variant(self, *, session: bool = False, func_ip: bool = True) -> Variant:
        """The one for a kernel with these features, or without.

        ``session``: of which there has to be one.
        """
        has = {_SESSION} if session else {_FUNC_IP} if func_ip else set()
        return next(each for each in self.variants if each.session is session and each.needs <= has)


_SESSION, _FUNC_IP = "bpf_link_kprobe_session", "bpf_get_func_ip"

_AT_ANY: tuple[Kind, ...] = ("kprobe", "kretprobe")


def _one(name: str, program: str) -> tuple[Variant, ...]:
    """One program, to be linked wherever the function can be told."""
    return (
        Variant((name,), {program: _AT_ANY}, frozenset({_FUNC_IP})),
        Variant(
            (f"{name}_regs",),
            {program: ("kprobe",)},
            machine=_X86_64,
            entry_only=frozenset({program}),
        ),
    )


def _both(name: str, *, machine: str | None) -> tuple[Variant, ...]:
    """Entry and return of each call: by session, or by two programs linked to the same targets."""
    pair: dict[str, tuple[Kind, ...]] = {
        f"{name}_entry": ("kprobe",),
        f"{name}_return": ("kretprobe",),
    }
    session = (f"{name}_session_ctx", f"{name}_session")
    return (
        Variant(session, {name: ("session",)}, frozenset({_SESSION}), machine),
        Variant((name,), pair, frozenset({_FUNC_IP}), _X86_64),
        Variant(
            (f"{name}_regs",),
            pair,
            machine=_X86_64,
            entry_only=frozenset({f"{name}_entry"}),
        ),
    )


_ALL = (
    Builtin(
        "count",
        "Counts the calls of each function: map `counts`, or with `by_process` map"
        " `counts_by_process`.",
        _one("count", "count"),
    ),
    Builtin(
        "latency",
        "Histograms of the time that each function takes: map `latencies`, function to calls by"
        " powers of two of nanoseconds.",
        _both("latency", machine=None),
    ),
    Builtin(
        "trace",
        "Tells of each call in the ring buffer `events`: time, process, function, arguments and"
        " return value.",
        _both("trace", machine=_X86_64),
    ),
    Builtin(
        "stacks",
        "Counts who calls each function: map `stacks`, function, stack and process to calls, with"
        " the stacks in map `traces`.",
        _one("stacks", "stack"),
    ),
)

#: All builtins by name.
BUILTINS: dict[str, Builtin] = {each.name: each for each in _ALL}


def read(name: str, *, func_ip: bool = True) -> bytes:
    """The ELF object of a builtin, not by session.

    ``func_ip`` False: for a kernel without bpf_get_func_ip (before 5.15). Raises KeyError for a
    name that is not in ``BUILTINS``, and NotImplementedError where there is no object for this
    machine.
    """
    return BUILTINS[name].variant(func_ip=func_ip).read()[0]
