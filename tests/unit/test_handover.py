"""Files that only root may open, handed to a daemon that is not root."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpmd.bpf import kallsyms, tracefs
from kpmd.runtime import handover
from kpmd.runtime.notify import Notifier
from tests.fakes.systemd import Manager

LIST = b"ffffffff81000000 vfs_read\nffffffff81000040 vfs_write\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        yield Path(name)


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    made = Manager(folder)
    yield made
    made.close()


@pytest.fixture
def reading(manager: Manager) -> Iterator[Notifier]:
    """Sends to a manager that reads all the time, in a thread of its own."""
    end = threading.Event()

    def read() -> None:
        while not end.wait(0.001):
            manager.pump()

    thread = threading.Thread(target=read)
    thread.start()
    yield Notifier(manager.address)
    end.set()
    thread.join()


@pytest.fixture
def paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The files lie in the folder; each is to be written by the test."""
    made = {name: folder / name for name in tracefs.PATHS}
    nowhere = str(folder / "nowhere")
    monkeypatch.setattr(
        tracefs, "PATHS", {name: (nowhere, str(path)) for name, path in made.items()}
    )
    return made


def test_what_is_handed_over_is_read_by_who_gets_it(
    paths: dict[str, Path], manager: Manager, reading: Notifier
) -> None:
    paths[tracefs.FUNCTIONS_WITH_ADDRESSES].write_bytes(LIST)
    paths[tracefs.BLACKLIST].write_bytes(b"0x1-0x2\tnever\n")
    assert handover.hand_over(reading) == 0
    files, rest = handover.split([("kpmd.socket", 0), *manager.pass_on(), ("lnk-1", 1)])
    assert rest == [("kpmd.socket", 0), ("lnk-1", 1)]
    for path in paths.values():
        path.unlink(missing_ok=True)
    taken = handover.take(files, reading)
    assert taken.read(tracefs.FUNCTIONS_WITH_ADDRESSES) == LIST
    assert taken.read(tracefs.FUNCTIONS) is None
    assert taken.read(tracefs.BLACKLIST) == b"0x1-0x2\tnever\n"
    assert taken.lists_functions()
    reading.barrier()
    assert manager.names == []
    for _, fd in files:
        os.close(fd)


def test_of_those_an_earlier_start_left_one_is_kept(
    paths: dict[str, Path], manager: Manager, reading: Notifier
) -> None:
    paths[tracefs.FUNCTIONS].write_bytes(b"vfs_read\n")
    for _ in range(3):
        assert handover.hand_over(reading) == 0
    files, _ = handover.split(manager.pass_on())
    assert len(files) == 3
    taken = handover.take(files, reading)
    assert taken.read(tracefs.FUNCTIONS) == b"vfs_read\n"
    (left,) = [fd for _, fd in files if os.path.exists(f"/proc/self/fd/{fd}")]
    os.close(left)
    reading.barrier()
    assert manager.names == []


def test_without_anything_it_says_so(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert not handover.take([], Notifier(None)).lists_functions()
    assert [record.getMessage() for record in caplog.records] == [
        "cannot tell which functions can be traced"
    ]


def test_what_cannot_be_opened_is_no_list(paths: dict[str, Path]) -> None:
    """Lockdown refuses to open what access(2) grants; so does a socket."""
    path = paths[tracefs.FUNCTIONS_WITH_ADDRESSES]
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        assert os.access(path, os.R_OK)
        assert not handover.take([], Notifier(None)).lists_functions()


def test_root_by_hand_opens_the_paths(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    paths[tracefs.FUNCTIONS].write_bytes(b"vfs_read\n")
    taken = handover.take([], Notifier(None))
    assert taken.read(tracefs.FUNCTIONS) == b"vfs_read\n"
    assert caplog.records == []


def test_a_manager_that_is_gone_ends_nothing(
    paths: dict[str, Path], manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    paths[tracefs.FUNCTIONS].write_bytes(b"vfs_read\n")
    manager.hide()
    notifier = Notifier(manager.address)
    with paths[tracefs.FUNCTIONS].open("rb") as file:
        fd = os.dup(file.fileno())
    taken = handover.take([(f"file-{tracefs.FUNCTIONS}", fd)], notifier)
    assert taken.read(tracefs.FUNCTIONS) == b"vfs_read\n"
    os.close(fd)
    assert [record.getMessage() for record in caplog.records] == ["a file stays in the FD store"]
    assert handover.hand_over(notifier) == 1
    manager.show()


def test_a_manager_that_never_takes_them(
    paths: dict[str, Path], manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpmd.runtime.notify._PATIENCE", 0.05)
    assert handover.hand_over(Notifier(manager.address)) == 1


def test_reading_starts_anew_each_time_and_threads_do_not_disturb_each_other(folder: Path) -> None:
    path = folder / "list"
    path.write_bytes(LIST * 20_000)
    with path.open("rb") as file:
        file.read(7)  # the offset is shared, and of no account
        files = tracefs.Files({tracefs.FUNCTIONS: file.fileno()})
        found: list[bytes | None] = []
        threads = [
            threading.Thread(target=lambda: found.append(files.read(tracefs.FUNCTIONS)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [LIST * 20_000] * 8
        path.write_bytes(LIST)
        assert files.read(tracefs.FUNCTIONS) == LIST


def test_the_index_is_built_of_what_was_handed_over(folder: Path) -> None:
    path = folder / "list"
    path.write_bytes(LIST)
    with path.open("rb") as file:
        files = tracefs.Files({tracefs.FUNCTIONS_WITH_ADDRESSES: file.fileno()})
        read = kallsyms.read_symbol_files(files)
    assert (read.functions, read.functions_have_addresses) == (LIST, True)


def command(environ: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kpmd", "--hand-over-tracefs", *more],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_the_command(manager: Manager, reading: Notifier) -> None:
    done = command({"NOTIFY_SOCKET": manager.address})
    assert done.returncode == 0, done.stderr
    readable = {
        name
        for name, paths in tracefs.PATHS.items()
        if any(os.access(path, os.R_OK) for path in paths)
    }
    assert set(manager.names) == {f"file-{name}" for name in readable}
    missing = [json.loads(line) for line in done.stderr.splitlines()]
    assert len(missing) == len(tracefs.PATHS) - len(readable)


def test_the_command_is_for_a_service_manager_alone() -> None:
    done = command({"NOTIFY_SOCKET": ""})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["event"] == "nobody to hand over to"
    assert command({}, "--mode", "0660").returncode == 2


def test_a_hang_is_told_of_where_it_is(folder: Path) -> None:
    """As the watchdog ends a daemon: with SIGABRT."""
    with subprocess.Popen(
        [sys.executable, "-m", "kpmd", "--socket", str(folder / "k.sock")],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if json.loads(line)["event"] == "listening":
                break
        process.send_signal(signal.SIGABRT)
        told = process.stderr.read()
    assert "Fatal Python error: Aborted" in told
    assert process.returncode == -signal.SIGABRT
