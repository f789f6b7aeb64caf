"""Calls about what is in a map: entries, and the values of queues and stacks."""

from __future__ import annotations

import json
from typing import Any

from kpmd.api.entry_input import key_bytes, value_bytes
from kpmd.api.entry_text import EntryText, Rows
from kpmd.api.map_shapes import (
    DecodeQuery,
    DeletedAnswer,
    DeleteQuery,
    EntriesBody,
    EntriesPage,
    EntriesQuery,
    EntryAnswer,
    EntryBody,
    KeysBody,
    PushBody,
    ValueAnswer,
    WrittenAnswer,
)
from kpmd.api.route import Call, Reply, Route
from kpmd.bpf.abi import MapFlag
from kpmd.bpf.maps import Chunk
from kpmd.core.btf import BtfError
from kpmd.core.entries import Part, codec_of
from kpmd.core.model import Map
from kpmd.core.stacks import StackCodec
from kpmd.errors import Invalid, NotFound
from kpmd.runtime import maps
from kpmd.runtime.executor import Lane
from kpmd.runtime.kernel import MapContent

_STACKS = "stack_trace"


def text_of(call: Call, each: Map, content: MapContent, *, decode: bool) -> EntryText:
    """What writes the entries of a map. May take some milliseconds: for the pool."""
    if not decode:
        return EntryText(content.layout)
    value: Rows | None
    if each.type == _STACKS:
        flags = call.state.map_details[each.id].flags
        # Names of addresses tell where the kernel lies: they are for those who may list functions.
        rule = call.caller.rule
        named = call.caller.admin or (rule is not None and "symbols" in rule.rights)
        value = StackCodec(
            bool(flags & MapFlag.STACK_BUILD_ID), call.state.stacks.current if named else None
        )
    else:
        value = _codec(each, "value")
    return EntryText(content.layout, _codec(each, "key"), value)


def _codec(each: Map, part: Part) -> Rows | None:
    try:
        return codec_of(each, part)
    except BtfError:
        return None


def _lane(call: Call) -> Lane:
    """Where to read one entry: the symbols for stack traces may have to be read first."""
    each = call.state.registry.map(call.caller, call.path["id"])
    return Lane.PARSE if each.type == _STACKS else Lane.QUICK


async def list_entries(call: Call) -> Reply:
    """GET /maps/{id}/entries"""
    query: EntriesQuery = call.query

    def read(each: Map, content: MapContent) -> bytes:
        text = text_of(call, each, content, decode=query.decode)
        chunk = content.page(query.after, text.limit(query.limit), maps.PAGE_BYTES)
        items = ",".join(text.texts(chunk))
        return f'{{"items":[{items}],"next":{json.dumps(chunk.next)}}}'.encode()

    return Reply(await maps.use(call.state, call.caller, call.path["id"], read, lane=Lane.PARSE))


async def get_entry(call: Call) -> Reply:
    """GET /maps/{id}/entries/{key}"""
    query: DecodeQuery = call.query

    def read(each: Map, content: MapContent) -> bytes:
        key = key_bytes(each, call.path["key"], ["key"])
        value = content.lookup(key)
        if value is None:
            raise NotFound(f"map {each.id} has no entry {key.hex()}")
        chunk = Chunk(memoryview(key), memoryview(value), 1, None)
        return text_of(call, each, content, decode=query.decode).texts(chunk)[0].encode()

    lane = _lane(call)
    return Reply(await maps.use(call.state, call.caller, call.path["id"], read, lane=lane))


async def put_entry(call: Call) -> Reply:
    """PUT /maps/{id}/entries/{key}"""
    body: EntryBody = call.body

    def write(each: Map, content: MapContent) -> None:
        key = key_bytes(each, call.path["key"], ["key"])
        content.update([(key, value_bytes(each, content.layout, body))], body.mode)

    await maps.use(call.state, call.caller, call.path["id"], write, touch=True)
    return Reply(status=204)


async def put_entries(call: Call) -> Reply:
    """PUT /maps/{id}/entries"""
    body: EntriesBody = call.body

    def write(each: Map, content: MapContent) -> None:
        items = [
            (
                key_bytes(each, item.key, ["items", number, "key"]),
                value_bytes(each, content.layout, item, ["items", number]),
            )
            for number, item in enumerate(body.items)
        ]
        content.update(items, body.mode)

    call.what["entries"] = len(body.items)
    await maps.use(call.state, call.caller, call.path["id"], write, touch=True, lane=Lane.PARSE)
    return Reply(WrittenAnswer(written=len(body.items)))


