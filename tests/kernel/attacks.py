"""What a hostile user does to a daemon, over and over, until it is killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import socket
from collections.abc import Callable, Iterator

from tests.kernel.wire import Wire, request

#: One round of an attack; it never ends by itself.
Attack = Callable[[str], None]

_COUNT = {"source": {"kind": "builtin", "builtin": "count"}, "attach": "kprobe_multi"}


def _open(path: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        return None
    sock.setblocking(False)
    return sock


def _pump(path: str, connections: int, raw: bytes, depth: int = 1) -> None:
    """Send the same bytes on many connections whenever something comes back, and read it away."""
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    while True:
        while len(socks) < connections and (sock := _open(path)) is not None:
            socks[sock.fileno()] = sock
            poll.register(sock, select.EPOLLIN)
            with contextlib.suppress(OSError):
                sock.send(raw * depth)
        for number, _ in poll.poll(1):
            sock = socks[number]
            try:
                got = sock.recv(1 << 16)
            except OSError:
                got = b""
            if got:
                with contextlib.suppress(OSError):
                    sock.send(raw)
            else:
                poll.unregister(sock)
                del socks[number]
                sock.close()


def reads(path: str) -> None:
    """As many connections as it gets, each asking all the time."""
    _pump(path, 128, request("GET", "/capabilities"))


def pipelining(path: str) -> None:
    """Requests by the thousand before the first answer is read."""
    _pump(path, 32, request("GET", "/links"), depth=2000)


def globs(path: str) -> None:
    """Searches that match late."""
    _pump(path, 32, request("GET", "/symbols?pattern=*a*e*i*o*u*y*z&limit=1000"))


def _program(wire: Wire) -> str:
    id_: str = wire.ok("POST", "/programs", _COUNT)["programs"][0]["id"]
    return id_


def links(path: str) -> None:
    """Attach and detach, on several connections."""
    wire = Wire(path)
    body = {"program": _program(wire), "kind": "kprobe", "patterns": ["tcp_*"]}
    make = request("POST", "/links", body)
    wires = [Wire(path) for _ in range(16)]
    while True:
        for each in wires:
            each.send(make)
        made = [each.answer() for each in wires]
        for each, (status, content) in zip(wires, made, strict=True):
            if status == 201:
                each.send(request("DELETE", f"/links/{content['id']}"))
        for each, (status, _) in zip(wires, made, strict=True):
            if status == 201:
                each.answer()


def programs(path: str) -> None:
    """Load as many as it may, and again."""
    wires = [Wire(path) for _ in range(16)]
    load = request("POST", "/programs", _COUNT)
    while True:
        for each in wires:
            each.send(load)
        for each in wires:
            status, content = each.answer()
            if status == 201:
                each.ok("DELETE", f"/programs/{content['programs'][0]['id']}")


def _bodies(path: str, raw: bytes) -> None:
    while True:
        with contextlib.suppress(OSError, ValueError):
            wire = Wire(path)
            wire.send(raw)
            wire.answer()
            wire.close()


def _link_of(names: int) -> bytes:
    body = {"program": "prg-x", "kind": "kprobe", "symbols": [f"f{n}" for n in range(names)]}
    return request("POST", "/links", body)


def many_targets(path: str) -> None:
    """2^20 names in one request."""
    _bodies(path, _link_of(1 << 20))


def large_bodies(path: str) -> None:
    """As many names as the limit on bodies lets pass."""
    _bodies(path, _link_of(380_000))


def connections(path: str) -> None:
    """A thousand connections, and a new one for each that is refused."""
    kept: list[socket.socket] = []
    while True:
        sock = _open(path)
        if sock is not None:
            kept.append(sock)
        if len(kept) >= 1000:
            for each in kept:
                each.close()
            kept.clear()


def slow_heads(path: str) -> None:
    """Requests that never end, a byte now and then."""
    raw = itertools.cycle(b"GET /healthz HTTP/1.1\r\nHost: kpmd\r\nX-A: ")
    socks: list[socket.socket] = []
    while True:
        if len(socks) < 1000 and (sock := _open(path)) is not None:
            socks.append(sock)
        byte = bytes([next(raw)])
        for sock in list(socks):
            try:
                sock.send(byte)
            except OSError:
                socks.remove(sock)
                sock.close()


def busy(path: str) -> None:
    """Nothing that concerns the daemon: what a processor less costs everybody."""
    while True:
        json.dumps(list(range(1000)))


def all_attacks() -> Iterator[Attack]:
    """Each of them, the harmless one last."""
    yield from (
        reads,
        pipelining,
        globs,
        links,
        programs,
        many_targets,
        large_bodies,
        connections,
        slow_heads,
        busy,
    )
