"""GET /maps/{id}/records: records as they come, to everyone who reads, and no loss in silence."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from kpmd.api import records as records_api
from kpmd.core.codec import Codec
from kpmd.core.ring import Batch, as_ndjson
from kpmd.errors import KernelError
from kpmd.runtime import buffers
from kpmd.runtime import records as runtime
from tests.fakes.kernel import FakeKernel
from tests.fakes.rings import BUSY, DISCARD
from tests.http.actor import NOBODY, Actor
from tests.http.contract import NDJSON, OCTETS
from tests.http.samples import elf
from tests.http.serving import Client, Served, until
from tests.http.streaming import Cut, Stream, listening
from tests.unit.btf import OBJECTS, section

Actors = Callable[..., Awaitable[Actor]]
RAW = {"Accept": OCTETS}


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel(map_type=("ringbuf", 27))


async def a_map(client: Any) -> str:
    """Load an object: the id of its map."""
    id_: str = (await client.post("/programs", elf()))["maps"][0]["id"]
    return id_


def reading(
    served: Served, map_: str, query: str = "", headers: dict[str, str] | None = None
) -> AbstractAsyncContextManager[Stream]:
    return listening(served.path, query, headers, path=f"/maps/{map_}/records")


async def opened(kernel: FakeKernel) -> None:
    await until(lambda: kernel.ring.opened == 1)


async def frame(stream: Stream) -> bytes | int:
    """The next record of a raw stream, or how many were lost."""
    (length,) = struct.unpack("<I", await stream.octets(4))
    if length == 0xFFFFFFFF:
        (lost,) = struct.unpack("<Q", await stream.octets(8))
        return int(lost)
    return await stream.octets(length)


@pytest.mark.every_loop
async def test_records_as_lines(served: Served, client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    kernel.ring.write(b"before")
    async with reading(served, map_) as stream:
        assert (stream.status, stream.content_type) == (200, NDJSON)
        assert await stream.next() == {"data": b"before".hex()}
        kernel.ring.write(b"one", b"", b"three")
        assert [await stream.next() for _ in range(3)] == [
            {"data": b"one".hex()},
            {"data": ""},
            {"data": b"three".hex()},
        ]
    await until(lambda: kernel.ring.opened == 0)


@pytest.mark.every_loop
async def test_records_as_octets(served: Served, client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    async with reading(served, map_, headers=RAW) as stream:
        assert stream.content_type == OCTETS
        written = [bytes([number]) * (number % 5) for number in range(40)]
        kernel.ring.write(*written)
        assert [await frame(stream) for _ in written] == written


async def test_what_is_discarded_is_no_record(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    async with reading(served, await a_map(client), headers=RAW) as stream:
        kernel.ring.write(b"no", flags=DISCARD)
        kernel.ring.write(b"yes")
        assert await frame(stream) == b"yes"


async def test_a_record_that_is_being_written_holds_up_those_behind_it(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    async with reading(served, await a_map(client), headers=RAW) as stream:
        kernel.ring.write(b"first")
        assert await frame(stream) == b"first"
        place = kernel.ring.write(b"slow", flags=BUSY)
        kernel.ring.write(b"quick")
        await client.get("/healthz")
        assert kernel.ring.consumer == place
        kernel.ring.commit(place)
        assert [await frame(stream), await frame(stream)] == [b"slow", b"quick"]


async def test_more_than_the_buffer_holds(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    """Round and round: records wrap, of one length and of several."""
    async with reading(served, await a_map(client), headers=RAW) as stream:
        for turn in range(8):
            written = [os.urandom(56 if turn % 2 else 1 + number % 90) for number in range(120)]
            kernel.ring.write(*written)
            assert [await frame(stream) for _ in written] == written
    assert kernel.ring.producer > 2 * kernel.ring.size
    assert kernel.ring.dropped == 0


async def test_every_reader_gets_every_record(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    map_ = await a_map(client)
    kernel.ring.write(b"old")
    async with reading(served, map_, headers=RAW) as first:
        assert await frame(first) == b"old"
        async with reading(served, map_) as second:
            kernel.ring.write(b"new")
            assert await frame(first) == b"new"
            assert await second.next() == {"data": b"new".hex()}
        kernel.ring.write(b"newer")
        assert await frame(first) == b"newer"
    await until(lambda: kernel.ring.opened == 0)
    # Nobody reads now: it waits for the next one.
    kernel.ring.write(b"newest")
    async with reading(served, map_, headers=RAW) as third:
        assert await frame(third) == b"newest"


async def test_a_slow_reader_is_told_what_it_lost(
    served: Served,
    client: Client,
    kernel: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The quick one gets all of it all the same."""
    monkeypatch.setattr(runtime, "QUEUE_BYTES", 64 << 10)
    map_ = await a_map(client)
    record = bytes(1016)
    async with reading(served, map_, headers=RAW) as slow:
        await opened(kernel)
        (reader,) = served.state.records._pumps[map_]._readers
        async with reading(served, map_, headers=RAW) as quick:
            written = 0
            while not reader._lost:
                kernel.ring.write(*[record] * 8)
                written += 8
                for _ in range(8):
                    assert await frame(quick) == record
            got, lost = 0, 0
            while got + lost < written:
                found = await frame(slow)
                if isinstance(found, int):
                    lost += found
                else:
                    got += 1
            assert lost > 0
            kernel.ring.write(b"now")
            assert await frame(slow) == b"now"


