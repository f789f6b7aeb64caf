"""The way to another machine's daemon: its socket, brought here by ``ssh``.

One ``ssh`` serves all connections of a client. On the other machine its server is the one process
that the daemon sees: what has the lifetime ``"process"`` there ends when this ssh does, and this
ssh ends when the client is closed or this process ends, however it ends.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import tempfile
from pathlib import Path

from kpmd.client import DEFAULT_SOCKET
from kpmd.client.errors import ConnectionFailed
from kpmd.client.net import Net, Transport
from kpmd.client.way import Way, dial

#: What the other end says when it can be used. cat ends when our end of its input is closed, which
#: the kernel does also where this process is killed; with it the session ends, and ssh.
_READY = b"kpmd: forwarded"
_COMMAND = f"echo {_READY.decode()!r}; exec cat"

#: Ctrl-C in a terminal is for us: what is attached is to be detached before ssh ends. ssh leaves a
#: signal ignored that was so when it was started.
_START = 'trap "" INT; exec "$0" "$@"'

#: Seconds in which ssh ends when it is told to.
_ENDING = 2

_ADDRESS = re.compile(
    r"(?:(?P<user>[^-:@/\s][^:@/\s]*)@)?"
    r"(?P<host>[^-:@/\s\[][^:@/\s\[\]]*|\[[0-9A-Fa-f:.]+(?:%\w+)?\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
    # ssh has meanings for other characters.
    r"(?P<path>/[\w./@+,=-]+)?/?"
)


class SshWay(Way):
    """The way to what stands behind ``ssh://``. Raises ConnectionFailed where it is no address."""

    carries_fds = False

    def __init__(self, net: Net, rest: str, timeout: float | None) -> None:
        found = _ADDRESS.fullmatch(rest)
        if found is None:
            raise ConnectionFailed(
                f"'ssh://{rest}' is no address: give ssh://[user@]host[:port][/path/of/socket]",
                "other",
            )
        super().__init__(net, found["path"] or DEFAULT_SOCKET, timeout)
        self.name = f"ssh://{rest}"
        self._host = found["host"].strip("[]")
        self._options = ["-l", found["user"]] if found["user"] else []
        self._options += ["-p", found["port"]] if found["port"] else []
        self._turn = net.turns(1)
        self._tunnel: _Tunnel | None = None

    async def connect(self) -> Transport:
        """A new connection through ssh, which is started where it does not run."""
        async with self._turn:
            if self._tunnel is not None and self._tunnel.ended():
                await self.close()
            if self._tunnel is None:
                self._tunnel = await self._start()
        try:
            return await dial(self.net, self._tunnel.socket, self.timeout)
        except TimeoutError as error:
            raise self.failed(error) from error
        except OSError as error:
            raise self._failed(self._tunnel) from error

    async def close(self) -> None:
        """End ssh. That takes a moment, in which nothing else is done."""
        tunnel, self._tunnel = self._tunnel, None
        if tunnel is not None:
            tunnel.close()

    def failed(self, error: OSError) -> ConnectionFailed:
        """What an error of a connection means that is not its end."""
        if isinstance(error, TimeoutError):
            return super().failed(error)
        return ConnectionFailed(f"{self.name}: {error.strerror or error}{self.aside()}", "ssh")

    def lost(self, when: str) -> ConnectionFailed:
        """The connection ended too early: there may be no daemon behind it."""
        if "open failed" not in (aside := self.aside()):
            return super().lost(when)
        return ConnectionFailed(
            f"ssh got to {self._host}, but not to {self.path} there: is kpmd running, and may you "
            f"use it there?{aside}",
            "lost",
        )

    def aside(self) -> str:
        """What ssh said last."""
        said = self._tunnel.said() if self._tunnel is not None else ""
        return f"; ssh says: {said}" if said else ""

    async def _start(self) -> _Tunnel:
        tunnel = _Tunnel(self.net, self.path, [*self._options, "--", self._host], self.timeout)
        try:
            if await tunnel.ready():
                return tunnel
        except TimeoutError:
            tunnel.close()
            raise ConnectionFailed(f"ssh did not get to {self._host} in time", "timeout") from None
        except BaseException:
            tunnel.close()
            raise
        error = self._failed(tunnel)
        tunnel.close()
        raise error

    def _failed(self, tunnel: _Tunnel) -> ConnectionFailed:
        return ConnectionFailed(
            f"ssh did not get to {self._host}: {tunnel.said() or 'it ended without a reason'}; "
            f"see whether `ssh {' '.join(self._options)} {self._host} true` does",
            "ssh",
        )


class _Tunnel:
    """A running ssh, and a socket in a folder for us alone that leads to its other end."""

    def __init__(self, net: Net, path: str, target: list[str], timeout: float | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kpmd-")
        folder = Path(self._folder.name)
        self.socket = str(folder / "kpmd.sock")
        self._stderr = folder / "stderr"
        asks = _has_terminal()
        options = [
            "ExitOnForwardFailure=yes",
            "StreamLocalBindUnlink=yes",
            # A process of its own, so that what it holds ends with us and not with another.
            "ControlMaster=no",
            "ControlPath=none",
            "RemoteCommand=none",
            "ServerAliveInterval=15",
            f"BatchMode={'no' if asks else 'yes'}",
        ]
        if timeout is not None:
            options.append(f"ConnectTimeout={math.ceil(timeout)}")
        ours, theirs = socket.socketpair()
        with theirs, open(self._stderr, "wb") as stderr:
            try:
                self._process = subprocess.Popen(
                    [
                        *("sh", "-c", _START, "ssh", "-T", "-a", "-x"),
                        *(part for option in options for part in ("-o", option)),
                        *("-L", f"{self.socket}:{path}", *target, _COMMAND),
                    ],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=stderr,
                )
            except BaseException:
                ours.close()
                self._folder.cleanup()
                raise
        ours.setblocking(False)
        # Who types a password may take their time.
        self._session = Transport(net, ours, None if asks else timeout)

    async def ready(self) -> bool:
        """Wait until connections can be made. False where ssh ended. Raises OSError."""
        heard = b""
        while _READY not in heard:
            data = await self._session.receive()
            if not data:
                return False
            heard = (heard + data)[-4096:]  # a shell may have had more to say
        return True

    def ended(self) -> bool:
        """Whether ssh has ended."""
        return self._process.poll() is not None

    def said(self) -> str:
        """The last of what ssh wrote to its stderr, in one line."""
        lines = self._stderr.read_text(errors="replace").split("\n")
        told = [" ".join(line.split()) for line in lines if line.strip()]
        return "; ".join(told[-3:])

    def close(self) -> None:
        """End ssh, and remove the folder."""
        self._session.close()
        self._process.terminate()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def _has_terminal() -> bool:
    """Whether there is somebody whom ssh can ask for a password."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY))
    except OSError:
        return False
    return True
