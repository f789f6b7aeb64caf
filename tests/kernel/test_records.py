"""Streams of records out of a real kernel's ring buffers and perf buffers."""

from __future__ import annotations

import base64
import http.client
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.kernel.conftest import OBJECTS, Daemon
from tests.kernel.rest import Rest, UnixConnection
from tests.kernel.test_links import GETPID, call_getpid
from tests.kernel.wire import NOBODY
from tests.kernel.witness import eventually

ELF = base64.b64encode((OBJECTS / "events.bpf.o").read_bytes()).decode()
NDJSON, OCTETS = "application/x-ndjson", "application/octet-stream"
EVENT = struct.Struct("<QQII16sq")

pytestmark = pytest.mark.kprobes


class Stream:
    """An answer that is read as it comes."""

    def __init__(self, path: str, map_: str, accept: str = NDJSON, query: str = "") -> None:
        self._connection = UnixConnection(path, 60)
        self._connection.request("GET", f"/maps/{map_}/records{query}", headers={"Accept": accept})
        self._response: http.client.HTTPResponse = self._connection.getresponse()
        assert self._response.status == 200, self._response.read()
        assert self._response.headers.get_content_type() == accept

    def line(self) -> Any:
        line = self._response.readline()
        return json.loads(line) if line else None

    def record(self) -> bytes | int | None:
        """The next record of a raw stream, the number of those lost, None at the end."""
        head = self._response.read(4)
        if not head:
            return None
        (length,) = struct.unpack("<I", head)
        if length == 0xFFFFFFFF:
            return int.from_bytes(self._response.read(8), "little")
        return self._response.read(length)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


class Loaded:
    """The object with its maps, attached to what ``call_getpid`` calls, for this process alone."""

    def __init__(self, rest: Rest, program: str = "to_ring", **globals_: int) -> None:
        self._rest = rest
        source = {
            "kind": "object",
            "elf": ELF,
            "programs": [program],
            "globals": {"target_pid": os.getpid(), **globals_},
        }
        made = rest.ok("POST", "/programs", {"source": source, "attach": "kprobe_multi"})
        self.program = made["programs"][0]["id"]
        self.maps = {each["name"]: each["id"] for each in made["maps"]}
        body = {"program": self.program, "kind": "kprobe", "symbols": [GETPID]}
        self.link = rest.ok("POST", "/links", body)["id"]

    def end(self) -> None:
        self._rest.ok("DELETE", f"/programs/{self.program}?force=true")


@pytest.fixture
def load(rest: Rest) -> Callable[..., Loaded]:
    return lambda *args, **globals_: Loaded(rest, *args, **globals_)


def test_decoded_by_the_type_that_is_named_or_found(
    daemon: Daemon, load: Callable[..., Loaded]
) -> None:
    loaded = load()
    for query in ("?type=event", ""):
        with closing(Stream(daemon.socket, loaded.maps["events"], query=query)) as stream:
            call_getpid()
            line = stream.line()
        decoded = line["decoded"]
        raw = EVENT.unpack(bytes.fromhex(line["data"]))
        assert decoded == {
            "number": str(raw[0]),
            "function": str(raw[1]),
            "pid": os.getpid(),
            "phase": "END",
            "command": raw[4].rstrip(b"\0").decode(),
            "below_zero": "-1",
        }


@pytest.mark.parametrize("size", [1, 8, 48, 255, 256])
def test_raw_records_of_every_size_in_order(
    daemon: Daemon, load: Callable[..., Loaded], size: int
) -> None:
    loaded = load(size=size, burst=100)
    with closing(Stream(daemon.socket, loaded.maps["events"], OCTETS)) as stream:
        # Several times around the buffer, which holds 2^18 bytes.
        for start in range(0, 1000 if size < 48 else 4000, 100):
            call_getpid()
            for number in range(start, start + 100):
                record = stream.record()
                assert isinstance(record, bytes)
                assert len(record) == size
                if size >= 8:
                    assert record[:8] == struct.pack("<Q", number)
                else:
                    assert record[0] == number & 0xFF


def test_what_was_written_before_anybody_read(daemon: Daemon, load: Callable[..., Loaded]) -> None:
    loaded = load(burst=10)
    call_getpid()
    with closing(Stream(daemon.socket, loaded.maps["events"], OCTETS)) as stream:
        found = [stream.record() for _ in range(10)]
    assert [EVENT.unpack(each)[0] for each in found if isinstance(each, bytes)] == list(range(10))


