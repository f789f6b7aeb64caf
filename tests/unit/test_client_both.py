"""What ``Client`` and ``AsyncClient`` have in common, on each event loop."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kpmd.client import errors
from kpmd.client.client import Client
from kpmd.client.errors import ApiError, ClientError, ConnectionFailed, NotFound, ProtocolError
from kpmd.client.net import Patience
from tests.unit.driven import MAKES, Make
from tests.unit.test_client import (
    Answer,
    Scripted,
    always,
    http,
    problem,
    running_daemon,
    scripted,
    short_directory,
)
from tests.unit.test_client_events import END, HEAD, chunk, cut, event

LOADED = http({"programs": [{"id": "prg-1"}, {"id": "prg-2"}], "maps": []}, 201)


@pytest.fixture(params=list(MAKES))
def make(request: pytest.FixtureRequest) -> Make:
    return MAKES[request.param]


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


def methods(server: Scripted) -> list[str]:
    return [method for method, _, _ in server.seen]


# Against the daemon


def test_a_whole_round(daemon: str, make: Make) -> None:
    with make(daemon) as client, client.events() as events:
        with client.loaded_builtin("count", max_entries={"counts": 2}) as loaded:
            program = loaded["programs"][0]["id"]
            with client.attached(program, symbols=["vfs_read"]) as link:
                assert [each["id"] for each in client.links()] == [link["id"]]
                assert [each["symbol"] for each in client.targets(link["id"])] == ["vfs_read"]
            assert list(client.links()) == []
            with client.leased(60) as lease:
                client.attach(program, symbols=["vfs_read"], lifetime=lease["id"])
            assert list(client.links()) == []
            client.attach(program, symbols=["vfs_read"])
        assert list(client.programs()) == []
        assert list(client.leases()) == []
        with pytest.raises(errors.Gone):
            client.lease(lease["id"])
        found = next(each for each in events if each["what"] == "link")
        assert (found["event"], found["id"]) == ("created", link["id"])


def test_what_lives_by_the_connection(daemon: str, make: Make) -> None:
    with make(daemon) as other:
        with make(daemon) as client:
            program = client.load_builtin("count", lifetime="connection")["programs"][0]["id"]
            client.attach(program, symbols=["vfs_read"], lifetime="connection")
            client.version()
            assert len(list(other.links())) == 1
        while list(other.programs()):
            pass


# The end of a block


def test_a_block_ends_what_it_made_also_where_it_fails(make: Make) -> None:
    with scripted(always(http({"id": "lnk-1"}, 201))) as server, make(server.path) as client:
        with pytest.raises(KeyError), client.attached("prg-1", symbols=["a"]):
            raise KeyError
        assert [call[:2] for call in server.seen] == [
            ("POST", "/links"),
            ("DELETE", "/links/lnk-1"),
        ]


def test_what_has_ended_already_is_no_error(make: Make) -> None:
    answers = {"POST": LOADED, "DELETE": problem("not-found", 404)}
    with scripted(lambda method, *_: answers[method]) as server, make(server.path) as client:
        with client.loaded_builtin("count"):
            pass
        assert [target for _, target, _ in server.seen[1:]] == [
            "/programs/prg-1?force=true",
            "/programs/prg-2?force=true",
        ]


def test_the_first_error_is_kept(make: Make) -> None:
    answers = {"POST": LOADED, "DELETE": problem("kernel", 500)}
    with scripted(lambda method, *_: answers[method]) as server, make(server.path) as client:
        with pytest.raises(errors.KernelError), client.loaded_object(b""):
            pass
        with pytest.raises(KeyError) as caught, client.loaded_object(b""):
            raise KeyError
        assert "it is kernel" in caught.value.__notes__[0]
        assert methods(server) == ["POST", "DELETE", "DELETE"] * 2


def test_a_block_that_is_never_entered_does_nothing(make: Make) -> None:
    with scripted(always(LOADED)) as server, make(server.path) as client:
        client.loaded_builtin("count")
        assert server.seen == []


# Errors


@pytest.mark.parametrize("kind", errors.KINDS)
def test_each_kind_has_its_class(kind: str) -> None:
    found = ApiError.from_problem(400, {"kind": kind, "detail": "why"})
    assert type(found) is errors.KINDS[kind]
    assert (found.kind, found.status, str(found)) == (kind, 400, "why")


def test_kinds_that_nobody_knows_yet() -> None:
    assert type(ApiError.from_problem(400, {"kind": "new"})) is ApiError


def test_the_kinds_are_the_daemons() -> None:
    import kpmd.errors

    theirs = {each.kind for each in vars(kpmd.errors).values() if hasattr(each, "kind")}
    assert set(errors.KINDS) == theirs


# Answers that are none

WHOLE = http({"builtins": ["x"]}).replace(b"200 X", b"200 Connection: close", 1)
CHUNKED = cut(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")


@pytest.mark.parametrize("end", range(1, len(WHOLE)))
def test_truncated_anywhere(end: int) -> None:
    """One driver here: what differs between them is tested below."""
    with (
        scripted(always(lambda sock: bool(sock.send(WHOLE[:end])) and False)) as server,
        MAKES["sync"](server.path) as client,
        pytest.raises(ConnectionFailed, match="in the middle") as caught,
    ):
        client.version()
    assert caught.value.reason == "lost"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (CHUNKED + b"5\r\n[1,", ConnectionFailed),
        (CHUNKED + b"2\r\n{}\r\n", ConnectionFailed),
        (CHUNKED + b"zz\r\n", ProtocolError),
        (CHUNKED + b"2\r\n{}xx0\r\n\r\n", ProtocolError),
        (CHUNKED + b"f" * 30 + b"\r\n", ProtocolError),
        (CHUNKED + b"2;" + b"x" * 100_000, ProtocolError),
        (b"HTTP/1.1 200 Connection: close\r\n" + b"A: b\r\n" * 30_000, ProtocolError),
        (b"HTTP/1.1 200 Connection: close\r\nA" + b"x" * 100_000, ProtocolError),
        (b"HTTP/1.1 200 Connection: close\r\nContent-Length: -1\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 200 Connection: close\r\nContent-Length: 2, 3\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 200 Connection: close\r\nTransfer-Encoding: gzip\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 200 Connection: close\r\nA\0: b\r\n\r\n", ProtocolError),
        (b"HTTP/2 200 Connection: close\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 2000 Connection: close\r\n\r\n", ProtocolError),
        (b"\x15\x03\x01\0\2\2 Connection: close", ProtocolError),
        (b"HTTP/1.1 200 Connection: close\r\n\r\n", ConnectionFailed),
        (b"HTTP/1.1 200 Connection: close\r\nContent-Length: 99999999999\r\n\r\n", ProtocolError),
    ],
)
def test_malformed(answer: bytes, error: type[ClientError], make: Make) -> None:
    with scripted(always(answer)) as server, make(server.path) as client:
        with pytest.raises(error):
            client.version()
        assert server.closed.acquire(timeout=10)


def test_who_speaks_no_http_is_not_waited_for(make: Make) -> None:
    with (
        scripted(always(b"SSH-2.0-OpenSSH\r\n")) as server,
        make(server.path) as client,
        pytest.raises(ProtocolError, match="no HTTP"),
    ):
        client.version()


def test_more_than_one_answer_is_not_taken_for_the_next(make: Make) -> None:
    answers = iter([http({"version": "1"}) + http({"version": "evil"}), http({"version": "2"})])
    with scripted(lambda *_: next(answers)) as server, make(server.path) as client:
        assert client.version()["version"] == "1"
        assert client.version()["version"] == "2"


def test_news_before_the_answer(make: Make) -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\n\r\n" + http({"version": "1"})
    with scripted(always(answer)) as server, make(server.path) as client:
        assert client.version() == client.version() == {"version": "1"}
        assert len(server.open) == 1


def test_early_and_late_answers(make: Make) -> None:
    early = problem("too-large", 413).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    with (
        scripted(always(early), read_body=False) as server,
        make(server.path) as client,
        pytest.raises(errors.TooLarge),
    ):
        client.load_object(bytes(8 << 20))
    text = "x" * (4 << 20)
    with scripted(always(http({"version": text}))) as server, make(server.path) as client:
        assert client.call("POST", "/", {"a": text})["version"] == text
        assert server.seen[0][2] == {"a": text}


def test_timeouts(make: Make) -> None:
    go_on = threading.Event()

    def script(*_: Any) -> Answer:
        go_on.wait(10)
        return http({"version": "late"})

    with scripted(script) as server, make(server.path, timeout=0.05) as client:
        with pytest.raises(ConnectionFailed, match="in time") as caught:
            client.version()
        go_on.set()
        assert caught.value.reason == "timeout"
        assert client.call("GET", "/")["version"] == "late"


# Trying again


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is done in the place of waiting, one each time; none left: the patience is over."""
    todo: list[Any] = []

    async def wait(self: Patience, stopped: object = None) -> bool:
        if not todo:
            return False
        todo.pop(0)()
        return True

    monkeypatch.setattr(Patience, "wait", wait)
    return todo


