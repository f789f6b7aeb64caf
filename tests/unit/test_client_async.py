"""``AsyncClient``: many tasks at once, and what cancelling one of them does."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpmd.client import calls
from kpmd.client.aio import AsyncClient
from kpmd.client.errors import ConnectionFailed, KernelError
from tests.unit.test_client import Answer, always, http, problem, scripted
from tests.unit.test_client_events import HEAD, chunk, event

pytestmark = pytest.mark.every_loop

LINK = http({"id": "lnk-1"}, 201)
Script = Callable[[str, str, Any], Answer]


class Gate:
    """A script that answers a method only when it may go on."""

    def __init__(self, method: str, answer: Answer) -> None:
        self.method = method
        self.answer = answer
        self.came = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __call__(self, method: str, target: str, body: Any) -> Answer:
        if method != self.method:
            return http({}, 204) if method == "DELETE" else http({"version": "1"})
        self.came.release()
        self.go_on.wait(10)
        return self.answer

    async def arrived(self, number: int = 1) -> None:
        for _ in range(number):
            assert await asyncio.to_thread(self.came.acquire, timeout=10)


async def test_calls_at_once_have_a_connection_each_up_to_a_bound() -> None:
    gate = Gate("GET", http({"version": "1"}))
    with scripted(gate) as server:
        async with AsyncClient(server.path) as client:
            many = [asyncio.create_task(client.version()) for _ in range(3 * calls.CONNECTIONS)]
            await gate.arrived(calls.CONNECTIONS)
            assert len(server.open) == calls.CONNECTIONS == len(server.seen)
            gate.go_on.set()
            assert {found["version"] for found in await asyncio.gather(*many)} == {"1"}
            assert len(server.open) == calls.CONNECTIONS


async def test_a_cancelled_call_closes_its_connection_and_no_other() -> None:
    gate = Gate("GET", http({"version": "1"}))
    with scripted(gate) as server:
        async with AsyncClient(server.path) as client:
            first = asyncio.create_task(client.version())
            await gate.arrived()
            second = asyncio.create_task(client.version())
            await gate.arrived()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            gate.go_on.set()
            assert (await second)["version"] == "1"
            # What the first was answered is nobody's.
            assert (await client.call("DELETE", "/x")) is None


async def test_cancelled_while_it_attaches_nothing_is_left() -> None:
    gate = Gate("POST", LINK)
    with scripted(gate) as server:
        async with AsyncClient(server.path) as client:
            entered = False

            async def work() -> None:
                nonlocal entered
                async with client.attached("prg-1", symbols=["a"]):
                    entered = True

            task = asyncio.create_task(work())
            await gate.arrived()
            task.cancel()
            await asyncio.sleep(0)
            gate.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [method for method, _, _ in server.seen] == ["POST", "DELETE"]
            assert not entered


async def test_cancelled_while_it_detaches_it_is_detached() -> None:
    gate = Gate("DELETE", http({}, 204))
    with scripted(lambda *call: LINK if call[0] == "POST" else gate(*call)) as server:
        async with AsyncClient(server.path) as client:

            async def work() -> None:
                async with client.attached("prg-1", symbols=["a"]):
                    pass

            task = asyncio.create_task(work())
            await gate.arrived()
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0)
            assert not task.done()
            gate.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert server.open != set()  # it was not broken off


@pytest.mark.parametrize("answer", [LINK, problem("kernel", 500)])
async def test_cancelled_in_the_block(answer: bytes) -> None:
    answers = {"POST": LINK, "DELETE": answer}
    inside = asyncio.Event()
    with scripted(lambda method, *_: answers[method]) as server:
        async with AsyncClient(server.path) as client:

            async def work() -> None:
                async with client.attached("prg-1", symbols=["a"]):
                    inside.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(work())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(server.seen) == 2


async def test_cancelled_and_refused() -> None:
    gate = Gate("POST", problem("kernel", 500))
    with scripted(gate) as server:
        async with AsyncClient(server.path) as client:
            task = asyncio.create_task(client.attached("prg-1", symbols=["a"]).__aenter__())
            await gate.arrived()
            task.cancel()
            await asyncio.sleep(0)
            gate.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(KernelError):
                await client.attached("prg-1", symbols=["a"]).__aenter__()


async def test_cancelled_while_there_is_no_daemon() -> None:
    """Nothing was sent: patience is not what a cancellation waits for."""
    async with AsyncClient("/nowhere/kpmd.sock", patience=1000) as client:
        task = asyncio.create_task(client.attached("prg-1", symbols=["a"]).__aenter__())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_a_stream_that_is_closed_by_another_task() -> None:
    with scripted(always(HEAD + chunk(event("a-1")))) as server:
        async with AsyncClient(server.path) as client, client.events() as events:
            assert (await anext(events))["seq"] == "a-1"
            waiting = asyncio.create_task(anext(events, None))
            await asyncio.sleep(0)
            events.close()
            assert await waiting is None
            # It connects where nobody has entered it, too; and the client closes what is left.
            other = client.events()
            assert (await anext(other))["seq"] == "a-1"
        assert [each async for each in other] == []


async def test_a_stream_that_is_cancelled() -> None:
    with scripted(always(HEAD)) as server:
        async with AsyncClient(server.path) as client, client.events() as events:
            waiting = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await asyncio.to_thread(server.closed.acquire, timeout=10)
            assert [each async for each in events] == []


async def test_a_busy_daemon_is_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        path = str(tmp_path / "s")
        sock.bind(path)
        sock.listen(0)
        async with AsyncClient(path, timeout=0.1) as client:
            calls_ = [client.version() for _ in range(3)]
            found = await asyncio.gather(*calls_, return_exceptions=True)
    for each in found:
        assert isinstance(each, ConnectionFailed)
        assert each.reason == "timeout"


async def test_a_busy_daemon_is_waited_for(tmp_path: Path) -> None:
    """More that wait than it takes: the kernel does not queue who does not block."""
    with socket.socket(socket.AF_UNIX) as sock:
        path = str(tmp_path / "s")
        sock.bind(path)
        sock.listen(0)
        async with AsyncClient(path) as client:
            tasks = [asyncio.create_task(client.version()) for _ in range(4)]

            def serve() -> None:
                for _ in tasks:
                    connection, _ = sock.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(http({"version": "1"}))

            await asyncio.gather(asyncio.to_thread(serve), *tasks)
