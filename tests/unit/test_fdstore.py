"""Bundles: what goes into the manager's FD store, and what the next process finds there."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kpmd.bpf.fd import OwnedFd
from kpmd.runtime import fdstore as module
from kpmd.runtime.fdstore import Adopted, Bundle, FdStore, Full, capacity
from kpmd.runtime.notify import Notifier
from tests.fakes.systemd import Manager

HEAD = {"kpmd": 1, "kind": "link"}
BODY = b'{"a": 1}'


@pytest.fixture
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="kpmd-") as folder:
        made = Manager(Path(folder))
        yield made
        made.close()


@pytest.fixture
def store(manager: Manager) -> FdStore:
    return FdStore(Notifier(manager.address), 10)


@pytest.fixture
def fds() -> Iterator[list[OwnedFd]]:
    """Some objects, each with a number of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(OwnedFd(os.eventfd(100 + each), "x")) for each in range(300)]


@contextmanager
def a_bundle(store: FdStore, fds: list[OwnedFd], name: str = "lnk-1") -> Iterator[Bundle]:
    """A bundle that is stored, and dropped in the end."""
    bundle = Bundle(store, name)
    bundle.put(HEAD, BODY, fds)
    try:
        yield bundle
    finally:
        bundle.drop()


def leave(bundle: Bundle) -> None:
    """What the end of a process does to its bundles: it drops nothing."""
    for sock in bundle._sockets:
        sock.close()
    if bundle._state is not None:
        bundle._state.close()


@contextmanager
def adopted(manager: Manager, **limits: int) -> Iterator[list[Adopted]]:
    """What the next process finds; it goes on from there, and drops all of it in the end."""
    store = FdStore(Notifier(manager.address), **({"capacity": 10} | limits))
    found = store.adopt(manager.pass_on())
    try:
        yield found
    finally:
        for each in found:
            each.close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 0),
        ({"FDSTORE": "7"}, 7),
        ({"KPMD_FDSTORE": "8"}, 8),
        ({"FDSTORE": "7", "KPMD_FDSTORE": "8"}, 7),
        ({"FDSTORE": "0", "KPMD_FDSTORE": "8"}, 0),
        ({"FDSTORE": "", "KPMD_FDSTORE": "8"}, 8),
        ({"FDSTORE": "-1", "KPMD_FDSTORE": "many"}, 0),
    ],
)
def test_the_capacity_is_what_the_manager_says(environ: dict[str, str], expected: int) -> None:
    assert capacity(environ) == expected
    assert environ == {}


def test_no_manager_no_store() -> None:
    store = FdStore(Notifier(None), 10)
    assert not store
    bundle = Bundle(store, "lnk-1")
    bundle.put(HEAD, BODY, [])
    bundle.update(lambda: HEAD)
    bundle.drop()


@pytest.mark.parametrize("count", [0, 1, 249, 250, 300])
def test_what_is_put_in_is_found_again(
    manager: Manager, store: FdStore, fds: list[OwnedFd], count: int
) -> None:
    bundle = Bundle(store, "lnk-1")
    bundle.put(HEAD, BODY, fds[:count])
    assert store.used == len(manager.entries("lnk-1")) == (1 if count < 250 else 2)
    bundle.update(lambda: HEAD | {"detaching": "deleted"})
    leave(bundle)
    with adopted(manager) as (found,):
        assert (found.name, found.whole, found.empty) == ("lnk-1", True, False)
        assert found.head == HEAD | {"detaching": "deleted"}
        assert found.body == BODY
        numbers = [int.from_bytes(os.read(each.fileno(), 8), "little") for each in found.fds]
        assert numbers == [100 + each for each in range(count)]
    assert manager.names == []


def test_the_queue_is_emptied_before_the_manager_has_done_anything(
    manager: Manager, store: FdStore, fds: list[OwnedFd]
) -> None:
    with a_bundle(store, fds[:3]) as bundle:
        manager.pump()
        assert sum(manager.references().values()) == 3
        manager.busy = True
        bundle.drop()
        assert sum(manager.references().values()) == 0
        manager.busy = False
        assert manager.names == []
        assert store.used == 0
        # Whatever comes behind it does nothing.
        bundle.drop()
        bundle.put(HEAD, BODY, fds[:3])
        bundle.update(lambda: HEAD)
        assert manager.names == []


