"""What the daemon asks of the loader, within which limits, and how the loader's processes read it.

May import: ``kpmd.bpf.{abi,loader_answer,rights}``, ``kpmd.errors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kpmd.bpf.abi import AttachType
from kpmd.bpf.loader_answer import NAME_MOST, SCM_MAX_FD
from kpmd.bpf.rights import Rights
from kpmd.errors import Invalid

#: What a program made of raw instructions is called between the processes.
INSTRUCTIONS = "instructions"


@dataclass(frozen=True)
class ObjectRequest:
    """What to load of an object, and how."""

    elf: bytes
    #: Only these are loaded; None: all but those in a section ``?…``.
    programs: tuple[str, ...] | None = None
    #: None: each program's section says it.
    attach: AttachType | None = None
    #: To be attached one by one: the programs are loaded as AttachType.NONE, if they are for
    #: kprobe multi; others cannot be loaded so.
    one_by_one: bool = False
    #: Set in .rodata, .data and .bss before the load.
    globals: Mapping[str, int | bytes] = field(default_factory=dict)
    #: Map name to size, set before the load.
    max_entries: Mapping[str, int] = field(default_factory=dict)
    #: Return what the verifier says of a program that it takes, too.
    want_log: bool = False
    #: None: everything is allowed.
    rights: Rights | None = None


@dataclass(frozen=True)
class InstructionsRequest:
    """Raw instructions of one program, and what it is loaded for."""

    instructions: bytes
    name: str
    license: str
    attach: AttachType
    want_log: bool = False
    rights: Rights | None = None


@dataclass(frozen=True)
class LoaderLimits:
    """What one load may take."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    #: Address space of the process; and kernel memory of the object's maps, by estimate.
    memory_bytes: int = 512 << 20
    map_bytes: int = 512 << 20
    max_programs: int = 128
    max_maps: int = 64
    #: Who the process runs as: "nobody".
    uid: int = 65534
    gid: int = 65534

    def __post_init__(self) -> None:
        if self.max_programs + self.max_maps > SCM_MAX_FD:
            raise ValueError(f"max_programs and max_maps together exceed {SCM_MAX_FD}")

    def within(self, rights: Rights | None) -> LoaderLimits:
        """The limits of a load with these rights."""
        return self if rights is None else replace(self, seconds=min(self.seconds, rights.seconds))

    def packet(self) -> bytes:
        """The limits as the loader's processes read them."""
        # Beside what is kept: patterns of maps in maps, BTF, and what libbpf tries the kernel with.
        files = self.max_programs + 2 * self.max_maps + 256
        return json.dumps({**vars(self), "files": files}).encode()


def encode(request: ObjectRequest | InstructionsRequest) -> bytes:
    """A line of JSON for the broker; then the parser's, and the object; or the instructions.

    Raises Invalid.
    """
    orders: dict[str, Any] = {"rights": request.rights and request.rights.encoded()}
    if isinstance(request, ObjectRequest):
        return json.dumps(orders).encode() + b"\n" + _encode(request)
    orders["instructions"] = {
        "name": request.name,
        "license": request.license,
        "attach": request.attach,
        "want_log": request.want_log,
    }
    return json.dumps(orders).encode() + b"\n" + request.instructions


def _encode(request: ObjectRequest) -> bytes:
    if request.programs is not None and not request.programs:
        raise Invalid.at(["source", "programs"], "name at least one, or leave it out")
    for index, name in enumerate(request.programs or ()):
        _check_name(["source", "programs", index], name)
    for what in ("globals", "max_entries"):
        for name in getattr(request, what):
            _check_name(["source", what, name[:NAME_MOST]], name)
    for name, value in request.globals.items():
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise Invalid.at(["source", "globals", name], "the number does not fit into 64 bits")
    for name, size in request.max_entries.items():
        if not 0 < size < 1 << 32:
            raise Invalid.at(["source", "max_entries", name], "must be between 1 and 4294967295")
    head = {
        "programs": request.programs,
        "attach": request.attach,
        "one_by_one": request.one_by_one,
        "globals": {
            name: value.hex() if isinstance(value, bytes) else int(value)
            for name, value in request.globals.items()
        },
        "max_entries": dict(request.max_entries),
        "want_log": request.want_log,
    }
    return json.dumps(head).encode() + b"\n" + request.elf


def _check_name(loc: list[str | int], name: str) -> None:
    if not 0 < len(name) <= NAME_MOST:
        raise Invalid.at(loc, f"a name has 1 to {NAME_MOST} characters")
