"""Reads the machine: files below a root folder, this process, and what feature tests answer."""

from __future__ import annotations

import contextlib
import grp
import gzip
import os
import platform
import pwd
import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from kpmd import builtin, config, policy_file
from kpmd.bpf import tracefs, trial
from kpmd.bpf.features import FEATURES, Feature
from kpmd.core.machine import (
    Machine,
    Process,
    Service,
    Trial,
    capabilities,
    mounts,
    options,
)

#: What /proc/self/uid_map says in the machine's first user namespace.
_FIRST_NAMESPACE = ["0", "0", "4294967295"]

_SYSCTLS = (
    "kernel.ftrace_enabled",
    "kernel.kptr_restrict",
    "kernel.perf_event_paranoid",
    "kernel.unprivileged_bpf_disabled",
    "net.core.bpf_jit_enable",
    "net.core.bpf_jit_harden",
)
_UNITS = ("etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system")
#: kallsyms: as many of its lines are looked at for an address.
_LINES = 1000


class Tree:
    """The files of a machine; below another root, those of a made-up one."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def bytes(self, path: str) -> bytes | None:
        """A file's content; None where it cannot be read."""
        try:
            return (self._root / path).read_bytes()
        except OSError:
            return None

    def text(self, path: str) -> str | None:
        """The same as text, without spaces around it."""
        content = self.bytes(path)
        return None if content is None else content.decode("utf-8", "replace").strip()

    def has(self, path: str) -> bool:
        """Whether there is such a file or folder, as far as can be seen."""
        return os.path.exists(self._root / path)

    def options(self, release: str) -> tuple[Mapping[str, str] | None, str]:
        """The kernel's options and the file they are from; (None, "") where there is none."""
        for path in (
            "proc/config.gz",
            f"boot/config-{release}",
            f"lib/modules/{release}/config",
            f"usr/lib/modules/{release}/config",
        ):
            content = self.bytes(path)
            if content is not None:
                with contextlib.suppress(OSError, EOFError):
                    raw = gzip.decompress(content) if path.endswith(".gz") else content
                    return options(raw.decode("utf-8", "replace")), f"/{path}"
        return None, ""

    def process(self) -> Process:
        """What this process may do, as /proc/self/status has it."""
        status = dict(
            line.split(":", 1)
            for line in (self.text("proc/self/status") or "").splitlines()
            if ":" in line
        )
        namespace = (self.text("proc/self/uid_map") or "").split()
        return Process(
            uid=int(status.get("Uid", "0 0").split()[1]),
            effective=capabilities(status.get("CapEff", "0")),
            bounding=capabilities(status.get("CapBnd", "0")),
            user_namespace=bool(namespace) and namespace != _FIRST_NAMESPACE,
            seccomp=status.get("Seccomp", "0").strip() != "0",
        )

    def lockdown(self) -> str | None:
        """The word in brackets; "" where securityfs is there and has no such file."""
        text = self.text("sys/kernel/security/lockdown")
        if text is None:
            return "" if self.has("sys/kernel/security/lsm") else None
        found = re.search(r"\[(\w+)\]", text)
        return found[1] if found else ""

    def sysctls(self) -> dict[str, int]:
        """Those that can be read and are numbers."""
        paths = {name: f"proc/sys/{name.replace('.', '/')}" for name in _SYSCTLS}
        paths["kprobes"] = "sys/kernel/debug/kprobes/enabled"
        found = {name: self.text(path) or "" for name, path in paths.items()}
        return {name: int(text) for name, text in found.items() if re.fullmatch(r"-?\d+", text)}

    def addresses(self) -> bool | None:
        """Whether kallsyms shows any; None where there is no kallsyms."""
        try:
            with open(self._root / "proc/kallsyms", "rb") as file:
                lines = [line for line, _ in zip(file, range(_LINES), strict=False)]
        except OSError:
            return None
        # Some begin with symbols of processors' areas, whose addresses are zeros.
        return any(line.split(b" ", 1)[0].strip(b"0") for line in lines) if lines else None

    def user_notif(self) -> bool | None:
        """Whether seccomp(2) can ask another process; None where that cannot be read."""
        actions = self.text("proc/sys/kernel/seccomp/actions_avail")
        return None if actions is None else "user_notif" in actions.split()


