"""Who is at the other end, on kernels with and without SO_PEERPIDFD."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from kpmd.runtime.peer import Peer, has_exited, read_peer

SO_PEERPIDFD = 77


class Sock:
    """A socket whose kernel answers otherwise."""

    def __init__(self, real: socket.socket, pid: int | None = None, error: int = 0) -> None:
        self._real = real
        self._pid = pid
        self._error = error

    def getsockopt(self, level: int, option: int, *size: int) -> Any:
        assert level == socket.SOL_SOCKET
        if option == SO_PEERPIDFD and self._error:
            raise OSError(self._error, os.strerror(self._error))
        answer: Any = self._real.getsockopt(level, option, *size)
        if option == socket.SO_PEERCRED and self._pid is not None:
            return self._pid.to_bytes(4, sys.byteorder) + answer[4:]
        return answer


def read(real: socket.socket, pid: int | None = None, error: int = errno.ENOPROTOOPT) -> Peer:
    return read_peer(cast("socket.socket", Sock(real, pid, error)))


@pytest.fixture
def ours() -> Iterator[socket.socket]:
    """A socket whose peer is this process."""
    one, other = socket.socketpair()
    with one, other:
        yield one


class Child:
    """A process that waits to be killed; a zombie then until it is reaped."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        os.close(reading)
        self._writing = writing
        self._reaped = False

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def reap(self) -> None:
        os.waitpid(self.pid, 0)
        self._reaped = True

    def end(self) -> None:
        if not self._reaped:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()
        os.close(self._writing)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.end()


def test_this_process(ours: socket.socket) -> None:
    found = read_peer(ours)
    assert (found.pid, found.uid, found.gid) == (os.getpid(), os.getuid(), os.getgid())
    with open("/proc/self/comm", encoding="utf-8") as file:
        assert found.command == file.read().strip()
    assert found.pidfd is not None
    assert not os.get_inheritable(found.pidfd)
    assert not has_exited(found.pidfd)
    os.close(found.pidfd)


def test_before_6_5_the_pidfd_is_opened_by_number(ours: socket.socket, child: Child) -> None:
    found = read(ours, child.pid)
    assert found.pidfd is not None
    assert not os.get_inheritable(found.pidfd)
    assert not has_exited(found.pidfd)
    child.kill()
    assert has_exited(found.pidfd)
    os.close(found.pidfd)


@pytest.mark.parametrize("error", [errno.ESRCH, errno.EINVAL])
def test_a_process_that_the_kernel_says_has_ended(ours: socket.socket, error: int) -> None:
    found = read(ours, error=error)
    assert found.pidfd is None
    assert "has ended" in found.why


def test_a_zombie_has_ended(ours: socket.socket, child: Child) -> None:
    child.kill()
    found = read(ours, child.pid)
    assert found.pidfd is None
    assert "has ended" in found.why


def test_a_reaped_process_has_ended(ours: socket.socket, child: Child) -> None:
    child.kill()
    child.reap()
    found = read(ours, child.pid)
    assert found.pidfd is None
    assert "has ended" in found.why
    assert found.command == ""


def test_a_process_that_began_later_has_only_got_the_number(
    ours: socket.socket, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: real - 3600)
    found = read(ours, child.pid)
    assert found.pidfd is None
    assert "has ended" in found.why


def test_a_process_in_a_namespace_that_cannot_be_seen(ours: socket.socket) -> None:
    found = read(ours, 0)
    assert found.pidfd is None
    assert "PID namespace" in found.why


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_file_descriptor_left_is_not_the_end_of_the_process(
    ours: socket.socket, error: int
) -> None:
    """The connection is refused; it must not be taken for one whose process has ended."""
    with pytest.raises(OSError, match=os.strerror(error)):
        read(ours, error=error)


def test_no_file_descriptor_left_on_older_kernels(
    ours: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        read(ours, os.getpid())


@pytest.mark.parametrize("name", [b"a) b (c", b") 1 2 3", b"((()))", b"\xff\xfe", b"a\nb"])
def test_a_command_cannot_lead_the_reading_astray(ours: socket.socket, name: bytes) -> None:
    """A process chooses its own name, parentheses and all."""
    with open("/proc/self/comm", "rb") as file:
        before = file.read().rstrip(b"\n")
    try:
        with open("/proc/self/comm", "wb") as file:
            file.write(name)
        found = read(ours, os.getpid())
        assert found.pidfd is not None
        os.close(found.pidfd)
        assert found.command == name.decode("utf-8", "replace")
    finally:
        with open("/proc/self/comm", "wb") as file:
            file.write(before)
