"""libbpf through ctypes: only what the loader needs, with libbpf 1.0's error convention.

Runs in the loader's short-lived processes alone: libbpf is not made for hostile objects, so only a
parser gives it one, and nothing here is ever called in the daemon's own process. May import:
``kpmd.bpf.abi``, ``kpmd.errors``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_void_p

from kpmd.bpf.abi import AttachType, ProgType
from kpmd.errors import NotSupported

SONAME = "libbpf.so.1"

#: CO-RE types are looked up here, and here only: where a type is missing, libbpf 1.1 goes on to the
#: modules' BTF, and fails as a whole if that takes CAP_SYS_ADMIN.
_VMLINUX_BTF = b"/sys/kernel/btf/vmlinux"

#: The object's name for libbpf, and so the prefix of the internal maps' names in the kernel.
_OBJECT_NAME = b"kpmd"

#: The longest chain of typedefs and qualifiers that is followed: BTF may be a loop.
_MAX_CHAIN = 32

# enum btf_kind, and what is stripped to get to the type below.
_KIND_INT, _KIND_PTR, _KIND_ENUM, _KIND_FUNC, _KIND_DATASEC, _KIND_ENUM64 = 1, 2, 6, 12, 15, 19
_QUALIFIERS = frozenset({8, 9, 10, 11, 18})  # typedef, volatile, const, restrict, type tag
_INT_SIGNED, _INT_BOOL = 1, 4
_SCALAR_SIZES = frozenset({1, 2, 4, 8})

_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "bpf_object__open_mem": (c_void_p, (c_char_p, c_size_t, c_void_p)),
    "bpf_object__load": (c_int, (c_void_p,)),
    "bpf_object__close": (None, (c_void_p,)),
    "bpf_object__btf": (c_void_p, (c_void_p,)),
    "bpf_object__next_program": (c_void_p, (c_void_p, c_void_p)),
    "bpf_object__next_map": (c_void_p, (c_void_p, c_void_p)),
    "bpf_program__name": (c_char_p, (c_void_p,)),
    "bpf_program__section_name": (c_char_p, (c_void_p,)),
    "bpf_program__autoload": (c_bool, (c_void_p,)),
    "bpf_program__set_autoload": (c_int, (c_void_p, c_bool)),
    "bpf_program__set_type": (c_int, (c_void_p, c_int)),
    "bpf_program__set_expected_attach_type": (c_int, (c_void_p, c_int)),
    "bpf_program__set_log_level": (c_int, (c_void_p, c_uint32)),
    "bpf_program__set_log_buf": (c_int, (c_void_p, c_void_p, c_size_t)),
    "bpf_program__insn_cnt": (c_size_t, (c_void_p,)),
    "bpf_program__fd": (c_int, (c_void_p,)),
    "bpf_map__name": (c_char_p, (c_void_p,)),
    "bpf_map__fd": (c_int, (c_void_p,)),
    "bpf_map__type": (c_uint32, (c_void_p,)),
    "bpf_map__key_size": (c_uint32, (c_void_p,)),
    "bpf_map__value_size": (c_uint32, (c_void_p,)),
    "bpf_map__max_entries": (c_uint32, (c_void_p,)),
    "bpf_map__set_max_entries": (c_int, (c_void_p, c_uint32)),
    "bpf_map__pin_path": (c_char_p, (c_void_p,)),
    "bpf_map__is_internal": (c_bool, (c_void_p,)),
    "bpf_map__inner_map": (c_void_p, (c_void_p,)),
    "bpf_map__initial_value": (c_void_p, (c_void_p, c_void_p)),
    "bpf_map__btf_key_type_id": (c_uint32, (c_void_p,)),
    "bpf_map__btf_value_type_id": (c_uint32, (c_void_p,)),
    "btf__raw_data": (c_void_p, (c_void_p, c_void_p)),
    "btf__new": (c_void_p, (c_char_p, c_uint32)),
    "btf__find_by_name_kind": (c_int32, (c_void_p, c_char_p, c_uint32)),
    "btf__type_by_id": (c_void_p, (c_void_p, c_uint32)),
    "btf__name_by_offset": (c_char_p, (c_void_p, c_uint32)),
    "libbpf_num_possible_cpus": (c_int, ()),
}


class _OpenOpts(ctypes.Structure):
    """struct bpf_object_open_opts, up to and with ``btf_custom_path``."""

    _fields_ = (
        ("sz", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", c_bool),
        ("pin_root_path", c_char_p),
        ("removed", c_uint32),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
    )


class _BtfType(ctypes.Structure):
    """struct btf_type; what follows it depends on the kind."""

    _fields_ = (("name_off", c_uint32), ("info", c_uint32), ("size", c_uint32))


class _VarSecinfo(ctypes.Structure):
    """struct btf_var_secinfo, the elements of a BTF_KIND_DATASEC."""

    _fields_ = (("type", c_uint32), ("offset", c_uint32), ("size", c_uint32))


class LibbpfError(OSError):
    """A libbpf call failed; ``errno`` is what it said, its words went to standard error."""

    def __init__(self, number: int, call: str) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call

    @property
    def number(self) -> int:
        """The errno; never None."""
        return self.errno or 0


class Library:
    """The loaded libbpf. Raises NotSupported where it is missing or too old."""

    def __init__(self, soname: str = SONAME) -> None:
        missing = f"install libbpf 1.0 or newer ({soname}): kpmd reads ELF objects with it"
        try:
            self._lib = ctypes.CDLL(soname, use_errno=True)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._lib, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NotSupported(f"{missing}; {error}", needs=soname) from error

    def call(self, name: str, *arguments: object) -> int:
        """A call that gives 0 or more; raises LibbpfError when it gives less."""
        ctypes.set_errno(0)
        result: int = getattr(self._lib, name)(*arguments)
        if result < 0:
            raise LibbpfError(ctypes.get_errno() or -result, name)
        return result

    def get(self, name: str, *arguments: object) -> object:
        """A call that cannot fail, or says so by None."""
        ctypes.set_errno(0)
        return getattr(self._lib, name)(*arguments)

    def text(self, name: str, *arguments: object) -> str:
        """A call that gives a C string; bytes that are not ASCII are shown as escapes."""
        raw = self.get(name, *arguments)
        return raw.decode("ascii", "backslashreplace") if isinstance(raw, bytes) else ""

    def open(self, elf: bytes) -> Object:
        """Parse an ELF object. The bytes must outlive the object, so it holds them."""
        opts = _OpenOpts(sz=ctypes.sizeof(_OpenOpts), object_name=_OBJECT_NAME)
        if os.access(_VMLINUX_BTF, os.R_OK):
            opts.btf_custom_path = _VMLINUX_BTF
        ctypes.set_errno(0)
        handle = self._lib.bpf_object__open_mem(elf, len(elf), ctypes.byref(opts))
        if not handle:
            raise LibbpfError(ctypes.get_errno(), "bpf_object__open_mem")
        return Object(self, handle, elf)

    def warm(self, elf: bytes) -> None:
        """Load an object of kpmd's own and forget it: libbpf remembers what the kernel can do."""
        try:
            loaded = self.open(elf)
        except LibbpfError:
            return
        with contextlib.suppress(LibbpfError):
            for program in loaded.programs():
                program.set_type(ProgType.KPROBE, AttachType.NONE)
            loaded.load()
        loaded.close()

    def types(self, raw: bytes) -> int | None:
        """BTF to be looked things up in; None where it cannot be read. Never freed."""
        handle = self.get("btf__new", raw, len(raw))
        return handle if isinstance(handle, int) else None

    def function_name(self, types: int, number: int) -> str | None:
        """The name of the function of this id."""
        address = self.get("btf__type_by_id", types, number) if number > 0 else None
        if not isinstance(address, int):
            return None
        found = _BtfType.from_address(address)
        if found.info >> 24 & 0x1F != _KIND_FUNC:
            return None
        return self.text("btf__name_by_offset", types, found.name_off)


