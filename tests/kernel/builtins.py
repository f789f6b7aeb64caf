"""What the tests of the builtins share: calls that are made, and what is counted of them."""

from __future__ import annotations

import base64
import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import expects_multi
from tests.kernel.rest import Rest

#: nanosleep(2), and what it calls; what lseek(2) calls; and what stat(2) calls: for a file of an
#: overlay it is called within itself, for the file that lies below.
NANOSLEEP, SLEEP, SLEEPS = "__x64_sys_nanosleep", "do_nanosleep", "hrtimer_nanosleep"
SEEK, NESTED = "generic_file_llseek_size", "vfs_getattr_nosec"

PR_SET_NAME, SYS_LSEEK, SYS_NANOSLEEP = 15, 8, 35

#: How a builtin for entry and return is asked for: as the daemon chooses, or by two programs.
BOTH = pytest.mark.parametrize("attach", [None, "kprobe_multi"], ids=["best", "pair"])

_libc = ctypes.CDLL(None, use_errno=True)


def by_session(release: tuple[int, int]) -> bool:
    return expects_multi() and release >= (6, 10)


def sleep(milliseconds: float) -> None:
    """One call of nanosleep(2)."""
    ns = int(milliseconds * 1e6)
    _libc.syscall(SYS_NANOSLEEP, struct.pack("qq", ns // 10**9, ns % 10**9), None)


def seek(file: int, place: int) -> None:
    """One call of lseek(2)."""
    _libc.syscall(SYS_LSEEK, file, ctypes.c_long(place), os.SEEK_SET)


def set_command(name: str) -> None:
    """What this thread is called from now on."""
    _libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/comm").read_bytes().rstrip(b"\n")


def in_child(work: Callable[[], object], before: Callable[[], object] | None = None) -> int:
    """Do it in a process of its own, which has ended then; its id."""
    child = os.fork()
    if not child:
        try:
            if before is not None:
                before()
            work()
            os._exit(0)
        finally:
            os._exit(70)
    assert os.waitpid(child, 0) == (child, 0)
    return child


class Loaded:
    """A builtin's programs and maps."""

    def __init__(self, rest: Rest, name: str, attach: str | None = None, **options: Any) -> None:
        """``options``: ``globals`` and ``max_entries``."""
        self._rest = rest
        body = {"source": {"kind": "builtin", "builtin": name, **options}, "attach": attach}
        self.made = rest.ok("POST", "/programs", body)
        self.programs = {each["name"]: each["id"] for each in self.made["programs"]}
        self.maps = {each["name"]: each["id"] for each in self.made["maps"]}

    def link(self, *functions: str, only: str = "") -> None:
        """Link each program, as it is made to be; or only the one with this in its name."""
        for name, id_ in self.programs.items():
            if only not in name:
                continue
            attach = self._rest.ok("GET", f"/programs/{id_}")["attach"]
            kind = "kretprobe" if name.endswith("_return") else "kprobe"
            kind = "session" if attach == "kprobe_session" else kind
            body = {"program": id_, "kind": kind, "symbols": functions}
            self._rest.ok("POST", "/links", body)

    def entries(self, name: str) -> list[tuple[bytes, list[bytes]]]:
        """Keys and values; of a map that is not per CPU one value each."""
        found = []
        for each in self._rest.items(f"/maps/{self.maps[name]}/entries"):
            values = each["value"] if isinstance(each["value"], list) else [each["value"]]
            found.append((bytes.fromhex(each["key"]), [bytes.fromhex(one) for one in values]))
        return found

    def decoded(self, name: str) -> list[dict[str, Any]]:
        """Keys and values as the BTF has them."""
        listed = self._rest.items(f"/maps/{self.maps[name]}/entries")
        return [each["decoded"] for each in listed]

    def total(self, name: str) -> dict[bytes, int]:
        """Entries of numbers, over all CPUs."""
        return {
            key: sum(int.from_bytes(value[:8], "little") for value in values)
            for key, values in self.entries(name)
        }

    def counts(self) -> dict[int, int]:
        return {int.from_bytes(key, "little"): calls for key, calls in self.total("counts").items()}

    def lost(self) -> dict[str, int]:
        """Its counters of what went wrong that are not 0."""
        program = next(iter(self.programs.values()))
        listed = self._rest.ok("GET", f"/programs/{program}/globals")["items"]
        counters = [each for each in listed if each["section"] == ".bss" and each["size"] == 8]
        return {
            each["name"]: number
            for each in counters
            if (number := int.from_bytes(bytes.fromhex(each["value"]), "little"))
        }

    def unreturned(self) -> int:
        """Calls of which the kernel told no return.

        Kernels before 6.14 are prepared for so many calls at once, of each function, and no more:
        5.10 for as many as there are processors, others for twice that or ten. Of a session, they
        tell no entry then either.
        """
        if "latency" in self.programs or "trace" in self.programs:
            return sum(each["missed"] for each in self._rest.items("/links"))
        return self.lost().get("entries_without_return", 0) + len(self.entries("calls"))

    def latencies(self) -> dict[int, tuple[int, int, int, list[int]]]:
        """Function -> calls, their total time, the longest, and how many there are of each slot."""
        found = {}
        for key, values in self.entries("latencies"):
            per_cpu = [struct.unpack("<67Q", value) for value in values]
            calls, total = (sum(each[at] for each in per_cpu) for at in (0, 1))
            slots = [sum(each[at] for each in per_cpu) for at in range(3, 67)]
            longest = max(each[2] for each in per_cpu)
            found[int.from_bytes(key, "little")] = (calls, total, longest, slots)
        return found


def own(**more: Any) -> dict[str, Any]:
    """Globals: this process alone."""
    return {"target_pid": os.getpid(), **more}


def padded(name: str) -> str:
    """A thread's name as `target_command` takes it."""
    return base64.b64encode(name.encode().ljust(16, b"\0")).decode()


def named(name: str) -> dict[str, Any]:
    """Globals: this process's threads of that name alone."""
    return own(target_command=padded(name))
