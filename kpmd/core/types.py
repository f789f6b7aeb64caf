"""What the BTF of a client's object tells of its maps, looked at when it is first asked for."""

from __future__ import annotations

from functools import lru_cache

from kpmd.core.btf import Btf, BtfError, Kind
from kpmd.core.codec import Codec, compile_section, compile_type

#: Codecs that are kept, of all objects. Each is bounded by itself, to some MB where it is hostile.
_KEPT = 32

#: Names that an error lists.
_LISTED = 20


class ObjectTypes:
    """The types of one object. Hostile, as the object was: all errors are BtfError.

    Its methods may be called in any thread. The first call takes some milliseconds for large BTF:
    not on the event loop.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._btf: Btf | BtfError | None = None

    @property
    def btf(self) -> Btf:
        """The parsed BTF. Raises BtfError."""
        if self._btf is None:
            try:
                self._btf = Btf(self.raw)
            except BtfError as error:
                self._btf = error
        if isinstance(self._btf, BtfError):
            raise BtfError(str(self._btf)) from self._btf
        return self._btf

    def codec(self, type_id: int) -> Codec:
        """The codec of a type by its id; of a section, an object of its variables.

        Raises BtfError.
        """
        return _compiled(self, type_id)

    def record(self, map_name: str, wanted: str | None) -> Codec | None:
        """The codec of the records of a ring buffer: the struct ``wanted``, or the one that fits.

        That is a struct named as the map, or that a global variable points to (what C programs do
        to have it in the BTF): one whose name holds the map's, or the only one there is. None where
        nothing is wanted and nothing fits. Raises BtfError, also where ``wanted`` is not there.
        """
        if wanted is not None:
            return self.codec(self._struct(wanted))
        found = self._found(map_name)
        if found is None:
            pointed = self.btf.globals_pointing_to_structs()
            named = {struct for variable, struct in pointed if map_name in variable}
            structs = named or {struct for _, struct in pointed}
            if len(structs) != 1:
                return None
            found = self._found(structs.pop())
        return None if found is None else self.codec(found)

    def _found(self, name: str) -> int | None:
        return self.btf.find(name, Kind.STRUCT, Kind.UNION)

    def _struct(self, name: str) -> int:
        found = self._found(name)
        if found is None:
            known = self.btf.structs()
            more = ", …" if len(known) > _LISTED else ""
            listed = ", ".join(known[:_LISTED]) or "none"
            raise BtfError(f"the object has no struct {name!r}; it has: {listed}{more}")
        return found


@lru_cache(maxsize=_KEPT)
def _compiled(types: ObjectTypes, type_id: int) -> Codec:
    btf = types.btf
    if btf.kind(type_id) == Kind.DATASEC:
        return compile_section(btf, btf.name(type_id))
    return compile_type(btf, type_id)
