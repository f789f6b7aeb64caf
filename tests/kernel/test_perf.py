"""Kprobes one by one, through perf events: on every kernel that has kprobes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kpmd import builtin
from kpmd.bpf import objects, perf
from kpmd.bpf.abi import AttachType
from kpmd.bpf.fd import Closed, OwnedFd, tracer
from kpmd.bpf.kernel import LinuxKernel, Loaded
from kpmd.bpf.perf import PerfAttachError
from kpmd.errors import NotSupported, TooLarge
from tests.kernel import content
from tests.kernel.conftest import OBJECTS, bpftool_links, kernel_name
from tests.kernel.test_links import RETURN_ZERO

pytestmark = pytest.mark.kprobes

#: Calls of each function in the tests, by its system call's number.
CALLS = {"__x64_sys_getpid": (39, 3), "__x64_sys_gettid": (186, 5), "__x64_sys_getppid": (110, 2)}
NAMES = list(CALLS)
BLACKLISTED, NOTRACE, UNKNOWN = "notify_die", "rcu_is_watching", "bogus_function_of_no_kernel"

KPROBES = Path("/sys/kernel/debug/kprobes")

_libc = ctypes.CDLL(None)


def call_all() -> None:
    for number, times in CALLS.values():
        for _ in range(times):
            _libc.syscall(number)


@pytest.fixture(scope="module", autouse=True)
def debugfs() -> None:
    if not KPROBES.is_dir():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)


def probes() -> list[str]:
    """The kernel's own list of kprobes."""
    return (KPROBES / "list").read_text().splitlines()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No kprobe, no link and no FD outlives its test."""
    perf.has_perf_links()
    tracer.active = True
    before = tracer.held(), len(os.listdir("/proc/self/fd"))
    yield
    assert (tracer.held(), len(os.listdir("/proc/self/fd"))) == before
    assert probes() == []
    # BPF_LINK_TYPE_PERF_EVENT
    assert bpftool_links("perf_event", 7) == []


@pytest.fixture(scope="module")
def kernel() -> Iterator[LinuxKernel]:
    # As the daemon does: kernels before 5.11 count BPF memory as locked memory.
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    kernel = LinuxKernel()
    kernel.start()
    yield kernel
    kernel.close()


@pytest.fixture
def program() -> Iterator[OwnedFd]:
    with objects.program_load(RETURN_ZERO, "zero", "GPL", AttachType.NONE)[0] as fd:
        yield fd


@pytest.fixture
def load(kernel: LinuxKernel) -> Iterator[Callable[[bytes], Loaded]]:
    made: list[Loaded] = []

    def start(elf: bytes) -> Loaded:
        wanted: dict[str, int | bytes] = {"target_pid": os.getpid()}
        made.append(kernel.load_object(elf, None, None, wanted, {}, False, mechanism="perf_event"))
        return made[-1]

    yield start
    for each in made:
        each.close()


def entries(kernel: LinuxKernel, loaded: Loaded, name: str) -> dict[int, list[bytes]]:
    found = next(each for each in loaded.maps if each.name == name)
    listed = content.entries(kernel, found)
    return {int.from_bytes(key, "little"): values for key, values in listed.items()}


def counts(kernel: LinuxKernel, loaded: Loaded) -> dict[int, int]:
    """Function address -> calls"""
    return {
        address: sum(int.from_bytes(value, "little") for value in values)
        for address, values in entries(kernel, loaded, "counts").items()
    }


@pytest.mark.parametrize("by", ["addresses", "symbols"])
@pytest.mark.parametrize("retprobe", [False, True], ids=["entry", "return"])
def test_counts_exactly_until_closed(
    kernel: LinuxKernel,
    load: Callable[[bytes], Loaded],
    addresses: dict[str, int],
    release: tuple[int, int],
    by: str,
    retprobe: bool,
) -> None:
    func_ip = release >= (5, 15)
    loaded = load(builtin.read("count", func_ip=func_ip))
    (each,) = loaded.programs
    assert each.attach == "kprobe_multi"
    links, details = kernel.create_perf_links(
        each.fd,
        retprobe=retprobe,
        addresses=[addresses[name] for name in NAMES] if by == "addresses" else (),
        symbols=NAMES if by == "symbols" else (),
        cookies=(),
    )
    assert details.count == 3
    assert details.program_kernel_id == each.info.kernel_id
    assert len(probes()) == 3
    call_all()
    links.close()
    call_all()
    found = counts(kernel, loaded)
    if retprobe and not func_ip:
        # The registers at return do not tell the function.
        assert sum(found.values()) == 10
    else:
        assert found == {addresses[name]: times for name, (_, times) in CALLS.items()}


def test_details(kernel: LinuxKernel, program: OwnedFd, release: tuple[int, int]) -> None:
    links, details = kernel.create_perf_links(
        program, retprobe=False, addresses=(), symbols=NAMES, cookies=()
    )
    assert kernel.link_details(links) == details
    listed = bpftool_links("perf_event", 7)
    if release >= (5, 15):
        assert {each["id"] for each in listed} == set(links.kernel_ids)
        assert details.kernel_id == links.kernel_ids[0] > 0
        assert len(set(links.kernel_ids)) == 3
    else:
        assert (listed, links.kernel_ids, details.kernel_id) == ([], (), 0)
    assert details.missed == (0 if release >= (6, 6) else None)
    links.close()
    with pytest.raises(Closed):
        links.details()


@pytest.mark.parametrize("by", ["addresses", "symbols"])
@pytest.mark.parametrize("retprobe", [False, True], ids=["entry", "return"])
def test_cookies(
    kernel: LinuxKernel,
    load: Callable[[bytes], Loaded],
    program: OwnedFd,
    addresses: dict[str, int],
    release: tuple[int, int],
    by: str,
    retprobe: bool,
) -> None:
    cookies = [2**64 - 1, 7, 1]
    targets = [addresses[name] for name in NAMES] if by == "addresses" else []
    symbols = [] if targets else NAMES
    if release < (5, 15):
        with pytest.raises(NotSupported) as raised:
            perf.attach_all(program, targets, symbols, cookies, retprobe)
        assert raised.value.fields["needs"] == "kernel 5.15"
        with pytest.raises(NotSupported):
            perf.attach_one(program, None, NAMES[0], retprobe=retprobe, cookie=1)
        return
    loaded = load((OBJECTS / "record.bpf.o").read_bytes())
    wanted = "on_return" if retprobe else "on_entry"
    (fd,) = [each.fd for each in loaded.programs if each.name == wanted]
    links = perf.attach_all(fd, targets, symbols, cookies, retprobe)
    call_all()
    links.close()
    seen = {
        cookie: (int.from_bytes(value[:8], "little"), int.from_bytes(value[8:], "little"))
        for cookie, (value,) in entries(kernel, loaded, "seen").items()
    }
    assert seen == {
        cookie: (addresses[name], CALLS[name][1])
        for cookie, name in zip(cookies, NAMES, strict=True)
    }


def refused(program: OwnedFd, targets: Sequence[int | str], retprobe: bool) -> PerfAttachError:
    symbols = [target for target in targets if isinstance(target, str)]
    addresses = [target for target in targets if isinstance(target, int)]
    with pytest.raises(PerfAttachError) as raised:
        perf.attach_all(program, addresses, symbols, (), retprobe)
    # Before anything else could have cleaned up.
    assert probes() == []
    return raised.value


@pytest.mark.parametrize("retprobe", [False, True], ids=["entry", "return"])
@pytest.mark.parametrize(
    ("bad", "number"),
    [
        (UNKNOWN, errno.ENOENT),
        (BLACKLISTED, errno.EINVAL),
        (NOTRACE, errno.EINVAL),
        ("jiffies", errno.EINVAL),
        ("x" * 600, errno.E2BIG),
    ],
    ids=["unknown", "blacklisted", "notrace", "data", "too long"],
)
def test_half_a_failure_by_name_undoes_the_rest(
    program: OwnedFd,
    traceable: list[tuple[int, str]],
    bad: str,
    number: int,
    retprobe: bool,
) -> None:
    forbidden = {line.split()[1] for line in (KPROBES / "blacklist").read_text().splitlines()}
    assert BLACKLISTED in forbidden
    assert NOTRACE not in forbidden | {name for _, name in traceable}
    error = refused(program, [*NAMES, bad, "vprintk"], retprobe)
    assert (error.errno, error.call, error.index) == (number, "perf_event_open", 3)


@pytest.mark.parametrize("retprobe", [False, True], ids=["entry", "return"])
@pytest.mark.parametrize("bad", [0, 1, 0x400000, 2**64 - 1, "inside", BLACKLISTED, NOTRACE])
def test_half_a_failure_by_address_undoes_the_rest(
    program: OwnedFd, addresses: dict[str, int], bad: int | str, retprobe: bool
) -> None:
    start = addresses[NAMES[1]]
    address = bad if isinstance(bad, int) else addresses.get(bad, start + 1)
    error = refused(program, [addresses[NAMES[0]], address], retprobe)
    numbers = {errno.EINVAL}
    if bad in (1, 0x400000, 2**64 - 1):
        numbers |= {errno.ENOENT, errno.EPERM}
    elif bad == "inside" and not retprobe:
        numbers = {errno.EILSEQ}
    assert error.errno in numbers
    assert (error.call, error.index) == ("perf_event_open", 1)


def test_name_of_several_functions(program: OwnedFd) -> None:
    """Refused from 6.7 on and in the stable kernels since; kprobe multi takes the first."""
    with open("/proc/kallsyms", encoding="ascii") as file:
        listed = [line.split()[2] for line in file if line.split()[1] in "tT"]
    assert listed.count("cmask_show") > 1
    assert refused(program, ["cmask_show"], False).errno == errno.EADDRNOTAVAIL


def test_any_instruction_of_a_function_is_taken(
    program: OwnedFd, addresses: dict[str, int]
) -> None:
    """The fact for which callers check addresses: kprobe multi refuses them, this does not."""
    taken = []
    for offset in range(5, 13):
        address = addresses["vprintk"] + offset
        with contextlib.suppress(PerfAttachError):
            perf.attach_one(program, address, None, retprobe=False, cookie=0).close()
            taken.append(offset)
    # Some are inside an instruction.
    assert 0 < len(taken) < 8


def test_program_for_kprobe_multi_is_refused(release: tuple[int, int]) -> None:
    """By links; events of kernels that have no links cannot tell, and run it just as well."""
    attach = AttachType.KPROBE_MULTI
    with objects.program_load(RETURN_ZERO, "zero", "GPL", attach)[0] as wrong:
        if release < (5, 15):
            perf.attach_one(wrong, None, "vprintk", retprobe=False, cookie=0).close()
            return
        error = refused(wrong, ["vprintk"], False)
        assert (error.errno, error.call) == (errno.EINVAL, "LINK_CREATE")


def test_no_program_fd() -> None:
    with OwnedFd(os.eventfd(0), "no program") as fd, pytest.raises(PerfAttachError) as raised:
        perf.attach_one(fd, None, "vprintk", retprobe=False, cookie=0)
    assert raised.value.errno == errno.EINVAL


def test_session_programs_have_no_fallback(kernel: LinuxKernel) -> None:
    with pytest.raises(NotSupported):
        kernel.load_instructions(
            RETURN_ZERO, "zero", "GPL", "kprobe_session", False, mechanism="perf_event"
        )
    elf = (OBJECTS / "session.bpf.o").read_bytes()
    for attach in (None, "kprobe_session"):
        with pytest.raises(NotSupported) as raised:
            kernel.load_object(elf, None, attach, {}, {}, False, mechanism="perf_event")
        assert raised.value.fields["needs"] == "kernel 6.10"


def test_two_hundred_functions(program: OwnedFd, traceable: list[tuple[int, str]]) -> None:
    names = [name for _, name in traceable if name.startswith(("ext4_", "nfs", "xfs_", "tcp_"))]
    before = len(os.listdir("/proc/self/fd"))
    links = perf.attach_all(program, (), names[:200], (), False)
    assert len(probes()) == len(links) == 200
    assert links.details().count == 200
    # One each: a link holds its event.
    assert len(os.listdir("/proc/self/fd")) - before == 200
    links.close()


def test_close_from_several_threads(program: OwnedFd) -> None:
    links = perf.attach_all(program, (), [*NAMES, "vprintk", "inet6_release"], (), False)
    after: list[list[str]] = []

    def close() -> None:
        links.close()
        after.append(probes())

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whoever it was that closed: for all of them it is done.
    assert after == [[]] * 4


def test_out_of_file_descriptors(program: OwnedFd) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(program.fileno())
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 3, hard))
    try:
        with pytest.raises(PerfAttachError) as raised:
            perf.attach_all(program, (), [*NAMES, "vprintk", "inet6_release"], (), False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised.value.errno == errno.EMFILE
    assert raised.value.index in (2, 3)


def test_too_many(program: OwnedFd) -> None:
    with pytest.raises(TooLarge):
        perf.attach_all(program, range(1, perf.MAX_PERF_TARGETS + 2), (), (), False)


HOLD = """
from kpmd.bpf import objects, perf
from kpmd.bpf.abi import AttachType
program = objects.program_load(bytes.fromhex("{code}"), "zero", "GPL", AttachType.NONE)[0]
links = perf.attach_all(program, {addresses}, (), (), False)
print(len(links), flush=True)
input()
"""


def holding(addresses: dict[str, int], *under: str) -> subprocess.Popen[bytes]:
    """A process that attaches to three functions, tells so and waits."""
    code = HOLD.format(code=RETURN_ZERO.hex(), addresses=[addresses[name] for name in NAMES])
    command = [*under, sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def test_killed_process_leaves_nothing(addresses: dict[str, int]) -> None:
    with holding(addresses) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"3\n"
        assert len(probes()) == 3
        process.kill()
    assert probes() == []


def test_capabilities_that_it_takes(addresses: dict[str, int]) -> None:
    """CAP_BPF and CAP_PERFMON; where perf_event_paranoid is 3 (Debian's own), CAP_SYS_ADMIN too."""
    path = Path("/proc/sys/kernel/perf_event_paranoid")
    before = path.read_text()
    cases = [("2", "", True)]
    if kernel_name() != "own":
        cases += [("3", "", False), ("3", ",+sys_admin", True)]
    try:
        for paranoid, more, works in cases:
            path.write_text(paranoid)
            bounding = f"--bounding-set=-all,+bpf,+perfmon{more}"
            with holding(addresses, "setpriv", "--no-new-privs", bounding) as process:
                said, error = process.communicate(b"\n")
            assert said == (b"3\n" if works else b"")
            assert works or b"perf_event_open: Permission denied" in error
    finally:
        path.write_text(before)