def test_perf_buffers(daemon: Daemon, rest: Rest, load: Callable[..., Loaded]) -> None:
    loaded = load("to_perf")
    map_ = loaded.maps["perf_events"]
    for _ in range(2):  # again, once the first reader's buffers are gone
        with closing(Stream(daemon.socket, map_, query="?type=event")) as stream:
            call_getpid()
            call_getpid()
            first, second = stream.line()["decoded"], stream.line()["decoded"]
        assert first["pid"] == second["pid"] == os.getpid()
        assert int(second["number"]) == int(first["number"]) + 1
        assert (first["phase"], first["below_zero"]) == ("END", "-1")


def test_a_perf_buffers_record_is_seen_whenever_it_comes(
    daemon: Daemon, load: Callable[..., Loaded]
) -> None:
    """While it is being looked for, while it begins to be waited for, and while it is waited for.

    The kernel tells of a record once, and to whoever asks first.
    """
    loaded = load("to_perf")
    with closing(Stream(daemon.socket, loaded.maps["perf_events"], OCTETS)) as stream:
        for step in range(400):
            # No sleep: that would always take longer than the daemon needs to begin to wait.
            until = time.perf_counter() + step * 10e-6
            while time.perf_counter() < until:
                pass
            call_getpid()
            record = stream.record()
            assert isinstance(record, bytes)
            assert EVENT.unpack_from(record)[0] == step


def test_a_slow_reader_is_told_how_much_it_lost(
    daemon: Daemon, load: Callable[..., Loaded], rest: Rest
) -> None:
    """What it got and what it lost is all that was written and was not dropped by the program."""
    loaded = load(size=256, burst=500)
    with closing(Stream(daemon.socket, loaded.maps["events"], OCTETS)) as stream:
        # More than the queue, the sockets and the buffer hold.
        for _ in range(40):
            call_getpid()
            rest.ok("GET", "/healthz")
        rest.ok("DELETE", f"/links/{loaded.link}")
        (bss,) = rest.items(f"/maps/{loaded.maps['.bss']}/entries")
        written, dropped = struct.unpack_from("<QQ", bytes.fromhex(bss["value"]))
        assert written == 20_000
        got = lost = 0
        expected = 0
        while got + lost + dropped < written:
            found = stream.record()
            if isinstance(found, int):
                lost += found
                continue
            assert found is not None
            (number,) = struct.unpack_from("<Q", found)
            # In order; and where some are missing, it has been said before.
            assert number >= expected
            assert number - expected <= lost + dropped
            expected = number + 1
            got += 1
    assert lost > 0
    assert got + lost + dropped == written


def test_the_stream_ends_with_the_program(daemon: Daemon, load: Callable[..., Loaded]) -> None:
    loaded = load(burst=7)
    before = daemon.fds()
    with closing(Stream(daemon.socket, loaded.maps["events"], OCTETS)) as stream:
        call_getpid()
        loaded.end()
        assert [len(each) for each in iter(stream.record, None) if isinstance(each, bytes)] == [
            48
        ] * 7
    eventually(lambda: daemon.fds() < before, True)


def test_nothing_is_taken_by_another_user(
    daemon: Daemon, load: Callable[..., Loaded], holder: Callable[..., Any]
) -> None:
    loaded = load()
    asked = [["GET", f"/maps/{loaded.maps['events']}/records", None]]
    ((status, answer),) = holder(asked, user=NOBODY).answers()
    assert (status, answer["kind"]) == (404, "not-found")


@pytest.mark.once
def test_a_reader_at_full_rate_leaves_the_daemon_idle_when_it_goes(
    daemon: Daemon, load: Callable[..., Loaded]
) -> None:
    """A reader that goes away in the middle takes its buffers with it."""
    loaded = load(burst=1000)
    before = daemon.fds()
    with closing(Stream(daemon.socket, loaded.maps["events"], OCTETS)) as stream:
        for _ in range(20):
            call_getpid()
            assert stream.record() is not None
    eventually(daemon.fds, before)


@pytest.fixture(autouse=True)
def quiet(daemon: Daemon) -> Iterator[None]:
    """The daemon has no bug to tell of."""
    daemon.mark()
    yield
    assert daemon.bugs() == []
