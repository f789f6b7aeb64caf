"""aiohttp's side: from bytes on a connection to a ``Call``, and back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from aiohttp import HttpVersion11, web
from multidict import CIMultiDict
from pydantic import BaseModel
from pydantic_core import from_json

from kpmd.api import problem
from kpmd.api.problem import SERVER
from kpmd.api.route import Access, Call, Reply, Route, Stream
from kpmd.core.model import Caller, Connection
from kpmd.errors import Forbidden, Invalid, KpmdError, Malformed
from kpmd.log import Log
from kpmd.runtime.peer import read_peer
from kpmd.runtime.state import State

log = Log("kpmd.api")

#: A body larger than this is validated in the pool, not on the event loop.
_LARGE_BODY = 64 << 10

#: Members of a JSON object at the most.
_MOST_MEMBERS = 4096

#: Seconds that a connection may stay idle between requests.
_KEEPALIVE = 75.0


class HttpConnection(web.RequestHandler):
    """One connection, whose peer is read when it is made: nothing in a request can change it."""

    __slots__ = ("api", "caller", "connection", "state", "stream")

    def __init__(self, server: web.Server, api: Api, state: State, **options: Any) -> None:
        super().__init__(server, **options)
        self.api = api
        self.state = state
        self.connection: Connection | None = None
        self.caller: Caller | None = None
        self.stream: Stream | None = None

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
        self.connection = self.state.clients.connect(peer)
        self.caller = Caller(
            uid=peer.uid, gid=peer.gid, pid=peer.pid, admin=peer.uid in (0, os.geteuid())
        )

    def connection_lost(self, exc: BaseException | None) -> None:
        """Let end what lives as long as the connection."""
        super().connection_lost(exc)
        if self.stream is not None:
            self.stream.close()
        connection, self.connection = self.connection, None
        if connection is not None:
            self.state.clients.disconnect(connection)

    def _process_keepalive(self) -> None:
        """Close an idle connection; but not one that programs or links live as long as."""
        connection = self.connection
        if connection is None or not self.state.registry.bound(connection.id):
            super()._process_keepalive()
        elif self._keepalive:
            later = self._loop.time() + _KEEPALIVE
            self._keepalive_handle = self._loop.call_at(later, self._process_keepalive)

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


class Api:
    """The routes, and the dispatch that is common to them.

    On aiohttp's low-level server rather than its Application, whose own dispatch is a fifth of the
    time of ``GET /capabilities``: paths without parameters are looked up here, others by aiohttp's
    UrlDispatcher.
    """

    def __init__(self, state: State, routes: Sequence[Route], max_body: int) -> None:
        self._state = state
        self._max_body = max_body
        self._ids = itertools.count(1)
        self._under_way = 0
        self._idle = asyncio.Event()
        self._boot = secrets.token_hex(4)
        self._fixed = {
            (route.method, route.path): _Prepared(route)
            for route in routes
            if "{" not in route.path
        }
        self._router = web.UrlDispatcher()
        self._by_route: dict[Any, _Prepared] = {}
        for route in routes:
            added = self._router.add_route(route.method, route.path, _never_called)
            self._by_route[added] = _Prepared(route)
        # The daemon's own exception handling answers everything; aiohttp's access log is off.
        # Bodies are never decompressed: a limit on what comes must be a limit on what is held.
        self._options: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": _KEEPALIVE,
            "tcp_keepalive": False,
        }

    def runner(self, shutdown_timeout: float) -> web.ServerRunner:
        """A runner, to be set up and cleaned up by the daemon.

        Handlers are not cancelled when their client goes away: what they make is bound to the
        client's process, and ends with it.
        """
        loop = asyncio.get_running_loop()

        def request(
            message: Any, payload: Any, protocol: Any, writer: Any, task: Any
        ) -> web.BaseRequest:
            return web.BaseRequest(
                message, payload, protocol, writer, task, loop, client_max_size=self._max_body
            )

        server = web.Server(self._handle, request_factory=request, handler_cancellation=False)
        return web.ServerRunner(server, shutdown_timeout=shutdown_timeout)

    def protocol(self, server: web.Server, loop: Any) -> Callable[[], HttpConnection]:
        """The factory of connections, for ``loop.create_server``."""
        return lambda: HttpConnection(server, self, self._state, loop=loop, **self._options)

    async def idle(self, seconds: float) -> None:
        """Wait until no request is under way, at most that long; streams do not count."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._under_way:
                    self._idle.clear()
                    await self._idle.wait()

    def _done(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    def new_request_id(self) -> str:
        """An id for the log and the X-Request-Id header."""
        return f"{self._boot}-{next(self._ids)}"

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        request_id = self.new_request_id()
        registry = self._state.registry
        client = None
        stream = None
        self._under_way += 1
        try:
            http, caller, connection = _peer(request)
            client = connection.client
            registry.begin_request(client)
            if "Expect" in request.headers:
                await _expect(request)
            prepared = self._fixed.get((request.method, request.rel_url.raw_path))
            path: Mapping[str, str] = {}
            if prepared is None:
                prepared, path = await self._resolve(request)
            route = prepared.route
            if route.access is Access.ADMIN and not caller.admin:
                raise Forbidden("only administrators may do this", rule="administrators")
            query = prepared.no_query
            if query is None or request.query_string:
                query = _query(route, request)
            body = None if route.body is None else await self._body(route, route.body, request)
            reply = await route.handler(
                Call(self._state, caller, connection, request.headers, path, query, body)
            )
            content = reply.content
            if content is not None and not isinstance(content, (bytes, BaseModel)):
                stream = content
                self._done()
                return await _send_stream(http, request, stream, request_id)
        except Exception as raised:
            error = problem.from_exception(raised, request_id)
            self._log(request, request_id, error)
            return problem.response(error, request_id)
        finally:
            if client is not None:
                registry.end_request(client)
            if stream is None:
                self._done()
        return _answer(content, reply, request_id)

    async def _resolve(self, request: web.BaseRequest) -> tuple[_Prepared, Mapping[str, str]]:
        """The route of a path with parameters. Raises HTTPNotFound, HTTPMethodNotAllowed."""
        found = await self._router.resolve(cast(web.Request, request))
        if found.http_exception is not None:
            raise found.http_exception
        return self._by_route[found.route], found

    async def _body(
        self, route: Route, model: type[BaseModel], request: web.BaseRequest
    ) -> BaseModel:
        raw = await request.read()
        if not raw and route.optional_body:
            return model()
        if len(raw) < _LARGE_BODY:
            return parse(model, raw)
        return await self._state.executor.run(parse, model, raw)

    def _log(self, request: web.BaseRequest, request_id: str, error: KpmdError) -> None:
        caller = request.protocol.caller if isinstance(request.protocol, HttpConnection) else None
        log.info(
            "request refused",
            request=request_id,
            call=f"{request.method} {request.path}"[:200],
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


def _peer(request: web.BaseRequest) -> tuple[HttpConnection, Caller, Connection]:
    http = request.protocol
    if not isinstance(http, HttpConnection):
        raise TypeError("kpmd serves its own connections only")
    if http.caller is None or http.connection is None:
        raise ConnectionResetError("the connection is closed")
    return http, http.caller, http.connection


async def _expect(request: web.BaseRequest) -> None:
    """Answer ``Expect: 100-continue``, which curl sends before a large body (RFC 9110, 10.1.1)."""
    if request.headers["Expect"].lower() != "100-continue":
        raise Malformed("there is only one Expect: 100-continue")
    if request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # What was written before the headers does not count as output of the answer.
        request.writer.output_size = 0


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    raise NotImplementedError


class _Prepared:
    """A route, and what its calls without query parameters have for one."""

    __slots__ = ("no_query", "route")

    def __init__(self, route: Route) -> None:
        self.route = route
        required = any(field.is_required() for field in route.query.model_fields.values())
        self.no_query = None if required else route.query()


def _query(route: Route, request: web.BaseRequest) -> Any:
    given = request.rel_url.query
    if len(given) != len(set(given)):
        raise Invalid("a query parameter stands twice; give each once")
    return route.query.model_validate_strings(dict(given))


#: Headers of every answer, to be copied: cheaper than to put them together each time.
_HEADERS = CIMultiDict({"Server": SERVER})
_JSON_HEADERS = CIMultiDict({"Server": SERVER, "Content-Type": "application/json"})


async def _send_stream(
    http: HttpConnection, request: web.BaseRequest, stream: Stream, request_id: str
) -> web.StreamResponse:
    """Send a stream until it ends, or the connection does."""
    response = web.StreamResponse(headers={"Server": SERVER, "X-Request-Id": request_id})
    response.content_type = stream.content_type
    http.stream = stream

    def abort() -> None:
        if http.transport is not None:
            http.transport.abort()

    try:
        await response.prepare(request)
        async with contextlib.aclosing(stream.begin(abort)) as pieces:
            async for piece in pieces:
                await response.write(piece)
        await response.write_eof()
    except ConnectionError:
        log.debug("stream cut", request=request_id)
    except Exception as error:
        # It is too late for a problem document: let nobody take this for the end.
        log.error("bug", error, request=request_id)
        abort()
    finally:
        http.stream = None
        stream.close()
    return response


def _answer(content: BaseModel | bytes | None, reply: Reply, request_id: str) -> web.Response:
    headers = (_HEADERS if content is None else _JSON_HEADERS).copy()
    headers["X-Request-Id"] = request_id
    if reply.headers:
        headers.update(reply.headers)
    if content is not None and not isinstance(content, bytes):
        # Fields that were not set are those that the contract marks as optional.
        content = content.model_dump_json(exclude_unset=True).encode()
    return web.Response(status=reply.status, body=content, headers=headers)
