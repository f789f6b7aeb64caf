"""What the calls of the API share: connections, what is tried again, and lists page by page."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar, cast
from urllib.parse import quote, urlencode

from kpmd.client.connection import MAX_ANSWER, Connection, Cut, Request
from kpmd.client.errors import (
    ClientError,
    ConnectionFailed,
    Gone,
    NotFound,
    ProtocolError,
    ShuttingDown,
)
from kpmd.client.lines import Lines, refusal
from kpmd.client.net import Net, Patience
from kpmd.client.operation import operation
from kpmd.client.way import way

#: Items asked for at once; the most that the daemon gives.
_PAGE = 1000

#: Connections of one client that calls are made on, at the most; each stream has one besides.
CONNECTIONS = 8

#: Methods that may be sent again where the first sending's fate is unknown.
_IDEMPOTENT = {"GET", "PUT", "DELETE"}

T = TypeVar("T")
S = TypeVar("S", bound=Lines[Any])


class Calls:
    """Base of both clients: their connections, and how answers are read."""

    _make_net: ClassVar[type[Net]]

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        patience: float = 0,
        max_answer: int = MAX_ANSWER,
    ) -> None:
        self._net = self._make_net()
        self._way = way(self._net, address, timeout)
        self._patience = patience
        self._max_answer = max_answer
        self._turns = self._net.turns(CONNECTIONS)
        self._idle: list[Connection] = []
        self._connections: set[Connection] = set()
        # What has the lifetime "connection" lives as long as this one, on which nothing else is
        # broken off.
        self._home = Connection(self._way, max_answer)
        self._home_turn = self._net.turns(1)
        self._streams: weakref.WeakSet[Lines[Any]] = weakref.WeakSet()

    @property
    def address(self) -> str:
        """Where the daemon is: a path, or ``ssh://…``."""
        return self._way.name

    @operation
    async def call(self, method: str, target: str, body: object = None) -> Any:
        """Make a call that this class has no method for.

        ``target`` is the path with its query, ``body`` anything JSON can write. Returns the
        answer's JSON, None where it has no content.
        """
        return await self._call(method, target, body)

    @operation
    async def close(self) -> None:
        """Close the connections, and those of the streams.

        What was made with the lifetime ``"connection"`` ends; all else stays, what has the lifetime
        ``"process"`` until this process ends (over ssh: until now, with ssh).
        """
        for stream in list(self._streams):
            stream.close()
        for each in (self._home, *self._connections):
            each.close()
        await self._way.close()

    async def _call(
        self,
        method: str,
        target: str,
        body: object = None,
        *,
        fds: list[int] | None = None,
        home: bool = False,
        idempotent: bool = True,
    ) -> Any:
        """Make one call, more than once where that is safe; ``Client`` tells where.

        ``home``: on the connection that things of the lifetime "connection" live by.
        ``idempotent`` False: what the method promises is not so here.
        """
        data = None if body is None else json.dumps(body).encode()
        content = await self._content(
            Request(method, target, data), fds, home=home, idempotent=idempotent
        )
        if content is None:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._way.not_kpmd("its answer is no JSON") from error

    async def _text(self, target: str) -> str:
        """Ask for what is no JSON."""
        request = Request("GET", target, accept="text/plain")
        return (await self._content(request) or b"").decode(errors="backslashreplace")

    async def _content(
        self,
        request: Request,
        fds: list[int] | None = None,
        *,
        home: bool = False,
        idempotent: bool = True,
    ) -> bytes | None:
        """The content of a call's answer, which is successful; None where it has none."""
        repeatable = idempotent and request.method in _IDEMPOTENT
        patience = Patience(self._net, self._patience)
        unknown = False  # whether an earlier try may have done it
        while True:
            try:
                return await self._once(request, fds, home)
            except Cut as cut:
                unknown = True
                # One that was idle may have been closed just then; a new one tells more.
                if repeatable and not (cut.fresh or cut.heard):
                    continue
                error = self._way.lost(_when(cut))
                if not (repeatable and await patience.wait()):
                    raise error from None
            except (ConnectionFailed, ShuttingDown) as error:
                if not _nothing_done(error) or not await patience.wait():
                    raise
            except (NotFound, Gone):
                if request.method == "DELETE" and unknown:
                    return None
                raise

    async def _once(self, request: Request, fds: list[int] | None, home: bool) -> bytes | None:
        if home:
            async with self._home_turn:
                status, content = await self._home.ask(request, fds)
        else:
            async with self._turns:
                connection = self._idle.pop() if self._idle else self._another()
                try:
                    status, content = await connection.ask(request, fds)
                finally:
                    self._idle.append(connection)
        if status == 204:
            return None
        if not 200 <= status < 300:
            raise refusal(self._way, status, content)
        return content

    def _another(self) -> Connection:
        made = Connection(self._way, self._max_answer)
        self._connections.add(made)
        return made

    async def _get(self, target: str) -> dict[str, Any]:
        return object_of(await self._call("GET", target))

    def _pages(self, path: str, query: Mapping[str, str] | None = None) -> Pages[Any]:
        return Pages(self, path, query or {})

    def _stream(self, made: S) -> S:
        self._streams.add(made)
        return made


class Pages(Generic[T]):
    """A list, asked for page by page: an iterator, or an asynchronous one."""

    def __init__(self, calls: Calls, path: str, query: Mapping[str, str]) -> None:
        self._calls = calls
        self._path = path
        self._query = {"limit": str(_PAGE), **query}
        self._items: list[T] = []
        self._more = True

    async def next(self) -> T:
        """The next item. Raises StopAsyncIteration at the end, and ClientError."""
        while not self._items:
            if not self._more:
                raise StopAsyncIteration
            try:
                await self._ask()
            except BaseException:
                self._more = False
                raise
        return self._items.pop()

    async def _ask(self) -> None:
        page = await self._calls._get(f"{self._path}?{urlencode(self._query)}")  # noqa: SLF001
        items, following = page.get("items"), page.get("next")
        if not isinstance(items, list) or not isinstance(following, str | None):
            raise ProtocolError(f"the daemon's answer to {self._path} is no page of a list")
        if following is not None and following == self._query.get("after"):
            raise ProtocolError(f"the daemon's answer to {self._path} goes round in a circle")
        self._items = items[::-1]
        self._more = following is not None
        if following is not None:
            self._query["after"] = following


def _nothing_done(error: ClientError) -> bool:
    """Whether nothing of the call was done, and the daemon may be there in a moment."""
    if isinstance(error, ConnectionFailed):
        return error.reason in ("missing", "refused", "ssh")
    return isinstance(error, ShuttingDown)


def _when(cut: Cut) -> str:
    return "in the middle of its answer" if cut.heard else "without an answer"


def object_of(answer: Any) -> dict[str, Any]:
    """The answer, which has to be an object. Raises ProtocolError."""
    if not isinstance(answer, dict):
        raise ProtocolError("the daemon's answer is no JSON object")
    return cast("dict[str, Any]", answer)


def path_of(*parts: str) -> str:
    """A path of these parts, whatever characters they have."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def lifetime_body(lifetime: str) -> dict[str, Any]:
    """A lifetime as the API takes it: a kind, or the id of a lease."""
    if lifetime.startswith("lse-"):
        return {"kind": "lease", "lease": lifetime}
    return {"kind": lifetime}
