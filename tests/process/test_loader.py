"""The loader against this machine's kernel: what it loads, what it refuses, what it survives.

Needs root, bpf(2) and libbpf.so.1; fails where they are missing.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kpmd import builtin
from kpmd.bpf import libbpf
from kpmd.bpf import loader as loader_module
from kpmd.bpf.abi import AttachType, Cmd, InfoAttr, MapElemAttr, MapInfo
from kpmd.bpf.fd import OwnedFd, tracer
from kpmd.bpf.loader import LoadedObject, Loader, LoaderLimits, ObjectRequest
from kpmd.bpf.loader_answer import Answer, checked
from kpmd.bpf.syscall import bpf
from kpmd.errors import (
    BadObject,
    Invalid,
    KernelError,
    KpmdError,
    NotSupported,
    ShuttingDown,
    TooLarge,
    VerifierRejected,
    WrongAttachType,
)

T = TypeVar("T")
OBJECTS = Path(__file__).parents[1] / "objects"
CAPS = 1 << 38 | 1 << 39  # CAP_PERFMON, CAP_BPF


def elf(name: str) -> bytes:
    return (OBJECTS / f"{name}.bpf.o").read_bytes()


def ask(name: str, **fields: Any) -> ObjectRequest:
    return ObjectRequest(elf(name), **fields)


def open_fds() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the folder's own
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def until(probe: Callable[[], T], seconds: float = 5) -> T:
    end = time.monotonic() + seconds
    while not (value := probe()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return value


def server_pid(loader: Loader) -> int:
    assert loader._server is not None
    return loader._server.pid


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@contextmanager
def started(**limits: Any) -> Iterator[Loader]:
    loader = Loader(LoaderLimits(**limits))
    try:
        loader.start()
        yield loader
    finally:
        loader.close()


@contextmanager
def working(loader: Loader) -> Iterator[tuple[int, Future[LoadedObject]]]:
    """A load that is in the verifier: its broker's pid, and what becomes of it."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(loader.load, ask("slow"))
        pid = until(lambda: children_of(server_pid(loader)))[0]
        until(lambda: any("bpf-prog" in link for link in links_of(pid)))
        yield pid, future


def links_of(pid: int) -> list[str]:
    links = []
    with suppress(OSError):  # one was closed meanwhile, or the process has ended
        for number in os.listdir(f"/proc/{pid}/fd"):
            links.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return links


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with started() as ready:
        try:
            ready.load(ask("session")).close()
        except KpmdError as error:
            pytest.fail(f"the loader's tests need root, bpf(2) and libbpf.so.1: {error}")
        yield ready


@pytest.fixture(autouse=True)
def nothing_left(loader: Loader) -> Iterator[None]:
    """After each test: the same FDs, no child of the server, no zombie, no OwnedFd."""
    fds, processes, held = open_fds(), set(children_of(os.getpid())), tracer.held()
    yield
    assert tracer.held() == held
    assert open_fds() == fds
    assert set(children_of(os.getpid())) == processes
    assert children_of(server_pid(loader)) == []


def refused(loader: Loader, request: ObjectRequest, kind: type[KpmdError]) -> KpmdError:
    with pytest.raises(KpmdError) as caught:
        loader.load(request).close()
    assert type(caught.value) is kind, caught.value
    return caught.value


def location(error: KpmdError) -> list[str | int]:
    where: list[str | int] = error.fields["errors"][0]["loc"]
    return where


def content(loaded: LoadedObject, name: str) -> bytes:
    """The one value of an internal map."""
    fd = next(each.fd for each in loaded.maps if each.name == name)
    info = map_info(fd)
    key, value = ctypes.c_uint32(0), ctypes.create_string_buffer(info.value_size)
    attr = MapElemAttr(map_fd=fd.fileno(), key=ctypes.addressof(key), value=ctypes.addressof(value))
    bpf(Cmd.MAP_LOOKUP_ELEM, attr)
    return value.raw


