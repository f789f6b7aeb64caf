"""The audit trail gets where it belongs, in order; what cannot is counted and told."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kpmd.runtime import audit_writer, journald
from kpmd.runtime.audit import Audit, Record, destinations
from kpmd.runtime.audit_record import Entry
from kpmd.runtime.audit_writer import ROOM, ROOM_FOR_REFUSED, Destination, Lines, ToJournal
from tests.fakes.journald import Journald


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_writer, "RETRY", 0.01)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        yield Path(name)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Audit]]:
    """Makes audit trails, and closes them."""
    made = []

    def make(*where: Destination, **options: Any) -> Audit:
        made.append(Audit(*where, **options))
        return made[-1]

    yield make
    for audit in made:
        await audit.close()


class Warnings(logging.Handler):
    """What the log says of the audit trail."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, dict[str, Any]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append((record.levelname, record.fields))  # type: ignore[attr-defined]


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    handler = Warnings()
    logger = logging.getLogger("kpmd.audit")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


class Door:
    """A destination that takes entries only while it is open, or fails."""

    name = "the door"
    is_log = False

    def __init__(self) -> None:
        self.written: list[Entry] = []
        self.error: Exception | None = None
        self.open = threading.Event()
        self.tried = threading.Semaphore(0)
        self.closed = False

    def write(self, entry: Entry) -> None:
        self.tried.release()
        self.open.wait(10)
        if self.error is not None:
            raise self.error
        self.written.append(entry)

    def reopen(self) -> None:
        self.error = None

    def close(self) -> None:
        self.closed = True

    @property
    def requests(self) -> list[str]:
        return [entry["request"] for entry in self.written if "request" in entry]

    @property
    def losses(self) -> list[int]:
        return [entry["what"]["records"] for entry in self.written if entry["audit"] == "lost"]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a thread brings it about
            await asyncio.sleep(0.002)


def records(audit: Audit, count: int, *, start: int = 0, **fields: Any) -> None:
    for number in range(start, start + count):
        audit.record(Record(request=f"r{number}", **fields))


