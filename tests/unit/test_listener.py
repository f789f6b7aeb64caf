"""The daemon's socket: never wider than asked, never another daemon's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kpmd import listener
from kpmd.listener import ListenError, from_systemd, is_stored, make, passed_by_systemd


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: paths of sockets have 107 bytes at the most."""
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        yield Path(name)


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "k.sock"


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True


@pytest.mark.parametrize("mode", [0o660, 0o600, 0o666, 0o777, 0o000])
@pytest.mark.parametrize("umask", [0o022, 0o000, 0o777])
def test_it_has_the_mode_asked_for(path: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = make(path, None, mode)
        assert os.umask(umask) == umask, "the umask is as it was"
    finally:
        os.umask(before)
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == mode
    assert connects(path)
    assert not os.get_inheritable(made.sock.fileno())
    assert not made.sock.getblocking()
    assert made.where == str(path)
    made.close()


def test_at_no_step_is_it_wider_than_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every system call that changes it is followed by a look at all that lies there."""
    seen: list[tuple[str, str, int, bool]] = []

    def look(step: str) -> None:
        for each in path.parent.iterdir():
            found = each.lstat()
            if stat.S_ISSOCK(found.st_mode):
                seen.append((step, each.name, stat.S_IMODE(found.st_mode), connects(each)))

    class Sock(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            look("bind")

        def listen(self, *backlog: int) -> None:
            look("before listen")
            super().listen(*backlog)
            look("listen")

    def watched(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            look(name)
            return result

        monkeypatch.setattr(os, name, call)

    monkeypatch.setattr("kpmd.listener.socket.socket", Sock)
    for name in ("umask", "chown", "chmod", "rename"):
        watched(name)
    made = make(path, "0", 0o640)
    monkeypatch.undo()
    assert {step for step, *_ in seen} == {
        "bind",
        "umask",
        "chown",
        "chmod",
        "before listen",
        "listen",
        "rename",
    }
    for step, _, mode, _ in seen:
        assert not mode & ~0o640, (step, oct(mode))
    # Its group first, then its mode; and it takes its place only when it has both and listens.
    assert {mode for step, _, mode, _ in seen if step in ("bind", "umask", "chown")} == {0}
    assert all(name != path.name for step, name, _, _ in seen if step != "rename")
    assert [connected for step, *_, connected in seen if step == "rename"] == [True]
    made.close()


def test_a_thread_that_watches_never_sees_it_wider(path: Path) -> None:
    stop = threading.Event()
    wide: list[int] = []

    def watch() -> None:
        while not stop.is_set():
            for each in path.parent.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found = each.lstat()
                    if stat.S_IMODE(found.st_mode) & ~0o600:
                        wide.append(found.st_mode)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(100):
        make(path, None, 0o600).close()
    stop.set()
    watcher.join(10)
    assert wide == []


def test_the_group_by_name_and_number(path: Path) -> None:
    for group, number in (("daemon", None), ("12345", 12345)):
        if os.geteuid() != 0:
            pytest.skip("needs root to give a file away")
        made = make(path, group, 0o660)
        if number is not None:
            assert path.stat().st_gid == number
        else:
            assert path.stat().st_gid != 0
        assert path.stat().st_uid == os.geteuid()
        made.close()


def test_a_group_that_does_not_exist(path: Path) -> None:
    with pytest.raises(ListenError, match="no_such_group"):
        make(path, "no_such_group", 0o660)
    assert list(path.parent.iterdir()) == []


def test_closing_leaves_nothing(path: Path) -> None:
    made = make(path, None, 0o660)
    made.close()
    assert list(path.parent.iterdir()) == []
    made.close()


def test_closing_leaves_what_is_not_its_own(path: Path) -> None:
    made = make(path, None, 0o660)
    path.unlink()
    path.write_text("mine")
    made.close()
    assert path.read_text() == "mine"


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    made = make(path, None, 0o660)
    assert connects(path)
    made.close()


@pytest.mark.parametrize("locked", [True, False])
def test_a_live_one_is_refused_and_left_alone(path: Path, locked: bool) -> None:
    with contextlib.ExitStack() as stack:
        if locked:
            stack.callback(make(path, None, 0o660).close)
        else:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(path))
            sock.listen()
        before = path.stat().st_ino
        with pytest.raises(ListenError, match="another daemon"):
            make(path, None, 0o660)
        assert path.stat().st_ino == before
        assert connects(path)


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ListenError, match="is no socket"):
        make(path, None, 0o660)
    assert path.read_text() == "precious"
    path.unlink()
    path.mkdir()
    with pytest.raises(ListenError, match="is no socket"):
        make(path, None, 0o660)


def test_a_symbolic_link_is_not_followed(path: Path, folder: Path) -> None:
    target = folder / "elsewhere"
    target.write_text("precious")
    path.symlink_to(target)
    with pytest.raises(ListenError):
        make(path, None, 0o660)
    assert target.read_text() == "precious"
    path.unlink()
    (folder / "k.sock.lock").unlink(missing_ok=True)
    (folder / "k.sock.lock").symlink_to(target)
    with pytest.raises(ListenError, match="cannot lock"):
        make(path, None, 0o660)
    assert target.read_text() == "precious"


def test_the_lock_alone_keeps_a_second_one_out(path: Path) -> None:
    """Between two that start at once there may be no socket yet to tell them apart."""
    with open(path.with_name("k.sock.lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ListenError, match="another daemon"):
            make(path, None, 0o660)
    assert not path.exists()


def test_a_lock_file_that_nobody_holds_is_taken(path: Path) -> None:
    path.with_name("k.sock.lock").touch()
    make(path, None, 0o660).close()


def test_of_many_at_once_one_gets_it(path: Path) -> None:
    made: list[listener.Listener] = []
    refused: list[str] = []
    start = threading.Barrier(8)

    def begin() -> None:
        start.wait(10)
        try:
            made.append(make(path, None, 0o600))
        except ListenError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (len(made), len(refused)) == (1, 7)
    assert connects(path)
    made[0].close()


@pytest.mark.parametrize("length", [107, 108, 300])
def test_a_path_that_is_too_long(folder: Path, length: int) -> None:
    name = folder / ("x" * (length - len(str(folder)) - 1))
    if length <= 107:
        make(name, None, 0o660).close()
    else:
        with pytest.raises(ListenError, match="too long"):
            make(name, None, 0o660)


def test_a_folder_that_does_not_exist(folder: Path) -> None:
    with pytest.raises(ListenError) as error:
        make(folder / "none" / "k.sock", None, 0o660)
    assert "none" in str(error.value)


def test_a_failure_half_way_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("chown", "chmod", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(ListenError, match="not permitted"):
                make(path, None, 0o660)
        assert [each.name for each in path.parent.iterdir()] in ([], ["k.sock.lock"])
    make(path, None, 0o660).close()


# Sockets of systemd. The FD number 3 is this process's own: another takes its place.


def environ(count: str = "1", pid: str | None = None) -> dict[str, str]:
    return {
        "LISTEN_PID": str(os.getpid()) if pid is None else pid,
        "LISTEN_FDS": count,
        "LISTEN_FDNAMES": "kpmd.socket",
        "OTHER": "x",
    }


def test_a_socket_of_systemd(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    monkeypatch.setattr(listener, "_FIRST_PASSED", sock.detach())
    given = environ()
    made = from_systemd(passed_by_systemd(given, os.getpid()))
    assert made is not None
    assert given == {"OTHER": "x"}
    assert connects(path)
    assert not os.get_inheritable(made.sock.fileno())
    assert made.where == str(path)
    made.close()
    assert path.exists(), "it is systemd's to remove"


@pytest.mark.parametrize(
    "given",
    [{}, environ("0"), environ("x"), environ("-1"), environ(pid="1"), environ(pid="")],
)
def test_no_socket_of_systemd(given: dict[str, str]) -> None:
    passed = passed_by_systemd(given, os.getpid())
    assert passed == []
    assert from_systemd(passed) is None
    assert not any(name.startswith("LISTEN_") for name in given)


def test_two_sockets_of_systemd() -> None:
    with pytest.raises(ListenError, match="2 sockets"):
        from_systemd([("kpmd.socket", 3), ("other.socket", 4)])


def test_what_systemd_stored_is_told_from_sockets_by_name() -> None:
    """Their order is not that of the store (systemd 252)."""
    given = {
        "LISTEN_PID": "7",
        "LISTEN_FDS": "3",
        "LISTEN_FDNAMES": "lnk-1:kpmd.socket:prg-2",
    }
    passed = passed_by_systemd(given, 7)
    assert passed == [("lnk-1", 3), ("kpmd.socket", 4), ("prg-2", 5)]
    assert [is_stored(name) for name, _ in passed] == [True, False, True]
    assert passed_by_systemd({"LISTEN_PID": "7", "LISTEN_FDS": "1"}, 7) == [("", 3)]
    assert from_systemd([("lnk-1", 3)]) is None


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


@pytest.mark.parametrize(
    "make_fd",
    [
        lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach(),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach(),
        _pipe,
    ],
    ids=["tcp", "datagrams", "does not listen", "no socket"],
)
def test_something_else_of_systemd(make_fd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = make_fd()
    monkeypatch.setattr(listener, "_FIRST_PASSED", fd)
    try:
        with pytest.raises(ListenError):
            from_systemd(passed_by_systemd(environ(), os.getpid()))
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def test_the_lock_goes_with_its_process(path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from kpmd.listener import make;"
        "made = make(Path(sys.argv[1]), None, 0o600); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=30)
    assert path.exists()
    make(path, None, 0o600).close()
    assert not path.exists()