def map_info(fd: OwnedFd) -> MapInfo:
    info = MapInfo()
    attr = InfoAttr(bpf_fd=fd.fileno(), info_len=ctypes.sizeof(info), info=ctypes.addressof(info))
    bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
    return info


# --- what it loads ---------------------------------------------------------------------------


def test_sections_say_the_attach_type(loader: Loader) -> None:
    loaded = loader.load(ask("globals"))
    try:
        found = [(each.name, each.attach, each.log) for each in loaded.programs]
        # The sections of the others start with "?": they are loaded when they are named.
        assert found == [
            ("entry", AttachType.KPROBE_MULTI, None),
            ("leave", AttachType.KPROBE_MULTI, None),
        ]
        assert {each.name for each in loaded.maps} == {"shared", ".rodata", ".data", ".bss"}
        for program in loaded.programs:
            assert "bpf-prog" in os.readlink(f"/proc/self/fd/{program.fd.fileno()}")
            assert not os.get_inheritable(program.fd.fileno())
        shared = next(each.fd for each in loaded.maps if each.name == "shared")
        assert map_info(shared).name == b"shared"
        assert map_info(shared).max_entries == 8
    finally:
        loaded.close()


def test_only_the_named_programs_are_loaded(loader: Loader) -> None:
    loaded = loader.load(ask("globals", programs=("optional", "entry")))
    assert [each.name for each in loaded.programs] == ["optional", "entry"]
    loaded.close()


def test_session_section(loader: Loader) -> None:
    loaded = loader.load(ask("session"))
    assert loaded.programs[0].attach is AttachType.KPROBE_SESSION
    loaded.close()


def test_attach_of_the_request_goes_before_the_section(loader: Loader) -> None:
    for attach in AttachType:
        for name in ("session", "globals"):
            loaded = loader.load(ask(name, attach=attach))
            assert {each.attach for each in loaded.programs} == {attach}
            loaded.close()


def test_single_kprobe_needs_attach(loader: Loader) -> None:
    error = refused(loader, ask("globals", programs=("single",)), Invalid)
    assert location(error) == ["attach"]
    request = ask("globals", programs=("single",), attach=AttachType.KPROBE_SESSION)
    loaded = loader.load(request)
    assert loaded.programs[0].attach is AttachType.KPROBE_SESSION
    loaded.close()


def test_core_finds_kernel_types_without_sys_admin(loader: Loader) -> None:
    loader.load(ask("core")).close()


def test_object_without_btf(loader: Loader) -> None:
    loaded = loader.load(ask("nobtf"))
    assert [each.name for each in loaded.maps] == [".rodata"]
    loaded.close()
    error = refused(loader, ask("nobtf", globals={"limit": 2}), Invalid)
    assert "no BTF" in error.detail


