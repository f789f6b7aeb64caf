"""bpf(2) and what is made of it, over a system call of the tests' own."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kpmd.bpf import features, maps, objects, syscall
from kpmd.bpf.abi import (
    AttachType,
    Cmd,
    InfoAttr,
    LinkCreateKprobeMultiAttr,
    LinkInfoKprobeMulti,
    ProgInfo,
    ProgLoadAttr,
)
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.features import Answer, probe_link
from kpmd.bpf.objects import LinkDetails
from kpmd.bpf.syscall import BpfError
from kpmd.errors import KernelError, KpmdError, TooLarge, VerifierRejected

CODE = bytes.fromhex("b7000000000000009500000000000000")

# syscall.py


class Libc:
    """Answers ``syscall`` with prepared results: an int, or minus an errno."""

    def __init__(self, *results: int) -> None:
        self._results = list(results)
        self.calls: list[tuple[int, int, int]] = []

    def syscall(self, number: Any, cmd: Any, attr: Any, size: Any) -> int:
        self.calls.append((number.value, cmd.value, size.value))
        result = self._results.pop(0)
        if result < 0:
            ctypes.set_errno(-result)
            return -1
        return result


def use(monkeypatch: pytest.MonkeyPatch, *results: int) -> Libc:
    libc = Libc(*results)
    monkeypatch.setattr(syscall, "_libc", libc)
    return libc


def test_the_result_and_the_size_of_the_struct(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = use(monkeypatch, 7)
    assert syscall.bpf(Cmd.LINK_CREATE, LinkCreateKprobeMultiAttr()) == 7
    ((number, cmd, size),) = libc.calls
    assert (cmd, size) == (28, 48)
    if platform.machine() == "x86_64":
        assert number == 321


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSPC, 524])
def test_errors_carry_errno_and_command(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    libc = use(monkeypatch, -number)
    with pytest.raises(BpfError) as error:
        syscall.bpf(Cmd.PROG_LOAD, ProgLoadAttr())
    assert error.value.errno == number
    assert error.value.cmd is Cmd.PROG_LOAD
    assert "PROG_LOAD" in str(error.value)
    assert len(libc.calls) == 1


def test_an_interrupted_call_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = use(monkeypatch, -errno.EINTR, -errno.EINTR, 5)
    assert syscall.bpf(Cmd.LINK_CREATE, LinkCreateKprobeMultiAttr()) == 5
    assert len(libc.calls) == 3


def test_eagain_is_the_verifiers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, -errno.EAGAIN, 5)
    assert syscall.bpf(Cmd.PROG_LOAD, ProgLoadAttr()) == 5
    libc = use(monkeypatch, -errno.EAGAIN, 5)
    with pytest.raises(BpfError):
        syscall.bpf(Cmd.LINK_CREATE, LinkCreateKprobeMultiAttr())
    assert len(libc.calls) == 1


def test_it_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = use(monkeypatch, *[-errno.EAGAIN] * 100)
    with pytest.raises(BpfError) as error:
        syscall.bpf(Cmd.PROG_LOAD, ProgLoadAttr())
    assert error.value.errno == errno.EAGAIN
    assert len(libc.calls) == 5


def test_a_machine_whose_number_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = use(monkeypatch, 1)
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(BpfError) as error:
        syscall.bpf(Cmd.PROG_LOAD, ProgLoadAttr())
    assert error.value.errno == errno.ENOSYS
    assert libc.calls == []


# features.py


def load_fails(error: KpmdError) -> Callable[..., OwnedFd]:
    def load(instructions: bytes, name: str, license_: str, attach: AttachType) -> OwnedFd:
        raise error

    return load


def load(instructions: bytes, name: str, license_: str, attach: AttachType) -> OwnedFd:
    """As the reference library: ``r0 = 0; exit`` under a licence that is not GPL."""
    assert (instructions, name, license_) == (CODE, "probe", "MIT")
    assert attach is AttachType.KPROBE_MULTI
    return OwnedFd(os.eventfd(0), "test program")


def link_fails(number: int) -> Callable[..., OwnedFd]:
    def link(program: OwnedFd, attach: AttachType) -> OwnedFd:
        assert not program.closed
        raise BpfError(number, Cmd.LINK_CREATE)

    return link


def link(program: OwnedFd, attach: AttachType) -> OwnedFd:
    return OwnedFd(os.eventfd(0), "test link")


def test_both_succeed() -> None:
    assert probe_link("probe", AttachType.KPROBE_MULTI, load, link) == Answer(True)


def test_e2big_on_load_is_no() -> None:
    fails = load_fails(KernelError("too big", errno.E2BIG))
    answer = probe_link("probe", AttachType.KPROBE_MULTI, fails, link)
    assert answer.supported is False
    assert answer.reason


@pytest.mark.parametrize(
    "error",
    [
        KernelError("no", errno.EPERM),
        KernelError("no", errno.EINVAL),
        KernelError("no", errno.EOPNOTSUPP),
        KernelError("no", errno.ENOMEM),
        VerifierRejected("no", "log", False),
    ],
)
def test_any_other_error_on_load_tells_nothing(error: KpmdError) -> None:
    answer = probe_link("probe", AttachType.KPROBE_MULTI, load_fails(error), link)
    assert answer.supported is None
    assert answer.reason


@pytest.mark.parametrize(
    ("number", "supported"),
    [
        (errno.EINVAL, False),
        (errno.EOPNOTSUPP, False),
        (errno.EPERM, None),
        (errno.ESRCH, None),
        (errno.ENOMEM, None),
        (errno.E2BIG, None),
        (errno.EBADF, None),
        (524, None),
    ],
)
def test_errors_on_link(number: int, supported: bool | None) -> None:
    answer = probe_link("probe", AttachType.KPROBE_MULTI, load, link_fails(number))
    assert answer.supported is supported
    assert answer.reason


def test_the_features_and_the_kernels_that_brought_them() -> None:
    assert [(each.name, each.min_kernel) for each in features.FEATURES] == [
        ("bpf_link_kprobe_multi", "5.18"),
        ("bpf_link_kprobe_session", "6.10"),
        ("kprobe_perf_event", "4.17"),
        ("bpf_cookie", "5.15"),
        ("bpf_get_func_ip", "5.15"),
    ]


# objects.py

Handler = Callable[[Cmd, Any], int]


class FakeBpf:
    """bpf(2) with a handler of the test's; a BpfError for minus an errno."""

    def __init__(self) -> None:
        self.handler: Handler = lambda cmd, attr: os.eventfd(0)
        self.calls: list[Cmd] = []

    def __call__(self, cmd: Cmd, attr: Any) -> int:
        self.calls.append(cmd)
        result = self.handler(cmd, attr)
        if result < 0:
            raise BpfError(-result, cmd)
        return result


