"""Clients and the pidfds of their processes."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from kpmd.core.changes import Ending
from kpmd.core.registry import Registry
from kpmd.runtime.carrier import Carrier
from kpmd.runtime.clients import Clients
from kpmd.runtime.executor import Executor
from kpmd.runtime.peer import Peer, process_of
from tests.http.serving import until
from tests.unit.records import ROOT, a_program

pytestmark = pytest.mark.every_loop


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def endings() -> list[Ending]:
    return []


@pytest.fixture
async def clients(registry: Registry, endings: list[Ending]) -> AsyncIterator[Clients]:
    executor = Executor()

    def keep(ending: Ending) -> None:
        if ending:
            endings.append(ending)

    clients = Clients(registry, keep, Carrier(None, executor))
    yield clients
    clients.close()
    await executor.drain()


@pytest.fixture
def child() -> Iterator[int]:
    """The pid of a process that waits to be killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    yield pid
    os.close(writing)
    os.waitpid(pid, 0)


def peer(pid: int, number: int = 0) -> Peer:
    """A peer that is process ``pid``, and known under ``number``."""
    return Numbered(number or pid, 1000, 1000, os.pidfd_open(pid), "x")


class Numbered(Peer):
    """A peer on a kernel without pidfs, where processes are told apart by number."""

    @property
    def process(self) -> int:
        return self.pid


def kill(pid: int) -> None:
    """End a process, and wait without reaping it."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_a_process_that_ends_is_noticed(
    clients: Clients, registry: Registry, endings: list[Ending], child: int
) -> None:
    connection = clients.connect(peer(child))
    client = connection.client
    program = a_program(connection)
    registry.add_loaded(ROOT, connection, [program], [], 0)
    assert list(registry.clients) == [client]
    kill(child)
    await until(lambda: client.ended)
    assert list(registry.clients) == []
    assert [each.programs for each in endings] == [[program]]
    clients.disconnect(connection)


async def test_one_that_has_ended_before_it_is_watched(
    clients: Clients, registry: Registry, child: int
) -> None:
    known = peer(child)
    kill(child)
    client = clients.connect(known).client
    await until(lambda: client.ended)
    assert list(registry.clients) == []


async def test_connections_of_one_process_share_a_client_and_a_pidfd(
    clients: Clients, registry: Registry
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first, second = clients.connect(peer(os.getpid())), clients.connect(peer(os.getpid()))
    assert first.client is second.client
    assert first.client.connections == 2
    assert len(os.listdir("/proc/self/fd")) == before + 1
    clients.disconnect(first)
    assert list(registry.clients) == [first.client]
    clients.disconnect(second)
    assert list(registry.clients) == []
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_number_that_is_used_again_is_another_client(
    clients: Clients, registry: Registry, endings: list[Ending], child: int
) -> None:
    """The first has ended, and the loop has not been told yet."""
    left = clients.connect(peer(child, number=77))
    program = a_program(left)
    registry.add_loaded(ROOT, left, [program], [], 0)
    kill(child)
    first, second = left.client, clients.connect(peer(os.getpid(), number=77)).client
    assert second is not first
    assert first.ended
    assert not second.ended
    assert list(registry.clients) == [second]
    assert [each.programs for each in endings] == [[program]]
    # The connection that the first one left closes: it is not the second's.
    clients.disconnect(left)
    assert second.connections == 1
    assert list(registry.clients) == [second]


async def test_a_process_that_cannot_be_watched_is_not_listed(
    clients: Clients, registry: Registry
) -> None:
    connection = clients.connect(Peer(5, 1000, 1000, None, "", "it has ended"))
    assert connection.client.ended == "it has ended"
    assert list(registry.clients) == []
    assert registry.find_client(5, 1000, 1000) is None
    clients.disconnect(connection)
    assert list(registry.clients) == []


async def test_processes_are_told_apart_by_what_the_kernel_has(child: int) -> None:
    """By the inode of pidfs (kernel 6.9), else by number; a number of 0 tells nothing."""
    ours, same, other = (os.pidfd_open(pid) for pid in (os.getpid(), os.getpid(), child))
    try:
        assert process_of(ours, os.getpid()) == process_of(same, os.getpid())
        assert process_of(ours, os.getpid()) != process_of(other, child)
        on_pidfs = os.fstat(ours).st_ino != os.fstat(other).st_ino
        assert (process_of(ours, 0) is not None) == on_pidfs
        if on_pidfs:
            assert process_of(ours, 0) == process_of(ours, os.getpid()) != process_of(other, 0)
    finally:
        for fd in (ours, same, other):
            os.close(fd)
