"""Clients that cost next to nothing: raw bytes on a socket, and processes that are forked.

A new Python takes a third of a second in the VM, a fork milliseconds; and only who writes the bytes
himself can stop in the middle of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any

#: The user nobody.
NOBODY = 65534


def request(method: str, path: str, body: object = None) -> bytes:
    """The bytes of a request."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: kpmd\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Wire:
    """One connection."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(path)

    def send(self, raw: bytes) -> None:
        self.sock.sendall(raw)

    def answer(self) -> tuple[int, Any]:
        """Status and content of the next answer. Raises ConnectionResetError where none comes."""
        got = b""
        while (end := got.find(b"\r\n\r\n")) < 0:
            got += self._receive()
        head = got[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r", 1)[0]) if at >= 0 else 0
        while len(got) < end + 4 + length:
            got += self._receive()
        content = got[end + 4 :]
        return int(head[9:12]), json.loads(content) if content else None

    def _receive(self) -> bytes:
        got = self.sock.recv(1 << 16)
        if not got:
            raise ConnectionResetError("the daemon closed the connection")
        return got

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        self.send(request(method, path, body))
        return self.answer()

    def ok(self, method: str, path: str, body: object = None) -> Any:
        """The content of an answer that must be one of success."""
        status, content = self.ask(method, path, body)
        if status >= 300:
            raise RuntimeError(f"{method} {path} gave {status}: {content}")
        return content

    def close(self) -> None:
        self.sock.close()


Tell = Callable[[object], None]


class Forked:
    """A client process: runs ``work``, which may tell things, and then waits to be killed."""

    def __init__(self, work: Callable[[Tell], None], user: int = NOBODY) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _be_client(work, writing, user)
        os.close(writing)
        self._told = os.fdopen(reading, "rb")
        self._ended = False

    def told(self) -> Any:
        """What the process tells next; the test's time limit ends a wait in vain."""
        line = self._told.readline()
        assert line, f"client {self.pid} ended before it told anything more"
        found = json.loads(line)
        assert "failed" not in found, found
        return found["told"]

    def signal(self, number: int) -> None:
        """It has not been waited for, so the number is still its own."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, and wait for its end; once is enough."""
        if not self._ended:
            self._ended = True
            self.signal(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._told.close()


def _be_client(work: Callable[[Tell], None], writing: int, user: int) -> None:
    """In the child: none of the parent's file descriptors, connections above all."""
    os.closerange(3, writing)
    os.closerange(writing + 1, 1 << 14)

    def tell(what: object) -> None:
        os.write(writing, json.dumps({"told": what}).encode() + b"\n")

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        if user:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        work(tell)
        while True:
            signal.pause()
    except BaseException:
        failed = json.dumps({"failed": traceback.format_exc()}).encode()
        os.write(writing, failed + b"\n")
    finally:
        os._exit(70)
