"""The records of a map, as the daemon reads them out of it."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import quote, urlencode

from kpmd.client.answers import Record
from kpmd.client.connection import Connection
from kpmd.client.errors import ProtocolError
from kpmd.client.lines import Lines


class Records(Lines[Record]):
    """The records of a ring buffer or perf event array; see ``Client.records``."""

    what = "a record"
    advice = "read anew: what is in the buffer is still there, what was on its way is lost"

    def __init__(self, connection: Connection, map_id: str, type_: str | None) -> None:
        query = "" if type_ is None else "?" + urlencode({"type": type_})
        super().__init__(connection, f"/maps/{quote(map_id, safe='')}/records{query}")

    def parse(self, line: dict[str, Any]) -> Record:
        """A record, or the news that some are missing. Raises ProtocolError."""
        if not isinstance(line.get("data"), str) and not isinstance(line.get("lost"), int):
            raise ProtocolError("the daemon sent a record without its data")
        return cast(Record, line)
