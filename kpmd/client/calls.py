"""What the calls of the API share: a connection, objects, and lists page by page."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlencode

from kpmd.client import DEFAULT_SOCKET
from kpmd.client.connection import MAX_ANSWER, Connection
from kpmd.client.errors import ProtocolError
from kpmd.client.lines import Lines

#: Items asked for at once; the most that the daemon gives.
_PAGE = 1000


class Calls:
    """Base of ``Client``: its connection, and how answers are read."""

    def __init__(
        self,
        socket_path: str | os.PathLike[str] = DEFAULT_SOCKET,
        *,
        timeout: float | None = None,
        max_answer: int = MAX_ANSWER,
    ) -> None:
        self._connection = Connection(os.fspath(socket_path), timeout, max_answer)
        self._streams: weakref.WeakSet[Lines[Any]] = weakref.WeakSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def connection(self) -> Connection:
        """The connection, for calls that this class has no method for."""
        return self._connection

    def close(self) -> None:
        """Close the connection, and those of its streams.

        What was made with the lifetime ``"connection"`` ends; all else stays, what has the lifetime
        ``"process"`` until this process ends.
        """
        for each in list(self._streams):
            each.close()
        self._connection.close()

    def _get(self, target: str) -> dict[str, Any]:
        return self._object(self._connection.call("GET", target))

    def _pages(self, path: str, query: Mapping[str, str] | None = None) -> Iterator[Any]:
        parameters = {"limit": str(_PAGE), **(query or {})}
        while True:
            page = self._get(f"{path}?{urlencode(parameters)}")
            items, following = page.get("items"), page.get("next")
            if not isinstance(items, list) or not isinstance(following, str | None):
                raise ProtocolError(f"the daemon's answer to {path} is no page of a list")
            yield from items
            if following is None:
                return
            if following == parameters.get("after"):
                raise ProtocolError(f"the daemon's answer to {path} goes round in a circle")
            parameters["after"] = following

    @staticmethod
    def _object(answer: Any) -> dict[str, Any]:
        if not isinstance(answer, dict):
            raise ProtocolError("the daemon's answer is no JSON object")
        return answer


def path_of(*parts: str) -> str:
    """A path of these parts, whatever characters they have."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)
