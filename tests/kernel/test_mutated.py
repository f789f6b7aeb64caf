"""Broken objects through the API: each is refused or loaded, and nothing of them is left.

As a user without privileges, who may load any object. libbpf 1.1 dies of some of them.
"""

from __future__ import annotations

import base64
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import OBJECTS, Daemon
from tests.kernel.rest import Rest
from tests.kernel.wire import Forked, Tell
from tests.kernel.witness import Holdings, children, eventually

pytestmark = pytest.mark.once

#: With KPMD_FUZZ=N (``make fuzz``) N times as many, always others.
LONGER = int(os.environ.get("KPMD_FUZZ", "1"))
NUMBER = 40 * LONGER

#: What a broken object may be answered with.
ALLOWED = {
    "bad-object",
    "invalid",
    "not-supported",
    "quota",
    "too-large",
    "verifier-rejected",
    "wrong-attach-type",
}

#: KiB of memory that the daemon may keep beyond what it had after the first few.
GROWTH = 16 << 10

#: Values at which parsers break.
_EDGES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 2**64 - 1)


def mutate(random_: random.Random, objects: list[bytes]) -> bytes:
    """One of the objects, with one to four things changed."""
    data = bytearray(random_.choice(objects))
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        # Headers and tables are small, and where most is decided: the ends are hit more often.
        reach = random_.choice((64, *[len(data)] * 9))
        place = random_.randrange(max(1, min(reach, len(data))))
        if random_.random() < 0.1:
            place = len(data) - place
        match random_.randrange(6):
            case 0:
                data[place : place + 1] = bytes([random_.randrange(256)])
            case 1:
                if place < len(data):
                    data[place] ^= 1 << random_.randrange(8)
            case 2:
                size = random_.choice((1, 2, 4, 8))
                value = random_.choice(_EDGES) % (1 << 8 * size)
                data[place : place + size] = value.to_bytes(size, "little")
            case 3:
                other = random_.choice(objects)
                start = random_.randrange(len(other))
                size = random_.randrange(1, 256)
                data[place : place + size] = other[start : start + size]
            case 4:
                del data[place : place + random_.randrange(1, 64)]
            case 5:
                if random_.random() < 0.2:
                    del data[place:]
                else:
                    data[place:place] = data[place : place + random_.randrange(1, 64)]
    return bytes(data)


def load_all(socket: str, tell: Tell, objects: list[bytes], seed: int) -> None:
    """The client: loads one broken object after the other, and removes what was loaded."""
    random_ = random.Random(seed)  # noqa: S311 - the same in each run
    rest = Rest(socket)
    seen: Counter[str] = Counter()
    wrong: list[Any] = []
    for number in range(NUMBER):
        elf = mutate(random_, objects)
        body = {"source": {"kind": "object", "elf": base64.b64encode(elf).decode()}}
        status, answer = rest("POST", "/programs", body)
        kind = "loaded" if status == 201 else answer["kind"]
        seen[kind] += 1
        if status == 201:
            for program in answer["programs"]:
                rest.ok("DELETE", f"/programs/{program['id']}")
        elif kind not in ALLOWED:
            wrong.append((number, answer))
        if number % 15 == 14:
            tell(None)
    tell((dict(seen), wrong[:10]))


def _memory(pid: int) -> int:
    """Resident memory in KiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0])


def test_broken_objects_leave_nothing_behind(
    daemon: Daemon,
    rest: Rest,
    exact: Callable[[], Holdings],
    fork: Callable[..., Forked],
) -> None:
    helpers = len(children(daemon.pid))
    seed = 5 if LONGER == 1 else random.SystemRandom().getrandbits(32)
    objects = [path.read_bytes() for path in sorted(OBJECTS.glob("*.bpf.o"))]
    client = fork(lambda tell: load_all(daemon.socket, tell, objects, seed))
    assert client.told() is None
    memory, threads = _memory(daemon.pid), len(os.listdir(f"/proc/{daemon.pid}/task"))
    while (told := client.told()) is None:
        rest.ok("GET", "/healthz")  # or it would be idle for too long
    seen, wrong = told
    print(f"seed {seed}: {seen}")
    assert wrong == []
    assert sum(seen.values()) == NUMBER
    assert seen.get("loaded", 0) > NUMBER // 50, "nearly none was loaded"
    assert seen.get("bad-object", 0) > NUMBER // 10
    assert exact() == Holdings()
    eventually(lambda: len(children(daemon.pid)) <= helpers, True)
    assert len(os.listdir(f"/proc/{daemon.pid}/task")) <= threads + 4
    assert _memory(daemon.pid) - memory < GROWTH
    # It goes on as before.
    made = rest.ok("POST", "/programs", {"source": {"kind": "builtin", "builtin": "count"}})
    rest.ok("DELETE", f"/programs/{made['programs'][0]['id']}")
