"""Calls about the global variables of programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from kpmd.api.bodies import PageQuery
from kpmd.api.entry_input import check_one, encode, hex_bytes
from kpmd.api.map_shapes import GlobalAnswer, GlobalBody, GlobalsPage
from kpmd.api.paging import cursor, position
from kpmd.api.route import Call, Reply, Route
from kpmd.core.btf import BtfError
from kpmd.core.entries import Variable, variables
from kpmd.core.model import Map
from kpmd.errors import Invalid, NotFound, NotSupported
from kpmd.runtime import maps
from kpmd.runtime.kernel import MapContent

Open = Callable[[Map], MapContent]

#: What ends a page: so many bytes of JSON, or seconds. Types can be made to take long to find
#: undecodable.
_PAGE_TEXT = 512 << 10
_PAGE_SECONDS = 0.1


def _variables(found: list[Map]) -> list[Variable]:
    """The variables of an object. Raises NotSupported where it does not name them."""
    try:
        if any(each.types is None for each in found):
            raise BtfError("it has none: compile it with -g")
        return list(variables(found))
    except BtfError as error:
        raise NotSupported(
            f"the object's BTF does not tell of its variables ({error}); "
            "GET /maps/{id}/entries has the bytes of each section"
        ) from None


def _find(found: list[Map], name: str) -> Variable:
    for each in _variables(found):
        if each.name == name:
            return each
    raise NotFound(f"the program's object has no global variable {name!r}")


class _Sections:
    """The bytes of sections, each read once."""

    def __init__(self, open_: Open) -> None:
        self._open = open_
        self._read: dict[str, bytes] = {}

    def text(self, each: Variable) -> str:
        """A variable as the API shows it."""
        if each.map.id not in self._read:
            value = self._open(each.map).lookup(bytes(each.map.key_size))
            self._read[each.map.id] = value or bytes(each.map.value_size)
        raw = self._read[each.map.id][each.offset : each.offset + each.size]
        told = {
            "name": each.name,
            "section": each.section,
            "map": each.map.id,
            "type": None,
            "size": each.size,
            "writable": each.writable,
            "value": raw.hex(),
        }
        try:
            codec = each.codec()
            decoded = codec.rows(raw, 0, len(raw))[0]
        except BtfError:
            return json.dumps(told)
        return f'{json.dumps(told | {"type": codec.name})[:-1]}, "decoded": {decoded}}}'


async def list_globals(call: Call) -> Reply:
    """GET /programs/{id}/globals"""
    query: PageQuery = call.query
    first = position(query.after)

    def read(found: list[Map], open_: Open) -> bytes:
        sections = _Sections(open_)
        listed = _variables(found)
        texts: list[str] = []
        length, began = 0, time.monotonic()
        for each in listed[first : first + query.limit]:
            texts.append(sections.text(each))
            length += len(texts[-1])
            if length > _PAGE_TEXT or time.monotonic() - began > _PAGE_SECONDS:
                break
        behind = first + len(texts)
        following = cursor(behind if behind < len(listed) else None)
        return f'{{"items":[{",".join(texts)}],"next":{json.dumps(following)}}}'.encode()

    return Reply(await maps.use_all(call.state, call.caller, call.path["id"], read))


async def get_global(call: Call) -> Reply:
    """GET /programs/{id}/globals/{name}"""

    def read(found: list[Map], open_: Open) -> bytes:
        return _Sections(open_).text(_find(found, call.path["name"])).encode()

    return Reply(await maps.use_all(call.state, call.caller, call.path["id"], read))


async def put_global(call: Call) -> Reply:
    """PUT /programs/{id}/globals/{name}"""
    body: GlobalBody = call.body
    check_one(body)

    def write(found: list[Map], open_: Open) -> None:
        each = _find(found, call.path["name"])
        if not each.writable:
            raise NotSupported(
                f"{each.name} is a constant, in {each.section}: it is given its value when the "
                "object is loaded (source.globals)"
            )
        open_(each.map).write_at(each.offset, _bytes(each, body))

    await maps.use_all(call.state, call.caller, call.path["id"], write, touch=True)
    return Reply(status=204)


def _bytes(each: Variable, body: GlobalBody) -> bytes:
    if body.value is not None:
        return hex_bytes(body.value, each.size, f"this variable has {each.size}", ["value"])
    try:
        codec = each.codec()
    except BtfError as error:
        reason = f"cannot be encoded, give it in hex: {error}"
        raise Invalid.at(["decoded"], reason) from None
    return encode(codec, body.decoded, each.size, ["decoded"])


_READ = ("not-found", "not-supported", "too-large", "kernel")

ROUTES = [
    Route(
        "GET",
        "/programs/{id}/globals",
        list_globals,
        "The global variables of a program's object",
        GlobalsPage,
        query=PageQuery,
        right="maps",
        errors=_READ,
        tag="maps",
    ),
    Route(
        "GET",
        "/programs/{id}/globals/{name}",
        get_global,
        "One global variable",
        GlobalAnswer,
        right="maps",
        errors=_READ,
        tag="maps",
    ),
    Route(
        "PUT",
        "/programs/{id}/globals/{name}",
        put_global,
        "Write a global variable while its programs run",
        None,
        status=204,
        body=GlobalBody,
        right="maps",
        errors=_READ,
        tag="maps",
    ),
]
