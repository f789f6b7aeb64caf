"""A hash map read whole in the VM: kpmd against a C program on the batch commands."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.prepare import BUILD
from tests.bench.records import Bench
from tests.bench.report import Row, alternate, ms, say
from tests.bench.running import Kpmd, Rounds, request

_COUNT = 65_536
_BATCH = 4096
_PAGE = 1000

#: What a dump as octets may take, in times of the C program's.
_MOST_TIMES = 3.0


@contextmanager
def _held(kpmd: Kpmd) -> Iterator[str]:
    """A hash map in kpmd, empty; its id."""
    elf = base64.b64encode((BUILD / "entries.bpf.o").read_bytes()).decode()
    source = {"kind": "object", "elf": elf}
    _, made = kpmd.ok("POST", "/programs", {"source": source, "attach": "kprobe_multi"})
    try:
        yield next(each["id"] for each in made["maps"] if each["name"] == "entries")
    finally:
        kpmd.ok("DELETE", f"/programs/{made['programs'][0]['id']}")


def _by_c(reader: Rounds) -> list[float]:
    found = reader.run(f"read {_BATCH}")
    _check(found["records"])
    return [found["ns"] / 1e9]


def _check(records: int) -> None:
    if records != _COUNT:
        raise RuntimeError(f"{records} entries were read of {_COUNT}")


def _memory_kb(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


class _Grown:
    """By how much a process grows, at the most, from now on."""

    def __init__(self, pid: int) -> None:
        # VmHWM begins anew (proc(5)).
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._pid = pid
        self._before = _memory_kb(pid, "VmRSS")

    def row(self, what: str) -> Row:
        grown = (_memory_kb(self._pid, "VmHWM") - self._before) / 1024
        return Row(what, f"{grown:.1f} MB on {self._before / 1024:.1f} MB")


def _dump(here: Bench, kind: str, query: str, map_: str) -> list[float]:
    """The whole map as a stream."""
    found = here.stream.run(f"all {kind} /maps/{map_}/dump{query}")
    _check(found["records"] // 2 if kind == "words" else found["records"])
    return [found["ns"] / 1e9]


def _pages(kpmd: Kpmd, query: str, map_: str) -> list[float]:
    """Page by page, as a client that does nothing with them but to ask for the next one."""
    seconds, entries, after = 0.0, 0, ""
    while True:
        path = f"/maps/{map_}/entries?limit={_PAGE}{query}{after}"
        took, status, content = kpmd.wire.exchange(request("GET", path))
        if status != 200:
            raise RuntimeError(f"GET {path} gave {status}: {content[:200]!r}")
        seconds += took
        entries += content.count(b'"value":') // (2 if b'"decoded":' in content else 1)
        _, _, cursor = content.rpartition(b'"next":')
        if (following := cursor.strip(b' "}\n')) == b"null":
            break
        after = f"&after={following.decode()}"
    _check(entries)
    return [seconds]


def measure(here: Bench, quick: bool) -> list[Row]:
    """All entries of a hash as octets, as NDJSON, and in pages."""
    say(f"a hash of {_COUNT} entries")
    with _held(here.kpmd) as map_:
        reader = Rounds("map_read", here.kpmd.socket, map_)
        try:
            reader.run(f"fill {_COUNT}")
            grown = _Grown(here.kpmd.process.pid)
            found = alternate(
                3 if quick else 15,
                {
                    "c": partial(_by_c, reader),
                    "dump as octets": partial(_dump, here, "words", "", map_),
                    "dump as NDJSON": partial(_dump, here, "lines", "?decode=false", map_),
                    "dump as NDJSON, decoded": partial(_dump, here, "lines", "", map_),
                    f"pages of {_PAGE}": partial(_pages, here.kpmd, "&decode=false", map_),
                    f"pages of {_PAGE}, decoded": partial(_pages, here.kpmd, "", map_),
                },
            )
        finally:
            reader.close()
    (c,) = found.pop("c")
    rows = []
    for what, (seconds,) in found.items():
        target = what == "dump as octets"
        ratio = seconds / c
        rows.append(
            Row(
                f"a hash of {_COUNT:,} entries: {what}",
                ms(seconds),
                f"{ms(c)} (C, batches of {_BATCH})",
                f"{ratio:.1f}",
                f"at most {_MOST_TIMES:g}" if target else "",
                ratio <= _MOST_TIMES if target else None,
            )
        )
    return [*rows, grown.row("the daemon's memory grows by, at the most, while all this is read")]
