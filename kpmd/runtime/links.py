"""Attaching and detaching."""

from __future__ import annotations

import errno
import resource
from dataclasses import dataclass, replace

from kpmd.bpf.fd import Closed
from kpmd.bpf.objects import LinkDetails
from kpmd.bpf.perf import PerfAttachError
from kpmd.bpf.progress import Progress
from kpmd.core.model import Caller, Connection, Link, Program, new_id
from kpmd.core.policy import check_right
from kpmd.core.quotas import Claim, Limits, check_targets_per_link
from kpmd.core.specs import LinkSpec, TargetSpec, check_kind
from kpmd.core.targets import Resolved, resolve
from kpmd.errors import (
    AddressNotTraceable,
    KernelError,
    KpmdError,
    NotSupported,
    SymbolNotFound,
    WrongAttachType,
    errno_name,
)
from kpmd.log import Log
from kpmd.runtime import parts, spans
from kpmd.runtime.carrier import OUTLIVES
from kpmd.runtime.executor import Lane
from kpmd.runtime.features import MULTI_FEATURE, Feature, not_supported
from kpmd.runtime.kernel import Handle
from kpmd.runtime.programs import carry as carry_program
from kpmd.runtime.state import State

log = Log("kpmd.links")

#: What the kernel says where a function is not there any more: an unknown name, a bad address
#: (ENOENT from 6.14 on, EINVAL before).
_STALE = (errno.ESRCH, errno.ENOENT, errno.EINVAL)


#: What the kernel says of a target that it cannot attach to; the last two one by one only: a name
#: of several functions, and an address inside an instruction.
_NO_TARGET = (errno.EINVAL, errno.ENOENT, errno.EADDRNOTAVAIL, errno.EILSEQ)


#: What part of the daemon's file descriptors one user's kprobes may take.
_FILES_SHARE = 4


@dataclass(frozen=True)
class _Made:
    resolved: Resolved
    handle: Handle
    details: LinkDetails


async def attach(
    state: State, caller: Caller, connection: Connection, spec: LinkSpec
) -> tuple[Link, LinkDetails]:
    """Attach a program to all targets: to all of them, or to none.

    Returns the link and what the kernel tells of it. Raises Invalid, NotFound, WrongAttachType,
    SymbolNotFound, AddressNotTraceable, NotSupported, Quota, KernelError, and Gone where what it
    was to live as long as has ended: nothing stays attached then.
    """
    state.check_open()
    client = connection.client
    state.registry.anchor(caller, connection, spec.lifetime, state.clock())
    limits = await _limits(state, caller)
    with state.registry.accounts.claim(caller.uid, limits) as claim:
        claim.want("links", 1)
        program, link, made = await _new(state, caller, connection, spec, claim)
    state.keep(link, made.handle)
    try:
        await state.clients.carry(client)
        must = link.lifetime.kind in OUTLIVES
        # Loaded while the store was full, it may not be there: a link needs it to mean anything.
        await carry_program(state, program, must=must)
        await state.carrier.carry(link, [made.handle], must=must)
    except BaseException as error:
        await state.undo(state.registry.withdraw(link), error)
        raise
    log.info(
        "link created",
        id=link.id,
        kernel_id=link.kernel_id,
        program=program.id,
        kind=link.kind,
        mechanism=link.mechanism,
        count=link.count,
        skipped=len(link.skipped),
        uid=client.uid,
        pid=client.pid,
    )
    return link, made.details


