"""Records as the daemon makes them, with ids in order."""

from __future__ import annotations

import itertools
from array import array

from kpmd.core.model import (
    Caller,
    Client,
    Connection,
    Lease,
    Lifetime,
    Link,
    Map,
    Program,
    Targets,
)

ROOT = Caller(0, 0, 1, admin=True)
PROCESS = Lifetime("process")
PERSISTENT = Lifetime("persistent")
CONNECTION = Lifetime("connection")

_numbers = itertools.count()


def an_id(prefix: str) -> str:
    """Ids in order: what is drawn from a sorted list of them must not be left to chance."""
    return f"{prefix}-{next(_numbers):010}"


def caller(client: Client) -> Caller:
    """The caller who is that client."""
    return Caller(client.uid, client.gid, client.pid, admin=False)


def a_program(
    connection: Connection, lifetime: Lifetime = PROCESS, maps: tuple[str, ...] = ()
) -> Program:
    client = connection.client
    return Program(
        id=an_id("prg"),
        kernel_id=1,
        name="p",
        tag="",
        attach="kprobe_multi",
        mechanism="kprobe_multi",
        uid=client.uid,
        user=None,
        client=client.id,
        lifetime=lifetime,
        maps=maps,
        labels={},
        created_at=0,
        verified_instructions=0,
        jited_bytes=0,
    )


def a_map(uid: int, memory: int = 100) -> Map:
    return Map(an_id("map"), 1, "m", "hash", 8, 8, 1, uid, False, memory)


def a_link(
    connection: Connection, program: Program, lifetime: Lifetime = PROCESS, targets: int = 1
) -> Link:
    client = connection.client
    return Link(
        id=an_id("lnk"),
        kernel_id=1,
        program=program.id,
        kind="kprobe",
        mechanism="kprobe_multi",
        count=targets,
        skipped=(),
        uid=client.uid,
        user=None,
        client=client.id,
        lifetime=lifetime,
        labels={},
        created_at=0,
        targets=Targets(
            tuple(f"f{number}" for number in range(targets)), array("Q"), array("Q", [0]), {}
        ),
    )


def a_lease(client: Client, ttl: float, now: float) -> Lease:
    return Lease(
        id=an_id("lse"),
        uid=client.uid,
        user=None,
        client=client.id,
        ttl=ttl,
        deadline=now + ttl,
        labels={},
        created_at=0,
    )
