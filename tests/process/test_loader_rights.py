"""What rights let through the loader, on this machine's kernel: objects and raw instructions.

Needs root, bpf(2), libbpf.so.1 and libseccomp.so.2; fails where they are missing.
"""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kpmd.bpf import helpers
from kpmd.bpf.abi import MAX_INSNS, AttachType
from kpmd.bpf.libbpf import Library
from kpmd.bpf.loader import InstructionsRequest, Loader, LoaderLimits, ObjectRequest
from kpmd.bpf.objects import map_info
from kpmd.bpf.rights import Rights
from kpmd.errors import (
    BadObject,
    Forbidden,
    Invalid,
    KernelError,
    KpmdError,
    Quota,
    TooLarge,
    VerifierRejected,
)

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "tests" / "objects"
RIGHTS = Rights(
    helpers.HARMLESS,
    read_kernel=False,
    read_user=False,
    kfuncs=frozenset(),
    map_types=frozenset({"array", "hash", "prog_array", "array_of_maps"}),
    map_bytes=1 << 20,
    seconds=10.0,
)


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    ready = Loader(LoaderLimits())
    ready.start()
    yield ready
    ready.close()


def elf(name: str) -> bytes:
    return (OBJECTS / f"{name}.bpf.o").read_bytes()


def names(loader: Loader, name: str, rights: Rights | None, *programs: str) -> list[str]:
    loaded = loader.load(ObjectRequest(elf(name), programs=programs or None, rights=rights))
    loaded.close()
    return [each.name for each in loaded.programs]


def refused(loader: Loader, name: str, rights: Rights, *programs: str) -> KpmdError:
    with pytest.raises(KpmdError) as caught:
        names(loader, name, rights, *programs)
    return caught.value


def insn(code: int, *, src: int = 0, dst: int = 0, off: int = 0, imm: int = 0) -> bytes:
    registers = dst | src << 4 if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhi", code, registers, off, imm)


RETURN = insn(0xB7) + insn(0x95)
#: Reads 8 bytes of the kernel's memory at the program's own stack, which the verifier takes.
READS = b"".join(
    [
        insn(0xBF, dst=1, src=10),
        insn(0x07, dst=1, imm=-8),
        insn(0xB7, dst=2, imm=8),
        insn(0xBF, dst=3, src=10),
        insn(0x85, imm=113),
        RETURN,
    ]
)


def run(loader: Loader, code: bytes, rights: Rights | None = None, **more: Any) -> str | None:
    """Load raw instructions; returns their log."""
    request = InstructionsRequest(code, "raw", "GPL", AttachType.NONE, rights=rights, **more)
    program = loader.load_instructions(request)
    assert os.readlink(f"/proc/self/fd/{program.fd.fileno()}") == "anon_inode:bpf-prog"
    program.fd.close()
    assert (program.name, program.attach) == ("raw", AttachType.NONE)
    return program.log


def failure(loader: Loader, code: bytes, rights: Rights | None = None, **more: Any) -> KpmdError:
    with pytest.raises(KpmdError) as caught:
        run(loader, code, rights, **more)
    return caught.value


# --- objects ---------------------------------------------------------------------------------


def test_harmless(loader: Loader) -> None:
    assert names(loader, "rights", RIGHTS) == ["harmless"]
    assert names(loader, "globals", RIGHTS) == ["entry", "leave"]
    # A kernel function that is not there is none that has to be allowed.
    assert names(loader, "externs", RIGHTS) == ["externs"]


@pytest.mark.parametrize(
    ("program", "refusals"),
    [
        ("reads", ["bpf_probe_read_kernel"]),
        ("reads_below", ["bpf_probe_read_kernel"]),
        ("reads_users", ["bpf_probe_read_user"]),
        ("writes", ["bpf_probe_write_user", "bpf_send_signal"]),
    ],
)
def test_helpers(loader: Loader, program: str, refusals: list[str]) -> None:
    for programs in ((program,), ("harmless", program), (program, "harmless")):
        error = refused(loader, "rights", RIGHTS, *programs)
        assert type(error) is Forbidden
        assert error.fields == {"refused": refusals}
        assert error.detail.startswith(f"program {program} calls the helper {refusals[0]} (")
    if program == "writes":
        return  # takes CAP_SYS_ADMIN, which the loader does not have
    assert names(loader, "rights", None, program) == [program]
    everything = replace(RIGHTS, helpers=None, read_kernel=True, read_user=True)
    assert names(loader, "rights", everything, program) == [program]


def test_what_is_not_loaded_is_not_looked_at(loader: Loader) -> None:
    assert names(loader, "rights", RIGHTS, "harmless") == ["harmless"]


def test_tail_calls_reach_checked_programs_only(loader: Loader) -> None:
    error = refused(loader, "tails", RIGHTS)
    assert error.detail.startswith("program target calls the helper bpf_probe_read_kernel")
    reading = replace(RIGHTS, read_kernel=True)
    assert names(loader, "tails", reading) == ["target", "jumper"]
    # Without its target the array cannot be filled.
    assert type(refused(loader, "tails", RIGHTS, "jumper")) is BadObject


