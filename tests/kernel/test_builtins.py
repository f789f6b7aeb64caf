"""The programs that ship with kpmd: what there is and for whom, filters, `count` and `stacks`."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kpmd import builtin
from tests.kernel.builtins import (
    BOTH,
    NANOSLEEP,
    SLEEP,
    SLEEPS,
    Loaded,
    by_session,
    command_of,
    in_child,
    named,
    own,
    padded,
    set_command,
    sleep,
)
from tests.kernel.conftest import Daemon, kallsyms
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID, GETTID, call_getpid, call_gettid
from tests.kernel.wire import NOBODY, Forked, Tell, Wire

pytestmark = pytest.mark.kprobes

POLICY = f"""
[limits]
load_seconds = 60
[[rules]]
name = "builtins"
users = [{NOBODY}]
"""


# What is there, and for whom


@pytest.mark.parametrize("name", list(builtin.BUILTINS))
@BOTH
def test_the_best_variant_that_the_kernel_runs(
    rest: Rest, release: tuple[int, int], name: str, attach: str | None
) -> None:
    made = builtin.BUILTINS[name]
    session = by_session(release) and made.by_session and attach is None
    wanted = made.variant(session=session, func_ip=release >= (5, 15))
    loaded = Loaded(rest, name, attach)
    assert loaded.programs.keys() == wanted.links.keys()
    attaches = {each["attach"] for each in loaded.made["programs"]}
    assert attaches == {"kprobe_session" if session else "kprobe_multi"}
    loaded.link(NANOSLEEP)


@pytest.mark.parametrize("name", ["latency", "trace"])
def test_a_session_that_is_asked_for_is_one_or_refused(
    rest: Rest, release: tuple[int, int], name: str
) -> None:
    body = {"source": {"kind": "builtin", "builtin": name}, "attach": "kprobe_session"}
    status, answer = rest("POST", "/programs", body)
    if by_session(release):
        assert (status, [each["name"] for each in answer["programs"]]) == (201, [name])
    else:
        assert (status, answer["kind"]) == (501, "not-supported")
        assert "6.10" in answer["needs"]


@pytest.fixture
def shipped() -> Iterator[Daemon]:
    """One with the policy that kpmd ships, which lets nobody read the kernel's memory."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kpmd-")))
        folder.chmod(0o755)
        policy = folder / "policy.toml"
        policy.write_text(POLICY)
        running = Daemon(folder, "--mode", "0666", "--policy", str(policy))
        stack.callback(running.end)
        yield running
        assert not running.bugs()


@pytest.mark.once
def test_whoever_may_use_builtins_may_use_all_of_them(shipped: Daemon) -> None:
    def use(tell: Tell) -> None:
        wire = Wire(shipped.socket)
        for name in builtin.BUILTINS:
            for attach in (None, "kprobe_multi"):
                source = {"kind": "builtin", "builtin": name}
                made = wire.ok("POST", "/programs", {"source": source, "attach": attach})
                tell([each["name"] for each in made["programs"]])
                for program in made["programs"]:
                    wire.ok("DELETE", f"/programs/{program['id']}")

    client = Forked(use)
    told = [client.told() for _ in range(2 * len(builtin.BUILTINS))]
    client.kill()
    assert told[:4] == [["count"], ["count"], ["latency"], ["latency_entry", "latency_return"]]
    assert told[4:] == [["trace"], ["trace_entry", "trace_return"], ["stack"], ["stack"]]


# Filters


@pytest.fixture
def cgroup() -> Iterator[Path]:
    made = Path("/sys/fs/cgroup/kpmd-test")
    (made / "below").mkdir(parents=True)
    yield made
    (made / "below").rmdir()
    made.rmdir()