@pytest.fixture
def bpf(monkeypatch: pytest.MonkeyPatch) -> FakeBpf:
    fake = FakeBpf()
    monkeypatch.setattr(objects, "bpf", fake)
    return fake


@pytest.fixture
def thing() -> Iterator[OwnedFd]:
    with OwnedFd(os.eventfd(0), "a thing") as owned:
        yield owned


def write(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def test_a_program_is_loaded_with_all_that_was_said(bpf: FakeBpf) -> None:
    def handler(cmd: Cmd, attr: ProgLoadAttr) -> int:
        assert cmd is Cmd.PROG_LOAD
        assert (attr.prog_type, attr.insn_cnt, attr.expected_attach_type) == (2, 2, 56)
        assert ctypes.string_at(attr.insns, 16) == CODE
        assert ctypes.string_at(attr.license) == b"GPL"
        assert attr.prog_name == b"a_name_that_is_"
        assert (attr.log_level, attr.log_size, attr.log_buf) == (0, 0, 0)
        return os.eventfd(0)

    bpf.handler = handler
    fd, log = objects.program_load(
        CODE, "a_name_that_is_too_long", "GPL", AttachType.KPROBE_SESSION
    )
    assert log is None
    assert bpf.calls == [Cmd.PROG_LOAD]
    fd.close()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENOSYS])
