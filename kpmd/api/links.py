"""Calls about links."""

from __future__ import annotations

from kpmd.api.answers import (
    DryRunAnswer,
    LinkAnswer,
    LinksPage,
    RefusalAnswer,
    SkippedAnswer,
    SkippedPage,
    TargetAnswer,
    TargetsPage,
)
from kpmd.api.bodies import LinkBody, LinksQuery, PageQuery
from kpmd.api.fields import address
from kpmd.api.lifetimes import lifetime, lifetime_answer
from kpmd.api.paging import cursor, position, span
from kpmd.api.policy_answers import OwnerAnswer
from kpmd.api.route import Call, Reply, Route
from kpmd.bpf.objects import LinkDetails
from kpmd.core.model import Link, Skipped, Targets
from kpmd.core.specs import LinkSpec, TargetSpec
from kpmd.core.times import rfc3339
from kpmd.errors import NotSupported
from kpmd.runtime import links


def link_answer(link: Link, details: LinkDetails | None) -> LinkAnswer:
    """A link as the API shows it; ``details`` are the kernel's present counts."""
    ending = {} if link.detaching is None else {"reason": link.detaching}
    return LinkAnswer(
        id=link.id,
        kernel_id=link.kernel_id,
        program=link.program,
        state="attached" if link.detaching is None else "detaching",
        kind=link.kind,
        mechanism=link.mechanism,
        count=(details.count if details else None) or link.count,
        missed=details.missed if details else None,
        skipped=len(link.skipped),
        owner=OwnerAnswer(uid=link.uid, user=link.user),
        client=link.client,
        lifetime=lifetime_answer(link.lifetime),
        labels=link.labels,
        created_at=rfc3339(link.created_at),
        **ending,
    )


def target_answer(targets: Targets, position_: int) -> TargetAnswer:
    """One target as the API shows it."""
    return TargetAnswer(
        symbol=targets.names[position_] if targets.names else None,
        module=targets.modules.get(position_),
        address=address(targets.addresses[position_]) if targets.addresses else None,
        cookie=str(targets.cookies[position_]),
    )


def skipped_answer(skipped: Skipped) -> SkippedAnswer:
    """What is not attached to, as the API shows it."""
    return SkippedAnswer(
        symbol=skipped.symbol,
        module=skipped.module,
        reason=skipped.reason,
        detail=skipped.detail,
    )


def _spec(body: LinkBody) -> LinkSpec:
    return LinkSpec(
        program=body.program,
        kind=body.kind,
        targets=TargetSpec(
            symbols=body.symbols,
            addresses=body.addresses,
            patterns=body.patterns,
            exclude=body.exclude,
            cookies=body.cookies,
            on_untraceable=body.on_untraceable,
            on_ambiguous=body.on_ambiguous,
        ),
        labels=body.labels,
        lifetime=lifetime(body.lifetime),
        mechanism=body.mechanism,
    )


async def attach(call: Call) -> Reply:
    """POST /links"""
    spec = _spec(call.body)
    targets = spec.targets
    call.what |= {
        "program": spec.program,
        "kind": spec.kind,
        targets.which: targets.given,
        "lifetime": spec.lifetime.kind,
        "dry_run": call.body.dry_run,
    }
    if call.body.dry_run:
        return await _dry_run(call, spec)
    link, details = await links.attach(call.state, call.caller, call.connection, spec)
    call.what |= {"link": link.id, "count": link.count, "skipped": len(link.skipped)}
    return Reply(
        link_answer(link, details),
        status=201,
        headers={"Location": f"/links/{link.id}"},
    )


async def _dry_run(call: Call, spec: LinkSpec) -> Reply:
    program, resolved, error = await links.plan(call.state, call.caller, call.connection, spec)

    def describe() -> bytes:
        count = len(resolved.targets)
        return (
            DryRunAnswer(
                dry_run=True,
                attachable=error is None,
                refusal=None
                if error is None
                else RefusalAnswer(kind=error.kind, detail=error.detail),
                program=program.id,
                kind=spec.kind,
                mechanism=program.mechanism,
                count=count,
                targets=[target_answer(resolved.targets, each) for each in range(count)],
                skipped=[skipped_answer(each) for each in resolved.skipped],
            )
            .model_dump_json()
            .encode()
        )

    return Reply(await call.state.executor.run(describe, uid=call.caller.uid))


