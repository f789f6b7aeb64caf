"""HTTP/1.1 over one connection, read and written by h11; one request at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import h11

from kpmd import __version__
from kpmd.client.errors import ProtocolError
from kpmd.client.net import Transport
from kpmd.client.way import Way

#: Bytes of an answer that are read at the most.
MAX_ANSWER = 256 << 20

#: What every answer begins with.
_START = b"HTTP/"


@dataclass(frozen=True)
class Request:
    """A request; ``body`` is JSON."""

    method: str
    target: str
    body: bytes | None = None
    accept: str = "application/json"

    def head(self) -> h11.Request:
        """What h11 makes the first bytes of. Raises ValueError where the target cannot be one."""
        headers = [
            ("Host", "localhost"),
            ("User-Agent", f"kpmd-client/{__version__}"),
            ("Accept", self.accept),
        ]
        if self.body is not None:
            headers.append(("Content-Type", "application/json"))
        if self.body is not None or self.method in ("POST", "PUT"):
            headers.append(("Content-Length", str(len(self.body or b""))))
        try:
            return h11.Request(method=self.method, target=self.target, headers=headers)
        except (h11.LocalProtocolError, UnicodeError) as error:
            raise ValueError(f"{self.method} {self.target} cannot be asked for") from error


class Cut(Exception):
    """The connection ended too early. ``heard``: in the middle of an answer, not before it.

    ``fresh``: it had been made for this request.
    """

    def __init__(self, heard: bool, fresh: bool) -> None:
        super().__init__()
        self.heard = heard
        self.fresh = fresh


class Connection:
    """A connection, which is made when needed, and made anew when the daemon closed it.

    Answers longer than ``max_answer`` bytes are refused. A request that does not come to its end,
    for whatever reason, closes it: nothing of its answer is left for the next one.
    """

    def __init__(self, way: Way, max_answer: int = MAX_ANSWER) -> None:
        self._way = way
        self._max_answer = max_answer
        self._transport: Transport | None = None
        self._http = h11.Connection(h11.CLIENT)
        self._fresh = self._ended = self._chunked = False
        self._start = b""

    def close(self) -> None:
        """Close it; the next request makes a new one."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    async def ask(self, request: Request, fds: list[int] | None = None) -> tuple[int, bytes]:
        """The status and content of the answer; file descriptors beside it are put into ``fds``.

        Raises Cut, ConnectionFailed, ProtocolError, ValueError.
        """
        with self._whole():
            response = await self._send(request, fds)
            content = await self._content(response, fds)
            self._done()
        return response.status_code, content

    async def stream(self, request: Request, content_type: str) -> tuple[int, bytes] | None:
        """Ask for an answer that comes bit by bit, through ``piece``, and without timeouts.

        Returns the status and content of an answer that is not successful instead. Raises as
        ``ask`` does.
        """
        with self._whole():
            response = await self._send(request, None)
            if response.status_code != 200:
                return response.status_code, await self._content(response, None)
            if _header(response, b"content-type").partition(b";")[0] != content_type.encode():
                raise self._way.not_kpmd(f"HTTP status 200, and no {content_type}")
            self._chunked = _header(response, b"transfer-encoding") == b"chunked"
            if self._transport is not None:
                self._transport.timeout = None
        return None

    async def piece(self) -> bytes | None:
        """The next bytes of a stream; None at its end. Raises as ``ask`` does."""
        with self._whole():
            event = await self._event(None)
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if not self._chunked:  # so that an end cannot be told from a cut
                raise Cut(heard=True, fresh=self._fresh)
            return None

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError:
            self.close()
            raise self._cut() from None
        except OSError as error:
            self.close()
            raise self._way.failed(error) from error
        except BaseException:
            self.close()
            raise

    def _cut(self) -> Cut:
        return Cut(heard=bool(self._start), fresh=self._fresh)

    async def _send(self, request: Request, fds: list[int] | None) -> h11.Response:
        head = request.head()
        transport = await self._open()
        data = [self._http.send(head), self._http.send(h11.Data(data=request.body or b""))]
        data.append(self._http.send(h11.EndOfMessage()))
        self._start = b""
        # The daemon may have answered before: a body that is too large, one connection too many.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await transport.send(b"".join(each for each in data if each))
        while not isinstance(event := await self._event(fds), h11.Response):
            pass  # another answer is to come (100 Continue)
        return event

    async def _open(self) -> Transport:
        # Between requests nothing is to be read, so that what can be read is the end.
        if self._transport is not None and self._transport.pending():
            self.close()
        self._fresh = self._transport is None
        if self._transport is None:
            self._http = h11.Connection(h11.CLIENT)
            self._ended = False
            self._transport = await self._way.connect()
        return self._transport

    async def _event(self, fds: list[int] | None) -> h11.Event:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                if self._ended:
                    raise self._cut() from None
                raise self._way.not_kpmd(f"{error}: it is no HTTP") from error
            if isinstance(event, h11.ConnectionClosed) or self._transport is None:
                raise self._cut()
            if not isinstance(event, type):
                return event
            data = await self._transport.receive(fds)
            if len(self._start) < len(_START):
                self._start = (self._start + data)[: len(_START)]
                if not _START.startswith(self._start):
                    raise self._way.not_kpmd("it is no HTTP")
            self._ended = not data
            self._http.receive_data(data)

    async def _content(self, response: h11.Response, fds: list[int] | None) -> bytes:
        if int(_header(response, b"content-length") or 0) > self._max_answer:
            raise self._too_large()
        pieces, size = [], 0
        while isinstance(event := await self._event(fds), h11.Data):
            pieces.append(event.data)
            size += len(event.data)
            if size > self._max_answer:
                raise self._too_large()
        if not pieces and self._ended:  # no length and no content: it ended behind the headers
            raise self._cut()
        return b"".join(pieces)

    def _done(self) -> None:
        """Be ready for the next request."""
        if self._http.their_state is h11.DONE and not self._http.trailing_data[0]:
            self._http.start_next_cycle()
        else:
            self.close()

    def _too_large(self) -> ProtocolError:
        return ProtocolError(f"the answer is over the {self._max_answer} bytes that are read")


def _header(response: h11.Response, name: bytes) -> bytes:
    return next((value for each, value in response.headers if each == name), b"").lower()
