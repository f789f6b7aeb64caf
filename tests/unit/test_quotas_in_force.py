"""Quotas where things are made: before the work is done, and given back whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from kpmd.core.model import Caller, Connection, Lease, Lifetime, Link, Program
from kpmd.core.quotas import KEPT, UNLIMITED, Limits
from kpmd.core.specs import LinkSpec, ObjectSource, ProgramSpec, TargetSpec
from kpmd.errors import Gone, KpmdError, Quota
from kpmd.runtime import leases, links, programs
from kpmd.runtime.peer import Peer
from kpmd.runtime.state import State
from tests.fakes.kernel import FakeKernel, symbol_files

UID = 1000
NOTHING = dict.fromkeys(KEPT, 0)
#: What the one map of the fake kernel's objects weighs by entry: a hash of 8 and 8 bytes.
ENTRY = 8 + 8 + 64


class User:
    """A user with limits, who asks the daemon's services."""

    def __init__(self, state: State, kernel: FakeKernel) -> None:
        self.state = state
        self.kernel = kernel
        self.limits = UNLIMITED
        pid = os.getpid()
        self.connection: Connection = state.clients.connect(
            Peer(pid, UID, UID, os.pidfd_open(pid), "test")
        )

    @property
    def caller(self) -> Caller:
        """The policy is not what is tested here."""
        return Caller(UID, UID, os.getpid(), admin=True, limits=self.limits)

    @property
    def used(self) -> dict[str, int]:
        return self.state.registry.accounts.used(UID)

    async def load(self, *names: str, entries: int = 1, lifetime: str = "process") -> list[Program]:
        source = ObjectSource(b"\x7fELF", names or None, max_entries={"counts": entries})
        spec = ProgramSpec(source, None, {}, Lifetime(lifetime))  # type: ignore[arg-type]
        return (await programs.load(self.state, self.caller, self.connection, spec))[0]

    def link_spec(self, program: Program, *symbols: str) -> LinkSpec:
        return LinkSpec(program.id, "kprobe", TargetSpec(symbols=symbols), {}, Lifetime("process"))

    async def attach(self, program: Program, *symbols: str) -> Link:
        spec = self.link_spec(program, *(symbols or ("vfs_read",)))
        return (await links.attach(self.state, self.caller, self.connection, spec))[0]

    async def plan(self, program: Program, *symbols: str) -> KpmdError | None:
        spec = self.link_spec(program, *symbols)
        return (await links.plan(self.state, self.caller, self.connection, spec))[2]


class Gate:
    """Something in the kernel that takes until it is let."""

    def __init__(self, kernel: FakeKernel, call: str) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        kernel.hooks[call] = self._hook

    def _hook(self) -> None:
        self.entered.set()
        assert self.open.wait(20)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)


@pytest.fixture
async def user() -> AsyncIterator[User]:
    kernel = FakeKernel(files=symbol_files(many=10))
    state = State(kernel)
    yield User(state, kernel)
    await state.end(keep=False)
    await state.close()
    assert state.registry.accounts.used(UID) == NOTHING


async def refused(work: Callable[[], object]) -> dict[str, object]:
    with pytest.raises(Quota) as caught:
        await work()  # type: ignore[misc]
    return caught.value.fields


async def test_links_are_refused_before_anything_is_done(user: User) -> None:
    (program,) = await user.load("count")
    user.limits = Limits(links=1)
    first = await user.attach(program)
    calls = list(user.kernel.calls)
    fields = await refused(lambda: user.attach(program))
    assert fields == {"limit": "links", "used": 1, "most": 1}
    assert user.kernel.calls == calls
    await links.detach(user.state, user.caller, first.id)
    await user.attach(program)


async def test_a_link_counts_until_the_kernel_has_let_go_of_it(user: User) -> None:
    (program,) = await user.load("count")
    user.limits = Limits(links=1, targets=1)
    link = await user.attach(program)
    gate = Gate(user.kernel, "close_link")
    detaching = asyncio.create_task(links.detach(user.state, user.caller, link.id))
    await gate.reached()
    assert (await refused(lambda: user.attach(program)))["limit"] == "links"
    gate.open.set()
    await detaching
    await user.attach(program)


async def test_targets_are_refused_before_the_system_call(user: User) -> None:
    (program,) = await user.load("count")
    user.limits = Limits(targets=4, targets_per_link=3)
    await user.attach(program, "vfs_read", "vfs_write")
    made = user.kernel.calls.count("create_link")
    many = [f"many_{number}" for number in range(4)]
    assert await refused(lambda: user.attach(program, *many)) == {
        "limit": "targets_per_link",
        "used": 0,
        "most": 3,
        "asked": 4,
    }
    assert await refused(lambda: user.attach(program, *many[:3])) == {
        "limit": "targets",
        "used": 2,
        "most": 4,
        "asked": 3,
    }
    assert user.kernel.calls.count("create_link") == made
    assert user.used == {**NOTHING, "programs": 1, "map_bytes": ENTRY, "links": 1, "targets": 2}
    await user.attach(program, *many[:2])


async def test_the_daemon_has_the_last_word_on_targets(user: User) -> None:
    (program,) = await user.load("count")
    user.state.max_targets = 1
    fields = await refused(lambda: user.attach(program, "vfs_read", "vfs_write"))
    assert (fields["limit"], fields["most"]) == ("targets_per_link", 1)


