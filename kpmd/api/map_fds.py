"""Handing a map over to its owner: the file descriptor itself, for reading with nobody between."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kpmd.api.answers import MapAnswer
from kpmd.api.fields import Answer, Model
from kpmd.api.maps import map_answer
from kpmd.api.route import Call, Reply, Route
from kpmd.errors import NotSupported
from kpmd.runtime.carrier import owned_fds

#: Types whose holder can do no more with them than to read and write what the owner may, too; see
#: docs/threat-model.md. The others hold programs, maps, sockets, devices or events of the kernel.
_BY_MMAP = frozenset({"ringbuf", "user_ringbuf"})
_BY_BPF = frozenset(
    {
        "array",
        "bloom_filter",
        "hash",
        "lpm_trie",
        "lru_hash",
        "lru_percpu_hash",
        "percpu_array",
        "percpu_hash",
        "queue",
        "stack",
        "stack_trace",
    }
)


class HandOverBody(Model):
    """Nothing: the path says it all."""


class HandedAnswer(Answer):
    """A map whose file descriptor comes beside the first byte of this answer, as SCM_RIGHTS.

    Receive it with recvmsg(2). Who reads the answer otherwise, as curl does, does not get it.
    """

    map: MapAnswer
    fds: Annotated[Literal[1], Field(description="File descriptors beside this answer.")]
    access: Annotated[
        Literal["bpf", "mmap"],
        Field(
            description="How to get at what is in it: with the element commands of bpf(2), or by "
            "mmap(2), and epoll(7) to wait. What the program froze (`.rodata`) can only be read."
        ),
    ]


async def hand_over(call: Call) -> Reply:
    """POST /maps/{id}/fd"""
    state = call.state
    state.check_open()
    each = state.registry.map(call.caller, call.path["id"], touch=True)
    if each.type not in _BY_MMAP | _BY_BPF:
        raise NotSupported(
            f"a map of type {each.type} is not handed over: it holds what is more than data; GET "
            f"/maps/{each.id} and what is below it show what can be seen of it"
        )
    call.what |= {"name": each.name, "type": each.type}
    state.registry.hand_over(each)
    (fd,) = owned_fds(state.handle(each.id))
    access: Literal["bpf", "mmap"] = "mmap" if each.type in _BY_MMAP else "bpf"
    return Reply(HandedAnswer(map=map_answer(each), fds=1, access=access), fd=fd)


ROUTES = [
    Route(
        "POST",
        "/maps/{id}/fd",
        hand_over,
        "A map's file descriptor, passed to its owner as SCM_RIGHTS",
        HandedAnswer,
        right="maps",
        body=HandOverBody,
        optional_body=True,
        errors=("not-found", "not-supported", "shutting-down", "kernel"),
        tag="maps",
    ),
]
