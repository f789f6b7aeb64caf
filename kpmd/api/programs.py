"""Calls about programs."""

from __future__ import annotations

from kpmd import builtin
from kpmd.api.answers import LoadedAnswer, ProgramAnswer, ProgramsPage
from kpmd.api.bodies import BuiltinBody, ForceQuery, InstructionsBody, PageQuery, ProgramBody
from kpmd.api.lifetimes import lifetime, lifetime_answer
from kpmd.api.maps import map_answer
from kpmd.api.paging import cursor, position
from kpmd.api.policy_answers import OwnerAnswer
from kpmd.api.route import Call, Reply, Route
from kpmd.core.model import Caller, Program
from kpmd.core.specs import BuiltinSource, InstructionsSource, ObjectSource, ProgramSpec
from kpmd.core.times import rfc3339
from kpmd.errors import Invalid, TooLarge
from kpmd.runtime import programs


def program_answer(program: Program, log: str | None = None) -> ProgramAnswer:
    """A program as the API shows it."""
    optional = {} if log is None else {"verifier_log": log}
    return ProgramAnswer(
        id=program.id,
        kernel_id=program.kernel_id,
        name=program.name,
        tag=program.tag,
        attach=program.attach,
        owner=OwnerAnswer(uid=program.uid, user=program.user),
        client=program.client,
        lifetime=lifetime_answer(program.lifetime),
        maps=list(program.maps),
        links=len(program.links),
        labels=program.labels,
        created_at=rfc3339(program.created_at),
        verified_instructions=program.verified_instructions,
        jited_bytes=program.jited_bytes,
        **optional,
    )


class ProgramCalls:
    """Calls about programs."""

    def __init__(self, max_object: int) -> None:
        self._max_object = max_object

    def _spec(self, caller: Caller, body: ProgramBody) -> ProgramSpec:
        source = body.source
        made: InstructionsSource | ObjectSource | BuiltinSource
        if isinstance(source, InstructionsBody):
            if not source.instructions or len(source.instructions) % 8:
                raise Invalid.at(
                    ["source", "instructions"],
                    f"has {len(source.instructions)} bytes; eBPF instructions have 8 each, "
                    "and there must be at least one",
                )
            made = InstructionsSource(source.instructions, source.license, source.name)
        elif isinstance(source, BuiltinBody):
            if source.builtin not in builtin.BUILTINS:
                raise Invalid.at(
                    ["source", "builtin"],
                    f"there is no such builtin; there are: {', '.join(sorted(builtin.BUILTINS))}",
                )
            made = BuiltinSource(source.builtin, source.globals, source.max_entries)
        else:
            most = min(self._max_object, caller.limits.object_bytes)
            if len(source.elf) > most:
                raise TooLarge(
                    f"the object has {len(source.elf)} bytes; {most} are the most (object_bytes)"
                )
            made = ObjectSource(
                source.elf, source.programs, source.globals, source.max_entries, source.signature
            )
        return ProgramSpec(
            source=made,
            attach=body.attach,
            labels=body.labels,
            lifetime=lifetime(body.lifetime),
            want_log=body.verifier_log,
        )

    async def load(self, call: Call) -> Reply:
        """POST /programs"""
        spec = self._spec(call.caller, call.body)
        call.what |= {"source": call.body.source.kind, "lifetime": spec.lifetime.kind}
        if isinstance(spec.source, BuiltinSource):
            call.what["builtin"] = spec.source.name
        elif isinstance(source := spec.source, ObjectSource):
            call.what["sha256"] = await call.state.executor.run(
                lambda: source.sha256, uid=call.caller.uid
            )
        made, maps, logs = await programs.load(call.state, call.caller, call.connection, spec)
        call.what |= {
            "programs": [each.id for each in made],
            "names": [each.name for each in made],
            "maps": [each.id for each in maps],
        }
        return Reply(
            LoadedAnswer(
                programs=[
                    program_answer(program, log) for program, log in zip(made, logs, strict=True)
                ],
                maps=[map_answer(each) for each in maps],
            ),
            status=201,
        )

    async def list_programs(self, call: Call) -> Reply:
        """GET /programs"""
        query: PageQuery = call.query
        registry = call.state.registry
        found, after = registry.programs.page(
            registry.scope(call.caller), position(query.after), query.limit
        )
        return Reply(
            ProgramsPage(items=[program_answer(each) for each in found], next=cursor(after))
        )

    async def get_program(self, call: Call) -> Reply:
        """GET /programs/{id}"""
        return Reply(program_answer(call.state.registry.program(call.caller, call.path["id"])))

    async def delete_program(self, call: Call) -> Reply:
        """DELETE /programs/{id}"""
        query: ForceQuery = call.query
        await programs.delete(call.state, call.caller, call.path["id"], force=query.force)
        return Reply(status=204)

    def routes(self) -> list[Route]:
        """The calls about programs."""
        return [
            Route(
                "POST",
                "/programs",
                self.load,
                "Load a program, or the programs of an ELF object",
                LoadedAnswer,
                status=201,
                body=ProgramBody,
                right="load",
                errors=(
                    "bad-object",
                    "verifier-rejected",
                    "wrong-attach-type",
                    "not-found",
                    "gone",
                    "not-supported",
                    "quota",
                    "shutting-down",
                    "kernel",
                ),
                tag="programs",
            ),
            Route(
                "GET",
                "/programs",
                self.list_programs,
                "The caller's programs",
                ProgramsPage,
                query=PageQuery,
                tag="programs",
            ),
            Route(
                "GET",
                "/programs/{id}",
                self.get_program,
                "One program",
                ProgramAnswer,
                errors=("not-found",),
                tag="programs",
            ),
            Route(
                "DELETE",
                "/programs/{id}",
                self.delete_program,
                "Unload a program",
                None,
                status=204,
                query=ForceQuery,
                errors=("not-found", "conflict"),
                tag="programs",
            ),
        ]
