"""Another machine's daemon, with a program in the place of ssh that relays on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kpmd.client import way
from kpmd.client.aio import AsyncClient
from kpmd.client.client import Client
from kpmd.client.errors import ConnectionFailed, NotSupported
from tests.unit.driven import MAKES, Make
from tests.unit.test_client import ROOT, always, http, scripted
from tests.unit.test_client_events import HEAD, chunk, event

FAKE = f"""#!{sys.executable} -SEs
import json, os, signal, socket, sys, threading

arguments = sys.argv[1:]
with open({{log!r}}, "a") as log:
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    print(json.dumps([os.getpid(), ignored, arguments]), file=log)
here, there = arguments[arguments.index("-L") + 1].split(":")
host, command = arguments[arguments.index("--") + 1 :]
if host == "closed.example":
    sys.exit("ssh: connect to host closed.example\\tport 22: Connection refused\\r")
if host == "mute.example":
    sys.exit(255)
if host == "silent.example":
    sys.stdin.read()
    sys.exit(1)
listener = socket.socket(socket.AF_UNIX)
listener.bind(here)
listener.listen()

def copy(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_RDWR)

def serve():
    while True:
        near, _ = listener.accept()
        far = socket.socket(socket.AF_UNIX)
        try:
            far.connect(there)
        except OSError:
            print("channel 2: open failed: no such file", file=sys.stderr, flush=True)
            near.close()
            continue
        for pair in ((near, far), (far, near)):
            threading.Thread(target=copy, args=pair, daemon=True).start()

threading.Thread(target=serve, daemon=True).start()
assert command.startswith("echo 'kpmd: forwarded';")
print("Welcome to", host)
print("kpmd: forwarded", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=list(MAKES))
def make(request: pytest.FixtureRequest) -> Make:
    return MAKES[request.param]


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was made of the calls of ssh, a line for each."""
    log = tmp_path / "log"
    (tmp_path / "ssh").write_text(FAKE.replace("{log!r}", repr(str(log))))
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return log


def calls(log: Path) -> list[list[Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@contextlib.contextmanager
def ends(pid: int) -> Iterator[None]:
    """A block that ends a process."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
        assert select.select([pidfd], [], [], 10)[0]
    finally:
        os.close(pidfd)


def test_one_ssh_serves_calls_and_streams(ssh: Path, make: Make) -> None:
    def script(method: str, target: str, body: object) -> bytes:
        return HEAD + chunk(event("a-1")) if target == "/events" else http({"version": "1"})

    with scripted(script) as server, make(f"ssh://ada@good.example:22{server.path}") as client:
        assert client.version()["version"] == "1"
        with client.events() as events:
            assert next(events)["seq"] == "a-1"
            assert client.version()["version"] == "1"
        with pytest.raises(NotSupported, match="ssh://ada@good"):
            client.map_fd("map-1")
    ((_, ignored, arguments),) = calls(ssh)
    assert ignored  # Ctrl-C is for who waits for ssh
    given = " ".join(arguments)
    for wanted in ("-l ada -p 22 -- good.example", "ControlPath=none", "ExitOnForwardFailure=yes"):
        assert wanted in given
    here = re.findall(r"-L (\S+):", given)[0]
    assert not Path(here).parent.exists()


def test_many_tasks_share_one(ssh: Path) -> None:
    async def work(address: str) -> None:
        async with AsyncClient(address) as client:
            found = await asyncio.gather(*(client.version() for _ in range(20)))
            assert {each["version"] for each in found} == {"1"}

    with scripted(always(http({"version": "1"}))) as server:
        asyncio.run(work(f"ssh://good.example{server.path}"))
    assert len(calls(ssh)) == 1


def test_started_anew_where_it_ended(ssh: Path, make: Make) -> None:
    with contextlib.ExitStack() as last:
        server = last.enter_context(scripted(always(http({"version": "1"}))))
        client = last.enter_context(make(f"ssh://good.example{server.path}"))
        client.version()
        with ends(calls(ssh)[0][0]):
            os.kill(calls(ssh)[0][0], signal.SIGKILL)
        assert client.version()["version"] == "1"
    assert len(calls(ssh)) == 2


@pytest.mark.parametrize(
    ("address", "message", "reason"),
    [
        ("ssh://closed.example", "closed.example port 22: Connection refused; see", "ssh"),
        ("ssh://mute.example", "ended without a reason; see whether `ssh -l", "ssh"),
        ("ssh://good.example/nowhere/k.sock", "is kpmd running.*open failed", "lost"),
        ("ssh://silent.example", "in time", "timeout"),
    ],
)
def test_why_it_does_not_get_there(
    address: str, message: str, reason: str, ssh: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpmd.client.ssh._has_terminal", lambda: False)
    address = address.replace("mute", "ada@mute")
    with make(address, timeout=0.5 if reason == "timeout" else 20) as client:
        with pytest.raises(ConnectionFailed, match=message) as caught:
            client.version()
        assert caught.value.reason == reason


def test_there_is_no_ssh(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    with make("ssh://good.example") as client, pytest.raises(ConnectionFailed, match="not found"):
        client.version()


def test_a_password_is_asked_for_only_where_there_is_somebody(
    ssh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for somebody, told in ((True, "BatchMode=no"), (False, "BatchMode=yes")):
        monkeypatch.setattr("kpmd.client.ssh._has_terminal", lambda there=somebody: there)
        with Client("ssh://closed.example") as client, pytest.raises(ConnectionFailed):
            client.version()
        assert told in calls(ssh)[-1][2]


def test_it_ends_with_this_process_however_that_ends(ssh: Path) -> None:
    code = (
        "import sys, time, kpmd.client\n"
        "kpmd.client.Client(sys.argv[1]).version()\n"
        "print(flush=True); time.sleep(60)\n"
    )
    with scripted(always(http({"version": "1"}))) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", code, f"ssh://good.example{server.path}"],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            with ends(calls(ssh)[0][0]):
                process.kill()


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "ssh://",
        "ssh:///run/kpmd.sock",
        "ssh://-oProxyCommand=x",
        "ssh://-l@host",
        "ssh://a:password@host",
        "ssh://host:port",
        "ssh://host:123456",
        "ssh://host/a:b",
        "ssh://host/a%d",
        "ssh://host/a b",
        "ssh://host\n/a",
        "ssh://[::1",
        "http://host/",
        "tcp://host:1",
        "unix://relative",
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    for client in (Client, AsyncClient):
        with pytest.raises(ConnectionFailed, match="is no address") as caught:
            client(address)
        assert caught.value.reason == "other"


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KPMD_SOCKET", raising=False)
    assert Client().address == "/run/kpmd.sock"
    monkeypatch.setenv("KPMD_SOCKET", "ssh://host")
    assert Client().address == "ssh://host"
    assert Client(Path("/a")).address == Client("unix:///a").address == "/a"
    assert Client("./a:b://c").address == "./a:b://c"
    for address in ("ssh://a.b@[::1]:2/x/y.sock", "ssh://host-1/", "ssh://192.0.2.1:22"):
        assert isinstance(Client(address)._way, way.Way)
    assert Client("ssh://a.b@[::1]:2/x/y.sock")._way.path == "/x/y.sock"
