"""One connection: who is at its other end, and how long they may take."""

from __future__ import annotations

import asyncio
import select
import socket
from contextlib import ExitStack, suppress
from time import perf_counter
from typing import Any, Protocol

from aiohttp import web
from aiohttp.streams import StreamReader

from kpmd.api import problem
from kpmd.api.body import MAX_HEAD
from kpmd.api.guard import UNKNOWN, Guard
from kpmd.api.route import Stream
from kpmd.core.model import Caller, Connection
from kpmd.core.policy import Policy
from kpmd.errors import KpmdError, Malformed, Quota, TooSlow
from kpmd.log import Log
from kpmd.runtime.peer import Peer, read_peer, read_user
from kpmd.runtime.state import State

log = Log("kpmd.api")

#: Seconds that a connection may stay idle between requests.
KEEPALIVE = 75.0

#: Seconds for the head of a request: from its first byte, or from connecting.
HEAD_SECONDS = 10.0

#: Seconds that a client may leave what is sent to it unread.
STALL_SECONDS = 30.0

#: Bytes of one line and of one field in a request's head; and how many fields.
MAX_LINE = 8190
MAX_FIELDS = 64

#: Pieces in which a head may come: each of them costs about as much as a request.
MAX_PIECES = 64

#: Requests that are read ahead of the one being answered before no more are taken from the socket.
#: One read from it can bring some more.
_READ_AHEAD = 2

#: Bytes of a body that wait for its reader, and 1/16 of them the chunks that do: each of them costs
#: as much as a small request.
_READ_BUFFER = 4 << 10

#: Seconds for which the rest of a body is thrown away whose request is answered already: a client
#: that is busy sending shall come to read its answer.
LINGER_SECONDS = 5.0


class Server(Protocol):
    """What a connection needs of the API."""

    guard: Guard

    def new_request_id(self) -> str:
        """An id for the log and the X-Request-Id header."""

    def refused(self, caller: Caller | None, call: str, request_id: str, error: KpmdError) -> None:
        """Put on record that something was refused; ``call`` is empty for a whole connection."""


