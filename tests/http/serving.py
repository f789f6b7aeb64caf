"""The real API over the fake kernel, on a real Unix socket, as ``kpmd.daemon`` serves it."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from kpmd.api.app import make_api, wind_down
from kpmd.api.server import Api
from kpmd.bpf.fd import OwnedFd
from kpmd.core.deny import DenyList
from kpmd.core.policy import Policy
from kpmd.core.specs import MAX_TARGETS
from kpmd.listener import Listener, make
from kpmd.runtime.audit import Record
from kpmd.runtime.carrier import owned_fds
from kpmd.runtime.fdstore import FdStore
from kpmd.runtime.notify import Notifier
from kpmd.runtime.policies import Policies
from kpmd.runtime.restore import restore
from kpmd.runtime.state import State, _Stored
from tests.fakes.audit import Recorded
from tests.fakes.kernel import FakeKernel
from tests.fakes.policies import OPEN
from tests.fakes.systemd import Manager
from tests.http.contract import Answer, check


class Served:
    """A daemon in this event loop. Make it with ``start``; ``stop`` ends it as SIGTERM does."""

    def __init__(
        self,
        kernel: FakeKernel,
        state: State,
        api: Api,
        runner: web.ServerRunner,
        patience: float,
    ) -> None:
        self.kernel = kernel
        self.state = state
        self._api = api
        self._runner = runner
        self._patience = patience
        self._listener: Listener | None = None
        self._server: asyncio.AbstractServer | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="kpmd-test-"))
        # Other users shall reach the socket in it.
        self._folder.chmod(0o755)
        self.path = self._folder / "kpmd.sock"

    @classmethod
    async def start(
        cls,
        kernel: FakeKernel,
        *,
        shutdown_seconds: float = 5.0,
        deny: str = "",
        max_targets: int = MAX_TARGETS,
        manager: Manager | None = None,
        clock: Callable[[], float] = time.monotonic,
        policy: Policy = OPEN,
        **limits: Any,
    ) -> Served:
        """Serve ``kernel``; ``deny`` is the deny list, ``limits`` are those of ``make_api``.

        ``manager``: whose FD store is used; what is in it is taken over. ``clock``: that of leases.
        ``policy``: everybody may do everything, unless it says otherwise.
        """
        loop = asyncio.get_running_loop()
        store = FdStore(Notifier(manager.address), manager.capacity) if manager else None
        state = State(
            kernel,
            deny=DenyList.parse(deny),
            max_targets=max_targets,
            store=store,
            policies=Policies(policy),
            audit=Recorded(),
            clock=clock,
        )
        await state.executor.run(kernel.start)
        if manager is not None and store is not None:
            await restore(state, store, manager.pass_on())
        api = make_api(state, **limits)
        runner = api.runner(shutdown_seconds)
        await runner.setup()
        assert runner.server is not None
        served = cls(kernel, state, api, runner, shutdown_seconds)
        served._listener = make(served.path, None, 0o666)
        served._server = await loop.create_unix_server(
            api.protocol(runner.server, loop), sock=served._listener.sock
        )
        return served

    @property
    def audit(self) -> list[Record]:
        """What was put on record."""
        assert isinstance(self.state.audit, Recorded)
        return self.state.audit.records

    @property
    def connections(self) -> int:
        """How many connections are open."""
        assert self._runner.server is not None
        return sum(each.transport is not None for each in self._runner.server.connections)

    @property
    def sockets(self) -> list[socket.socket]:
        """The server's ends of all connections."""
        assert self._runner.server is not None
        open_ = [each.transport for each in self._runner.server.connections]
        return [each.get_extra_info("socket") for each in open_ if each is not None]

    async def stop(self, *, keep: bool = False) -> None:
        """End it, in the daemon's order. Does nothing the second time.

        ``keep``: as where systemd is about to start the next one.
        """
        server, self._server = self._server, None
        if server is None or self._listener is None:
            return
        await wind_down(server, self._api, self._runner, self.state, self._patience, keep=keep)
        self._exit()

    async def kill(self) -> None:
        """End it as SIGKILL does: of what happens to it from now on it takes no notice."""
        server, self._server = self._server, None
        if server is None:
            return
        state = self.state
        state.stopping = True
        state.lease_timer.close()
        state.closing.stop()
        state.clients.close()
        setattr(state.clients, "disconnect", lambda connection: None)  # noqa: B010 - for mypy
        state.journal.close()
        state.records.stop()
        server.close()
        await self._runner.cleanup()
        await state.close()
        self._exit()

    def _exit(self) -> None:
        """What the kernel does for a process that is gone: it closes its file descriptors."""
        state = self.state
        bundles, handles = [*state.carrier._bundles.values()], [*state._handles.values()]
        for job in state.closing._jobs.values():
            assert isinstance(job.handle, _Stored)
            handles.append(job.handle.handle)
            if job.handle.bundle is not None:
                bundles.append(job.handle.bundle)
        for handle in handles:
            for fd in owned_fds(handle):
                OwnedFd.close(fd)  # not as the fake kernel's links close, which can be held up
        for bundle in bundles:
            if bundle._state is not None:
                bundle._state.close()
            for sock in bundle._sockets:
                sock.close()
        assert self._listener is not None
        self._listener.close()
        shutil.rmtree(self._folder)


class Client:
    """An HTTP client of this process, whose every answer is checked against the contract."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self._path)), auto_decompress=False
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One call; ``body`` is sent as JSON, ``data`` as it is."""
        assert self._session is not None
        if body is not None:
            data = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        url = URL("http://localhost" + path, encoded=True)
        async with self._session.request(
            method, url, data=data, headers=headers, allow_redirects=False
        ) as response:
            answer = Answer(response.status, CIMultiDict(response.headers), await response.read())
        check(method, path, answer)
        return answer

    async def get(self, path: str) -> Any:
        """GET that must succeed: its JSON."""
        answer = await self.request("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    async def post(self, path: str, body: object) -> Any:
        """POST that must make something: its JSON."""
        answer = await self.request("POST", path, body)
        assert answer.status == 201, answer.body
        return answer.json

    async def delete(self, path: str) -> None:
        """DELETE that must succeed."""
        answer = await self.request("DELETE", path)
        assert answer.status == 204, answer.body

    async def refused(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        status: int,
        kind: str,
        data: Any = None,
    ) -> Any:
        """A call that must be refused so: its problem document."""
        answer = await self.request(method, path, body, data=data)
        assert (answer.status, answer.json.get("kind")) == (status, kind), answer.body[:1000]
        return answer.json


async def raw(path: Path, data: bytes, answers: int = 1) -> list[Answer]:
    """Send ``data`` as it is and read that many answers."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            return [await read_answer(reader) for _ in range(answers)]
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """One answer off a connection."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    assert lines[0].startswith("HTTP/1."), lines
    pairs = (line.partition(":") for line in lines[1:] if line)
    headers = CIMultiDict({name: value.strip() for name, _, value in pairs})
    body = await reader.readexactly(int(headers.get("Content-Length", "0")))
    return Answer(int(lines[0].split()[1]), headers, body)


async def until(what: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for what the end of a process brings about, of which no event tells the test."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not come about in time"
        await asyncio.sleep(0.005)
