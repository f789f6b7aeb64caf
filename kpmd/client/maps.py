"""Calls about maps: what is in them, and what comes out of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

from kpmd.client import answers
from kpmd.client.calls import Calls, Pages, path_of
from kpmd.client.errors import NotSupported, ProtocolError
from kpmd.client.lines import Lines, OnGap
from kpmd.client.operation import listing, operation
from kpmd.client.records import RecordLines
from kpmd.client.streams import streaming

#: Anything that JSON can write.
Json: TypeAlias = "bool | int | float | str | list[Any] | dict[str, Any] | None"


def _key(key: bytes | str) -> str:
    return key if isinstance(key, str) else key.hex()


def value_body(value: bytes | Sequence[bytes] | Json) -> dict[str, Any]:
    """A value in the body of a request: bytes in hex, all else to be encoded by the daemon."""
    if isinstance(value, bytes):
        return {"value": value.hex()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = [each.hex() for each in value if isinstance(each, bytes)]
        if shown and len(shown) == len(value):
            return {"value": shown}
    return {"decoded": value}


class MapCalls(Calls):
    """The part of both clients that is about maps."""

    @listing
    def maps(self) -> Pages[answers.Map]:
        """The maps of the caller's programs."""
        return self._pages("/maps")

    @operation
    async def map(self, id: str) -> answers.Map:  # noqa: A002 - the API's word
        """One map. ``not-found`` where there is none, or its last program has ended."""
        return cast(answers.Map, await self._get(path_of("maps", id)))

    @operation
    async def map_fd(self, id: str) -> int:  # noqa: A002 - the API's word
        """A map's file descriptor: the caller's, to be closed by them.

        It is good for mmap(2) or bpf(2), as docs/handover.md tells, without any capability. Not
        over ssh. Kinds of errors: ``not-found``, ``not-supported`` (of this type of map, or over
        ssh), ``forbidden``.
        """
        if not self._way.carries_fds:
            detail = (
                f"a file descriptor cannot come over {self._way.name}: run this on that machine, "
                "or read the map's entries or records instead"
            )
            raise NotSupported("not-supported", 501, detail, {})
        fds: list[int] = []
        try:
            await self._call("POST", path_of("maps", id, "fd"), fds=fds)
            if not fds:
                raise ProtocolError("the daemon's answer came without the map's file descriptor")
            return fds.pop(0)
        finally:
            for each in fds:
                os.close(each)

    @listing
    def entries(self, map: str) -> Pages[answers.Entry]:  # noqa: A002 - the API's word
        """The entries of the map of this id, in the kernel's order.

        In a hash whose entries are deleted meanwhile the kernel may give some twice, or not at all.
        """
        return self._pages(path_of("maps", map, "entries"))

    @operation
    async def entry(self, map: str, key: bytes | str) -> answers.Entry:  # noqa: A002
        """One entry; ``key`` as for ``put_entry``. ``not-found`` where the map has none such."""
        return cast(answers.Entry, await self._get(path_of("maps", map, "entries", _key(key))))

    @operation
    async def put_entry(
        self,
        map: str,  # noqa: A002 - the API's word
        key: bytes | str,
        value: bytes | Sequence[bytes] | Json,
        mode: answers.Mode = "any",
    ) -> None:
        """Write one entry. ``conflict`` or ``not-found`` where the mode does not let it.

        ``key`` is the key's bytes, or text as in the API's path (hex, or JSON behind ``json:``).
        ``value`` is bytes (of per-CPU maps one for all CPUs, or a sequence with one for each), or
        in JSON what the object's BTF makes bytes of. With the mode ``"create"`` it is never sent
        twice.
        """
        path = path_of("maps", map, "entries", _key(key))
        body = {**value_body(value), "mode": mode}
        await self._call("PUT", path, body, idempotent=mode != "create")

    @operation
    async def delete_entry(self, map: str, key: bytes | str) -> None:  # noqa: A002
        """Delete one entry; ``key`` as for ``put_entry``. ``not-found`` where there is none."""
        await self._call("DELETE", path_of("maps", map, "entries", _key(key)))

    # Global variables

    @listing
    def globals(self, program: str) -> Pages[answers.Global]:
        """The global variables of a program's object."""
        return self._pages(path_of("programs", program, "globals"))

    @operation
    async def get_global(self, program: str, name: str) -> answers.Global:
        """One global variable. ``not-found`` where the object has none of this name."""
        return cast(answers.Global, await self._get(path_of("programs", program, "globals", name)))

    @operation
    async def set_global(self, program: str, name: str, value: bytes | Json) -> None:
        """Write a global variable while its programs run.

        ``value`` is its bytes, or in JSON what its type makes bytes of. ``not-supported`` for a
        constant.
        """
        path = path_of("programs", program, "globals", name)
        await self._call("PUT", path, value_body(value))

    # Records

    @streaming
    def records(
        self,
        map: str,  # noqa: A002 - the API's word
        type: str | None = None,  # noqa: A002 - the API's word
        on_gap: OnGap | None = None,
    ) -> Lines[answers.Record]:
        """The records of a ring buffer or perf event array, as they come; what is there first.

        ``type``: the struct in the object's BTF that each record is; without it the daemon finds it
        where it can. They come over a connection of its own, without a timeout, and end when the
        map does. An item that has ``lost`` in the place of ``data`` tells how many records are
        missing there, and why: nothing is left out in silence. Records that are read are gone for
        who reads the map later; everybody who reads it at the same time gets all of them.

        Raises ``ApiError`` where the map has no records, or no such struct, and
        ``ConnectionFailed`` with the reason ``"lost"`` where the daemon cut it off. With ``on_gap``
        it connects again instead, as ``events`` does: the map stays over a restart of the daemon
        where its programs do. Each time ``on_gap`` is called with a sentence, since records that
        were on their way are missing.
        """
        path = path_of("maps", map, "records")
        return self._stream(RecordLines(self._way, self._patience, on_gap, path, type))
