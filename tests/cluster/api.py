"""As much of Kubernetes' API as it takes to install into: a cluster that takes all it is sent."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

#: The kinds that a cluster here knows: group and version, their names in paths, whether each is in
#: a namespace.
_KINDS = {
    "v1": [
        ("ConfigMap", "configmaps", True),
        ("Namespace", "namespaces", False),
        ("Pod", "pods", True),
        ("Secret", "secrets", True),
        ("ServiceAccount", "serviceaccounts", True),
    ],
    "apps/v1": [("DaemonSet", "daemonsets", True)],
    "scheduling.k8s.io/v1": [("PriorityClass", "priorityclasses", False)],
}


def _discovery() -> dict[str, Any]:
    groups = [
        {
            "name": version.partition("/")[0],
            "versions": [{"groupVersion": version, "version": "v1"}],
            "preferredVersion": {"groupVersion": version, "version": "v1"},
        }
        for version in _KINDS
        if "/" in version
    ]
    answers: dict[str, Any] = {
        "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
    }
    described = {}
    for version, kinds in _KINDS.items():
        path = f"{'apis' if '/' in version else 'api'}/{version}"
        described[path] = {"serverRelativeURL": f"/openapi/v3/{path}"}
        answers[f"/openapi/v3/{path}"] = _described(version, [kind for kind, *_ in kinds])
        answers[f"/{path}"] = {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": version,
            "resources": [
                {"name": plural, "singularName": "", "kind": kind, "namespaced": namespaced,
                 "verbs": ["create", "get", "list", "update"]}
                for kind, plural, namespaced in kinds
            ],
        }  # fmt: skip
    answers["/openapi/v3"] = {"paths": described}
    return answers


def _described(version: str, kinds: list[str]) -> dict[str, Any]:
    """That the server checks fields itself: clients then do not."""
    group, _, name = version.rpartition("/")
    parameter = {"name": "fieldValidation", "in": "query"}
    paths = {
        f"/{kind}": {
            "patch": {
                "parameters": [parameter],
                "x-kubernetes-group-version-kind": {"group": group, "version": name, "kind": kind},
            }
        }
        for kind in kinds
    }
    return {"openapi": "3.0.0", "info": {"title": "", "version": ""}, "paths": paths}


_NOT_FOUND = {
    "kind": "Status",
    "apiVersion": "v1",
    "status": "Failure",
    "reason": "NotFound",
    "code": 404,
}


class _Api(http.server.BaseHTTPRequestHandler):
    answers = _discovery()
    #: By their paths.
    made: dict[str, Any]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Nobody reads it."""

    def _answer(self, status: int, body: object) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, raw: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.endswith("/secrets"):  # where Helm keeps its releases
            self._answer(200, {"kind": "SecretList", "apiVersion": "v1", "items": []})
        elif found := self.answers.get(path) or self.made.get(path):
            self._answer(200, found)
        else:
            self._answer(404, _NOT_FOUND)

    def do_POST(self) -> None:
        raw, kind = self._body(), self.headers["Content-Type"]
        if kind == "application/json":  # Helm's own records are in another format
            body = json.loads(raw)
            self.made[f"{urlsplit(self.path).path}/{body['metadata']['name']}"] = body
        self._send(201, kind, raw)

    def do_PUT(self) -> None:
        self._send(200, self.headers["Content-Type"], self._body())

    def do_PATCH(self) -> None:
        """Of labels, or nothing: no other change is asked for here."""
        found = self.made[urlsplit(self.path).path]
        change = json.loads(self._body())
        metadata = change.pop("metadata", {})
        found["metadata"].setdefault("labels", {}).update(metadata.pop("labels", {}))
        assert not change | metadata, change | metadata
        self._answer(200, found)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Serve one; gives its kubeconfig, made in ``folder``, and what is created, by its path."""
    made: dict[str, Any] = {}
    handler = type("Api", (_Api,), {"made": made})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "one", "context": {"cluster": "here", "user": "me"}}],
            "current-context": "one",
        }
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(json.dumps(config), encoding="utf-8")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield kubeconfig, made
        finally:
            server.shutdown()
            thread.join()
