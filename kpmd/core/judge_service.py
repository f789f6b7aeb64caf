"""What a process, its surroundings and an installation are worth to kpmd. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kpmd.core.machine import NEEDED, Finding, Machine

_RIGHTS, _MOUNTS, _SOFTWARE, _SERVICE = "Rights", "Mounts", "Software", "Service"

#: kpmd.service keeps maps by FDPOLL=0 and waits by BARRIER=1, which came with this systemd.
_SYSTEMD = 246

_LIBBPF, _LIBSECCOMP = (1, 0), (2, 5)
#: libbpf 1.0 has all that kpmd calls; it is tested from here on.
_LIBBPF_TESTED = (1, 1)

_HIDDEN = frozenset({"1", "2", "4", "noaccess", "invisible", "ptraceable"})


def judge_rights(machine: Machine) -> Iterator[Finding]:
    """The capabilities of this process, and those that it can still get."""
    process = machine.process
    lacking = [name for name in NEEDED if name not in process.effective]
    cut = [name for name in NEEDED if name not in process.bounding]
    if process.user_namespace:
        yield Finding(
            _RIGHTS,
            "user namespace",
            "missing",
            "this is not the machine's first one",
            "capabilities of a user namespace do not count for bpf(2)",
            "run kpmd outside of it: no rootless container, no userns-remap",
        )
    if set(cut) - {"CAP_SYSLOG"}:
        given = " ".join(f"--cap-add {name.removeprefix('CAP_')}" for name in cut)
        yield Finding(
            _RIGHTS,
            "capabilities",
            "missing",
            f"without {', '.join(cut)} for good (bounding set)",
            "programs can be neither loaded nor attached",
            f"give them to the container ({given}), or to the unit (CapabilityBoundingSet=)",
        )
    elif lacking and process.uid and not cut:
        yield Finding(
            _RIGHTS,
            "capabilities",
            "unknown",
            f"this user has no {', '.join(lacking)}; kpmd.service gives them to kpmd",
            "",
            "run this as root: the tests need them",
        )
    elif lacking:
        yield Finding(
            _RIGHTS,
            "capabilities",
            "less" if lacking == ["CAP_SYSLOG"] else "missing",
            f"this process has no {', '.join(lacking)}",
            "addresses are hidden"
            if lacking == ["CAP_SYSLOG"]
            else "programs can be neither loaded nor attached",
            "give them to the container, or to the unit (AmbientCapabilities=)",
        )
    else:
        yield Finding(_RIGHTS, "capabilities", "ok", ", ".join(NEEDED))


def judge_mounts(machine: Machine) -> Iterator[Finding]:
    """File systems that kpmd reads."""
    kinds = {each.kind: each.where for each in machine.mounts}
    proc = next((each for each in machine.mounts if each.where == "/proc"), None)
    if proc is not None and _hides(proc.options):
        means = "kpmd.service cannot tell the command of a client"
        if machine.version < (6, 5):
            means += ", and before kernel 6.5 not be sure which process it is: what is to end with"
            means += " a process is refused"
        yield Finding(
            _MOUNTS,
            "/proc",
            "less",
            "mounted with hidepid",
            means,
            "mount -o remount,hidepid=0 /proc; or gid= of a group that kpmd-daemon is in",
        )
    else:
        yield Finding(_MOUNTS, "/proc", "ok", "mounted")
    if "cgroup2" in kinds:
        yield Finding(_MOUNTS, "cgroup v2", "ok", kinds["cgroup2"])
    else:
        yield Finding(
            _MOUNTS,
            "cgroup v2",
            "less",
            "not mounted",
            "nothing can be told apart by cgroup (--cgroup)",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        )
    if "bpf" not in kinds:
        yield Finding(_MOUNTS, "bpffs", "ok", "not mounted, and not needed: kpmd pins nothing")


def _hides(options: frozenset[str]) -> bool:
    """Whether a /proc keeps one user's processes from all others."""
    given = dict(each.split("=", 1) for each in options if "=" in each)
    return given.get("hidepid") in _HIDDEN and "gid" not in given


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def judge_software(machine: Machine) -> Iterator[Finding]:
    """Libraries that are not Python's."""
    yield Finding(_SOFTWARE, "Python", "ok", machine.python)
    yield _library(
        "libbpf", machine.libbpf, machine.libbpf_fault, _LIBBPF, "libbpf1", "ELF objects"
    )
    yield _library(
        "libseccomp",
        machine.libseccomp,
        machine.libseccomp_fault,
        _LIBSECCOMP,
        "libseccomp2",
        "objects",
    )


def _library(
    name: str, version: str, fault: str | None, least: tuple[int, int], package: str, what: str
) -> Finding:
    needed = f"{least[0]}.{least[1]} or newer"
    if fault is not None or _version(version) < least:
        return Finding(
            _SOFTWARE,
            name,
            "missing",
            version or "not there",
            f"kpmd needs {needed} to load {what}, the builtins among them",
            f"install it: {package} on Debian and Ubuntu, {name} elsewhere",
        )
    if name == "libbpf" and _version(version) < _LIBBPF_TESTED:
        return Finding(_SOFTWARE, name, "note", version, "kpmd is tested with 1.1 and newer")
    return Finding(_SOFTWARE, name, "ok", version)


def judge_service(machine: Machine) -> Iterator[Finding]:
    """The installation: systemd, users, socket, configuration."""
    service = machine.service
    if service.systemd is None:
        yield Finding(
            _SERVICE,
            "systemd",
            "less",
            "does not run this machine, or this container",
            "nothing survives a restart of kpmd",
            "run kpmd as a service of the machine: docs/how-to/install.md",
        )
    elif service.systemd < _SYSTEMD:
        yield Finding(
            _SERVICE,
            "systemd",
            "less",
            str(service.systemd),
            f"nothing survives a restart of kpmd: its FD store takes {_SYSTEMD}",
        )
    else:
        yield Finding(_SERVICE, "systemd", "ok", str(service.systemd))
    yield _installed(machine)
    yield _socket(machine)
    if service.fault is not None:
        do = "correct it, and look again: kpmd --check-config"
        means = "kpmd does not start"
        yield Finding(_SERVICE, "configuration", "missing", service.fault, means, do)
    else:
        yield Finding(_SERVICE, "configuration", "ok", service.configuration)


def _installed(machine: Machine) -> Finding:
    service = machine.service
    if not service.unit:
        found = "kpmd.service is not installed"
        return Finding(_SERVICE, "unit", "note", found, "", "docs/how-to/install.md tells how")
    if service.absent:
        return Finding(
            _SERVICE,
            "unit",
            "missing",
            f"there is no {' and no '.join(service.absent)}",
            "kpmd.socket and kpmd.service do not start",
            "systemd-sysusers, with /usr/lib/sysusers.d/kpmd.conf in its place",
        )
    return Finding(_SERVICE, "unit", "ok", "installed, with its users")


def _socket(machine: Machine) -> Finding:
    service = machine.service
    if not service.folder:
        return Finding(
            _SERVICE,
            "socket",
            "missing",
            f"{service.socket}: its folder is not there",
            "kpmd cannot listen",
            "make the folder, or set socket in /etc/kpmd/kpmd.toml",
        )
    if service.listening is None:
        found = f"{service.socket}: not for this user"
    else:
        found = f"{service.socket}: {'served' if service.listening else 'nobody listens'}"
    return Finding(_SERVICE, "socket", "ok", found)
