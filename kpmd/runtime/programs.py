"""Loading programs, and reading their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kpmd import builtin
from kpmd.bpf.fd import Closed
from kpmd.bpf.kernel import Loaded
from kpmd.bpf.maps import Entry
from kpmd.bpf.rights import Rights
from kpmd.core.model import Caller, Client, Connection, Map, Mechanism, Program, new_id
from kpmd.core.specs import BuiltinSource, InstructionsSource, ObjectSource, ProgramSpec
from kpmd.errors import Forbidden, Invalid, NotFound
from kpmd.log import Log
from kpmd.runtime.carrier import OUTLIVES
from kpmd.runtime.executor import Lane
from kpmd.runtime.features import MULTI_FEATURE
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
    await check_source(state.executor, caller, spec)
    client = connection.client
    state.registry.anchor(caller, connection, spec.lifetime, state.clock())
    user = await state.owner_name(client)
    way = await _way(state, spec)
    with state.registry.accounts.claim(caller.uid, caller.limits) as claim:
        claim.want("programs", _least(spec))
        rights = rights_of(
            caller,
            builtin=isinstance(spec.source, BuiltinSource),
            map_bytes=claim.room("map_bytes"),
        )
        try:
            loaded = await state.executor.run(
                _load, state, spec, way, rights, lane=Lane.LOAD, undo=Loaded.close, uid=caller.uid
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


def _least(spec: ProgramSpec) -> int:
    """How many programs it makes at least."""
    names = spec.source.programs if isinstance(spec.source, ObjectSource) else None
    return len(names or ("one",))


@dataclass(frozen=True)
class _Way:
    """What the kernel's features mean for a load."""

    mechanism: Mechanism
    func_ip: bool


async def _way(state: State, spec: ProgramSpec) -> _Way:
    """Kprobes one by one where the kernel has no kprobe multi, but has them."""
    if spec.attach == "kprobe_session":
        return _Way("kprobe_multi", True)
    multi = await state.features.get(MULTI_FEATURE["kprobe_multi"])
    if multi.supported is not False:
        return _Way("kprobe_multi", True)
    single = await state.features.get("kprobe_perf_event")
    func_ip = await state.features.get("bpf_get_func_ip")
    mechanism: Mechanism = "perf_event" if single.supported else "kprobe_multi"
    return _Way(mechanism, func_ip.supported is not False)


def _load(state: State, spec: ProgramSpec, way: _Way, rights: Rights | None) -> Loaded:
    source = spec.source
    if isinstance(source, InstructionsSource):
        if spec.attach is None:
            raise Invalid.at(
                ["attach"], "raw instructions do not say it: give kprobe_multi or kprobe_session"
            )
        return state.kernel.load_instructions(
            source.instructions,
            source.name,
            source.license,
            spec.attach,
            spec.want_log,
            way.mechanism,
            rights,
        )
    names: Sequence[str] | None = None
    if isinstance(source, BuiltinSource):
        elf = builtin.read(source.name, func_ip=way.func_ip)
    else:
        elf, names = source.elf, source.programs
    return state.kernel.load_object(
        elf,
        names,
        spec.attach,
        dict(source.globals),
        dict(source.max_entries),
        spec.want_log,
        way.mechanism,
        rights,
    )


def _records(
    state: State, client: Client, user: str | None, spec: ProgramSpec, way: _Way, loaded: Loaded
) -> tuple[list[Program], list[Map]]:
    now = state.now()
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
            entry_only=isinstance(spec.source, BuiltinSource) and not way.func_ip,
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


async def entries(
    state: State, caller: Caller, id_: str, after: bytes | None, limit: int
) -> Sequence[Entry]:
    """At most ``limit`` entries of a map behind the key ``after``."""
    each = state.registry.map(caller, id_)
    if after is not None:
        _check_key(each, after, "after")
    details = state.map_details[id_]
    try:
        return await state.executor.run(
            state.kernel.read_entries, state.handle(id_), details, after, limit, uid=caller.uid
        )
    except Closed:
        raise _ended(id_) from None


async def entry(state: State, caller: Caller, id_: str, key: bytes) -> Entry:
    """One entry of a map. Raises NotFound where there is none of that key."""
    each = state.registry.map(caller, id_)
    _check_key(each, key, "key")
    details = state.map_details[id_]
    try:
        value = await state.executor.run(
            state.kernel.read_entry, state.handle(id_), details, key, uid=caller.uid
        )
    except Closed:
        raise _ended(id_) from None
    if value is None:
        raise NotFound(f"map {id_} has no entry {key.hex()}")
    return key, value


def _ended(id_: str) -> NotFound:
    return NotFound(f"map {id_} has ended with its last program")


def _check_key(each: Map, key: bytes, where: str) -> None:
    if len(key) != each.key_size:
        raise Invalid.at(
            [where], f"has {len(key)} bytes; a key of this map has {each.key_size}, written in hex"
        )
