"""Clients and the pidfds of their processes."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from kpmd.core.registry import Ending, Registry
from kpmd.runtime.clients import Clients
from kpmd.runtime.peer import Peer
from tests.http.serving import until

pytestmark = pytest.mark.every_loop


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def endings() -> list[Ending]:
    return []


@pytest.fixture
async def clients(registry: Registry, endings: list[Ending]) -> AsyncIterator[Clients]:
    clients = Clients(registry, endings.append)
    yield clients
    clients.close()


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
    return Peer(number or pid, 1000, 1000, os.pidfd_open(pid), "x")


def kill(pid: int) -> None:
    """End a process, and wait without reaping it."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_a_process_that_ends_is_noticed(
    clients: Clients, registry: Registry, endings: list[Ending], child: int
) -> None:
    client = clients.connect(peer(child))
    assert list(registry.clients) == [client]
    kill(child)
    await until(lambda: client.ended)
    assert list(registry.clients) == []
    assert len(endings) == 1
    clients.disconnect(client)


async def test_one_that_has_ended_before_it_is_watched(
    clients: Clients, registry: Registry, child: int
) -> None:
    known = peer(child)
    kill(child)
    client = clients.connect(known)
    await until(lambda: client.ended)
    assert list(registry.clients) == []


async def test_connections_of_one_process_share_a_client_and_a_pidfd(
    clients: Clients, registry: Registry
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first = clients.connect(peer(os.getpid()))
    assert clients.connect(peer(os.getpid())) is first
    assert first.connections == 2
    assert len(os.listdir("/proc/self/fd")) == before + 1
    clients.disconnect(first)
    assert list(registry.clients) == [first]
    clients.disconnect(first)
    assert list(registry.clients) == []
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_number_that_is_used_again_is_another_client(
    clients: Clients, registry: Registry, endings: list[Ending], child: int
) -> None:
    """The first has ended, and the loop has not been told yet."""
    first = clients.connect(peer(child, number=77))
    kill(child)
    second = clients.connect(peer(os.getpid(), number=77))
    assert second is not first
    assert first.ended
    assert not second.ended
    assert list(registry.clients) == [second]
    assert len(endings) == 1
    # The connection that the first one left closes: it is not the second's.
    clients.disconnect(first)
    assert second.connections == 1
    assert list(registry.clients) == [second]


async def test_a_process_that_cannot_be_watched_is_not_listed(
    clients: Clients, registry: Registry
) -> None:
    client = clients.connect(Peer(5, 1000, 1000, None, "", "it has ended"))
    assert client.ended == "it has ended"
    assert list(registry.clients) == []
    assert registry.find_client(5, 1000, 1000) is None
    clients.disconnect(client)
    assert list(registry.clients) == []
