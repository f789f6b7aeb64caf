"""The stream of a map's records."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any

from pydantic import Field

from kpmd.api.fields import Answer, Model
from kpmd.api.route import Call, Reply, Route
from kpmd.core.btf import BtfError
from kpmd.core.codec import Codec
from kpmd.core.model import Map
from kpmd.core.ring import Batch, as_ndjson, lost_line, lost_octets, split
from kpmd.errors import Invalid
from kpmd.runtime.buffers import Lost
from kpmd.runtime.executor import Lane
from kpmd.runtime.records import Reader
from kpmd.runtime.turns import Gate

NDJSON = "application/x-ndjson"
OCTETS = "application/octet-stream"

#: Characters of text at the most that are made in one go: a fraction of a millisecond's work.
PIECE = 64 << 10


class RecordsQuery(Model):
    """Which records to decode as what."""

    type: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=255,
            description="The struct in the object's BTF that each record is. Without it: the one "
            "named as the map, or the only one that a global variable of the object points to.",
        ),
    ] = None

    data: Annotated[
        bool, Field(description="`false`: only `decoded`, not the record in hex beside it.")
    ] = True


class RecordAnswer(Answer):
    """A line of the stream: a record, or how many are missing in its place, and why.

    ``data`` is in hex; ``decoded`` is null where the record is shorter than the struct.
    """

    data: str | None = None
    decoded: Any = None
    lost: int | None = None
    reason: str | None = None


class RecordStream:
    """A reader's records as one of the two content types."""

    def __init__(
        self, reader: Reader, gate: Gate, content_type: str, codec: Codec | None, *, data: bool
    ) -> None:
        self._reader = reader
        self._gate = gate
        self._codec = codec
        self._data = data
        self.content_type = content_type

    async def begin(self, abort: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """The records in batches, until the map ends."""
        self._reader.on_cut = abort
        while (item := await self._reader.next()) is not None:
            if isinstance(item, Lost):
                yield self._told(item)
            elif isinstance(item, bytes):
                yield item
            else:
                for part in split(item, self._codec, PIECE):
                    yield await self._lines(part)

    async def _lines(self, batch: Batch) -> bytes:
        # Taking turns with other streams: making text of records takes some time.
        await self._gate.enter(self._reader.uid)
        try:
            return as_ndjson(batch, self._codec, data=self._data)
        finally:
            self._gate.leave()

    def _told(self, lost: Lost) -> bytes:
        if self.content_type == OCTETS:
            return lost_octets(lost.number)
        return lost_line(lost.number, lost.reason)

    def close(self) -> None:
        """Nobody reads any more."""
        self._reader.close()


def _codec(each: Map, wanted: str | None) -> Codec | None:
    """What to decode records with. Raises Invalid where the type that is wanted cannot be had."""
    if each.types is None:
        if wanted is None:
            return None
        reason = "the object has no BTF to decode with: compile it with -g"
        raise Invalid.at(["type"], reason)
    try:
        return each.types.record(each.name, wanted)
    except BtfError as error:
        if wanted is None:
            return None
        raise Invalid.at(["type"], str(error)) from None


async def records(call: Call) -> Reply:
    """GET /maps/{id}/records"""
    query: RecordsQuery = call.query
    state, caller = call.state, call.caller
    # Whoever reads takes the records away from all others who are not reading now.
    each = state.registry.map(caller, call.path["id"], touch=True)
    state.check_open()
    raw = OCTETS in call.headers.get("Accept", "").lower()
    codec = None
    if not raw or query.type is not None:
        codec = await state.executor.run(_codec, each, query.type, lane=Lane.PARSE, uid=caller.uid)
        each = state.registry.map(caller, each.id, touch=True)  # it may have ended meanwhile
    if not raw and not query.data and codec is None:
        raise Invalid.at(["data"], "would leave nothing: name the struct of the records as `type`")
    handle, details = state.handle(each.id), state.map_details[each.id]
    reader = await state.records.read(each.id, handle, details, caller.uid, framed=raw)
    kind = OCTETS if raw else NDJSON
    return Reply(RecordStream(reader, state.records.gate, kind, codec, data=query.data))


ROUTES = [
    Route(
        "GET",
        "/maps/{id}/records",
        records,
        "The records of a ring buffer or perf event array as they come: all that every reader sees",
        RecordAnswer,
        query=RecordsQuery,
        streams=(NDJSON, OCTETS),
        right="maps",
        errors=("not-found", "not-supported", "shutting-down", "kernel"),
        tag="maps",
    ),
]