class Program:
    """A ``struct bpf_program``."""

    def __init__(self, lib: Library, handle: int) -> None:
        self._lib, self._handle = lib, handle
        self.name = lib.text("bpf_program__name", handle)
        self.section = lib.text("bpf_program__section_name", handle)
        self.autoload = bool(lib.get("bpf_program__autoload", handle))
        self.instructions = lib.call("bpf_program__insn_cnt", handle)

    def set_autoload(self, wanted: bool) -> None:
        """Whether loading the object loads this program."""
        self._lib.call("bpf_program__set_autoload", self._handle, wanted)

    def set_type(self, kind: int, attach: int) -> None:
        """The program's type and expected attach type, whatever libbpf made of the section."""
        self._lib.call("bpf_program__set_type", self._handle, kind)
        self._lib.call("bpf_program__set_expected_attach_type", self._handle, attach)

    def set_log(self, address: int, size: int, level: int) -> None:
        """Where the verifier writes; at level 0 only when it refuses the program."""
        self._lib.call("bpf_program__set_log_buf", self._handle, address, size)
        self._lib.call("bpf_program__set_log_level", self._handle, level)

    def fd(self) -> int:
        """The loaded program's FD, which belongs to libbpf."""
        return self._lib.call("bpf_program__fd", self._handle)


