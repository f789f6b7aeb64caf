"""Takes over what an earlier daemon left in the FD store: everything that still has its owner.

What has a state that cannot be read is listed all the same, for administrators, with what the
kernel tells of it: it is held, so somebody must be able to see it and to end it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.objects import MapDetails
from kpmd.core import carried
from kpmd.core.model import (
    Client,
    Lease,
    Lifetime,
    Link,
    Map,
    Mechanism,
    Program,
    Targets,
    new_id,
)
from kpmd.errors import KpmdError
from kpmd.log import Log
from kpmd.runtime.executor import Lane
from kpmd.runtime.fdstore import Adopted, FdStore
from kpmd.runtime.kernel import Handle, Kernel
from kpmd.runtime.parts import Parts, details_of
from kpmd.runtime.peer import has_exited, process_of
from kpmd.runtime.quotas import map_memory
from kpmd.runtime.state import State

log = Log("kpmd.restore")

#: A label of what was taken over without its state, and so without its owner.
ORPHAN = {"kpmd": "its state could not be read; only the kernel knows what it is"}


@dataclass
class _Found:
    """What the store had, sorted."""

    clients: list[tuple[Client, Adopted]] = field(default_factory=list)
    leases: list[tuple[Lease, Adopted]] = field(default_factory=list)
    programs: list[tuple[Program, OwnedFd, Adopted]] = field(default_factory=list)
    maps: dict[str, tuple[Map, OwnedFd, MapDetails]] = field(default_factory=dict)
    links: list[tuple[Link, Handle, Adopted]] = field(default_factory=list)
    #: Names of bundles whose state cannot be read.
    lost: set[str] = field(default_factory=set)
    #: What has another lifetime than it is stored with.
    changed: list[Program | Link] = field(default_factory=list)
    #: What could not be looked into: stays stored, for a daemon that can.
    left: list[Adopted] = field(default_factory=list)
    #: To be closed and forgotten: never finished, or nothing that is ours.
    refuse: list[Adopted | OwnedFd] = field(default_factory=list)


async def restore(state: State, store: FdStore, passed: Iterable[tuple[str, int]]) -> None:
    """List everything that is in ``passed``, the FD store's names and FDs, and end what has to.

    What ends is what lost its owner meanwhile: things of clients that died, of leases that expired,
    and of connections. Takes the FDs over. Never fails for what it finds there.
    """
    found = await state.executor.run(_open, state.kernel, store, list(passed), lane=Lane.LOAD)
    for program, fd, adopted in found.programs:
        state.adopt(program, fd, adopted.bundle)
    for link, handle, adopted in found.links:
        state.adopt(link, handle, adopted.bundle)
    for each, fd, details in found.maps.values():
        state.adopt(each, fd, None)
        state.map_details[each.id] = details
    for lease, adopted in found.leases:
        state.carrier.adopt(lease.id, adopted.bundle)
    for adopted in found.left:
        state.carrier.adopt(adopted.name, adopted.bundle)
    for thing in found.changed:
        state.carrier.update_later(thing)
    alive = [
        (client, process_of(adopted.fds[0].fileno(), client.pid))
        for client, adopted in found.clients
    ]
    ending = state.registry.restore(
        alive,
        [lease for lease, _ in found.leases],
        _by_program(found),
        [program for program, _, _ in found.programs],
        [link for link, _, _ in found.links],
    )
    for client, adopted in found.clients:
        if state.registry.clients.get(client.id) is None:
            found.refuse.append(adopted)  # it holds nothing, and is forgotten
            continue
        state.carrier.adopt(client.id, adopted.bundle)
        state.clients.watch(client, adopted.fds[0].detach())
    await state.executor.run(_refuse, found.refuse, lane=Lane.CLOSE)
    state.closing.later(ending)
    state.closing.later(state.registry.expire(state.clock()))
    state.lease_timer.arm()
    log.info(
        "taken over",
        programs=len(found.programs),
        maps=len(found.maps),
        links=len(found.links),
        clients=len(found.clients),
        leases=len(found.leases),
        detaching=state.closing.waiting,
    )


def _by_program(found: _Found) -> list[Map]:
    """The maps, in the order of the programs that use them."""
    ids = dict.fromkeys(id_ for program, _, _ in found.programs for id_ in program.maps)
    return [found.maps[id_][0] for id_ in ids if id_ in found.maps]


def _refuse(things: Iterable[Adopted | OwnedFd]) -> None:
    for each in things:
        each.close()


def _open(kernel: Kernel, store: FdStore, passed: list[tuple[str, int]]) -> _Found:
    found = _Found()
    unreadable = []
    for adopted in store.adopt(passed):
        if not adopted.legible:
            log.error(
                "left in the FD store: no file descriptors to look into it; raise LimitNOFILE=",
                name=adopted.name,
            )
            found.left.append(adopted)
            continue
        if adopted.empty:
            found.refuse.append(adopted)
            continue
        try:
            _sort(kernel, found, adopted)
        except (ValueError, KpmdError, OSError, LookupError) as error:
            log.error("taken over without its state", error, name=adopted.name)
            unreadable.append(adopted)
    for adopted in unreadable:
        try:
            _sort_unreadable(kernel, found, adopted)
        except (KpmdError, OSError) as error:
            log.error(
                "left in the FD store: not even the kernel knows it", error, name=adopted.name
            )
    _settle(kernel, found)
    # The store has no order; lists have that in which things were made.
    found.programs.sort(key=lambda item: item[0].created_at)
    found.links.sort(key=lambda item: item[0].created_at)
    found.leases.sort(key=lambda item: item[0].created_at)
    found.clients.sort(key=lambda item: item[0].since)
    return found


def _sort(kernel: Kernel, found: _Found, adopted: Adopted) -> None:
    """Put a bundle where it belongs. Raises Unreadable."""
    if not adopted.whole:
        # The daemon was killed while it stored or dropped it: nobody was told that it was made, or
        # it had ended.
        log.warning("not taken over", name=adopted.name, reason="it is not complete")
        found.refuse.append(adopted)
        return
    if adopted.head is None:
        raise carried.Unreadable("there is no state")
    content = carried.read(adopted.head, adopted.body)
    record = content.record
    if isinstance(record, Lease):
        found.leases.append((record, adopted))
    elif isinstance(record, Client):
        if has_exited(adopted.fds[0].fileno()):
            found.refuse.append(adopted)
        else:
            found.clients.append((record, adopted))
    elif isinstance(record, Program):
        program, *maps = adopted.fds
        if len(maps) != len(content.maps):
            raise carried.Unreadable("it has not one file descriptor for each map")
        for each, fd in zip(content.maps, maps, strict=True):
            _add_map(kernel, found, each, fd)
        found.programs.append((record, program, adopted))
    else:
        found.links.append((record, _link_handle(kernel, adopted.fds)[0], adopted))


def _add_map(kernel: Kernel, found: _Found, each: Map, fd: OwnedFd) -> None:
    """A map comes with each program that uses it; one FD does."""
    if each.id in found.maps:
        found.refuse.append(fd)
    else:
        details = kernel.map_details(fd)
        each.memory = each.memory or map_memory(details)  # one of a daemon that did not count it
        found.maps[each.id] = (each, fd, details)


def _link_handle(kernel: Kernel, fds: Sequence[OwnedFd]) -> tuple[Handle, Mechanism]:
    mechanism = kernel.link_mechanism(fds[0])
    if mechanism == "perf_event":
        return kernel.adopt_perf_links(fds), mechanism
    return (fds[0] if len(fds) == 1 else Parts(fds)), mechanism


def _sort_unreadable(kernel: Kernel, found: _Found, adopted: Adopted) -> None:
    """The same with what the kernel tells. It has no owner but the administrators."""
    found.lost.add(adopted.name)
    kinds: dict[str, list[OwnedFd]] = {}
    for fd in adopted.fds:
        kinds.setdefault(kernel.what_is(fd), []).append(fd)
    programs, maps = kinds.pop("program", []), kinds.pop("map", [])
    links = [*kinds.pop("link", []), *kinds.pop("event", [])]
    for fds in kinds.values():
        found.refuse += fds
    listed = False
    if programs:
        listed = True
        ids = [_orphan_map(kernel, found, fd) for fd in maps]
        record = _orphan_program(kernel, adopted.name, programs[0], tuple(ids))
        found.programs.append((record, programs[0], adopted))
        # One bundle has one program: more than that were never stored here.
        found.refuse += programs[1:]
    if links:
        listed = True
        handle, mechanism = _link_handle(kernel, links)
        link = _orphan_link(kernel, adopted.name, handle, mechanism)
        found.links.append((link, handle, adopted))
    if not listed:
        found.refuse += [*maps, adopted]


def _orphan_id(prefix: Literal["prg", "lnk"], name: str) -> str:
    return name if name.startswith(f"{prefix}-") else new_id(prefix)


def _orphan_program(kernel: Kernel, name: str, fd: OwnedFd, maps: tuple[str, ...]) -> Program:
    info = kernel.program_details(fd)
    return Program(
        id=_orphan_id("prg", name),
        kernel_id=info.kernel_id,
        name=info.name,
        tag=info.tag,
        attach="kprobe_multi",
        mechanism="kprobe_multi",
        uid=0,
        user="root",
        client="",
        lifetime=Lifetime("persistent"),
        maps=maps,
        labels=ORPHAN,
        created_at=time.time(),
        verified_instructions=info.verified_instructions,
        jited_bytes=info.jited_bytes,
    )


def _orphan_map(kernel: Kernel, found: _Found, fd: OwnedFd) -> str:
    details = kernel.map_details(fd)
    for known, _, others in found.maps.values():
        if others.kernel_id == details.kernel_id:
            found.refuse.append(fd)
            return known.id
    made = Map(
        id=new_id("map"),
        kernel_id=details.kernel_id,
        name=details.name,
        type=details.type,
        key_size=details.key_size,
        value_size=details.value_size,
        max_entries=details.max_entries,
        uid=0,
        percpu=details.percpu,
    )
    found.maps[made.id] = (made, fd, details)
    return made.id


def _orphan_link(kernel: Kernel, name: str, handle: Handle, mechanism: Mechanism) -> Link:
    details = details_of(kernel, handle)
    return Link(
        id=_orphan_id("lnk", name),
        kernel_id=details.kernel_id,
        program="",
        kind="kprobe",
        mechanism=mechanism,
        count=details.count or 0,
        skipped=(),
        uid=0,
        user="root",
        client="",
        lifetime=Lifetime("persistent"),
        labels=ORPHAN,
        created_at=time.time(),
        targets=Targets((), array("Q"), array("Q"), {}),
    )


def _settle(kernel: Kernel, found: _Found) -> None:
    """Join what was found to each other, now that all of it is there."""
    by_kernel_id = {program.kernel_id: program.id for program, _, _ in found.programs}
    for link, handle, _ in found.links:
        if not link.program:
            details = details_of(kernel, handle)
            link.program = by_kernel_id.get(details.program_kernel_id, "")
    things: list[Program | Link] = [each for each, _, _ in found.programs]
    things += [each for each, _, _ in found.links]
    for thing in things:
        if thing.anchor in found.lost:
            # It has an end, but nobody can tell any more when: better too late than too early.
            thing.anchor = ""
            thing.lifetime = Lifetime("persistent")
            thing.labels = {**thing.labels, **ORPHAN}
            found.changed.append(thing)
