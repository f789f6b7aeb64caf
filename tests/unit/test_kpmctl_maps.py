"""``kpmctl entries``, ``entry``, ``globals`` and ``records``, and the calls behind them."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from kpmd.client.client import Client
from kpmd.client.errors import ApiError, ConnectionFailed, ProtocolError
from kpmd.kpmctl import failures
from tests.unit.test_client import always, http, problem, scripted
from tests.unit.test_client_events import END, HEAD, chunk, cut
from tests.unit.test_kpmctl import Started, good, run

#: What the client sends where no mode is given.
ANY_MODE = {"mode": "any"}

RECORDS = [
    {"data": "0100", "decoded": {"pid": 1, "command": "a\u001b[31m b", "at": ["1", "2"]}},
    {"lost": 3, "reason": "reader-too-slow"},
    {"data": "02"},
    {"data": "03", "decoded": None},
    {"data": "04", "decoded": "7"},
]
STREAM = HEAD + chunk(b"".join(json.dumps(each).encode() + b"\n" for each in RECORDS)) + END


def test_records_for_people_and_for_programs() -> None:
    with scripted(always(STREAM)) as server:
        shown = run(server.path, "records", "map-1", "--type", "my event")
        assert shown.exit_code == 0
        first, *others = shown.stdout.splitlines()
        assert first.startswith("pid=1  command=a")
        assert "\x1b" not in first
        assert first.endswith('at=["1", "2"]')
        assert others == ["02", "03", "7"]
        assert shown.stderr == "3 records lost: reader-too-slow\n"
        assert server.seen[0][:2] == ("GET", "/maps/map-1/records?type=my+event")
        lines = good(server.path, "--json", "records", "map-1").splitlines()
        assert [json.loads(each) for each in lines] == RECORDS


def test_refused() -> None:
    with scripted(always(problem("not-supported", 501))) as server:
        assert run(server.path, "records", "map-1").exit_code == failures.NOT_SUPPORTED


def test_cut_off() -> None:
    with scripted(always(cut(HEAD + chunk(b'{"data": "00"}\n')))) as server:
        shown = run(server.path, "records", "map-1")
        assert shown.exit_code == failures.UNREACHABLE
        assert shown.stdout == "00\n"
        assert "read anew" in shown.stderr


def test_ctrl_c_is_the_planned_end() -> None:
    with scripted(always(HEAD + chunk(b'{"data": "00"}\n'))) as server:
        process = Started(server.path, "records", "map-1")
        assert process.first_line() == "00\n"
        process.send_signal(signal.SIGINT)
        assert process.end() == ("", "")
        assert process.returncode == 0


@pytest.mark.parametrize("line", [b"[1]\n", b"{}\n", b'{"data": 1}\n', b'{"lost": "1"}\n', b"x\n"])
def test_records_that_are_none(line: bytes) -> None:
    with (
        scripted(always(HEAD + chunk(line) + END)) as server,
        Client(server.path) as client,
        client.records("map-1") as records,
        pytest.raises(ProtocolError, match="a record"),
    ):
        next(records)


def test_the_clients_iterator() -> None:
    with scripted(always(STREAM)) as server, Client(server.path) as client:
        assert list(client.records("map-1")) == RECORDS
    with (
        scripted(always(problem("invalid", 422))) as server,
        Client(server.path) as client,
        pytest.raises(ApiError),
    ):
        client.records("map-1", "nothing")
    with scripted(always(cut(HEAD))) as server, Client(server.path) as client:
        with pytest.raises(ConnectionFailed) as caught:
            next(client.records("map-1"))
        assert caught.value.reason == "lost"


def test_decoded_entries() -> None:
    items = [
        {"key": "01", "value": "02", "decoded": {"key": "one", "value": {"a": "2"}}},
        {"key": "03", "value": ["04", "05"], "decoded": {"value": [4, 5]}},
    ]
    with scripted(always(http({"items": items, "next": None}))) as server:
        shown = good(server.path, "entries", "map-1").splitlines()
        assert [each.split(None, 1) for each in shown] == [
            ["KEY", "VALUE"],
            ["one", '{"a": "2"}'],
            ["03", "[4, 5]"],
        ]
        shown = good(server.path, "entries", "map-1", "--hex").splitlines()
        assert [each.split(None, 1) for each in shown[1:]] == [["01", "02"], ["03", "04 05"]]


@pytest.mark.parametrize(
    ("value", "body"),
    [
        (b"\1\2", {"value": "0102"}),
        ([b"\1", b"\2"], {"value": ["01", "02"]}),
        ([], {"decoded": []}),
        ([1, 2], {"decoded": [1, 2]}),
        ("text", {"decoded": "text"}),
        ({"a": 1}, {"decoded": {"a": 1}}),
    ],
)
def test_values_of_the_client(value: Any, body: Any) -> None:
    with scripted(always(http({}, 204))) as server, Client(server.path) as client:
        client.put_entry("map-1", b"\xff", value, "create")
        client.put_entry("map-1", 'json:{"a": "/"}', value)
        client.set_global("prg-1", "of/mine", value)
        assert server.seen == [
            ("PUT", "/maps/map-1/entries/ff", {**body, "mode": "create"}),
            ("PUT", "/maps/map-1/entries/json%3A%7B%22a%22%3A%20%22%2F%22%7D", body | ANY_MODE),
            ("PUT", "/programs/prg-1/globals/of%2Fmine", body),
        ]


def test_one_entry_and_its_end() -> None:
    entry = {"key": "01", "value": "02", "decoded": {"key": 1, "value": "two"}}
    with scripted(always(http(entry))) as server:
        assert good(server.path, "entry", "map-1", "01").splitlines()[1].split() == ["1", "two"]
        assert json.loads(good(server.path, "--json", "entry", "map-1", "01")) == entry
    with scripted(always(http({}, 204))) as server:
        good(server.path, "entry", "map-1", "01", "--put", "json:[1, 2]", "--mode", "replace")
        good(server.path, "entry", "map-1", "01", "--put", "00ff")
        good(server.path, "entry", "map-1", "01", "--delete")
        assert [each[0] for each in server.seen] == ["PUT", "PUT", "DELETE"]
        assert server.seen[0][2] == {"decoded": [1, 2], "mode": "replace"}
        assert server.seen[1][2] == {"value": "00ff", "mode": "any"}
    for wrong in ("--put 0", "--put json:{", "--put 00 --delete"):
        assert run("/nowhere", "entry", "map-1", "01", *wrong.split()).exit_code == 2


def test_globals() -> None:
    one = {"name": "a", "section": ".data", "map": "map-1", "type": "__u32", "size": 4}
    items = [
        {**one, "writable": True, "value": "01000000", "decoded": 1},
        {**one, "name": "b", "type": None, "writable": False, "value": "02"},
    ]
    with scripted(always(http({"items": items, "next": None}))) as server:
        shown = [each.split() for each in good(server.path, "globals", "prg-1").splitlines()[1:]]
        assert shown == [["a", ".data", "__u32", "1", "yes"], ["b", ".data", "-", "02", "no"]]
    with scripted(always(http(items[0]))) as server:
        assert good(server.path, "globals", "prg-1", "a").splitlines()[1].split()[3] == "1"
        assert json.loads(good(server.path, "--json", "globals", "prg-1", "a")) == items[0]
    with scripted(always(http({}, 204))) as server:
        good(server.path, "globals", "prg-1", "a", "--set", "json:7")
        assert server.seen == [("PUT", "/programs/prg-1/globals/a", {"decoded": 7})]
    assert run("/nowhere", "globals", "prg-1", "--set", "json:7").exit_code == 2
