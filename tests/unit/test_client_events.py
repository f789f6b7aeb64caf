"""The client library: events as they happen, resumed, closed and cut."""

from __future__ import annotations

import gc
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kpmd.client import lines as lines_module
from kpmd.client.answers import Event
from kpmd.client.client import Client
from kpmd.client.errors import ApiError, ConnectionFailed, ProtocolError
from kpmd.client.streams import Stream
from tests.unit.test_client import always, http, problem, running_daemon, scripted

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
)
#: The end of a stream, as the daemon sends it when it stops.
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(seq: str) -> bytes:
    return json.dumps({"seq": seq, "what": "lease", "event": "created"}).encode() + b"\n"


def cut(stream: bytes) -> bytes:
    """The stream, and behind it the connection's end."""
    return stream.replace(b"200 ", b"200 Connection: close ", 1)


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


@pytest.fixture
def client(daemon: str) -> Iterator[Client]:
    with Client(daemon) as made:
        yield made


def up_to(events: Stream[Event], event: str, id_: str) -> list[Any]:
    found: list[Any] = []
    while not found or (found[-1]["event"], found[-1]["id"]) != (event, id_):
        found.append(next(events))
    return found


# Against the daemon


def test_the_life_of_a_link(client: Client) -> None:
    with client.events() as events:
        assert events.seq is None
        lease = client.create_lease(60)["id"]
        program = client.load_object(b"\x7fELF" + bytes(60), ["count"])["programs"][0]["id"]
        link = client.attach(program, symbols=["vfs_read", "vfs_open"], lifetime=lease)
        client.end_lease(lease)
        client.delete_program(program)
        found = [each for each in up_to(events, "ended", program) if each["what"] != "client"]
        assert events.seq == found[-1]["seq"]
    assert [(each["what"], each["event"], each.get("reason")) for each in found] == [
        ("lease", "created", None),
        ("program", "created", None),
        ("link", "created", None),
        ("link", "detaching", "lease-ended"),
        ("lease", "ended", "lease-ended"),
        ("link", "ended", "lease-ended"),
        ("program", "ended", "deleted"),
    ]
    assert [each["id"] for each in found[:3]] == [lease, program, link["id"]]
    assert (found[2]["program"], found[2]["kind"], found[2]["count"]) == (program, "kprobe", 2)
    assert found[1]["name"] == "count"
    assert {each["client"] for each in found} == {link["client"]}


def test_it_resumes_behind_the_last(client: Client) -> None:
    with client.events() as events:
        lease = client.create_lease(60)["id"]
        client.end_lease(lease)
        up_to(events, "created", lease)
        seq = events.seq
    with client.events(seq) as events:
        assert events.seq == seq
        assert [each["event"] for each in up_to(events, "ended", lease)] == ["ended"]


