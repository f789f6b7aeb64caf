"""Where the daemon is, the way there, and why there is none."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat

from kpmd.client import DEFAULT_SOCKET
from kpmd.client.errors import ConnectionFailed, ProtocolError
from kpmd.client.net import Net, Transport


class Way:
    """The way to a daemon on this machine, which listens at ``path``."""

    #: Whether file descriptors can come along it.
    carries_fds = True

    def __init__(self, net: Net, path: str, timeout: float | None) -> None:
        self.net = net
        self.path = path
        self.timeout = timeout
        #: What messages call the place.
        self.name = path

    async def connect(self) -> Transport:
        """A new connection. Raises ConnectionFailed."""
        try:
            return await dial(self.net, self.path, self.timeout)
        except ValueError as error:
            raise explain(self.path, error) from error
        except OSError as error:
            raise self.failed(error) from error

    async def close(self) -> None:
        """Give up what the way itself takes; the next connection makes it anew."""

    def failed(self, error: OSError) -> ConnectionFailed:
        """What an error of a connection means that is not its end."""
        if isinstance(error, TimeoutError):
            return ConnectionFailed(f"the daemon at {self.name} did not answer in time", "timeout")
        return explain(self.path, error)

    def lost(self, when: str) -> ConnectionFailed:
        """The connection ended too early; ``when`` says where."""
        return ConnectionFailed(
            f"the daemon at {self.name} closed the connection {when}: it was stopped, or it "
            f"failed (journalctl -u kpmd may say why){self.aside()}",
            "lost",
        )

    def aside(self) -> str:
        """What else there is to say of a connection that was lost."""
        return ""

    def not_kpmd(self, what: str) -> ProtocolError:
        """What came is no answer of kpmd."""
        return ProtocolError(f"what answers at {self.name} does not speak as kpmd does: {what}")


def way(net: Net, address: str | os.PathLike[str] | None, timeout: float | None) -> Way:
    """The way to an address: a path, ``unix:///path``, ``ssh://[user@]host[:port][/path]``.

    None is ``$KPMD_SOCKET``, which may be any of these, or else the default. Raises
    ConnectionFailed where it is none of these.
    """
    if address is None:
        address = os.environ.get("KPMD_SOCKET") or DEFAULT_SOCKET
    text = os.fspath(address)
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        return Way(net, text, timeout)
    if scheme == "unix" and rest.startswith("/"):
        return Way(net, rest, timeout)
    if scheme == "ssh":
        from kpmd.client.ssh import SshWay  # few need it

        return SshWay(net, rest, timeout)
    raise ConnectionFailed(
        f"{text!r} is no address of a daemon: give a path, unix:///path, or "
        "ssh://[user@]host[:port][/path]",
        "other",
    )


async def dial(net: Net, path: str, seconds: float | None) -> Transport:
    """Connect to a Unix socket. Raises OSError, ValueError."""
    if not path or "\0" in path:
        raise ValueError("this is no path")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await net.connect(sock, path, seconds)
    except BaseException:
        sock.close()
        raise
    return Transport(net, sock, seconds)


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