async def _limits(state: State, caller: Caller) -> Limits:
    """The caller's limits. Where each target costs the daemon an FD, not all of them are theirs."""
    if caller.admin:
        return caller.limits
    feature = await state.features.get(MULTI_FEATURE["kprobe_multi"])
    if feature.supported is not False:
        return caller.limits
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return replace(caller.limits, targets=min(caller.limits.targets, files // _FILES_SHARE))


async def _new(
    state: State, caller: Caller, connection: Connection, spec: LinkSpec, claim: Claim
) -> tuple[Program, Link, _Made]:
    """Make a link and list it, so that it counts in the place of the claim."""
    client = connection.client
    user = await state.owner_name(client)
    program = state.registry.hold_program(caller, spec.program)
    try:
        feature = await _check(state, program, spec)
        progress = Progress(name=program.name)
        with state.board.showing("attach", client, progress, program.id):
            made = await _make(state, caller, program, spec, feature, claim, progress)
        targets = made.resolved.targets
        link = Link(
            id=new_id("lnk"),
            kernel_id=made.details.kernel_id,
            program=program.id,
            kind=spec.kind,
            mechanism=program.mechanism,
            count=made.details.count or len(targets),
            skipped=made.resolved.skipped,
            uid=client.uid,
            user=user,
            client=client.id,
            lifetime=spec.lifetime,
            labels=dict(spec.labels),
            created_at=state.now(),
            targets=targets,
        )
        try:
            state.check_open()
            state.registry.add_link(caller, connection, program, link, state.clock(), claim)
        except BaseException:
            await state.executor.run(made.handle.close, lane=Lane.CLOSE)
            raise
    except BaseException:
        state.closing.later(state.registry.let_go(program))
        raise
    return program, link, made


async def plan(
    state: State, caller: Caller, connection: Connection, spec: LinkSpec
) -> tuple[Program, Resolved, KpmdError | None]:
    """What ``attach`` would attach to and what not, and why; the kernel is not touched.

    Returns the program, what is found, and the error that ``attach`` would give for it. Raises
    Invalid, NotFound, Gone, WrongAttachType and NotSupported as ``attach`` does.
    """
    state.registry.anchor(caller, connection, spec.lifetime, state.clock())
    program = state.registry.program(caller, spec.program, touch=True)
    accounts = state.registry.accounts
    await _check(state, program, spec)
    limits = await _limits(state, caller)

    def work() -> tuple[Program, Resolved, KpmdError | None]:
        spec.targets.check()
        found = _resolve(state, caller, spec.targets, lenient=True)
        try:
            accounts.check(caller.uid, limits, "links", 1)
            number = _check_number(state, caller, _resolve(state, caller, spec.targets))
            accounts.check(caller.uid, limits, "targets", number)
        except KpmdError as error:
            return program, found, error
        return program, found, None

    return await state.executor.run(work, lane=Lane.PARSE, uid=caller.uid)


def _check_number(state: State, caller: Caller, found: Resolved) -> int:
    number = len(found.targets)
    check_targets_per_link(number, min(caller.limits.targets_per_link, state.max_targets))
    return number


async def _check(state: State, program: Program, spec: LinkSpec) -> Feature:
    """Whether the program can be linked so on this kernel at all."""
    check_kind(program.attach, spec.kind)
    feature = await state.features.get(MULTI_FEATURE[program.attach])
    if feature.supported is False and (
        program.mechanism == "kprobe_multi" or spec.mechanism == "kprobe_multi"
    ):
        single = program.attach == "kprobe_multi"
        instead = await state.features.get("kprobe_perf_event") if single else None
        raise not_supported(feature, instead)
    if spec.mechanism == "kprobe_multi" and program.mechanism == "perf_event":
        raise NotSupported(
            "the program was loaded for kprobes one by one, which the kernel tells apart; load it "
            "anew for a kprobe-multi link"
        )
    if program.entry_only and spec.kind == "kretprobe":
        raise NotSupported(
            f"on this kernel the builtin {program.name} cannot tell at a function's return which "
            "function it was; link it as kprobe",
            needs="kernel 5.15",
        )
    return feature


def _resolve(state: State, caller: Caller, spec: TargetSpec, *, lenient: bool = False) -> Resolved:
    with spans.phase("resolve"):
        snapshot = state.symbols.current()
        rule = None if caller.admin else check_right(caller.rule, "attach")
        fence = None if rule is None else state.symbols.fence(rule, snapshot)
        return resolve(
            spec,
            snapshot.index,
            snapshot.denials,
            snapshot.blacklist.__contains__,
            lenient=lenient,
            fence=fence,
        )


async def _make(
    state: State,
    caller: Caller,
    program: Program,
    spec: LinkSpec,
    feature: Feature,
    claim: Claim,
    progress: Progress,
) -> _Made:
    """Resolve and create, in one go in the pool; what an errno means is found out afterwards."""
    resolved: list[Resolved] = []

    def work() -> _Made:
        spec.targets.check()
        for last_try in (False, True):
            progress.phase, progress.done, progress.total = "resolving", None, None
            found = _resolve(state, caller, spec.targets)
            resolved[:] = [found]
            claim.want("targets", _check_number(state, caller, found))
            try:
                with spans.phase("attach"):
                    handle, details = _create(state, program, spec, found, progress)
            except OSError as error:
                # A module may have gone between the look into the index and the system call.
                if (
                    last_try
                    or error.errno not in _STALE
                    or found == _resolve(state, caller, spec.targets)
                ):
                    raise
            else:
                return _Made(found, handle, details)
        raise AssertionError("the last try returns or raises")

    try:
        return await state.executor.run(
            work, lane=Lane.ATTACH, undo=lambda made: made.handle.close(), uid=caller.uid
        )
    except OSError as error:
        if error.errno != errno.ESRCH and program.mechanism == "kprobe_multi":
            feature = await state.features.get(feature.name)
            if feature.supported is False:
                raise not_supported(feature) from error
        raise explain(error, spec.targets, resolved[0]) from error


def _create(
    state: State, program: Program, spec: LinkSpec, resolved: Resolved, progress: Progress
) -> tuple[Handle, LinkDetails]:
    targets = resolved.targets
    progress.phase, progress.done, progress.total = "attaching", None, len(targets)
    handle = state.handle(program.id)

    def make(part: slice) -> tuple[Handle, LinkDetails]:
        addresses = targets.addresses[part] if resolved.by_address else ()
        symbols = () if resolved.by_address else targets.names[part]
        cookies = targets.cookies[part] if spec.targets.cookies is not None else ()
        if program.mechanism == "perf_event":
            try:
                return state.kernel.create_perf_links(
                    handle,
                    retprobe=spec.kind == "kretprobe",
                    addresses=addresses,
                    symbols=symbols,
                    cookies=cookies,
                    progress=progress,
                )
            except PerfAttachError as error:
                # Its place among all targets, not in this part of them.
                at = part.start + error.index
                raise PerfAttachError(error.errno or errno.EIO, error.call, at) from error
        return state.kernel.create_link(
            handle,
            program.attach,
            retprobe=spec.kind == "kretprobe",
            addresses=addresses,
            symbols=symbols,
            cookies=cookies,
        )

    return parts.create(make, len(targets))


def explain(error: OSError, spec: TargetSpec, resolved: Resolved) -> KpmdError:
    """What a failed BPF_LINK_CREATE means on a kernel that has the feature.

    The order is the reference library's: ESRCH is a missing symbol; then comes the feature test
    (made by the caller); then EINVAL, where what was given is wrong; then the errno as it is.
    """
    number = error.errno or 0
    name = errno_name(number)
    targets = resolved.targets
    # One by one the kernel says which; all at once only where there is but one.
    at = error.index if isinstance(error, PerfAttachError) else 0 if len(targets) == 1 else None
    if number == errno.ESRCH:
        only = [] if at is None or not targets.names else [targets.names[at]]
        return SymbolNotFound(
            "one or more of the symbols do not exist or cannot be traced; the kernel does not say "
            "which; nothing was attached",
            only,
            ["does not exist or cannot be traced"] * len(only),
            errno=name,
        )
    refused = isinstance(error, PerfAttachError) and error.call != "perf_event_open"
    if number in _NO_TARGET and not refused:
        if spec.addresses is not None:
            return AddressNotTraceable(
                "one or more of the addresses are not the start of a function that the kernel can "
                "trace; nothing was attached",
                [] if at is None else [targets.addresses[at]],
                errno=name,
            )
        if resolved.by_address:
            reason = "cannot be probed here, or went away meanwhile, with its module perhaps"
            only = [] if at is None else [targets.names[at]]
            return SymbolNotFound(
                f"{only[0] if only else 'one of the functions'} {reason}; nothing was attached",
                only,
                [reason] * len(only),
                errno=name,
            )
    if number in (errno.EINVAL, errno.ENOENT):
        return WrongAttachType(
            "the kernel refused the program for this kind of link, or one of the symbols is "
            "missing; nothing was attached",
            errno=name,
        )
    hint = {
        errno.ENOMEM: "the kernel has too little memory for so many targets; ask for fewer",
        errno.E2BIG: "the kernel does not take so many targets in one link; ask for fewer",
        errno.EACCES: "kprobes one by one need CAP_SYS_ADMIN, or kernel.perf_event_paranoid at 2",
        errno.EPERM: "kpmd lacks a capability, or the kernel is locked down",
        errno.EMFILE: "the daemon has no file descriptor left; detach something and try again",
    }.get(number, "see the errno")
    return KernelError(f"the kernel did not make the link: {hint}; nothing was attached", number)


async def details(
    state: State, links: list[Link], uid: int | None = None
) -> dict[str, LinkDetails]:
    """The kernel's present counts of some links; one that is being detached has none.

    ``uid``: who asks.
    """
    wanted = [(link.id, state.handle(link.id)) for link in links if link.detaching is None]

    def ask() -> dict[str, LinkDetails]:
        found = {}
        for id_, handle in wanted:
            try:
                found[id_] = parts.details_of(state.kernel, handle)
            except Closed:
                continue
        return found

    return await state.executor.run(ask, uid=uid)


async def detach(state: State, caller: Caller, id_: str) -> None:
    """Detach a link; returns when the kernel has unregistered every target. Raises NotFound.

    One that is being detached already is waited for.
    """
    await state.closing.now(state.registry.delete_link(caller, id_), [id_])
