"""What is put on record: cut to size, and not to be forged, whatever a client sends."""

from __future__ import annotations

import json
import re
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpmd.runtime import audit_record as module
from kpmd.runtime.audit_record import (
    CUT,
    MOST_TEXT,
    Record,
    bounded,
    cut,
    journal_fields,
    line,
    message,
)
from kpmd.runtime.journald import encode
from tests.fakes.journald import parse

#: All there is, and more often what could end a value, a line or a field, or fool a terminal.
NASTY = st.text(
    st.one_of(
        st.characters(),
        st.characters(categories=["Cs"]),
        st.sampled_from('\n\r\0\x1b\x7f\x85\u2028\u2029\u202e="\\,:{}A'),
    ),
    max_size=2 * MOST_TEXT,
)

TEXTS = ("request", "call", "outcome", "user", "command", "rule", "detail")

VALUES = st.one_of(NASTY, st.integers(), st.booleans(), st.none(), st.floats())
WHAT = st.dictionaries(
    NASTY.map(lambda text: text[:40]),
    st.one_of(VALUES, st.lists(VALUES, max_size=40), st.dictionaries(NASTY, NASTY, max_size=3)),
    max_size=20,
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    fields: dict[str, Any] = {name: draw(NASTY) for name in TEXTS}
    fields["uid"] = draw(st.integers(0, (1 << 32) - 1))
    fields["what"] = draw(WHAT)
    return Record(**fields)


def a_record(**fields: Any) -> Record:
    return Record(
        **{
            "request": "5f-1",
            "call": "POST /links",
            "status": 201,
            "uid": 1000,
            "gid": 100,
            "pid": 42,
            "user": "alice",
            "command": "curl",
            **fields,
        }
    )


@given(records())
def test_any_text_makes_one_line_that_has_it(record: Record) -> None:
    entry = bounded(record, 0)
    data = line(entry)
    assert re.fullmatch(rb"[ -~]+\n", data)
    assert json.loads(data) == entry
    for name in TEXTS:
        assert entry[name] == cut(getattr(record, name))


@given(records())
def test_any_text_makes_one_entry_of_the_journal_that_has_it(record: Record) -> None:
    fields = list(journal_fields(bounded(record, 0)))
    assert parse(encode(fields)) == fields
    names = [name for name, _ in fields]
    for name in names:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name)
    once = [name for name in names if not name.startswith("KPMD_WHAT_")]
    assert len(once) == len(set(once))
    got = dict(fields)
    for name in TEXTS:
        assert got[f"KPMD_{name.upper()}"] == cut(getattr(record, name))
    assert got["MESSAGE"].isprintable()


@given(records())
def test_it_is_a_few_kilobytes_at_the_most(record: Record) -> None:
    entry = bounded(record, 0)
    assert len(line(entry)) < 12 << 10
    assert len(encode(journal_fields(entry))) < 24 << 10


def test_the_worst_of_all() -> None:
    worst = "\U0001f4a9" * (1 << 20)
    text = dict.fromkeys(TEXTS, worst)
    record = Record(**text, what={f"{n}{worst[:50]}": [worst] * 100 for n in range(100)})  # type: ignore[arg-type]
    assert len(line(bounded(record, 0))) < 12 << 10


@given(NASTY)
def test_a_text_stays_as_it_is_up_to_its_length(text: str) -> None:
    shown = cut(text)
    assert len(json.dumps(shown)) <= 2 * MOST_TEXT + len(json.dumps(CUT))
    whole = text.encode("utf-8", "backslashreplace").decode()
    if shown != whole:
        assert shown.endswith(CUT)
        assert whole.startswith(shown.removesuffix(CUT))
        assert len(json.dumps(whole)) > MOST_TEXT


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("x" * MOST_TEXT, "x" * MOST_TEXT),
        ("x" * (MOST_TEXT + 1), "x" * MOST_TEXT + CUT),
        ("a\nb\u2028c", "a\nb\u2028c"),
        ("\udc80", "\\udc80"),
        ("ä" * 40, "ä" * 40),
        ("\0" * MOST_TEXT, "\0" * (MOST_TEXT // 6) + CUT),
    ],
)
def test_cut(text: str, shown: str) -> None:
    assert cut(text) == shown


def test_a_line() -> None:
    what = {"program": "prg-1", "symbols": ["vfs_read", "vfs_write"], "force": True}
    assert json.loads(line(bounded(a_record(rule="tracers", what=what), 1.5))) == {
        "timestamp": "1970-01-01T00:00:01.500000Z",
        "level": "info",
        "event": "audit",
        "audit": "request",
        "outcome": "ok",
        "status": 201,
        "request": "5f-1",
        "call": "POST /links",
        "uid": 1000,
        "gid": 100,
        "pid": 42,
        "user": "alice",
        "command": "curl",
        "rule": "tracers",
        "what": {
            "program": "prg-1",
            "symbols": ["vfs_read", "vfs_write"],
            "symbols_total": 2,
            "force": True,
        },
    }


