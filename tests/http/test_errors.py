"""Bytes that are not HTTP, not JSON, or not what a call takes."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.kernel import FakeKernel
from tests.http.contract import PROBLEM, Answer, check, contract
from tests.http.samples import CODE, ELF, a_link, a_program, instructions, link
from tests.http.serving import Client, Served, raw

Serve = Callable[..., Awaitable[Served]]


def check_problem(answer: Answer, status: int, kind: str) -> None:
    """Fail unless it is a problem document of that kind."""
    if status == 400:
        check("GET", "/no-such-path", answer)  # what no call of the API may answer otherwise
    assert answer.headers["Content-Type"].partition(";")[0] == PROBLEM
    assert answer.json["kind"] == kind, answer.body
    assert answer.json["status"] == answer.status == status


LONG = b"a" * 10_000

NOT_HTTP = {
    "zeros": bytes(100),
    "tls": bytes.fromhex("16030100a5010000a10303") + bytes(150),
    "words": b"hello there\r\n\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "bad version": b"GET /healthz HTTP/9.99\r\nHost: x\r\n\r\n",
    "long target": b"GET /" + LONG + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "long header": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: " + LONG + b"\r\n\r\n",
    "many headers": b"GET /healthz HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n",
    "header without colon": b"GET /healthz HTTP/1.1\r\nHost x\r\n\r\n",
    "space before colon": b"GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n",
    "nul in header": b"GET /healthz HTTP/1.1\r\nHost: x\0y\r\n\r\n",
    "two lengths": b"POST /links HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "length and chunks": (
        b"POST /links HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "negative length": b"POST /links HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}",
    "length in words": b"POST /links HTTP/1.1\r\nContent-Length: many\r\n\r\n{}",
    "bad chunk size": (
        b"POST /links HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n"
    ),
}


@pytest.mark.every_loop
@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP.keys())
async def test_what_is_not_http_is_malformed(served: Served, client: Client, data: bytes) -> None:
    (answer,) = await raw(served.path, data)
    check_problem(answer, 400, "malformed")
    await client.get("/healthz")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: nonsense\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: x\r\nExpect: nonsense\r\n\r\n",
        b"POST /links HTTP/1.1\r\nHost: x\r\nExpect: nonsense\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_an_unknown_expectation_gets_a_problem_document(served: Served, head: bytes) -> None:
    (answer,) = await raw(served.path, head)
    assert 400 <= answer.status < 500
    assert answer.headers["Content-Type"].partition(";")[0] == PROBLEM
    assert answer.json["status"] == answer.status


@pytest.mark.parametrize(
    "line",
    [
        b"CONNECT localhost:80",
        b"OPTIONS *",
        b"OPTIONS /links",
        b"TRACE /links",
        b"PATCH /links",
        b"BREW /links",
        b"PUT /links",
        b"GET http://localhost/nothing",
        b"GET //",
        b"GET /links/",
        b"GET /links/%00/%00",
        b"GET /links/../../etc/passwd",
        b"GET /%zz",
    ],
)
async def test_unknown_methods_and_paths(served: Served, client: Client, line: bytes) -> None:
    (answer,) = await raw(served.path, line + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.status in (400, 404, 405), answer
    assert answer.headers["Content-Type"].partition(";")[0] == PROBLEM
    assert answer.json["status"] == answer.status
    await client.get("/healthz")


async def test_a_known_path_tells_its_methods(client: Client) -> None:
    answer = await client.request("PATCH", "/links")
    assert answer.status == 405
    assert answer.kind == "method-not-allowed"
    assert answer.headers["Allow"] == "GET, POST"


async def test_raw_bytes_in_a_path_or_query_are_only_unknown(
    served: Served, client: Client
) -> None:
    for target, status in (
        (b"/links/\xff\xfe", (400, 404)),
        (b"/links/%ff", (404,)),
        (b"/links/%ed%a0%80", (404,)),
        (b"/links?program=%ff", (200, 422)),
        (b"/links?program=\xff", (200, 400, 422)),
        (b"/links?%ff=1", (422,)),
        (b"/links?\xff=1", (400, 422)),
        (b"/maps/x/entries/\xc3\xa9", (400, 404)),
    ):
        (answer,) = await raw(served.path, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.status in status, (target, answer)
        assert json.loads(answer.body)
    await client.get("/healthz")


async def test_requests_one_after_the_other_in_one_piece(served: Served) -> None:
    """Pipelined requests are answered in their order, each for itself."""
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    other = b"GET /links?limit=0 HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answers = await raw(served.path, one + other + last, 3)
    assert [answer.status for answer in answers] == [200, 422, 200]


POSTS = ("/programs", "/links")

NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "space": b" \n",
    "word": b"hello",
    "truncated": b'{"program": "prg-1", "kind',
    "truncated number": b'{"a": 1e',
    "trailing comma": b'{"a": 1,}',
    "two values": b"{} {}",
    "single quotes": b"{'a': 1}",
    "comment": b"{} // {}",
    "deep list": b"[" * 100_000,
    "deep closed list": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep in a field": b'{"labels": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep in an unknown field": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not utf-8": b'{"program": "\xff\xfe"}',
    "utf-16": '{"program": "x"}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "lone surrogate": b'{"program": "\\ud800"}',
    "lone low surrogate": b'{"program": "\\udc00"}',
    "surrogate in a key": b'{"\\ud800": 1}',
    "encoded surrogate": b'{"program": "\xed\xa0\x80"}',
    "control character": b'{"program": "a\nb"}',
    "leading zero": b'{"a": 012}',
    "plus": b'{"a": +1}',
    "hexadecimal": b'{"a": 0x10}',
    "gzip": gzip.compress(b"{}"),
    "gzip bomb": gzip.compress(bytes(5_000_000)),
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("data", NOT_JSON.values(), ids=NOT_JSON.keys())
async def test_what_is_not_json_is_malformed(client: Client, path: str, data: bytes) -> None:
    await client.refused("POST", path, data=data, status=400, kind="malformed")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("where", ["top", "known", "unknown"])
async def test_numbers_that_json_does_not_have(
    client: Client, path: str, number: str, where: str
) -> None:
    body = {"top": number, "known": f'{{"program": {number}, "source": {number}}}'}.get(
        where, f'{{"unknown": {number}}}'
    )
    answer = await client.request("POST", path, data=body.encode())
    assert (answer.status, answer.kind) in ((400, "malformed"), (422, "invalid"))


async def test_compressed_bodies_are_not_opened(client: Client) -> None:
    body = gzip.compress(json.dumps(instructions()).encode())
    answer = await client.request(
        "POST", "/programs", data=body, headers={"Content-Encoding": "gzip"}
    )
    assert (answer.status, answer.kind) == (400, "malformed")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("value", [[], [[]], 0, 1.5, "text", True, {}, None])
async def test_json_of_another_shape_is_invalid(client: Client, path: str, value: object) -> None:
    problem = await client.refused(
        "POST", path, data=json.dumps(value).encode(), status=422, kind="invalid"
    )
    assert problem["errors"]


def _paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all objects in ``value`` whose fields the contract fixes."""
    found = []
    if isinstance(value, dict):
        if path[-1:] not in (("labels",), ("globals",), ("max_entries",)):
            found.append(path)
        for name, each in value.items():
            found += _paths(each, (*path, name))
    return found