@pytest.mark.parametrize(
    ("name", "value", "section", "before", "after"),
    [
        ("u8", 0xA5, ".rodata", "01", "a5"),
        ("u16", 0xA5B6, ".rodata", "0200", "b6a5"),
        ("u32", 0xA5B6C7D8, ".rodata", "03000000", "d8c7b6a5"),
        ("u64", (1 << 64) - 2, ".rodata", "04" + "00" * 7, "fe" + "ff" * 7),
        ("u64", b"12345678", ".rodata", "04" + "00" * 7, "3132333435363738"),
        ("s8", -128, ".rodata", "ff", "80"),
        ("s64", -(1 << 63), ".rodata", "fc" + "ff" * 7, "00" * 7 + "80"),
        ("flag", True, ".rodata", "00", "01"),
        ("colour", 0x7FFFFFFF, ".rodata", "00000000", "ffffff7f"),
        ("text", b"kprobe\0\0", ".rodata", "6162630000000000", "6b70726f62650000"),
        ("pair", b"0123456789abcdef", ".rodata", "05" + "00" * 7 + "06" + "00" * 7,
         b"0123456789abcdef".hex()),
        ("in_data", 43, ".data", "2a000000", "2b000000"),
        ("in_bss", -2, ".bss", "00000000", "feffffff"),
        ("pointer", 1 << 63, ".bss", "00" * 8, "00" * 7 + "80"),
    ],
)  # fmt: skip
def test_globals_are_set(
    loader: Loader, name: str, value: int | bytes, section: str, before: str, after: str
) -> None:
    plain = loader.load(ask("globals"))
    changed = loader.load(ask("globals", globals={name: value}))
    try:
        old, new = content(plain, section), content(changed, section)
        was, now = bytes.fromhex(before), bytes.fromhex(after)
        candidates = {
            old[:at] + now + old[at + len(was) :]
            for at in range(len(old))
            if old[at : at + len(was)] == was
        }
        assert new in candidates
        assert new != old
    finally:
        plain.close()
        changed.close()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u8", 256, "0 to 255"),
        ("u8", -1, "0 to 255"),
        ("s8", 128, "-128 to 127"),
        ("s8", -129, "-128 to 127"),
        ("u16", 65536, "0 to 65535"),
        ("u64", -1, "0 to"),
        ("u64", 1 << 64, "64 bits"),
        ("u64", 10**4000, "64 bits"),
        ("flag", 2, "0 to 1"),
        ("colour", 1 << 32, "to 4294967295"),
        ("pointer", -1, "0 to"),
        ("text", 5, "no number; give its 8 bytes"),
        ("pair", 1, "no number; give its 16 bytes"),
        ("text", b"short", "8 bytes, and 5"),
        ("u32", b"12345", "4 bytes, and 5"),
        ("LICENSE", b"MIT\0", "no global variable"),
        ("shared", 1, "no global variable"),
        ("missing", 1, "no global variable"),
    ],
)
def test_globals_that_do_not_fit(
    loader: Loader, name: str, value: int | bytes, message: str
) -> None:
    error = refused(loader, ask("globals", globals={name: value}), Invalid)
    assert location(error) == ["source", "globals", name]
    assert message in error.detail


def test_max_entries(loader: Loader) -> None:
    loaded = loader.load(ObjectRequest(builtin.read("count"), max_entries={"counts": 100}))
    counts = next(each.fd for each in loaded.maps if each.name == "counts")
    assert map_info(counts).max_entries == 100
    loaded.close()


@pytest.mark.parametrize(
    ("name", "size"), [("shared", 0), ("shared", 1 << 32), ("missing", 1), (".rodata", 1)]
)
def test_max_entries_that_do_not_fit(loader: Loader, name: str, size: int) -> None:
    error = refused(loader, ask("globals", max_entries={name: size}), Invalid)
    assert location(error) == ["source", "max_entries", name]


def test_log_of_a_success(loader: Loader) -> None:
    loaded = loader.load(ask("reject", programs=("fine",), want_log=True))
    assert "processed 2 insns" in (loaded.programs[0].log or "")
    loaded.close()


def test_log_of_a_success_that_is_too_long_for_the_kernel(loader: Loader) -> None:
    loaded = loader.load(ask("slow", programs=("chatty",), want_log=True))
    assert "processed 300004 insns" in (loaded.programs[0].log or "")
    loaded.close()


# --- what it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [None, *AttachType])
@pytest.mark.parametrize(("name", "program"), [("xdp", "pass"), ("globals", "other")])
def test_other_program_types(
    loader: Loader, name: str, program: str, attach: AttachType | None
) -> None:
    request = ask(name, programs=(program,), attach=attach)
    assert program in refused(loader, request, WrongAttachType).detail


def test_unknown_program(loader: Loader) -> None:
    error = refused(loader, ask("globals", programs=("entry", "missing")), Invalid)
    assert location(error) == ["source", "programs", 1]
    assert "leave" in error.detail


@pytest.mark.parametrize("want_log", [False, True])
def test_verifier_rejects(loader: Loader, want_log: bool) -> None:
    error = refused(loader, ask("reject", want_log=want_log), VerifierRejected)
    assert "program wild" in error.detail
    assert "invalid mem access" in error.fields["verifier_log"]
    assert error.fields["verifier_log_truncated"] is False


