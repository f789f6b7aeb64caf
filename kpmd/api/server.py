"""aiohttp's side: from bytes on a connection to a ``Call``, and back."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    aclosing,
    closing,
    suppress,
)
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from aiohttp import HttpVersion11, web
from multidict import CIMultiDict
from pydantic import BaseModel

from kpmd.api import problem
from kpmd.api.body import OTHER_VERSION, check_head, parse, read_body
from kpmd.api.connection import HttpConnection
from kpmd.api.exchange import Exchange
from kpmd.api.fd_answer import FdAnswer
from kpmd.api.guard import LARGE_BODY, Guard
from kpmd.api.problem import SERVER
from kpmd.api.route import Access, Call, Reply, Route, Stream
from kpmd.bpf.fd import Closed, OwnedFd
from kpmd.core.model import Caller, Connection
from kpmd.core.policy import check_right
from kpmd.errors import Forbidden, Invalid, KernelError, KpmdError, NotFound
from kpmd.log import Log
from kpmd.runtime import spans
from kpmd.runtime.audit import Record
from kpmd.runtime.state import State
from kpmd.runtime.tallies import RouteTally

if TYPE_CHECKING:  # where requests are traced it is imported, and only there
    from kpmd.api.tracing import Traces

log = Log("kpmd.api")


class Api:
    """The routes, and the dispatch that is common to them.

    On aiohttp's low-level server rather than its Application, whose own dispatch is a fifth of the
    time of ``GET /capabilities``: paths without parameters are looked up here, others by aiohttp's
    UrlDispatcher.
    """

    def __init__(
        self,
        state: State,
        routes: Sequence[Route],
        max_body: int,
        traces: Traces | None = None,
    ) -> None:
        self._state = state
        self._traces = traces
        self._max_body = max_body
        self._ids = itertools.count(1)
        self._under_way = 0
        self._idle = asyncio.Event()
        self._boot = secrets.token_hex(4)
        tally = state.tallies.routes
        #: Of requests without a route.
        self._no_route = tally["none", "none"]
        self._fixed = {
            (route.method, route.path): _Prepared(route, tally[route.method, route.path])
            for route in routes
            if "{" not in route.path
        }
        self._router = web.UrlDispatcher()
        self._by_route: dict[Any, _Prepared] = {}
        for route in routes:
            # aiohttp's own pattern of a parameter leaves out braces, which keys in JSON have.
            path = re.sub(r"\{(\w+)\}", r"{\1:[^/]+}", route.path)
            added = self._router.add_route(route.method, path, _never_called)
            self._by_route[added] = _Prepared(route, tally[route.method, route.path])
        self.guard = Guard(state.counters, state.clock)

    def runner(self, shutdown_timeout: float) -> web.ServerRunner:
        """A runner, to be set up and cleaned up by the daemon.

        Handlers are not cancelled when their client goes away: what they make is bound to the
        client's process, and ends with it.
        """
        loop = asyncio.get_running_loop()

        def request(
            message: Any, payload: Any, protocol: Any, writer: Any, task: Any
        ) -> web.BaseRequest:
            # aiohttp answers in the version that it was asked in, whatever that is.
            known = message.version.major == 1
            if not known:
                message = message._replace(version=HttpVersion11, should_close=True)
            made = web.BaseRequest(message, payload, protocol, writer, task, loop)
            if not known:
                made[OTHER_VERSION] = True
            return made

        server = web.Server(self._handle, request_factory=request, handler_cancellation=False)
        return web.ServerRunner(server, shutdown_timeout=shutdown_timeout)

    def protocol(self, server: web.Server, loop: Any) -> Callable[[], HttpConnection]:
        """The factory of connections, for ``loop.create_server``."""
        return lambda: HttpConnection(server, self, self._state, loop)

    async def idle(self, seconds: float) -> None:
        """Wait until no request is under way, at most that long; sending does not count."""
        with suppress(TimeoutError):
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
        what: dict[str, Any] = {}
        sending = False
        self._under_way += 1
        http = _http(request)
        exchange = Exchange(request, self._no_route)
        if self._traces is not None:
            exchange.trace = self._traces.begin(request.headers, request_id)
        try:
            caller, connection = _peer(http)
            exchange.caller = caller
            if not self.guard.turnstile.admit(caller.uid):
                with spans.phase("turn"):
                    await self.guard.turnstile.enter(caller.uid)
                if http.connection is None:
                    raise ConnectionResetError("the connection was closed before its turn came")
            with self._state.counters.hold(caller.uid, "requests", caller.limits.requests):
                registry.begin_request(connection.client)
                try:
                    route, reply = await self._reply(exchange, caller, connection, what)
                finally:
                    registry.end_request(connection.client)
            exchange.status = reply.status
            content = reply.content
            if content is not None and not isinstance(content, (bytes, BaseModel)):
                with closing(content), self._streaming(caller):
                    sending = True
                    self._done()
                    exchange.finished()
                    return await _send_stream(http, request, content, request_id)
            answer = _answer(content, reply, request_id)
            if reply.fd is not None:
                sending = True
                self._done()
                answer = await _send_with_fd(http, request, answer, reply.fd)
        except Exception as raised:
            error = problem.from_exception(raised, request_id)
            exchange.status, exchange.error = error.status, error
            self.refused(http.caller, _call(request), request_id, error, what)
            answer = problem.response(error, request_id)
        else:
            if route.changes and not what.get("dry_run"):
                done = Record(
                    request=request_id, call=_call(request), status=reply.status, what=what
                )
                self._put_on_record(caller, done)
        finally:
            if not sending:
                self._done()
        exchange.finished()
        return answer

    def _streaming(self, caller: Caller) -> AbstractContextManager[None]:
        return self._state.counters.hold(caller.uid, "streams", caller.limits.streams)

    async def _reply(
        self,
        exchange: Exchange,
        caller: Caller,
        connection: Connection,
        what: dict[str, Any],
    ) -> tuple[Route, Reply]:
        """Find the route of a request, and call its handler."""
        request = exchange.request
        check_head(request)
        prepared = self._fixed.get((request.method, request.rel_url.raw_path))
        path: Mapping[str, str] = {}
        if prepared is None:
            prepared, path = await self._resolve(request)
        exchange.route = route = prepared.route
        exchange.tally = prepared.tally
        _check_access(route, caller)
        what.update(path)
        query = prepared.no_query
        if query is None or request.query_string:
            query = _query(route, request)
        call = Call(self._state, caller, connection, request.headers, path, query, None, what)
        if route.body is None:
            return route, await route.handler(call)
        with ExitStack() as held:
            with spans.phase("body"):
                call.body = await self._body(route, route.body, request, caller, held)
            return route, await route.handler(call)

    async def _resolve(self, request: web.BaseRequest) -> tuple[_Prepared, Mapping[str, str]]:
        """The route of a path with parameters. Raises HTTPNotFound, HTTPMethodNotAllowed."""
        found = await self._router.resolve(cast(web.Request, request))
        if found.http_exception is not None:
            raise found.http_exception
        return self._by_route[found.route], found

    async def _body(
        self,
        route: Route,
        model: type[BaseModel],
        request: web.BaseRequest,
        caller: Caller,
        held: ExitStack,
    ) -> BaseModel:
        raw = await read_body(request, caller, self._max_body, self.guard, held)
        if not raw and route.optional_body:
            return model()
        if len(raw) < LARGE_BODY:
            return parse(model, raw)
        return await self.guard.parse(self._state.executor, parse, model, raw, caller=caller)

    def refused(
        self,
        caller: Caller | None,
        call: str,
        request_id: str,
        error: KpmdError,
        what: Mapping[str, Any] | None = None,
    ) -> None:
        """Put on record that something was refused; as often as the user's share of lines lets.

        ``call`` is empty for a whole connection, "?" where it could not be read.
        """
        tallies = self._state.tallies
        tallies.refused(error, "" if caller is None else caller.rule_name)
        if call in ("", "?"):
            tallies.connections[error.kind] += 1
        if caller is not None and not self.guard.lines.take(caller.uid):
            return
        record = Record(
            audit="request" if call else "connection",
            request=request_id,
            call=call or None,
            outcome=error.kind,
            status=error.status,
            rule=error.fields.get("rule"),
            detail=error.detail,
            what=what or {},
        )
        self._put_on_record(caller, record)

    def _put_on_record(self, caller: Caller | None, record: Record) -> None:
        if caller is not None:
            record = replace(
                record,
                uid=caller.uid,
                gid=caller.gid,
                pid=caller.pid,
                user=self._state.known_name(caller.uid),
                command=caller.command,
                rule=record.rule or caller.rule_name,
            )
        self._state.audit.record(record)


def _call(request: web.BaseRequest) -> str:
    return f"{request.method} {request.path}"


def _http(request: web.BaseRequest) -> HttpConnection:
    http = request.protocol
    if not isinstance(http, HttpConnection):
        raise TypeError("kpmd serves its own connections only")
    return http


def _peer(http: HttpConnection) -> tuple[Caller, Connection]:
    caller = http.caller
    if caller is None or http.connection is None:
        raise ConnectionResetError("the connection is closed")
    return caller, http.connection


def _check_access(route: Route, caller: Caller) -> None:
    """Raise Forbidden where the policy does not let the caller make this call."""
    if caller.admin:
        return
    if route.access is Access.ADMIN:
        raise Forbidden("only administrators may do this", rule=caller.rule_name)
    if route.right is not None:
        check_right(caller.rule, route.right)


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    raise NotImplementedError


class _Prepared:
    """A route, and what its calls without query parameters have for one."""

    __slots__ = ("no_query", "route", "tally")

    def __init__(self, route: Route, tally: RouteTally) -> None:
        self.route = route
        self.tally = tally
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
        if http.half_closed:
            # It has no end that would be seen if its reader went away.
            raise ConnectionResetError("the client has closed its side")
        await response.prepare(request)
        async with aclosing(stream.begin(abort)) as pieces:
            async for piece in pieces:
                await response.write(piece)
        await response.write_eof()
    except ConnectionError:
        log.debug("stream cut", request=request_id)
        abort()
    except Exception as error:
        # It is too late for a problem document: let nobody take this for the end.
        log.error("bug", error, request=request_id)
        abort()
    finally:
        http.stream = None
        stream.close()
    return response


async def _send_with_fd(
    http: HttpConnection, request: web.BaseRequest, answer: web.Response, fd: OwnedFd
) -> web.Response:
    """Send an answer with a file descriptor beside it. Raises NotFound, KernelError."""
    sent = FdAnswer(status=answer.status, body=answer.body, headers=answer.headers)
    try:
        await sent.send(http, request, fd)
    except Closed:
        raise NotFound(f"{fd.what} has ended before it could be handed over") from None
    except OSError as error:
        raise KernelError(
            f"the kernel did not pass the file descriptor on: {error.strerror}", error.errno or 0
        ) from error
    return sent


def _answer(content: BaseModel | bytes | None, reply: Reply, request_id: str) -> web.Response:
    headers = (_HEADERS if content is None else _JSON_HEADERS).copy()
    headers["X-Request-Id"] = request_id
    if reply.headers:
        headers.update(reply.headers)
    if content is not None and not isinstance(content, bytes):
        # Fields that were not set are those that the contract marks as optional.
        content = content.model_dump_json(exclude_unset=True).encode()
    return web.Response(status=reply.status, body=content, headers=headers)
