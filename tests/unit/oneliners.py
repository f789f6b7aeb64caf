"""A daemon of scripted answers for the one-liners: a builtin's programs, maps and records."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from tests.unit.test_client import http, problem

#: Functions that everything is attached to.
FUNCTIONS = {0x1000: ("vfs_read", None), 0x2000: ("nf_hook", "nf_tables")}


def u64(value: int) -> str:
    """A number in hex, as it lies in memory."""
    return value.to_bytes(8, sys.byteorder).hex()


def chunked(*lines: object) -> bytes:
    """A stream of these lines, which goes on unless the last is None."""
    head = (
        "HTTP/1.1 200 X\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    pieces = [b"" if line is None else json.dumps(line).encode() + b"\n" for line in lines]
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in pieces)


class FakeBuiltin:
    """Answers as the daemon does for a builtin; what is asked of it is kept.

    ``programs`` are those it is made of, by name, with what they are attached as; ``maps`` have
    their entries, ``variables`` the counters of what is lost. ``records`` come once; whoever asks
    for them again is told that the map has ended, unless there are ``more``.
    """

    def __init__(
        self,
        programs: Mapping[str, str],
        maps: Mapping[str, Sequence[Mapping[str, Any]]],
        records: Sequence[object] = (),
        variables: Mapping[str, int] | None = None,
        missed: int | None = 0,
        more: Sequence[object] | None = None,
    ) -> None:
        self.programs = programs
        self.maps = maps
        self.streams = [records] if more is None else [records, more]
        self.variables = dict(variables or {})
        self.missed = missed
        self.loads: list[Any] = []
        self.links: list[Any] = []
        self.deleted: list[str] = []

    def __call__(self, method: str, target: str, body: Any) -> bytes:
        path = target.partition("?")[0]
        if method == "DELETE":
            self.deleted.append(path)
            return b"HTTP/1.1 204 No Content\r\n\r\n"
        if (method, path) == ("POST", "/programs"):
            self.loads.append(body)
            assert body["lifetime"] == {"kind": "process"}
            programs = [
                {"id": f"prg-{name}", "name": name, "attach": attach}
                for name, attach in self.programs.items()
            ]
            maps = [{"id": f"map-{name}", "name": name} for name in self.maps]
            return http({"programs": programs, "maps": maps}, 201)
        if (method, path) == ("POST", "/links"):
            self.links.append(body)
            assert body["lifetime"] == {"kind": "process"}
            return http(self._link(f"lnk-{body['kind']}"), 201)
        if path.startswith("/links/lnk-") and path.count("/") == 2:
            return http(self._link(path.rpartition("/")[2]))
        if path.endswith("/records"):
            return chunked(*self.streams.pop(0)) if self.streams else problem("not-found", 404)
        return http({"items": self._items(path), "next": None})

    def _link(self, id_: str) -> dict[str, Any]:
        return {"id": id_, "count": len(FUNCTIONS), "missed": self.missed}

    def _items(self, path: str) -> list[Any]:
        if path == "/work":  # asked for where the machine is slow
            return []
        if path.endswith("/targets"):
            return [
                {"address": f"0x{address:016x}", "symbol": name, "module": module, "cookie": "0"}
                for address, (name, module) in FUNCTIONS.items()
            ]
        if path.endswith("/globals"):
            found = [
                {"name": name, "section": ".bss", "size": 8, "value": u64(value)}
                for name, value in self.variables.items()
            ]
            return [*found, {"name": "target_pid", "section": ".rodata", "size": 4, "value": "0"}]
        return list(self.maps[path.removeprefix("/maps/map-").removesuffix("/entries")])


def latency(total: int, longest: int, slots: Mapping[int, int]) -> str:
    """The builtin's struct latency, in hex."""
    counts = [slots.get(slot, 0) for slot in range(64)]
    return struct.pack("=67Q", sum(counts), total, longest, *counts).hex()


def parsed(picture: bytes) -> ElementTree.Element:
    """A picture that was drawn here."""
    return ElementTree.fromstring(picture)  # noqa: S314 - our own
