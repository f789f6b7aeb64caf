"""What happens, as the daemon tells it."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import urlencode

from kpmd.client.answers import Event
from kpmd.client.connection import Connection
from kpmd.client.errors import ProtocolError
from kpmd.client.lines import Lines


class Events(Lines[Event]):
    """The events, as they happen; see ``Client.events``.

    It listens when it is made: nothing that happens after that is missed.
    """

    what = "an event"
    advice = "listen anew, and list what there is now"

    def __init__(self, connection: Connection, since: str | None) -> None:
        #: Where to take up again: the ``seq`` of the event given last, at first what ``since`` was.
        self.seq = since
        query = "" if since is None else "?" + urlencode({"since": since})
        super().__init__(connection, f"/events{query}")

    def parse(self, line: dict[str, Any]) -> Event:
        """An event. Raises ProtocolError."""
        if not isinstance(line.get("seq"), str):
            raise ProtocolError("the daemon sent an event without its seq")
        self.seq = line["seq"]
        return cast(Event, line)
