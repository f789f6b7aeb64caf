"""Attaching and detaching."""

from __future__ import annotations

import errno

import structlog

from kpmd.bpf.fd import Closed
from kpmd.bpf.objects import LinkDetails
from kpmd.core.model import Caller, Client, Link, Program, new_id
from kpmd.core.specs import LinkSpec, check_kind
from kpmd.core.targets import Resolved, Unresolved, resolve
from kpmd.errors import (
    MAX_SYMBOLS,
    AddressNotTraceable,
    KernelError,
    KpmdError,
    SymbolNotFound,
    WrongAttachType,
    errno_name,
)
from kpmd.runtime.executor import Lane
from kpmd.runtime.features import Feature, not_supported
from kpmd.runtime.kernel import Handle
from kpmd.runtime.state import State

log = structlog.get_logger("kpmd.links")

_FEATURE = {"kprobe_multi": "bpf_link_kprobe_multi", "kprobe_session": "bpf_link_kprobe_session"}


async def attach(
    state: State, caller: Caller, client: Client, spec: LinkSpec
) -> tuple[Link, LinkDetails]:
    """Attach a program to all targets in one system call: to all of them or to none.

    Returns the link and what the kernel tells of it. Raises Invalid, NotFound, WrongAttachType,
    SymbolNotFound, AddressNotTraceable, NotSupported, KernelError, and Gone where the client ended
    meanwhile: nothing stays attached then.
    """
    state.check_open()
    # In the pool: a million names take a while to look at.
    await state.executor.run(spec.check, lane=Lane.ATTACH)
    user = await state.owner_name(client)
    program = state.registry.hold_program(caller, spec.program)
    try:
        check_kind(program.attach, spec.kind)
        feature = await state.features.get(_FEATURE[program.attach])
        if feature.supported is False:
            raise not_supported(feature)
        resolved = await _resolve(state, spec)
        handle, details = await _create(state, program, spec, resolved, feature)
        link = Link(
            id=new_id("lnk"),
            kernel_id=details.kernel_id,
            program=program.id,
            kind=spec.kind,
            mechanism="kprobe_multi",
            count=details.count or len(resolved.targets),
            skipped=0,
            uid=client.uid,
            user=user,
            client=client.id,
            lifetime=spec.lifetime,
            labels=dict(spec.labels),
            created_at=state.now(),
            targets=resolved.targets,
        )
        try:
            state.check_open()
            state.registry.add_link(client, program, link)
        except BaseException:
            await state.executor.run(handle.close, lane=Lane.CLOSE)
            raise
    except BaseException:
        state.close_later(state.registry.let_go(program))
        raise
    state.keep(link.id, handle)
    log.info(
        "link created",
        id=link.id,
        kernel_id=link.kernel_id,
        program=program.id,
        kind=link.kind,
        count=link.count,
        uid=client.uid,
        pid=client.pid,
    )
    return link, details


async def _resolve(state: State, spec: LinkSpec) -> Resolved:
    index = await state.symbols.index()
    try:
        return await state.executor.run(resolve, spec, index, lane=Lane.ATTACH)
    except Unresolved as missing:
        raise await _missing(state, missing.names) from None


async def _missing(state: State, names: list[str]) -> SymbolNotFound:
    shown = names[:MAX_SYMBOLS]
    existing = await state.symbols.existing(set(shown))
    reasons = [
        "exists, but the kernel cannot trace it (see available_filter_functions in tracefs)"
        if name in existing
        else "does not exist in this kernel or its loaded modules"
        for name in shown
    ]
    return SymbolNotFound(
        f"{len(names)} symbol(s) cannot be attached to, the first of them {names[0]!r}: "
        f"it {reasons[0]}; nothing was attached",
        names,
        reasons,
    )


async def _create(
    state: State, program: Program, spec: LinkSpec, resolved: Resolved, feature: Feature
) -> tuple[Handle, LinkDetails]:
    def create() -> tuple[Handle, LinkDetails]:
        return state.kernel.create_link(
            state.handle(program.id),
            program.attach,
            retprobe=spec.kind == "kretprobe",
            addresses=resolved.targets.addresses if resolved.by_address else (),
            symbols=() if resolved.by_address else resolved.targets.names,
            cookies=resolved.targets.cookies if spec.cookies is not None else (),
        )

    try:
        return await state.executor.run(create, lane=Lane.ATTACH, undo=lambda made: made[0].close())
    except KpmdError:
        raise
    except OSError as error:
        if error.errno != errno.ESRCH:
            feature = await state.features.get(feature.name)
            if feature.supported is False:
                raise not_supported(feature) from error
        raise explain(error.errno or 0, spec, resolved) from error


def explain(number: int, spec: LinkSpec, resolved: Resolved) -> KpmdError:
    """What a failed BPF_LINK_CREATE means on a kernel that has the feature.

    The order is the reference library's: ESRCH is a missing symbol; then comes the feature test
    (made by the caller); then EINVAL, where what was given is wrong; then the errno as it is.
    """
    name = errno_name(number)
    if number == errno.ESRCH:
        return SymbolNotFound(
            "one or more of the symbols do not exist or cannot be traced; the kernel does not say "
            "which; nothing was attached",
            list(spec.symbols or ())[:1] if len(spec.symbols or ()) == 1 else [],
            ["does not exist or cannot be traced"],
            errno=name,
        )
    # A bad address is ENOENT from 6.14 on, EINVAL before.
    if number in (errno.EINVAL, errno.ENOENT):
        if spec.addresses is not None:
            return AddressNotTraceable(
                "one or more of the addresses are not the start of a function that the kernel can "
                "trace; nothing was attached",
                list(spec.addresses) if len(spec.addresses) == 1 else [],
                errno=name,
            )
        if resolved.by_address:
            return SymbolNotFound(
                "a function went away while it was being attached to, with its module perhaps; "
                "try again; nothing was attached",
                [],
                [],
                errno=name,
            )
        return WrongAttachType(
            "the kernel refused the program for this kind of link, or one of the symbols is "
            "missing; nothing was attached",
            errno=name,
        )
    hint = {
        errno.ENOMEM: "the kernel has too little memory for so many targets at once; ask for fewer",
        errno.E2BIG: "the kernel does not take so many targets in one link; ask for fewer",
        errno.EPERM: "kpmd lacks a capability, or the kernel is locked down",
        errno.EMFILE: "the daemon has no file descriptor left; detach something and try again",
    }.get(number, "see the errno")
    return KernelError(f"the kernel did not make the link: {hint}; nothing was attached", number)


async def details(state: State, links: list[Link]) -> dict[str, LinkDetails]:
    """The kernel's present counts of some links; one that is just being closed has none."""
    wanted = [(link.id, state.handle(link.id)) for link in links]

    def ask() -> dict[str, LinkDetails]:
        found = {}
        for id_, handle in wanted:
            try:
                found[id_] = state.kernel.link_details(handle)
            except Closed:
                continue
        return found

    return await state.executor.run(ask)


async def detach(state: State, caller: Caller, id_: str) -> None:
    """Detach a link; returns when the kernel has unregistered every target. Raises NotFound."""
    await state.close_now(state.registry.delete_link(caller, id_))