def read(
    config_file: Path | None, arguments: dict[str, object], tree: Tree | None = None
) -> Machine:
    """Everything about this machine; takes about a second. Raises nothing for what is missing."""
    tree = tree or Tree()
    uname = os.uname()
    process = tree.process()
    found, origin = tree.options(uname.release)
    features = {each.name: _tested(each) for each in FEATURES}
    libbpf, libbpf_fault = trial.libbpf_version()
    libseccomp, libseccomp_fault = trial.libseccomp_version()
    return Machine(
        release=uname.release,
        machine=uname.machine,
        options=found,
        options_from=origin,
        features=features,
        trial=_trial(process, features),
        process=process,
        lockdown=tree.lockdown(),
        lsms=tuple(filter(None, (tree.text("sys/kernel/security/lsm") or "").split(","))),
        sysctls=tree.sysctls(),
        mounts=mounts(tree.text("proc/self/mounts") or ""),
        addresses=tree.addresses(),
        functions=tracefs.Files().lists_functions(),
        btf=tree.has("sys/kernel/btf/vmlinux"),
        user_notif=tree.user_notif(),
        libbpf=libbpf,
        libbpf_fault=libbpf_fault,
        libseccomp=libseccomp,
        libseccomp_fault=libseccomp_fault,
        python=platform.python_version(),
        service=_service(tree, config_file, arguments),
    )


def _tested(feature: Feature) -> Trial:
    answer = feature.test()
    return Trial(answer.supported, answer.reason, feature.min_kernel)


def _trial(process: Process, features: Mapping[str, Trial]) -> Trial:
    """Load the builtin ``count`` as for a client."""
    if not process.has("CAP_BPF", "CAP_PERFMON"):
        return Trial(None, "it takes CAP_BPF and CAP_PERFMON to try")
    multi = features["bpf_link_kprobe_multi"].supported
    try:
        elf = builtin.read("count", func_ip=bool(features["bpf_get_func_ip"].supported))
    except NotImplementedError as error:
        return Trial(None, f"not tried: {error}")
    fault = trial.load(elf, "kprobe_multi" if multi else "perf_event")
    return Trial(fault is None, fault)


def _service(tree: Tree, config_file: Path | None, arguments: dict[str, object]) -> Service:
    found = config.Config()
    told, fault = "", None
    try:
        found = config.load(config_file, **arguments)
        config.load_deny_list(found.deny_file)
        policy = policy_file.load(found.policy, found.group)
        told = f"good; policy: {policy.source}, {len(policy.rules)} rules"
    except ValueError as error:
        fault = str(error)
    path = str(found.socket)
    return Service(
        systemd=_systemd() if tree.has("run/systemd/system") else None,
        unit=any(tree.has(f"{folder}/kpmd.service") for folder in _UNITS),
        absent=tuple(_absent()),
        socket=path,
        folder=os.path.isdir(os.path.dirname(path)),
        listening=_listening(path),
        configuration=told,
        fault=fault,
    )


def _systemd() -> int:
    """The version of systemd; 0 where it does not tell."""
    try:
        told = subprocess.run(
            ["systemctl", "--version"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.match(r"systemd (\d+)", told)
    return int(found[1]) if found else 0


def _absent() -> list[str]:
    """Of the users and groups of systemd/kpmd.sysusers those that are not there."""
    absent = []
    try:
        pwd.getpwnam("kpmd-daemon")
    except KeyError:
        absent.append("user kpmd-daemon")
    try:
        grp.getgrnam("kpmd")
    except KeyError:
        absent.append("group kpmd")
    return absent


def _listening(path: str) -> bool | None:
    """Whether somebody serves a socket; None where this user may not connect."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(path)
        except (PermissionError, BlockingIOError):
            return None
        except OSError:
            return False
    return True
