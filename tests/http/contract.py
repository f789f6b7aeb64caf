"""Checks each answer against the OpenAPI document that the daemon itself gives out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

from kpmd.api.app import routes
from kpmd.api.openapi import document

PROBLEM = "application/problem+json"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
OCTETS = "application/octet-stream"
TEXT = ("text/plain", "application/openmetrics-text")

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")

_formats = FormatChecker(formats=())


@_formats.checks("date-time", raises=ValueError)
def _is_time(value: object) -> bool:
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return False
    datetime.fromisoformat(value)
    return True


@lru_cache(maxsize=1)
def contract() -> dict[str, Any]:
    """The OpenAPI document."""
    return document(routes())


@cache
def _validator(reference: str) -> Draft202012Validator:
    schema = {"$ref": reference, "components": contract()["components"]}
    return Draft202012Validator(schema, format_checker=_formats)


@lru_cache(maxsize=1)
def _paths() -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    return [
        (re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), operations)
        for path, operations in contract()["paths"].items()
    ]


def operation(method: str, path: str) -> dict[str, Any] | None:
    """What the document says of a call; None where it does not know it."""
    bare = path.partition("?")[0]
    for pattern, operations in _paths():
        if pattern.fullmatch(bare):
            found: dict[str, Any] | None = operations.get(method.lower())
            return found
    return None


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read in full."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        """The error's kind."""
        kind: str = self.json["kind"]
        return kind


def _check_schema(schema: Mapping[str, Any], value: object) -> None:
    if "$ref" in schema:
        _validator(schema["$ref"]).validate(value)
    else:
        Draft202012Validator(schema).validate(value)


def check(method: str, path: str, answer: Answer) -> None:
    """Fail unless the document tells of this answer to this call."""
    what = f"{method} {path[:100]} -> {answer.status}"
    headers = {name.lower(): value for name, value in answer.headers.items()}
    kind = headers.get("content-type", "").partition(";")[0]
    assert headers["server"].startswith("kpmd/"), what
    assert headers["x-request-id"], what
    known = operation(method, path)
    if known is None:
        # Not a call of the API: only that may be said.
        assert answer.status in (400, 404, 405), what
        responses: dict[str, Any] = {
            str(answer.status): {
                "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
            }
        }
    else:
        responses = known["responses"]
    assert str(answer.status) in responses, f"{what} is not documented: {answer.body[:500]!r}"
    told = responses[str(answer.status)]
    if "content" not in told:
        assert answer.body == b"", what
        return
    assert kind in told["content"], f"{what}: {kind}"
    if kind in (NDJSON, SSE):
        for event in events(kind, answer.body):
            _check_schema(told["content"][kind]["schema"], event)
        return
    if kind == OCTETS or kind in TEXT:
        return
    value = json.loads(answer.body)
    _check_schema(told["content"][kind]["schema"], value)
    for header in told.get("headers", {}):
        assert header.lower() in headers, f"{what} has no {header}"
    if answer.status >= 400:
        assert value["status"] == answer.status, what
        assert value["type"] == f"urn:kpmd:error:{value['kind']}", what
        assert value["title"], what
        assert value["detail"], what
        if known is not None:
            assert f"`{value['kind']}`" in told["description"], f"{what}: {value['kind']}"


def events(content_type: str, data: bytes) -> list[Any]:
    """The events in part of a stream; fails where it is not what its content type says."""
    parts = data.split(b"\n" if content_type == NDJSON else b"\n\n")
    assert parts.pop() == b"", f"cut in the middle of an event: {data[-200:]!r}"
    if content_type == NDJSON:
        return [json.loads(part) for part in parts]
    found = []
    for part in parts:
        if part == b":":
            continue  # a comment, against the silence
        id_, value = part.split(b"\n")
        assert id_.startswith(b"id: "), part
        assert value.startswith(b"data: "), part
        found.append(json.loads(value.removeprefix(b"data: ")))
        assert found[-1]["seq"].encode() == id_.removeprefix(b"id: ")
    return found