def test_a_full_store_takes_nothing(manager: Manager, fds: list[OwnedFd]) -> None:
    store = FdStore(Notifier(manager.address), 2)
    with a_bundle(store, fds[:1], "lnk-1"):
        for many in (300, 260):
            with pytest.raises(Full, match="2"):
                Bundle(store, "lnk-2").put(HEAD, BODY, fds[:many])
        with a_bundle(store, [], "lnk-3"):
            with pytest.raises(Full):
                Bundle(store, "lnk-4").put(HEAD, BODY, [])
            assert manager.names == ["lnk-1", "lnk-3"]
        with a_bundle(store, [], "lnk-5"):
            assert manager.names == ["lnk-1", "lnk-5"]


def test_a_manager_that_is_not_there(manager: Manager, store: FdStore, fds: list[OwnedFd]) -> None:
    with a_bundle(store, fds[:1]) as bundle:
        manager.pump()
        manager.hide()
        with pytest.raises(FileNotFoundError):
            Bundle(store, "lnk-2").put(HEAD, BODY, fds[:1])
        assert store.used == 1
        bundle.drop()
        # It is told nothing; but what it holds is empty.
        manager.show()
        assert manager.names == ["lnk-1"]
        assert sum(manager.references().values()) == 0
    with adopted(manager) as (found,):
        assert found.empty
    assert manager.names == []


def test_a_state_that_grows_over_its_head_is_refused(store: FdStore, manager: Manager) -> None:
    bundle = Bundle(store, "lnk-1")
    with pytest.raises(ValueError, match="too long"):
        bundle.put({"x": "y" * 256}, BODY, [])
    assert manager.names == []
    assert store.used == 0


def test_what_is_closed_meanwhile_is_not_stored(
    manager: Manager, store: FdStore, fds: list[OwnedFd]
) -> None:
    """Its link is being detached: whoever does that drops the bundle, too."""
    fds[1].close()
    with a_bundle(store, fds[:3]):
        assert manager.names == []
        assert store.used == 0


def test_more_than_the_manager_takes_now_can_be_taken_out(
    manager: Manager, store: FdStore, fds: list[OwnedFd]
) -> None:
    """Its limit was lowered while kpmd was not there."""
    for name in ("lnk-1", "lnk-2", "lnk-3"):
        bundle = Bundle(store, name)
        bundle.put(HEAD, BODY, fds[:1])
        leave(bundle)
    with adopted(manager, capacity=1) as found:
        assert len(found) == 3
        for each in found:
            each.bundle.drop()
        assert manager.names == []


@pytest.mark.parametrize("lost", [0, 1])
def test_a_part_alone_is_not_whole(
    manager: Manager, store: FdStore, fds: list[OwnedFd], lost: int
) -> None:
    bundle = Bundle(store, "lnk-1")
    bundle.put(HEAD, BODY, fds)
    leave(bundle)
    manager.forget(manager.entries("lnk-1")[lost])
    with adopted(manager) as (found,):
        assert not found.whole
    assert manager.names == []


def test_a_bare_one_is_taken_out_too(manager: Manager, fds: list[OwnedFd]) -> None:
    manager.keep("lnk-1", fds[0].fileno())
    with adopted(manager) as (found,):
        assert found.head is None
        assert len(found.fds) == 1
    assert manager.names == []


def test_want_of_file_descriptors_is_no_reason_to_drop_anything(
    manager: Manager, store: FdStore, fds: list[OwnedFd]
) -> None:
    """LimitNOFILE= was lowered: recvmsg(2) gives fewer FDs than there are, and says MSG_CTRUNC.

    That is another thing than a bundle of which nothing more was ever stored, which is ended.
    """
    bundle = Bundle(store, "lnk-1")
    bundle.put(HEAD, BODY, fds[:20])
    leave(bundle)
    passed = manager.pass_on()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_ = FdStore(Notifier(manager.address), 10)
    found: list[Any] = []
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 5, hard))
    try:
        found = next_.adopt(passed)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found
    for each in found:
        assert not each.legible
        assert each.whole, "taken for one that was never finished, and so ended"
        assert not each.empty, "taken for one that was taken out, and so ended"
        assert each.fds == []
        # It is all there still, for who has the room.
        (sock,) = each.bundle._sockets
        data, numbers, all_of_it = module._receive(sock, socket.MSG_PEEK)
        for number in numbers:
            os.close(number)
        assert (data, len(numbers), all_of_it) == (b"0 21", 21, True)
        each.close()
