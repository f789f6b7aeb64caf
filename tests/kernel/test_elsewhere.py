"""Objects that other tools made: they load, attach, count, and tell what they counted.

What makes them is in ``tests/objects/elsewhere``; those that clang makes are in the other tests.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import OBJECTS
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID, GETTID, call_getpid, call_gettid

LINKED, PYTHONBPF = "linked.bpf.o", "pythonbpf_calls.o"
BOTH = pytest.mark.parametrize("name", [LINKED, PYTHONBPF])


class Loaded:
    """An object's programs, map and variables through the API."""

    def __init__(self, rest: Rest, name: str, **source: Any) -> None:
        self._rest = rest
        elf = base64.b64encode((OBJECTS / "elsewhere" / name).read_bytes()).decode()
        # One of the sections is for one function of libbpf's, and does not say how it is attached.
        body = {"source": {"kind": "object", "elf": elf, **source}, "attach": "kprobe_multi"}
        made = rest.ok("POST", "/programs", body)
        self.programs = {each["name"]: each["id"] for each in made["programs"]}
        self.maps = {each["name"]: each["id"] for each in made["maps"]}

    def link(self, program: str, kind: str, *functions: str) -> Any:
        body = {"program": self.programs[program], "kind": kind, "symbols": functions}
        return self._rest.ok("POST", "/links", body)

    def calls(self) -> int:
        """Of this process, as the map's decoded entries have it."""
        listed = self._rest.items(f"/maps/{self.maps['calls']}/entries")
        decoded = {each["decoded"]["key"]: each["decoded"]["value"] for each in listed}
        return int(decoded.get(os.getpid(), 0))

    def variables(self) -> dict[str, int]:
        """Those of the program that uses all of them."""
        listed = self._rest.ok("GET", f"/programs/{self.programs['on_return']}/globals")["items"]
        return {each["name"]: int(each["decoded"]) for each in listed}


@pytest.mark.kprobes
@BOTH
def test_counts_by_process(rest: Rest, name: str) -> None:
    loaded = Loaded(rest, name, programs=["on_entry"])
    assert set(loaded.programs) == {"on_entry"}
    link = loaded.link("on_entry", "kprobe", GETPID, GETTID)
    assert link["count"] == 2
    call_getpid(3)
    call_gettid(4)
    assert loaded.calls() == 7
    rest.ok("DELETE", f"/links/{link['id']}")
    before = loaded.calls()
    call_getpid(5)
    assert loaded.calls() == before


@pytest.mark.kprobes
@BOTH
def test_section_of_one_function_attaches_to_many(rest: Rest, name: str) -> None:
    """Its section names vfs_read: what counts is what the link asks for."""
    loaded = Loaded(rest, name, globals={"step": 10})
    assert set(loaded.programs) == {"on_entry", "on_return"}
    assert loaded.variables() == {"step": 10, "returns": 0}
    link = loaded.link("on_return", "kretprobe", GETPID, GETTID)
    targets = rest.items(f"/links/{link['id']}/targets")
    assert {each["symbol"] for each in targets} == {GETPID, GETTID}
    call_getpid(3)
    call_gettid(4)
    found = loaded.variables()
    assert found["step"] == 10
    assert found["returns"] >= 70
    assert found["returns"] % 10 == 0


@BOTH
def test_says_where_attach_is_needed(rest: Rest, name: str) -> None:
    elf = base64.b64encode((OBJECTS / "elsewhere" / name).read_bytes()).decode()
    status, answer = rest("POST", "/programs", {"source": {"kind": "object", "elf": elf}})
    assert (status, answer["kind"]) == (422, "invalid")
    assert [each["loc"][-1] for each in answer["errors"]] == ["attach"]
    assert "on_return" in answer["errors"][0]["msg"]


@BOTH
def test_tells_its_types(rest: Rest, name: str) -> None:
    loaded = Loaded(rest, name, globals={"step": 10})
    assert set(loaded.programs) == {"on_entry", "on_return"}
    assert set(loaded.maps) >= {"calls", ".data", ".bss"}
    assert loaded.variables() == {"step": 10, "returns": 0}
    entry = f"/maps/{loaded.maps['calls']}/entries/{(77).to_bytes(4, 'little').hex()}"
    rest.ok("PUT", entry, {"decoded": 5})
    assert rest.ok("GET", entry)["decoded"] == {"key": 77, "value": "5"}


def test_the_folder_has_these_alone() -> None:
    listed = {each.name for each in Path(OBJECTS / "elsewhere").glob("*.o")}
    assert listed == {LINKED, PYTHONBPF}