def test_fields_of_the_journal() -> None:
    record = a_record(
        outcome="forbidden", status=403, rule="tracers", detail="not vfs_*",
        what={"program": "prg-1", "symbols": ["vfs_read", "vfs_write"], "force": True},
    )  # fmt: skip
    told = (
        "uid 1000 (alice), pid 42 (curl): POST /links: forbidden (403) by rule tracers "
        "program=prg-1 symbols=vfs_read,vfs_write symbols_total=2 force=true: not vfs_*"
    )
    assert list(journal_fields(bounded(record, 1.5))) == [
        ("MESSAGE", told),
        ("PRIORITY", "5"),
        ("SYSLOG_IDENTIFIER", "kpmd-audit"),
        ("KPMD_TIME", "1970-01-01T00:00:01.500000Z"),
        ("KPMD_AUDIT", "request"),
        ("KPMD_OUTCOME", "forbidden"),
        ("KPMD_STATUS", "403"),
        ("KPMD_REQUEST", "5f-1"),
        ("KPMD_CALL", "POST /links"),
        ("KPMD_UID", "1000"),
        ("KPMD_GID", "100"),
        ("KPMD_PID", "42"),
        ("KPMD_USER", "alice"),
        ("KPMD_COMMAND", "curl"),
        ("KPMD_RULE", "tracers"),
        ("KPMD_DETAIL", "not vfs_*"),
        ("KPMD_WHAT_PROGRAM", "prg-1"),
        ("KPMD_WHAT_SYMBOLS", "vfs_read"),
        ("KPMD_WHAT_SYMBOLS", "vfs_write"),
        ("KPMD_WHAT_SYMBOLS_TOTAL", "2"),
        ("KPMD_WHAT_FORCE", "true"),
    ]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (Record(audit="start", what={"version": "1.2"}), "start: ok version=1.2"),
        (
            Record(audit="policy", outcome="invalid", detail="line 3: no\nsuch\u202e"),
            "policy: invalid: line 3: no\\nsuch\\u202e",
        ),
        (
            Record(audit="connection", outcome="quota", uid=7, pid=9),
            "uid 7, pid 9: connection: quota",
        ),
        # A process gives itself its name: it stays within its quotes.
        (
            Record(call="GET /x", uid=7, pid=9, command="a): ok\n"),
            'uid 7, pid 9 ("a): ok\\n"): GET /x: ok',
        ),
        (Record(call="GET /x: ok\u2028", what={"name": 'a" b'}),
         'GET "/x:" "ok\\u2028": ok name="a\\" b"'),
    ],
)  # fmt: skip
def test_messages(record: Record, told: str) -> None:
    assert message(bounded(record, 0)) == told


@pytest.mark.parametrize(
    ("record", "level"),
    [
        (Record(), "info"),
        (Record(outcome="not-found", status=404), "notice"),
        (Record(audit="connection", outcome="quota"), "notice"),
        (Record(outcome="kernel", status=500), "warning"),
        (Record(audit="policy", outcome="invalid"), "warning"),
        (Record(audit="lost", outcome="lost"), "warning"),
    ],
)
def test_levels(record: Record, level: str) -> None:
    entry = bounded(record, 0)
    assert entry["level"] == level
    assert dict(journal_fields(entry))["PRIORITY"] in "456"


def test_of_a_list_the_first_and_the_total() -> None:
    what = {
        "symbols": [f"f{number}" for number in range(1000)],
        "addresses": array("Q", range(20)),
        "labels": {"team": "net", "b": "c=d"},
        "none": [],
    }
    shown = bounded(Record(what=what), 0)["what"]
    assert shown["symbols"] == [f"f{number}" for number in range(16)]
    assert shown["symbols_total"] == 1000
    assert (shown["addresses"], shown["addresses_total"]) == (list(range(16)), 20)
    assert shown["labels"] == ["team=net", "b=c=d"]
    assert (shown["none"], shown["none_total"]) == ([], 0)


def test_what_is_too_much_in_all_is_counted_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WHAT", 30)
    what = {"id": "prg-1", "symbols": ["x" * 10] * 5, "name": "y" * 10}
    shown = bounded(Record(what=what), 0)["what"]
    assert shown == {"id": "prg-1", "symbols": ["x" * 10], "symbols_total": 5, "name": CUT}


def test_values_that_json_lacks() -> None:
    what = {"a": float("inf"), "b": 1 << 70, "c": b"\xff", "d": None, "e": 2.5}
    shown = bounded(Record(what=what), 0)["what"]
    assert shown == {"a": "inf", "b": hex(1 << 70), "c": "b'\\xff'", "d": None, "e": 2.5}
