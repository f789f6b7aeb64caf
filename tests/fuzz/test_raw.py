"""Any bytes at the socket: they get answers that are HTTP, or none; and the next client is served.

Never a 500, never a connection that hangs, and nothing is left when the clients have gone.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpmd.api import body, connection
from tests.fuzz.background import Background, examples

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /links HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

#: What has broken HTTP servers: each is a whole conversation of a client.
CORPUS: Sequence[bytes] = [
    b"",
    b"\r\n",
    b"\r\n\r\n\r\n" + GET,
    b"\0" * 1000,
    b"\xff" * 1000,
    b"GET",
    b"GET /\r\n",  # HTTP/0.9
    b"GET /healthz\r\n\r\n",
    b"GET /healthz HTTP/1.0\r\n\r\n",
    b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + GET,
    b"GET /healthz HTTP/1.1\r\n\r\n",  # without Host
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET /healthz HTTP/1.1\nHost: x\n\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\n\r\n",
    b"GET /healthz HTTP/1.1\rHost: x\r\r",
    b"GET  /healthz  HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET\t/healthz\tHTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1 \r\nHost: x\r\n\r\n",
    b"GET /healthz XTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    bytes.fromhex("16030100a5010000a10303") + bytes(150),  # TLS
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"get /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"G\0T /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"A" * 100 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n" + GET,
    b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://x/healthz HTTP/1.1\r\nHost: y\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: y\r\n\r\n",
    b"GET http:// HTTP/1.1\r\nHost: y\r\n\r\n",
    b"GET x:99999 HTTP/1.1\r\nHost: y\r\n\r\n",
    b"GET //healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET //[/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz#f HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz?a=%zz&%&= HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /links/%2e%2e%2f%2e%2e HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /links/%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /links/%25%32%66 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /links/\xf0\x9f\x90\x9d HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /maps/x/entries/" + b"f" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /symbols?pattern=" + b"*" * 7000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /events?since=%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /events?since=x-99999999999999999999 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nA b: y\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: \xff\xfe\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + GET,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n" + GET,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nUpgrade: \xff\r\nConnection: Upgrade\r\n\r\n" + GET,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Key1: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nConnection: keep-alive\r\n\r\n"
    + GET,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n0123456789" + GET,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
    b"GET /events HTTP/1.1\r\nHost: x\r\nLast-Event-ID: \xff\r\nAccept: \xff\r\n\r\n",
    POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    POST + b"Expect: 100-continue\r\nContent-Length: 100000000000\r\n\r\n",
    POST + b"Expect: \xff\r\nContent-Length: 2\r\n\r\n{}",
    POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    POST + b"Content-Length: 2, 2\r\n\r\n{}",
    POST + b"Content-Length: +2\r\n\r\n{}",
    POST + b"Content-Length: 0x2\r\n\r\n{}",
    POST + b"Content-Length: 2_0\r\n\r\n{}",
    POST + b"Content-Length: \xd9\xa2\r\n\r\n{}",
    POST + b"Content-Length: 18446744073709551617\r\n\r\n{}",
    POST + b"Content-Length: 9223372036854775807\r\n\r\n{}",
    POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: identity\r\n\r\n{}",
    POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"POST /links HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"ffffffffffffffff\r\n",
    CHUNKED + b"fffffffffffffffff\r\n",
    CHUNKED + b"-1\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"2;" + b"x" * 10_000 + b"\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"2\r\n{}0\r\n\r\n",
    CHUNKED + b"2\n{}\n0\n\n",
    CHUNKED + b"2\r\n{}\r\n0\r\nTrailer: x\r\n\r\n" + GET,
    CHUNKED + b"2\r\n{}\r\n0\r\n" + b"T: x\r\n" * 10_000 + b"\r\n",
    CHUNKED + b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n" + GET,
    CHUNKED + b"1\r\n \r\n" * 5000 + b"0\r\n\r\n" + GET,
    CHUNKED + b"0;a=b\r\n\r\n" + GET,
    POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    POST + b"Content-Type: \xff\r\nContent-Length: 2\r\n\r\n{}",
    POST + b"Content-Type: multipart/form-data\r\nContent-Length: 2\r\n\r\n{}",
    GET * 300,
    (POST + b"Content-Length: 2\r\n\r\n{}") * 50,
]


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    # Who sends less than it said is waited for: not long, here.
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 2.0)
    monkeypatch.setattr(body, "BODY_SECONDS", 2.0)
    with Background() as daemon:
        yield daemon


def talk(daemon: Background, pieces: Sequence[bytes]) -> list[int]:
    """Send the pieces, then nothing more: the statuses of the answers until the connection ends."""
    got = b""
    with daemon.connect() as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has been answered already
        try:
            while piece := sock.recv(1 << 16):
                got += piece
        except ConnectionResetError:
            pass
    if b"HEAD" in b"".join(pieces):
        # The answers to it tell the length of a body that does not come.
        statuses = [int(each) for each in re.findall(rb"HTTP/1\.[01] (\d\d\d) ", got)]
        assert all(each < 500 for each in statuses), got
        return statuses
    return check_answers(got)


def check_answers(got: bytes) -> list[int]:
    """The statuses of all answers; fails where one is not HTTP, or tells of a bug."""
    statuses = []
    while got:
        head, end, got = got.partition(b"\r\n\r\n")
        assert end, head
        lines = head.decode("ascii").split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0"), lines
        if status == "100":
            continue
        headers = {
            name.lower(): value.strip()
            for name, _, value in (each.partition(":") for each in lines)
        }
        statuses.append(int(status))
        assert int(status) < 500, lines
        if headers.get("transfer-encoding") == "chunked":
            return statuses  # a stream, which goes on to the end
        size = int(headers["content-length"]) if "content-length" in headers else 0
        content, got = got[:size], got[size:]
        if int(status) >= 400 and content:
            assert headers["content-type"].startswith("application/problem+json"), lines
            assert json.loads(content)["status"] == int(status)
    return statuses


def check_healthy(daemon: Background) -> None:
    assert talk(daemon, [GET]) == [200]


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_what_has_broken_servers(daemon: Background, number: int) -> None:
    data = CORPUS[number]
    talk(daemon, [data])
    half = len(data) // 2
    talk(daemon, [data[:half], data[half:]])
    check_healthy(daemon)


_FRAGMENTS = st.one_of(
    st.sampled_from(CORPUS),
    st.sampled_from(
        [
            b"\r\n",
            b"\r\n\r\n",
            b"\n",
            b"GET ",
            b"POST ",
            b"DELETE ",
            b"/links",
            b"/programs",
            b"/maps/x/entries",
            b"/events",
            b"?limit=1&after=",
            b" HTTP/1.1\r\n",
            b"Host: x\r\n",
            b"Content-Length: ",
            b"Transfer-Encoding: chunked\r\n",
            b"Expect: 100-continue\r\n",
            b"Upgrade: websocket\r\n",
            b"Connection: upgrade\r\n",
            b"0\r\n\r\n",
            b"5\r\n",
            b'{"program": "prg-1", "kind": "kprobe", "symbols": ["vfs_read"]}',
        ]
    ),
    st.binary(max_size=40),
)


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """One of the corpus with a few bytes changed, taken out, or doubled."""
    data = bytearray(draw(st.sampled_from(CORPUS))[:4000])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 8))
        how = draw(st.sampled_from(["change", "remove", "double"]))
        if how == "double":
            data[place:place] = data[place : place + size]
        else:
            data[place : place + size] = draw(st.binary(max_size=4)) if how == "change" else b""
    return bytes(data)


def test_pieces_of_http(daemon: Background) -> None:
    @examples(150)
    @given(st.lists(_FRAGMENTS, max_size=12), st.integers(1, 3))
    def check(fragments: list[bytes], number: int) -> None:
        data = b"".join(fragments)
        size = len(data) // number + 1
        talk(daemon, [data[at : at + size] for at in range(0, len(data), size)])

    check()
    check_healthy(daemon)


def test_http_that_is_a_little_wrong(daemon: Background) -> None:
    @examples(200)
    @given(_mutated())
    def check(data: bytes) -> None:
        talk(daemon, [data])

    check()
    check_healthy(daemon)
