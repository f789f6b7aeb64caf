"""A headless Chromium, and dashboards over the daemon with the fake kernel.

Debian's chromium and chromium-driver have to be installed; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.unit.test_client import running_daemon, short_directory
from tests.unit.test_kpmctl import Started

#: A name that leads to this machine, as a hostile DNS server could make any.
REBOUND = "rebound.example"

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1400,1400",
    f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1",
)


def until(condition: Callable[[], object]) -> None:
    """Wait for that."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Browser:
    """What tests do with a page."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Open an address anew, also where only its fragment differs."""
        self.driver.get("about:blank")
        self.driver.get(url)

    def text(self, selector: str) -> str:
        """What there is to be read in all these elements."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        return "\n".join(self.driver.execute_script(script, selector))

    def shows(self, selector: str, pattern: str) -> None:
        """Wait until something like that is to be read there."""
        try:
            until(lambda: re.search(pattern, self.text(selector)))
        except AssertionError:
            raise AssertionError(f"{selector} shows {self.text(selector)!r}") from None

    def shows_not(self, selector: str, pattern: str) -> None:
        """Wait until nothing like that is to be read there."""
        until(lambda: not re.search(pattern, self.text(selector)))

    def count(self, selector: str) -> int:
        """How many such elements there are."""
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def complaints(self) -> list[Any]:
        """What the console has since this was asked last."""
        found: list[Any] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return found


@pytest.fixture(autouse=True)
def no_leaked_fds() -> None:
    """Not here: the relay below has connections that come and go with those of the dashboard."""


@pytest.fixture(scope="session")
def _driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for each in (*_ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(_driver: Chrome) -> Iterator[Browser]:
    """Its console has to stay empty, unless the test itself asked for what is in it."""
    made = Browser(_driver)
    made.complaints()
    yield made
    _driver.get("about:blank")
    assert made.complaints() == []


class Relay(socketserver.ThreadingUnixStreamServer):
    """Between a dashboard and its daemon: keeps the first lines of all requests."""

    daemon_threads = True

    def __init__(self, path: str, daemon: str) -> None:
        self.daemon = daemon
        self.requests: list[str] = []
        super().__init__(path, _Relayed)


class _Relayed(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as daemon, contextlib.suppress(OSError):
            daemon.connect(self.server.daemon)
            back = threading.Thread(target=self._pass, args=(daemon, self.request, None))
            back.start()
            self._pass(self.request, daemon, self.server.requests)
            back.join()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, lines: list[str] | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if lines is not None:
                    lines += re.findall(r"^([A-Z]+ \S+) HTTP/1.1\r$", data.decode(), re.MULTILINE)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relayed(daemon: str) -> Iterator[Relay]:
    """A relay to the daemon at that socket."""
    with short_directory() as directory:
        server = Relay(str(directory / "relay.sock"), daemon)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class Dashboard(Started):
    """``kpmctl dashboard`` as a process; ``url`` is the address that it wrote."""

    def __init__(self, socket_: str, *arguments: str) -> None:
        super().__init__(socket_, "dashboard", *arguments)
        self.url = self.first_line().strip()

    def __exit__(self, *error: object) -> None:
        self.send_signal(signal.SIGTERM)
        self.end()
        assert self.returncode == 0


class World:
    """A daemon whose functions are called, a dashboard of it, and what came to the daemon."""

    def __init__(self, daemon: str, relay: Relay, dashboard: Dashboard) -> None:
        self.daemon = daemon
        self.relay = relay
        self.dashboard = dashboard


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with (
        running_daemon("--traffic") as (path, _),
        relayed(path) as relay,
        Dashboard(relay.server_address) as dashboard,  # type: ignore[arg-type]
    ):
        yield World(path, relay, dashboard)


@pytest.fixture
def place() -> Iterator[Path]:
    """Where a socket may be, whose daemon changes: a symbolic link to be made."""
    with short_directory() as directory:
        yield directory / "kpmd.sock"


def lead(place: Path, daemon: str) -> None:
    """Let a place lead to that daemon from now on."""
    new = place.with_suffix(".new")
    os.symlink(daemon, new)
    os.replace(new, place)
