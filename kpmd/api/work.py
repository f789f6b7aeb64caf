"""What the daemon is doing at this moment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kpmd.api.bodies import PageQuery
from kpmd.api.fields import Answer, Cursor, Time
from kpmd.api.paging import cursor, position
from kpmd.api.policy_answers import OwnerAnswer
from kpmd.api.route import Call, Reply, Route
from kpmd.bpf.progress import Phase
from kpmd.core.times import rfc3339
from kpmd.runtime.work import Work


class WorkAnswer(Answer):
    """A load, an attach or a detach under way. Gone from the list once it has ended."""

    id: str
    what: Literal["load", "attach", "detach"]
    phase: Annotated[
        Phase,
        Field(
            description="`queued`: its turn has not come. A load is `parsing`, then `verifying`; "
            "an attach `resolving` (finding its functions), then `attaching`, and `detaching` "
            "where what was attached so far is taken back."
        ),
    ]
    done: Annotated[
        int | None,
        Field(
            description="How many of `total`: programs that the verifier took; functions attached "
            "to, or detached from. null where that is not known: the kernel tells nothing until "
            "it has attached to all at once."
        ),
    ]
    total: Annotated[int | None, Field(description="null where it is not known.")]
    client: Annotated[str, Field(description="Who asked for it; of a detach, who made the link.")]
    own: Annotated[bool, Field(description="Whether that is the process that asks now.")]
    owner: OwnerAnswer
    since: Time
    name: Annotated[
        str,
        Field(
            description="A program's name: the one that the verifier is at (the kernel keeps 15 "
            "characters of it), or that is attached."
        ),
    ] = ""
    program: Annotated[str, Field(description="The program of an attach or a detach.")] = ""
    link: Annotated[str, Field(description="The link of a detach.")] = ""


class WorkPage(Answer):
    """A page of what is being done, the oldest first."""

    items: list[WorkAnswer]
    next: Cursor


def _answer(call: Call, work: Work) -> WorkAnswer:
    progress = work.progress
    told: dict[str, Any] = {"name": progress.name, "program": work.program, "link": work.link}
    return WorkAnswer(
        id=work.id,
        what=work.what,
        phase=progress.phase,
        done=progress.done,
        total=progress.total,
        client=work.client,
        own=work.client == call.connection.client.id,
        owner=OwnerAnswer(uid=work.uid, user=call.state.known_name(work.uid)),
        since=rfc3339(work.since),
        **{name: value for name, value in told.items() if value},
    )


async def list_work(call: Call) -> Reply:
    """GET /work"""
    query: PageQuery = call.query
    found, after = call.state.board.shelf.page(
        call.state.registry.scope(call.caller), position(query.after), query.limit
    )
    return Reply(WorkPage(items=[_answer(call, each) for each in found], next=cursor(after)))


ROUTES = [
    Route(
        "GET",
        "/work",
        list_work,
        "What the daemon is doing for the caller at this moment",
        WorkPage,
        query=PageQuery,
    )
]