class Map:
    """A ``struct bpf_map``."""

    def __init__(self, lib: Library, handle: int) -> None:
        self._lib, self._handle = lib, handle
        self.internal = bool(lib.get("bpf_map__is_internal", handle))
        name = lib.text("bpf_map__name", handle)
        # "kpmd.rodata" for the internal map of .rodata; the section's own name is the useful one.
        self.name = name[name.find(".") :] if self.internal and "." in name else name
        self.pinned = lib.get("bpf_map__pin_path", handle) is not None
        self.type = lib.call("bpf_map__type", handle)
        self.key_size = lib.call("bpf_map__key_size", handle)
        self.value_size = lib.call("bpf_map__value_size", handle)
        # Asked for before the load, in which libbpf forgets them for some types.
        self.key_type = lib.get("bpf_map__btf_key_type_id", handle)
        self.value_type = lib.get("bpf_map__btf_value_type_id", handle)
        inner = lib.get("bpf_map__inner_map", handle)
        self.inner = Map(lib, inner) if isinstance(inner, int) else None

    @property
    def max_entries(self) -> int:
        """The map's size as it will be created."""
        return self._lib.call("bpf_map__max_entries", self._handle)

    def set_max_entries(self, size: int) -> None:
        """Change the map's size before it is created."""
        self._lib.call("bpf_map__set_max_entries", self._handle, size)

    def initial_value(self) -> tuple[int, int] | None:
        """Address and size of an internal map's content before the load."""
        size = c_size_t(0)
        address = self._lib.get("bpf_map__initial_value", self._handle, ctypes.byref(size))
        return (address, size.value) if isinstance(address, int) else None

    def fd(self) -> int:
        """The created map's FD, which belongs to libbpf."""
        return self._lib.call("bpf_map__fd", self._handle)


class Object:
    """A parsed ``struct bpf_object``. A parser never frees it: it ends after one object."""

    def __init__(self, lib: Library, handle: int, elf: bytes) -> None:
        self._lib, self._handle, self._elf = lib, handle, elf

    def _each(self, following: str) -> Iterator[int]:
        handle: object = None
        while isinstance(handle := self._lib.get(following, self._handle, handle), int):
            yield handle

    def programs(self) -> list[Program]:
        """All programs, in the object's order; subprograms are none."""
        return [Program(self._lib, handle) for handle in self._each("bpf_object__next_program")]

    def maps(self) -> list[Map]:
        """All maps, the internal ones included."""
        return [Map(self._lib, handle) for handle in self._each("bpf_object__next_map")]

    def variables(self) -> Variables:
        """The global variables, as far as the object's BTF describes them."""
        btf = self._lib.get("bpf_object__btf", self._handle)
        return Variables(self._lib, btf if isinstance(btf, int) else None, self.maps())

    def types(self) -> bytes:
        """Its BTF, with the offsets of variables that libbpf has filled in; empty without any."""
        size = c_uint32()
        btf = self._lib.get("bpf_object__btf", self._handle)
        raw = btf and self._lib.get("btf__raw_data", btf, ctypes.byref(size))
        return ctypes.string_at(raw, size.value) if isinstance(raw, int) else b""

    def possible_cpus(self) -> int:
        """How many copies a per-CPU map has of a value."""
        return self._lib.call("libbpf_num_possible_cpus")

    def load(self) -> None:
        """Create the maps and load the programs."""
        self._lib.call("bpf_object__load", self._handle)

    def close(self) -> None:
        """Free it, and close its FDs."""
        self._lib.get("bpf_object__close", self._handle)


