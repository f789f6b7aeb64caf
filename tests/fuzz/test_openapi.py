"""Every call of the OpenAPI document with what it allows and what it does not, by schemathesis.

As an administrator, as a user, and as one of whom no rule of the policy is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection

from kpmd.core.policy import Policy
from kpmd.core.quotas import Limits
from tests.fakes.policies import EVERYTHING
from tests.fuzz.background import Background, examples
from tests.http.actor import NOBODY
from tests.http.contract import Answer, check, contract
from tests.http.samples import elf, link

#: As which policy knows this process, which is root.
USER = replace(EVERYTHING, limits=Limits())
POLICIES = {
    "administrator": Policy(rules=(), admin_users=frozenset({os.getuid()})),
    "user": Policy(rules=(USER,), admin_users=frozenset({NOBODY})),
    "stranger": Policy(rules=(), admin_users=frozenset({NOBODY})),
}

#: A stream has no end; tests/http/test_events.py and test_raw.py have it.
STREAMS = {"/events"}

_CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


class _Connection(HTTPConnection):
    """To the daemon of the test, wherever the URL points."""

    daemon: Background

    def connect(self) -> None:
        self.sock = self.daemon.connect()


class _Adapter(HTTPAdapter):
    """HTTP over the daemon's Unix socket."""

    def __init__(self, daemon: Background) -> None:
        super().__init__()

        class Connection(_Connection):
            pass

        Connection.daemon = daemon
        self._pool = HTTPConnectionPool("localhost")
        self._pool.ConnectionCls = Connection

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> HTTPConnectionPool:
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


@pytest.fixture(params=POLICIES)
def daemon(request: pytest.FixtureRequest) -> Iterator[Background]:
    with Background(policy=POLICIES[request.param]) as daemon:
        yield daemon


@pytest.fixture
def session(daemon: Background) -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.mount("http://", _Adapter(daemon))
        yield session


def _ids(daemon: Background, session: requests.Session) -> dict[str, list[str]]:
    """Ids of what there is, after something of each kind was made if it may be."""
    url = "http://localhost"
    loaded = session.post(f"{url}/programs", json=elf())
    if loaded.status_code == 201:
        program = loaded.json()["programs"][0]["id"]
        session.post(f"{url}/links", json=link(program))
    session.post(f"{url}/leases", json={"ttl": 60})
    registry = daemon.served.state.registry

    def read() -> dict[str, list[str]]:
        return {
            name: [each.id for each in getattr(registry, name)]
            for name in ("programs", "maps", "links", "leases", "clients")
        }

    return daemon.call(read)


def _use(data: st.DataObject, case: Case[Any], ids: dict[str, list[str]]) -> None:
    """Put ids of what there is in the place of those that were made up."""
    known = ids.get(case.operation.path.split("/")[1], [])
    if case.path_parameters and "id" in case.path_parameters and known:
        case.path_parameters["id"] = data.draw(st.sampled_from(known))
    if isinstance(case.body, dict) and "program" in case.body and ids["programs"]:
        case.body["program"] = data.draw(st.sampled_from(ids["programs"]))
    if isinstance(case.body, dict) and ids["leases"] and data.draw(st.booleans()):
        case.body["lifetime"] = {
            "kind": "lease",
            "lease": data.draw(st.sampled_from(ids["leases"])),
        }


def _call(
    daemon: Background, session: requests.Session, mode: GenerationMode, operation: Any
) -> None:
    """One call with many parameters and bodies."""
    ids = _ids(daemon, session)
    cases = operation.as_strategy(generation_mode=mode)

    @examples(5)
    @given(st.data())
    def call(data: st.DataObject) -> None:
        case = data.draw(cases)
        if data.draw(st.booleans()):
            _use(data, case, ids)
        response = case.call(base_url="http://localhost", session=session, timeout=20)
        assert response.status_code != 500, (case.as_curl_command(), response.content)
        case.validate_response(response, checks=_CHECKS)
        headers = {name: values[0] for name, values in response.headers.items()}
        path = case.formatted_path
        check(case.method, path, Answer(response.status_code, headers, response.content))

    call()


def _bounded(operation: Any) -> bool:
    """Whether the document forbids anything: in a path any text may stand."""
    told = operation.definition.raw
    return "requestBody" in told or any(
        each["in"] == "query" for each in told.get("parameters", ())
    )


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_call(daemon: Background, session: requests.Session, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(contract())
    operations = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 25
    for operation in operations:
        if operation.path in STREAMS or (
            mode is GenerationMode.NEGATIVE and not _bounded(operation)
        ):
            continue
        _call(daemon, session, mode, operation)
    assert session.get("http://localhost/healthz").status_code == 200