@pytest.mark.parametrize("want_log", [False, True])
def test_the_end_of_a_long_log_is_kept(loader: Loader, want_log: bool) -> None:
    request = ask("reject", programs=("fine", "late"), want_log=want_log)
    error = refused(loader, request, VerifierRejected)
    assert "program late" in error.detail
    assert error.fields["verifier_log_truncated"] is True
    assert len(error.fields["verifier_log"]) == 65536
    assert "invalid mem access" in error.fields["verifier_log"][-1000:]


def test_a_log_longer_than_the_buffer(loader: Loader) -> None:
    request = ask("slow", programs=("wrong",), want_log=True)
    error = refused(loader, request, VerifierRejected)
    assert error.fields["verifier_log_truncated"] is True
    assert "invalid mem access" in error.fields["verifier_log"][-1000:]


def test_no_program_named_and_names_without_end(loader: Loader) -> None:
    error = refused(loader, ask("globals", programs=()), Invalid)
    assert location(error) == ["source", "programs"]
    error = refused(loader, ask("globals", programs=("entry", "x" * 256)), Invalid)
    assert location(error) == ["source", "programs", 1]
    for what in ("globals", "max_entries"):
        error = refused(loader, ask("globals", **{what: {"x" * 10_000: 1}}), Invalid)
        assert location(error) == ["source", what, "x" * 255]


def test_huge_map(loader: Loader) -> None:
    assert "4100 MiB" in refused(loader, ask("hog"), TooLarge).detail
    loader.load(ask("hog", max_entries={"huge": 16})).close()


def test_map_that_the_kernel_has_no_memory_for() -> None:
    with started(map_bytes=1 << 62) as generous:
        request = ask("hog", max_entries={"huge": (1 << 32) - 1})
        error = refused(generous, request, KernelError)
        assert isinstance(error, KernelError)
        assert error.number == errno.ENOMEM
        assert "huge" in error.detail


def test_map_that_takes_a_capability_more(loader: Loader) -> None:
    """It asks for what cannot be had here: that is the object's fault, and not the kernel's."""
    error = refused(loader, ask("denied"), BadObject)
    assert "devices" in error.detail
    assert "EPERM" in error.detail or "not permitted" in error.detail


def test_pinned_map(loader: Loader) -> None:
    assert "pinned" in refused(loader, ask("pinned"), BadObject).detail
    assert not Path("/sys/fs/bpf/shared").exists()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not an ELF object"),
        (b"not ELF", "not an ELF object"),
        (b"\x7fELF", "libbpf cannot use"),
        (elf("globals")[:64], "libbpf cannot use"),
        (elf("globals")[:-700], "libbpf cannot use"),
        (Path("/proc/self/exe").read_bytes()[:1 << 20], "libbpf cannot use"),
        (elf("empty"), "holds no BPF program"),
    ],
    ids=["empty", "text", "magic", "header", "cut", "other-machine", "no-program"],
)  # fmt: skip
def test_bad_objects(loader: Loader, raw: bytes, reason: str) -> None:
    assert reason in refused(loader, ObjectRequest(raw), BadObject).detail


def test_too_many_programs_and_maps() -> None:
    with started(max_programs=1) as narrow:
        assert "programs are too many" in refused(narrow, ask("globals"), BadObject).detail
        narrow.load(ask("globals", programs=("entry",))).close()
    with started(max_maps=3) as narrow:
        assert "maps are too many" in refused(narrow, ask("globals"), BadObject).detail
    with pytest.raises(ValueError, match="253"):
        LoaderLimits(max_programs=200, max_maps=54)


# --- what it survives ------------------------------------------------------------------------