def requests(path: Path) -> list[str]:
    """Those of whole lines: one may be on its way."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(text)["request"] for text in whole.splitlines()]


def names(count: int, start: int = 0) -> list[str]:
    return [f"r{number}" for number in range(start, start + count)]


async def test_without_a_destination_it_does_nothing() -> None:
    audit = Audit()
    records(audit, 3)
    audit.reopen()
    await audit.close()
    assert (audit.lost, audit.failing) == (0, None)


async def test_both_destinations_get_all_in_order(
    folder: Path, start: Callable[..., Audit]
) -> None:
    fake, path = Journald(folder), folder / "audit.jsonl"
    audit = start(ToJournal(journald.Journald(fake.address)), Lines(path), now=lambda: 1.5)
    records(audit, 200, call="POST /links", uid=1000)
    entries = [dict(fake.entry()) for _ in range(200)]
    await audit.close()
    fake.end()
    assert [entry["KPMD_REQUEST"] for entry in entries] == requests(path) == names(200)
    assert {entry["KPMD_TIME"] for entry in entries} == {"1970-01-01T00:00:01.500000Z"}
    assert audit.lost == 0


async def test_a_file_is_made_for_its_owner_and_group(
    folder: Path, start: Callable[..., Audit]
) -> None:
    before = os.umask(0o077)
    try:
        audit = start(Lines(folder / "new"))
        records(audit, 1)
        await audit.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o640


async def test_a_file_that_is_there_is_added_to_as_it_is(
    folder: Path, start: Callable[..., Audit]
) -> None:
    path = folder / "there"
    path.write_text('{"request": "r0"}\n')
    path.chmod(0o600)
    audit = start(Lines(path))
    records(audit, 1, start=1)
    await audit.close()
    assert requests(path) == names(2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_line_that_was_torn_before_is_ended_first(
    folder: Path, start: Callable[..., Audit]
) -> None:
    path = folder / "torn"
    path.write_text('{"request": "r')
    audit = start(Lines(path))
    records(audit, 2)
    await audit.close()
    torn, *whole = path.read_text().splitlines()
    assert torn == '{"request": "r'
    assert [json.loads(text)["request"] for text in whole] == names(2)


async def test_reopen_begins_the_new_file_and_lets_the_old_one_go(
    folder: Path, start: Callable[..., Audit]
) -> None:
    path, old = folder / "audit.jsonl", folder / "audit.jsonl.1"
    audit = start(Lines(path))
    records(audit, 2)
    await until(lambda: path.exists() and len(requests(path)) == 2)
    path.rename(old)
    inode = old.stat().st_ino
    audit.reopen()
    await until(lambda: inode not in _open_inodes())
    records(audit, 2, start=2)
    await audit.close()
    assert (requests(old), requests(path)) == (names(2), names(2, 2))


def _open_inodes() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.fstat(int(name)).st_ino)
        except OSError:
            continue
    return found


async def test_standard_error_gets_lines_too(start: Callable[..., Audit], capfd: Any) -> None:
    audit = start(Lines(None))
    records(audit, 2)
    await audit.close()
    lines = [json.loads(text) for text in capfd.readouterr().err.splitlines()]
    assert [(each["event"], each["request"]) for each in lines] == [
        ("audit", "r0"),
        ("audit", "r1"),
    ]
    os.fstat(2)


async def test_no_file_descriptor_is_left(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fake = Journald(folder)
    audit = Audit(ToJournal(journald.Journald(fake.address)), Lines(folder / "file"))
    records(audit, 1)
    await audit.close()
    fake.end()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_what_fails_is_tried_again_and_nothing_is_lost(
    start: Callable[..., Audit], warnings: Warnings
) -> None:
    door = Door()
    door.open.set()
    door.error = OSError(28, "No space left on device")
    audit = start(door)
    records(audit, 10)
    await until(lambda: audit.failing)
    assert audit.failing == "the door: No space left on device"
    door.error = None
    await until(lambda: len(door.written) == 10)
    await until(lambda: audit.failing is None)
    assert (door.requests, door.losses, audit.lost) == (names(10), [], 0)
    assert warnings.told == [
        ("WARNING", {"reason": "the door: No space left on device", "lost": 0})
    ]


async def test_a_destination_that_hangs_holds_up_nothing_and_its_losses_are_told(
    folder: Path, start: Callable[..., Audit], warnings: Warnings
) -> None:
    door, path = Door(), folder / "file"
    audit = start(door, Lines(path))
    for number in range(ROOM + 7):
        records(audit, 1, start=number)
        if number % 100 == 0:
            await until(lambda: path.exists() and requests(path)[-1:] == names(1, number))  # noqa: B023
    assert audit.lost == 7
    door.open.set()
    await until(lambda: len(door.requests) == ROOM)
    records(audit, 1, start=ROOM + 7)
    await audit.close()
    assert requests(path) == names(ROOM + 8)
    assert door.requests == [*names(ROOM), f"r{ROOM + 7}"]
    assert door.losses == [7]
    # In its place: behind what came before the loss, and before what came after it.
    assert door.written[-2]["audit"] == "lost"
    assert door.written[-2]["detail"] == "audit: 7 records lost"
    assert [level for level, _ in warnings.told] == ["WARNING"]


async def test_a_loss_is_told_also_where_nothing_comes_after_it(
    start: Callable[..., Audit],
) -> None:
    door = Door()
    audit = start(door)
    records(audit, ROOM + 1)
    door.open.set()
    await until(lambda: door.losses)
    assert (door.losses, audit.lost) == ([1], 1)


async def test_refusals_push_out_nothing_that_was_done(start: Callable[..., Audit]) -> None:
    door = Door()
    audit = start(door)
    records(audit, 2 * ROOM, outcome="forbidden", status=403)
    records(audit, 100, start=2 * ROOM)
    assert audit.lost == 2 * ROOM - ROOM_FOR_REFUSED
    door.open.set()
    await audit.close()
    assert door.requests == [*names(ROOM_FOR_REFUSED), *names(100, 2 * ROOM)]


async def test_warnings_are_few_where_a_destination_comes_and_goes(
    start: Callable[..., Audit], warnings: Warnings
) -> None:
    door = Door()
    door.open.set()
    audit = start(door)
    for number in range(5):
        door.error = OSError(5, "Input/output error")
        records(audit, 1, start=number)
        await until(lambda: audit.failing)
        door.error = None
        await until(lambda: door.requests == names(number + 1) and not audit.failing)  # noqa: B023
    assert len(warnings.told) == 1


async def test_a_bug_in_a_destination_loses_its_record_only(
    start: Callable[..., Audit], warnings: Warnings
) -> None:
    door = Door()
    door.open.set()
    door.error = ValueError("no")
    audit = start(door)
    records(audit, 1)
    await until(lambda: audit.lost == 1)
    door.error = None
    records(audit, 1, start=1)
    await audit.close()
    assert (door.requests, door.losses, audit.lost) == (["r1"], [1], 1)
    assert ("ERROR", {}) in warnings.told


async def test_a_record_that_is_too_large_is_not_tried_for_ever(
    start: Callable[..., Audit],
) -> None:
    door = Door()
    door.open.set()
    door.error = OSError(90, "Message too long")
    audit = start(door)
    records(audit, 1)
    await until(lambda: audit.lost == 1)
    door.error = None
    await audit.close()
    assert audit.lost == 1


async def test_what_cannot_be_read_is_a_bug_that_stops_nothing(
    start: Callable[..., Audit], warnings: Warnings
) -> None:
    class Bad:
        def __str__(self) -> str:
            raise ValueError("no")

    door = Door()
    door.open.set()
    audit = start(door)
    audit.record(Record(request="r0", what={"bad": Bad()}))
    records(audit, 1, start=1)
    await audit.close()
    assert door.requests == ["r1"]
    assert warnings.told == [("ERROR", {"request": "r0"})]


async def test_close_writes_what_waits(start: Callable[..., Audit]) -> None:
    door = Door()
    audit = start(door)
    records(audit, 100)
    door.open.set()
    await audit.close()
    assert door.requests == names(100)
    assert door.closed
    records(audit, 1)
    assert (len(door.written), audit.lost) == (100, 1)


async def test_close_waits_no_longer_than_it_may(
    start: Callable[..., Audit], warnings: Warnings
) -> None:
    door = Door()
    audit = start(door, patience=0.05)
    records(audit, 10)
    door.tried.acquire(timeout=10)
    await audit.close()
    assert audit.lost == 10
    assert warnings.told[-1][1] == {"reason": "there was no time left to write them", "lost": 10}
    door.open.set()
    await until(lambda: door.closed)


async def test_close_does_not_wait_for_what_fails(
    start: Callable[..., Audit], warnings: Warnings
) -> None:
    door = Door()
    door.open.set()
    door.error = OSError(28, "No space left on device")
    audit = start(door)
    records(audit, 10)
    await until(lambda: audit.failing)
    await audit.close()
    assert (audit.lost, door.closed) == (10, True)
    assert warnings.told[-1][1] == {"reason": "the door: No space left on device", "lost": 10}


async def test_a_full_disk(start: Callable[..., Audit], folder: Path) -> None:
    """/dev/full stands for it; another file gets all."""
    path = folder / "file"
    audit = start(Lines(Path("/dev/full")), Lines(path))
    records(audit, 20)
    await until(lambda: audit.failing)
    assert audit.failing == "/dev/full: No space left on device"
    await audit.close()
    assert requests(path) == names(20)
    assert audit.lost == 20


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "none" / "audit.jsonl", "No such file or directory"),
        (lambda folder: folder, "Is a directory"),
    ],
)
async def test_a_file_that_cannot_be_opened(
    folder: Path, start: Callable[..., Audit], make: Callable[[Path], Path], reason: str
) -> None:
    path = make(folder)
    audit = start(Lines(path))
    records(audit, 1)
    await until(lambda: audit.failing)
    assert audit.failing == f"{path}: {reason}"


async def test_a_folder_that_comes_later(folder: Path, start: Callable[..., Audit]) -> None:
    path = folder / "later" / "audit.jsonl"
    audit = start(Lines(path))
    records(audit, 2)
    await until(lambda: audit.failing)
    path.parent.mkdir()
    await until(lambda: audit.failing is None)
    await audit.close()
    assert (requests(path), audit.lost) == (names(2), 0)


#: Records until the file may not grow any more, then on with the limit gone.
_LIMITED = """
import asyncio, resource, signal, sys
from pathlib import Path
from kpmd.runtime import audit_writer
from kpmd.runtime.audit import Audit, Record
from kpmd.runtime.audit_writer import Lines

