"""The processes that are measured: kpmd, a bare server, and the C programs."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.prepare import BUILD, LIBRARIES, PROJECT
from tests.kernel.policies import EVERYTHING

#: mov r0, 0; exit
_RETURN_0 = bytes.fromhex("b7000000000000009500000000000000")

#: libbpf's programs run with the libc that this libbpf was built for.
_UNDER_LIBBPF = (str(LIBRARIES / "ld-linux-x86-64.so.2"), "--library-path", str(LIBRARIES))


class Wire:
    """One kept connection, with as little of a client as can be: bytes out, bytes in."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(path)

    def exchange(self, request: bytes) -> tuple[float, int, bytes]:
        """Send a request; the seconds until its whole answer was there, status and content."""
        begun = time.perf_counter()
        self._sock.sendall(request)
        answer = b""
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += self._receive()
        head = answer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r", 1)[0]) if at >= 0 else 0
        while len(answer) < end + 4 + length:
            answer += self._receive()
        seconds = time.perf_counter() - begun
        return seconds, int(head[9:12]), answer[end + 4 :]

    def _receive(self) -> bytes:
        got = self._sock.recv(1 << 16)
        if not got:
            raise ConnectionResetError("the server closed the connection")
        return got

    def close(self) -> None:
        self._sock.close()


def request(method: str, path: str, body: object = None) -> bytes:
    """The bytes of a request."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    if content:
        head += "Content-Type: application/json\r\n"
    return f"{head}\r\n".encode() + content


class Refused(Exception):
    """kpmd answered with an error."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"HTTP {status}: {content[:500].decode(errors='replace')}")
        self.status = status


class Kpmd:
    """The daemon, as an administrator runs it, and one connection with a program loaded."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket = str(folder / "kpmd.sock")
        # No function is left out of globs: libbpf leaves none out.
        config, deny = folder / "kpmd.toml", folder / "deny"
        deny.write_text("")
        config.write_text(f"deny_file = {str(deny)!r}\n")
        if "--policy" not in options:
            policy = folder / "everything.toml"
            policy.write_text(EVERYTHING)
            options = ("--policy", str(policy), *options)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "kpmd",
                "--socket",
                self.socket,
                "--config",
                str(config),
                *options,
            ],
            stderr=subprocess.PIPE,
            cwd=PROJECT,
        )
        self._events: dict[str, threading.Event] = {
            name: threading.Event() for name in ("listening", "symbol index built")
        }
        threading.Thread(target=self._read_log, daemon=True).start()
        self._wait("listening")
        self.wire = Wire(self.socket)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            record = json.loads(line)
            if found := self._events.get(record["event"]):
                found.set()
            if record["level"] in ("warning", "error"):
                sys.stderr.buffer.write(line)

    def _wait(self, event: str) -> None:
        while not self._events[event].wait(1):
            if self.process.poll() is not None:
                raise RuntimeError(f"kpmd ended with {self.process.returncode}")

    def warm(self) -> None:
        """Wait until the symbol index is there."""
        self._wait("symbol index built")

    def ok(self, method: str, path: str, body: object = None) -> tuple[float, Any]:
        """A request that must succeed: its seconds and its answer."""
        return self.send(request(method, path, body))

    def send(self, raw: bytes) -> tuple[float, Any]:
        """The same for a request that is in bytes already. Raises Refused."""
        seconds, status, content = self.wire.exchange(raw)
        if status >= 300:
            raise Refused(status, content)
        return seconds, json.loads(content) if content else None

    def load(self) -> str:
        """Load a program that does nothing; its id."""
        source = {
            "kind": "instructions",
            "instructions": base64.b64encode(_RETURN_0).decode(),
            "license": "Apache-2.0",
            "name": "zero",
        }
        _, answer = self.ok("POST", "/programs", {"source": source, "attach": "kprobe_multi"})
        found: str = answer["programs"][0]["id"]
        return found

    def round(self, attach: bytes) -> tuple[float, float]:
        """Attach and detach: the seconds of the two requests."""
        made, link = self.send(attach)
        closed, _ = self.send(request("DELETE", f"/links/{link['id']}"))
        return made, closed

    def close(self) -> None:
        self.wire.close()
        self.process.terminate()
        self.process.wait()


class Rounds:
    """A C program that runs a round for each line it gets."""

    def __init__(self, name: str, *arguments: object, libbpf: bool = True) -> None:
        command = [str(BUILD / name), *(str(each) for each in arguments)]
        self.process = subprocess.Popen(
            [*(_UNDER_LIBBPF if libbpf else ()), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.libbpf = ""
        if libbpf:
            # A first line tells that the program is loaded.
            self.libbpf = self._answer()["libbpf"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, argument: object) -> dict[str, Any]:
        """One round; what the program measured."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{argument}\n".encode())
        self.process.stdin.flush()
        return self._answer()

    def round(self, argument: object) -> tuple[float, float]:
        """Attach and detach: the seconds of the two."""
        found = self.run(argument)
        return found["make_ns"] / 1e9, found["close_ns"] / 1e9

    def close(self) -> None:
        self.process.communicate()


class Bare:
    """aiohttp and uvloop with a handler that answers the given bytes, and nothing more."""

    def __init__(self, folder: Path, answer: bytes) -> None:
        self.socket = str(folder / "bare.sock")
        content = folder / "answer"
        content.write_bytes(answer)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bare", self.socket, str(content)],
            stdout=subprocess.PIPE,
            cwd=PROJECT,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.wire = Wire(self.socket)

    def close(self) -> None:
        self.wire.close()
        self.process.terminate()
        self.process.wait()


def run_python(module: str, *arguments: object) -> dict[str, Any]:
    """Run a module of the benchmarks in a fresh process; the JSON that it prints."""
    command: Sequence[str] = [sys.executable, "-m", module, *(str(each) for each in arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=PROJECT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
