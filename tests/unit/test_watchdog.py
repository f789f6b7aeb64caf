"""Signs of life."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpmd.runtime.notify import Notifier
from kpmd.runtime.watchdog import keep_alive, watchdog_seconds
from tests.fakes.systemd import Manager


@pytest.fixture
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        made = Manager(Path(name))
        yield made
        made.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_PID": "7"}, None),
    ],
)
def test_how_long_the_manager_waits(environ: dict[str, str], seconds: float | None) -> None:
    given = {**environ, "PATH": "/bin"}
    assert watchdog_seconds(given, 7) == seconds
    assert given == {"PATH": "/bin"}, "no child takes them for its own"


async def told(manager: Manager, count: int) -> float:
    """Wait until there are so many signs of life; how long that took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while len(manager.told) < count:
        manager.pump()
        await asyncio.sleep(0.001)
    return loop.time() - began


async def test_twice_in_each_interval(manager: Manager) -> None:
    alive = asyncio.create_task(keep_alive(Notifier(manager.address), 0.1))
    took = await told(manager, 4)
    alive.cancel()
    assert 0.15 <= took < 1
    assert {tuple(lines) for lines, _ in manager.told} == {("WATCHDOG=1",)}


async def test_a_manager_that_reads_nothing_holds_nobody_up(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            notifier.send("STATUS=flood", wait=False)
            sent += 1
    alive = asyncio.create_task(keep_alive(notifier, 0.1))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not alive.done()
    # When it reads again, it is told.
    await told(manager, sent + 1)
    alive.cancel()
    assert manager.told[-1][0] == ["WATCHDOG=1"]


async def test_a_manager_that_is_gone_is_no_error(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    manager.hide()
    alive = asyncio.create_task(keep_alive(notifier, 0.02))
    await asyncio.sleep(0.02)
    assert not alive.done()
    manager.show()
    await told(manager, 1)
    alive.cancel()