class Variables:
    """The global variables in .rodata, .data and .bss: found by name, set before the load.

    BTF is as hostile as the rest of the object: every id, offset and size is checked.
    """

    def __init__(self, lib: Library, btf: int | None, maps: list[Map]) -> None:
        self._lib, self._btf = lib, btf
        self.known = btf is not None
        # name -> address of its bytes, size, BTF type
        self._found: dict[str, tuple[int, int, int]] = {}
        for each in maps:
            if btf is not None and each.internal and each.name.startswith((".ro", ".da", ".bs")):
                self._collect(each)

    def _type(self, number: int) -> tuple[_BtfType, int] | None:
        """A type and its address; None for void and where there is no such type."""
        address = self._lib.get("btf__type_by_id", self._btf, number) if number else None
        if not isinstance(address, int):
            return None
        return _BtfType.from_address(address), address

    def _collect(self, section: Map) -> None:
        number = self._lib.get(
            "btf__find_by_name_kind", self._btf, section.name.encode(), _KIND_DATASEC
        )
        content = section.initial_value()
        found = self._type(number) if isinstance(number, int) and number > 0 else None
        if found is None or content is None:
            return
        start, size = content
        kind, address = found
        elements = _VarSecinfo * (kind.info & 0xFFFF)
        for element in elements.from_address(address + ctypes.sizeof(_BtfType)):
            variable = self._type(element.type)
            if variable is None or element.offset + element.size > size:
                continue
            name = self._lib.text("btf__name_by_offset", self._btf, variable[0].name_off)
            self._found.setdefault(name, (start + element.offset, element.size, variable[0].size))

    def set(self, name: str, value: int | bytes) -> None:
        """Write a variable's first value. Raises KeyError, or ValueError with the reason."""
        address, size, kind = self._found[name]
        if isinstance(value, bytes):
            if len(value) != size:
                raise ValueError(f"the variable has {size} bytes, and {len(value)} were given")
            ctypes.memmove(address, value, size)
            return
        lowest, highest = self._range(kind, size)
        if not lowest <= value <= highest:
            raise ValueError(f"the variable takes {lowest} to {highest}, not {value}")
        ctypes.memmove(address, (value % (1 << (8 * size))).to_bytes(size, sys.byteorder), size)

    def _range(self, number: int, size: int) -> tuple[int, int]:
        """The numbers that fit into a variable of this type."""
        found = self._type(number)
        for _ in range(_MAX_CHAIN):
            if found is None or (found[0].info >> 24 & 0x1F) not in _QUALIFIERS:
                break
            found = self._type(found[0].size)
        kind = found[0].info >> 24 & 0x1F if found is not None else 0
        bits = 8 * size
        whole = (0, (1 << bits) - 1)
        signed = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if bits else whole
        if found is None or size not in _SCALAR_SIZES:
            kind = 0
        if kind == _KIND_PTR:
            return whole
        if found is not None and found[0].size == size:
            if kind == _KIND_INT:
                # One word follows: encoding, offset in bits, and the number of bits.
                word = c_uint32.from_address(found[1] + ctypes.sizeof(_BtfType)).value
                encoding = word >> 24 & 0xF
                if encoding & _INT_BOOL:
                    return (0, 1)
                return signed if encoding & _INT_SIGNED else whole
            if kind in (_KIND_ENUM, _KIND_ENUM64):
                # Older compilers do not say whether an enum is signed: take both.
                return (signed[0], whole[1])
        raise ValueError(f"the variable is no number; give its {size} bytes")