FULL_BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "instructions": (
        "/programs",
        {
            "source": {
                "kind": "instructions",
                "instructions": CODE,
                "license": "GPL",
                "name": "probe",
            },
            "attach": "kprobe_multi",
            "lifetime": {"kind": "process"},
            "labels": {"a": "b"},
            "verifier_log": False,
        },
    ),
    "object": (
        "/programs",
        {
            "source": {
                "kind": "object",
                "elf": ELF,
                "programs": ["count"],
                "globals": {"a": 1, "b": "AAAA"},
                "max_entries": {"counts": 10},
            },
            "attach": "kprobe_multi",
            "lifetime": {"kind": "persistent"},
            "labels": {},
            "verifier_log": True,
        },
    ),
    "builtin": (
        "/programs",
        {
            "source": {
                "kind": "builtin",
                "builtin": "count",
                "globals": {"target_pid": 1},
                "max_entries": {"counts": 10},
            },
            "lifetime": {"kind": "process"},
        },
    ),
    "symbols": (
        "/links",
        {
            "program": "prg-?",
            "kind": "kprobe",
            "symbols": ["vfs_read"],
            "cookies": [1],
            "mechanism": "kprobe_multi",
            "on_untraceable": "error",
            "on_ambiguous": "all",
            "lifetime": {"kind": "process"},
            "labels": {"a": "b"},
        },
    ),
    "patterns": (
        "/links",
        {
            "program": "prg-?",
            "kind": "kprobe",
            "patterns": ["vfs_*"],
            "exclude": ["*_open"],
            "on_untraceable": "skip",
            "on_ambiguous": "first",
            "dry_run": False,
        },
    ),
    "addresses": (
        "/links",
        {
            "program": "prg-?",
            "kind": "kretprobe",
            "addresses": ["0xffffffff81001000"],
            "cookies": ["7"],
            "lifetime": {"kind": "persistent"},
            "labels": {},
        },
    ),
}


