"""What a parser can do that was taken over, on this machine's kernel: nothing.

In place of libbpf an attack of ``tests.fakes.hostile`` runs, in the true processes of the loader.
Needs root, bpf(2), libbpf.so.1 and libseccomp.so.2; fails where they are missing.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kpmd.bpf import helpers
from kpmd.bpf import loader as loader_module
from kpmd.bpf.abi import AttachType
from kpmd.bpf.fd import tracer
from kpmd.bpf.loader import Loader, LoaderLimits, ObjectRequest
from kpmd.bpf.rights import Rights
from kpmd.errors import BadObject, Forbidden, KpmdError, Quota, TooLarge
from tests.fakes.hostile import ATTACKS

RIGHTS = Rights(
    helpers.HARMLESS, False, False, frozenset(), frozenset({"array", "hash"}), 1 << 20, 10.0
)
KILLED = "crashed with signal 31 (SIGSYS)"


@pytest.fixture(scope="module", autouse=True)
def taken_over() -> Iterator[None]:
    """From here on the servers that are started run attacks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loader_module,
            "_COMMAND",
            "import sys; sys.path.append(sys.argv.pop());"
            "from kpmd.bpf.loader_server import main; from tests.fakes.hostile import attack;"
            "main(attack)",
        )
        yield


@contextmanager
def started(**limits: Any) -> Iterator[Loader]:
    loader = Loader(LoaderLimits(**limits))
    try:
        loader.start()
        yield loader
    finally:
        loader.close()


@pytest.fixture(scope="module")
def loader(taken_over: None) -> Iterator[Loader]:
    with started() as ready:
        ready.load(ObjectRequest(b"nothing")).close()
        yield ready


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def numbers(server: int) -> list[int]:
    """Of the FDs that are open, here and in the server."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), server)]


def until(probe: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not probe():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def nothing_left(loader: Loader) -> Iterator[None]:
    """After each attack: the same FDs, here and in the server, and no process."""
    assert loader._server is not None
    server = loader._server.pid
    until(lambda: numbers(server)[1] == 5)
    before = numbers(server)
    held = tracer.held()
    yield
    assert tracer.held() == held
    assert children(server) == []
    until(lambda: numbers(server) == before)  # it closes the last one after its last word
    loader.load(ObjectRequest(b"nothing")).close()


def outcome(loader: Loader, attack: str, rights: Rights | None = None) -> KpmdError:
    assert attack in ATTACKS
    with pytest.raises(KpmdError) as caught:
        loader.load(ObjectRequest(attack.encode(), rights=rights)).close()
    return caught.value


@pytest.mark.parametrize(
    "attack",
    ["unlink", "chdir", "mkdir", "socket", "socketpair", "fork", "thread", "exec", "ptrace", "dup",
     "kill-itself", "kill-broker", "prctl", "seccomp", "send-fd", "make-code", "turn-to-code"],
)  # fmt: skip
def test_killed_at_once(loader: Loader, attack: str) -> None:
    error = outcome(loader, attack)
    assert type(error) is BadObject
    assert KILLED in error.detail


@pytest.mark.parametrize(
    ("attack", "errnos"),
    [
        ("open", "ENOENT ENAMETOOLONG"),
        ("open-write", "EACCES"),
        ("open-allowed", "worked: b'0'"),
        ("stat", "ENOENT"),
        ("ioctl", "ENOTTY"),
        ("commands", "EINVAL"),
        ("attr-nowhere", "EFAULT"),
        ("attr-large", "E2BIG"),
        ("program-types", "EINVAL"),
        ("program-attach", "EINVAL"),
        ("program-large", "E2BIG"),
        ("program-nowhere", "EFAULT"),
        ("records", "EINVAL"),
        ("license", "ENAMETOOLONG"),
        ("foreign-maps", "EBADF"),
        ("foreign-fds", "EBADF"),
        ("tail-calls", "EBADF"),
        ("tail-call", "worked: 0"),
        ("other-maps", "EPERM"),
        ("map-fields", "EINVAL"),
        ("many-probes", "worked: probe EPERM"),
        ("log", "EFAULT"),
    ],
)
def test_refused(loader: Loader, attack: str, errnos: str) -> None:
    error = outcome(loader, attack)
    assert type(error) is BadObject
    assert error.detail == f"told: {errnos}"


def test_abort(loader: Loader) -> None:
    assert "crashed with signal" in outcome(loader, "abort").detail


def test_a_programs_fd_is_not_to_be_had(loader: Loader) -> None:
    # The number that it gets is of /dev/null, which reads as nothing.
    assert outcome(loader, "real-program").detail == "told: b''"


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name.startswith("lie-")])
def test_lies(loader: Loader, attack: str) -> None:
    error = outcome(loader, attack)
    assert type(error) is BadObject
    assert "makes no sense" in error.detail


def test_an_endless_answer(loader: Loader) -> None:
    assert "signal 9 (SIGKILL)" in outcome(loader, "talk").detail


def test_maps_without_end(loader: Loader) -> None:
    assert "more maps than it tells of" in outcome(loader, "many-maps").detail


@pytest.mark.parametrize("attack", ["map-large", "hidden-map"])
def test_maps_beyond_what_is_allowed(loader: Loader, attack: str) -> None:
    assert type(outcome(loader, attack)) is TooLarge
    error = outcome(loader, attack, replace(RIGHTS, map_bytes=4096))
    assert type(error) is TooLarge  # the daemon's own limit comes first


def test_types_and_bytes_of_maps(loader: Loader) -> None:
    error = outcome(loader, "tail-call", RIGHTS)
    assert type(error) is Forbidden
    assert error.fields == {"refused": ["prog_array"]}
    assert outcome(loader, "hidden-type", RIGHTS).fields == {"refused": ["task_storage"]}
    error = outcome(loader, "nothing", replace(RIGHTS, map_bytes=11))
    assert type(error) is Quota
    assert error.fields == {"limit": "map_bytes", "used": 0, "most": 11, "asked": 12}
    loader.load(ObjectRequest(b"nothing", rights=replace(RIGHTS, map_bytes=12))).close()


def test_an_honest_one(loader: Loader) -> None:
    loaded = loader.load(ObjectRequest(b"nothing"))
    assert [(each.name, each.attach) for each in loaded.programs] == [("p", AttachType.NONE)]
    assert [each.name for each in loaded.maps] == ["m"]
    loaded.close()


@pytest.mark.parametrize("attack", ["wait", "crowd", "burn"])
def test_time(attack: str) -> None:
    with started(seconds=0.4) as hasty:
        assert "longer than 0.4 seconds" in outcome(hasty, attack).detail
        hasty.load(ObjectRequest(b"nothing")).close()
    with started() as patient:
        error = outcome(patient, attack, replace(RIGHTS, seconds=0.3))
        assert "longer than 0.3 seconds" in error.detail


def test_processor_time() -> None:
    with started(cpu_seconds=1) as hasty:
        assert "1 seconds of processor time" in outcome(hasty, "burn").detail


def test_memory(loader: Loader) -> None:
    assert "out of memory" in outcome(loader, "eat").detail


def test_attacks_side_by_side_leave_the_daemon_as_it_was(loader: Loader) -> None:
    """All that end by themselves, four at a time: nobody waits, nothing grows."""
    attacks = [name for name in ATTACKS if name not in ("wait", "crowd", "burn", "eat", "nothing")]

    def run(number: int) -> None:
        for attack in attacks[number::4]:
            outcome(loader, attack, RIGHTS if number % 2 else None)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, threading.active_count()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert threading.active_count() == before[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[0] < 20 << 10
