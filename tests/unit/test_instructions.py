"""What is found in instructions, and what cannot be hidden in them."""

from __future__ import annotations

import struct
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpmd.bpf import helpers, instructions
from kpmd.bpf.rights import Rights
from kpmd.errors import Forbidden, Invalid

RIGHTS = Rights(helpers.HARMLESS, False, False, frozenset(), frozenset(), 0, 1.0)


def insn(code: int, *, src: int = 0, dst: int = 0, off: int = 0, imm: int = 0) -> bytes:
    registers = dst | src << 4 if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhi", code, registers, off, imm)


MOVE, EXIT = insn(0xB7), insn(0x95)


def helper(name: str) -> bytes:
    return insn(0x85, imm=helpers.IDS[name])


def load(src: int, imm: int = 0, second: bytes = bytes(8)) -> bytes:
    return insn(0x18, src=src, imm=imm) + second


def refusal(code: bytes, rights: Rights = RIGHTS) -> Forbidden:
    with pytest.raises(Forbidden) as caught:
        instructions.check("p", code, rights, {7: "bpf_seven", 8: "bpf_eight"}.get)
    return caught.value


def allowed(code: bytes, rights: Rights = RIGHTS) -> None:
    instructions.check("p", code, rights, {7: "bpf_seven", 8: "bpf_eight"}.get)


def test_harmless_program() -> None:
    allowed(MOVE + helper("ktime_get_ns") + load(1, 5) + load(2, 5) + load(0, 9) + load(4) + EXIT)
    allowed(insn(0x85, src=1, imm=1) + EXIT + helper("loop") + EXIT)


def test_refusal_names_program_place_and_all_that_is_refused() -> None:
    code = MOVE + load(0) + helper("probe_write_user") + helper("ktime_get_ns")
    error = refusal(code + helper("send_signal") + helper("probe_write_user") + EXIT)
    assert error.detail == (
        "program p calls the helper bpf_probe_write_user (instruction 3),"
        " which the policy does not allow you"
    )
    assert error.fields == {"refused": ["bpf_probe_write_user", "bpf_send_signal"]}


def test_code_that_is_never_reached_counts() -> None:
    assert refusal(MOVE + EXIT + helper("probe_read_kernel")).fields["refused"] == [
        "bpf_probe_read_kernel"
    ]


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (insn(0x85, imm=100_000), "helper 100000"),
        (insn(0x85, imm=-1), "helper -1"),
        (insn(0x85, imm=0), "helper 0"),
        (insn(0x85, src=2, imm=7), "bpf_seven"),
        (insn(0x85, src=2, imm=99), "kfunc 99"),
        (insn(0x85, src=2, imm=7, off=1), "kfunc"),
        (insn(0x85, src=2, imm=0, off=1), "kfunc"),
        (insn(0x85, src=3, imm=1), "call"),
        (insn(0x85, src=15, imm=1), "call"),
        (insn(0x86, imm=1), "call"),
        (insn(0x8D, imm=1), "call"),
        (insn(0x8E, imm=1), "call"),
        (load(3, 5), "ksym"),
        (load(7, 5), "load"),
        (insn(0x18), "load"),
        (insn(0x18) + helper("ktime_get_ns"), "load"),
    ],
)
def test_refused(code: bytes, what: str) -> None:
    assert refusal(code).fields == {"refused": [what]}


def test_calls_cannot_be_hidden_in_the_second_half_of_a_load() -> None:
    # A jump into it would run it, if the verifier took such a jump.
    assert "64-bit load" in refusal(load(0, second=helper("probe_write_user"))).detail
    # Nor can a first half hide what follows a whole load.
    code = load(0, second=struct.pack("=BBhi", 0, 0, 0, 0x18)) + helper("probe_write_user")
    assert refusal(code).fields == {"refused": ["bpf_probe_write_user"]}
    assert refusal(load(0) + load(0)[:8] + EXIT).fields == {"refused": ["load"]}


@pytest.mark.parametrize("imm", [195896080, 2_001_000_003, 2_002_000_001])
def test_what_libbpf_puts_where_it_found_nothing(imm: int) -> None:
    allowed(insn(0x85, imm=imm))


def test_kfuncs() -> None:
    rights = replace(RIGHTS, kfuncs=frozenset({"bpf_seven"}))
    allowed(insn(0x85, src=2, imm=7), rights)
    allowed(insn(0x85, src=2, imm=0), rights)  # weak, and not there
    assert refusal(insn(0x85, src=2, imm=8), rights).fields == {"refused": ["bpf_eight"]}
    assert refusal(insn(0x85, src=2, imm=7, off=3), rights).fields == {"refused": ["kfunc"]}
    allowed(insn(0x85, src=2, imm=8, off=3), replace(RIGHTS, kfuncs=None))


def test_kernel_variables_take_the_right_to_read() -> None:
    allowed(load(3, 5), replace(RIGHTS, read_kernel=True))


@pytest.mark.parametrize("src", [1, 2, 5, 6])
def test_raw_instructions_name_no_fd(src: int) -> None:
    with pytest.raises(Invalid, match="instruction 1 names a map or BTF") as caught:
        instructions.check_raw(MOVE + load(src, 5) + EXIT)
    assert caught.value.fields["errors"][0]["loc"] == ["source", "instructions"]


def test_raw_instructions_name_no_btf() -> None:
    instructions.check_raw(MOVE + load(3, 5) + load(0, 5) + load(4, 5) + insn(0x85, src=1) + EXIT)
    with pytest.raises(Invalid):
        instructions.check_raw(load(3, 5, insn(0, imm=9)) + EXIT)
    with pytest.raises(Invalid):  # whatever its second half is
        instructions.check_raw(load(1, 5, helper("loop")) + EXIT)


@given(st.binary(max_size=400))
def test_any_bytes(raw: bytes) -> None:
    """The quick search finds what a plain walk finds."""
    expected, at, count = [], 0, len(raw) // 8
    while at < count:
        code, registers, offset, number = struct.unpack_from("=BBhi", raw, at * 8)
        source = registers >> 4 if sys.byteorder == "little" else registers & 15
        if code == 0x18:
            whole = at + 1 < count and raw[at * 8 + 8] == 0
            expected.append((at, code, source, offset, number, whole))
            at += 1
        elif code in (0x85, 0x86, 0x8D, 0x8E):
            expected.append((at, code, source, offset, number, True))
        at += 1
    assert list(instructions.special(raw)) == expected
    with suppress(Forbidden):
        allowed(raw)
    with suppress(Invalid):
        instructions.check_raw(raw)


@pytest.mark.parametrize(
    "code", [MOVE, helper("ktime_get_ns"), load(1)], ids=["move", "call", "load"]
)
def test_a_million_instructions(code: bytes) -> None:
    allowed(code * (1_000_000 * 8 // len(code)))
