"""The builtins that are about calls from entry to return, in each variant that the kernel runs."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.builtins import (
    BOTH,
    NANOSLEEP,
    NESTED,
    SEEK,
    SLEEP,
    Loaded,
    command_of,
    named,
    own,
    padded,
    seek,
    set_command,
    sleep,
)
from tests.kernel.conftest import Daemon
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID, GETTID, call_getpid, call_gettid
from tests.kernel.test_records import Stream
from tests.kernel.wire import Forked, Tell

pytestmark = pytest.mark.kprobes


# latency


@BOTH
def test_latency(rest: Rest, addresses: dict[str, int], attach: str | None) -> None:
    loaded = Loaded(rest, "latency", attach, globals=own())
    loaded.link(NANOSLEEP, GETPID)
    before = time.monotonic_ns()
    for _ in range(5):
        sleep(3)
    sleep(40)
    took = time.monotonic_ns() - before
    call_getpid(9)
    found = loaded.latencies()
    assert found.keys() == {addresses[NANOSLEEP], addresses[GETPID]}
    calls, total, longest, slots = found[addresses[NANOSLEEP]]
    assert (calls, sum(slots)) == (6, 6)
    assert 40_000_000 <= longest <= total <= took
    assert total >= 5 * 3_000_000 + longest
    # In each slot are the calls of 2^i ns and more: all of 3 ms and more, one of 40.
    assert not any(slots[: (3_000_000).bit_length() - 1])
    assert slots[longest.bit_length() - 1] >= 1
    assert not any(slots[longest.bit_length() :])
    calls, total, longest, slots = found[addresses[GETPID]]
    assert (calls, sum(slots)) == (9, 9)
    assert 0 < longest <= total
    (per_cpu,) = [
        each["value"]
        for each in loaded.decoded("latencies")
        if int(each["key"], 16) == addresses[GETPID]
    ]
    assert sum(int(each["calls"]) for each in per_cpu) == 9
    assert sum(int(slot) for each in per_cpu for slot in each["slots"]) == 9
    assert loaded.lost() == {}


@pytest.fixture(scope="module")
def nested() -> Iterator[Path]:
    """A file of an overlay over an overlay."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upper, lower, *ground = (folder / each for each in ("upper", "lower", "a", "b", "c"))
        for each in (upper, lower, *ground):
            each.mkdir()
        (ground[0] / "file").touch()
        mounts = [(f"{ground[0]}:{ground[1]}", lower), (f"{lower}:{ground[2]}", upper)]
        for below, place in mounts:
            command = ["mount", "-t", "overlay", "-o", f"lowerdir={below}", "overlay", str(place)]
            subprocess.run(command, check=True)
        yield upper / "file"
        for _, place in reversed(mounts):
            subprocess.run(["umount", str(place)], check=True)


@BOTH
def test_latency_of_recursion(
    rest: Rest, addresses: dict[str, int], nested: Path, attach: str | None
) -> None:
    """Each call has its own time: the outer ones take longer than those within them."""
    counting = Loaded(rest, "count", globals=own())
    counting.link(NESTED)
    loaded = Loaded(rest, "latency", attach, globals=own())
    loaded.link(NESTED)
    before = time.monotonic_ns()
    for _ in range(10):
        nested.stat()
    took = time.monotonic_ns() - before
    calls, total, longest, slots = loaded.latencies()[addresses[NESTED]]
    counted = counting.counts()[addresses[NESTED]]
    assert calls == sum(slots) == counted - loaded.unreturned()
    assert counted >= 20
    # Each moment is counted as often as it lies within calls: three are there within each other.
    assert longest <= took
    assert total <= 3 * took
    assert loaded.lost().keys() <= {"entries_without_return"}


