"""Calls about programs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, cast

from kpmd.client import answers
from kpmd.client.calls import Calls, Pages, lifetime_body, object_of, path_of
from kpmd.client.errors import Gone, NotFound
from kpmd.client.operation import listing, managed, operation

Globals = Mapping[str, int | bytes]


class ProgramCalls(Calls):
    """The part of both clients that is about programs."""

    @operation
    async def load_object(
        self,
        elf: bytes,
        programs: Sequence[str] | None = None,
        attach: answers.Attach | None = None,
        globals: Globals | None = None,  # noqa: A002 - the API's word
        max_entries: Mapping[str, int] | None = None,
        lifetime: str = "process",
        labels: Mapping[str, str] | None = None,
        signature: bytes | None = None,
    ) -> answers.Loaded:
        """Load the programs of an ELF object, as clang makes it, and their maps.

        ``elf`` is the file's content. ``programs`` names those to load (None: all), ``attach`` how
        they are called, where their sections do not say it. ``globals`` sets global variables: an
        int for a scalar, bytes (as they lie in memory) for anything; ``max_entries`` the sizes of
        maps, by name. ``lifetime`` is explained at the class. ``signature`` is an Ed25519 one of
        ``elf``, where the policy asks for it. Kinds of errors: ``bad-object``,
        ``verifier-rejected`` (with ``problem["verifier_log"]``), ``wrong-attach-type``,
        ``too-large``, ``gone`` (the lease has ended), ``not-found`` (there is none),
        ``not-supported``, ``forbidden`` (``problem["refused"]`` has what the instructions may not
        call).
        """
        source = {
            "kind": "object",
            "elf": base64.b64encode(elf).decode(),
            "programs": None if programs is None else list(programs),
            **_variables(globals, max_entries),
        }
        if signature is not None:
            source["signature"] = base64.b64encode(signature).decode()
        return await self._load(source, attach, lifetime, labels)

    @operation
    async def load_builtin(
        self,
        name: str,
        attach: answers.Attach | None = None,
        globals: Globals | None = None,  # noqa: A002 - the API's word
        max_entries: Mapping[str, int] | None = None,
        lifetime: str = "process",
        labels: Mapping[str, str] | None = None,
    ) -> answers.Loaded:
        """Load a program that ships with the daemon; ``capabilities()["builtins"]`` has the names.

        The rest is as for ``load_object``. An unknown name is ``invalid``.
        """
        source = {"kind": "builtin", "builtin": name, **_variables(globals, max_entries)}
        return await self._load(source, attach, lifetime, labels)

    @operation
    async def load_instructions(
        self,
        instructions: bytes,
        license: str = "GPL",  # noqa: A002 - the API's word
        name: str = "",
        attach: answers.Attach = "kprobe_multi",
        lifetime: str = "process",
        labels: Mapping[str, str] | None = None,
    ) -> answers.Loaded:
        """Load raw eBPF instructions, 8 bytes each; they can have no maps.

        ``license`` is what the kernel is told; much of what a program can call wants one that is
        compatible with the GPL. Kinds of errors: ``verifier-rejected``, ``invalid``,
        ``not-supported``.
        """
        source = {
            "kind": "instructions",
            "instructions": base64.b64encode(instructions).decode(),
            "license": license,
            "name": name,
        }
        return await self._load(source, attach, lifetime, labels)

    @managed(load_object)
    async def loaded_object(self, loaded: answers.Loaded) -> None:
        """What ``load_object`` loads, as a context manager that unloads it, and detaches its links.

        Leaving the block does not wait for links that somebody else attached to fail: they are
        detached as well. Where the block fails, its error is the one that is raised.
        """
        await self._unload(loaded)

    @managed(load_builtin)
    async def loaded_builtin(self, loaded: answers.Loaded) -> None:
        """What ``load_builtin`` loads, as a context manager; as ``loaded_object``."""
        await self._unload(loaded)

    @listing
    def programs(self) -> Pages[answers.Program]:
        """The caller's programs; an administrator's are everyone's."""
        return self._pages("/programs")

    @operation
    async def program(self, id: str) -> answers.Program:  # noqa: A002 - the API's word
        """One program. ``not-found`` where there is none, or it is another user's."""
        return cast(answers.Program, await self._get(path_of("programs", id)))

    @operation
    async def delete_program(self, id: str, force: bool = False) -> None:  # noqa: A002
        """Unload a program. With links it is a ``conflict``, unless ``force`` detaches them."""
        await self._delete_program(id, force)

    async def _delete_program(self, id_: str, force: bool) -> None:
        await self._call("DELETE", path_of("programs", id_) + ("?force=true" if force else ""))

    async def _unload(self, loaded: answers.Loaded) -> None:
        """Unload all of it, as far as it is there still; the first error is raised at the end."""
        failure: Exception | None = None
        for each in loaded["programs"]:
            try:
                await self._delete_program(each["id"], force=True)
            except (NotFound, Gone):
                continue
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    async def _load(
        self,
        source: dict[str, Any],
        attach: str | None,
        lifetime: str,
        labels: Mapping[str, str] | None,
    ) -> answers.Loaded:
        body = {
            "source": source,
            "attach": attach,
            "lifetime": lifetime_body(lifetime),
            "labels": dict(labels or {}),
        }
        answer = await self._call("POST", "/programs", body, home=lifetime == "connection")
        return cast(answers.Loaded, object_of(answer))


def _variables(variables: Globals | None, max_entries: Mapping[str, int] | None) -> dict[str, Any]:
    return {
        "globals": {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in (variables or {}).items()
        },
        "max_entries": dict(max_entries or {}),
    }