async def _fresh(client: Client, name: str) -> tuple[str, dict[str, Any]]:
    path, body = FULL_BODIES[name]
    copy: dict[str, Any] = json.loads(json.dumps(body))
    if "program" in copy:
        copy["program"] = await a_program(client)
    return path, copy


def _at(body: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        body = body[part]
    return body


@pytest.mark.parametrize("name", FULL_BODIES)
async def test_the_full_bodies_are_accepted(client: Client, name: str) -> None:
    path, body = await _fresh(client, name)
    await client.post(path, body)


@pytest.mark.parametrize("name", FULL_BODIES)
async def test_unknown_fields_are_refused_at_every_level(
    client: Client, kernel: FakeKernel, name: str
) -> None:
    path, body = await _fresh(client, name)
    before = len(kernel.programs)
    for place in _paths(body):
        changed = json.loads(json.dumps(body))
        _at(changed, place)["surprise"] = 1
        problem = await client.refused("POST", path, changed, status=422, kind="invalid")
        assert problem["errors"] == [
            {"loc": [*place, "surprise"], "msg": "unknown field: leave it out"}
        ]
    assert len(kernel.programs) == before
    assert kernel.links == []


#: For each type of field what is not of it.
_STRANGERS: list[object] = [None, True, 1, -1, 1.0, 2**64, "x", [], ["x"], {}, {"kind": "x"}, [{}]]

_ALLOWED_STRANGERS: dict[str, list[object]] = {
    "license": ["x"],
    "name": ["x"],
    "programs": [None, [], ["x"]],
    "attach": [None],
    "labels": [{}, {"kind": "x"}],
    "globals": [{}],
    "max_entries": [{}],
    "verifier_log": [True],
    "cookies": [None],
    "exclude": [[], ["x"]],
    "on_untraceable": [None],
    "mechanism": [None],
    "dry_run": [True],
    # None, and the other of the two is missing: refused as well, but for that.
    "symbols": [],
    "addresses": [],
    "patterns": [],
}


@pytest.mark.parametrize("name", FULL_BODIES)
async def test_fields_of_another_type_are_refused(
    client: Client, kernel: FakeKernel, name: str
) -> None:
    path, body = await _fresh(client, name)
    before = len(kernel.programs)
    for place in _paths(body):
        for field in _at(body, place):
            allowed = _ALLOWED_STRANGERS.get(field, [])
            if field == "program":
                continue  # any text may be an id: not-found, see test_links
            for stranger in _STRANGERS:
                # Not ``in``: True equals 1.
                if any(type(each) is type(stranger) and each == stranger for each in allowed):
                    continue
                changed = json.loads(json.dumps(body))
                _at(changed, place)[field] = stranger
                answer = await client.request("POST", path, changed)
                refused = (answer.status, answer.json.get("kind"))
                expected = {(422, "invalid")}
                if field in ("symbols", "patterns") and stranger == ["x"]:
                    expected = {(422, "symbol-not-found")}
                if field == "attach" and stranger == "x":
                    expected = {(422, "invalid")}
                assert refused in expected, (place, field, stranger, answer.body[:300])
    assert len(kernel.programs) == before
    assert kernel.links == []


@pytest.mark.parametrize("name", FULL_BODIES)
async def test_missing_fields_are_named(client: Client, name: str) -> None:
    path, body = await _fresh(client, name)
    required = {
        (): {"source", "program", "kind"},
        ("source",): {"kind", "instructions", "license", "elf", "builtin"},
        ("lifetime",): {"kind"},
    }
    for place in _paths(body):
        for field in required[place] & set(_at(body, place)):  # type: ignore[index]
            changed = json.loads(json.dumps(body))
            del _at(changed, place)[field]
            problem = await client.refused("POST", path, changed, status=422, kind="invalid")
            # Without the word that tells the kinds apart, it is their parent that is wrong.
            expected = [*place] if place and field == "kind" else [*place, field]
            assert problem["errors"][0]["loc"] == expected, problem


async def test_no_more_than_some_errors_are_told(client: Client) -> None:
    body = link("prg-x", symbols=[1] * 1000)
    problem = await client.refused("POST", "/links", body, status=422, kind="invalid")
    assert 1 <= len(problem["errors"]) <= 100
    assert problem["errors"][0]["loc"] == ["symbols", 0]


def _memory(field: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0])


