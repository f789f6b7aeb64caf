"""BPF_LINK_CREATE for kprobe multi: the reference library's own tests, and kpmd's facts."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

import pytest

from kpmd.bpf import maps, objects
from kpmd.bpf.abi import AttachType
from kpmd.bpf.fd import OwnedFd, tracer
from kpmd.bpf.kernel import LinuxKernel, Loaded
from kpmd.bpf.syscall import BpfError
from tests.kernel.conftest import OBJECTS
from tests.kernel.content import entries

pytestmark = pytest.mark.multi

RETURN_ZERO = bytes.fromhex("b7000000000000009500000000000000")
GETPID, GETTID = "__x64_sys_getpid", "__x64_sys_gettid"

_libc = ctypes.CDLL(None)


def call_getpid(times: int = 1) -> None:
    for _ in range(times):
        _libc.syscall(39)


def call_gettid(times: int = 1) -> None:
    for _ in range(times):
        _libc.syscall(186)


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    tracer.active = True
    before = tracer.held()
    yield
    assert tracer.held() == before


@pytest.fixture
def program() -> Iterator[OwnedFd]:
    fd, _ = objects.program_load(RETURN_ZERO, "zero", "GPL", AttachType.KPROBE_MULTI)
    with fd:
        yield fd


@pytest.fixture(scope="module")
def kernel() -> Iterator[LinuxKernel]:
    kernel = LinuxKernel()
    kernel.start()
    yield kernel
    kernel.close()


class Recorder:
    """The test object ``record``: what its programs saw, by cookie."""

    def __init__(self, kernel: LinuxKernel) -> None:
        self.loaded: Loaded = kernel.load_object(
            (OBJECTS / "record.bpf.o").read_bytes(),
            None,
            None,
            {"target_pid": os.getpid()},
            {},
            False,
        )
        self.entry, self.exit = (
            next(each.fd for each in self.loaded.programs if each.name == name)
            for name in ("on_entry", "on_return")
        )
        self._kernel = kernel
        self._map = next(each for each in self.loaded.maps if each.name == "seen")

    def seen(self) -> dict[int, tuple[int, int]]:
        """Cookie -> (function address, calls)."""
        found = entries(self._kernel, self._map)
        return {
            int.from_bytes(key, "little"): (
                int.from_bytes(value[:8], "little"),
                int.from_bytes(value[8:], "little"),
            )
            for key, (value,) in found.items()
        }


@pytest.fixture
def recorder(kernel: LinuxKernel) -> Iterator[Recorder]:
    made = Recorder(kernel)
    yield made
    made.loaded.close()


def test_by_symbols_tells_both_targets(program: OwnedFd, addresses: dict[str, int]) -> None:
    with objects.link_create(
        program, AttachType.KPROBE_MULTI, symbols=[b"vprintk", b"inet6_release"]
    ) as link:
        info = objects.link_info(link)
        assert info.count == 2
        assert info.missed == 0
        assert info.program_kernel_id == objects.program_info(program).kernel_id
        attached = {address for address, _ in objects.link_addresses(link, 2)}
    assert attached == {addresses["vprintk"], addresses["inet6_release"]}


def test_by_addresses_with_cookies(program: OwnedFd, addresses: dict[str, int]) -> None:
    wanted = {addresses["vprintk"]: 0xAAAA, addresses["inet6_release"]: 2**64 - 1}
    with objects.link_create(
        program,
        AttachType.KPROBE_MULTI,
        addresses=list(wanted),
        cookies=list(wanted.values()),
    ) as link:
        info = objects.link_info(link)
        assert info.count == 2
        assert dict(objects.link_addresses(link, 2)) == wanted


@pytest.mark.parametrize("retprobe", [False, True])
def test_unknown_symbol_is_esrch(program: OwnedFd, retprobe: bool) -> None:
    with pytest.raises(BpfError) as raised:
        objects.link_create(
            program,
            AttachType.KPROBE_MULTI,
            retprobe=retprobe,
            symbols=[b"vprintk", b"bogus_function_of_no_kernel"],
        )
    assert raised.value.errno == errno.ESRCH


def test_symbol_twice_is_esrch(program: OwnedFd) -> None:
    with pytest.raises(BpfError) as raised:
        objects.link_create(program, AttachType.KPROBE_MULTI, symbols=[b"vprintk", b"vprintk"])
    assert raised.value.errno == errno.ESRCH


# Inside the five bytes of the traceable place itself the kernel is lenient (start + 4 to + 8).
@pytest.mark.parametrize("offset", [1, 9, 16, -0xFFFF_0000_0000_0000])
def test_bad_address(
    program: OwnedFd, addresses: dict[str, int], offset: int, release: tuple[int, int]
) -> None:
    """ENOENT from 6.14 on, EINVAL before; one bad address fails the whole call."""
    bad = (addresses["vprintk"] + offset) % 2**64
    with pytest.raises(BpfError) as raised:
        objects.link_create(
            program, AttachType.KPROBE_MULTI, addresses=[addresses["inet6_release"], bad]
        )
    assert raised.value.errno == (errno.ENOENT if release >= (6, 14) else errno.EINVAL)


def test_program_for_another_attach_type_is_einval() -> None:
    fd, _ = objects.program_load(RETURN_ZERO, "zero", "GPL", AttachType.KPROBE_SESSION)
    with fd, pytest.raises(BpfError) as raised:
        objects.link_create(fd, AttachType.KPROBE_MULTI, symbols=[b"vprintk"])
    assert raised.value.errno == errno.EINVAL


def test_no_program_fd() -> None:
    with OwnedFd(os.eventfd(0), "no program") as fd, pytest.raises(BpfError) as raised:
        objects.link_create(fd, AttachType.KPROBE_MULTI, symbols=[b"vprintk"])
    assert raised.value.errno == errno.EINVAL


@pytest.mark.parametrize("by", ["symbols", "addresses"])
@pytest.mark.parametrize("retprobe", [False, True])
def test_counts_and_stays_still_after_close(
    recorder: Recorder, addresses: dict[str, int], by: str, retprobe: bool
) -> None:
    names = [GETPID, GETTID]
    targets = (
        {"symbols": [name.encode() for name in names]}
        if by == "symbols"
        else {"addresses": [addresses[name] for name in names]}
    )
    link = objects.link_create(
        recorder.exit if retprobe else recorder.entry,
        AttachType.KPROBE_MULTI,
        retprobe=retprobe,
        cookies=[1, 2],
        **targets,
    )
    with link:
        call_getpid(3)
        call_gettid(5)
        seen = recorder.seen()
        assert seen[1] == (addresses[GETPID], 3)
        assert seen[2] == (addresses[GETTID], 5)
    call_getpid()
    call_gettid()
    assert recorder.seen() == seen


def test_address_of_tracefs_loses_its_cookie(
    recorder: Recorder, addresses: dict[str, int], traceable: list[tuple[int, str]]
) -> None:
    """The reason why kpmd attaches by the address of kallsyms: the fact that it guards against."""
    place = addresses[GETPID] + 4
    assert place in {address for address, _ in traceable}
    with objects.link_create(
        recorder.entry, AttachType.KPROBE_MULTI, addresses=[place], cookies=[77]
    ):
        call_getpid()
    assert 77 not in recorder.seen()
    assert recorder.seen()[0][0] == addresses[GETPID]


def test_session_runs_at_entry_and_return(kernel: LinuxKernel) -> None:
    """Kernel 6.10: one program, called twice a call, with one cookie."""
    loaded = kernel.load_object(
        (OBJECTS / "record.bpf.o").read_bytes(),
        ["on_entry"],
        "kprobe_session",
        {"target_pid": os.getpid()},
        {},
        False,
    )
    try:
        seen = next(each for each in loaded.maps if each.name == "seen")
        with objects.link_create(
            loaded.programs[0].fd,
            AttachType.KPROBE_SESSION,
            symbols=[GETPID.encode()],
            cookies=[9],
        ):
            call_getpid(4)
        (value,) = entries(kernel, seen)[(9).to_bytes(8, "little")]
        assert int.from_bytes(value[8:], "little") == 8
    finally:
        loaded.close()


def test_possible_cpus_is_the_width_of_percpu_values(kernel: LinuxKernel) -> None:
    loaded = kernel.load_object(
        (OBJECTS.parents[1] / "kpmd/builtin/count.bpf.o").read_bytes(), None, None, {}, {}, False
    )
    try:
        counts = next(each for each in loaded.maps if each.name == "counts")
        with objects.link_create(
            loaded.programs[0].fd, AttachType.KPROBE_MULTI, symbols=[GETPID.encode()]
        ):
            call_getpid(6)
        (values,) = entries(kernel, counts).values()
        assert len(values) == maps.possible_cpus()
        assert sum(int.from_bytes(value, "little") for value in values) >= 6
    finally:
        loaded.close()