async def main():
    audit_writer.RETRY = 0.01
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
    audit = Audit(Lines(Path(sys.argv[1])))
    for number in range(20):
        audit.record(Record(request=f"r{number}"))
    async with asyncio.timeout(10):
        while not (audit.failing or "").endswith("File too large"):
            await asyncio.sleep(0.002)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    await audit.close()
    print(audit.lost)

asyncio.run(main())
"""


def test_a_line_that_gets_there_in_part_is_ended_and_written_again(folder: Path) -> None:
    path = folder / "file"
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
    found, torn = [], []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text)["request"])
        except ValueError:
            torn.append(text)
    assert found == names(20)
    assert len(torn) == 1
    assert torn[0].startswith('{"timestamp"')


async def test_a_journal_that_is_not_there_yet(folder: Path, start: Callable[..., Audit]) -> None:
    audit = start(ToJournal(journald.Journald(str(folder / "journal"))))
    records(audit, 2)
    await until(lambda: audit.failing)
    assert audit.failing == "the journal: No such file or directory"
    fake = Journald(folder)
    assert [dict(fake.entry())["KPMD_REQUEST"] for _ in range(2)] == names(2)
    fake.end()


async def test_a_journald_that_is_started_anew(folder: Path, start: Callable[..., Audit]) -> None:
    first = Journald(folder)
    audit = start(ToJournal(journald.Journald(first.address)))
    records(audit, 1)
    assert dict(first.entry())["KPMD_REQUEST"] == "r0"
    first.end()
    records(audit, 3, start=1)
    await until(lambda: audit.failing)
    second = Journald(folder)
    assert [dict(second.entry())["KPMD_REQUEST"] for _ in range(3)] == names(3, 1)
    second.end()
    assert audit.lost == 0


async def test_a_journald_that_reads_nothing_for_a_while(
    folder: Path, start: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queue is full after some entries; the sender waits in the kernel, not in a loop."""
    monkeypatch.setattr(journald, "PATIENCE_US", 20_000)
    fake = Journald(folder)
    audit = start(ToJournal(journald.Journald(fake.address)))
    records(audit, ROOM)
    await until(lambda: audit.failing)
    assert audit.failing == "the journal: journald takes no more entries"
    assert [dict(fake.entry())["KPMD_REQUEST"] for _ in range(ROOM)] == names(ROOM)
    fake.end()


def test_whether_standard_error_is_the_journal(folder: Path) -> None:
    with open(folder / "file", "w") as file:
        status = os.fstat(file.fileno())
        right = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert journald.is_standard_error(right, file.fileno())
        for other in (f"{status.st_dev}:{status.st_ino + 1}", "", "x", "1:2:3"):
            assert not journald.is_standard_error({"JOURNAL_STREAM": other}, file.fileno())
        assert not journald.is_standard_error({}, file.fileno())


def test_where_records_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(file: Path | None, journal: bool | None) -> list[str]:
        made = destinations(file, journal, {})
        for each in made:
            each.close()
        return [each.name for each in made]

    path = folder / "file"
    assert kinds(None, None) == kinds(None, False) == ["standard error"]
    assert kinds(path, True) == ["the journal", str(path)]
    monkeypatch.setattr(journald, "is_standard_error", lambda environ: True)
    assert kinds(path, None) == ["the journal", str(path)]
    assert kinds(path, False) == ["standard error", str(path)]
