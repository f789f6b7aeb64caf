"""Feature tests: does this kernel have it? Yes and no are facts; anything else is asked again.

The tests of links, and the meaning of each errno, are those of cilium/ebpf's feature tests
``haveBPFLinkKprobeMulti`` and ``haveBPFLinkKprobeSession``.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from kpmd.bpf import perf
from kpmd.bpf.abi import AttachType
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.objects import link_create, program_load
from kpmd.bpf.syscall import BpfError
from kpmd.errors import KpmdError, VerifierRejected

#: ``r0 = 0; exit``
_RETURN_ZERO = bytes.fromhex("b7000000000000009500000000000000")


@dataclass(frozen=True)
class Answer:
    """``supported`` is None where the test told nothing; ``reason`` says why it is not True."""

    supported: bool | None
    reason: str | None = None


@dataclass(frozen=True)
class Feature:
    """A feature, the kernel release that brought it, and its test."""

    name: str
    min_kernel: str
    test: Callable[[], Answer]


Load = Callable[[bytes, str, str, AttachType], OwnedFd]
Attach = Callable[[OwnedFd, AttachType], OwnedFd]


def _load(instructions: bytes, name: str, license_: str, attach: AttachType) -> OwnedFd:
    return program_load(instructions, name, license_, attach)[0]


def _attach(program: OwnedFd, attach: AttachType) -> OwnedFd:
    return link_create(program, attach, symbols=[b"vprintk"])


def probe_link(name: str, attach: AttachType, load: Load = _load, link: Attach = _attach) -> Answer:
    """Load a program of attach type ``attach`` and link it to ``vprintk``.

    E2BIG on load: the kernel has no expected attach type: no. EINVAL or EOPNOTSUPP (CONFIG_FPROBE
    is off) on link: no. Both succeed: yes. Anything else (EPERM, say): not known.
    """
    try:
        program = load(_RETURN_ZERO, name, "MIT", attach)
    except KpmdError as error:
        if error.fields.get("errno") == "E2BIG":
            return Answer(False, "the kernel does not know expected attach types")
        return Answer(None, f"the test program was not loaded: {error.detail}")
    with program:
        try:
            link(program, attach).close()
        except BpfError as error:
            if error.errno == errno.EOPNOTSUPP:
                return Answer(False, "the kernel was built without CONFIG_FPROBE (EOPNOTSUPP)")
            if error.errno == errno.EINVAL:
                return Answer(False, "the kernel does not know this kind of link (EINVAL)")
            return Answer(None, f"the test link was not made: {error.strerror}")
    return Answer(True)


def _attach_event(program: OwnedFd) -> OwnedFd:
    return perf.attach_one(program, None, "vprintk", retprobe=False, cookie=0)


def probe_perf_event(
    pmu: str = perf.PMU, load: Load = _load, attach: Callable[[OwnedFd], OwnedFd] = _attach_event
) -> Answer:
    """Attach a program to ``vprintk`` through a perf event.

    No kprobe among the kernel's event sources: no. Attached: yes. Anything else: not known.
    """
    if not os.path.isdir(pmu):
        if not os.path.isdir(os.path.dirname(pmu)):
            return Answer(None, f"{os.path.dirname(pmu)} is not there: is /sys mounted?")
        return Answer(False, "the kernel was built without CONFIG_KPROBE_EVENTS, or is too old")
    try:
        with load(_RETURN_ZERO, "probe_perf", "MIT", AttachType.NONE) as program:
            attach(program).close()
    except KpmdError as error:
        return Answer(None, f"the test program was not loaded: {error.detail}")
    except OSError as error:
        hint = ""
        if error.errno == errno.EACCES:
            hint = (
                "; kpmd needs CAP_PERFMON, and where kernel.perf_event_paranoid is above 2 (Debian"
                " sets 3) CAP_SYS_ADMIN: set it to 2 to do without"
            )
        return Answer(None, f"the test probe was not made: {error.strerror}{hint}")
    return Answer(True)


def probe_helper(name: str, helper: int, load: Load = _load) -> Answer:
    """Load a kprobe program that calls a helper with its context.

    The verifier refuses it with EINVAL: no. It takes it: yes. Anything else: not known.
    """
    # call helper; r0 = 0; exit
    code = b"\x85\0\0\0" + helper.to_bytes(4, sys.byteorder) + _RETURN_ZERO
    try:
        load(code, name, "GPL", AttachType.NONE).close()
    except VerifierRejected as error:
        if error.fields.get("errno") == "EINVAL":
            return Answer(False, f"the kernel has no helper {helper} for kprobes (EINVAL)")
        return Answer(None, f"the test program was not loaded: {error.detail}")
    except KpmdError as error:
        return Answer(None, f"the test program was not loaded: {error.detail}")
    return Answer(True)


#: enum bpf_func_id: the address of the function that runs, and the cookie of the link.
_GET_FUNC_IP, _GET_ATTACH_COOKIE = 173, 174

FEATURES = (
    Feature(
        "bpf_link_kprobe_multi",
        "5.18",
        lambda: probe_link("probe_kpm_link", AttachType.KPROBE_MULTI),
    ),
    Feature(
        "bpf_link_kprobe_session",
        "6.10",
        lambda: probe_link("probe_kps_link", AttachType.KPROBE_SESSION),
    ),
    Feature("kprobe_perf_event", "4.17", probe_perf_event),
    Feature("bpf_cookie", "5.15", lambda: probe_helper("probe_cookie", _GET_ATTACH_COOKIE)),
    Feature("bpf_get_func_ip", "5.15", lambda: probe_helper("probe_func_ip", _GET_FUNC_IP)),
)