def nothing() -> None:
    pass


def test_without_patience_nothing_is_waited_for(make: Make) -> None:
    with make("/nowhere/kpmd.sock") as client, pytest.raises(ConnectionFailed) as caught:
        client.version()
    assert caught.value.reason == "missing"


def test_patience_comes_to_its_end(make: Make) -> None:
    with make("/nowhere/kpmd.sock", patience=0.15) as client, pytest.raises(ConnectionFailed):
        client.load_builtin("count")


def test_nobody_listens_yet(make: Make, waits: list[Any]) -> None:
    """Nothing was sent: any call is made when somebody does."""
    with short_directory() as folder, socket.socket(socket.AF_UNIX) as sock:
        path = str(folder / "s")

        def serve() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(LOADED)

        def listen() -> None:
            sock.listen()
            thread.start()

        thread = threading.Thread(target=serve)
        waits += [nothing, lambda: sock.bind(path), listen]
        with make(path) as client:
            assert len(client.load_builtin("count")["programs"]) == 2
        thread.join()
    assert waits == []


def test_what_is_tried_again(make: Make, waits: list[Any]) -> None:
    stopping = problem("shutting-down", 503)
    done = http({"version": "1"})
    cases: list[tuple[Callable[[Any], object], list[Answer], int]] = [
        (lambda client: client.version(), [None, None, done], 3),
        (lambda client: client.version(), [stopping, None, stopping, done], 4),
        (lambda client: client.renew_lease("lse-1"), [None, done], 2),
        (lambda client: client.load_builtin("x"), [stopping, stopping, done], 3),
        (lambda client: client.detach("lnk-1"), [None, problem("not-found", 404)], 2),
        (lambda client: client.end_lease("lse-1"), [None, problem("gone", 410)], 2),
        (lambda client: client.delete_entry("map-1", b"a"), [stopping, None, http({}, 204)], 3),
    ]
    for call, answers, seen in cases:
        waits[:] = [nothing] * 5
        script = iter(answers)
        with scripted(lambda *_, each=script: next(each)) as server, make(server.path) as client:
            call(client)
            assert len(server.seen) == seen
            assert list(script) == []


