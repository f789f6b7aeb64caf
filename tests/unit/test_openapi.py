"""The contract as a document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from kpmd import API_VERSION
from kpmd.api.app import routes
from kpmd.api.openapi import document, to_json

ROOT = Path(__file__).parents[2]

#: The calls of the contract that this version has.
CALLS = {
    "GET /events",
    "POST /leases",
    "GET /leases",
    "GET /leases/{id}",
    "PUT /leases/{id}",
    "DELETE /leases/{id}",
    "GET /policy",
    "POST /policy/explain",
    "GET /capabilities",
    "GET /healthz",
    "GET /metrics",
    "GET /version",
    "GET /openapi.json",
    "POST /programs",
    "GET /programs",
    "GET /programs/{id}",
    "DELETE /programs/{id}",
    "GET /maps",
    "GET /maps/{id}",
    "GET /maps/{id}/entries",
    "PUT /maps/{id}/entries",
    "DELETE /maps/{id}/entries",
    "GET /maps/{id}/entries/{key}",
    "PUT /maps/{id}/entries/{key}",
    "DELETE /maps/{id}/entries/{key}",
    "POST /maps/{id}/push",
    "POST /maps/{id}/pop",
    "GET /maps/{id}/peek",
    "GET /maps/{id}/dump",
    "GET /maps/{id}/records",
    "POST /maps/{id}/fd",
    "GET /programs/{id}/globals",
    "GET /programs/{id}/globals/{name}",
    "PUT /programs/{id}/globals/{name}",
    "POST /links",
    "GET /links",
    "GET /links/{id}",
    "DELETE /links/{id}",
    "GET /links/{id}/targets",
    "GET /links/{id}/skipped",
    "GET /symbols",
    "PUT /links/{id}/program",
    "PUT /links/{id}/pin",
    "DELETE /links/{id}/pin",
    "GET /clients",
    "GET /clients/{id}",
    "DELETE /clients/{id}",
    "GET /work",
}


@pytest.fixture(scope="module")
def contract() -> dict[str, Any]:
    return document(routes())


def test_the_file_is_what_the_code_says(contract: dict[str, Any]) -> None:
    with (ROOT / "openapi.yaml").open(encoding="utf-8") as file:
        assert yaml.safe_load(file) == contract


def test_every_call_is_there(contract: dict[str, Any]) -> None:
    told = {
        f"{method.upper()} {path}"
        for path, operations in contract["paths"].items()
        for method in operations
    }
    assert told == CALLS


def test_it_is_json(contract: dict[str, Any]) -> None:
    assert json.loads(to_json(routes())) == contract
    assert contract["openapi"].startswith("3.1.")
    assert contract["info"]["version"] == API_VERSION


def references(value: object) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*(references(each) for each in value.values()))
    if isinstance(value, list):
        return set().union(*(references(each) for each in value))
    return set()


def test_every_reference_leads_somewhere_and_nothing_is_left_over(
    contract: dict[str, Any],
) -> None:
    prefix = "#/components/schemas/"
    used = references(contract)
    assert all(reference.startswith(prefix) for reference in used)
    assert {reference.removeprefix(prefix) for reference in used} == set(
        contract["components"]["schemas"]
    )


def test_schemas_are_schemas_and_closed(contract: dict[str, Any]) -> None:
    for name, schema in contract["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert schema["additionalProperties"] is False, name


def test_operations_are_named_apart_and_tell_of_their_parameters(contract: dict[str, Any]) -> None:
    names = []
    for path, operations in contract["paths"].items():
        for operation in operations.values():
            names.append(operation["operationId"])
            parameters = operation.get("parameters", [])
            in_path = {each["name"] for each in parameters if each["in"] == "path"}
            assert in_path == set(re.findall(r"\{(\w+)\}", path))
            for each in parameters:
                Draft202012Validator.check_schema(each["schema"])
    assert len(set(names)) == len(names)


def test_made_things_tell_where_they_are(contract: dict[str, Any]) -> None:
    assert "Location" in contract["paths"]["/links"]["post"]["responses"]["201"]["headers"]


@pytest.mark.parametrize(
    ("call", "statuses"),
    [
        ("post /links", "200 201 400 403 404 408 409 410 413 422 429 500 501 503"),
        ("get /symbols", "200 400 403 408 422 429 500"),
        ("get /links/{id}/skipped", "200 400 404 408 422 429 500"),
        ("post /programs", "201 400 403 404 408 410 413 422 429 500 501 503"),
        ("delete /programs/{id}", "204 400 403 404 408 409 422 429 500"),
        ("get /capabilities", "200 400 403 408 422 429 500"),
        ("put /links/{id}/pin", "400 403 404 408 422 429 500 501"),
    ],
)
def test_statuses(contract: dict[str, Any], call: str, statuses: str) -> None:
    method, path = call.split()
    assert sorted(contract["paths"][path][method]["responses"]) == statuses.split()