def test_errors_that_are_not_the_verifiers(bpf: FakeBpf, number: int) -> None:
    bpf.handler = lambda cmd, attr: -number
    with pytest.raises(KernelError) as error:
        objects.program_load(CODE, "x", "GPL", AttachType.KPROBE_MULTI)
    assert error.value.fields["errno"] == errno.errorcode[number]
    assert len(bpf.calls) == 1


def test_the_verifiers_words_are_asked_for_and_the_log_grows(bpf: FakeBpf) -> None:
    words = b"R0 !read_ok\n" * 100_000
    sizes: list[int] = []

    def handler(cmd: Cmd, attr: ProgLoadAttr) -> int:
        if not attr.log_level:
            return -errno.EACCES
        sizes.append(attr.log_size)
        write(attr.log_buf, words[: attr.log_size - 1])
        return -errno.ENOSPC if attr.log_size <= len(words) else -errno.EACCES

    bpf.handler = handler
    with pytest.raises(VerifierRejected) as error:
        objects.program_load(CODE, "x", "GPL", AttachType.KPROBE_MULTI)
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 1
    log = error.value.fields["verifier_log"]
    assert words.decode().endswith(log)
    assert 0 < len(log) < len(words)
    assert error.value.fields["verifier_log_truncated"] is True
    assert error.value.fields["errno"] == "EACCES"


def test_a_short_log_is_whole(bpf: FakeBpf) -> None:
    def handler(cmd: Cmd, attr: ProgLoadAttr) -> int:
        if attr.log_level:
            write(attr.log_buf, b"bad \xff insn\n")
        return -errno.EINVAL

    bpf.handler = handler
    with pytest.raises(VerifierRejected) as error:
        objects.program_load(CODE, "x", "GPL", AttachType.KPROBE_MULTI)
    assert error.value.fields["verifier_log"] == "bad \ufffd insn\n"
    assert error.value.fields["verifier_log_truncated"] is False


def test_a_refusal_without_words_is_the_kernels(bpf: FakeBpf) -> None:
    bpf.handler = lambda cmd, attr: -errno.E2BIG
    with pytest.raises(KernelError) as error:
        objects.program_load(CODE, "x", "GPL", AttachType.KPROBE_MULTI)
    assert error.value.fields["errno"] == "E2BIG"


def test_the_log_of_a_good_program(bpf: FakeBpf) -> None:
    def handler(cmd: Cmd, attr: ProgLoadAttr) -> int:
        write(attr.log_buf, b"processed 2 insns\n")
        return os.eventfd(0)

    bpf.handler = handler
    fd, log = objects.program_load(CODE, "x", "GPL", AttachType.KPROBE_MULTI, want_log=True)
    assert log == "processed 2 insns\n"
    fd.close()


def test_too_many_instructions_never_reach_the_kernel(bpf: FakeBpf) -> None:
    with pytest.raises(TooLarge):
        objects.program_load(bytes(8 * 1_000_001), "x", "GPL", AttachType.KPROBE_MULTI)
    assert bpf.calls == []


def test_a_link_by_addresses(bpf: FakeBpf, thing: OwnedFd) -> None:
    def handler(cmd: Cmd, attr: LinkCreateKprobeMultiAttr) -> int:
        assert cmd is Cmd.LINK_CREATE
        assert (attr.prog_fd, attr.attach_type, attr.flags) == (thing.fileno(), 42, 0)
        assert (attr.kprobe_multi_flags, attr.cnt, attr.syms) == (1, 3, 0)
        assert list((ctypes.c_uint64 * 3).from_address(attr.addrs)) == [1, 2**64 - 1, 3]
        assert list((ctypes.c_uint64 * 3).from_address(attr.cookies)) == [2**64 - 1, 0, 5]
        return os.eventfd(0)

    bpf.handler = handler
    objects.link_create(
        thing,
        AttachType.KPROBE_MULTI,
        retprobe=True,
        addresses=[1, 2**64 - 1, 3],
        cookies=[2**64 - 1, 0, 5],
    ).close()