async def delete_entry(call: Call) -> Reply:
    """DELETE /maps/{id}/entries/{key}"""

    def remove(each: Map, content: MapContent) -> None:
        key = key_bytes(each, call.path["key"], ["key"])
        if not content.delete([key]):
            raise NotFound(f"map {each.id} has no entry {key.hex()}")

    await maps.use(call.state, call.caller, call.path["id"], remove, touch=True)
    return Reply(status=204)


async def delete_entries(call: Call) -> Reply:
    """DELETE /maps/{id}/entries"""
    body: KeysBody = call.body
    query: DeleteQuery = call.query
    id_, given = call.path["id"], body.keys
    if query.all is (given is not None):
        raise Invalid.at(["keys"], "give the keys to delete, or else ?all=true for all entries")
    if given is None:
        deleted = asked = await maps.clear(call.state, call.caller, id_)
    else:
        keys, asked = given, len(given)

        def remove(each: Map, content: MapContent) -> int:
            return content.delete(
                [key_bytes(each, key, ["keys", number]) for number, key in enumerate(keys)]
            )

        deleted = await maps.use(call.state, call.caller, id_, remove, touch=True, lane=Lane.PARSE)
    call.what["entries"] = deleted
    return Reply(DeletedAnswer(deleted=deleted, missing=asked - deleted))


async def push(call: Call) -> Reply:
    """POST /maps/{id}/push"""
    body: PushBody = call.body

    def add(each: Map, content: MapContent) -> None:
        content.push(value_bytes(each, content.layout, body), overwrite=body.overwrite)

    await maps.use(call.state, call.caller, call.path["id"], add, touch=True)
    return Reply(status=204)


async def _next_value(call: Call, *, keep: bool) -> Reply:
    def take(each: Map, content: MapContent) -> bytes:
        value = content.pop(keep=keep)
        if value is None:
            raise NotFound(f"map {each.id} is empty")
        return text_of(call, each, content, decode=call.query.decode).value(value).encode()

    return Reply(await maps.use(call.state, call.caller, call.path["id"], take, touch=not keep))


async def pop(call: Call) -> Reply:
    """POST /maps/{id}/pop"""
    return await _next_value(call, keep=False)


async def peek(call: Call) -> Reply:
    """GET /maps/{id}/peek"""
    return await _next_value(call, keep=True)


_COMMON: dict[str, Any] = {"right": "maps", "tag": "maps"}
_READ = ("not-found", "not-supported", "too-large", "kernel")
_WRITE = (*_READ, "conflict")

ROUTES = [
    Route(
        "GET",
        "/maps/{id}/entries",
        list_entries,
        "A page of a map's entries",
        EntriesPage,
        query=EntriesQuery,
        errors=_READ,
        **_COMMON,
    ),
    Route(
        "PUT",
        "/maps/{id}/entries",
        put_entries,
        "Write entries; where one fails, `done` tells how many were written before it",
        WrittenAnswer,
        body=EntriesBody,
        errors=_WRITE,
        **_COMMON,
    ),
    Route(
        "DELETE",
        "/maps/{id}/entries",
        delete_entries,
        "Delete entries: those of some keys, or all",
        DeletedAnswer,
        query=DeleteQuery,
        body=KeysBody,
        optional_body=True,
        errors=_READ,
        **_COMMON,
    ),
    Route(
        "GET",
        "/maps/{id}/entries/{key}",
        get_entry,
        "One entry; the key is in hex, or `json:` and JSON",
        EntryAnswer,
        query=DecodeQuery,
        errors=_READ,
        **_COMMON,
    ),
    Route(
        "PUT",
        "/maps/{id}/entries/{key}",
        put_entry,
        "Write an entry; the key is in hex, or `json:` and JSON",
        None,
        status=204,
        body=EntryBody,
        errors=_WRITE,
        **_COMMON,
    ),
    Route(
        "DELETE",
        "/maps/{id}/entries/{key}",
        delete_entry,
        "Delete an entry; the key is in hex, or `json:` and JSON",
        None,
        status=204,
        errors=_READ,
        **_COMMON,
    ),
    Route(
        "POST",
        "/maps/{id}/push",
        push,
        "Push a value to a queue or stack",
        None,
        status=204,
        body=PushBody,
        errors=_READ,
        **_COMMON,
    ),
    Route(
        "POST",
        "/maps/{id}/pop",
        pop,
        "Take the next value out of a queue or stack; `not-found` where it is empty",
        ValueAnswer,
        query=DecodeQuery,
        errors=_READ,
        **_COMMON,
    ),
    Route(
        "GET",
        "/maps/{id}/peek",
        peek,
        "The next value of a queue or stack, which stays there",
        ValueAnswer,
        query=DecodeQuery,
        errors=_READ,
        **_COMMON,
    ),
]
