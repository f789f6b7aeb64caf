"""Loading programs and their maps."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from kpmd import builtin
from kpmd.bpf.kernel import Loaded
from kpmd.bpf.progress import Progress
from kpmd.bpf.rights import Rights
from kpmd.core.model import Caller, Client, Connection, Map, Mechanism, Program, new_id
from kpmd.core.specs import BuiltinSource, InstructionsSource, ObjectSource, ProgramSpec
from kpmd.core.types import ObjectTypes
from kpmd.errors import BadObject, Forbidden, Invalid, NotSupported
from kpmd.log import Log
from kpmd.runtime import spans
from kpmd.runtime.carrier import OUTLIVES
from kpmd.runtime.executor import Lane
from kpmd.runtime.features import MULTI_FEATURE, not_supported
from kpmd.runtime.policies import rights_of
from kpmd.runtime.quotas import map_memory
from kpmd.runtime.sources import check_source
from kpmd.runtime.state import State

log = Log("kpmd.programs")


async def load(
    state: State, caller: Caller, connection: Connection, spec: ProgramSpec
) -> tuple[list[Program], list[Map], list[str | None]]:
    """Load a program or the programs of an object.

    Returns programs, their maps, and the verifier's log of each program where it was asked for.
    Raises Forbidden where the policy does not let the caller load it, the errors of the loader and
    of the verifier, and Gone where what it was to live as long as has ended: nothing stays loaded
    then.
    """
    state.check_open()
    with spans.phase("policy"):
        await check_source(state.executor, caller, spec)
    client = connection.client
    state.registry.anchor(caller, connection, spec.lifetime, state.clock())
    user = await state.owner_name(client)
    way = await _way(state, spec)
    with state.registry.accounts.claim(caller.uid, caller.limits) as claim:
        claim.want("programs", _number(spec) or 1)
        rights = rights_of(
            caller,
            builtin=isinstance(spec.source, BuiltinSource),
            map_bytes=claim.room("map_bytes"),
        )
        progress = Progress(total=_number(spec))
        try:
            with state.tallies.load(), state.board.showing("load", client, progress):
                loaded = await state.executor.run(
                    *(_load, state, spec, way, rights, progress),
                    lane=Lane.LOAD,
                    undo=Loaded.close,
                    uid=caller.uid,
                )
        except Forbidden as error:
            # The loader knows what it refused, and not by whose word.
            detail = f"{error.detail} (rule {caller.rule_name!r}; GET /policy shows what it allows)"
            raise Forbidden(detail, **{**error.fields, "rule": caller.rule_name}) from error
        try:
            state.check_open()
            programs, maps = _records(state, client, user, spec, way, loaded)
            # Now it is known; and another load of the user may have ended meanwhile.
            claim.want("programs", len(programs))
            claim.want("map_bytes", sum(each.memory for each in maps))
            state.registry.add_loaded(caller, connection, programs, maps, state.clock(), claim)
        except BaseException:
            await state.executor.run(loaded.close, lane=Lane.CLOSE)
            raise
    for program, made in zip(programs, loaded.programs, strict=True):
        state.keep(program, made.fd)
        log.info(
            "program loaded",
            id=program.id,
            kernel_id=program.kernel_id,
            name=program.name,
            attach=program.attach,
            uid=client.uid,
            pid=client.pid,
        )
    for each, mapped in zip(maps, loaded.maps, strict=True):
        state.keep(each, mapped.fd)
        state.map_details[each.id] = mapped.details
    try:
        await state.clients.carry(client)
        for program in programs:
            await carry(state, program, must=program.lifetime.kind in OUTLIVES)
    except BaseException as error:
        await state.undo(state.registry.withdraw(*programs), error)
        raise
    return programs, maps, [made.log for made in loaded.programs]


async def carry(state: State, program: Program, *, must: bool) -> None:
    """Put a program and its maps into the FD store, unless they are there, or it has ended.

    Raises as ``Carrier.carry`` does.
    """
    if state.registry.programs.get(program.id) is not program:
        return
    maps = [each for id_ in program.maps if (each := state.registry.maps.get(id_)) is not None]
    handles = [state.handle(program.id), *(state.handle(each.id) for each in maps)]
    await state.carrier.carry(program, handles, maps, must=must)


def _number(spec: ProgramSpec) -> int | None:
    """How many programs it makes; None where only the object tells."""
    if isinstance(spec.source, ObjectSource):
        return len(spec.source.programs) if spec.source.programs else None
    return 1 if isinstance(spec.source, InstructionsSource) else None


@dataclass(frozen=True)
class _Way:
    """What the kernel's features mean for a load."""

    mechanism: Mechanism
    #: What a builtin is there; None: no builtin.
    variant: builtin.Variant | None = None