def test_what_is_not_tried_again(make: Make, waits: list[Any]) -> None:
    stopping = problem("shutting-down", 503)
    cases: list[tuple[Callable[[Any], object], list[Answer], type[ClientError]]] = [
        (lambda client: client.load_builtin("x"), [stopping, None], ConnectionFailed),
        (lambda client: client.put_entry("m", b"k", b"v", "create"), [None], ConnectionFailed),
        (lambda client: client.detach("lnk-1"), [problem("not-found", 404)], NotFound),
        (lambda client: client.detach("l"), [stopping, problem("not-found", 404)], NotFound),
        (lambda client: client.version(), [problem("quota", 429)], errors.QuotaExceeded),
        (lambda client: client.version(), [http(b"<html>")], ProtocolError),
    ]
    for call, answers, error in cases:
        waits[:] = [nothing] * 5
        script = iter(answers)
        with scripted(lambda *_, each=script: next(each)) as server, make(server.path) as client:
            with pytest.raises(error):
                call(client)
            assert list(script) == []


# Streams that connect again


def test_events_go_on_behind_the_last(make: Make, waits: list[Any]) -> None:
    waits += [nothing] * 4
    answers = iter(
        [
            cut(HEAD + chunk(event("a-1") + event("a-2"))),
            problem("shutting-down", 503),
            None,
            cut(HEAD + chunk(event("a-3")) + END),
            problem("gone", 410),
            HEAD + chunk(event("b-1")),
        ]
    )
    gaps: list[str] = []
    with scripted(lambda *_: next(answers)) as server, make(server.path) as client:
        with client.events("a-0", on_gap=gaps.append) as events:
            assert [next(events)["seq"] for _ in range(4)] == ["a-1", "a-2", "a-3", "b-1"]
            assert events.seq == "b-1"
        assert [target.partition("since=")[2] for _, target, _ in server.seen] == [
            *("a-0", "a-2", "a-2", "a-2", "a-3"),
            "",
        ]
    assert gaps == ["what came after the event a-3 is missing: it is gone"]


def test_events_that_were_lost_before_the_first(make: Make, waits: list[Any]) -> None:
    answers = iter([cut(HEAD), HEAD + chunk(event("a-1"))])
    gaps: list[str] = []
    with (
        scripted(lambda *_: next(answers)) as server,
        make(server.path) as client,
        client.events(on_gap=gaps.append) as events,
    ):
        assert next(events)["seq"] == "a-1"
    assert len(gaps) == 1