def enter(cgroup: Path) -> Callable[[], object]:
    return lambda: (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def counted_for(
    rest: Rest, wanted: dict[str, Any], children: Sequence[Callable[[], object]]
) -> int:
    """Let children do as they are told, and then 1, 10, 100 calls and so on: what is counted."""
    loaded = Loaded(rest, "count", globals=wanted)
    loaded.link(GETPID)
    for power, before in enumerate(children):
        in_child(lambda times=10**power: call_getpid(times), before)  # type: ignore[misc]
    return sum(loaded.counts().values())


def test_by_user(rest: Rest) -> None:
    def as_user(user: int) -> Callable[[], object]:
        def become() -> None:
            set_command("kpmd-user")
            os.setuid(user)

        return become

    children = [as_user(0), as_user(NOBODY), as_user(NOBODY - 1)]
    found = []
    for user in (0, NOBODY, NOBODY - 1, NOBODY - 2, -1):
        wanted = {"target_uid": user, "target_command": padded("kpmd-user")}
        found.append(counted_for(rest, wanted, children))
    assert found == [1, 10, 100, 0, 111]


def test_by_command(rest: Rest) -> None:
    names = ["kpmd-te", "kpmd-test-fiftee", "kpmd-test-fifte", "kpmd-test-fiftex"]
    children = [lambda name=name: set_command(name) for name in names]
    found = []
    for name in ("kpmd-te", "kpmd-test-fiftee", "kpmd-test-fiftex", "another"):
        wanted = {"target_command": padded(name[:15])}
        found.append(counted_for(rest, wanted, children))
    # The kernel keeps 15 characters of a name.
    assert found == [1, 1110, 1110, 0]


def test_by_cgroup(rest: Rest, release: tuple[int, int], cgroup: Path) -> None:
    children = [lambda: None, enter(cgroup), enter(cgroup / "below")]
    upper, lower = cgroup.stat().st_ino, (cgroup / "below").stat().st_ino
    assert counted_for(rest, {"target_cgroup": upper}, children) == 10
    assert counted_for(rest, {"target_cgroup": lower}, children) == 100
    if release >= (5, 15):
        assert counted_for(rest, {"target_cgroup_tree": upper}, children) == 110
        assert counted_for(rest, {"target_cgroup_tree": lower}, children) == 100
    else:
        source = {"kind": "builtin", "builtin": "count", "globals": {"target_cgroup_tree": upper}}
        status, problem = rest("POST", "/programs", {"source": source})
        assert (status, problem["kind"]) == (422, "invalid")
        assert "no global variable of this name" in problem["errors"][0]["msg"]


# count


def test_count_by_process(rest: Rest, addresses: dict[str, int]) -> None:
    loaded = Loaded(
        rest, "count", globals={"by_process": 1}, max_entries={"counts_by_process": 4096}
    )
    loaded.link(GETPID, GETTID)

    def work() -> None:
        call_getpid(3)
        call_gettid(5)

    def before() -> None:
        set_command("kpmd-counted")
        os.setuid(NOBODY)

    pid = in_child(work, before)
    call_getpid(7)
    found = {}
    for key, calls in loaded.total("counts_by_process").items():
        function, caller, uid, command = struct.unpack("<QII16s", key)
        found[function, caller, uid, command.rstrip(b"\0")] = calls
    assert found[addresses[GETPID], pid, NOBODY, b"kpmd-counted"] == 3
    assert found[addresses[GETTID], pid, NOBODY, b"kpmd-counted"] == 5
    assert found[addresses[GETPID], os.getpid(), 0, command_of(os.getpid())] >= 7
    assert loaded.counts() == {}
    decoded = [each["key"] for each in loaded.decoded("counts_by_process")]
    assert {
        "function": f"0x{addresses[GETPID]:016x}",
        "pid": pid,
        "uid": NOBODY,
        "command": "kpmd-counted",
    } in decoded
    assert loaded.lost() == {}


@pytest.mark.parametrize("name", ["counts", "counts_by_process"])
def test_count_tells_what_it_had_no_room_for(rest: Rest, name: str) -> None:
    loaded = Loaded(
        rest,
        "count",
        globals=own(by_process=int(name != "counts")),
        max_entries={name: 1},
    )
    loaded.link(GETPID, GETTID)
    call_getpid(3)
    call_gettid(5)
    assert list(loaded.total(name).values()) == [3]
    assert loaded.lost() == {"dropped": 5}


# stacks


@pytest.fixture(scope="module")
def symbols() -> list[tuple[int, str]]:
    """Functions of the kernel in the order of their addresses."""
    return sorted((address, name) for name, address in kallsyms().items())


def name_of(symbols: list[tuple[int, str]], address: int) -> str:
    return max((start, name) for start, name in symbols if start <= address)[1]


def callers(loaded: Loaded) -> dict[tuple[int, int, int, bytes], int]:
    """Function, stack, process and command -> calls"""
    found = {}
    for key, calls in loaded.total("stacks").items():
        function, stack, pid, command = struct.unpack("<QiI16s", key)
        found[function, stack, pid, command.rstrip(b"\0")] = calls
    return found


def test_stacks(rest: Rest, addresses: dict[str, int], symbols: list[tuple[int, str]]) -> None:
    loaded = Loaded(rest, "stacks", globals=named("kpmd-caller"))
    loaded.link(SLEEP)
    name = command_of(os.getpid()).decode()
    set_command("kpmd-caller")
    for _ in range(4):
        sleep(1)
    set_command(name)
    ((function, stack, pid, command), calls) = callers(loaded).popitem()
    assert (function, pid, command) == (addresses[SLEEP], os.getpid(), b"kpmd-caller")
    assert calls == 4
    assert loaded.lost() == {}
    traces = {struct.unpack("<I", key)[0]: value for key, (value,) in loaded.entries("traces")}
    assert list(traces) == [stack]
    frames = [each for each in struct.unpack("<64Q", traces[stack].ljust(512, b"\0")) if each]
    names = [name_of(symbols, each) for each in frames]
    assert names[:2] == [SLEEP, SLEEPS]
    assert "do_syscall_64" in names
    (trace,) = loaded.decoded("traces")
    assert [each["symbol"] for each in trace["value"]["frames"]][:2] == [SLEEP, SLEEPS]


def test_stacks_of_all_processes_together(rest: Rest, addresses: dict[str, int]) -> None:
    wanted = {"target_command": padded("kpmd-caller"), "by_process": 0}
    loaded = Loaded(rest, "stacks", globals=wanted)
    loaded.link(SLEEP)
    for _ in range(3):
        in_child(lambda: sleep(1), lambda: set_command("kpmd-caller"))
    found = callers(loaded)
    assert {(function, pid, command) for function, _, pid, command in found} == {
        (addresses[SLEEP], 0, b"")
    }
    assert sum(found.values()) == 3


def test_stacks_tell_what_they_had_no_room_for(rest: Rest, addresses: dict[str, int]) -> None:
    loaded = Loaded(rest, "stacks", globals=own(), max_entries={"traces": 1})
    loaded.link(GETPID, GETTID)
    call_getpid(3)
    call_gettid(5)
    found = {(function, stack): calls for (function, stack, *_), calls in callers(loaded).items()}
    # The second one's stack is another, and there is one place: it is counted without.
    assert found == {(addresses[GETPID], 0): 3, (addresses[GETTID], -errno.EEXIST): 5}
    assert loaded.lost() == {"collisions": 5}
    loaded = Loaded(rest, "stacks", globals=own(), max_entries={"stacks": 1})
    loaded.link(GETPID, GETTID)
    call_getpid(3)
    call_gettid(5)
    assert sum(callers(loaded).values()) == 3
    assert loaded.lost() == {"dropped": 5}
