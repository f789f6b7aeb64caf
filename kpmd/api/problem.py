"""From any failure to the problem document that the client gets."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from kpmd import __version__
from kpmd.errors import (
    InternalError,
    Invalid,
    KpmdError,
    Malformed,
    MethodNotAllowed,
    NotFound,
)
from kpmd.log import Log

log = Log("kpmd.api")

#: Errors told of one request: the first ones are enough to mend it by.
_MOST_ERRORS = 20

#: Tagged unions: in pydantic's path their tag follows, which the client never wrote there.
_TAGGED = ("source", "lifetime")

CONTENT_TYPE = "application/problem+json"

#: The Server header of every answer.
SERVER = f"kpmd/{__version__}"


def from_validation(error: ValidationError) -> KpmdError:
    """A pydantic error as Invalid."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    items = [
        {"loc": _location(each["loc"]), "msg": _message(each)} for each in found[:_MOST_ERRORS]
    ]
    first = items[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    detail = f"{where}: {first['msg']}{more}" if where else f"{first['msg']}{more}"
    return Invalid(detail, errors=items)


def _location(loc: tuple[int | str, ...]) -> list[int | str]:
    tagged = len(loc) > 1 and loc[0] in _TAGGED
    return [loc[0], *loc[2:]] if tagged else list(loc)


def _message(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown field: leave it out"
    if error["type"] == "missing":
        return "is missing"
    message: str = error["msg"]
    return message.removeprefix("Value error, ")


def from_exception(error: BaseException, request_id: str) -> KpmdError:
    """Whatever a handler raised as an error with a place in the API; a bug is logged in full."""
    if isinstance(error, KpmdError):
        return error
    if isinstance(error, ValidationError):
        return from_validation(error)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"this path takes {allowed}", allow=allowed)
    if isinstance(error, web.HTTPNotFound):
        return NotFound("there is no such path; GET /openapi.json lists those there are")
    if isinstance(error, web.HTTPException):
        return Malformed(f"{error.reason}")
    if isinstance(error, (web.RequestPayloadError, ConnectionError, UnicodeError)):
        return Malformed("the body did not come whole")
    log.error("bug", error, request=request_id)
    return InternalError(
        "a bug in kpmd; the daemon's log has more under this request's id", request=request_id
    )


def response(error: KpmdError, request_id: str) -> web.Response:
    """The problem document as an HTTP answer."""
    document = error.problem()
    headers = {"X-Request-Id": request_id, "Server": SERVER}
    if allow := document.pop("allow", None):
        headers["Allow"] = allow
    return web.Response(
        status=error.status,
        body=json.dumps(document).encode(),
        content_type=CONTENT_TYPE,
        headers=headers,
    )


def raw(error: KpmdError, request_id: str) -> bytes:
    """The same as bytes, for a connection on which no request was read; it is the last answer."""
    body = json.dumps(error.problem()).encode()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        f"Server: {SERVER}",
        f"X-Request-Id: {request_id}",
        f"Content-Type: {CONTENT_TYPE}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode() + body