@BOTH
def test_latency_of_processes_that_sleep_at_once(
    rest: Rest, addresses: dict[str, int], attach: str | None
) -> None:
    command = padded("kpmd-sleeper")
    loaded = Loaded(rest, "latency", attach, globals={"target_command": command})
    loaded.link(NANOSLEEP, SLEEP)

    def work(tell: Tell) -> None:
        set_command("kpmd-sleeper")
        for _ in range(50):
            sleep(1)
        tell("done")

    children = [Forked(work) for _ in range(4)]
    assert [child.told() for child in children] == ["done"] * 4
    found = loaded.latencies()
    for child in children:
        child.kill()
    assert found.keys() == {addresses[NANOSLEEP], addresses[SLEEP]}
    assert sum(calls for calls, *_ in found.values()) + loaded.unreturned() == 400
    for calls, total, longest, slots in found.values():
        assert calls == sum(slots)
        assert calls * 1_000_000 <= total <= calls * longest
        assert longest < 60 * 10**9
    assert loaded.lost().keys() <= {"entries_without_return"}


@BOTH
def test_latency_tells_what_it_had_no_room_for(
    rest: Rest, addresses: dict[str, int], attach: str | None
) -> None:
    loaded = Loaded(rest, "latency", attach, globals=own(), max_entries={"latencies": 1})
    loaded.link(GETPID, GETTID)
    call_getpid(3)
    call_gettid(5)
    found = loaded.latencies()
    assert {function: calls for function, (calls, *_) in found.items()} == {addresses[GETPID]: 3}
    assert loaded.lost() == {"dropped": 5}


def test_returns_without_their_entries_are_told(rest: Rest) -> None:
    loaded = Loaded(rest, "latency", "kprobe_multi", globals=own())
    loaded.link(GETPID, only="return")
    call_getpid(6)
    assert loaded.latencies() == {}
    assert loaded.lost() == {"returns_without_entry": 6}
    assert loaded.entries("calls") == []


def test_entries_without_their_returns_are_told_and_spoil_nothing(
    rest: Rest, addresses: dict[str, int]
) -> None:
    loaded = Loaded(rest, "latency", "kprobe_multi", globals=own())
    loaded.link(GETPID, only="entry")
    # The kernel may move the stack at each system call, by one of a few places.
    call_getpid(500)
    assert loaded.lost().keys() == {"entries_without_return"}
    assert loaded.unreturned() == 500
    time.sleep(0.2)
    loaded.link(GETPID, only="return")
    before = time.monotonic_ns()
    call_getpid(50)
    took = time.monotonic_ns() - before
    calls, total, longest, _ = loaded.latencies()[addresses[GETPID]]
    assert calls == 50
    assert longest <= total <= took


@BOTH
def test_filters_are_about_the_entry(
    rest: Rest, addresses: dict[str, int], attach: str | None
) -> None:
    """A call that was not wanted when it began is not one without its entry, nor the other way."""
    command = padded("kpmd-renamed")
    loaded = Loaded(rest, "latency", attach, globals=own(target_command=command))
    loaded.link(GETPID)
    call_getpid(5)
    before = command_of(os.getpid()).decode()
    set_command("kpmd-renamed")
    call_getpid(2)
    set_command(before)
    call_getpid(5)
    assert loaded.latencies()[addresses[GETPID]][0] == 2
    assert loaded.lost() == {}


# trace


def records(daemon: Daemon, map_: str, number: int) -> list[dict[str, Any]]:
    """The next records of a trace, decoded."""
    with closing(Stream(daemon.socket, map_, query="?type=trace_event")) as stream:
        return [stream.line()["decoded"] for _ in range(number)]


@pytest.fixture
def file() -> Iterator[int]:
    """Its place is moved by nobody else."""
    with tempfile.TemporaryFile() as made:
        yield made.fileno()