@pytest.mark.parametrize(
    ("since", "kind", "status"),
    [("00000000-1", "gone", 410), ("x y&z", "invalid", 422)],
)
def test_what_cannot_be_resumed(client: Client, since: str, kind: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        client.events(since)
    assert (caught.value.kind, caught.value.status) == (kind, status)


def test_silence_is_no_failure(daemon: str) -> None:
    with (
        Client(daemon) as other,
        Client(daemon, timeout=0.05) as client,
        client.events() as events,
    ):
        timer = threading.Timer(0.3, other.create_lease, [60])
        timer.start()
        assert next(each for each in events if each["what"] == "lease")["event"] == "created"
        timer.join()


def test_it_ends_when_the_daemon_stops() -> None:
    with running_daemon() as (path, process), Client(path) as client:
        events = client.events()
        program = client.load_builtin("count")["programs"][0]["id"]
        client.attach(program, symbols=["vfs_read"])
        process.send_signal(signal.SIGTERM)
        found = [(each["what"], each["event"]) for each in events]
        assert process.wait(20) == 0
    # Whether the end of these things is told as well is the daemon's to say.
    assert ("link", "created") in found
    assert list(events) == []


def test_it_is_lost_when_the_daemon_dies() -> None:
    with running_daemon() as (path, process), Client(path) as client:
        events = client.events()
        client.create_lease(60)
        assert next(events)["what"] == "lease"
        process.kill()
        with pytest.raises(ConnectionFailed, match="in the middle of the stream") as caught:
            next(events)
        assert caught.value.reason == "lost"
        assert next(events, None) is None


def test_who_does_not_read_is_cut_off(client: Client) -> None:
    """More than the daemon keeps, and more than fits into the socket."""
    with client.events() as events:
        for _ in range(4000):
            client.end_lease(client.create_lease(60)["id"])
        seen: list[int] = []
        with pytest.raises(ConnectionFailed, match="not read as fast") as caught:
            seen.extend(int(each["seq"].partition("-")[2]) for each in events)
        assert caught.value.reason == "lost"
        # What it had, it had without a gap.
        assert seen == list(range(seen[0], seen[0] + len(seen)))
        assert len(seen) < 8000
        with pytest.raises(ApiError) as refused:
            client.events(events.seq)
        assert refused.value.kind == "gone"


def test_there_is_no_daemon() -> None:
    with Client("/nowhere/kpmd.sock") as client, pytest.raises(ConnectionFailed) as caught:
        client.events()
    assert caught.value.reason == "missing"


# Closing


def test_closing_closes_the_connection() -> None:
    with scripted(always(HEAD + chunk(event("a-1") + event("a-2")))) as server:
        with Client(server.path) as client:
            with client.events() as first:
                assert next(first)["seq"] == "a-1"
            assert server.closed.acquire(timeout=10)
            # What it has read already is not given any more, either.
            assert list(first) == []
            assert first.seq == "a-1"
            first.close()
            client.events()
            gc.collect()
            assert server.closed.acquire(timeout=10)
            third = client.events()
        assert server.closed.acquire(timeout=10)
        assert list(third) == []
        assert [target for _, target, _ in server.seen] == ["/events"] * 3


def test_closing_from_another_thread_ends_the_waiting(client: Client) -> None:
    events = client.events()
    timer = threading.Timer(0.1, events.close)
    timer.start()
    assert [each["what"] for each in events if each["what"] != "client"] == []
    timer.join()


def test_closed_while_it_looks_for_the_daemon() -> None:
    def on_gap(gap: str) -> None:
        raise AssertionError

    answers = iter([cut(HEAD)])
    with scripted(lambda *_: next(answers, None)) as server, Client(server.path) as client:
        events = client.events(on_gap=on_gap)
        timer = threading.Timer(0.2, events.close)
        timer.start()
        assert list(events) == []
        timer.join()


def test_streams_that_bring_nothing_are_not_made_without_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines_module, "_PAUSE", 0.2)
    with scripted(always(cut(HEAD))) as server, Client(server.path) as client:
        events = client.events(on_gap=str)
        timer = threading.Timer(0.5, events.close)
        timer.start()
        assert list(events) == []
        timer.join()
        assert len(server.seen) <= 5


def test_interrupted_while_it_waits() -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with scripted(always(HEAD)) as server, Client(server.path) as client:
            events = client.events()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                next(events)
            assert server.closed.acquire(timeout=10)
            assert list(events) == []
    finally:
        signal.signal(signal.SIGALRM, before)


# Streams of all kinds


def given(stream: bytes) -> list[str]:
    with scripted(always(stream)) as server, Client(server.path) as client:
        return [each["seq"] for each in client.events()]


