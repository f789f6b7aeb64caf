"""Traces leave kpmd.service by the drop-in that the documentation shows, and not without it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kpmd.client import Client
from tests.docs.pages import blocks
from tests.systemd.conftest import SOCKET, Kpmd
from tests.systemd.control import run, until

CONFIG, DROP_IN, COMMANDS = Path("/etc/kpmd/kpmd.toml"), "tracing.conf", "docs/how-to/traces.md"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.came.append((self.path, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def came() -> Iterator[list[tuple[str, bytes]]]:
    """What came to a collector on the machine: paths and bodies."""
    server = ThreadingHTTPServer(("127.0.0.1", 4318), _Handler)
    server.came = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.came  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def documented() -> Iterator[tuple[str, str]]:
    """The configuration that the documentation shows, and the commands; undone afterwards."""
    config, commands = blocks(COMMANDS)
    folder = Path("/etc/systemd/system/kpmd.service.d")
    yield config.text, commands.text
    CONFIG.unlink(missing_ok=True)
    (folder / DROP_IN).unlink(missing_ok=True)
    run("systemctl", "daemon-reload")


def ask() -> None:
    with Client(SOCKET) as client:
        client.version()


def test_by_the_drop_in_and_not_without(
    kpmd: Kpmd, documented: tuple[str, str], came: list[tuple[str, bytes]]
) -> None:
    config, commands = documented
    CONFIG.write_text(config.replace("sample_ratio = 0.1", ""))
    ask()
    kpmd.service.stop()
    assert kpmd.journal.wait_for("spans lost")["number"] == 1
    assert came == []
    assert "The configuration is good." in run("sh", "-ec", commands)
    ask()
    until(lambda: bool(came), "spans come")
    ((path, body),) = came
    assert path == "/v1/traces"
    assert b"GET /version" in body
