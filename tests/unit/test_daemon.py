"""The daemon as a process: how it begins, how it ends, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kpmd import __version__
from tests.http.actor import UnixConnection
from tests.http.samples import instructions, link

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        yield Path(name)


class Process:
    """A daemon that tells this test what it tells systemd."""

    def __init__(self, stack: ExitStack, folder: Path, *arguments: str) -> None:
        self.path = folder / "k.sock"
        notified = folder / "notify"
        notified.unlink(missing_ok=True)
        self._notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._notify.bind(str(notified))
        self._notify.settimeout(20)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.daemon", str(self.path), *arguments],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(notified)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        stack.callback(self._end)
        assert self.told() == "READY=1"

    def _end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def told(self) -> str:
        """The next thing it tells systemd."""
        return self._notify.recv(1000).decode()

    def wait(self) -> tuple[int, list[dict[str, Any]]]:
        """Its exit status and its log."""
        _, log = self.process.communicate(timeout=20)
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def call(connection: UnixConnection, method: str, path: str, body: object = None) -> Any:
    """One request: status, and JSON if there is any."""
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    data = response.read()
    return response.status, json.loads(data) if data else None


def healthy(path: Path) -> bool:
    connection = UnixConnection(str(path))
    try:
        return bool(call(connection, "GET", "/healthz") == (200, {"status": "ok", "warnings": []}))
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(
    stack: ExitStack, folder: Path, number: signal.Signals
) -> None:
    daemon = Process(stack, folder)
    assert daemon.path.stat().st_mode & 0o777 == 0o660
    # A client that stays connected does not keep it from stopping.
    connection = UnixConnection(str(daemon.path))
    stack.callback(connection.close)
    status, made = call(connection, "POST", "/programs", instructions())
    assert status == 201
    assert call(connection, "POST", "/links", link(made["programs"][0]["id"]))[0] == 201
    daemon.process.send_signal(number)
    assert daemon.told() == "STOPPING=1"
    status, log = daemon.wait()
    assert status == 0
    assert [path.name for path in folder.iterdir()] == ["notify"]
    events = [line["event"] for line in log]
    assert events[-1] == "stopped"
    ended = [(line["what"], line["reason"]) for line in log if line["event"] == "ended"]
    assert ended == [("link", "shutdown"), ("program", "shutdown")]
    assert not {"error", "critical"} & {line["level"] for line in log}


def test_what_is_under_way_ends_before_it_does(stack: ExitStack, folder: Path) -> None:
    control = stack.enter_context(socket.socket(socket.AF_UNIX))
    control.bind(str(folder / "control"))
    control.listen()
    control.settimeout(20)
    daemon = Process(stack, folder, "close_link", str(folder / "control"))
    connection = UnixConnection(str(daemon.path))
    stack.callback(connection.close)
    _, made = call(connection, "POST", "/programs", instructions())
    _, linked = call(connection, "POST", "/links", link(made["programs"][0]["id"]))
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(call(connection, "DELETE", f"/links/{linked['id']}"))
    )
    asking.start()
    blocked, _ = control.accept()
    daemon.process.terminate()
    assert daemon.told() == "STOPPING=1"
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.process.wait(0.1)
    assert answers == []
    blocked.close()
    asking.join(20)
    assert answers == [(204, None)]
    assert daemon.wait()[0] == 0
    assert not daemon.path.exists()


def test_a_second_daemon_refuses_and_the_first_goes_on(stack: ExitStack, folder: Path) -> None:
    daemon = Process(stack, folder)
    second = subprocess.run(
        [sys.executable, "-m", "kpmd", "--socket", str(daemon.path)],
        cwd=ROOT,
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 1
    (line,) = (json.loads(line) for line in second.stderr.splitlines())
    assert line["event"] == "cannot listen"
    assert "another daemon" in line["reason"]
    assert healthy(daemon.path)


def test_after_a_kill_the_next_one_takes_its_place(stack: ExitStack, folder: Path) -> None:
    daemon = Process(stack, folder)
    assert healthy(daemon.path)
    daemon.process.kill()
    assert daemon.wait()[0] == -signal.SIGKILL
    assert daemon.path.exists()
    again = Process(stack, folder)
    assert healthy(again.path)
    again.process.terminate()
    assert again.wait()[0] == 0
    assert not again.path.exists()


def kpmd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kpmd", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_version_and_help() -> None:
    assert __version__ in kpmd("--version").stdout
    shown = kpmd("--help")
    assert shown.returncode == 0
    assert "--socket" in shown.stdout


def test_a_configuration_that_is_wrong(folder: Path) -> None:
    path = folder / "kpmd.toml"
    path.write_text("surprise = 1\n", encoding="ascii")
    ended = kpmd("--config", str(path), "--socket", str(folder / "k.sock"))
    assert ended.returncode != 0
    assert f"{path}: surprise: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (folder / "k.sock").exists()


def test_a_new_policy_at_sighup_and_a_bad_one_is_told(stack: ExitStack, folder: Path) -> None:
    policy = folder / "policy.toml"

    def write(name: str) -> None:
        rule = f'[[rules]]\nname = "{name}"\nusers = [{os.geteuid()}]\n'
        policy.write_text(rule)

    def reload() -> str:
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.told().startswith("RELOADING=1\nMONOTONIC_USEC=")
        return daemon.told()

    write("first")
    daemon = Process(stack, folder, "--policy", str(policy))
    connection = UnixConnection(str(daemon.path))

    def rule() -> str:
        name: str = call(connection, "GET", "/capabilities")[1]["policy"]["rule"]
        return name

    assert rule() == "first"
    write("second")
    assert reload() == "READY=1\nSTATUS=policy in force"
    assert rule() == "second"
    write("not a name")
    assert "rules[0].name" in reload()
    assert rule() == "second"
    policy.unlink()
    assert "No such file" in reload()
    assert rule() == "second"
    write("third")
    reload()
    assert rule() == "third"
    connection.close()
    daemon.process.terminate()
    _, log = daemon.wait()
    audited = [line for line in log if line.get("audit") == "policy"]
    assert [line["outcome"] for line in audited] == ["ok", "invalid", "invalid", "ok"]
    assert "rules[0].name" in audited[1]["detail"]


def test_full_collections_leave_out_what_stays() -> None:
    """In a process of its own: what is kept is kept for good."""
    code = (
        "import gc, kpmd.daemon as daemon\n"
        "daemon._keep()\n"
        "kept = gc.get_freeze_count()\n"
        "gc.disable()\n"
        "daemon._keep()\n"
        "print(kept, gc.get_freeze_count() > 10_000, gc.isenabled())\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "0 True True\n"
