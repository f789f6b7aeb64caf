"""Another process, of another user if need be, that makes requests and can be killed."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import pickle
import signal
import socket
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from multidict import CIMultiDict

from tests.http.contract import Answer, check

NOBODY = 65534


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, blocking."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


class _Child:
    """What the child does: one command after the other, each answered."""

    def __init__(self, path: str, control: socket.socket) -> None:
        self._path = path
        self._control = control
        self._connections: dict[int, UnixConnection] = {}

    def _connection(self, number: int) -> UnixConnection:
        if number not in self._connections:
            self._connections[number] = UnixConnection(self._path)
            self._connections[number].connect()
        return self._connections[number]

    def connect(self, number: int) -> None:
        self._connection(number)

    def close(self, number: int) -> None:
        self._connections.pop(number).close()

    def give(self, number: int) -> None:
        """Pass the socket of a connection to the parent."""
        socket.send_fds(self._control, [b"x"], [self._connection(number).sock.fileno()])

    def send(self, number: int, data: bytes) -> None:
        self._connection(number).sock.sendall(data)

    def shut_down(self, number: int) -> None:
        self._connection(number).sock.shutdown(socket.SHUT_WR)

    def request(
        self, number: int, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        connection = self._connection(number)
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return Answer(response.status, CIMultiDict(response.getheaders()), response.read())

    def serve(self, control: BinaryIO) -> None:
        while True:
            try:
                name, arguments = pickle.load(control)  # noqa: S301 - from our own parent
            except EOFError:
                return
            try:
                result = getattr(self, name)(*arguments)
            except Exception:
                result = RuntimeError(traceback.format_exc())
            pickle.dump(result, control)
            control.flush()


def _be_child(control: socket.socket, path: str, uid: int, groups: Sequence[int]) -> None:
    # What was inherited is not the child's: a connection in it would outlive its owner's close.
    kept = control.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX") if kept > 4096 else 4096)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if uid != os.geteuid():
        os.setgroups(groups)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _Child(path, control).serve(control.makefile("rwb"))  # type: ignore[arg-type]


class Actor:
    """A forked process under the test's control."""

    def __init__(self, path: Path, uid: int = 0, groups: Sequence[int] = ()) -> None:
        self._path = path
        self.uid = uid
        self._groups = groups
        self.pid = 0
        self._socket: socket.socket | None = None
        self._stream: Any = None

    async def __aenter__(self) -> Actor:
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # From Python 3.12 on: a fork beside threads. The child touches nothing of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                _be_child(theirs, str(self._path), self.uid, self._groups)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        theirs.close()
        self._socket = ours
        self._stream = ours.makefile("rwb")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._socket is not None
        self.kill()
        self._stream.close()
        self._socket.close()

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    async def give(self, connection: int) -> socket.socket:
        """A connection of the child, as a socket of this process."""
        assert self._socket is not None
        self.begin("give", connection)
        _, fds, _, _ = await asyncio.to_thread(socket.recv_fds, self._socket, 1, 1)
        await self.result()
        return socket.socket(fileno=fds[0])

    def begin(self, name: str, *arguments: Any) -> None:
        """Give the child something to do, without waiting for it."""
        pickle.dump((name, arguments), self._stream)
        self._stream.flush()

    async def result(self) -> Any:
        """What came of the oldest thing begun."""
        async with asyncio.timeout(20):
            result = await asyncio.to_thread(pickle.load, self._stream)
        if isinstance(result, Exception):
            raise result
        return result

    async def do(self, name: str, *arguments: Any) -> Any:
        """Have the child do something."""
        self.begin(name, *arguments)
        return await self.result()

    def begin_request(
        self, method: str, path: str, body: object = None, *, connection: int = 0
    ) -> None:
        """Have the child make a request, without waiting for its answer."""
        data = None if body is None else json.dumps(body).encode()
        self.begin("request", connection, method, path, data, {})

    async def request(
        self, method: str, path: str, body: object = None, *, connection: int = 0
    ) -> Answer:
        """One request of the child; the answer is checked against the contract."""
        self.begin_request(method, path, body, connection=connection)
        answer: Answer = await self.result()
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
