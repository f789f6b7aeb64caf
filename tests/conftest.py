"""What all tests share: the check for leaked file descriptors, and the event loops they run on."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Iterator

import pytest

from kpmd.bpf.fd import tracer

tracer.active = True
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_loop: runs on uvloop and on asyncio's own loop")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, LoopFactory]:
    """uvloop, as the daemon; tests marked ``every_loop`` run on asyncio's own as well."""
    import uvloop

    factories: dict[str, LoopFactory] = {"uvloop": uvloop.new_event_loop}
    if item.get_closest_marker("every_loop"):
        factories["asyncio"] = asyncio.new_event_loop
    return factories


@pytest.fixture(scope="session", autouse=True)
def _warm_loop() -> None:
    """Libuv keeps a pipe for the whole process from the first loop on: that is no leak."""
    import uvloop

    uvloop.run(asyncio.sleep(0))


def _open_fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that listdir itself had open
    return found


@pytest.fixture(autouse=True)
def no_leaked_fds(_warm_loop: None) -> Iterator[None]:
    """Fail the test after which more (or other) file descriptors are open than before."""
    held, before = tracer.held(), _open_fds()
    yield
    assert tracer.held() == held, "an OwnedFd was not closed"
    if len(_open_fds()) != len(before):
        gc.collect()  # a cycle may still hold some that are nobody's any more
    after = _open_fds()
    assert len(after) == len(before), {fd: after[fd] for fd in after.keys() - before.keys()}
