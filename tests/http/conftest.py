"""A daemon for each test, clients of this process, and processes of other users."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from kpmd.api import openapi
from kpmd.api.app import routes
from tests.fakes.kernel import FakeKernel
from tests.fakes.systemd import Manager
from tests.http.actor import Actor
from tests.http.house import Clock, House
from tests.http.samples import Gate
from tests.http.serving import Client, Served

Serve = Callable[..., Awaitable[Served]]


def open_gates(kernel: FakeKernel) -> None:
    """Let go what a failed test still holds."""
    for hook in kernel.hooks.values():
        if isinstance(hook, Gate):
            hook.open()


@pytest.fixture(scope="session", autouse=True)
def _one_document() -> Iterator[None]:
    """Have the OpenAPI document made once, and not anew for each of the tests' daemons."""
    made = openapi.to_json(routes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openapi, "to_json", lambda table: made)
        yield


@pytest.fixture
def no_garbage() -> Iterator[None]:
    """No pause to look through all that earlier tests have left; the daemon has none either."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    """A service manager with an FD store, which outlives the daemons."""
    with TemporaryDirectory(prefix="kpmd-") as folder:
        made = Manager(Path(folder))
        made.listen()
        yield made
        made.close()


@pytest.fixture
async def house(kernel: FakeKernel, manager: Manager) -> AsyncIterator[House]:
    """A machine with a first daemon."""
    async with AsyncExitStack() as stack:
        made = House(kernel, manager, stack)
        await made.start()
        yield made
        # A failed test may have left requests held up.
        open_gates(kernel)


@pytest.fixture
async def process(house: House) -> AsyncIterator[Callable[..., Awaitable[Actor]]]:
    """Makes processes on it; each speaks to the daemon that was there when it began."""
    async with AsyncExitStack() as stack:

        async def start(uid: int = 0) -> Actor:
            return await stack.enter_async_context(Actor(house.daemon.path, uid))

        yield start


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Makes daemons; all are stopped at the end."""
    async with AsyncExitStack() as stack:

        async def start(kernel: FakeKernel, **options: Any) -> Served:
            served = await Served.start(kernel, **options)
            stack.push_async_callback(served.stop)
            stack.callback(open_gates, kernel)
            return served

        yield start


@pytest.fixture
async def served(serve: Serve, kernel: FakeKernel) -> Served:
    return await serve(kernel)


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Client]:
    async with Client(served.path) as client:
        yield client


@pytest.fixture
async def actor(served: Served) -> AsyncIterator[Callable[..., Awaitable[Actor]]]:
    """Makes processes; all are killed at the end."""
    async with AsyncExitStack() as stack:

        async def start(
            uid: int = 0, path: Path | None = None, groups: Sequence[int] = ()
        ) -> Actor:
            return await stack.enter_async_context(Actor(path or served.path, uid, groups))

        yield start
