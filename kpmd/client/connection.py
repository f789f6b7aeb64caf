"""One keep-alive HTTP connection over a Unix socket, and JSON on it."""

from __future__ import annotations

import contextlib
import errno
import grp
import http.client
import json
import os
import pwd
import select
import socket
import stat
from collections.abc import Iterator
from typing import Any

from kpmd import __version__
from kpmd.client.errors import ApiError, ConnectionFailed, ProtocolError

#: Bytes of an answer that are read at the most.
MAX_ANSWER = 256 << 20

#: A socket, and an answer that comes over it bit by bit.
Streamed = tuple[socket.socket, http.client.HTTPResponse]

#: Methods that may be sent again where the first sending's fate is unknown.
_IDEMPOTENT = {"GET", "PUT", "DELETE"}


class _Http(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost")
        self._path = path
        self._seconds = timeout

    def connect(self) -> None:
        if not self._path or "\0" in self._path:
            raise ValueError("this is no path")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # With a timeout the kernel would refuse, where without it waits for, a busy daemon.
            sock.connect(self._path)
            sock.settimeout(self._seconds)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class _Dropped(Exception):
    """The other end closed the connection before it answered anything."""


class Connection:
    """Calls over one connection, which is made when needed and made anew when the daemon closed it.

    ``timeout`` is in seconds, for each wait for the daemon; None waits as long as it takes. Answers
    longer than ``max_answer`` bytes are refused. Not to be shared between threads.
    """

    def __init__(
        self, path: str, timeout: float | None = None, max_answer: int = MAX_ANSWER
    ) -> None:
        self._path = path
        self._timeout = timeout
        self._max_answer = max_answer
        self._http = _Http(path, timeout)

    def another(self) -> Connection:
        """One more to the same daemon, not connected yet."""
        return Connection(self._path, self._timeout, self._max_answer)

    @property
    def path(self) -> str:
        """Where the daemon listens."""
        return self._path

    @property
    def socket(self) -> socket.socket | None:
        """The connected socket; None before the first call, and after the daemon closed it."""
        sock: socket.socket | None = self._http.sock
        return sock

    def close(self) -> None:
        """Close it; the next call makes a new one."""
        self._http.close()

    def call(self, method: str, target: str, body: object = None) -> Any:
        """Make one call: ``target`` is the path with its query, ``body`` anything JSON can write.

        Returns the answer's JSON, None where it has no content. Raises ApiError where the daemon
        refused, ConnectionFailed, ProtocolError. Interrupted at whatever place, by a signal
        handler's exception say, it leaves nothing of the answer behind for the next call.
        """
        data = None if body is None else json.dumps(body).encode()
        while True:
            fresh = self._open()
            try:
                status, content = self._exchange(method, target, data)
                break
            except _Dropped:
                self.close()
                if fresh or method not in _IDEMPOTENT:
                    raise self._lost("without an answer") from None
            except BaseException:
                self.close()
                raise
        return self._decode(status, content)

    def _open(self) -> bool:
        """Have a connection; True if it was made now."""
        sock = self.socket
        if sock is not None:
            # Between calls nothing is to be read, so that what can be read is the end.
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(0):
                return False
            self.close()
        try:
            self._http.connect()
        except (OSError, ValueError) as error:
            raise explain(self._path, error) from error
        return True

    def stream(self, target: str, content_type: str) -> Streamed:
        """GET an answer that comes bit by bit, on a connection that serves nothing else from now on

        Returns the socket, which waits without a timeout from now on, and the answer with its
        headers read; the caller closes the answer, then this. Raises as ``call`` does.
        """
        self._open()
        sock = self._http.sock
        try:
            with self._explained():
                self._send("GET", target, None, _headers(content_type))
                response = self._http.getresponse()
            ok = response.status == http.client.OK
            if not ok or response.headers.get_content_type() != content_type:
                with response:
                    if not ok:
                        self._decode(response.status, self._read(response))
                    raise self._not_kpmd(f"HTTP status {response.status}, and no {content_type}")
            sock.settimeout(None)
        except _Dropped:
            self.close()
            raise self._lost("without an answer") from None
        except BaseException:
            self.close()
            raise
        return sock, response

    def _exchange(self, method: str, target: str, data: bytes | None) -> tuple[int, bytes]:
        headers = _headers("application/json")
        if data is not None:
            headers["Content-Type"] = "application/json"
        with self._explained():
            self._send(method, target, data, headers)
            with self._http.getresponse() as response:
                return response.status, self._read(response)

    def _send(self, method: str, target: str, data: bytes | None, headers: dict[str, str]) -> None:
        """Send a request, or what of it is read.

        The daemon may have answered before: a body that is too large, one connection too many.
        """
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._http.request(method, target, body=data, headers=headers)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong with the connection, as an error of this package, or as _Dropped."""
        try:
            yield
        except TimeoutError as error:
            raise ConnectionFailed(
                f"the daemon at {self._path} did not answer in time", "timeout"
            ) from error
        except ConnectionError as error:
            raise _Dropped from error
        except http.client.HTTPException as error:
            raise self._not_kpmd(f"{type(error).__name__}") from error
        except OSError as error:
            raise explain(self._path, error) from error

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        if response.length is not None and response.length > self._max_answer:
            raise self._too_large()
        try:
            content = response.read(self._max_answer + 1)
        except (http.client.IncompleteRead, ConnectionError):
            raise self._lost("in the middle of its answer") from None
        if len(content) > self._max_answer:
            raise self._too_large()
        # No length and no content: it ended among the headers.
        if response.length or (not content and response.length is None and not response.chunked):
            raise self._lost("in the middle of its answer")
        return content

    def _decode(self, status: int, content: bytes) -> Any:
        if status == http.client.NO_CONTENT:
            return None
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._not_kpmd(f"HTTP status {status}, and no JSON") from error
        if 200 <= status < 300:
            return answer
        if not isinstance(answer, dict):
            raise self._not_kpmd(f"HTTP status {status}, and no problem document")
        raise ApiError.from_problem(status, answer)

    def _lost(self, when: str) -> ConnectionFailed:
        return ConnectionFailed(
            f"the daemon at {self._path} closed the connection {when}: it was stopped, or it "
            "failed (journalctl -u kpmd may say why)",
            "lost",
        )

    def _not_kpmd(self, what: str) -> ProtocolError:
        return ProtocolError(f"what answers at {self._path} does not speak as kpmd does: {what}")

    def _too_large(self) -> ProtocolError:
        return ProtocolError(f"the answer is over the {self._max_answer} bytes that are read")


def _headers(accept: str) -> dict[str, str]:
    return {"User-Agent": f"kpmctl/{__version__}", "Accept": accept}


def explain(path: str, error: OSError | ValueError) -> ConnectionFailed:
    """Why there is no connection to ``path``, and what to do about it."""
    start = f"start it with `systemctl start kpmd`, or `kpmd --socket {path}`"
    if isinstance(error, FileNotFoundError):
        return ConnectionFailed(f"no socket at {path}: is the daemon running? {start}", "missing")
    if isinstance(error, PermissionError):
        return ConnectionFailed(_denied(path), "permission")
    if isinstance(error, ConnectionRefusedError):
        if _is_socket(path):
            return ConnectionFailed(
                f"nobody listens on {path}: the daemon ended; {start}", "refused"
            )
        return ConnectionFailed(f"{path} is no socket: give the daemon's with --socket", "refused")
    if isinstance(error, OSError) and error.errno == errno.ENOTDIR:
        return ConnectionFailed(f"no socket at {path}: part of it is no directory", "missing")
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return ConnectionFailed(f"cannot connect to {path!r}: {reason}", "other")


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True


def _denied(path: str) -> str:
    user = _user_name(os.geteuid())
    try:
        found = os.stat(path)
    except OSError:
        return f"permission denied: a directory above {path} does not let {user} through"
    group, members = _group(found.st_gid)
    if found.st_gid == 0 or not found.st_mode & stat.S_IWGRP:
        owner = _user_name(found.st_uid)
        return (
            f"permission denied: {path} is for {owner} alone; run this as {owner}, or start the "
            "daemon with --group GROUP for a group that may use it"
        )
    if found.st_gid in {os.getegid(), *os.getgroups()}:
        return f"permission denied: {path} is for the group {group}, yet the kernel refused {user}"
    if user in members:
        return (
            f"permission denied: {path} is for the group {group}; {user} was made its member, "
            f"which holds from the next login on (or in `newgrp {group}`)"
        )
    return (
        f"permission denied: {path} is for the group {group}; "
        f"`sudo usermod -aG {group} {user}`, then log in again"
    )


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group(gid: int) -> tuple[str, list[str]]:
    try:
        found = grp.getgrgid(gid)
    except KeyError:
        return str(gid), []
    return found.gr_name, found.gr_mem
