"""The stream of a whole map."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from kpmd.api.entry_text import octets
from kpmd.api.map_entries import text_of
from kpmd.api.map_shapes import DecodeQuery, EntryAnswer
from kpmd.api.route import Call, Reply, Route
from kpmd.core.model import Map
from kpmd.errors import KpmdError
from kpmd.runtime import maps
from kpmd.runtime.executor import Lane
from kpmd.runtime.kernel import MapContent

NDJSON = "application/x-ndjson"
OCTETS = "application/octet-stream"

#: Entries that are read at once, and bytes of them in the kernel, or one entry. Each time costs the
#: way to the pool and back, which a small piece would not be worth.
_ENTRIES = {NDJSON: 4096, OCTETS: 65536}
_BYTES = 1 << 20

#: Seconds that a reader may take to read a piece.
_SECONDS = 60.0

#: A piece of the stream, and the cursor of the next one; None: it was the last.
Piece = tuple[bytes, str | None]


class Dump:
    """A map piece by piece: each is read when the one before it has been taken."""

    def __init__(
        self, content_type: str, first: Piece, read: Callable[[str], Awaitable[Piece]]
    ) -> None:
        self.content_type = content_type
        self._first = first
        self._read = read

    async def begin(self, abort: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """The pieces. Where one cannot be read the connection is cut: nobody takes that for all."""
        piece, following = self._first
        while True:
            late = asyncio.get_running_loop().call_later(_SECONDS, abort)
            try:
                yield piece
            finally:
                late.cancel()
            if following is None:
                return
            try:
                piece, following = await self._read(following)
            except KpmdError as error:
                raise ConnectionAbortedError(error.detail) from error

    def close(self) -> None:
        """Nobody reads any more."""


async def dump(call: Call) -> Reply:
    """GET /maps/{id}/dump"""
    query: DecodeQuery = call.query
    kind = OCTETS if OCTETS in call.headers.get("Accept", "").lower() else NDJSON

    async def read(after: str | None) -> Piece:
        def work(each: Map, content: MapContent) -> Piece:
            if kind == OCTETS:
                chunk = content.page(after, _ENTRIES[kind], _BYTES)
                return octets(content.layout, chunk), chunk.next
            text = text_of(call, each, content, decode=query.decode)
            chunk = content.page(after, text.limit(_ENTRIES[kind]), _BYTES)
            lines = text.texts(chunk)
            return "\n".join([*lines, ""]).encode(), chunk.next

        return await maps.use(call.state, call.caller, call.path["id"], work, lane=Lane.PARSE)

    # The first one before the answer begins: what is wrong with the map is told as an error.
    return Reply(Dump(kind, await read(None), read))


ROUTES = [
    Route(
        "GET",
        "/maps/{id}/dump",
        dump,
        "All entries of a map: a line of JSON each, or the bytes of key and value, one after the "
        "other",
        EntryAnswer,
        query=DecodeQuery,
        streams=(NDJSON, OCTETS),
        right="maps",
        errors=("not-found", "not-supported", "too-large", "kernel"),
        tag="maps",
    ),
]