def test_types_of_maps(loader: Loader) -> None:
    for kind in ("prog_array", "array_of_maps"):
        assert RIGHTS.map_types is not None
        rights = replace(RIGHTS, read_kernel=True, map_types=RIGHTS.map_types - {kind})
        assert refused(loader, "tails", rights).fields == {"refused": [kind]}


def test_bytes_of_maps(loader: Loader) -> None:
    # A hash of 8 entries (4 + 8 + 64 bytes each), and three arrays of one value each.
    loaded = loader.load(ObjectRequest(elf("globals")))
    sections = [map_info(each.fd).value_size for each in loaded.maps if each.name[0] == "."]
    loaded.close()
    needed = 8 * 76 + sum(4 + -(-size // 8) * 8 for size in sections)
    assert names(loader, "globals", replace(RIGHTS, map_bytes=needed)) == ["entry", "leave"]
    error = refused(loader, "globals", replace(RIGHTS, map_bytes=needed - 1))
    assert type(error) is Quota
    assert error.fields == {"limit": "map_bytes", "used": 0, "most": needed - 1, "asked": needed}
    # The daemon's own limit is still there for those who may have all.
    assert type(refused(loader, "hog", replace(RIGHTS, map_bytes=1 << 40))) is TooLarge


def test_time(loader: Loader) -> None:
    error = refused(loader, "slow", replace(RIGHTS, seconds=0.2))
    assert type(error) is BadObject
    assert "longer than 0.2 seconds" in error.detail
    assert names(loader, "rights", replace(RIGHTS, seconds=math.inf)) == ["harmless"]


def test_the_kernel_never_sees_what_is_refused(loader: Loader) -> None:
    """It would take seconds to verify, and be refused by the verifier at its end."""
    code = insn(0x85, imm=58)
    long = b"".join([insn(0xB7, dst=6), *[insn(0x07, dst=6, imm=1)] * 900_000])
    before = time.monotonic()
    assert type(failure(loader, long + code, RIGHTS)) is Forbidden
    assert time.monotonic() - before < 2
    assert type(failure(loader, code, None)) is VerifierRejected


# --- raw instructions ------------------------------------------------------------------------


def test_raw_instructions(loader: Loader) -> None:
    assert run(loader, RETURN) is None
    assert "processed 2 insns" in (run(loader, RETURN, RIGHTS, want_log=True) or "")
    assert run(loader, READS) is None


@pytest.mark.parametrize("rights", [None, RIGHTS])
def test_raw_instructions_that_the_verifier_refuses(loader: Loader, rights: Rights | None) -> None:
    for want_log in (False, True):
        error = failure(loader, insn(0xBF, src=5) + insn(0x95), rights, want_log=want_log)
        assert type(error) is VerifierRejected
        assert "R5 !read_ok" in error.fields["verifier_log"]
        assert error.fields["errno"] == "EACCES"


def test_raw_instructions_have_rights(loader: Loader) -> None:
    error = failure(loader, READS, RIGHTS)
    assert type(error) is Forbidden
    assert error.fields == {"refused": ["bpf_probe_read_kernel"]}
    run(loader, READS, replace(RIGHTS, read_kernel=True))


@pytest.mark.parametrize("source", [1, 2, 5, 6])
def test_raw_instructions_reach_no_map(loader: Loader, source: int) -> None:
    """Not even an administrator's: a number would be one of another process."""
    # The daemon's own FDs were reached by this once.
    loaded = loader.load(ObjectRequest(elf("nobtf")))
    number = loaded.maps[0].fd.fileno()
    code = insn(0x18, dst=1, src=source, imm=number) + bytes(8) + RETURN
    for rights in (None, RIGHTS):
        error = failure(loader, code, rights)
        assert type(error) is Invalid
        assert error.fields["errors"][0]["loc"] == ["source", "instructions"]
    loaded.close()


def test_many_raw_instructions(loader: Loader) -> None:
    for rights in (None, RIGHTS):
        error = failure(loader, RETURN * (MAX_INSNS // 2 + 1), rights)
        assert type(error) is TooLarge


def test_raw_instructions_that_take_long() -> None:
    jumps = [insn(0x25, dst=6, src=0, off=0, imm=5), insn(0x07, dst=6, imm=1)] * 200_000
    code = b"".join([insn(0xB7, dst=6), *jumps, RETURN])
    hasty = Loader(LoaderLimits(seconds=0.05))
    try:
        error = failure(hasty, code)
        assert type(error) is BadObject
        assert "longer than 0.05 seconds" in error.detail
    finally:
        hasty.close()


def test_kernel_functions(loader: Loader) -> None:
    """By name, where the kernel's types tell of one; the verifier has its say then."""
    types = Path("/sys/kernel/btf/vmlinux").read_bytes()
    library = Library()
    handle = library.types(types)
    assert handle is not None
    number = library.call("btf__find_by_name_kind", handle, b"bpf_rcu_read_lock", 12)
    assert library.function_name(handle, number) == "bpf_rcu_read_lock"
    assert library.function_name(handle, 1) is None
    assert library.function_name(handle, 1 << 30) is None
    code = insn(0x85, src=2, imm=number) + RETURN
    error = failure(loader, code, RIGHTS)
    assert error.fields == {"refused": ["bpf_rcu_read_lock"]}
    permitted = replace(RIGHTS, kfuncs=frozenset({"bpf_rcu_read_lock"}))
    assert type(failure(loader, code, permitted)) is VerifierRejected


# --- where the daemon is not root ------------------------------------------------------------

_SCRIPT = """
import sys, json
from pathlib import Path
from kpmd.bpf import confine
from kpmd.bpf.abi import AttachType
from kpmd.bpf.loader import *
if "mdwe" in sys.argv: confine.prctl(65, 1)
loader = Loader(LoaderLimits())
for name in ("core", "tails"):
    loaded = loader.load(ObjectRequest(Path(sys.argv[1], f"{name}.bpf.o").read_bytes()))
    print(*[each.name for each in (*loaded.programs, *loaded.maps)])
code = bytes.fromhex("b7000000000000009500000000000000")
loader.load_instructions(InstructionsRequest(code, "x", "GPL", AttachType.NONE)).fd.close()
pid = loader._server.pid
print(next(line for line in open(f"/proc/{pid}/status") if line.startswith("CapPrm")).split()[1])
loader.close()
"""


@pytest.mark.parametrize("root", [True, False])
def test_without_root_and_without_writable_code(root: bool, tmp_path: Path) -> None:
    """As systemd starts it: a user of its own, ambient capabilities, MemoryDenyWriteExecute."""
    # The last one for an interpreter that lies in a home: the server gives it up at once.
    given = "+bpf,+perfmon,+syslog,+dac_read_search"
    user = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", "--no-new-privs",
            f"--inh-caps={given}", f"--ambient-caps={given}"]  # fmt: skip
    command = [sys.executable, "-c", _SCRIPT, str(OBJECTS), "mdwe"]
    done = subprocess.run(
        command if root else [*user, *command], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["core .bss", "target jumper jumps first outer .bss"], done.stderr
    # The server keeps what it needs, and not CAP_SYSLOG.
    kept = int(lines[2], 16)
    assert kept & (1 << 38 | 1 << 39) == 1 << 38 | 1 << 39
    assert not kept & 1 << 34
    if not root:
        assert kept == 1 << 38 | 1 << 39


def test_without_libseccomp() -> None:
    """Nothing is loaded that is not confined."""
    maps = Path("/proc/self/maps")
    subprocess_code = f"import ctypes; ctypes.CDLL('libseccomp.so.2');print(open('{maps}').read())"
    listed = subprocess.run(
        [sys.executable, "-c", subprocess_code], capture_output=True, text=True, check=True
    ).stdout
    path = next(line.split()[-1] for line in listed.splitlines() if "libseccomp" in line)
    script = (
        "import sys\n"
        "from kpmd.bpf.abi import AttachType\n"
        "from kpmd.bpf.loader import *\n"
        "loader = Loader(LoaderLimits())\n"
        "code = InstructionsRequest(bytes(16), 'x', 'GPL', AttachType.NONE)\n"
        "elf = ObjectRequest(open(sys.argv[1], 'rb').read())\n"
        "for call, request in ((loader.load, elf), (loader.load_instructions, code)):\n"
        "    try: call(request)\n"
        "    except Exception as error: print(type(error).__name__, error.fields)\n"
        "loader.close()\n"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'mount --bind /dev/null "$1" && shift && exec "$@"', "sh",
         path, sys.executable, "-c", script, str(OBJECTS / "session.bpf.o")],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "NotSupported {'needs': 'libseccomp.so.2'}\n" * 2


def test_a_process_that_cannot_be_confined() -> None:
    """A service manager that lets nobody make filters."""
    script = (
        "import sys\n"
        "from kpmd.bpf import confine, seccomp\n"
        "from kpmd.bpf.loader import *\n"
        "library = seccomp.Library()\n"
        "without = library.filter(seccomp.ALLOW)\n"
        "without.add(seccomp.refuse(1), ['seccomp'])\n"
        "confine.prctl(38, 1)\n"
        "without.made().load()\n"
        "loader = Loader(LoaderLimits())\n"
        "try: loader.load(ObjectRequest(open(sys.argv[1], 'rb').read()))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "loader.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(OBJECTS / "session.bpf.o")],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.startswith("KernelError the process that is to load the program cannot be")
    assert KernelError.kind == "kernel"
