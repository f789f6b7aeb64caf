"""Records as text that outlives the daemon, and back. The version is that of the form.

A newer daemon reads every older version; what cannot be read is ``Unreadable``, and its owner
treats it as a thing of which only the kernel knows something.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kpmd.core.model import Client, Lease, Lifetime, Link, Map, Program, Skipped, Targets
from kpmd.core.types import ObjectTypes

VERSION = 1


class Unreadable(ValueError):
    """It is no state, or one of a version that is not known here."""


@dataclass(frozen=True)
class Carried:
    """What one state tells: one of these; a program with its maps, in the order of their FDs."""

    record: Client | Lease | Program | Link
    maps: tuple[Map, ...] = ()


def head(record: Client | Lease | Program | Link) -> dict[str, Any]:
    """The part that changes while the record lives; short."""
    made: dict[str, Any] = {"kpmd": VERSION, "kind": _KINDS[type(record)]}
    if isinstance(record, Lease):
        made |= {"ttl": record.ttl, "deadline": record.deadline}
    elif isinstance(record, Program):
        made |= {"released": record.released, **_life(record)}
    elif isinstance(record, Link):
        made |= {"detaching": record.detaching, **_life(record)}
    return made


def _life(record: Program | Link) -> dict[str, Any]:
    """What it lives as long as: changes where nobody can tell any more when that ends."""
    lifetime = record.lifetime
    return {"lifetime": [lifetime.kind, lifetime.lease], "anchor": record.anchor}


def body(record: Client | Lease | Program | Link, maps: tuple[Map, ...] = ()) -> bytes:
    """The part that does not change."""
    made = _plain(record)
    if maps:
        made["map_records"] = [_plain(each) for each in maps]
        types = next((each.types for each in maps if each.types), None)
        if types is not None:
            # All maps of a program are of one object.
            made["types"] = base64.b64encode(zlib.compress(types.raw)).decode()
    return json.dumps(made).encode()


def read(head_: Mapping[str, Any], body_: bytes) -> Carried:
    """A record from its state. Raises Unreadable."""
    version = head_.get("kpmd")
    if version != VERSION:
        raise Unreadable(f"the state has version {version!r}; this kpmd reads {VERSION}")
    try:
        data = json.loads(body_)
        kind = head_["kind"]
        if kind == "client":
            return Carried(_record(Client, data))
        if kind == "lease":
            lease = {**data, "ttl": head_["ttl"], "deadline": head_["deadline"]}
            return Carried(_record(Lease, lease))
        if kind == "program":
            maps = tuple(_record(Map, each) for each in data.pop("map_records", ()))
            types = data.pop("types", None)
            if types is not None:
                shared = ObjectTypes(zlib.decompress(base64.b64decode(types, validate=True)))
                for each in maps:
                    each.types = shared
            program = _record(Program, {**data, **_changed(head_, "released")})
            if sorted(each.id for each in maps) != sorted(program.maps):
                raise ValueError("the maps are not those of the program")
            return Carried(program, maps)
        if kind == "link":
            return Carried(_record(Link, {**data, **_changed(head_, "detaching")}))
    except _NONSENSE as error:
        raise Unreadable(f"the state cannot be read: {error!r}") from error
    raise Unreadable(f"the state is of a kind that is not known here: {kind!r}")


def _changed(head_: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: head_[name] for name in ("lifetime", "anchor", *names)}


#: What a state that nobody here has written can lead to.
_NONSENSE = (KeyError, TypeError, ValueError, AttributeError, RecursionError, zlib.error)

_KINDS: dict[type[Any], str] = {
    Client: "client",
    Lease: "lease",
    Program: "program",
    Link: "link",
}

#: What a daemon finds out anew, or the head tells.
_LEFT_OUT = {
    Client: ("connections", "requests", "programs", "links", "leases", "ended", "process"),
    Lease: ("ttl", "deadline"),
    Program: ("links", "holds", "released", "lifetime", "anchor"),
    Map: ("programs", "types"),
    Link: ("detaching", "lifetime", "anchor"),
}


def _plain(record: Client | Lease | Program | Map | Link) -> dict[str, Any]:
    left_out = _LEFT_OUT[type(record)]
    return {
        each.name: _value(getattr(record, each.name))
        for each in fields(record)
        if each.name not in left_out
    }


def _value(value: Any) -> Any:
    if isinstance(value, Targets):
        return {
            "names": value.names,
            "addresses": _packed(value.addresses),
            "cookies": _packed(value.cookies),
            "modules": list(value.modules.items()),
        }
    if isinstance(value, tuple) and value and isinstance(value[0], Skipped):
        return [[each.symbol, each.module, each.reason, each.detail] for each in value]
    return value


def _packed(numbers: array[int]) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _unpacked(text: str) -> array[int]:
    numbers = array("Q")
    numbers.frombytes(base64.b64decode(text, validate=True))
    return numbers


R = TypeVar("R", Client, Lease, Program, Map, Link)

_READ: dict[str, Any] = {
    "lifetime": lambda value: Lifetime(*value),
    "targets": lambda value: Targets(
        tuple(value["names"]),
        _unpacked(value["addresses"]),
        _unpacked(value["cookies"]),
        {int(position): module for position, module in value["modules"]},
    ),
    "skipped": lambda value: tuple(Skipped(*each) for each in value),
    "maps": tuple,
}


def _record(kind: type[R], data: Mapping[str, Any]) -> R:
    """A record of its fields; those that it does not know are of a newer kpmd, and left out.

    Raises TypeError where a field is not of its type: what is wrong here would break things later.
    """
    hints = get_type_hints(kind)
    made = kind(
        **{
            name: _READ[name](value) if name in _READ else value
            for name, value in data.items()
            if name in hints
        }
    )
    for name, hint in hints.items():
        if not _fits(getattr(made, name), hint):
            raise TypeError(f"{name} is not of its type")
    return made


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as records have such types."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is UnionType or origin is Union:
        return any(_fits(value, each) for each in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, arguments[0]) and _fits(each, arguments[1]) for key, each in value.items()
        )
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is Lifetime:
        return isinstance(value, Lifetime) and all(
            _fits(getattr(value, name), each) for name, each in get_type_hints(Lifetime).items()
        )
    kind = origin or hint
    return type(value) is kind if kind in (int, bool) else isinstance(value, kind)
