"""What ``kpmd --check`` knows of a machine, and the form of what it says. Pure.

``kpmd.check.read`` fills a ``Machine`` in, ``kpmd.core.judge_kernel`` and ``judge_service`` say
what it is worth. Where a field is None, this process could not see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

#: What a finding means. ``note``: good to know, and nothing that kpmd lacks. ``less``: kpmd can
#: run, and does less. ``unknown``: this process could not see it. ``missing``: kpmd cannot run.
Level = Literal["ok", "note", "less", "unknown", "missing"]

#: The capabilities that kpmd.service has (tests hold it against the unit).
NEEDED = ("CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG")

#: Bits of /proc/PID/status (include/uapi/linux/capability.h).
_BITS = {"CAP_SYS_ADMIN": 21, "CAP_SYSLOG": 34, "CAP_PERFMON": 38, "CAP_BPF": 39}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was found, what that means for kpmd, and what to do."""

    group: str
    name: str
    level: Level
    found: str
    means: str = ""
    do: str = ""


@dataclass(frozen=True)
class Verdict:
    """What all findings come to; ``status`` is the exit status, as monitoring plugins have it."""

    status: int
    word: str
    sentence: str


@dataclass(frozen=True)
class Trial:
    """The answer of a feature test (``kpmd.bpf.features``), or of a trial."""

    supported: bool | None
    reason: str | None = None
    min_kernel: str = ""


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mounts."""

    where: str
    kind: str
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Process:
    """Who asks: what this process may do."""

    uid: int = 0
    effective: frozenset[str] = frozenset()
    bounding: frozenset[str] = frozenset()
    user_namespace: bool = False
    #: A filter of system calls is in force, as in most containers.
    seccomp: bool = False

    def has(self, *names: str) -> bool:
        """Whether it has these capabilities, for the machine and not for a namespace only."""
        return not self.user_namespace and self.effective.issuperset(names)


@dataclass(frozen=True)
class Service:
    """How kpmd is installed."""

    #: systemd's version where it is what runs the machine, else None.
    systemd: int | None = None
    unit: bool = False
    #: Of the unit's users and groups those that are not there.
    absent: tuple[str, ...] = ()
    socket: str = "/run/kpmd.sock"
    #: Whether the socket's folder is there, and whether somebody listens; None: cannot be told.
    folder: bool = True
    listening: bool | None = False
    #: The configuration's summary, or what is wrong with it.
    configuration: str = ""
    fault: str | None = None


@dataclass(frozen=True)
class Machine:
    """Everything that the judges look at."""

    release: str
    machine: str = "x86_64"
    #: The kernel's options without CONFIG_, and the file they are from.
    options: Mapping[str, str] | None = None
    options_from: str = ""
    #: By the names of ``kpmd.bpf.features``; ``trial``: a program loaded as clients' are.
    features: Mapping[str, Trial] = field(default_factory=dict)
    trial: Trial = Trial(None, "not tried")
    process: Process = Process()
    #: "none", "integrity", "confidentiality", or "" where the kernel has no lockdown.
    lockdown: str | None = ""
    lsms: Sequence[str] = ()
    #: By name, as sysctl(8) has it; and ``kprobes``: /sys/kernel/debug/kprobes/enabled.
    sysctls: Mapping[str, int] = field(default_factory=dict)
    mounts: Sequence[Mount] = ()
    #: Whether kallsyms shows addresses; None: it cannot be read at all.
    addresses: bool | None = True
    #: Whether tracefs's list of functions can be read.
    functions: bool = True
    btf: bool = True
    user_notif: bool | None = True
    #: Versions of what is not in Python's packages; "" where it is not there or too old.
    libbpf: str = ""
    libbpf_fault: str | None = None
    libseccomp: str = ""
    libseccomp_fault: str | None = None
    python: str = ""
    service: Service = Service()

    @property
    def version(self) -> tuple[int, int]:
        """The kernel's version: (6, 12). (0, 0) where the release begins with none."""
        major, _, rest = self.release.partition(".")
        minor = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        return (int(major), int(minor)) if major.isdigit() and minor else (0, 0)

    def has(self, option: str) -> bool | None:
        """Whether the kernel was built with an option; None: not known."""
        return None if self.options is None else self.options.get(option) in ("y", "m")


def capabilities(mask: str) -> frozenset[str]:
    """The capabilities that matter to kpmd, of a mask as /proc/PID/status has it."""
    bits = int(mask, 16)
    return frozenset(name for name, bit in _BITS.items() if bits >> bit & 1)


def options(text: str) -> dict[str, str]:
    """The options of a kernel's configuration that are set, without ``CONFIG_``."""
    lines = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {name.removeprefix("CONFIG_"): value for name, _, value in lines}


def mounts(text: str) -> list[Mount]:
    """The mounts of /proc/self/mounts."""
    parts = (line.split() for line in text.splitlines())
    return [Mount(each[1], each[2], frozenset(each[3].split(","))) for each in parts if each[3:]]


def verdict(findings: Iterable[Finding]) -> Verdict:
    """What the findings come to.

    Status 0: everything; 1: less; 2: kpmd cannot run; 3: nothing is known to be missing, but not
    everything could be seen.
    """
    by_level: dict[Level, list[str]] = {}
    for each in findings:
        by_level.setdefault(each.level, []).append(each.name)

    def names(level: Level) -> str:
        return ", ".join(by_level[level])

    if "missing" in by_level:
        return Verdict(2, "cannot", f"kpmd cannot run here: see {names('missing')}.")
    if "less" in by_level:
        return Verdict(1, "less", f"kpmd can run here, and do less: see {names('less')}.")
    if "unknown" in by_level:
        return Verdict(
            3,
            "unknown",
            f"Nothing is known to be missing, but not all could be seen: {names('unknown')}.",
        )
    return Verdict(0, "everything", "kpmd can do everything here.")
