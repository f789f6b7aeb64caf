"""POST /maps/{id}/fd: the map itself, beside the bytes of the answer."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict

from kpmd.api import connection, fd_answer
from kpmd.api.fd_answer import send_now
from kpmd.core.holdings import LEAST_LENT
from kpmd.core.policy import Policy, Rule
from kpmd.runtime import lent
from tests.fakes.kernel import FakeKernel
from tests.fakes.policies import EVERYTHING
from tests.fakes.systemd import eventfd_number
from tests.http.actor import NOBODY, Actor
from tests.http.conftest import Serve
from tests.http.contract import Answer, check
from tests.http.house import House
from tests.http.samples import PERSISTENT, a_program, elf
from tests.http.serving import Client, Served, until

Actors = Callable[..., Awaitable[Actor]]

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
#: Requests for maps whose answers do not fit into a connection.
MANY = 100
#: What one map of the fake kernel's objects weighs.
MEMORY = 16384 * (8 + 8 + 64)


def ask(map_: str, version: str = "1.1", *headers: str) -> bytes:
    return "\r\n".join(
        (f"POST /maps/{map_}/fd HTTP/{version}", "Host: x", *headers, "", "")
    ).encode()


class Wire:
    """A client that receives file descriptors. It blocks; it is closed with all that it got."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        self._got = b""
        self._offset = 0
        #: File descriptors, by the place of the byte that they came with.
        self._fds: dict[int, int] = {}

    def _receive(self, most: int) -> bool:
        data, fds, _, _ = socket.recv_fds(self.sock, most, 8)
        if fds:
            (fd,) = fds
            os.set_inheritable(fd, False)
            # What is received together ends with the piece that the descriptor came with: that is
            # the last answer to begin in it.
            begin = max(len(self._got), (self._got + data).rfind(b"HTTP/1."))
            self._fds[self._offset + begin] = fd
        self._got += data
        return bool(data)

    def answer(self, most: int = 1 << 16) -> tuple[Answer, int | None]:
        """The next answer, and the file descriptor that came with its first byte."""
        while True:
            head, found, rest = self._got.partition(b"\r\n\r\n")
            if found:
                lines = head.decode().split("\r\n")
                pairs = (line.partition(": ") for line in lines[1:])
                headers = CIMultiDict({name: value for name, _, value in pairs})
                length = int(headers["Content-Length"])
                if len(rest) >= length:
                    break
            if not self._receive(most):
                raise EOFError(self._got)
        fd = self._fds.pop(self._offset, None)
        assert all(place > self._offset for place in self._fds)
        self._offset += len(head) + 4 + length
        self._got = rest[length:]
        return Answer(int(lines[0].split()[1]), headers, rest[:length]), fd

    def ends(self) -> None:
        """Wait for the end of the connection."""
        assert self._got == b""
        try:
            assert self.sock.recv(1) == b""
        except ConnectionResetError:
            return

    def close(self) -> None:
        self.sock.close()
        for fd in self._fds.values():
            os.close(fd)


@contextmanager
def wired(path: Path) -> Iterator[Wire]:
    wire = Wire(path)
    try:
        yield wire
    finally:
        wire.close()


async def answer(wire: Wire, most: int = 1 << 16) -> tuple[Answer, int | None]:
    return await asyncio.to_thread(wire.answer, most)


Full = tuple[Wire, dict[str, Any]]


