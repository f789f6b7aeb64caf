"""The loader's processes on each kernel: what loads, what is refused before the kernel sees it."""

from __future__ import annotations

import contextlib
import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kpmd import builtin
from kpmd.bpf import helpers
from kpmd.bpf.kernel import LinuxKernel, Loaded
from kpmd.bpf.loader import LoaderLimits
from kpmd.bpf.rights import Rights
from kpmd.errors import Forbidden, Invalid, VerifierRejected
from tests.kernel.conftest import OBJECTS, expects_multi

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")

RIGHTS = Rights(
    helpers.HARMLESS,
    read_kernel=False,
    read_user=False,
    kfuncs=frozenset(),
    map_types=frozenset({"array", "hash", "percpu_hash", "prog_array", "array_of_maps"}),
    map_bytes=64 << 20,
    seconds=120.0,
)
READING = replace(RIGHTS, read_kernel=True)


@pytest.fixture(scope="module")
def kernel() -> Iterator[LinuxKernel]:
    # As the daemon does: kernels before 5.11 count BPF memory as locked memory.
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with contextlib.suppress(ValueError):  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    # A software-emulated machine takes 20 times as long.
    ready = LinuxKernel(LoaderLimits(seconds=120, cpu_seconds=120))
    ready.start()
    yield ready
    ready.close()


def mechanism() -> str:
    return "kprobe_multi" if expects_multi() else "perf_event"


def load(
    kernel: LinuxKernel, name: str, rights: Rights | None, *programs: str, want_log: bool = False
) -> Loaded:
    elf = (
        builtin.read(name, func_ip=expects_multi())
        if name == "count"
        else (OBJECTS / f"{name}.bpf.o").read_bytes()
    )
    wanted = programs or None
    return kernel.load_object(elf, wanted, None, {}, {}, want_log, mechanism(), rights)


def insn(code: int, *, src: int = 0, dst: int = 0, imm: int = 0) -> bytes:
    registers = dst | src << 4 if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhi", code, registers, 0, imm)


RETURN = insn(0xB7) + insn(0x95)
READS = b"".join(
    [
        insn(0xBF, dst=1, src=10),
        insn(0x07, dst=1, imm=-8),
        insn(0xB7, dst=2, imm=8),
        insn(0xBF, dst=3, src=10),
        insn(0x85, imm=helpers.IDS["probe_read_kernel"]),
        RETURN,
    ]
)


def raw(kernel: LinuxKernel, code: bytes, rights: Rights | None) -> int:
    """Load instructions; returns the kernel's id of the program."""
    loaded = kernel.load_instructions(
        code, "raw", "GPL", "kprobe_multi", False, mechanism(), rights
    )
    loaded.close()
    return loaded.programs[0].info.kernel_id


@pytest.mark.parametrize("name", ["count", "core", "globals", "rights", "tails", "nobtf"])
@pytest.mark.parametrize("rights", [None, READING])
def test_objects_load(kernel: LinuxKernel, name: str, rights: Rights | None) -> None:
    loaded = load(kernel, name, rights, want_log=True)
    assert all("processed" in (each.log or "") for each in loaded.programs)
    loaded.close()


def test_a_tail_call_and_a_map_in_a_map_are_filled(kernel: LinuxKernel) -> None:
    loaded = load(kernel, "tails", READING)
    maps = {each.name: each for each in loaded.maps}
    for name in ("jumps", "outer"):
        assert maps[name].details.max_entries == 2
    ids = {each.name: each.info.map_ids for each in loaded.programs}
    assert maps["jumps"].details.kernel_id in ids["jumper"]
    assert maps["outer"].details.kernel_id in ids["jumper"]
    loaded.close()


@pytest.mark.parametrize(
    ("name", "programs", "culprit"),
    [
        ("rights", ("reads",), "reads"),
        ("rights", ("reads_below",), "reads_below"),
        ("rights", ("harmless", "reads"), "reads"),
        ("tails", (), "target"),
        ("core", (), "core"),
    ],
)
def test_what_reads_kernel_memory_is_refused(
    kernel: LinuxKernel, name: str, programs: tuple[str, ...], culprit: str
) -> None:
    with pytest.raises(Forbidden, match=f"program {culprit} calls the helper") as caught:
        load(kernel, name, RIGHTS, *programs).close()
    assert caught.value.fields == {"refused": ["bpf_probe_read_kernel"]}


def test_a_refused_program_gets_no_id(kernel: LinuxKernel) -> None:
    """The verifier would take it: the kernel never saw it."""
    raw(kernel, READS, READING)
    for _ in range(5):  # something else on this machine may load programs too
        first = raw(kernel, RETURN, RIGHTS)
        with pytest.raises(Forbidden):
            raw(kernel, READS, RIGHTS)
        if raw(kernel, RETURN, RIGHTS) == first + 1:
            return
    pytest.fail("the kernel counted a program that was refused")


def test_raw_instructions_reach_no_map(kernel: LinuxKernel) -> None:
    """They were loaded in the daemon once, where a number is a map of somebody."""
    loaded = load(kernel, "nobtf", None)
    number = loaded.maps[0].fd.fileno()
    for rights in (None, RIGHTS):
        with pytest.raises(Invalid, match="names a map"):
            raw(kernel, insn(0x18, dst=1, src=1, imm=number) + bytes(8) + RETURN, rights)
    loaded.close()


def test_verifier_log(kernel: LinuxKernel) -> None:
    for want_log in (False, True):
        with pytest.raises(VerifierRejected) as caught:
            load(kernel, "reject", RIGHTS, want_log=want_log).close()
        assert "program wild" in caught.value.detail
        assert "invalid mem access" in caught.value.fields["verifier_log"]


@contextmanager
def ptrace_scope(wanted: int) -> Iterator[None]:
    before = YAMA.read_text()
    YAMA.write_text(str(wanted))
    try:
        yield
    finally:
        YAMA.write_text(before)


@pytest.mark.parametrize("scope", [0, 1])
def test_yama(kernel: LinuxKernel, scope: int) -> None:
    """Debian has it; who may read whose memory is no matter where it is not built in."""
    if YAMA.exists():
        with ptrace_scope(scope):
            load(kernel, "globals", RIGHTS).close()
    else:
        load(kernel, "globals", RIGHTS).close()
