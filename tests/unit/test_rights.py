"""What rights hold, and the table of helpers."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kpmd.bpf import helpers
from kpmd.bpf.maps import memory_of
from kpmd.bpf.rights import Rights
from kpmd.errors import Forbidden

NONE = Rights(frozenset(), False, False, frozenset(), frozenset(), 0, 1.0)


def test_helpers_are_those_of_the_kernels_header() -> None:
    header = Path("/usr/include/linux/bpf.h").read_text()
    mapper = header[header.index("BPF_FUNC_MAPPER(FN") :]
    names = re.findall(r"\bFN\((\w+)[,)]", mapper.partition("BPF_ENUM_FN")[0])
    known = min(len(names), len(helpers.IDS) + 1)
    assert known > 200
    assert [helpers.NAMES[number] for number in range(1, known)] == names[1:known]


@pytest.mark.parametrize(
    ("name", "number"),
    [("map_lookup_elem", 1), ("probe_read", 4), ("probe_write_user", 36), ("override_return", 58),
     ("send_signal", 109), ("probe_read_kernel", 113), ("user_ringbuf_drain", 209),
     ("cgrp_storage_delete", 211)],
)  # fmt: skip
def test_numbers_of_helpers(name: str, number: int) -> None:
    assert helpers.IDS[name] == number


def test_no_helper_is_harmless_that_is_not() -> None:
    groups = helpers.HARMLESS, helpers.READS_KERNEL, helpers.READS_USER
    assert all(group <= set(helpers.IDS) for group in groups)
    assert not helpers.HARMLESS & (helpers.READS_KERNEL | helpers.READS_USER)
    dangerous = "probe_write_user override_return send_signal send_signal_thread trace_printk"
    dangerous += " trace_vprintk sys_bpf sys_close task_storage_get kptr_xchg kallsyms_lookup_name"
    assert not helpers.HARMLESS & set(dangerous.split())


@pytest.mark.parametrize(
    ("name", "rights", "allowed"),
    [
        ("ktime_get_ns", NONE, False),
        ("ktime_get_ns", replace(NONE, helpers=frozenset({"ktime_get_ns"})), True),
        ("probe_write_user", replace(NONE, helpers=helpers.HARMLESS), False),
        ("probe_write_user", replace(NONE, helpers=None), True),
        # What reads takes its switch, which is enough: named or not.
        ("probe_read_kernel", replace(NONE, helpers=None), False),
        ("probe_read_kernel", replace(NONE, helpers=frozenset({"probe_read_kernel"})), False),
        ("probe_read_kernel", replace(NONE, read_kernel=True), True),
        ("probe_read_user", replace(NONE, read_kernel=True), False),
        ("probe_read_user", replace(NONE, read_user=True), True),
        # The old one reads both.
        ("probe_read", replace(NONE, read_kernel=True), False),
        ("probe_read", replace(NONE, read_user=True), False),
        ("probe_read", replace(NONE, read_user=True, read_kernel=True), True),
    ],
)
def test_helpers(name: str, rights: Rights, allowed: bool) -> None:
    assert (rights.why_not_helper(helpers.IDS[name]) is None) is allowed


@pytest.mark.parametrize("number", [-1, 0, 212, 1 << 30])
def test_unknown_helpers(number: int) -> None:
    assert replace(NONE, helpers=None, read_kernel=True).why_not_helper(number) is not None


def test_types_of_maps() -> None:
    rights = replace(NONE, map_types=frozenset({"array"}))
    rights.check_map("counts", 2)
    replace(NONE, map_types=None).check_map("counts", 7777)
    with pytest.raises(Forbidden, match="map stacks is of type stack_trace") as caught:
        rights.check_map("stacks", 7)
    assert caught.value.fields == {"refused": ["stack_trace"]}
    with pytest.raises(Forbidden, match="type_7777"):
        rights.check_map("new", 7777)


@pytest.mark.parametrize(
    "rights",
    [NONE, Rights(None, True, True, None, None, sys.maxsize, float("inf")),
     Rights(helpers.HARMLESS, True, False, frozenset({"bpf_rcu_read_lock"}), frozenset(), 5, 0.5)],
)  # fmt: skip
def test_there_and_back(rights: Rights) -> None:
    assert Rights.decoded(rights.encoded()) == rights


@pytest.mark.parametrize(
    ("shape", "needed"),
    [
        ((2, 4, 8, 100), 1200),  # array
        ((1, 4, 8, 100), 7600),  # hash
        ((5, 4, 8, 100), 10_000),  # per-CPU hash, four CPUs
        ((6, 4, 5, 1), 4 + 32 + 64),  # per-CPU array: each value is rounded up to 8 bytes
        ((27, 0, 0, 1 << 20), 1 << 20),  # ring buffer
        ((33, 0, 0, 3), 3 * 4096),  # arena
    ],
)
def test_memory_of_maps(shape: tuple[int, int, int, int], needed: int) -> None:
    assert memory_of(*shape, cpus=4) == needed