@BOTH
def test_trace(
    rest: Rest, daemon: Daemon, addresses: dict[str, int], file: int, attach: str | None
) -> None:
    loaded = Loaded(rest, "trace", attach, globals=named("kpmd-seeker"))
    loaded.link(SEEK, NANOSLEEP)
    name = command_of(os.getpid()).decode()
    before = time.monotonic_ns()
    set_command("kpmd-seeker")
    seek(file, 77)
    seek(file, -3)
    sleep(5)
    set_command(name)
    after = time.monotonic_ns()
    found = records(daemon, loaded.maps["events"], 3)
    who = {
        "pid": os.getpid(),
        "tid": os.getpid(),
        "uid": 0,
        "gid": 0,
        "command": "kpmd-seeker",
        "kind": "CALL_RETURNED",
    }
    assert [{key: each[key] for key in who} for each in found] == [who] * 3
    functions = [addresses[SEEK], addresses[SEEK], addresses[NANOSLEEP]]
    assert [int(each["function"], 16) for each in found] == functions
    for each, place in zip(found, (77, 2**64 - 3), strict=False):
        assert [int(one) for one in each["arguments"][1:3]] == [place, os.SEEK_SET]
    values = [int(each["return_value"]) for each in found]
    assert values == [77, -errno.EINVAL, 0]
    assert int(found[2]["duration_ns"]) >= 5_000_000
    times = [int(each["time_ns"]) for each in found]
    ends = [start + int(each["duration_ns"]) for start, each in zip(times, found, strict=True)]
    assert before <= times[0] <= ends[0] <= times[1] <= ends[1] <= times[2] <= ends[2] <= after
    assert all(0 <= each["cpu"] < (os.cpu_count() or 1) for each in found)
    assert loaded.lost() == {}


@BOTH
def test_trace_of_entries_alone(rest: Rest, daemon: Daemon, file: int, attach: str | None) -> None:
    loaded = Loaded(rest, "trace", attach, globals={**named("kpmd-seeker"), "entry_only": 1})
    loaded.link(SEEK)
    name = command_of(os.getpid()).decode()
    set_command("kpmd-seeker")
    for place in (1, 2, 3):
        seek(file, place)
    set_command(name)
    found = records(daemon, loaded.maps["events"], 3)
    assert [int(each["arguments"][1]) for each in found] == [1, 2, 3]
    assert {each["kind"] for each in found} == {"CALL_ENTERED"}
    assert {(each["return_value"], each["duration_ns"]) for each in found} == {("0", "0")}
    assert loaded.lost() == {}


@BOTH
def test_trace_of_recursion(
    rest: Rest,
    daemon: Daemon,
    addresses: dict[str, int],
    release: tuple[int, int],
    nested: Path,
    attach: str | None,
) -> None:
    """Each call lies within those around it: none is taken for another."""
    loaded = Loaded(rest, "trace", attach, globals=own())
    loaded.link(NESTED)
    counting = Loaded(rest, "count", globals=own())
    counting.link(NESTED)
    nested.stat()
    returned = counting.counts()[addresses[NESTED]] - loaded.unreturned()
    found = records(daemon, loaded.maps["events"], returned)
    calls = [(int(each["time_ns"]), int(each["duration_ns"])) for each in found]
    spans = [(start, start + duration) for start, duration in calls]
    within = 0
    for at, (start, end) in enumerate(spans):
        for earlier, until in spans[:at]:
            # Told of when they return: the earlier one lies before this one or in it.
            assert until <= start or (start < earlier and until <= end)
            within += start < earlier
    # 5.10 tells of no return within another call.
    assert within or release < (5, 15)
    assert loaded.lost().keys() <= {"entries_without_return"}


@BOTH
def test_trace_tells_what_it_had_no_room_for(
    rest: Rest, daemon: Daemon, attach: str | None
) -> None:
    loaded = Loaded(rest, "trace", attach, globals=own(), max_entries={"events": 4096})
    loaded.link(GETPID)
    call_getpid(100)
    dropped = loaded.lost()["dropped"]
    assert 0 < dropped < 100
    assert len(records(daemon, loaded.maps["events"], 100 - dropped)) == 100 - dropped
    # There is room again.
    call_getpid(1)
    assert len(records(daemon, loaded.maps["events"], 1)) == 1
    assert loaded.lost() == {"dropped": dropped}
