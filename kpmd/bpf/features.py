"""Feature tests: does this kernel have it? Yes and no are facts; anything else is asked again.

The two tests and the meaning of each errno are those of cilium/ebpf's feature tests
``haveBPFLinkKprobeMulti`` and ``haveBPFLinkKprobeSession``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from kpmd.bpf.abi import AttachType
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.objects import link_create, program_load
from kpmd.bpf.syscall import BpfError
from kpmd.errors import KpmdError

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
)
