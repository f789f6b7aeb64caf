"""What is put on record, cut to size, and its two forms: a line of JSON, and a journal's fields.

Whatever text a client sends, there is one line or one entry, and what it holds is what was sent:
JSON escapes all that is not printable ASCII, and a value in the journal comes with its length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from kpmd.core.times import rfc3339

#: Characters of one text, items of one list, and names in one ``what``, at the most.
MOST_TEXT = 256
MOST_ITEMS = 16

#: Bytes of JSON of all values of one ``what`` at the most.
MOST_WHAT = 4096

#: Put in the place of what was cut.
CUT = "…"

#: ``who`` and the like of journalctl -t.
IDENTIFIER = "kpmd-audit"

_PRIORITIES = {"warning": "4", "notice": "5", "info": "6"}

#: What stands in a message without quotes.
_WORD = re.compile(r"[\w./@-]+", re.ASCII)

#: A record, bounded: a flat object of JSON, but for ``what`` in it.
Entry = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Something to put on record; what is None is left out.

    ``outcome`` is "ok", or the kind of the error with its ``status`` and ``detail``. ``rule``: that
    of the policy which allowed or refused it. ``what``: ids and names that it is about, texts and
    numbers or lists of them, under names of our own.
    """

    audit: Literal["request", "connection", "policy", "start", "stop", "lost"] = "request"
    outcome: str = "ok"
    status: int | None = None
    request: str | None = None
    call: str | None = None
    uid: int | None = None
    gid: int | None = None
    pid: int | None = None
    user: str | None = None
    command: str | None = None
    rule: str | None = None
    detail: str | None = None
    what: Mapping[str, object] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether it was not done."""
        return self.outcome != "ok"

    @property
    def level(self) -> str:
        """How grave it is: info, notice where a client was refused, else warning."""
        if not self.refused:
            return "info"
        at_fault = self.audit in ("request", "connection") and (self.status or 0) < 500
        return "notice" if at_fault else "warning"


def bounded(record: Record, timestamp: float) -> Entry:
    """The record as it is written: a few kilobytes at the most, whatever a client has sent."""
    entry: Entry = {
        "timestamp": rfc3339(timestamp),
        "level": record.level,
        "event": "audit",
    }
    for name in _FIELDS:
        value = getattr(record, name)
        if value is not None:
            entry[name] = _plain(value)
    if record.what:
        entry["what"] = _bounded_what(record.what)
    return entry


_FIELDS = [name for name in Record.__slots__ if name != "what"]


def line(entry: Entry) -> bytes:
    """The entry as a line of JSON, in ASCII without control characters, with its end."""
    return json.dumps(entry).replace("\x7f", "\\u007f").encode("ascii") + b"\n"


def journal_fields(entry: Entry) -> Iterator[tuple[str, str]]:
    """The entry as fields of the journal: a field for each value, and a sentence for people."""
    yield "MESSAGE", message(entry)
    yield "PRIORITY", _PRIORITIES[entry["level"]]
    yield "SYSLOG_IDENTIFIER", IDENTIFIER
    yield "KPMD_TIME", entry["timestamp"]
    for name in _FIELDS:
        if name in entry:
            yield f"KPMD_{name.upper()}", _text(entry[name])
    for name, value in entry.get("what", {}).items():
        for each in value if isinstance(value, list) else [value]:
            yield f"KPMD_WHAT_{name.upper()}", _text(each)


def message(entry: Entry) -> str:
    """Who did what, how it ended, and why: in one line, with a client's own words in quotes."""
    who = []
    for name, alias in (("uid", "user"), ("pid", "command")):
        if name in entry:
            known = f" ({_quoted(entry[alias])})" if entry.get(alias) else ""
            who.append(f"{name} {entry[name]}{known}")
    call: str = entry.get("call") or entry["audit"]
    how = _quoted(entry["outcome"])
    if "status" in entry:
        how += f" ({entry['status']})"
    if "rule" in entry:
        how += f" by rule {_quoted(entry['rule'])}"
    told = [
        f"{name}={','.join(map(_quoted, value)) if isinstance(value, list) else _quoted(value)}"
        for name, value in entry.get("what", {}).items()
    ]
    parts = [", ".join(who), " ".join(map(_quoted, call.split(" "))), " ".join([how, *told])]
    if "detail" in entry:
        parts.append(_printable(entry["detail"]))
    return ": ".join(part for part in parts if part)


def cut(text: str) -> str:
    """The text, or its beginning and CUT; without lone surrogates, which are in no UTF-8.

    Of a text that is mostly escapes in JSON less is left, so that it is no longer than others.
    """
    if len(text) <= MOST_TEXT and text.isascii() and text.isprintable():
        return text
    shown = text[:MOST_TEXT].encode("utf-8", "backslashreplace").decode()
    most = len(shown) if len(json.dumps(shown)) <= 2 * MOST_TEXT else MOST_TEXT // 6
    if len(text) <= MOST_TEXT and len(shown) <= most:
        return shown
    return shown[:most] + CUT


def _plain(value: object) -> str | int | float | None:
    """A value that JSON has a form for, and a short one."""
    if isinstance(value, str):
        return cut(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= 64:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return cut(hex(value) if isinstance(value, int) else str(value))


def _bounded_what(what: Mapping[str, object]) -> dict[str, Any]:
    """The values, and beside a list its length as NAME_total."""
    shown: dict[str, Any] = {}
    room = MOST_WHAT
    for given, value in islice(what.items(), MOST_ITEMS):
        name = re.sub(r"[^a-z0-9]+", "_", given.lower()).strip("_")[:32] or "other"
        several = _several(value)
        kept: list[Any] = []
        for each in islice([value] if several is None else several, MOST_ITEMS):
            one = _plain(each)
            room -= len(json.dumps(one)) + 2
            if room < 0:
                break
            kept.append(one)
        if several is None:
            shown[name] = kept[0] if kept else CUT
        else:
            shown[name] = kept
            shown[f"{name}_total"] = len(several)
    return shown


def _several(value: object) -> Collection[object] | None:
    """The items of a list or the like; None of what is one value."""
    if isinstance(value, Mapping):
        return [f"{name}={each}" for name, each in value.items()]
    if isinstance(value, Collection) and not isinstance(value, (str, bytes)):
        return value
    return None


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(value: object) -> str:
    text = _text(value)
    return text if _WORD.fullmatch(text) else json.dumps(text)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
