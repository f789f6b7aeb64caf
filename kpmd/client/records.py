"""The records of a map, as the daemon reads them out of it."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import urlencode

from kpmd.client.answers import Record
from kpmd.client.errors import ProtocolError
from kpmd.client.lines import Lines, OnGap
from kpmd.client.way import Way


class RecordLines(Lines[Record]):
    """The records of a ring buffer or perf event array; see ``Client.records``."""

    what = "a record"
    advice = "read anew: what is in the buffer is still there, what was on its way is lost"

    def __init__(
        self, way: Way, patience: float, on_gap: OnGap | None, path: str, type_: str | None
    ) -> None:
        super().__init__(way, patience, on_gap)
        self._target = path if type_ is None else f"{path}?{urlencode({'type': type_})}"

    def target(self) -> str:
        """The records from now on."""
        return self._target

    def parse(self, line: dict[str, Any]) -> Record:
        """A record, or the news that some are missing. Raises ProtocolError."""
        if not isinstance(line.get("data"), str) and not isinstance(line.get("lost"), int):
            raise ProtocolError("the daemon sent a record without its data")
        return cast(Record, line)

    async def reopen(self) -> str | None:
        """Go on with what is in the buffer."""
        await self.connect()
        return "the connection was lost: records that were on their way are missing"
