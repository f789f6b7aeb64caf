"""What a program's instructions call and refer to: read from their bytes, before the kernel does.

One pass over all instructions, reachable or not, subprograms included: libbpf appends those to each
program that calls them. Encodings: ``include/uapi/linux/bpf.h``, Documentation/bpf/standardization.
May import: ``kpmd.bpf.{helpers,rights}``, ``kpmd.errors``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from kpmd.bpf.helpers import NAMES
from kpmd.bpf.rights import Rights
from kpmd.errors import Forbidden, Invalid

SIZE = 8

#: A 64-bit load takes two slots (BPF_LD | BPF_IMM | BPF_DW). Calls: BPF_JMP or BPF_JMP32 with
#: BPF_CALL, of a number or (BPF_X) of what a register holds.
LOAD, CALL = 0x18, 0x85
_FOUND = re.compile(rb"\x18.?|[\x85\x86\x8d\x8e]", re.DOTALL)

#: src_reg of a 64-bit load: what its number is (BPF_PSEUDO_*).
MAP_FD, MAP_VALUE, KERNEL_VARIABLE, _FUNC, _MAP_INDEX, _MAP_INDEX_VALUE = range(1, 7)
MAPS = frozenset({MAP_FD, MAP_VALUE})
INDEXED = frozenset({_MAP_INDEX, _MAP_INDEX_VALUE})
#: src_reg of a call.
_HELPER, _SUBPROGRAM, _KFUNC = range(3)

#: Where libbpf found no type, map or kfunc, it puts a call of a number that no helper has: code
#: that is never reached may hold it, and the verifier refuses it elsewhere (libbpf's src/libbpf.c
#: and src/relo_core.c).
_POISON, _POISONS = 195896080, range(2_001_000_000, 2_003_000_000)

#: Names in one error.
_MOST_NAMED = 16

#: src_reg lies beside dst_reg in one byte, in the half that the machine's byte order says.
_SHIFT = 4 if sys.byteorder == "little" else 0


class Special(NamedTuple):
    """An instruction that matters: its place, opcode, source register, offset and number."""

    at: int
    code: int
    source: int
    offset: int
    number: int
    #: False for a 64-bit load without its second half.
    whole: bool


def special(raw: bytes | bytearray, passed: Container[int] = frozenset()) -> Iterator[Special]:
    """The 64-bit loads and all kinds of calls, in order; nothing in the second half of a load.

    Calls of the helpers ``passed`` are left out.
    """
    whole = len(raw) // SIZE * SIZE
    codes, registers = bytes(raw[:whole:SIZE]), raw[1:whole:SIZE]
    view = memoryview(raw)[:whole]
    offsets, numbers = view.cast("h")[1 :: SIZE // 2], view.cast("i")[1 :: SIZE // 4]
    for found in _FOUND.finditer(codes):
        index = found.start()
        code, source, number = codes[index], registers[index] >> _SHIFT & 15, numbers[index]
        if code == CALL and source == _HELPER and number in passed:
            continue
        complete = code != LOAD or found[0][1:] == b"\0"
        yield Special(index, code, source, offsets[index], number, complete)


def names_btf(raw: bytes | bytearray, load: Special) -> bool:
    """Whether a 64-bit load is of a module's variable: its second half names the BTF by an FD."""
    start = (load.at + 1) * SIZE + 4
    return load.source == KERNEL_VARIABLE and any(raw[start : start + 4])


def check_raw(raw: bytes) -> None:
    """Raise Invalid where raw instructions name a file descriptor: those are the daemon's."""
    for each in special(raw):
        named = each.source in MAPS | INDEXED or names_btf(raw, each)
        if each.code == LOAD and named:
            raise Invalid.at(
                ["source", "instructions"],
                f"instruction {each.at} names a map or BTF by a file descriptor, and raw"
                " instructions have none: send an ELF object",
            )


def check(
    name: str, raw: bytes | bytearray, rights: Rights, kfunc_name: Callable[[int], str | None]
) -> None:
    """Raise Forbidden where a program calls or reads what the rights do not hold.

    ``kfunc_name`` gives the name of a kernel function by its BTF id, None for one that is none.
    """
    first, refused = "", dict[str, None]()
    passed = {number for number in NAMES if rights.why_not_helper(number) is None}
    for each in special(raw, passed):
        found = _refusal(each, rights, kfunc_name)
        if found is not None:
            what, words, why = found
            first = first or f"{words} (instruction {each.at}), {why}"
            refused[what] = None
            if each.code == CALL and each.source == _HELPER:
                passed.add(each.number)  # named already
            if len(refused) == _MOST_NAMED:
                break
    if refused:
        raise Forbidden(f"program {name} {first}", refused=list(refused))


def _refusal(
    each: Special, rights: Rights, kfunc_name: Callable[[int], str | None]
) -> tuple[str, str, str] | None:
    """What is refused, what it does and why not."""
    not_you = "which the policy does not allow you"
    if each.code == LOAD:
        if not each.whole or each.source > _MAP_INDEX_VALUE:
            return "load", "holds a 64-bit load that cannot be read", "so it cannot be checked"
        if each.source == KERNEL_VARIABLE and not rights.read_kernel:
            why = "which reads kernel memory: the policy does not allow you that"
            return "ksym", f"uses the kernel variable with the BTF id {each.number}", why
        return None
    if each.code != CALL or each.source > _KFUNC:
        return "call", "holds a call of which nobody can tell what it calls", not_you
    if each.source == _SUBPROGRAM:
        return None
    if each.source == _HELPER:
        if each.number == _POISON or each.number in _POISONS:
            return None
        name = NAMES.get(each.number)
        what = f"bpf_{name}" if name else f"helper {each.number}"
        words = f"calls the {'helper ' if name else ''}{what}"
        return what, words, rights.why_not_helper(each.number) or not_you
    # The kfunc of number 0: one that the kernel lacks, in code that is never reached.
    if rights.kfuncs is None or (each.number == 0 and each.offset == 0):
        return None
    if each.offset:
        return "kfunc", "calls a function of a kernel module", not_you
    called = kfunc_name(each.number) or f"kfunc {each.number}"
    if called in rights.kfuncs:
        return None
    return called, f"calls the kernel function {called}", not_you
