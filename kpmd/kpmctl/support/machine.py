"""The parts of a support bundle that this machine tells: its kernel, and kpmd as a service."""

from __future__ import annotations

import json
import os
import platform
import stat
import tomllib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kpmd.kpmctl.support.parts import MOST_BYTES, Missing, Part
from kpmd.kpmctl.support.programs import output, run

#: Seconds that the machine is checked for at the most: it runs the kernel's feature tests.
_CHECK_SECONDS = 60.0

_CONFIG = Path("/etc/kpmd/kpmd.toml")
_POLICY = Path("/etc/kpmd/policy.toml")

_UNITS = ("kpmd.service", "kpmd.socket")

#: Of the units' properties, those that say how kpmd runs. Not Environment= and ExecStart=, in which
#: an administrator may have put a secret.
_PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "Result",
    "NRestarts",
    "MainPID",
    "ExecMainStatus",
    "ExecMainCode",
    "ActiveEnterTimestamp",
    "InactiveEnterTimestamp",
    "FragmentPath",
    "DropInPaths",
    "NeedDaemonReload",
    "MemoryCurrent",
    "MemoryMax",
    "TasksCurrent",
    "TasksMax",
    "CPUUsageNSec",
    "LimitNOFILE",
    "LimitMEMLOCK",
    "FileDescriptorStoreMax",
    "NFileDescriptorStore",
    "AmbientCapabilities",
    "CapabilityBoundingSet",
    "User",
    "WatchdogUSec",
    "LogNamespace",
    "LogRateLimitIntervalUSec",
    "LogRateLimitBurst",
    "Listen",
    "SocketMode",
    "SocketGroup",
    "NAccepted",
    "NRefused",
)

#: Mounts of these types are what kpmd and its clients look into.
_FILESYSTEMS = ("proc", "tracefs", "debugfs", "securityfs", "bpf", "cgroup", "cgroup2")

_SYSCTLS = (
    "kernel/bpf_stats_enabled",
    "kernel/ftrace_enabled",
    "kernel/kptr_restrict",
    "kernel/perf_event_max_sample_rate",
    "kernel/perf_event_paranoid",
    "kernel/unprivileged_bpf_disabled",
    "net/core/bpf_jit_enable",
    "net/core/bpf_jit_harden",
    "debug/kprobes-optimization",
)

#: Fields of the journal that are kept, under names of our own; kpmd's own ones besides.
_FIELDS = {
    "PRIORITY": "priority",
    "SYSLOG_IDENTIFIER": "identifier",
    "_PID": "pid",
    "UNIT": "unit",
    "JOB_RESULT": "job_result",
}


def parts(*, config: bool, journal: int, redacted: bool) -> list[Part]:
    """What is found out here; ``config``: also what the administrator has written.

    ``journal``: that many lines of it, or 0. ``redacted``: of files what they say, and not as what.
    """
    found = [
        Part("machine/kernel.json", "uname, /sys/kernel", _now(_kernel)),
        Part("machine/os-release.txt", "/etc/os-release", _now(lambda: _read("/etc/os-release"))),
        Part("machine/mounts.json", "/proc/self/mounts", _now(_mounts)),
        Part("machine/sysctls.json", "/proc/sys", _now(_sysctls)),
        Part("machine/check.json", "kpmd --check --json", _check, _CHECK_SECONDS),
        _bpftool("prog"),
        _bpftool("link"),
        Part("unit/systemctl.json", f"systemctl show {' '.join(_UNITS)}", _units),
    ]
    if journal:
        command = ("journalctl", f"--unit={_UNITS[0]}", f"--lines={journal}", "--output=json")
        found.append(Part("unit/journal.json", " ".join(command), lambda: _journal(command)))
    if config:
        policy = _policy_path()
        found += [
            Part("config/kpmd.json", str(_CONFIG), _now(lambda: _toml(_CONFIG, redacted))),
            Part("config/policy.json", str(policy), _now(lambda: _toml(policy, redacted))),
        ]
    return found


def _now(look: Callable[[], object]) -> Callable[[], Awaitable[object]]:
    """A part that takes no time: files of the kernel, and small ones."""

    async def get() -> object:
        return look()

    return get