def test_a_link_by_names(bpf: FakeBpf, thing: OwnedFd) -> None:
    def handler(cmd: Cmd, attr: LinkCreateKprobeMultiAttr) -> int:
        assert (attr.attach_type, attr.kprobe_multi_flags, attr.cnt) == (56, 0, 2)
        assert (attr.addrs, attr.cookies) == (0, 0)
        names = (ctypes.c_char_p * 2).from_address(attr.syms)
        assert list(names) == [b"vfs_read", b"vfs_write"]
        return os.eventfd(0)

    bpf.handler = handler
    symbols = [b"vfs_read", b"vfs_write"]
    objects.link_create(thing, AttachType.KPROBE_SESSION, symbols=symbols).close()


def test_a_failed_link_keeps_the_kernels_errno(bpf: FakeBpf, thing: OwnedFd) -> None:
    bpf.handler = lambda cmd, attr: -errno.ESRCH
    with pytest.raises(BpfError) as error:
        objects.link_create(thing, AttachType.KPROBE_MULTI, symbols=[b"x"])
    assert error.value.errno == errno.ESRCH
    thing.close()  # it is borrowed no more
    assert thing.closed


@pytest.mark.parametrize(
    ("count", "missed", "expected"), [(3, 9, (3, 9)), (0, 0, (None, None)), (1, 0, (1, 0))]
)
def test_what_the_kernel_tells_of_a_link(
    bpf: FakeBpf,
    thing: OwnedFd,
    count: int,
    missed: int,
    expected: tuple[int | None, int | None],
) -> None:
    def handler(cmd: Cmd, attr: InfoAttr) -> int:
        assert (attr.bpf_fd, attr.info_len) == (thing.fileno(), 64)
        info = LinkInfoKprobeMulti.from_address(attr.info)
        assert bytes(info) == bytes(64)
        info.id, info.prog_id, info.count, info.missed = 5, 6, count, missed
        return 0

    bpf.handler = handler
    assert objects.link_info(thing) == LinkDetails(5, 6, *expected)


def test_what_the_kernel_tells_of_a_program(bpf: FakeBpf, thing: OwnedFd) -> None:
    def handler(cmd: Cmd, attr: InfoAttr) -> int:
        info = ProgInfo.from_address(attr.info)
        if info.map_ids:
            write(info.map_ids, (7).to_bytes(4, "little") + (8).to_bytes(4, "little"))
        info.id, info.name, info.nr_map_ids = 5, b"probe", 2
        info.tag[:] = bytes(range(8))
        info.verified_insns, info.jited_prog_len = 11, 22
        return 0

    bpf.handler = handler
    info = objects.program_info(thing)
    assert (info.kernel_id, info.name, info.tag) == (5, "probe", "0001020304050607")
    assert (info.verified_instructions, info.jited_bytes, info.map_ids) == (11, 22, (7, 8))


def test_no_information(bpf: FakeBpf, thing: OwnedFd) -> None:
    bpf.handler = lambda cmd, attr: -errno.EPERM
    for ask in (objects.link_info, objects.program_info, objects.map_info):
        with pytest.raises(KernelError) as error:
            ask(thing)
        assert error.value.fields["errno"] == "EPERM"


def test_clip_log() -> None:
    assert objects.clip_log(b"abc\0\0") == ("abc", False)
    log, truncated = objects.clip_log(b"x" + b"y" * objects.LOG_SHOWN)
    assert (log, truncated) == ("y" * objects.LOG_SHOWN, True)


# maps.py


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0\n", 1),
        ("0-3\n", 4),
        ("0-3,8\n", 5),
        ("0,2,4-7", 6),
        ("0-127,256-383\n", 256),
    ],
)
def test_possible_cpus(text: str, count: int) -> None:
    assert maps.possible_cpus(text) == count


def test_possible_cpus_of_this_machine() -> None:
    assert maps.possible_cpus() >= (os.cpu_count() or 1)