def test_lines_are_not_chunks() -> None:
    first, second = event("a-1"), event("a-2")
    assert given(HEAD + chunk(first + second) + END) == ["a-1", "a-2"]
    assert given(HEAD + b"".join(chunk(bytes([each])) for each in first) + END) == ["a-1"]
    assert given(HEAD + chunk(b"\n\r\n" + first + b"\n") + chunk(b"\n") + END) == ["a-1"]
    assert given(HEAD + END) == []
    long = b" " * 200_000
    assert given(HEAD + chunk(first[:-1] + long + b"\n" + second) + END) == ["a-1", "a-2"]


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"5\r\n",
        b"5\r\n{",
        chunk(event("a-2"))[:-1],
        chunk(b"{") + END,
        chunk(b'{"seq"'),
    ],
)
def test_cut_streams_give_what_came_whole(rest: bytes) -> None:
    stream = cut(HEAD + chunk(event("a-1")) + rest)
    with scripted(always(stream)) as server, Client(server.path) as client:
        events = client.events()
        seen: list[str] = []
        with pytest.raises(ConnectionFailed) as caught:
            seen.extend(each["seq"] for each in events)
        assert caught.value.reason == "lost"
        assert seen == ["a-1", "a-2"][: 2 if b"a-2" in rest else 1]
        assert events.seq == seen[-1]


@pytest.mark.parametrize(
    "data", [b"[1]\n", b'{"what": "link"}\n', b'{"seq": 1}\n', b"hello\n", b"\xff\n"]
)
def test_events_that_are_none(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="event"):
        given(HEAD + chunk(data))


def test_a_chunk_without_end() -> None:
    with pytest.raises(ProtocolError, match="no HTTP"):
        given(HEAD + b"0" * 70_000)


def test_a_line_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE", 1000)
    assert given(HEAD + chunk(event("x" * 900)) + END) == ["x" * 900]
    with pytest.raises(ProtocolError, match="over the 1000 bytes"):
        given(HEAD + chunk(b" " * 600) + chunk(b" " * 600))


@pytest.mark.parametrize(
    "answer",
    [
        http({"items": []}),
        http(b"<html>"),
        HEAD.replace(b"x-ndjson", b"json") + chunk(b"{}"),
        cut(HEAD)[:40],
        b"SSH-2.0-x\r\nConnection: close\r\n",
        http({}, 204),
    ],
)
def test_answers_that_are_no_stream(answer: bytes) -> None:
    with scripted(always(answer)) as server, Client(server.path) as client:
        with pytest.raises((ProtocolError, ConnectionFailed)):
            client.events()
        assert server.closed.acquire(timeout=10)


def test_without_chunks_an_end_is_a_cut() -> None:
    bare = b"HTTP/1.1 200 Connection: close\r\nContent-Type: application/x-ndjson\r\n\r\n"
    with pytest.raises(ConnectionFailed, match="in the middle"):
        given(bare + event("a-1"))
    length = f"Content-Length: {len(event('a-1'))}\r\n\r\n".encode()
    with pytest.raises(ConnectionFailed, match="in the middle"):
        given(bare[:-2] + length + event("a-1"))


def test_refused() -> None:
    for kind, status in (("gone", 410), ("shutting-down", 503), ("not-found", 404)):
        with scripted(always(problem(kind, status))) as server, Client(server.path) as client:
            with pytest.raises(ApiError) as caught:
                client.events("a-1")
            assert caught.value.kind == kind
            assert server.seen[0][1] == "/events?since=a-1"
            assert server.closed.acquire(timeout=10)


def test_dropped_without_an_answer_and_no_answer_in_time() -> None:
    with scripted(always(None)) as server, Client(server.path) as client:
        with pytest.raises(ConnectionFailed, match="without an answer") as caught:
            client.events()
        assert caught.value.reason == "lost"
    go_on = threading.Event()

    def script(method: str, target: str, body: Any) -> None:
        go_on.wait(10)

    with scripted(script) as server, Client(server.path, timeout=0.05) as client:
        with pytest.raises(ConnectionFailed) as caught:
            client.events()
        go_on.set()
    assert caught.value.reason == "timeout"
