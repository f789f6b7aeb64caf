"""What a load may hold: helpers, kfuncs, kinds of maps, bytes and seconds.

May import: ``kpmd.bpf.{abi,helpers}``, ``kpmd.errors``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kpmd.bpf.abi import MAP_TYPES
from kpmd.bpf.helpers import NAMES, READS_KERNEL, READS_USER
from kpmd.errors import Forbidden

#: The sets among the fields; None in place of one: everything.
_SETS = ("helpers", "kfuncs", "map_types")


@dataclass(frozen=True)
class Rights:
    """What a load may hold. None in place of a set: everything.

    In place of the whole: an administrator's load, of which nothing is refused.
    """

    #: Names without "bpf_". One that reads memory needs its switch too, which is enough for it.
    helpers: frozenset[str] | None
    read_kernel: bool
    read_user: bool
    kfuncs: frozenset[str] | None
    map_types: frozenset[str] | None
    #: The most bytes of maps of this load, by estimate.
    map_bytes: int
    #: The most time for this load.
    seconds: float

    def encoded(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @staticmethod
    def decoded(fields: dict[str, Any]) -> Rights:
        """The opposite of ``encoded``."""
        sets = {name: None if fields[name] is None else frozenset(fields[name]) for name in _SETS}
        return Rights(**{**fields, **sets})

    def why_not_helper(self, number: int) -> str | None:
        """Why a program may not call a helper; None: it may."""
        name = NAMES.get(number)
        if name is None:
            return "which kpmd does not know"
        if name in READS_KERNEL and not self.read_kernel:
            return "which reads kernel memory: the policy does not allow you that"
        if name in READS_USER and not self.read_user:
            return "which reads memory of processes: the policy does not allow you that"
        if self.helpers is None or name in self.helpers | READS_KERNEL | READS_USER:
            return None
        return "which the policy does not allow you"

    def check_map(self, name: str, type_number: int) -> None:
        """Raise Forbidden for a map of a type that may not be."""
        kind = MAP_TYPES.get(type_number, f"type_{type_number}")
        if self.map_types is not None and kind not in self.map_types:
            raise Forbidden(
                f"map {name} is of type {kind}, which the policy does not allow you",
                refused=[kind],
            )


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else value
