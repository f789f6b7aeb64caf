"""``openapi.yaml``, made from the route table and the models: it cannot say what is not so.

``make openapi`` writes it, and ``make check`` compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from kpmd import API_VERSION, errors
from kpmd.api import problem
from kpmd.api.answers import Problem
from kpmd.api.route import Access, Route

#: What every call can answer, and what every call with a body or query can.
_ALWAYS = ("malformed", "invalid", "timeout", "quota", "internal")
_WITH_BODY = ("too-large",)

_BY_KIND: dict[str, type[errors.KpmdError]] = {
    each.kind: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, errors.KpmdError)
}


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these routes."""
    routes = list(routes)
    bodies = {route.body for route in routes if route.body is not None}
    answers = {route.answer for route in routes if route.answer is not None} | {Problem}
    answers |= {model for route in routes for model in route.also.values()}
    _, schemas = models_json_schema(
        [(model, "validation") for model in sorted(bodies, key=lambda each: each.__name__)]
        + [(model, "validation") for model in sorted(answers, key=lambda each: each.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kpmd",
            "version": API_VERSION,
            "description": "Attach BPF programs to kernel functions, over a Unix socket.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost/", "description": "/run/kpmd.sock"}],
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _schema(content_type: str, model: type[BaseModel]) -> dict[str, str]:
    if content_type == "application/octet-stream":
        return {"type": "string", "format": "binary"}
    return _ref(model)


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "tags": [route.tag],
        "operationId": re.sub(r"\W+", "_", f"{route.method} {route.path}".lower()).strip("_"),
    }
    if route.access is Access.ADMIN:
        operation["description"] = f"For {Access.ADMIN.value} only."
    elif route.right is not None:
        operation["description"] = f"The policy must grant `{route.right}`."
    if parameters := [*_path_parameters(route), *_query_parameters(route)]:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": not route.optional_body,
            "content": {"application/json": {"schema": _ref(route.body)}},
        }
    operation["responses"] = _responses(route)
    return operation


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    schema = route.query.model_json_schema()
    return [
        {
            "name": name,
            "in": "query",
            "schema": {key: value for key, value in field.items() if key != "title"},
        }
        for name, field in schema.get("properties", {}).items()
    ]


def _responses(route: Route) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    if route.status < 400:
        success: dict[str, Any] = {"description": route.summary}
        if route.answer is not None:
            types = route.streams or ("application/json",)
            success["content"] = {each: {"schema": _schema(each, route.answer)} for each in types}
        elif route.text:
            success["content"] = {each: {"schema": {"type": "string"}} for each in route.text}
        elif route.status != 204:
            success["content"] = {"application/json": {"schema": {"type": "object"}}}
        if route.status == 201 and route.path in ("/links", "/leases"):
            success["headers"] = {"Location": {"schema": {"type": "string"}}}
        responses[str(route.status)] = success
    for status, model in route.also.items():
        content = {"application/json": {"schema": _ref(model)}}
        responses[str(status)] = {"description": model.__doc__, "content": content}
    kinds = [*_ALWAYS, *(_WITH_BODY if route.body else ()), *route.errors]
    changes = route.method != "GET" and "not-found" in route.errors
    if route.right is not None or route.access is Access.ADMIN or changes:
        kinds.append("forbidden")  # who reads what is others' may not change it
    by_status: dict[int, list[str]] = {}
    for kind in dict.fromkeys(kinds):
        by_status.setdefault(_BY_KIND[kind].status, []).append(kind)
    for status, names in sorted(by_status.items()):
        responses[str(status)] = {
            "description": ", ".join(f"`{name}`" for name in names),
            "content": {problem.CONTENT_TYPE: {"schema": _ref(Problem)}},
        }
    return responses


def to_json(routes: Iterable[Route]) -> bytes:
    """The document as ``GET /openapi.json`` answers it."""
    return json.dumps(document(routes)).encode()