async def a_map(client: Client | Actor, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = (await client.post("/programs", elf(**fields)))["maps"][0]
    return found


def handed(got: tuple[Answer, int | None], map_: dict[str, Any]) -> Answer:
    """The answer, which must be one of success, and come with the map; that is closed."""
    found, fd = got
    check("POST", f"/maps/{map_['id']}/fd", found)
    assert found.status == 200, found.body
    assert found.json["map"] == map_
    assert fd is not None
    try:
        assert eventfd_number(fd) == map_["kernel_id"]
    finally:
        os.close(fd)
    return found


@pytest.mark.every_loop
async def test_it_comes_with_the_answer(served: Served, client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    with wired(served.path) as wire:
        for _ in range(3):
            wire.sock.sendall(ask(map_["id"]))
            found = handed(await answer(wire), map_)
            assert found.json == {"map": map_, "fds": 1, "access": "bpf"}
            assert found.headers["Content-Type"] == "application/json"
            assert {"Date", "Server", "X-Request-Id"} <= set(found.headers)
            assert "Connection" not in found.headers
    assert await client.get(f"/maps/{map_['id']}") == map_
    assert [each.closed for each in kernel.maps] == [False]


async def test_how_to_get_at_a_ring_buffer(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    kernel.map_type = ("ringbuf", 27)
    map_ = await a_map(client)
    with wired(served.path) as wire:
        wire.sock.sendall(ask(map_["id"]))
        assert handed(await answer(wire), map_).json["access"] == "mmap"


@pytest.mark.every_loop
async def test_each_of_many_comes_with_its_own_answer(served: Served, client: Client) -> None:
    """Asked for without waiting, between other things, and read byte by byte."""
    first, second = await a_map(client), await a_map(client)
    with wired(served.path) as wire:
        wire.sock.sendall(GET + ask(first["id"]) + GET + ask(second["id"]) + ask(first["id"]) + GET)
        for expected in (None, first, None, second, first, None):
            got = await answer(wire, 1)
            if expected is None:
                assert (got[0].status, got[1]) == (200, None)
            else:
                handed(got, expected)


@pytest.mark.every_loop
async def test_behind_answers_that_fill_the_socket(served: Served, client: Client) -> None:
    """What waits in the server to be sent goes first; then some, with less than a byte of room."""
    map_ = await a_map(client)
    large = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    length = len((await client.request("GET", "/openapi.json")).body)
    with wired(served.path) as wire:
        for _ in range(3):
            count = 400_000 // length + 1
            await asyncio.to_thread(wire.sock.sendall, large * count + ask(map_["id"]) * 2 + GET)
            for _ in range(count):
                got, fd = await answer(wire, 50_000)
                assert (len(got.body), fd) == (length, None)
            for _ in range(2):
                handed(await answer(wire), map_)
            assert (await answer(wire))[0].status == 200


@asynccontextmanager
async def unread(served: Served, client: Client) -> AsyncIterator[Full]:
    """A connection with more answers than fit into it, each with a map, that are not read."""
    map_ = await a_map(client)
    with wired(served.path) as wire:
        wire.sock.setblocking(False)
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(loop.sock_sendall(wire.sock, ask(map_["id"]) * MANY))
        await until(lambda: any(each.room for each in _protocols(served)))
        yield wire, map_
        sending.cancel()
        await asyncio.wait([sending])


@pytest.fixture
async def full(served: Served, client: Client) -> AsyncIterator[Full]:
    async with unread(served, client) as made:
        yield made


def _protocols(served: Served) -> list[connection.HttpConnection]:
    assert served._runner.server is not None
    return served._runner.server.connections  # type: ignore[return-value]


@pytest.mark.every_loop
async def test_who_reads_late_gets_all(full: Full, client: Client) -> None:
    wire, map_ = full
    # Nobody else is held up meanwhile.
    await client.get("/healthz")
    wire.sock.settimeout(10)
    for _ in range(MANY):
        handed(await answer(wire), map_)


@pytest.mark.every_loop
async def test_who_never_reads_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, served: Served, client: Client
) -> None:
    """Whether the socket is full of these answers, or more of others wait to be sent before."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.1)
    map_ = await a_map(client)
    for before in (b"", b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 10):
        with wired(served.path) as wire:
            loop = asyncio.get_running_loop()
            wire.sock.setblocking(False)
            data = before + ask(map_["id"]) * MANY
            sending = asyncio.create_task(loop.sock_sendall(wire.sock, data))
            await until(lambda: served.connections == 2)
            await until(lambda: served.connections == 1)
            sending.cancel()
            await asyncio.wait([sending])
    assert await client.get(f"/maps/{map_['id']}") == map_


async def test_few_wait_to_be_received(full: Full, served: Served) -> None:
    """All clients together can only have so many unread; see little_room."""
    _, map_ = full
    asked = [each for each in served.audit if each.call == f"POST /maps/{map_['id']}/fd"]
    assert 1 <= len(asked) <= 4


@pytest.mark.every_loop
async def test_who_goes_away_meanwhile(full: Full, served: Served, client: Client) -> None:
    wire, map_ = full
    wire.sock.shutdown(socket.SHUT_RDWR)
    await until(lambda: served.connections == 1)
    assert await client.get(f"/maps/{map_['id']}") == map_


async def test_a_map_that_ends_meanwhile(full: Full, client: Client) -> None:
    wire, map_ = full
    for program in map_["programs"]:
        await client.delete(f"/programs/{program}")
    wire.sock.settimeout(10)
    got = await answer(wire)
    while got[0].status == 200:
        handed(got, map_)
        got = await answer(wire)
    assert (got[0].kind, got[1]) == ("not-found", None)
    assert (await answer(wire))[0].status == 404


async def test_the_daemon_stops_meanwhile(serve: Serve, kernel: FakeKernel) -> None:
    """It waits for such a client no longer than for others that do not read."""
    served = await serve(kernel, shutdown_seconds=0.1)
    async with Client(served.path) as client, unread(served, client):
        async with asyncio.timeout(5):
            await served.stop()
    assert not kernel.open_maps


@pytest.mark.every_loop
@pytest.mark.parametrize(
    ("version", "headers", "connection_", "ends"),
    [
        ("1.1", ["Connection: close"], "close", True),
        ("1.0", [], None, True),
        ("1.0", ["Connection: keep-alive"], "keep-alive", False),
        ("1.1", ["Expect: 100-continue"], None, False),
    ],
)
async def test_versions_of_http(
    served: Served,
    client: Client,
    version: str,
    headers: list[str],
    connection_: str | None,
    ends: bool,
) -> None:
    map_ = await a_map(client)
    with wired(served.path) as wire:
        wire.sock.sendall(ask(map_["id"], version, *headers))
        found = handed(await answer(wire), map_)
        assert found.headers.get("Connection") == connection_
        if ends:
            await asyncio.to_thread(wire.ends)
        else:
            wire.sock.sendall(ask(map_["id"]))
            handed(await answer(wire), map_)


@pytest.mark.every_loop
async def test_half_closed(served: Served, client: Client) -> None:
    map_ = await a_map(client)
    with wired(served.path) as wire:
        wire.sock.sendall(GET + ask(map_["id"]) * 2)
        wire.sock.shutdown(socket.SHUT_WR)
        assert (await answer(wire))[0].status == 200
        for _ in range(2):
            handed(await answer(wire), map_)
        await asyncio.to_thread(wire.ends)


@pytest.mark.every_loop
async def test_who_does_not_receive_it_has_the_answer_all_the_same(
    served: Served, client: Client
) -> None:
    """As curl does; the leak check shows that the kernel has closed it."""
    map_ = await a_map(client)
    found = await client.request("POST", f"/maps/{map_['id']}/fd", {})
    assert (found.status, found.json["fds"]) == (200, 1)
    assert await client.get(f"/maps/{map_['id']}") == map_


@pytest.mark.every_loop
async def test_what_does_not_go_at_once_follows(
    monkeypatch: pytest.MonkeyPatch, served: Served, client: Client
) -> None:
    monkeypatch.setattr(fd_answer, "send_now", lambda sock, data, fd: send_now(sock, data[:10], fd))
    map_ = await a_map(client)
    with wired(served.path) as wire:
        wire.sock.sendall(ask(map_["id"]) + GET + ask(map_["id"]))
        handed(await answer(wire, 1), map_)
        assert (await answer(wire, 1))[0].status == 200
        handed(await answer(wire, 1), map_)


async def test_what_the_kernel_does_not_pass_on(
    monkeypatch: pytest.MonkeyPatch, served: Served, client: Client
) -> None:
    """More of them are on their way than the daemon may have open, say."""

    def refuse(sock: socket.socket, data: bytes, fd: int) -> int:
        raise OSError(errno.ETOOMANYREFS, "Too many references")

    map_ = await a_map(client)
    with monkeypatch.context() as patch, wired(served.path) as wire:
        patch.setattr(fd_answer, "send_now", refuse)
        wire.sock.sendall(ask(map_["id"]) + GET)
        got, fd = await answer(wire)
        check("POST", f"/maps/{map_['id']}/fd", got)
        assert (got.status, got.json["errno"], fd) == (500, "ETOOMANYREFS", None)
        assert (await answer(wire))[0].status == 200


async def test_bodies(served: Served, client: Client) -> None:
    map_ = await a_map(client)
    path = f"/maps/{map_['id']}/fd"
    bodies: list[object] = [{"access": "read-only"}, [], 3]
    for body in bodies:
        await client.refused("POST", path, body, status=422, kind="invalid")
    await client.refused("POST", f"{path}?x=1", status=422, kind="invalid")
    for method in ("GET", "PUT", "DELETE"):
        assert (await client.request(method, path)).status == 405
    with wired(served.path) as wire:
        wire.sock.sendall(ask(map_["id"], "1.1", "Content-Length: 2") + b"{}")
        handed(await answer(wire), map_)


class TestWho:
    async def send(self, actor: Actor, map_: str) -> Answer:
        return await actor.request("POST", f"/maps/{map_}/fd")

    async def test_owner_and_administrators(self, actor: Actors, client: Client) -> None:
        owner, other = await actor(NOBODY), await actor(NOBODY - 1)
        map_ = (await a_map(owner))["id"]
        assert (await self.send(owner, map_)).status == 200
        assert (await self.send(other, map_)).kind == "not-found"
        assert (await client.request("POST", f"/maps/{map_}/fd")).status == 200

    async def test_who_may_read_what_is_others_s(
        self, serve: Serve, kernel: FakeKernel, actor: Actors
    ) -> None:
        readers = replace(
            EVERYTHING, name="readers", everyone=False, users=frozenset({NOBODY}), reads_others=True
        )
        served = await serve(kernel, policy=Policy((readers, EVERYTHING)))
        owner, reader = await actor(NOBODY - 1, served.path), await actor(NOBODY, served.path)
        map_ = (await a_map(owner))["id"]
        assert (await reader.get(f"/maps/{map_}"))["id"] == map_
        assert (await self.send(reader, map_)).kind == "forbidden"

    async def test_without_the_right(self, serve: Serve, kernel: FakeKernel, actor: Actors) -> None:
        without: Rule = replace(EVERYTHING, rights=EVERYTHING.rights - {"maps"})
        served = await serve(kernel, policy=Policy((without,)))
        user = await actor(NOBODY, served.path)
        assert (await self.send(user, (await a_map(user))["id"])).kind == "forbidden"

    async def test_it_is_put_on_record(self, served: Served, actor: Actors, client: Client) -> None:
        owner, other = await actor(NOBODY), await actor(NOBODY - 1)
        map_ = (await a_map(owner))["id"]
        await self.send(owner, map_)
        await self.send(other, map_)
        handed_, refused = served.audit[1:]
        assert (handed_.call, handed_.status) == (f"POST /maps/{map_}/fd", 200)
        assert (handed_.uid, handed_.pid) == (NOBODY, owner.pid)
        assert handed_.what == {"id": map_, "name": "counts", "type": "hash"}
        assert (refused.outcome, refused.uid) == ("not-found", NOBODY - 1)


@pytest.mark.parametrize(
    ("type_", "number"),
    [
        ("prog_array", 3),
        ("perf_event_array", 4),
        ("array_of_maps", 12),
        ("hash_of_maps", 13),
        ("sockmap", 15),
        ("task_storage", 29),
        ("type 99", 99),
    ],
)
async def test_types_that_are_more_than_data(
    client: Client, kernel: FakeKernel, type_: str, number: int
) -> None:
    kernel.map_type = (type_, number)
    map_ = await a_map(client)
    problem = await client.refused(
        "POST", f"/maps/{map_['id']}/fd", status=501, kind="not-supported"
    )
    assert type_ in problem["detail"]


async def test_there_is_no_such_call_for_programs_and_links(client: Client) -> None:
    program = await a_program(client)
    for path in (f"/programs/{program}/fd", "/links/lnk-0/fd", f"/maps/{program}/fd"):
        await client.refused("POST", path, status=404, kind="not-found")


class TestBooks:
    """What a client holds of a map counts, whatever has become of its programs."""

    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lent, "_BETWEEN_LOOKS", 0.01)

    @staticmethod
    def used(served: Served) -> int:
        return served.state.usage(0)["map_bytes"]

    async def take(self, served: Served, map_: dict[str, Any]) -> int:
        with wired(served.path) as wire:
            wire.sock.sendall(ask(map_["id"]))
            got, fd = await answer(wire)
            assert got.status == 200
            assert fd is not None
            return fd

    async def end(self, client: Client, map_: dict[str, Any]) -> None:
        for program in map_["programs"]:
            await client.delete(f"/programs/{program}")

    @pytest.mark.every_loop
    async def test_until_nobody_holds_it(
        self, served: Served, client: Client, kernel: FakeKernel
    ) -> None:
        map_ = await a_map(client)
        assert self.used(served) == MEMORY
        fd = await self.take(served, map_)
        assert self.used(served) == MEMORY
        await self.end(client, map_)
        assert not kernel.open_maps
        await asyncio.sleep(0.05)
        assert self.used(served) == MEMORY
        copy = os.dup(fd)
        os.close(fd)
        await asyncio.sleep(0.05)
        assert self.used(served) == MEMORY
        os.close(copy)
        await until(lambda: self.used(served) == 0)

    async def test_in_a_process_that_never_asked(self, served: Served, client: Client) -> None:
        map_ = await a_map(client)
        fd = await self.take(served, map_)
        other = await asyncio.create_subprocess_exec("sleep", "60", pass_fds=[fd])
        os.close(fd)
        await self.end(client, map_)
        await asyncio.sleep(0.05)
        assert self.used(served) == MEMORY
        other.kill()
        await other.wait()
        await until(lambda: self.used(served) == 0)

    async def test_on_its_way(self, served: Served, client: Client) -> None:
        map_ = await a_map(client)
        with wired(served.path) as wire:
            wire.sock.sendall(ask(map_["id"]))
            await asyncio.to_thread(wire.sock.recv, 1, socket.MSG_PEEK)
            await self.end(client, map_)
            await asyncio.sleep(0.05)
            assert self.used(served) == MEMORY
        await until(lambda: self.used(served) == 0)

    async def test_small_ones_count_for_more(self, served: Served, client: Client) -> None:
        """There may be any number of them."""
        body: dict[str, Any] = elf()
        body["source"]["max_entries"] = {"counts": 1}
        map_ = (await client.post("/programs", body))["maps"][0]
        fd = await self.take(served, map_)
        assert self.used(served) == 80
        await self.end(client, map_)
        assert self.used(served) == LEAST_LENT
        os.close(fd)
        await until(lambda: self.used(served) == 0)

    async def test_its_user_has_no_more_than_the_limit(
        self, serve: Serve, kernel: FakeKernel
    ) -> None:
        limits = replace(EVERYTHING.limits, map_bytes=2 * MEMORY)
        policy = Policy((replace(EVERYTHING, limits=limits),), admin_users=frozenset({NOBODY}))
        served = await serve(kernel, policy=policy)
        async with Client(served.path) as client:
            fds = []
            for _ in range(2):
                map_ = await a_map(client)
                fds.append(await self.take(served, map_))
                await self.end(client, map_)
            problem = await client.refused("POST", "/programs", elf(), status=429, kind="quota")
            assert (problem["limit"], problem["used"]) == ("map_bytes", 2 * MEMORY)
            assert "handed over" in problem["detail"]
            os.close(fds.pop())
            await until(lambda: self.used(served) == MEMORY)
            await a_map(client)
            os.close(fds.pop())

    async def test_where_it_cannot_be_told_who_holds_it(
        self, monkeypatch: pytest.MonkeyPatch, served: Served, client: Client, kernel: FakeKernel
    ) -> None:
        """It counts on; and it is closed here like any other."""

        def none_left(fd: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        map_ = await a_map(client)
        os.close(await self.take(served, map_))
        monkeypatch.setattr(lent, "Held", none_left)
        await self.end(client, map_)
        assert not kernel.open_maps
        await asyncio.sleep(0.05)
        assert self.used(served) == MEMORY

    async def test_what_an_earlier_daemon_handed_over(self, house: House) -> None:
        map_ = await a_map(house.client, lifetime=PERSISTENT)
        fd = await self.take(house.daemon, map_)
        await house.again()
        await self.end(house.client, map_)
        await asyncio.sleep(0.05)
        assert self.used(house.daemon) == MEMORY
        os.close(fd)
        await until(lambda: self.used(house.daemon) == 0)
