"""What happens, as the daemon tells it."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import urlencode

from kpmd.client.answers import Event
from kpmd.client.errors import Gone, ProtocolError
from kpmd.client.lines import Lines, OnGap
from kpmd.client.way import Way


class EventLines(Lines[Event]):
    """The events, as they happen; see ``Client.events``."""

    what = "an event"
    advice = "listen anew, and list what there is now"

    def __init__(self, way: Way, patience: float, on_gap: OnGap | None, since: str | None) -> None:
        super().__init__(way, patience, on_gap)
        self.seq = since

    def target(self) -> str:
        """All events, or those behind the last."""
        return "/events" if self.seq is None else "/events?" + urlencode({"since": self.seq})

    def parse(self, line: dict[str, Any]) -> Event:
        """An event. Raises ProtocolError."""
        if not isinstance(line.get("seq"), str):
            raise ProtocolError("the daemon sent an event without its seq")
        self.seq = line["seq"]
        return cast(Event, line)

    async def reopen(self) -> str | None:
        """Go on behind the last event, or from now on where that cannot be."""
        if self.seq is None:
            await self.connect()
            return "the connection was lost before the first event: what came meanwhile is missing"
        try:
            await self.connect()
        except Gone as error:
            since, self.seq = self.seq, None
            try:
                await self.connect()
            except BaseException:
                self.seq = since
                raise
            return f"what came after the event {since} is missing: {error}"
        return None
