"""What the BTF of an object tells of the entries of its maps, and of its global variables.

libbpf keeps the variables of a section as the only value of an array, whose type is the section.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from kpmd.core.btf import Btf, BtfError, Kind
from kpmd.core.codec import Codec
from kpmd.core.model import Map

Part = Literal["key", "value"]

#: Sections that nothing can be written to once the object is loaded.
_CONSTANT = (".rodata", ".kconfig")


def codec_of(each: Map, part: Part) -> Codec:
    """The codec of a map's keys or values. Raises BtfError where there is none; it says why."""
    if each.types is None:
        raise BtfError("the object has no BTF: compile it with -g")
    type_id, size = (
        (each.key_type, each.key_size) if part == "key" else (each.value_type, each.value_size)
    )
    if not type_id:
        raise BtfError(f"the object's BTF does not tell the type of this map's {part}s")
    codec = each.types.codec(type_id)
    if codec.size != size and not (codec.flexible and codec.size < size):
        raise BtfError(f"{codec.name} has {codec.size} bytes, and a {part} of this map {size}")
    return codec


@dataclass(frozen=True)
class Variable:
    """A global variable, and where in which map its bytes are."""

    map: Map
    section: str
    name: str
    type: int
    offset: int
    size: int

    @property
    def writable(self) -> bool:
        """Whether it is none of the constants."""
        return not self.section.startswith(_CONSTANT)

    def codec(self) -> Codec:
        """Its codec. Raises BtfError."""
        if self.map.types is None:
            raise BtfError("the object has no BTF")
        codec = self.map.types.codec(self.type)
        if codec.size > self.size:
            raise BtfError(f"{codec.name} does not fit into the variable {self.name!r}")
        return codec


def variables(maps: Iterable[Map]) -> Iterator[Variable]:
    """The global variables in some maps, as the sections have them. Raises BtfError."""
    for each in maps:
        section = _section(each)
        if section is None or each.types is None:
            continue
        for found in each.types.btf.variables(section):
            if found.offset + found.size <= each.value_size:
                yield Variable(each, section, found.name, found.type, found.offset, found.size)


def _section(each: Map) -> str | None:
    """The section whose variables are the map's only value."""
    if each.types is None or each.type != "array" or each.max_entries != 1:
        return None
    btf: Btf = each.types.btf
    if not each.value_type or btf.kind(each.value_type) != Kind.DATASEC:
        return None
    return btf.name(each.value_type)