def test_the_first_connection_tells_of_its_own_errors(make: Make) -> None:
    with scripted(always(problem("gone", 410))) as server, make(server.path) as client:
        with pytest.raises(errors.Gone):
            client.events("a-1", on_gap=print)
        assert server.closed.acquire(timeout=10)


def test_what_no_new_connection_mends(make: Make, waits: list[Any]) -> None:
    waits += [nothing] * 4
    for again, error in (
        (problem("forbidden", 403), errors.Forbidden),
        (http(b"<html>"), ProtocolError),
    ):
        answers = iter([cut(HEAD), again])
        with (
            scripted(lambda *_, each=answers: next(each)) as server,
            make(server.path) as client,
            pytest.raises(error),
        ):
            next(client.events(on_gap=print))


def test_a_daemon_that_does_not_come_back(make: Make, waits: list[Any]) -> None:
    waits += [nothing] * 2
    with scripted(lambda *_: cut(HEAD) if len(server.seen) == 1 else None) as server:
        with make(server.path) as client, client.events(on_gap=print) as events:
            with pytest.raises(ConnectionFailed):
                next(events)
            assert list(events) == []
        assert len(server.seen) == 4


def test_records_go_on_while_the_map_is_there(make: Make) -> None:
    record = b'{"data": "00"}\n'
    answers = iter(
        [cut(HEAD + chunk(record)), cut(HEAD + chunk(record) + END), problem("not-found", 404)]
    )
    gaps: list[str] = []
    with scripted(lambda *_: next(answers)) as server, make(server.path) as client:
        with client.records("map-1", "s", on_gap=gaps.append) as records:
            assert [each["data"] for each in records] == ["00", "00"]
        assert {target for _, target, _ in server.seen} == {"/maps/map-1/records?type=s"}
    assert len(gaps) == 1


@pytest.mark.parametrize("make", [MAKES["sync"], MAKES["uvloop"]])
def test_a_stream_outlives_a_restart_of_the_daemon(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new daemon on the same socket, which knows nothing of the old one's events."""
    monkeypatch.setattr(Patience, "_LONGEST", 0.1)
    gaps: list[str] = []

    def on_gap(gap: str) -> None:
        gaps.append(gap)
        with Client(path) as other:  # it listens already
            other.create_lease(60)

    with contextlib.ExitStack() as last:
        path, process = last.enter_context(running_daemon())
        client = last.enter_context(make(path))
        events = last.enter_context(client.events(on_gap=on_gap))
        client.create_lease(60)
        assert next(each for each in events if each["what"] == "lease")
        process.kill()
        process.wait()
        os.unlink(path)
        last.enter_context(running_daemon(at=path))
        assert next(each for each in events if each["what"] == "lease")["event"] == "created"
    (gap,) = gaps
    assert "is missing" in gap


# File descriptors


def with_fds(data: bytes, *fds: int) -> Answer:
    """An answer with these beside its first byte."""

    def send(sock: socket.socket) -> bool:
        socket.send_fds(sock, [data[:1]], list(fds))
        sock.sendall(data[1:])
        return True

    return send


def test_a_maps_file_descriptor(make: Make) -> None:
    read, write = os.pipe()
    try:
        with scripted(always(with_fds(http({"fds": 1}), write))) as server:
            with make(server.path) as client:
                found = client.map_fd("map-1")
            assert server.seen == [("POST", "/maps/map-1/fd", None)]
        assert not os.get_inheritable(found)
        os.write(found, b"x")
        os.close(found)
        assert os.read(read, 2) == b"x"
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (http({"fds": 0}), ProtocolError),
        (with_fds(problem("not-supported", 501), 0), errors.NotSupported),
        (with_fds(http(b"no JSON"), 0), ProtocolError),
        (with_fds(b"SSH-2.0", 0), ProtocolError),
    ],
)
def test_no_file_descriptor(answer: Answer, error: type[ClientError], make: Make) -> None:
    with scripted(always(answer)) as server, make(server.path) as client, pytest.raises(error):
        client.map_fd("map-1")


def test_file_descriptors_that_nobody_asked_for(make: Make) -> None:
    """They are closed: the fixture that looks for leaks would find them."""
    answer = with_fds(http({"version": "1"}), 0, 1, 2)
    with scripted(always(answer)) as server, make(server.path) as client:
        client.version()
        os.close(client.map_fd("map-1"))