async def test_a_dry_run_tells_and_claims_nothing(user: User) -> None:
    (program,) = await user.load("count")
    user.limits = Limits(links=2, targets=4, targets_per_link=3)
    await user.attach(program, "vfs_read", "vfs_write")
    many = [f"many_{number}" for number in range(4)]
    before = user.used
    told = [await user.plan(program, *many[:number]) for number in (4, 3, 2)]
    assert [each and each.fields["limit"] for each in told] == ["targets_per_link", "targets", None]
    assert user.used == before
    await user.attach(program, *many[:2])
    last = await user.plan(program, "vfs_open")
    assert last is not None
    assert last.fields == {"limit": "links", "used": 2, "most": 2}


async def test_what_is_being_made_counts_too(user: User) -> None:
    (program,) = await user.load("count")
    user.limits = Limits(links=2, targets=3)
    gate = Gate(user.kernel, "create_link")
    first = asyncio.create_task(user.attach(program, "vfs_read", "vfs_write"))
    await gate.reached()
    fields = await refused(lambda: user.attach(program, "vfs_open", "vprintk"))
    assert (fields["limit"], fields["used"]) == ("targets", 2)
    gate.open.set()
    await first
    await user.attach(program, "vfs_open")
    assert (user.used["links"], user.used["targets"]) == (2, 3)


async def test_what_does_not_come_about_is_given_back(user: User) -> None:
    (program,) = await user.load("count")
    before = user.used
    user.limits = Limits(links=1, targets=1)
    user.kernel.fail["create_link"] = OSError(12, "no memory")
    with pytest.raises(KpmdError):
        await user.attach(program)
    with pytest.raises(KpmdError):
        await user.attach(program, "no_such_function")
    gate = Gate(user.kernel, "create_link")
    task = asyncio.create_task(user.attach(program))
    await gate.reached()
    task.cancel()
    await asyncio.sleep(0)
    # It is still being made, and will have to be closed.
    assert (user.used["links"], user.used["targets"]) == (1, 1)
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert user.used == before
    assert not user.kernel.attached
    await user.attach(program)


async def test_programs_are_refused_before_they_are_loaded(user: User) -> None:
    user.limits = Limits(programs=3)
    await user.load("count", "other")
    fields = await refused(lambda: user.load("a", "b"))
    assert fields == {"limit": "programs", "used": 2, "most": 3, "asked": 2}
    assert user.kernel.calls.count("load_object") == 1
    # How many there are in an object is known only when it is loaded.
    assert (await refused(lambda: user.load()))["limit"] == "programs"
    assert (len(user.kernel.loaded), len(user.kernel.open_maps)) == (2, 1)
    await user.load("count")
    assert (await refused(lambda: user.load()))["used"] == 3
    assert user.kernel.calls.count("load_object") == 3


async def test_programs_that_are_being_loaded_count_too(user: User) -> None:
    user.limits = Limits(programs=1)
    gate = Gate(user.kernel, "load_object")
    first = asyncio.create_task(user.load("count"))
    await gate.reached()
    assert (await refused(lambda: user.load("count")))["used"] == 1
    first.cancel()
    gate.open.set()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    assert not user.kernel.loaded
    await user.load("count")


async def test_map_bytes(user: User) -> None:
    user.limits = Limits(map_bytes=10 * ENTRY)
    (program,) = await user.load("count", entries=7)
    assert user.used["map_bytes"] == 7 * ENTRY
    assert await refused(lambda: user.load("count", entries=4)) == {
        "limit": "map_bytes",
        "used": 7 * ENTRY,
        "most": 10 * ENTRY,
        "asked": 4 * ENTRY,
    }
    assert (len(user.kernel.loaded), len(user.kernel.open_maps)) == (1, 1)
    await user.load("count", entries=3)
    await programs.delete(user.state, user.caller, program.id, force=False)
    assert user.used["map_bytes"] == 3 * ENTRY


async def test_loads_at_the_same_time_have_no_more_map_bytes_between_them(user: User) -> None:
    user.limits = Limits(map_bytes=10 * ENTRY)
    gate = Gate(user.kernel, "load_object")
    both = [asyncio.create_task(user.load("count", entries=6)) for _ in range(2)]
    await gate.reached()
    gate.open.set()
    results = await asyncio.gather(*both, return_exceptions=True)
    assert [type(each) for each in results if isinstance(each, Exception)] == [Quota]
    assert user.used["map_bytes"] == 6 * ENTRY
    assert (len(user.kernel.loaded), len(user.kernel.open_maps)) == (1, 1)


async def test_what_is_loaded_for_a_connection_that_closed_is_given_back(user: User) -> None:
    gate = Gate(user.kernel, "load_object")
    task = asyncio.create_task(user.load("count", lifetime="connection"))
    await gate.reached()
    user.connection.closed = True
    gate.open.set()
    with pytest.raises(Gone):
        await task
    assert user.used == NOTHING


async def test_leases(user: User) -> None:
    user.limits = Limits(leases=1)

    async def create() -> Lease:
        return await leases.create(user.state, user.caller, user.connection, 60, {})

    lease = await create()
    assert await refused(create) == {"limit": "leases", "used": 1, "most": 1}
    await leases.end(user.state, user.caller, lease.id)
    await create()


async def test_the_usage_has_all_that_is_counted(user: User) -> None:
    (program,) = await user.load("count")
    await user.attach(program, "vfs_read", "vfs_write")
    with user.state.counters.hold(UID, "streams", 1):
        assert user.state.usage(UID) == {
            "programs": 1,
            "links": 1,
            "targets": 2,
            "map_bytes": ENTRY,
            "leases": 0,
            "streams": 1,
            "requests": 0,
            "connections": 0,
        }
    limits = {each.name for each in dataclasses.fields(Limits)}
    assert user.state.usage(UID).keys() <= limits