async def get_skipped(call: Call) -> Reply:
    """GET /links/{id}/skipped"""
    query: PageQuery = call.query
    skipped = call.state.registry.link(call.caller, call.path["id"]).skipped
    places, following = span(query.after, query.limit, len(skipped))
    return Reply(SkippedPage(items=[skipped_answer(skipped[at]) for at in places], next=following))


async def list_links(call: Call) -> Reply:
    """GET /links"""
    query: LinksQuery = call.query
    registry = call.state.registry

    def wanted(link: Link) -> bool:
        return (
            registry.sees(call.caller, link)
            and query.program in (None, link.program)
            and query.client in (None, link.client)
            and query.lease in (None, link.lifetime.lease)
        )

    # The narrowest index there is; what it still holds too much is left out by ``wanted``.
    if query.program is not None:
        key: object = ("program", query.program)
    elif query.client is not None:
        key = ("client", query.client)
    elif query.lease is not None:
        key = ("lease", query.lease)
    else:
        key = registry.scope(call.caller)
    found, after = registry.links.page(key, position(query.after), query.limit, wanted)
    details = await links.details(call.state, found, call.caller.uid)
    return Reply(
        LinksPage(
            items=[link_answer(link, details.get(link.id)) for link in found], next=cursor(after)
        )
    )


async def get_link(call: Call) -> Reply:
    """GET /links/{id}"""
    link = call.state.registry.link(call.caller, call.path["id"])
    found = await links.details(call.state, [link], call.caller.uid)
    return Reply(link_answer(link, found.get(link.id)))


async def get_targets(call: Call) -> Reply:
    """GET /links/{id}/targets"""
    query: PageQuery = call.query
    targets = call.state.registry.link(call.caller, call.path["id"]).targets
    places, following = span(query.after, query.limit, len(targets))
    return Reply(TargetsPage(items=[target_answer(targets, at) for at in places], next=following))


async def delete_link(call: Call) -> Reply:
    """DELETE /links/{id}"""
    await links.detach(call.state, call.caller, call.path["id"])
    return Reply(status=204)


async def not_supported(call: Call) -> Reply:
    """What kprobe-multi links cannot do. The reference library answers so too."""
    call.state.registry.link(call.caller, call.path["id"])
    raise NotSupported(
        "a kprobe-multi link can be neither updated nor pinned; make a new link and delete this "
        'one, and ask for the lifetime {"kind": "persistent"} where it shall outlive its client'
    )


_PINNING = ("not-found", "not-supported")

ROUTES = [
    Route(
        "POST",
        "/links",
        attach,
        "Attach a program to functions: to all of them, or to none",
        LinkAnswer,
        status=201,
        also={200: DryRunAnswer},
        body=LinkBody,
        right="attach",
        errors=(
            "not-found",
            "symbol-not-found",
            "address-not-traceable",
            "wrong-attach-type",
            "conflict",
            "gone",
            "not-supported",
            "quota",
            "shutting-down",
            "kernel",
        ),
        tag="links",
    ),
    Route(
        "GET", "/links", list_links, "The caller's links", LinksPage, query=LinksQuery, tag="links"
    ),
    Route(
        "GET", "/links/{id}", get_link, "One link", LinkAnswer, errors=("not-found",), tag="links"
    ),
    Route(
        "GET",
        "/links/{id}/targets",
        get_targets,
        "What a link is attached to",
        TargetsPage,
        query=PageQuery,
        errors=("not-found",),
        tag="links",
    ),
    Route(
        "GET",
        "/links/{id}/skipped",
        get_skipped,
        "What a link was asked for and is not attached to, and why",
        SkippedPage,
        query=PageQuery,
        errors=("not-found",),
        tag="links",
    ),
    Route(
        "DELETE",
        "/links/{id}",
        delete_link,
        "Detach; answers when the link is detached",
        None,
        status=204,
        errors=("not-found",),
        tag="links",
    ),
    *(
        Route(method, path, not_supported, summary, None, status=501, errors=_PINNING, tag="links")
        for method, path, summary in (
            ("PUT", "/links/{id}/program", "Not supported: replace the program of a link"),
            ("PUT", "/links/{id}/pin", "Not supported: pin a link"),
            ("DELETE", "/links/{id}/pin", "Not supported: unpin a link"),
        )
    ),
]
