"""How much, how many and how long: what one connection and one user may take of the daemon."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest

from kpmd.api import body, connection
from kpmd.core.policy import Policy
from kpmd.core.quotas import Limits
from tests.fakes.kernel import FakeKernel
from tests.fakes.policies import EVERYTHING
from tests.http.actor import NOBODY, Actor
from tests.http.contract import PROBLEM, Answer, check
from tests.http.samples import Gate, a_program, as_http, link
from tests.http.serving import Client, Served, raw, read_answer, until
from tests.http.streaming import listening

Actors = Callable[..., Awaitable[Actor]]
Serve = Callable[..., Awaitable[Served]]

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /links HTTP/1.1\r\nHost: x\r\n"


def with_limits(**limits: Any) -> Policy:
    """A policy by which this process is a user with these limits, who may do everything else."""
    rule = replace(EVERYTHING, limits=replace(Limits(), **limits))
    return Policy(rules=(rule,), admin_users=frozenset({NOBODY}))


def check_refusal(answer: Answer, status: int, kind: str) -> None:
    assert (answer.status, answer.kind) == (status, kind), answer.body
    assert answer.headers["Content-Type"].partition(";")[0] == PROBLEM
    assert answer.headers["Connection"] == "close"
    assert answer.headers["X-Request-Id"]


async def ends(reader: asyncio.StreamReader) -> None:
    """Wait for the end of a connection."""
    async with asyncio.timeout(10):
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            return


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are short."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(body, "BODY_SECONDS", 0.1)


class TestTimes:
    @pytest.mark.every_loop
    async def test_who_never_asks_is_hung_up_on(self, hasty: None, served: Served) -> None:
        reader, writer = await asyncio.open_unix_connection(str(served.path))
        await ends(reader)
        writer.close()

    @pytest.mark.every_loop
    @pytest.mark.parametrize("before", [b"", GET])
    async def test_a_head_that_comes_byte_by_byte(
        self, hasty: None, served: Served, before: bytes
    ) -> None:
        """Slowloris: each piece in time, and never the whole."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, str(served.path))
            await loop.sock_sendall(sock, before)
            got = await loop.sock_recv(sock, 10_000) if before else b"HTTP/1.1 200"
            assert got.startswith(b"HTTP/1.1 200")
            await loop.sock_sendall(sock, b"GET /healthz HTTP/1.1\r\n")
            with suppress(BrokenPipeError):
                for _ in range(1000):
                    await loop.sock_sendall(sock, b"X: y\r\n")
                    await asyncio.sleep(0.01)
            got = await loop.sock_recv(sock, 10_000)
            assert got.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert json.loads(got.partition(b"\r\n\r\n")[2])["kind"] == "timeout"
        await until(lambda: served.connections == 0)

    async def test_a_head_in_a_hundred_pieces_is_refused(self, served: Served) -> None:
        """Each of them costs as much as a request, however soon they come."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, str(served.path))
            await loop.sock_sendall(sock, b"GET /healthz HTTP/1.1\r\n")
            with suppress(BrokenPipeError):
                for _ in range(10_000):
                    await loop.sock_sendall(sock, b"X")
                    await asyncio.sleep(0)
            got = await loop.sock_recv(sock, 10_000)
        assert got.startswith(b"HTTP/1.1 400 ")
        assert b"pieces" in got
        await until(lambda: served.connections == 0)

    async def test_a_head_in_two_pieces_is_read(self, served: Served) -> None:
        reader, writer = await asyncio.open_unix_connection(str(served.path))
        writer.write(GET[:10])
        await asyncio.sleep(0.01)
        writer.write(GET[10:] + GET[:5])
        assert (await read_answer(reader)).status == 200
        writer.write(GET[5:])
        assert (await read_answer(reader)).status == 200
        writer.close()

    @pytest.mark.parametrize("how", ["length", "chunks"])
    async def test_a_body_that_does_not_come(self, hasty: None, served: Served, how: str) -> None:
        head = b"Content-Length: 100" if how == "length" else b"Transfer-Encoding: chunked"
        (answer,) = await raw(served.path, POST + head + b"\r\n\r\n1\r\n{\r\n")
        check("POST", "/links", answer)
        check_refusal(answer, 408, "timeout")

    async def test_a_large_body_has_more_time(
        self, hasty: None, monkeypatch: pytest.MonkeyPatch, served: Served
    ) -> None:
        monkeypatch.setattr(body, "BODY_BYTES_PER_SECOND", 1000)
        reader, writer = await asyncio.open_unix_connection(str(served.path))
        writer.write(POST + b"Content-Length: 4000\r\n\r\n")
        for _ in range(8):
            writer.write(b" " * 500)
            await asyncio.sleep(0.05)
        assert (await read_answer(reader)).kind == "malformed"
        writer.close()

    async def test_who_does_not_read_is_cut_off(self, hasty: None, served: Served) -> None:
        _, writer = await asyncio.open_unix_connection(str(served.path), limit=1)
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        await until(lambda: served.connections == 0)
        writer.close()

    async def test_who_does_not_read_the_last_answer_is_cut_off(
        self, hasty: None, served: Served
    ) -> None:
        """The server has closed already, and waits for the rest to be taken."""
        sock = socket.socket(socket.AF_UNIX)
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            sock.connect(str(served.path))
            await until(lambda: served.connections == 1)
            (theirs,) = served.sockets
            fd = theirs.fileno()
            inode = os.fstat(fd).st_ino
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            head = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            sock.sendall(head)

            def closed() -> bool:
                try:
                    return os.fstat(fd).st_ino != inode
                except OSError:
                    return True

            await until(closed)

    async def test_a_listener_that_does_not_read_for_a_while_is_not(
        self, hasty: None, served: Served, client: Client
    ) -> None:
        async with listening(served.path) as stream:
            stream._reader._transport.pause_reading()  # type: ignore[attr-defined]
            transport = next(iter(served._runner.server.connections))  # type: ignore[union-attr]
            labels = {str(number): "b" * 256 for number in range(64)}
            while not transport.writing_paused:
                lease = (await client.post("/leases", {"ttl": 60, "labels": labels}))["id"]
            await asyncio.sleep(0.3)
            stream._reader._transport.resume_reading()  # type: ignore[attr-defined]
            await stream.until("created", lease)


class TestSizes:
    @pytest.mark.parametrize("pieces", [1, 3, 10])
    async def test_heads(self, served: Served, client: Client, pieces: int) -> None:
        """Many fields of an allowed size, in one piece or in several."""
        head = GET[:-2] + b"".join(b"X-%d: %b\r\n" % (n, b"v" * 4000) for n in range(10)) + b"\r\n"
        reader, writer = await asyncio.open_unix_connection(str(served.path))
        size = -(-len(head) // pieces)
        for start in range(0, len(head), size):
            writer.write(head[start : start + size])
            await asyncio.sleep(0)
        answer = await read_answer(reader)
        assert (answer.status, answer.kind) == (400, "malformed")
        writer.close()
        await client.get("/healthz")

    async def test_what_follows_a_large_body_is_no_head_yet(self, served: Served) -> None:
        size = 200_000
        one = POST + b"Content-Length: %d\r\n\r\n" % size + b" " * size
        answers = await raw(served.path, one * 3 + GET, 4)
        assert [answer.status for answer in answers] == [400, 400, 400, 200]

    async def test_pipelined_requests_are_read_as_they_are_answered(
        self, served: Served, client: Client, kernel: FakeKernel
    ) -> None:
        """A client that only sends comes to a halt; all it has sent is answered, in its order."""
        program = await a_program(client)
        gate = kernel.hooks["create_link"] = Gate()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(served.path))
            sock.setblocking(False)
            pending = as_http("/links", link(program)) + GET * 100_000
            sent = 0
            stuck = 0
            while stuck < 20:
                try:
                    sent += sock.send(pending[sent:])
                    stuck = 0
                except BlockingIOError:
                    stuck += 1
                    await asyncio.sleep(0.005)
            assert sent < 1_500_000, "it took more than the socket and a read or two hold"
            await client.get("/healthz")
            whole = (sent - len(pending) + len(GET) * 100_000) // len(GET)
            gate.open()
            reader, writer = await asyncio.open_unix_connection(sock=sock)
            async with asyncio.timeout(20):
                assert (await read_answer(reader)).status == 201
                for _ in range(min(whole, 500)):
                    assert (await read_answer(reader)).status == 200
            writer.close()

    async def test_a_body_in_tiny_chunks_holds_up_nobody(
        self, served: Served, client: Client
    ) -> None:
        reader, writer = await asyncio.open_unix_connection(str(served.path))
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 100_000)
        writer.write(b"0\r\n\r\n")
        turns = 0
        answer = asyncio.create_task(read_answer(reader))
        while not answer.done():
            await client.get("/healthz")
            turns += 1
        assert (await answer).kind == "malformed"
        assert turns > 20
        writer.close()

    async def test_a_client_that_is_still_sending_gets_its_refusal(
        self, serve: Serve, kernel: FakeKernel
    ) -> None:
        served = await serve(kernel, max_body=100_000)
        reader, writer = await asyncio.open_unix_connection(str(served.path))
        writer.write(POST + b"Content-Length: 20000000\r\n\r\n")
        for _ in range(200):
            writer.write(b" " * 100_000)
            await writer.drain()
        check_refusal(await read_answer(reader), 413, "too-large")
        writer.close()

    async def test_bodies_of_many_small_things(self, client: Client) -> None:
        data = b'{"program": [' + b"[]," * 300_000 + b"[]]}"
        await client.refused("POST", "/links", data=data, status=400, kind="malformed")


class TestUsers:
    async def test_connections(self, serve: Serve, kernel: FakeKernel) -> None:
        served = await serve(kernel, policy=with_limits(connections=3))
        with ExitStack() as stack:
            held = []
            for _ in range(3):
                held.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                held[-1].connect(str(served.path))
            await until(lambda: served.connections == 3)
            (answer,) = await raw(served.path, b"")
            check_refusal(answer, 429, "quota")
            assert (answer.json["limit"], answer.json["used"], answer.json["most"]) == (
                "connections",
                3,
                3,
            )
            async with Actor(served.path, NOBODY) as admin:
                await admin.get("/healthz")
            held[0].close()
            await until(lambda: served.connections == 2)
            (answer,) = await raw(served.path, GET)
            assert answer.status == 200

    async def test_a_refused_connection_keeps_nothing(
        self, serve: Serve, kernel: FakeKernel
    ) -> None:
        served = await serve(kernel, policy=with_limits(connections=0))
        for _ in range(50):
            (answer,) = await raw(served.path, b"")
            check_refusal(answer, 429, "quota")
        await until(lambda: served.connections == 0)
        assert served.state.usage(os.getuid())["connections"] == 0
        assert len(list(served.state.registry.clients)) == 0

    async def test_requests_in_flight(self, serve: Serve, kernel: FakeKernel) -> None:
        served = await serve(kernel, policy=with_limits(requests=2))
        async with Client(served.path) as client:
            program = await a_program(client)
            gate = kernel.hooks["create_link"] = Gate()
            waiting = [
                asyncio.create_task(client.request("POST", "/links", link(program)))
                for _ in range(2)
            ]
            await until(lambda: served.state.usage(os.getuid())["requests"] == 2)
            problem = await client.refused("GET", "/healthz", status=429, kind="quota")
            assert (problem["limit"], problem["used"], problem["most"]) == ("requests", 2, 2)
            async with Actor(served.path, NOBODY) as other:
                await other.get("/healthz")
            gate.open()
            assert [(await each).status for each in waiting] == [201, 201]
            await client.get("/healthz")

    async def test_quick_requests_wait_for_their_turn_and_are_not_too_many(
        self, serve: Serve, kernel: FakeKernel
    ) -> None:
        served = await serve(kernel, policy=with_limits(requests=1))
        answers = await asyncio.gather(*(raw(served.path, GET * 5, 5) for _ in range(40)))
        assert {answer.status for each in answers for answer in each} == {200}

    async def test_streams(self, serve: Serve, kernel: FakeKernel) -> None:
        served = await serve(kernel, policy=with_limits(streams=1, requests=1))
        async with Client(served.path) as client:
            async with listening(served.path):
                problem = await client.refused("GET", "/events", status=429, kind="quota")
                assert problem["limit"] == "streams"
                # A stream is no request in flight.
                await client.get("/healthz")
            await until(lambda: served.state.usage(os.getuid())["streams"] == 0)
            async with listening(served.path) as stream:
                assert stream.status == 200

    async def test_body_sizes(self, serve: Serve, kernel: FakeKernel) -> None:
        served = await serve(kernel, policy=with_limits(body_bytes=1000))
        async with Client(served.path) as client:
            await client.refused("POST", "/links", data=b" " * 1001, status=413, kind="too-large")
            await client.refused("POST", "/links", data=b" " * 1000, status=400, kind="malformed")
            assert (await client.get("/capabilities"))["limits"]["body_bytes"] == 1000

    async def test_large_bodies_at_once(self, serve: Serve, kernel: FakeKernel) -> None:
        served = await serve(kernel, policy=with_limits(body_bytes=100_000))
        head = POST + b"Content-Length: 100000\r\n\r\n"
        with ExitStack() as stack:
            for _ in range(2):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(str(served.path))
                sock.sendall(head)
            await until(lambda: served.state.usage(os.getuid())["requests"] == 2)
            (answer,) = await raw(served.path, head)
            check("POST", "/links", answer)
            check_refusal(answer, 429, "quota")
            assert answer.json["limit"] == "body_bytes"
            # Small ones are not counted.
            (answer,) = await raw(served.path, as_http("/links", {}))
            assert answer.status == 422
        await until(lambda: served.state.usage(os.getuid())["requests"] == 0)
        (answer,) = await raw(served.path, head + b" " * 100_000)
        assert answer.status == 400

    async def test_refusals_do_not_fill_the_log(self, serve: Serve, kernel: FakeKernel) -> None:
        served = await serve(kernel, policy=with_limits())
        for _ in range(10):
            await raw(served.path, GET.replace(b"healthz", b"nothing") * 40, 40)
        await raw(served.path, b"\0" * 100)
        assert 100 <= len(served.audit) < 150
        async with Actor(served.path, NOBODY) as other:
            await other.request("GET", "/nothing")
        assert served.audit[-1].uid == NOBODY
