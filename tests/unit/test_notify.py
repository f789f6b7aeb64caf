"""Messages to the service manager."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpmd.runtime.notify import Notifier
from tests.fakes.systemd import Manager


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        yield Path(name)


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    made = Manager(folder)
    yield made
    made.close()


def test_without_a_manager_it_does_nothing() -> None:
    for notifier in (Notifier(None), Notifier(""), Notifier.from_environment({})):
        assert not notifier
        notifier.send("READY=1")


def test_the_variable_is_taken_away() -> None:
    environ = {"NOTIFY_SOCKET": "/run/x", "PATH": "/bin"}
    assert Notifier.from_environment(environ)
    assert environ == {"PATH": "/bin"}


def test_lines_are_one_message(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    assert notifier
    notifier.send("READY=1")
    notifier.send("STOPPING=1", "STATUS=so long")
    manager.pump()
    assert manager.told == [(["READY=1"], 0), (["STOPPING=1", "STATUS=so long"], 0)]


def test_file_descriptors_go_along(manager: Manager) -> None:
    fds = [os.memfd_create(f"{number}") for number in range(3)]
    for number, fd in enumerate(fds):
        os.write(fd, b"%d" % number)
    Notifier(manager.address).send("FDSTORE=1", "FDNAME=x", "FDPOLL=0", fds=fds)
    # They are in the queue: the sender may be gone by now.
    for fd in fds:
        os.close(fd)
    assert [os.pread(fd, 10, 0) for fd in manager.entries("x")] == [b"0", b"1", b"2"]
    assert manager.told[-1][1] == 3


def test_an_abstract_address() -> None:
    name = f"kpmd-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        Notifier("@" + name).send("READY=1")
        assert sock.recv(100) == b"READY=1"


def test_a_manager_that_is_not_there(folder: Path, manager: Manager) -> None:
    with pytest.raises(FileNotFoundError):
        Notifier(str(folder / "nowhere")).send("READY=1")
    fd = os.memfd_create("x")
    try:
        manager.hide()
        with pytest.raises(FileNotFoundError):
            Notifier(manager.address).send("FDSTORE=1", fds=[fd])
        manager.show()
    finally:
        os.close(fd)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "left"))
    with pytest.raises(ConnectionRefusedError):
        Notifier(str(folder / "left")).send("READY=1")


def test_a_file_descriptor_that_is_none_is_an_error_and_nothing_is_sent(manager: Manager) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        Notifier(manager.address).send("FDSTORE=1", fds=[1 << 20])
    manager.pump()
    assert manager.told == []


def test_it_waits_while_the_managers_queue_is_full(manager: Manager) -> None:
    """Nothing is lost: what cannot be sent yet is sent when there is room."""
    notifier = Notifier(manager.address)
    count = 2000

    def send() -> None:
        for number in range(count):
            notifier.send(f"STATUS={number}")

    sending = threading.Thread(target=send)
    sending.start()
    while sending.is_alive():
        manager.pump()
        sending.join(0.001)
    manager.pump()
    assert [lines for lines, _ in manager.told] == [[f"STATUS={each}"] for each in range(count)]


def test_without_waiting_a_full_queue_is_an_error(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    refused = 0
    for each in range(10_000):
        try:
            notifier.send(f"STATUS={each}", wait=False)
        except BlockingIOError:
            refused += 1
    assert refused
    manager.pump()
    notifier.send("STATUS=late", wait=False)


def test_a_barrier_waits_until_all_is_taken(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    notifier.send("STATUS=first")
    waiting = threading.Thread(target=notifier.barrier)
    waiting.start()
    waiting.join(0.02)
    assert waiting.is_alive()
    while waiting.is_alive():
        manager.pump()
        waiting.join(0.001)
    assert [lines for lines, _ in manager.told] == [["STATUS=first"], ["BARRIER=1"]]
    Notifier(None).barrier()


def test_a_barrier_that_nobody_lifts(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpmd.runtime.notify._PATIENCE", 0.02)
    with pytest.raises(TimeoutError):
        Notifier(manager.address).barrier()
