"""Calls about maps: what is in them, and what comes out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

from kpmd.client import answers
from kpmd.client.calls import Calls, path_of
from kpmd.client.records import Records

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
    """The part of ``Client`` that is about maps."""

    def maps(self) -> list[answers.Map]:
        """The maps of the caller's programs."""
        return list(self._pages("/maps"))

    def map(self, id: str) -> answers.Map:  # noqa: A002 - the API's word
        """One map. ``not-found`` where there is none, or its last program has ended."""
        return cast(answers.Map, self._get(path_of("maps", id)))

    def entries(self, map: str) -> Iterator[answers.Entry]:  # noqa: A002 - the API's word
        """The entries of the map of this id, in the kernel's order, page by page.

        In a hash whose entries are deleted meanwhile the kernel may give some twice, or not at all.
        """
        return self._pages(path_of("maps", map, "entries"))

    def entry(self, map: str, key: bytes | str) -> answers.Entry:  # noqa: A002 - the API's word
        """One entry; ``key`` as for ``put_entry``. ``not-found`` where the map has none such."""
        return cast(answers.Entry, self._get(path_of("maps", map, "entries", _key(key))))

    def put_entry(
        self,
        map: str,  # noqa: A002 - the API's word
        key: bytes | str,
        value: bytes | Sequence[bytes] | Json,
        mode: answers.Mode = "any",
    ) -> None:
        """Write one entry. ``conflict`` or ``not-found`` where the mode does not let it.

        ``key`` is the key's bytes, or text as in the API's path (hex, or JSON behind ``json:``).
        ``value`` is bytes (of per-CPU maps one for all CPUs, or a sequence with one for each), or
        in JSON what the object's BTF makes bytes of.
        """
        path = path_of("maps", map, "entries", _key(key))
        self._connection.call("PUT", path, {**value_body(value), "mode": mode})

    def delete_entry(self, map: str, key: bytes | str) -> None:  # noqa: A002 - the API's word
        """Delete one entry; ``key`` as for ``put_entry``. ``not-found`` where there is none."""
        self._connection.call("DELETE", path_of("maps", map, "entries", _key(key)))

    # Global variables

    def globals(self, program: str) -> Iterator[answers.Global]:
        """The global variables of a program's object."""
        return self._pages(path_of("programs", program, "globals"))

    def get_global(self, program: str, name: str) -> answers.Global:
        """One global variable. ``not-found`` where the object has none of this name."""
        return cast(answers.Global, self._get(path_of("programs", program, "globals", name)))

    def set_global(self, program: str, name: str, value: bytes | Json) -> None:
        """Write a global variable while its programs run.

        ``value`` is its bytes, or in JSON what its type makes bytes of. ``not-supported`` for a
        constant.
        """
        path = path_of("programs", program, "globals", name)
        self._connection.call("PUT", path, value_body(value))

    # Records

    def records(self, map: str, type: str | None = None) -> Records:  # noqa: A002 - the API's words
        """The records of a ring buffer or perf event array, as they come; what is there first.

        ``type``: the struct in the object's BTF that each record is; without it the daemon finds it
        where it can. Returns an iterator over a connection of its own; close it, or use it as a
        context manager. It waits for the next record without a timeout, and comes to its end when
        the map does. An item that has ``lost`` in the place of ``data`` tells how many records are
        missing there, and why: nothing is left out in silence. Records that are read are gone for
        who reads the map later; everybody who reads it at the same time gets all of them.

        Raises ``ApiError`` where the map has no records, or no such struct, and
        ``ConnectionFailed`` with the reason ``"lost"`` where the daemon cut it off.
        """
        made = Records(self._connection.another(), map, type)
        self._streams.add(made)
        return made