def _begin_peak() -> int:
    """Have the peak (VmHWM) begin anew from what is in use now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory("VmRSS")


async def test_a_body_of_wrong_values_costs_no_more_than_one_of_right_ones(
    client: Client,
) -> None:
    """Half a million wrong fields must not make half a million error records."""
    data = json.dumps({"program": "p", "kind": "kprobe", "symbols": [0] * 500_000}).encode()
    before = _begin_peak()
    await client.refused("POST", "/links", data=io.BytesIO(data), status=422, kind="invalid")
    grown = _memory("VmHWM") - before
    assert grown < 100_000, f"{grown} KiB for a body of {len(data) // 1024} KiB"


GETS_WITHOUT_QUERY = [
    "/healthz",
    "/version",
    "/openapi.json",
    "/programs/prg-x",
    "/maps/map-x",
    "/maps/map-x/entries/00",
    "/links/lnk-x",
    "/clients/cli-x",
]
LISTS = ["/programs", "/maps", "/links", "/clients", "/maps/map-x/entries", "/links/lnk-x/targets"]


@pytest.mark.parametrize("path", [*GETS_WITHOUT_QUERY, *LISTS, "/capabilities"])
async def test_unknown_and_repeated_query_parameters(client: Client, path: str) -> None:
    for query in ("?surprise=1", "?surprise", "?=1", "?Limit=1", "?limit[]=1"):
        await client.refused("GET", path + query, status=422, kind="invalid")
    await client.refused("GET", path + "?limit=1&limit=1", status=422, kind="invalid")


async def test_unknown_query_parameters_of_calls_that_change_things(client: Client) -> None:
    program = await a_program(client)
    made = await a_link(client, program)
    for method, path in (
        ("DELETE", f"/links/{made}?force=true"),
        ("DELETE", f"/programs/{program}?forced=true"),
        ("DELETE", f"/programs/{program}?force=true&force=true"),
        ("DELETE", f"/programs/{program}?force=2"),
        ("DELETE", f"/programs/{program}?force="),
        ("POST", "/links?dry_run=true"),
        ("POST", "/programs?limit=1"),
    ):
        body = link(program) if path.startswith("/links?") else instructions()
        await client.refused(
            method, path, body if method == "POST" else None, status=422, kind="invalid"
        )
    assert (await client.get(f"/programs/{program}"))["links"] == 1


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize(
    "limit",
    ["0", "-1", "1001", "1.5", "1e2", "0x10", "", "many", "true", "null", "9" * 400, "%D9%A3"],
)
async def test_limits_out_of_range(client: Client, path: str, limit: str) -> None:
    problem = await client.refused("GET", f"{path}?limit={limit}", status=422, kind="invalid")
    assert problem["errors"][0]["loc"] == ["limit"]


@pytest.mark.parametrize("path", ["/programs", "/maps", "/links", "/clients"])
@pytest.mark.parametrize(
    "after", ["x", "-1", "1.5", "", "%00", "9" * 30, "9" * 3000, "%D9%A3", "%C2%B2", "%20"]
)
async def test_cursors_that_never_were(client: Client, path: str, after: str) -> None:
    problem = await client.refused("GET", f"{path}?after={after}", status=422, kind="invalid")
    assert problem["errors"][0]["loc"] == ["after"]


@pytest.fixture
async def small(serve: Serve, kernel: FakeKernel) -> AsyncIterator[Client]:
    """A client of a daemon with small limits."""
    served = await serve(kernel, max_body=100_000, max_object=1000)
    async with Client(served.path) as client:
        yield client


@pytest.mark.every_loop
@pytest.mark.parametrize("path", POSTS)
async def test_bodies_over_the_limit(small: Client, path: str) -> None:
    await small.refused("POST", path, data=b" " * 100_001, status=413, kind="too-large")
    await small.refused("POST", path, data=b" " * 100_000, status=400, kind="malformed")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    await small.refused("POST", path, data=chunks(), status=413, kind="too-large")


async def test_a_huge_length_is_refused_before_the_body_comes(
    serve: Serve, kernel: FakeKernel
) -> None:
    served = await serve(kernel, max_body=100_000)
    head = b"POST /links HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n"
    (answer,) = await raw(served.path, head + b" " * 200_000)
    assert (answer.status, answer.kind) == (413, "too-large")


async def test_objects_over_the_limit(small: Client, kernel: FakeKernel) -> None:
    for size, status in ((1000, 201), (1001, 413)):
        body = base64.b64encode(b"\x7fELF" + bytes(size - 4)).decode()
        answer = await small.request(
            "POST", "/programs", {"source": {"kind": "object", "elf": body}}
        )
        assert answer.status == status, answer.body
    assert answer.kind == "too-large"
    assert "1001" in answer.json["detail"]
    assert len(kernel.programs) == 2


async def test_the_limits_are_told(small: Client) -> None:
    limits = (await small.get("/capabilities"))["limits"]
    assert (limits["body_bytes"], limits["object_bytes"]) == (100_000, 1000)


async def test_a_bug_is_told_as_internal_with_the_request_to_quote(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.fail["load_instructions"] = RuntimeError("secret words")
    answer = await client.request("POST", "/programs", instructions())
    assert (answer.status, answer.kind) == (500, "internal")
    assert answer.json["request"] == answer.headers["X-Request-Id"]
    assert b"secret" not in answer.body
    await a_program(client)


async def test_every_answer_has_a_request_id_of_its_own(client: Client) -> None:
    answers = [await client.request("GET", path) for path in ("/healthz", "/nothing", "/links/x")]
    assert len({answer.headers["X-Request-Id"] for answer in answers}) == 3


def test_the_contract_knows_every_kind_of_the_error_table_for_its_calls() -> None:
    """Each operation documents malformed and invalid, each with a body too-large as well."""
    for path, operations in contract()["paths"].items():
        for method, operation in operations.items():
            told = operation["responses"]
            assert "400" in told, (method, path)
            assert "422" in told, (method, path)
            assert "413" in told or "requestBody" not in operation, (method, path)
            if "{id}" in path:
                assert "404" in told, (method, path)