def test_object_that_crashes_libbpf(loader: Loader) -> None:
    raw = bytearray(builtin.read("count"))
    # In the BTF of the map's definition (BTF_KIND_STRUCT, 4 members, 32 bytes): the type of the
    # first member, which is now one that does not exist.
    member = raw.index(struct.pack("=II", 4 << 24 | 4, 32)) + 8
    raw[member + 7] = 0xFF
    error = refused(loader, ObjectRequest(bytes(raw)), BadObject)
    version = libbpf.Library()._lib.libbpf_minor_version()
    if version == 1:  # later ones refuse the object
        assert "signal 11 (SIGSEGV)" in error.detail


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
@pytest.mark.parametrize("which", ["broker", "parser"])
def test_process_that_crashes(loader: Loader, which: str, number: signal.Signals) -> None:
    with working(loader) as (broker, future):
        pid = broker if which == "broker" else children_of(broker)[0]
        os.kill(pid, number)
        with pytest.raises(BadObject, match=rf"signal {number.value} \({number.name}\)"):
            future.result(10)


def test_deadline() -> None:
    with started(seconds=0.3) as hasty:
        before = time.monotonic()
        assert "longer than 0.3 seconds" in refused(hasty, ask("slow"), BadObject).detail
        assert 0.3 <= time.monotonic() - before < 2


@pytest.mark.parametrize("which", ["broker", "parser"])
def test_process_that_is_stopped(which: str) -> None:
    with started(seconds=1) as hasty, working(hasty) as (broker, future):
        os.kill(broker if which == "broker" else children_of(broker)[0], signal.SIGSTOP)
        with pytest.raises(BadObject, match="longer than 1 seconds"):
            future.result(5)


def test_processor_time() -> None:
    with started(cpu_seconds=1) as hasty:
        assert "processor time" in refused(hasty, ask("slow"), BadObject).detail


def test_memory() -> None:
    with started(memory_bytes=40 << 20) as small:
        assert "out of memory" in refused(small, ask("core"), BadObject).detail
        small.load(ask("session")).close()


def test_server_killed_while_loading(loader: Loader) -> None:
    with started() as own:
        first = server_pid(own)
        with working(own) as (pid, future):
            child = os.pidfd_open(pid)
            os.kill(first, signal.SIGKILL)
            with pytest.raises(KernelError, match="ended while it worked") as caught:
                future.result(5)
            assert caught.value.number == errno.EAGAIN
            assert select.select([child], [], [], 2)[0], "the child outlived its server"
            os.close(child)
        own.load(ask("session")).close()
        assert server_pid(own) != first


def test_server_killed_between_loads() -> None:
    with started() as own:
        for _ in range(3):
            os.kill(server_pid(own), signal.SIGKILL)
            own.load(ask("session")).close()


def test_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The next one has this long to start.
    monkeypatch.setattr(loader_module, "_GRACE_SECONDS", 1.5)
    with started(seconds=0.2) as own:
        first = server_pid(own)
        os.kill(first, signal.SIGSTOP)
        refused(own, ask("session"), BadObject)
        until(lambda: own._server is None or own._server.ended.is_set())
        own.load(ask("session")).close()
        assert server_pid(own) != first


def test_close_while_loading() -> None:
    with started() as own, working(own) as (_, future):
        before = time.monotonic()
        own.close()
        assert time.monotonic() - before < 1.5
        with pytest.raises(ShuttingDown):
            future.result(5)
        with pytest.raises(ShuttingDown):
            own.load(ask("session"))


def test_many_at_once(loader: Loader) -> None:
    def one(index: int) -> str:
        name = ("globals", "reject", "session", "xdp", "core", "hog")[index % 6]
        try:
            loader.load(ask(name)).close()
        except KpmdError as error:
            return f"{name} {error.kind}"
        return name

    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(one, range(96)))
    expected = ["globals", "reject verifier-rejected", "session", "xdp wrong-attach-type", "core"]
    assert found == sorted([*expected, "hog too-large"] * 16)


def test_start_from_a_thread_that_ends() -> None:
    own = Loader(LoaderLimits())
    try:
        starter = threading.Thread(target=own.start)
        starter.start()
        starter.join()
        pid = server_pid(own)
        time.sleep(0.1)
        own.load(ask("session")).close()
        assert server_pid(own) == pid
    finally:
        own.close()


