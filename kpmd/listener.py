"""The daemon's socket: taken from systemd, or made so that it is never open wider than asked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import re
import secrets
import socket
import stat
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import NoReturn

#: SD_LISTEN_FDS_START (sd_listen_fds(3)).
_FIRST_PASSED = 3

#: Names in the FD store are the ids of what is kept there.
_STORED = re.compile(r"(cli|lse|prg|lnk)-")

_BACKLOG = 1024


class ListenError(Exception):
    """The socket cannot be made; the message says why and what to do."""


class Listener:
    """A listening Unix socket. ``close`` removes what was made here, and nothing else."""

    def __init__(self, sock: socket.socket, path: Path | None, lock: int | None) -> None:
        self.sock = sock
        self._path = path
        self._lock = lock

    @property
    def where(self) -> str:
        """The address, for people."""
        return str(self._path or self.sock.getsockname())

    def close(self) -> None:
        """Stop listening and remove the socket, and the lock last of all."""
        if self._path is not None:
            # The lock is still held, so that what stands there is ours, or no socket.
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(self._path.lstat().st_mode):
                    self._path.unlink()
        self.sock.close()
        if self._lock is not None and self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                _lock_path(self._path).unlink()
            os.close(self._lock)
            self._lock = None


def passed_by_systemd(environ: MutableMapping[str, str], pid: int) -> list[tuple[str, int]]:
    """The file descriptors that systemd passed, each with its name (sd_listen_fds(3)).

    Removes the variables, so that no child mistakes them for its own. The FDs are no more inherited
    by children. They come in no order that could be relied on.
    """
    owner = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "0")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if owner != str(pid) or not count.isdecimal():
        return []
    names += [""] * (int(count) - len(names))
    passed = [(names[place], _FIRST_PASSED + place) for place in range(int(count))]
    for _, fd in passed:
        with contextlib.suppress(OSError):  # what does not exist is told of where it is used
            os.set_inheritable(fd, False)
    return passed


def is_stored(name: str) -> bool:
    """Whether an FD of that name comes from the FD store, and not from the socket unit."""
    return _STORED.match(name) is not None


def from_systemd(passed: Sequence[tuple[str, int]]) -> Listener | None:
    """The socket of a systemd socket unit, if there is one among what was passed.

    Raises ListenError when it is not one listening Unix stream socket.
    """
    sockets = [fd for name, fd in passed if not is_stored(name)]
    if not sockets:
        return None
    if len(sockets) != 1:
        raise ListenError(
            f"systemd passed {len(sockets)} sockets; kpmd.socket must have one ListenStream="
        )
    try:
        sock = socket.socket(fileno=sockets[0])
    except OSError as error:
        raise ListenError(f"systemd passed no socket that can be used: {error.strerror}") from error
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listens:
        sock.close()
        raise ListenError("systemd passed a socket that is no listening Unix stream socket")
    sock.setblocking(False)
    return Listener(sock, None, None)


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def make(path: Path, group: str | None, mode: int) -> Listener:
    """Make a socket at ``path`` with the permissions ``mode``, for ``group``.

    It is made under another name and with no permissions, gets its group, then its mode, listens,
    and only then takes its place: at no instant can anyone connect who may not. A socket left
    behind by a dead daemon is replaced, a live one's is not. Raises ListenError.
    """
    gid = _gid(group)
    _check_length(path)
    lock = _take_lock(path)
    try:
        _check_replaceable(path)
        return Listener(_bind(path, gid, mode), path, lock)
    except OSError as error:
        os.close(lock)
        raise ListenError(f"cannot make the socket {path}: {error.strerror}") from error
    except BaseException:
        os.close(lock)
        raise


def _gid(group: str | None) -> int:
    if group is None:
        return -1
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ListenError(
            f"there is no group {group!r}; make it (groupadd --system {group}) or name another"
        ) from None


def _check_length(path: Path) -> None:
    # sun_path has 108 bytes, its NUL included, and the name it is made under must fit too.
    if max(len(os.fsencode(path)), len(os.fsencode(path.parent)) + 18) > 107:
        raise ListenError(f"the path {path} is too long for a Unix socket (107 bytes)")


def _take_lock(path: Path) -> int:
    """Hold the lock file beside the socket; the kernel frees it when the daemon dies."""
    while True:
        try:
            lock = os.open(
                _lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            raise ListenError(f"cannot lock {_lock_path(path)}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            _live(path)
        # The daemon that held it before may have removed it between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == _lock_path(path).stat().st_ino:
                return lock
        os.close(lock)


def _live(path: Path) -> NoReturn:
    raise ListenError(
        f"another daemon listens on {path}; stop it, or give this one another --socket"
    )


def _check_replaceable(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ListenError(f"{path} is there and is no socket; move it away, kpmd does not touch it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise
            return
    _live(path)


def _bind(path: Path, gid: int, mode: int) -> socket.socket:
    hidden = path.with_name(f".{secrets.token_hex(8)}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        before = os.umask(0o777)
        try:
            sock.bind(str(hidden))
        finally:
            os.umask(before)
        try:
            os.chown(hidden, -1, gid)
            os.chmod(hidden, mode)
            sock.listen(_BACKLOG)
            os.rename(hidden, path)
        except BaseException:
            hidden.unlink()
            raise
    except BaseException:
        sock.close()
        raise
    return sock
