"""The API, spoken with the standard library alone: it starts quickly in the VM."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Rest:
    """One connection to the daemon."""

    def __init__(self, path: str, timeout: float = 120) -> None:
        self._connection = UnixConnection(path, timeout)

    def __call__(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """The status and the parsed body of one request."""
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data)
        response = self._connection.getresponse()
        raw = response.read()
        return response.status, json.loads(raw) if raw else None

    def ok(self, method: str, path: str, body: object = None) -> Any:
        """The parsed body of a request that must succeed."""
        status, answer = self(method, path, body)
        assert status < 300, answer
        return answer

    def items(self, path: str) -> list[Any]:
        """All items of a list, page by page."""
        found: list[Any] = []
        after = ""
        while True:
            page = self.ok("GET", f"{path}{'&' if '?' in path else '?'}limit=1000{after}")
            found += page["items"]
            if page["next"] is None:
                return found
            after = f"&after={page['next']}"

    def close(self) -> None:
        self._connection.close()