def test_mutated_objects(loader: Loader) -> None:
    """Whatever comes, the answer is a program or an error that a client may see; nothing grows."""
    server = server_pid(loader)
    sizes = [int(status_of(pid)["VmRSS"].split()[0]) for pid in (os.getpid(), server)]
    rng = random.Random(20)  # noqa: S311 - the same mutations each time
    seen: dict[str, int] = {}
    details: list[str] = []
    for _ in range(150):
        for whole in (builtin.read("count"), elf("globals")):
            raw = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 4))):
                raw[rng.randrange(len(raw))] = rng.choice((0, 0x7F, 0x80, 0xFF))
            try:
                loader.load(ObjectRequest(bytes(raw))).close()
                kind = "loaded"
            except KpmdError as error:
                kind = error.kind
                details.append(error.detail)
            seen[kind] = seen.get(kind, 0) + 1
    assert [each for each in details if "makes no sense" in each or "gave up" in each] == []
    assert set(seen) <= {
        "loaded", "bad-object", "verifier-rejected", "wrong-attach-type", "invalid", "kernel",
        "too-large",
    }  # fmt: skip
    assert min(seen["loaded"], seen["bad-object"], seen["verifier-rejected"]) > 10
    assert server_pid(loader) == server
    after = [int(status_of(pid)["VmRSS"].split()[0]) for pid in (os.getpid(), server)]
    assert all(now - then < 8192 for then, now in zip(sizes, after, strict=True))


# --- how it is confined ----------------------------------------------------------------------


