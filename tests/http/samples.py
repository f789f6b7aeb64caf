"""Requests that succeed, to be changed by each test."""

from __future__ import annotations

import base64
import json
import threading
from typing import Any, Protocol

#: ``r0 = 0; exit``
CODE = base64.b64encode(bytes.fromhex("b7000000000000009500000000000000")).decode()

#: What the fake kernel takes for an object: two programs that share a map.
ELF = base64.b64encode(b"\x7fELF and more").decode()

PERSISTENT = {"kind": "persistent"}
PROCESS = {"kind": "process"}


class Poster(Protocol):
    """Anything that can POST."""

    async def post(self, path: str, body: object) -> Any: ...


def instructions(**fields: Any) -> dict[str, Any]:
    """The body of a POST /programs."""
    source = {"kind": "instructions", "instructions": CODE, "license": "GPL", "name": "probe"}
    return {"source": source, "attach": "kprobe_multi", **fields}


def elf(**fields: Any) -> dict[str, Any]:
    """The body of a POST /programs with two programs and a map."""
    return {"source": {"kind": "object", "elf": ELF}, **fields}


def link(program: str, **fields: Any) -> dict[str, Any]:
    """The body of a POST /links."""
    body = {"program": program, "kind": "kprobe", "symbols": ["vfs_read"]}
    if "addresses" in fields or ("patterns" in fields and "symbols" not in fields):
        del body["symbols"]
    return {**body, **fields}


async def a_program(client: Poster, **fields: Any) -> str:
    """Load a program: its id."""
    made = await client.post("/programs", instructions(**fields))
    id_: str = made["programs"][0]["id"]
    return id_


async def a_link(client: Poster, program: str | None = None, **fields: Any) -> str:
    """Make a link: its id."""
    made = await client.post("/links", link(program or await a_program(client), **fields))
    id_: str = made["id"]
    return id_


def as_http(path: str, body: object) -> bytes:
    """A POST as bytes."""
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


class Gate:
    """A hook of the fake kernel that blocks: ``entered`` tells that it is in, ``open`` frees it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self._open.wait(30), "nobody opened the gate"

    def open(self) -> None:
        """Let it through, and all that come after."""
        self._open.set()