async def test_a_record_too_large_to_be_sent_is_told(
    served: Served, client: Client, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "BATCH_BYTES", 64)
    monkeypatch.setattr(buffers, "MOST_BYTES", 1000)
    kernel.ring.write(b"before", bytes(1100), b"behind", bytes(900), bytes(1200), bytes(1200))
    kernel.ring.write(bytes(2000), flags=DISCARD)
    kernel.ring.write(b"last")
    found: list[str | int] = []
    async with reading(served, await a_map(client)) as stream:
        while found[-1:] != [b"last".hex()]:
            told = await stream.next()
            assert told.get("reason", "too-large") == "too-large"
            found.append(told["data"] if "data" in told else told["lost"])
    # Two that are lost behind each other may be told together.
    assert found[:4] == [b"before".hex(), 1, b"behind".hex(), bytes(900).hex()]
    assert [sum(each for each in found[4:-1] if isinstance(each, int))] == [2]


async def test_much_text_of_few_bytes_comes_in_pieces(
    served: Served, client: Client, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of them others get their answers."""
    monkeypatch.setattr(records_api, "PIECE", 1000)
    made: list[int] = []

    def counted(batch: Batch, codec: Codec | None, *, data: bool) -> bytes:
        made.append(batch.count)
        return as_ndjson(batch, codec, data=data)

    monkeypatch.setattr(records_api, "as_ndjson", counted)
    written = [bytes([number]) * (1 + number % 50) for number in range(200)]
    kernel.ring.write(*written)
    async with reading(served, await a_map(client)) as stream:
        found = [await stream.next() for _ in written]
    assert found == [{"data": each.hex()} for each in written]
    assert max(made) < 40
    assert sum(made) == 200


async def test_a_loss_is_a_line_too(
    served: Served, client: Client, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "QUEUE_BYTES", 0)
    async with reading(served, await a_map(client)) as stream:
        kernel.ring.write(b"a", b"b")
        assert await stream.next() == {"lost": 2, "reason": "reader-too-slow"}


async def test_a_reader_that_never_reads_is_cut_off(
    served: Served, client: Client, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "QUEUE_BYTES", 4 << 10)
    monkeypatch.setattr(runtime, "STALL_SECONDS", 0.0)
    async with reading(served, await a_map(client), headers=RAW) as stream:
        await opened(kernel)
        while kernel.ring.opened:
            kernel.ring.write(*[bytes(1016)] * 8)
            await asyncio.sleep(0)
        with pytest.raises(Cut):
            await stream.octets(1 << 30)


async def test_positions_that_make_no_sense_cut_the_stream(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    """Whom the map was handed over to can move them."""
    async with reading(served, await a_map(client), headers=RAW) as stream:
        await opened(kernel)
        kernel.ring.consumer = 4
        kernel.ring.write(b"x")
        with pytest.raises(Cut):
            await frame(stream)
    await until(lambda: kernel.ring.opened == 0)
    await client.get("/healthz")


async def test_a_bug_cuts_the_stream_and_nothing_else(
    served: Served, client: Client, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_ = await a_map(client)
    async with reading(served, map_, headers=RAW) as stream:
        await opened(kernel)
        with monkeypatch.context() as patch:
            patch.setattr(buffers, "scan_ring", lambda *_: 1 / 0)
            kernel.ring.write(b"x")
            with pytest.raises(Cut):
                await frame(stream)
    await until(lambda: kernel.ring.opened == 0)
    async with reading(served, map_, headers=RAW) as stream:
        assert await frame(stream) == b"x"


async def test_the_stream_ends_with_its_map(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    made = await client.post("/programs", elf())
    async with reading(served, made["maps"][0]["id"], headers=RAW) as stream:
        await opened(kernel)
        kernel.ring.write(*[b"last"] * 300)
        for program in made["programs"]:
            await client.delete(f"/programs/{program['id']}")
        assert [await frame(stream) for _ in range(300)] == [b"last"] * 300
        with pytest.raises(EOFError):
            await frame(stream)
    assert not kernel.open_maps


async def test_the_stream_ends_with_the_daemon(served: Served, client: Client) -> None:
    async with reading(served, await a_map(client), headers=RAW) as stream:
        await opened(served.kernel)
        await served.stop()
        with pytest.raises(EOFError):
            await frame(stream)
    assert served.kernel.ring.opened == 0


@pytest.mark.parametrize("headers", [None, RAW])
async def test_perf_buffers(
    served: Served, client: Client, kernel: FakeKernel, headers: dict[str, str] | None
) -> None:
    """Their records are padded; and the kernel tells of those for which it had no room."""
    kernel.map_type = ("perf_event_array", 4)
    async with reading(served, await a_map(client), headers=headers) as stream:
        await until(lambda: kernel.perf.opened == 1)
        first, second = kernel.perf.buffers
        first.sample(b"abcd")
        first.lose(5)
        first.sample(b"12345678")
        if headers:
            assert await frame(stream) == b"abcd"
            assert await frame(stream) == b"12345678" + bytes(4)
            assert await frame(stream) == 5
        else:
            assert await stream.next() == {"data": b"abcd".hex()}
            assert await stream.next() == {"data": (b"12345678" + bytes(4)).hex()}
            assert await stream.next() == {"lost": 5, "reason": "buffer-full"}
        second.sample(b"wxyz")
        expected: Any = b"wxyz" if headers else {"data": b"wxyz".hex()}
        assert (await frame(stream) if headers else await stream.next()) == expected
    await until(lambda: kernel.perf.opened == 0)


@pytest.mark.parametrize("type_", ["hash", "array", "stack_trace", "user_ringbuf", "prog_array"])
async def test_maps_without_records(client: Client, kernel: FakeKernel, type_: str) -> None:
    kernel.map_type = (type_, 1)
    path = f"/maps/{await a_map(client)}/records"
    problem = await client.refused("GET", path, status=501, kind="not-supported")
    assert "ringbuf" in problem["detail"]


async def test_what_the_kernel_refuses(served: Served, client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    kernel.fail["open_ring"] = KernelError("no", errno.EPERM)
    problem = await client.refused("GET", f"/maps/{map_}/records", status=500, kind="kernel")
    assert problem["errno"] == "EPERM"
    async with reading(served, map_, headers=RAW) as stream:
        kernel.ring.write(b"now it does")
        assert await frame(stream) == b"now it does"


EVENT = struct.pack("<QQII16sq", 1 << 60, 2, 3, 1, b"cat", -4)
DECODED = {
    "number": str(1 << 60),
    "function": "2",
    "pid": 3,
    "phase": "MIDDLE",
    "command": "cat",
    "below_zero": "-4",
}
#: A record that is too short for the struct.
SHORT = {"data": "00", "decoded": None}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [{"data": EVENT.hex(), "decoded": DECODED}, SHORT]),
        ("?type=event&data=false", [{"decoded": DECODED}, {"decoded": None}]),
        (
            "?data=true",
            [{"data": EVENT.hex(), "decoded": DECODED}, {"data": "00", "decoded": None}],
        ),
    ],
)
async def test_decoded(
    served: Served, client: Client, kernel: FakeKernel, query: str, expected: list[Any]
) -> None:
    """By the struct that is named, or the only one that a global variable points to."""
    kernel.btf = section(OBJECTS / "events.bpf.o", ".BTF")
    kernel.ring.write(EVENT, b"\0", EVENT + b"more")
    async with reading(served, await a_map(client), query) as stream:
        assert [await stream.next(), await stream.next()] == expected
        assert (await stream.next())["decoded"] == DECODED


async def test_types_that_are_not_there(client: Client, kernel: FakeKernel) -> None:
    kernel.btf = section(OBJECTS / "events.bpf.o", ".BTF")
    map_ = await a_map(client)
    for name in ("Event", "event%00", "x" * 200):
        path = f"/maps/{map_}/records?type={name}"
        problem = await client.refused("GET", path, status=422, kind="invalid")
        assert problem["errors"][0]["loc"] == ["type"]
        assert "event" in problem["detail"]
    kernel.btf = b"no BTF"
    map_ = await a_map(client)
    path = f"/maps/{map_}/records?type=event"
    await client.refused("GET", path, status=422, kind="invalid")


async def test_nothing_to_be_told_of_records(client: Client) -> None:
    path = f"/maps/{await a_map(client)}/records?data=false"
    problem = await client.refused("GET", path, status=422, kind="invalid")
    assert problem["errors"][0]["loc"] == ["data"]


async def test_a_type_without_btf(client: Client) -> None:
    path = f"/maps/{await a_map(client)}/records?type=event"
    problem = await client.refused("GET", path, status=422, kind="invalid")
    assert problem["errors"][0]["loc"] == ["type"]
    assert "-g" in problem["detail"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
async def test_only_the_owner_takes_records(
    serve: Callable[..., Awaitable[Served]], kernel: FakeKernel, actor: Actors
) -> None:
    """Who may read what is others' may not: reading takes the records away."""
    served = await serve(kernel)
    owner, other = await actor(uid=NOBODY), await actor(uid=NOBODY - 1)
    map_ = await a_map(owner)
    answer = await other.request("GET", f"/maps/{map_}/records")
    assert (answer.status, answer.kind) == (404, "not-found")
    assert not served.kernel.ring.opened