def capabilities(status: dict[str, str]) -> dict[str, int]:
    return {name: int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")}


def limits_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return {line[:25].strip(): line[26:].split()[:2] for line in lines}


def kinds(links: list[str]) -> list[str]:
    """What FDs are, without what is made of bpf(2) and the files of the system."""
    own = [link for link in links if "anon_inode:bpf" not in link and link != "anon_inode:btf"]
    files = ("/sys/", "/boot/", "/proc/version", "/proc/config")
    return sorted(link.split(":")[0].split(" ")[0] for link in own if not link.startswith(files))


def test_processes_are_confined(loader: Loader) -> None:
    with working(loader) as (broker, future):
        (parser,) = children_of(broker)
        status = {pid: status_of(pid) for pid in (broker, parser)}
        limits = {pid: limits_of(pid) for pid in (broker, parser)}
        links = {pid: kinds(links_of(pid)) for pid in (broker, parser)}
        os.kill(broker, signal.SIGKILL)
        with pytest.raises(BadObject):
            future.result(5)
    none = {"Inh": 0, "Prm": 0, "Eff": 0, "Bnd": CAPS, "Amb": 0}
    assert capabilities(status[broker]) == {**none, "Prm": CAPS, "Eff": CAPS}
    assert capabilities(status[parser]) == none
    for pid in (broker, parser):
        assert status[pid]["NoNewPrivs"] == "1"
        assert status[pid]["Seccomp"] == "2"
        assert status[pid]["Uid"].split() == status[pid]["Gid"].split() == ["65534"] * 4
        assert status[pid]["Groups"] == ""
        assert limits[pid]["Max address space"] == [str(512 << 20)] * 2
        assert limits[pid]["Max cpu time"] == ["10", "11"]
        assert limits[pid]["Max core file size"] == limits[pid]["Max processes"] == ["0", "0"]
        assert limits[pid]["Max open files"] == ["512", "512"]
        assert limits[pid]["Max file size"] == ["1048576", "1048576"]
    # stdin and stdout, libbpf's words, the request, and the way to the broker.
    assert links[parser] == ["/dev/null", "/dev/null", "/memfd", "/memfd", "socket"]
    # A /dev/null for addresses of the kernel; the words twice, the request, the kernel's types
    # twice, the answer; the parser: its calls, its memory, itself, and the way to it.
    assert links[broker] == [
        *["/dev/null"] * 3, *["/memfd"] * 5,
        f"/proc/{parser}/mem", "anon_inode", "anon_inode", "socket", "socket",
    ]  # fmt: skip


def test_server_holds_nothing_of_the_daemon() -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with started() as own:
            own.load(ask("session")).close()
            pid = server_pid(own)
            assert sorted(links_of(pid))[:2] == ["/dev/null", "/dev/null"]
            # stdin, stdout, stderr, the control socket, and the kernel's types.
            until(lambda: len(links_of(pid)) == 5)
            assert os.getsid(pid) == os.getpgid(pid) == pid
            assert int(status_of(pid)["SigBlk"], 16) == 0
            assert int(status_of(pid)["VmRSS"].split()[0]) < 20_000
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.killpg(pid, number)
            own.load(ask("session")).close()
            assert server_pid(own) == pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        os.close(read_end)
        os.close(write_end)


def test_all_end_with_the_daemon() -> None:
    script = (
        "import sys, threading, time\n"
        "from kpmd.bpf.loader import *\n"
        "loader = Loader(LoaderLimits())\n"
        "loader.start()\n"
        "print(loader._server.pid, flush=True)\n"
        "loader.load(ObjectRequest(open(sys.argv[1], 'rb').read()))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(OBJECTS / "slow.bpf.o")], stdout=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        server = int(daemon.stdout.readline())
        child = until(lambda: children_of(server))[0]
        fds = [os.pidfd_open(server), os.pidfd_open(child)]
        # Stopped, the server cannot see the end of the socket: only the kernel can end it.
        os.kill(server, signal.SIGSTOP)
        daemon.kill()
    try:
        for fd in fds:
            assert select.select([fd], [], [], 2)[0], "outlived the daemon"
    finally:
        for fd in fds:
            os.close(fd)


def test_fds_are_closed_when_the_answer_is_refused(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(answer: Answer, programs: tuple[str, ...] | None) -> LoadedObject:
        assert len(answer.fds) == 6
        raise BadObject("no")

    monkeypatch.setattr(loader_module, "checked", refuse)
    refused(loader, ask("globals"), BadObject)


def test_daemon_without_cap_bpf() -> None:
    script = (
        "import sys\n"
        "from kpmd.bpf import confine\n"
        "from kpmd.bpf.loader import *\n"
        "for cap in confine.CHILD_CAPS: confine.prctl(24, cap)\n"
        "loader = Loader(LoaderLimits())\n"
        "try: loader.load(ObjectRequest(open(sys.argv[1], 'rb').read()))\n"
        "except Exception as error: print(type(error).__name__, error.fields)\n"
        "loader.close()\n"
    )
    command = [sys.executable, "-c", script, str(OBJECTS / "session.bpf.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "KernelError {'errno': 'EPERM'}\n"


def test_missing_libbpf() -> None:
    with pytest.raises(NotSupported) as caught:
        libbpf.Library("libkpmd-none.so.1")
    assert caught.value.fields["needs"] == "libkpmd-none.so.1"
    # And the same through all processes, in a mount namespace that hides the library.
    maps = Path(f"/proc/{os.getpid()}/maps")
    libbpf.Library()
    path = next(line.split()[-1] for line in maps.read_text().splitlines() if "libbpf" in line)
    script = (
        "import sys\n"
        "from kpmd.bpf.loader import *\n"
        "loader = Loader(LoaderLimits())\n"
        "try: loader.load(ObjectRequest(open(sys.argv[1], 'rb').read()))\n"
        "except Exception as error: print(type(error).__name__, error.fields)\n"
        "loader.close()\n"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'mount --bind /dev/null "$1" && shift && exec "$@"', "sh",
         path, sys.executable, "-c", script, str(OBJECTS / "session.bpf.o")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "NotSupported {'needs': 'libbpf.so.1'}\n"


# --- answers of a child that lies ------------------------------------------------------------


def answer_of(raw: bytes, fds: list[int], most: int = 8) -> Answer:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            rights = array.array("i", fds)
            theirs.sendmsg([raw], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        answer = Answer(most)
        while answer.receive(ours):
            pass
    return answer


GOOD = (
    '{"programs": [{"name": "p", "attach": 42, "log": null}],'
    ' "maps": [{"name": "m", "key_type": 1, "value_type": 2}], "btf": "QlRG"}'
)


@pytest.fixture
def pair(loader: Loader) -> Iterator[tuple[int, int]]:
    """The FDs of a program and of a map."""
    loaded = loader.load(ask("nobtf"))
    yield loaded.programs[0].fd.fileno(), loaded.maps[0].fd.fileno()
    loaded.close()


def test_honest_answer(pair: tuple[int, int]) -> None:
    answer = answer_of(GOOD.encode(), list(pair))
    loaded = checked(answer, ("p",))
    assert [(each.key_type, each.value_type) for each in loaded.maps] == [(1, 2)]
    assert loaded.btf == b"BTF"
    loaded.close()
    assert answer.fds == []


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "[]",
        "5",
        "{}",
        "[" * 100_000,
        "1" * 10_000,
        '{"programs": [], "maps": [{"name": "a"}, {"name": "b"}]}',
        '{"programs": 1, "maps": 2}',
        GOOD.replace("42", "43"),
        GOOD.replace("42", "[]"),
        GOOD.replace('"p"', "7"),
        GOOD.replace('"p"', '"q"'),
        GOOD.replace('"m"', '"' + "m" * 300 + '"'),
        GOOD.replace("null", '"' + "x" * 70_000 + '"'),
        GOOD.replace("null", "{}"),
        GOOD.replace('"QlRG"', "null"),
        GOOD.replace("QlRG", "?"),
        GOOD.replace(', "btf": "QlRG"', ""),
        GOOD.replace('"key_type": 1', '"key_type": -1'),
        GOOD.replace('"key_type": 1', '"key_type": "1"'),
        GOOD.replace(', "value_type": 2', ""),
        '{"error": "internal", "detail": "x"}',
        '{"error": [], "detail": "x"}',
        '{"error": "bad-object"}',
        '{"error": "kernel", "detail": "x", "errno": -1}',
        '{"error": "kernel", "detail": "x", "errno": "5"}',
        '{"error": "invalid", "detail": "x", "fields": {"errors": [{"loc": {}, "msg": "x"}]}}',
        '{"error": "verifier-rejected", "detail": "x", "fields": {"verifier_log": 1}}',
        '{"error": "not-supported", "detail": "x", "fields": 1}',
    ],
)
def test_nonsense(pair: tuple[int, int], raw: str) -> None:
    answer = answer_of(raw.encode() or b"\0", list(pair))
    with pytest.raises(BadObject, match="makes no sense"):
        checked(answer, ("p",))
    answer.close()


def test_fds_are_what_they_are_said_to_be(pair: tuple[int, int]) -> None:
    program, map_ = pair
    null = os.open("/dev/null", os.O_RDONLY)
    for fds in ([map_, map_], [program, program], [null, map_], [program, null], [program],
                [program, map_, map_], [program] * 9, []):  # fmt: skip
        answer = answer_of(GOOD.encode(), fds)
        with pytest.raises(BadObject, match="makes no sense"):
            checked(answer, None)
        answer.close()
    os.close(null)


def test_endless_answer() -> None:
    ours, theirs = socket.socketpair()
    answer = Answer(8)
    with ours, theirs:
        theirs.setblocking(False)
        for _ in range(200):
            try:
                theirs.send(b" " * 65536)
            except BlockingIOError:
                answer.receive(ours)
        while answer.receive(ours):
            pass
    assert len(answer.raw) <= 1 << 20
    with pytest.raises(BadObject, match="too long"):
        checked(answer, None)


# --- what ships with kpmd --------------------------------------------------------------------


def test_builtins_load(loader: Loader) -> None:
    assert set(builtin.BUILTINS) == {"count", "latency", "stacks", "trace"}
    for name in builtin.BUILTINS:
        loaded = loader.load(ObjectRequest(builtin.read(name), globals={"target_pid": 7}))
        assert (7).to_bytes(4, sys.byteorder) in content(loaded, ".rodata")
        assert not any(content(loaded, ".bss"))
        loaded.close()
    with pytest.raises(KeyError):
        builtin.read("../../errors")
