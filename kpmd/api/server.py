"""aiohttp's side: from bytes on a connection to a ``Call``, and back."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import structlog
from aiohttp import web
from pydantic import BaseModel
from pydantic_core import from_json

from kpmd.api import problem
from kpmd.api.problem import SERVER
from kpmd.api.route import Access, Call, Reply, Route
from kpmd.core.model import Caller, Client
from kpmd.errors import Forbidden, Invalid, KpmdError, Malformed
from kpmd.runtime.peer import read_peer
from kpmd.runtime.state import State

log = structlog.get_logger("kpmd.api")

#: A body larger than this is validated in the pool, not on the event loop.
_LARGE_BODY = 64 << 10

#: Members of a JSON object at the most.
_MOST_MEMBERS = 4096

#: Seconds that a connection may stay idle between requests.
_KEEPALIVE = 75.0


class Connection(web.RequestHandler):
    """One connection, whose peer is read when it is made: nothing in a request can change it."""

    __slots__ = ("api", "caller", "client", "state")

    def __init__(self, server: web.Server, api: Api, state: State, **options: Any) -> None:
        super().__init__(server, **options)
        self.api = api
        self.state = state
        self.client: Client | None = None
        self.caller: Caller | None = None

    def connection_made(self, transport: Any) -> None:
        """Read who connected; a connection whose peer cannot be told is closed unheard."""
        try:
            self._identify(transport.get_extra_info("socket"))
        except OSError as error:
            # Out of file descriptors, say: this one is refused, the daemon goes on.
            log.warning("connection refused", error=str(error))
            super().connection_made(transport)
            transport.abort()
            return
        super().connection_made(transport)

    def _identify(self, sock: socket.socket) -> None:
        peer = read_peer(sock)
        self.client = self.state.clients.connect(peer)
        self.caller = Caller(
            uid=peer.uid, gid=peer.gid, pid=peer.pid, admin=peer.uid in (0, os.geteuid())
        )

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give the client its connection back."""
        super().connection_lost(exc)
        client, self.client = self.client, None
        if client is not None:
            self.state.clients.disconnect(client)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp's parser could not read, as a problem document."""
        request_id = self.api.new_request_id()
        if status >= 500 and exc is not None:
            error = problem.from_exception(exc, request_id)
        else:
            error = Malformed(f"this is not HTTP that can be read: {message or 'bad request'}")
        answer = problem.response(error, request_id)
        answer.force_close()
        return answer

    async def finish_response(
        self, request: web.BaseRequest, resp: Any, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """What aiohttp answers by itself (no such path, say), as a problem document."""
        if isinstance(resp, web.HTTPException):
            request_id = self.api.new_request_id()
            resp = problem.response(problem.from_exception(resp, request_id), request_id)
        return await super().finish_response(request, resp, start_time)


class Api:
    """The application: routes, and the dispatch that is common to them."""

    def __init__(self, state: State, routes: Sequence[Route], max_body: int) -> None:
        self._state = state
        self._ids = itertools.count(1)
        self._boot = secrets.token_hex(4)
        self.app = web.Application(client_max_size=max_body)
        for route in routes:
            self.app.router.add_route(route.method, route.path, self._handler(route))
        # The daemon's own exception handling answers everything; aiohttp's access log is off.
        # Bodies are never decompressed: a limit on what comes must be a limit on what is held.
        self._options: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": _KEEPALIVE,
            "tcp_keepalive": False,
        }

    def runner(self, shutdown_timeout: float) -> web.AppRunner:
        """A runner, to be set up and cleaned up by the daemon.

        Handlers are not cancelled when their client goes away: what they make is bound to the
        client's process, and ends with it.
        """
        return web.AppRunner(
            self.app,
            shutdown_timeout=shutdown_timeout,
            handler_cancellation=False,
            **self._options,
        )

    def protocol(self, server: web.Server, loop: Any) -> Callable[[], Connection]:
        """The factory of connections, for ``loop.create_server``."""
        return lambda: Connection(server, self, self._state, loop=loop, **self._options)

    def new_request_id(self) -> str:
        """An id for the log and the X-Request-Id header."""
        return f"{self._boot}-{next(self._ids)}"

    def _handler(self, route: Route) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            request_id = self.new_request_id()
            try:
                reply = await self._call(route, request)
            except Exception as raised:
                error = problem.from_exception(raised, request_id)
                self._log(route, request, request_id, error)
                return problem.response(error, request_id)
            return _answer(reply, request_id)

        return handle

    async def _call(self, route: Route, request: web.Request) -> Reply:
        connection = request.protocol
        if not isinstance(connection, Connection):
            raise TypeError("kpmd serves its own connections only")
        caller, client = connection.caller, connection.client
        if caller is None or client is None:
            raise ConnectionResetError("the connection is closed")
        if route.access is Access.ADMIN and not caller.admin:
            raise Forbidden("only administrators may do this", rule="administrators")
        registry = self._state.registry
        registry.begin_request(client)
        try:
            call = Call(
                state=self._state,
                caller=caller,
                client=client,
                path=request.match_info,
                query=_query(route, request),
                body=await self._body(route, request),
            )
            return await route.handler(call)
        finally:
            registry.end_request(client)

    async def _body(self, route: Route, request: web.Request) -> Any:
        if route.body is None:
            return None
        raw = await request.read()
        if len(raw) < _LARGE_BODY:
            return parse(route.body, raw)
        return await self._state.executor.run(parse, route.body, raw)

    def _log(self, route: Route, request: web.Request, request_id: str, error: KpmdError) -> None:
        caller = request.protocol.caller if isinstance(request.protocol, Connection) else None
        log.info(
            "request refused",
            request=request_id,
            call=f"{route.method} {route.path}",
            kind=error.kind,
            detail=error.detail[:500],
            uid=caller.uid if caller else None,
            pid=caller.pid if caller else None,
        )


def parse(model: type[BaseModel], raw: bytes) -> BaseModel:
    """A body as its model. Raises Malformed, Invalid, ValidationError."""
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


def _query(route: Route, request: web.Request) -> Any:
    given = request.rel_url.query
    if len(given) != len(set(given)):
        raise Invalid("a query parameter stands twice; give each once")
    return route.query.model_validate_strings(dict(given))


def _answer(reply: Reply, request_id: str) -> web.Response:
    headers = {"X-Request-Id": request_id, "Server": SERVER, **reply.headers}
    if reply.content is None:
        return web.Response(status=reply.status, headers=headers)
    content = reply.content
    if not isinstance(content, bytes):
        # Fields that were not set are those that the contract marks as optional.
        content = content.model_dump_json(exclude_unset=True).encode()
    return web.Response(
        status=reply.status, body=content, content_type="application/json", headers=headers
    )
