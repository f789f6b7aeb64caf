"""Heads and bodies of requests: read within their bounds of size and time, and parsed."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any, TypeVar

from aiohttp import HttpVersion11, web
from pydantic import BaseModel
from pydantic_core import from_json

from kpmd.api.guard import LARGE_BODY, Guard
from kpmd.core.model import Caller
from kpmd.errors import Invalid, Malformed, TooLarge, TooSlow

M = TypeVar("M", bound=BaseModel)

#: Marks requests in a version of HTTP that is neither 1.0 nor 1.1.
OTHER_VERSION = web.RequestKey("other_version", bool)

#: Bytes of a request's head at the most.
MAX_HEAD = 32 << 10

#: Seconds that a body may take to come, and bytes for each of which there is more time.
BODY_SECONDS = 30.0
BODY_BYTES_PER_SECOND = 64 << 10

#: Arrays and objects in a body at the most, counted by their brackets; no call takes many. Each is
#: a thing of its own in memory, and a million of them take half a second to make.
_MOST_CONTAINERS = 8192

#: Members of a JSON object at the most.
_MOST_MEMBERS = 4096


def check_head(request: web.BaseRequest) -> None:
    """Raise Malformed where the head of a request is too large, is of another version of HTTP, or
    expects what is not to be had.

    Of heads that come in pieces the connection has counted the bytes before they were complete.
    """
    if OTHER_VERSION in request:
        raise Malformed("this is another version of HTTP: speak HTTP/1.1")
    size = len(request.path_qs) + sum(len(name) + len(value) for name, value in request.raw_headers)
    if size > MAX_HEAD:
        raise Malformed(f"the head of the request is over {MAX_HEAD} bytes")
    if request.headers.get("Expect", "100-continue").lower() != "100-continue":
        raise Malformed("there is only one Expect: 100-continue")


async def read_body(
    request: web.BaseRequest, caller: Caller, most: int, guard: Guard, held: ExitStack
) -> bytes | bytearray:
    """The body of a request, of ``most`` bytes, or less if the caller's limit is.

    What it counts for, if it is large, is left to ``held``. Raises TooLarge, TooSlow, Quota.
    """
    most = min(most, caller.limits.body_bytes)
    length = request.content_length
    if length is not None and length > most:
        raise _too_large(most)
    if request.content.is_eof() and request.content.total_bytes < LARGE_BODY:
        return request.content.read_nowait()
    if length is None or length >= LARGE_BODY:
        # One whose length is not told may become as large as it may.
        held.enter_context(guard.body(caller, most if length is None else length))
    return await _receive(request, caller, most, guard)


async def _receive(
    request: web.BaseRequest, caller: Caller, most: int, guard: Guard
) -> bytes | bytearray:
    """What comes, until its end. Raises TooLarge, TooSlow."""
    if "Expect" in request.headers and request.version >= HttpVersion11:
        # What curl waits for before it sends a large body (RFC 9110, 10.1.1).
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # What was written before the headers does not count as output of the answer.
        request.writer.output_size = 0
    body = bytearray()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        async with asyncio.timeout(BODY_SECONDS) as limit:
            while piece := await request.content.readany():
                body += piece
                if len(body) > most:
                    raise _too_large(most)
                limit.reschedule(begun + BODY_SECONDS + len(body) / BODY_BYTES_PER_SECOND)
                # Chunks of a byte are as dear as requests: they take turns with them.
                await guard.turnstile.enter(caller.uid)
    except TimeoutError:
        raise TooSlow(
            f"the body took too long to come: there are {BODY_SECONDS:g} s, and one more for each "
            f"{BODY_BYTES_PER_SECOND} bytes"
        ) from None
    return body


def _too_large(most: int) -> TooLarge:
    return TooLarge(
        f"the body is over {most} bytes; GET /capabilities has the limit as limits.body_bytes"
    )


def parse(model: type[M], raw: bytes | bytearray) -> M:
    """A body as its model. Raises Malformed, Invalid, ValidationError."""
    if len(raw) > _MOST_CONTAINERS and raw.count(b"[") + raw.count(b"{") > _MOST_CONTAINERS:
        raise Malformed(f"the body has more than {_MOST_CONTAINERS} brackets")
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise Malformed(f"the body is not JSON: {error}") from None
    _check_sizes(data, [])
    return model.model_validate(data)


def _check_sizes(data: Any, loc: list[str | int]) -> None:
    """Refuse an object with so many members that telling what is wrong with each is a burden."""
    if not isinstance(data, dict):
        return
    if len(data) > _MOST_MEMBERS:
        raise Invalid.at(loc or ["body"], f"has more than {_MOST_MEMBERS} members")
    for name, value in data.items():
        _check_sizes(value, [*loc, name])