async def _way(state: State, spec: ProgramSpec) -> _Way:
    """Kprobes one by one where the kernel has no kprobe multi, but has them.

    Builtins by session where the kernel has sessions, unless kprobe multi is asked for. Raises
    NotSupported where sessions are asked for of a builtin that the kernel has none for.
    """
    source, get = spec.source, state.features.get
    made = builtin.BUILTINS[source.name] if isinstance(source, BuiltinSource) else None
    if made is not None and made.by_session and spec.attach != "kprobe_multi":
        session = await get(MULTI_FEATURE["kprobe_session"])
        if session.supported or (session.supported is None and spec.attach is not None):
            return _Way("kprobe_multi", made.variant(session=True))
        if spec.attach is not None:
            raise not_supported(session)
    func_ip = True
    mechanism: Mechanism = "kprobe_multi"
    if spec.attach != "kprobe_session":
        multi = await get(MULTI_FEATURE["kprobe_multi"])
        if multi.supported is False:
            mechanism = "perf_event" if (await get("kprobe_perf_event")).supported else mechanism
            func_ip = (await get("bpf_get_func_ip")).supported is not False
    return _Way(mechanism, None if made is None else made.variant(func_ip=func_ip))


def _load(
    state: State, spec: ProgramSpec, way: _Way, rights: Rights | None, progress: Progress
) -> Loaded:
    source = spec.source
    progress.phase = "parsing"
    if isinstance(source, InstructionsSource):
        if spec.attach is None:
            raise Invalid.at(
                ["attach"], "raw instructions do not say it: give kprobe_multi or kprobe_session"
            )
        with spans.phase("load"):
            return state.kernel.load_instructions(
                source.instructions,
                source.name,
                source.license,
                spec.attach,
                spec.want_log,
                way.mechanism,
                rights,
                progress,
            )
    if isinstance(source, ObjectSource):
        elves, names = [source.elf], source.programs
    else:
        elves, names = _objects(way), None

    def load(elf: bytes) -> Loaded:
        with spans.phase("load"):
            return state.kernel.load_object(
                elf,
                names,
                spec.attach,
                dict(source.globals),
                dict(source.max_entries),
                spec.want_log,
                way.mechanism,
                rights,
                progress,
            )

    *others, last = elves
    for elf in others:
        with contextlib.suppress(BadObject):
            return load(elf)
    return load(last)


def _objects(way: _Way) -> list[bytes]:
    """The objects of a builtin, of which the first that the kernel takes is the one to load."""
    try:
        return way.variant.read() if way.variant is not None else []
    except NotImplementedError as error:
        raise NotSupported(f"there is no such program for this machine: {error}") from error


def _records(
    state: State, client: Client, user: str | None, spec: ProgramSpec, way: _Way, loaded: Loaded
) -> tuple[list[Program], list[Map]]:
    now = state.now()
    types = ObjectTypes(loaded.btf) if loaded.btf else None
    maps = [
        Map(
            id=new_id("map"),
            kernel_id=each.details.kernel_id,
            name=each.name,
            type=each.details.type,
            key_size=each.details.key_size,
            value_size=each.details.value_size,
            max_entries=each.details.max_entries,
            uid=client.uid,
            percpu=each.details.percpu,
            memory=map_memory(each.details),
            key_type=each.key_type,
            value_type=each.value_type,
            types=types,
        )
        for each in loaded.maps
    ]
    used = {kernel_id for program in loaded.programs for kernel_id in program.info.map_ids}
    programs = []
    for made in loaded.programs:
        # A map that no program uses belongs to all of the object, so that it ends with them.
        own = [
            each
            for each in maps
            if each.kernel_id in made.info.map_ids or each.kernel_id not in used
        ]
        program = Program(
            id=new_id("prg"),
            kernel_id=made.info.kernel_id,
            name=made.name,
            tag=made.info.tag,
            attach="kprobe_session" if made.attach == "kprobe_session" else "kprobe_multi",
            mechanism=way.mechanism,
            entry_only=way.variant is not None and made.name in way.variant.entry_only,
            uid=client.uid,
            user=user,
            client=client.id,
            lifetime=spec.lifetime,
            maps=tuple(each.id for each in own),
            labels=dict(spec.labels),
            created_at=now,
            verified_instructions=made.info.verified_instructions,
            jited_bytes=made.info.jited_bytes,
        )
        for each in own:
            each.programs.add(program.id)
        programs.append(program)
    return programs, maps


async def delete(state: State, caller: Caller, id_: str, *, force: bool) -> None:
    """Unload a program; with ``force`` detach its links first. Raises NotFound, Conflict."""
    links = list(state.registry.program(caller, id_).links)
    await state.closing.now(state.registry.delete_program(caller, id_, force), links)