class HttpConnection(web.RequestHandler):
    """One connection, whose peer is read when it is made: nothing in a request can change it."""

    __slots__ = (
        "_answered",
        "_body",
        "_caller",
        "_discarded",
        "_head_bytes",
        "_head_pieces",
        "_held",
        "_late_handle",
        "_policy",
        "_stall_handle",
        "_wire",
        "api",
        "connection",
        "half_closed",
        "peer",
        "reading_held",
        "room",
        "state",
        "stream",
    )

    def __init__(self, server: web.Server, api: Server, state: State, loop: Any) -> None:
        # The daemon's own exception handling answers everything; aiohttp's access log is off.
        # Bodies are never decompressed: a limit on what comes must be a limit on what is held.
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE,
            lingering_time=0.0,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            max_headers=MAX_FIELDS,
            read_bufsize=_READ_BUFFER,
            tcp_keepalive=False,
        )
        self._max_msg_queue_size = _READ_AHEAD
        self._msg_queue_resume_size = 0
        self.api = api
        self.state = state
        self.connection: Connection | None = None
        self.peer: Peer | None = None
        self.stream: Stream | None = None
        self._caller: Caller | None = None
        self._policy: Policy | None = None
        self._held = ExitStack()
        self._wire: asyncio.Transport | None = None
        #: Bytes that have come of a head which is not complete, and in how many pieces.
        self._head_bytes = self._head_pieces = 0
        self._body: StreamReader | None = None
        self.half_closed = False
        self.reading_held = False
        #: Requests of which the answer has been sent.
        self._answered = 0
        #: Set while what comes is thrown away: more has come, or no more will.
        self._discarded: asyncio.Event | None = None
        self._late_handle: asyncio.TimerHandle | None = None
        self._stall_handle: asyncio.TimerHandle | None = None
        #: There while an answer waits for room that the transport does not see: set when there is
        #: some, or the connection is lost.
        self.room: asyncio.Event | None = None

    def connection_made(self, transport: Any) -> None:
        """Read who connected; a connection that cannot be had is refused, the others go on."""
        self._wire = transport
        refusal: Quota | None = None
        try:
            self._identify(transport.get_extra_info("socket"))
        except Quota as error:
            refusal = error
        except OSError as error:
            # Out of file descriptors, say.
            self.state.tallies.connections["kernel"] += 1
            if self.api.guard.lines.take(UNKNOWN):
                log.warning("connection refused", error=str(error))
            super().connection_made(transport)
            transport.abort()
            return
        super().connection_made(transport)
        if refusal is not None:
            self.refuse(refusal)
        elif self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
            self._next_keepalive_close_time = self._loop.time() + HEAD_SECONDS
            self._keepalive_handle = self._loop.call_at(
                self._next_keepalive_close_time, self._process_keepalive
            )

    def _identify(self, sock: socket.socket) -> None:
        # Whoever has too many is refused before any more is found out about them: that is dearer.
        pid, uid, gid, groups = read_user(sock)
        self.peer = Peer(pid, uid, gid, None, "", groups=groups)
        if self.caller is not None:
            self._held.enter_context(self.api.guard.connection(self.caller))
            if not self.caller.admin:
                self._held.enter_context(self.api.guard.reading.connection(uid, self))
        self.peer = read_peer(sock)
        self._policy = None
        self.connection = self.state.clients.connect(self.peer)

    @property
    def caller(self) -> Caller | None:
        """Who asks, and what the policy now in force makes of them."""
        policies = self.state.policies
        if self._policy is not policies.current and self.peer is not None:
            self._policy = policies.current
            self._caller = policies.caller(self.peer)
        return self._caller

    def connection_lost(self, exc: BaseException | None) -> None:
        """Let end what lives as long as the connection."""
        super().connection_lost(exc)
        for waited_for in (self._discarded, self.room):
            if waited_for is not None:
                waited_for.set()
        for handle in (self._late_handle, self._stall_handle):
            if handle is not None:
                handle.cancel()
        if self.stream is not None:
            self.stream.close()
        self._held.close()
        connection, self.connection = self.connection, None
        if connection is not None:
            self.state.clients.disconnect(connection)

    def hold_reading(self) -> None:
        """Its user has had their share: it is not read for a while."""
        self.reading_held = True
        self._pause_transport_reading()

    def release_reading(self) -> None:
        """It is read again, unless it waits for something of its own."""
        self.reading_held = False
        if not self._reading_paused and not self._buffer_paused:
            self._resume_transport_reading()

    def _resume_transport_reading(self) -> None:
        if not self.reading_held:
            super()._resume_transport_reading()

    def data_received(self, data: bytes) -> None:
        """Take what has come, and count how long that takes."""
        begun = perf_counter()
        try:
            self._read(data)
        finally:
            if self.peer is not None:
                self.api.guard.reading.took(self.peer.uid, perf_counter() - begun)

    def _read(self, data: bytes) -> None:
        """The head of a request must come whole, and soon."""
        if self._discarded is not None:
            self._pause_transport_reading()
            self._discarded.set()
            return
        before = self._request_count
        in_body = self._body is not None and not self._body.is_eof()
        super().data_received(data)
        if self._request_count != before:
            self._body = self._messages[-1][1] if self._messages else None
            self._head_bytes = self._head_pieces = 0
            if self._late_handle is not None:
                self._late_handle.cancel()
                self._late_handle = None
        elif data and not in_body:
            self._head_bytes += len(data)
            self._head_pieces += 1
            if self._head_bytes > MAX_HEAD:
                self.refuse(Malformed(f"the head of the request is over {MAX_HEAD} bytes"))
            elif self._head_pieces > MAX_PIECES:
                self.refuse(Malformed(f"the head of the request came in over {MAX_PIECES} pieces"))
            elif self._late_handle is None:
                self._late_handle = self._loop.call_later(HEAD_SECONDS, self._late)

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered, or waits to be."""
        return self._answered < self._request_count

    def _late(self) -> None:
        """The head of a request has not come in time."""
        self._late_handle = None
        if self._busy:
            # Nothing may be read while there is something to be answered before it.
            self._late_handle = self._loop.call_later(HEAD_SECONDS, self._late)
        else:
            self.refuse(TooSlow(f"the head of the request took over {HEAD_SECONDS:g} s to come"))

    def refuse(self, error: KpmdError) -> None:
        """Close, and say why, unless that would be taken for the answer to another request."""
        if self.transport is None:
            return
        request_id = self.api.new_request_id()
        self.api.refused(self.caller, "", request_id, error)
        if not self._busy:
            self.transport.write(problem.raw(error, request_id))
        self.force_close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends no more: if it may still read, what it has asked for is answered."""
        whole = self._body is None or self._body.is_eof()
        if not (self._busy and whole) or self._wire is None or self.stream is not None:
            return None
        poller = select.poll()
        # POLLHUP, which is always told, comes when both directions are closed.
        poller.register(self._wire.get_extra_info("socket").fileno(), 0)
        self.half_closed = not poller.poll(0)
        return self.half_closed

    def pause_writing(self) -> None:
        """The client does not read what is sent to it; it has some time for that."""
        super().pause_writing()
        self._stall_handle = self._loop.call_later(STALL_SECONDS, self._stalled)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._stall_handle is not None:
            self._stall_handle.cancel()
            self._stall_handle = None

    def _stalled(self) -> None:
        self._stall_handle = None
        if self._wire is None:
            return
        if self.stream is not None:
            # Streams have a bound of their own: how far behind their reader may be.
            self._stall_handle = self._loop.call_later(STALL_SECONDS, self._stalled)
        else:
            self._wire.abort()

    async def all_sent(self) -> None:
        """Wait until the transport has nothing left to send, or the connection is lost."""
        transport = self.transport
        if transport is not None:
            transport.set_write_buffer_limits(high=0)
            try:
                await self._drain_helper()
            finally:
                transport.set_write_buffer_limits()

    async def start(self) -> None:
        """Answer requests until the connection ends; then give up what nobody reads."""
        try:
            await super().start()
        finally:
            wire = self._wire
            if wire is not None:
                wire.close()
                if wire.get_write_buffer_size():
                    self._loop.call_later(STALL_SECONDS, wire.abort)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer; where the body has not come whole yet, throw away the rest of it."""
        whole = request.content.is_eof()
        if not whole:
            resp.force_close()
        result = await super().finish_response(request, resp, start_time)
        self._answered += 1
        if self.half_closed and not self._busy:
            self.close()
        if not whole and self.caller is not None:
            self._discarded = asyncio.Event()
            with suppress(TimeoutError, Quota):
                async with asyncio.timeout(LINGER_SECONDS):
                    while self.transport is not None:
                        await self.api.guard.turnstile.enter(self.caller.uid)
                        self._discarded.clear()
                        self._resume_transport_reading()
                        await self._discarded.wait()
        return result

    def _process_keepalive(self) -> None:
        """Close an idle connection; but not one that programs or links live as long as."""
        connection = self.connection
        if self._late_handle is not None:
            self._keepalive_handle = None  # it is not idle: see _late
        elif connection is None or not self.state.registry.bound(connection.id):
            super()._process_keepalive()
        elif self._keepalive:
            later = self._loop.time() + KEEPALIVE
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
        self.api.refused(self.caller, "?", request_id, error)
        answer = problem.response(error, request_id)
        answer.force_close()
        return answer
