"""The client library, against the daemon over a fake kernel, and against a scripted server."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kpmd.client
from kpmd.client import way
from kpmd.client.client import Client
from kpmd.client.errors import ApiError, ConnectionFailed, ProtocolError

ROOT = Path(__file__).resolve().parents[2]
ELF = b"\x7fELF" + bytes(60)
VFS_READ = "0xffffffff81001000"


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory with a path short enough for sockets, which every user may pass through."""
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        os.chmod(name, 0o711)
        yield Path(name)


@contextlib.contextmanager
def running_daemon(
    *more: str, at: str | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The whole daemon as a process: its socket, and the process itself.

    ``more``: a call of the kernel and a socket's path, see ``tests.fakes.daemon``. ``at``: listen
    there.
    """
    with (
        short_directory() as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        open(directory / "log", "wb") as log,
    ):
        ready.bind(str(directory / "notify"))
        ready.settimeout(30)
        path = at or str(directory / "kpmd.sock")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.daemon", path, *more],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(directory / "notify")},
            stderr=log,
        )
        try:
            assert ready.recv(100) == b"READY=1"
            yield path, process
        finally:
            process.kill()
            process.wait()


#: Bytes, the end of the connection, or what sends by itself and tells whether to go on.
Answer = bytes | Callable[[socket.socket], bool] | None
Script = Callable[[str, str, Any], Answer]


def http(body: object, status: int = 200, extra: str = "") -> bytes:
    """An HTTP answer with JSON, or with the bytes as they are."""
    if status == 204:
        return f"HTTP/1.1 204 X\r\n{extra}\r\n".encode()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n{extra}\r\n".encode() + data


def problem(kind: str, status: int, **more: Any) -> bytes:
    """A problem document as the daemon sends it."""
    return http({"kind": kind, "status": status, "detail": f"it is {kind}", **more}, status)


class Scripted(socketserver.ThreadingUnixStreamServer):
    """Answers what its script says; ``None``, or an answer with ``Connection: close``, closes."""

    def __init__(self, path: str, script: Script, read_body: bool) -> None:
        self.path = path
        self.script = script
        self.read_body = read_body
        self.seen: list[tuple[str, str, Any]] = []
        self.closed = threading.Semaphore(0)
        self.open: set[socket.socket] = set()
        super().__init__(path, _Handler)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.closed.release()


class _Handler(socketserver.StreamRequestHandler):
    server: Scripted

    def handle(self) -> None:
        self.server.open.add(self.connection)
        with contextlib.suppress(OSError):
            while self._one():
                pass
        self.server.open.discard(self.connection)

    def _one(self) -> bool:
        first = self.rfile.readline().decode().split()
        if not first:
            return False
        length = 0
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            length = int(value) if name.lower() == "content-length" else length
        body = json.loads(self.rfile.read(length)) if length and self.server.read_body else None
        self.server.seen.append((first[0], first[1], body))
        answer = self.server.script(first[0], first[1], body)
        if callable(answer):
            return answer(self.connection)
        if answer is not None:
            self.wfile.write(answer)
        return answer is not None and b"Connection: close" not in answer


@contextlib.contextmanager
def scripted(script: Script, read_body: bool = True) -> Iterator[Scripted]:
    """A server that answers what ``script`` says to method, path and body."""
    with short_directory() as directory:
        server = Scripted(str(directory / "s.sock"), script, read_body)
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            for each in list(server.open):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            server.server_close()


def always(answer: Answer) -> Script:
    """A script of one answer."""
    return lambda method, path, body: answer


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


@pytest.fixture
def client(daemon: str) -> Iterator[Client]:
    with Client(daemon) as made:
        yield made
        for program in made.programs():
            made.delete_program(program["id"], force=True)


# Against the daemon


def test_daemon_calls(client: Client) -> None:
    assert client.version()["version"] == kpmd.__version__
    found = client.capabilities()
    assert found["features"]["bpf_link_kprobe_multi"]["supported"] is True
    assert found["survives_restart"] is False
    assert client.capabilities(refresh=True)["builtins"] == ["count", "latency", "stacks", "trace"]


def test_whole_round(client: Client) -> None:
    made = client.load_builtin("count", globals={"target_pid": 7}, max_entries={"counts": 2})
    program, map_ = made["programs"][0], made["maps"][0]
    assert (program["lifetime"], map_["max_entries"]) == ({"kind": "process"}, 2)
    assert client.program(program["id"])["name"] == "count"
    assert client.map(map_["id"])["name"] == "counts"
    assert [each["id"] for each in client.maps()] == [map_["id"]]
    link = client.attach(program["id"], symbols=["vfs_read", "nf_hook"], cookies=[1, 1 << 63])
    assert client.link(link["id"])["count"] == 2
    assert list(client.targets(link["id"])) == [
        {"symbol": "vfs_read", "module": None, "address": VFS_READ, "cookie": "1"},
        {
            "symbol": "nf_hook",
            "module": "nf_tables",
            "address": "0xffffffffc0001000",
            "cookie": str(1 << 63),
        },
    ]
    assert [each["id"] for each in client.links(program=program["id"])] == [link["id"]]
    first = next(client.entries(map_["id"]))
    assert client.entry(map_["id"], bytes.fromhex(first["key"])) == first
    with pytest.raises(ApiError) as caught:
        client.delete_program(program["id"])
    assert (caught.value.kind, caught.value.status) == ("conflict", 409)
    client.detach(link["id"])
    assert list(client.links()) == []
    client.delete_program(program["id"])


def test_attach_by_address(client: Client) -> None:
    program = client.load_object(ELF, programs=["count"], lifetime="persistent")["programs"][0]
    link = client.attach(
        program["id"], "kretprobe", addresses=[int(VFS_READ, 16)], labels={"a": "b"}
    )
    assert (link["kind"], link["labels"]) == ("kretprobe", {"a": "b"})
    assert [each["symbol"] for each in client.targets(link["id"])] == ["vfs_read"]


def test_instructions(client: Client) -> None:
    made = client.load_instructions(b"\xb7" + bytes(15), name="two")
    assert made["programs"][0]["name"] == "two"
    with pytest.raises(ApiError) as caught:
        client.load_instructions(b"\x95" + bytes(7))
    assert caught.value.kind == "verifier-rejected"
    assert caught.value.problem["verifier_log"] == "R0 !read_ok\n"


def test_ids_cannot_lead_elsewhere(client: Client) -> None:
    for id_ in ("../version", "a/b", "a?b=c", "ä"):
        with pytest.raises(ApiError) as caught:
            client.link(id_)
        assert caught.value.kind == "not-found"


# What is sent, and pages


def test_bodies() -> None:
    with scripted(always(http({"programs": [], "maps": []}, 201))) as server:
        with Client(server.path) as client:
            client.load_object(
                b"elf",
                programs=["p"],
                attach="kprobe_session",
                globals={"n": -1, "b": b"\0\1"},
                max_entries={"m": 3},
                lifetime="persistent",
                labels={"k": "v"},
            )
            client.attach("prg-1", "session", addresses=[0x10], cookies=[2])
        assert server.seen[0] == (
            "POST",
            "/programs",
            {
                "source": {
                    "kind": "object",
                    "elf": base64.b64encode(b"elf").decode(),
                    "programs": ["p"],
                    "globals": {"n": -1, "b": "AAE="},
                    "max_entries": {"m": 3},
                },
                "attach": "kprobe_session",
                "lifetime": {"kind": "persistent"},
                "labels": {"k": "v"},
            },
        )
        assert server.seen[1][2] == {
            "program": "prg-1",
            "kind": "session",
            "lifetime": {"kind": "process"},
            "labels": {},
            "addresses": ["0x0000000000000010"],
            "cookies": ["2"],
        }


def test_pages_are_asked_for_one_by_one() -> None:
    pages = {"0": (["x", "y"], "a b"), "a+b": (["z"], "c"), "c": ([], None)}

    def script(method: str, target: str, body: Any) -> bytes:
        items, following = pages[target.partition("after=")[2] or "0"]
        return http({"items": items, "next": following})

    with scripted(script) as server, Client(server.path) as client:
        targets: Iterator[Any] = client.targets("lnk-1")
        assert next(targets) == "x"
        assert len(server.seen) == 1
        assert list(targets) == ["y", "z"]
        assert server.seen[0][1] == "/links/lnk-1/targets?limit=1000"


@pytest.mark.parametrize(
    "page",
    [{"items": [], "next": "same"}, {"items": 3, "next": None}, {"items": []}, {"next": 4}, []],
)
def test_pages_that_are_none(page: object) -> None:
    with scripted(always(http(page))) as server, Client(server.path) as client:
        if page == {"items": []}:
            assert list(client.maps()) == []
            return
        with pytest.raises(ProtocolError):
            list(client.maps())


# The connection's life


def test_one_connection_serves_many_calls() -> None:
    with scripted(always(http({}))) as server, Client(server.path) as client:
        client.version()
        client.load_builtin("count")
        client.version()
        assert len(server.open) == 1


@pytest.mark.parametrize("polite", [True, False])
def test_closed_while_idle_is_opened_again_even_for_post(polite: bool) -> None:
    answer = http({"programs": [], "maps": []}, extra="Connection: close\r\n" if polite else "")
    with scripted(always(answer)) as server, Client(server.path) as client:
        client.version()
        if not polite:
            for each in list(server.open):
                each.shutdown(socket.SHUT_RDWR)
        assert server.closed.acquire(timeout=10)
        client.load_builtin("count")
        assert [method for method, _, _ in server.seen] == ["GET", "POST"]


def test_dropped_calls_are_sent_again_only_where_that_is_harmless() -> None:
    answers = iter([http({}), None, http({"version": "2"}), None])
    with scripted(lambda *call: next(answers)) as server, Client(server.path) as client:
        client.version()
        assert client.version()["version"] == "2"
        assert len(server.seen) == 3
        with pytest.raises(ConnectionFailed, match="without an answer") as caught:
            client.load_builtin("count")
        assert caught.value.reason == "lost"
        assert len(server.seen) == 4


def test_a_fresh_connection_that_is_dropped_is_not_tried_for_ever() -> None:
    with (
        scripted(always(None)) as server,
        Client(server.path) as client,
        pytest.raises(ConnectionFailed, match="journalctl"),
    ):
        client.version()
    assert len(server.seen) == 1


def test_an_interrupted_call_leaves_nothing_for_the_next() -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    go_on = threading.Event()

    def script(method: str, target: str, body: Any) -> bytes:
        if target == "/version":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            go_on.wait(10)
        return http({"builtins": [target]})

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with scripted(script) as server, Client(server.path) as client:
            with pytest.raises(Interrupted):
                client.version()
            go_on.set()
            assert client.capabilities()["builtins"] == ["/capabilities"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_timeout() -> None:
    go_on = threading.Event()

    def script(method: str, target: str, body: Any) -> None:
        go_on.wait(10)

    with scripted(script) as server, Client(server.path, timeout=0.05) as client:
        with pytest.raises(ConnectionFailed, match="in time") as caught:
            client.version()
        go_on.set()
    assert caught.value.reason == "timeout"


# Answers that are none


@pytest.mark.parametrize(
    "answer",
    [
        http({"a": "b" * 100})[:-50] + b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[1,",
    ],
)
def test_cut_in_the_middle(answer: bytes) -> None:
    closing = answer.replace(b"200 ", b"200 Connection: close ", 1)
    with scripted(always(closing)) as server, Client(server.path) as client:
        with pytest.raises(ConnectionFailed, match="in the middle") as caught:
            client.version()
        assert caught.value.reason == "lost"


@pytest.mark.parametrize(
    "answer",
    [
        http(b"<html>"),
        http(b"[" * 100_000),
        http(b"\xff\xfe"),
        http([1]),
        http("refused", 502),
        http(b"gateway", 502),
        b"SSH-2.0-x\r\nConnection: close\r\n",
        b"HTTP/1.1 200 Connection: close\r\nA: " + b"x" * 70_000,
    ],
)
def test_not_kpmd(answer: bytes) -> None:
    with (
        scripted(always(answer)) as server,
        Client(server.path) as client,
        pytest.raises(ProtocolError),
    ):
        client.version()


def test_a_problem_may_lack_everything() -> None:
    with scripted(always(http({"kind": 3}, 418))) as server, Client(server.path) as client:
        with pytest.raises(ApiError, match="answered 418") as caught:
            client.version()
        assert (caught.value.kind, caught.value.status) == ("unknown", 418)


def test_a_huge_answer_is_not_read() -> None:
    announced = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + 64 * (
        b"400\r\n" + b" " * 1024 + b"\r\n"
    )
    for answer in (announced, chunked):
        with (
            scripted(always(answer)) as server,
            Client(server.path, max_answer=1 << 15) as client,
            pytest.raises(ProtocolError, match="32768 bytes"),
        ):
            client.version()


def test_a_large_answer_is_read() -> None:
    text = "x" * (8 << 20)
    with scripted(always(http({"version": text}))) as server, Client(server.path) as client:
        assert client.version()["version"] == text


def test_an_answer_before_the_body_was_read() -> None:
    answer = problem("too-large", 413).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    with scripted(always(answer), read_body=False) as server, Client(server.path) as client:
        with pytest.raises(ApiError) as caught:
            client.load_object(bytes(8 << 20))
        assert caught.value.kind == "too-large"


# No connection


def fails(path: object) -> ConnectionFailed:
    with Client(str(path)) as client, pytest.raises(ConnectionFailed) as caught:
        client.version()
    return caught.value


def test_no_socket(tmp_path: Path) -> None:
    error = fails(tmp_path / "none.sock")
    assert error.reason == "missing"
    assert "systemctl start kpmd" in str(error)
    assert f"kpmd --socket {tmp_path}/none.sock" in str(error)
    (tmp_path / "file").touch()
    assert fails(tmp_path / "file" / "x").reason == "missing"


def test_nobody_listens() -> None:
    with short_directory() as directory:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(directory / "left.sock"))
        error = fails(directory / "left.sock")
        assert (error.reason, "the daemon ended" in str(error)) == ("refused", True)
        (directory / "file").touch()
        assert "is no socket" in str(fails(directory / "file"))


@pytest.mark.parametrize("path", ["/" + "x" * 200, "a\0b", "\0abstract", ""])
def test_impossible_paths(path: str) -> None:
    assert fails(path).reason == "other"


def test_denied_names_the_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.touch()
    path.chmod(0o660)
    members: list[str] = []
    monkeypatch.setattr(way, "_group", lambda gid: ("tracers", members))
    monkeypatch.setattr(way, "_user_name", lambda uid: "ada")
    monkeypatch.setattr(os, "getgroups", list)
    monkeypatch.setattr(os, "getegid", lambda: 100)
    stat = os.stat(path)
    changed = os.stat_result((*stat[:5], 12345, *stat[6:]))
    monkeypatch.setattr(os, "stat", lambda path: changed)
    error = way.explain(str(path), PermissionError())
    assert error.reason == "permission"
    assert "group tracers; `sudo usermod -aG tracers ada`" in str(error)
    members.append("ada")
    assert "next login" in str(way.explain(str(path), PermissionError()))
    monkeypatch.setattr(os, "getgroups", lambda: [12345])
    assert "refused ada" in str(way.explain(str(path), PermissionError()))


def test_denied_where_no_group_would_help(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.touch(mode=0o600)
    assert "--group GROUP" in str(way.explain(str(path), PermissionError()))
    gone = way.explain(str(tmp_path / "none"), PermissionError())
    assert "a directory above" in str(gone)


# The package


@pytest.mark.alone
def test_imports_little() -> None:
    code = (
        "import sys, kpmd.client\n"
        "assert 'http.client' not in sys.modules\n"
        "kpmd.client.Client, kpmd.client.ApiError\n"
        "strange = {n.partition('.')[0] for n in sys.modules} - sys.stdlib_module_names\n"
        "strange -= {'sitecustomize'}\n"  # the machine's own, not ours
        "print(sorted(n for n in strange if not n.startswith('_')))\n"
        "print(sorted(n for n in sys.modules if n.startswith('kpmd.')))\n"
        "slow = {'asyncio', 'ssl', 'http.client', 'email', 'subprocess', 'tempfile', 'threading'}\n"
        "print(sorted(slow & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    packages, modules, slow = done.stdout.splitlines()
    assert packages == "['h11', 'kpmd']"
    # Not for who makes blocking calls: they take long to import.
    assert slow == "[]"
    assert "kpmd.api" not in modules
    assert "kpmd.errors" not in modules


def test_unknown_attributes() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = kpmd.client.nothing
    assert kpmd.client.ProtocolError is ProtocolError