def _read(path: str | Path) -> str:
    """A file's text. Raises OSError, Missing: never waits for anything that is no file."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Missing("failed", f"{path} is no regular file")
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise Missing("failed", f"{path} has more than {MOST_BYTES} bytes")
    return data.decode(errors="backslashreplace")


def _first_line(path: str) -> str | None:
    """What a file of the kernel says; None where it is not there, or not for us."""
    try:
        return _read(path).strip()
    except OSError:
        return None


def _kernel() -> dict[str, Any]:
    system = os.uname()  # but for its name
    return {
        "release": system.release,
        "version": system.version,
        "machine": system.machine,
        "lockdown": _first_line("/sys/kernel/security/lockdown"),
        "lsm": _first_line("/sys/kernel/security/lsm"),
        "kprobes_enabled": _first_line("/sys/kernel/debug/kprobes/enabled"),
        "btf": os.path.exists("/sys/kernel/btf/vmlinux"),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }


def _mounts() -> list[dict[str, str]]:
    """Those of the kernel's own file systems (proc(5) has the form)."""
    rows = [line.split(" ") for line in _read("/proc/self/mounts").splitlines()]
    return [
        {"type": row[2], "path": row[1], "options": row[3]}
        for row in rows
        if len(row) > 3 and row[2] in _FILESYSTEMS
    ]


def _sysctls() -> dict[str, str | None]:
    return {name.replace("/", "."): _first_line(f"/proc/sys/{name}") for name in _SYSCTLS}


async def _check() -> object:
    """What kpmd itself says of this machine; a machine that it cannot run on is an answer, too."""
    done = await run("kpmd", "--check", "--json")
    try:
        return json.loads(done.output)
    except ValueError:
        raise Missing("failed", done.failure()) from None


def _bpftool(what: str) -> Part:
    async def get() -> object:
        if os.geteuid() != 0:
            raise Missing("refused", "only root may list all that is loaded")
        return json.loads(await output("bpftool", "-j", what, "list"))

    return Part(f"machine/bpftool-{what}.json", f"bpftool -j {what} list", get)


async def _units() -> object:
    """The units' properties, by the units' names."""
    text = await output(
        "systemctl", "show", "--no-pager", f"--property={','.join(_PROPERTIES)}", *_UNITS
    )
    blocks = [
        dict(line.partition("=")[::2] for line in block.splitlines())
        for block in text.strip().split("\n\n")
    ]
    return {
        "systemd": (await output("systemctl", "--version")).partition("\n")[0],
        "units": {block.get("Id", "?"): block for block in blocks},
    }


async def _journal(command: tuple[str, ...]) -> object:
    """Entries of the journal, the oldest first: when, how grave, and what they say."""
    done = await run(*command, "--no-pager")
    if done.status:
        raise Missing("failed", done.failure())
    if not done.output.strip():
        # Who may not read it gets nothing, and a hint.
        hint = " ".join(done.error.split())
        raise Missing("refused" if hint else "absent", hint or "it has nothing of this unit")
    return [_entry(json.loads(line)) for line in done.output.splitlines()]


def _entry(fields: dict[str, Any]) -> dict[str, Any]:
    time = datetime.fromtimestamp(int(fields.get("__REALTIME_TIMESTAMP", 0)) / 1e6, UTC)
    made: dict[str, Any] = {"time": time.isoformat()}
    made |= {ours: fields[name] for name, ours in _FIELDS.items() if name in fields}
    message = fields.get("MESSAGE")
    if isinstance(message, list):  # how journalctl writes what is no UTF-8
        message = bytes(message).decode(errors="backslashreplace")
    audit = {
        name.removeprefix("KPMD_").removeprefix("WHAT_").lower(): value
        for name, value in fields.items()
        if name.startswith("KPMD_")
    }
    if audit:  # of which the message is but another form
        return made | {"audit": audit}
    try:
        made["message"] = json.loads(message or "null")
    except ValueError:
        made["message"] = message
    return made


def _policy_path() -> Path:
    """Where the policy is, as the configuration says."""
    try:
        named = tomllib.loads(_read(_CONFIG)).get("policy")
    except (OSError, Missing, ValueError):
        named = None
    return Path(named) if isinstance(named, str) else _POLICY


def _toml(path: Path, redacted: bool) -> dict[str, Any]:
    """A file of the administrator's: whose it is, and what it says."""
    text = _read(path)
    status = path.stat()
    made: dict[str, Any] = {
        "path": str(path),
        "mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "uid": status.st_uid,
        "gid": status.st_gid,
    }
    if not redacted:
        return made | {"text": text}
    try:
        content = tomllib.loads(text)
        # "group" is a word of many meanings, and a name here.
        return made | {"content": content, "groups": [content.get("group", "")]}
    except ValueError as error:
        return made | {"content": None, "error": f"it is no TOML: {error}"}
