"""What the loader's process for one request does: it stands between a parser and the kernel.

``loader_server`` starts it. It gives up all but CAP_BPF and CAP_PERFMON, and starts the parser
(``loader_child``), which has nothing at all, and whose system calls it answers
(``loader_session``). Raw instructions need no parser. May import: ``kpmd.bpf.*`` except ``loader``
and ``loader_server``, ``kpmd.errors``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

from kpmd.bpf import confine, instructions, objects
from kpmd.bpf.abi import AttachType
from kpmd.bpf.broker import Tell
from kpmd.bpf.loader_end import out_of_memory, problem
from kpmd.bpf.loader_request import INSTRUCTIONS
from kpmd.bpf.loader_session import Kit, Session, System, confining
from kpmd.bpf.rights import Rights
from kpmd.errors import KpmdError

#: Bytes of the first line of a request.
_ORDERS_MOST = 1 << 20


def run(
    kit: Kit, limits: dict[str, Any], parent: int, request: int, reply: int, words: int
) -> None:
    """Confine this process, do what ``request`` asks and send the answer to ``reply``.

    Before it goes a line for each program that the verifier begins with: how many it took before,
    and the name.
    """
    os.dup2(words, 2)
    answer: dict[str, Any]
    fds: list[int] = []
    channel = socket.socket(fileno=reply)

    def tell(done: int, name: str) -> None:
        """Tell which program the verifier begins with; the daemon looks on, or has given up."""
        with contextlib.suppress(OSError):
            channel.send(f"{done} {name}\n".encode("ascii", "replace"), socket.MSG_DONTWAIT)

    try:
        with confining():
            confine.confine(limits, parent)
        orders, start = _orders(request)
        rights = None if orders["rights"] is None else Rights.decoded(orders["rights"])
        system = System(kit)
        if "instructions" in orders:
            with confining():
                confine.no_more_processes()
                kit.get_filters().broker.load()
            answer, fds = _load(request, start, orders["instructions"], rights, system, tell)
        else:
            answer, fds = Session(kit, limits, rights, system, tell).load(request, start)
    except MemoryError:
        answer = problem(out_of_memory(limits))
    except KpmdError as error:
        answer = problem(error)
    raw = json.dumps(answer).encode()
    with channel:
        sent = socket.send_fds(channel, [raw], fds) if fds else 0
        channel.sendall(raw[sent:])


def _orders(request: int) -> tuple[dict[str, Any], int]:
    """The daemon's own line of a request, and where the rest begins: not for this process."""
    line = os.pread(request, _ORDERS_MOST, 0).partition(b"\n")[0]
    orders: dict[str, Any] = json.loads(line)
    return orders, len(line) + 1


def _load(
    request: int,
    start: int,
    about: dict[str, Any],
    rights: Rights | None,
    system: System,
    tell: Tell,
) -> tuple[dict[str, Any], list[int]]:
    """Load raw instructions: they are no more than a list of numbers, and need no parser."""
    code = os.pread(request, os.lseek(request, 0, os.SEEK_END) - start, start)
    instructions.check_raw(code)
    name, kind = about["name"], AttachType(about["attach"])
    if rights is not None:
        instructions.check(name, code, rights, system.kfunc_name)
    tell(0, name)
    fd, log = objects.program_load(code, name, about["license"], kind, want_log=about["want_log"])
    program = {"name": INSTRUCTIONS, "attach": kind, "log": log}
    return {"programs": [program], "maps": [], "btf": ""}, [fd.detach()]
