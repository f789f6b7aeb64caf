"""What is really there: the kernel's own lists against the API's."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kernel.rest import Rest

#: BPF_LINK_TYPE_PERF_EVENT, BPF_LINK_TYPE_KPROBE_MULTI: Debian 12's bpftool knows no name for them.
_LINKS = {"perf_event", 7, "kprobe_multi", 8}

#: Seconds; what the kernel puts off, such as the end of a program's maps, comes in much less.
PATIENCE = 30.0

_KPROBES = Path("/sys/kernel/debug/kprobes/list")


def _listed(what: str) -> list[dict[str, Any]]:
    shown = subprocess.run(
        ["/usr/sbin/bpftool", "-j", what, "list"], capture_output=True, check=True
    )
    listed: list[dict[str, Any]] = json.loads(shown.stdout or b"[]")
    return listed


@dataclass(frozen=True)
class Holdings:
    """Kernel ids of what there is."""

    links: frozenset[int] = field(default_factory=frozenset)
    programs: frozenset[int] = field(default_factory=frozenset)
    maps: frozenset[int] = field(default_factory=frozenset)

    def __sub__(self, other: Holdings) -> Holdings:
        return Holdings(
            self.links - other.links, self.programs - other.programs, self.maps - other.maps
        )


def in_kernel() -> Holdings:
    """Of the kinds that kpmd makes; the kernel lists nothing that it has let go of."""
    return Holdings(
        frozenset(each["id"] for each in _listed("link") if each.get("type") in _LINKS),
        frozenset(each["id"] for each in _listed("prog") if each.get("type") == "kprobe"),
        frozenset(each["id"] for each in _listed("map")),
    )


def in_api(rest: Rest) -> Holdings:
    """What root's connection lists, which is all.

    Kernels before 5.15 have no links for kprobes one by one: their kernel id is 0 in the API.
    """
    return Holdings(
        *(
            frozenset(each["kernel_id"] for each in rest.items(path) if each["kernel_id"])
            for path in ("/links", "/programs", "/maps")
        )
    )


def kprobes_in_api(rest: Rest) -> int:
    """How many kprobes the links that the API lists stand for."""
    return sum(each["count"] for each in rest.items("/links") if each["mechanism"] == "perf_event")


def kprobes() -> list[str]:
    """The kernel's own list of kprobes made one by one."""
    if not _KPROBES.exists():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    return _KPROBES.read_text().splitlines()


def eventually(look: Callable[[], object], wanted: object, patience: float = PATIENCE) -> None:
    """Look until it is so; what was seen last is told where it never is."""
    deadline = time.monotonic() + patience
    while (seen := look()) != wanted:
        assert time.monotonic() < deadline, f"{seen} is not {wanted}"
        # On one processor, who looks all the time keeps the daemon from its work.
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """The processes that any thread of a process has started, as far as they live."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_for_call(pid: int, function: str) -> None:
    """Return when a thread of a process is inside a function of the kernel."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                with open(f"/proc/{pid}/task/{task}/stack", encoding="ascii") as file:
                    if function in file.read():
                        return
            except (FileNotFoundError, ProcessLookupError):
                continue
    raise AssertionError(f"no thread of {pid} was seen in {function}")
