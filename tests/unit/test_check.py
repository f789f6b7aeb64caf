"""``kpmd --check`` on machines that are made up: what is found of each, and the exit status."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kpmd.bpf import trial
from kpmd.bpf.features import FEATURES
from kpmd.check import findings, page
from kpmd.check.read import Tree, read
from kpmd.core.machine import (
    NEEDED,
    Finding,
    Machine,
    Mount,
    Process,
    Service,
    Trial,
    capabilities,
    verdict,
)

ROOT = Path(__file__).parents[2]

UNIT = frozenset(NEEDED)
ADMIN = UNIT | {"CAP_SYS_ADMIN"}
SINCE = {each.name: each.min_kernel for each in FEATURES}

GOOD = Machine(
    release="6.12.117+deb12-amd64",
    options=dict.fromkeys(
        (
            *("BPF_SYSCALL", "BPF_JIT", "BPF_EVENTS", "PERF_EVENTS", "KALLSYMS"),
            *("SECCOMP_FILTER", "FUNCTION_TRACER", "DYNAMIC_FTRACE", "FPROBE", "KPROBE_EVENTS"),
        ),
        "y",
    ),
    options_from="/boot/config",
    features={name: Trial(True, None, since) for name, since in SINCE.items()},
    trial=Trial(True),
    process=Process(0, ADMIN, ADMIN),
    lockdown="none",
    lsms=("lockdown", "apparmor"),
    sysctls={
        "kernel.ftrace_enabled": 1,
        "kernel.kptr_restrict": 0,
        "kernel.perf_event_paranoid": 2,
        "kernel.unprivileged_bpf_disabled": 2,
        "net.core.bpf_jit_enable": 1,
        "net.core.bpf_jit_harden": 0,
        "kprobes": 1,
    },
    mounts=(
        Mount("/proc", "proc"),
        Mount("/sys/kernel/tracing", "tracefs"),
        Mount("/sys/fs/cgroup", "cgroup2"),
    ),
    libbpf="1.1",
    libseccomp="2.5.4",
    python="3.11.2",
    service=Service(systemd=252, unit=True, configuration="good"),
)


def answers(machine: Machine, supported: bool | None = None, **given: bool | None) -> Machine:
    """The machine with other answers of feature tests; ``supported``: of all not named."""
    names = {each.removeprefix("bpf_link_kprobe_"): each for each in SINCE}
    names["perf"] = "kprobe_perf_event"
    changed = {names.get(name, name): value for name, value in given.items()}
    return replace(
        machine,
        features={
            name: Trial(changed.get(name, old.supported if changed else supported), "", SINCE[name])
            for name, old in machine.features.items()
        },
    )


def without(machine: Machine, *options: str) -> Machine:
    assert machine.options is not None
    left = {name: value for name, value in machine.options.items() if name not in options}
    return replace(machine, options=left)


def setting(name: str, value: int) -> Machine:
    return replace(GOOD, sysctls={**GOOD.sysctls, name: value})


def who(machine: Machine, **process: object) -> Machine:
    return replace(machine, process=replace(machine.process, **process))  # type: ignore[arg-type]


NOBODY = who(
    replace(
        answers(GOOD),
        trial=Trial(None, "it takes CAP_BPF"),
        functions=False,
        addresses=False,
    ),
    uid=65534,
    effective=frozenset(),
)
#: Debian 12's own, as root and as its unit.
NO_MULTI = answers(
    replace(without(GOOD, "FPROBE"), release="6.1.0-47-amd64"), multi=False, session=False
)
BULLSEYE = answers(
    replace(without(GOOD, "FPROBE"), release="5.10.0-32-amd64"),
    **dict.fromkeys(("multi", "session", "bpf_cookie", "bpf_get_func_ip"), False),
)
CONFIDENTIAL = replace(GOOD, lockdown="confidentiality", functions=False)
PARANOID = {"kernel.perf_event_paranoid": 3}


def bad(machine: Machine) -> dict[str, Finding]:
    """What is not good, nor only to be noted."""
    return {each.name: each for each in findings(machine) if each.level not in ("ok", "note")}


@pytest.mark.parametrize(
    ("machine", "status", "expected"),
    [
        pytest.param(GOOD, 0, {}, id="all of it"),
        pytest.param(replace(GOOD, options=None), 0, {}, id="no configuration"),
        pytest.param(setting("kernel.perf_event_paranoid", 3), 0, {}, id="Debian's settings"),
        pytest.param(replace(GOOD, lockdown="integrity"), 0, {}, id="locked down to integrity"),
        pytest.param(replace(GOOD, lockdown=None), 0, {}, id="no securityfs"),
        pytest.param(setting("kprobes", 0), 0, {}, id="kprobes off, but not needed"),
        pytest.param(setting("net.core.bpf_jit_harden", 2), 0, {}, id="hardened JIT"),
        pytest.param(setting("kernel.unprivileged_bpf_disabled", 0), 0, {}, id="BPF for all"),
        pytest.param(replace(GOOD, lsms=("selinux",)), 0, {}, id="SELinux"),
        pytest.param(who(GOOD, uid=990, effective=UNIT, bounding=UNIT), 0, {}, id="the unit's"),
        pytest.param(NO_MULTI, 1, {"attaching": "less", "sessions": "less"}, id="no kprobe multi"),
        pytest.param(
            BULLSEYE,
            1,
            dict.fromkeys(("attaching", "sessions", "cookies", "function addresses"), "less"),
            id="5.10",
        ),
        pytest.param(
            CONFIDENTIAL,
            1,
            {"lockdown": "less", "list of functions": "less"},
            id="locked down to confidentiality",
        ),
        pytest.param(
            replace(NO_MULTI, lockdown="confidentiality"),
            2,
            {"attaching": "missing", "sessions": "less", "lockdown": "less"},
            id="locked down without kprobe multi",
        ),
        pytest.param(
            answers(NO_MULTI, perf=False),
            2,
            {"attaching": "missing", "sessions": "less"},
            id="no kprobes at all",
        ),
        pytest.param(
            who(
                answers(replace(NO_MULTI, sysctls=PARANOID), perf=None),
                uid=990,
                effective=UNIT,
                bounding=UNIT,
            ),
            2,
            {"attaching": "missing", "sessions": "less"},
            id="the unit on Debian 12's own kernel",
        ),
        pytest.param(
            replace(NO_MULTI, sysctls={**NO_MULTI.sysctls, "kprobes": 0}),
            2,
            {"attaching": "less", "sessions": "less", "kprobes/enabled": "missing"},
            id="kprobes off, and needed",
        ),
        pytest.param(
            replace(BULLSEYE, release="5.4.0-200-generic"),
            2,
            {
                "release": "missing",
                **dict.fromkeys(("attaching", "sessions", "cookies", "function addresses"), "less"),
            },
            id="too old",
        ),
        pytest.param(without(GOOD, "BPF_EVENTS"), 2, {"options": "missing"}, id="no BPF_EVENTS"),
        pytest.param(without(GOOD, "BPF_JIT"), 1, {"options": "less"}, id="no JIT"),
        pytest.param(replace(GOOD, btf=False), 1, {"types (BTF)": "less"}, id="no BTF"),
        pytest.param(
            setting("kernel.ftrace_enabled", 0), 2, {"ftrace_enabled": "missing"}, id="no ftrace"
        ),
        pytest.param(
            setting("net.core.bpf_jit_enable", 0), 1, {"bpf_jit_enable": "less"}, id="JIT off"
        ),
        pytest.param(
            replace(setting("kernel.kptr_restrict", 2), addresses=False),
            1,
            {"addresses": "less"},
            id="kptr_restrict",
        ),
        pytest.param(
            replace(who(GOOD, effective=UNIT - {"CAP_SYSLOG"}), addresses=False),
            1,
            {"addresses": "less", "capabilities": "less"},
            id="root without CAP_SYSLOG",
        ),
        pytest.param(replace(GOOD, addresses=None), 2, {"addresses": "missing"}, id="subset=pid"),
        pytest.param(
            replace(GOOD, functions=False), 1, {"list of functions": "less"}, id="tracefs closed"
        ),
        pytest.param(
            replace(GOOD, functions=False, mounts=GOOD.mounts[::2]),
            1,
            {"list of functions": "less"},
            id="no tracefs",
        ),
        pytest.param(
            replace(GOOD, mounts=(Mount("/proc", "proc", frozenset({"hidepid=2"})), *GOOD.mounts)),
            1,
            {"/proc": "less"},
            id="hidepid",
        ),
        pytest.param(
            replace(
                GOOD,
                mounts=(
                    Mount("/proc", "proc", frozenset({"hidepid=invisible", "gid=990"})),
                    *GOOD.mounts,
                ),
            ),
            0,
            {},
            id="hidepid, but not for kpmd",
        ),
        pytest.param(
            replace(GOOD, mounts=GOOD.mounts[:2]), 1, {"cgroup v2": "less"}, id="no cgroup v2"
        ),
        pytest.param(
            NOBODY,
            3,
            dict.fromkeys(
                (
                    *("attaching", "sessions", "cookies", "function addresses", "loading"),
                    *("list of functions", "addresses", "capabilities"),
                ),
                "unknown",
            ),
            id="a user",
        ),
        pytest.param(
            replace(NOBODY, options=None, release="5.10.0-32-amd64"),
            1,
            {
                **dict.fromkeys(("attaching", "loading", "list of functions"), "unknown"),
                **dict.fromkeys(("addresses", "capabilities"), "unknown"),
                **dict.fromkeys(("sessions", "cookies", "function addresses"), "less"),
            },
            id="a user on 5.10",
        ),
        pytest.param(
            replace(
                answers(who(GOOD, effective=frozenset(), bounding=frozenset(), seccomp=True)),
                trial=Trial(None, "not tried"),
                addresses=False,
            ),
            2,
            {
                **dict.fromkeys(("attaching", "sessions", "cookies"), "unknown"),
                **dict.fromkeys(("function addresses", "loading"), "unknown"),
                "addresses": "less",
                "capabilities": "missing",
            },
            id="a container without capabilities",
        ),
        pytest.param(
            replace(answers(who(GOOD, seccomp=True)), trial=Trial(False, "EPERM")),
            2,
            {
                **dict.fromkeys(("attaching", "loading"), "missing"),
                **dict.fromkeys(("sessions", "cookies", "function addresses"), "unknown"),
            },
            id="a container whose seccomp profile refuses bpf(2)",
        ),
        pytest.param(
            replace(answers(who(GOOD, user_namespace=True)), trial=Trial(None, "not tried")),
            2,
            {
                "user namespace": "missing",
                **dict.fromkeys(("attaching", "sessions", "cookies"), "unknown"),
                **dict.fromkeys(("function addresses", "loading"), "unknown"),
            },
            id="a rootless container",
        ),
        pytest.param(
            replace(GOOD, trial=Trial(False, "no"), user_notif=False),
            2,
            {"loading": "missing"},
            id="no user notification",
        ),
        pytest.param(
            replace(GOOD, libbpf="", libbpf_fault="install it"), 2, {"libbpf": "missing"}, id="lib"
        ),
        pytest.param(
            replace(GOOD, libbpf="0.5", libbpf_fault="a function is missing"),
            2,
            {"libbpf": "missing"},
            id="old libbpf",
        ),
        pytest.param(
            replace(GOOD, libseccomp="2.4.1"), 2, {"libseccomp": "missing"}, id="old libseccomp"
        ),
    ],
)
def test_a_machine(machine: Machine, status: int, expected: dict[str, str]) -> None:
    found = bad(machine)
    assert {name: each.level for name, each in found.items()} == expected
    assert verdict(findings(machine)).status == status
    for each in found.values():
        assert each.found
        if each.level in ("missing", "less"):
            assert each.means, each


@pytest.mark.parametrize(
    ("service", "status", "expected"),
    [
        pytest.param({"systemd": None}, 1, {"systemd": "less"}, id="no systemd"),
        pytest.param({"systemd": 245}, 1, {"systemd": "less"}, id="old systemd"),
        pytest.param({"unit": False, "absent": ("user kpmd-daemon",)}, 0, {}, id="not installed"),
        pytest.param({"absent": ("group kpmd",)}, 2, {"unit": "missing"}, id="no group"),
        pytest.param({"folder": False}, 2, {"socket": "missing"}, id="no folder"),
        pytest.param({"listening": None}, 0, {}, id="served, but not for this user"),
        pytest.param({"fault": "policy.toml: no"}, 2, {"configuration": "missing"}, id="policy"),
    ],
)
def test_an_installation(service: dict[str, object], status: int, expected: object) -> None:
    machine = replace(GOOD, service=replace(GOOD.service, **service))  # type: ignore[arg-type]
    assert {name: each.level for name, each in bad(machine).items()} == expected
    assert verdict(findings(machine)).status == status


def test_options_count_before_the_release() -> None:
    """RHEL 9 has CONFIG_FPROBE in a kernel that it calls 5.14."""
    assert bad(replace(NOBODY, release="5.14.0-362.el9"))["attaching"].level == "unknown"
    assert "FPROBE" in bad(without(NOBODY, "FPROBE"))["attaching"].found


def test_what_to_do() -> None:
    assert "--cap-add BPF" in bad(who(GOOD, bounding=frozenset()))["capabilities"].do
    service = bad(replace(NO_MULTI, sysctls=PARANOID))["attaching"]
    assert "kpmd.service cannot attach" in service.means
    assert service.do.startswith("sysctl -w kernel.perf_event_paranoid=2")
    memory = bad(replace(BULLSEYE, trial=Trial(False, "EPERM")))["loading"]
    assert "LimitMEMLOCK" in memory.do
    refused = bad(answers(who(GOOD, seccomp=True)))["attaching"]
    assert "seccomp profile" in refused.do
    hidden = Mount("/proc", "proc", frozenset({"hidepid=2"}))
    assert "6.5" in bad(replace(NO_MULTI, mounts=(hidden,)))["/proc"].means


def test_the_capabilities_are_those_of_the_unit() -> None:
    unit = (ROOT / "systemd/kpmd.service").read_text()
    (given,) = re.findall(r"^AmbientCapabilities=(.*)$", unit, re.MULTILINE)
    assert set(given.split()) == set(NEEDED)
    assert capabilities("000000c400000000") == {*NEEDED}
    assert capabilities("000001ffffffffff") == {*NEEDED, "CAP_SYS_ADMIN"}


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.12.117+deb12", (6, 12)), ("7.3-rc1", (7, 3)), ("5.10", (5, 10)), ("strange", (0, 0))],
)
def test_the_version_of_a_release(release: str, version: tuple[int, int]) -> None:
    assert Machine(release=release).version == version


def test_the_page() -> None:
    for machine in (GOOD, NOBODY, replace(BULLSEYE, sysctls=PARANOID)):
        found = list(findings(machine))
        text = page.as_text(machine, found)
        assert max(map(len, text.splitlines())) <= 80
        assert "\033" not in text
        coloured = page.as_text(machine, found, colour=True)
        assert "\033[32mok" in coloured
        assert re.sub(r"\033\[[\d;]*m", "", coloured) == text
        assert " ".join(text.split()).endswith(verdict(found).sentence)


def test_the_page_as_json() -> None:
    told = json.loads(page.as_json(BULLSEYE, list(findings(BULLSEYE))))
    assert (told["verdict"], told["status"], told["kernel"]) == ("less", 1, BULLSEYE.release)
    assert told["findings"][0] == {
        "group": "Kernel",
        "name": "release",
        "level": "ok",
        "found": "5.10.0-32-amd64 (x86_64)",
        "means": "",
        "do": "",
    }


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of a machine that is made up."""
    files = {
        "proc/self/status": "Name:\tx\nUid:\t0\t990\t990\t990\nCapEff:\t000000c400000000\n"
        "CapBnd:\t000000c400200000\nSeccomp:\t2\n",
        "proc/self/uid_map": "         0     100000      65536\n",
        "proc/self/mounts": "proc /proc proc rw,hidepid=2 0 0\nbroken\n",
        "proc/sys/kernel/perf_event_paranoid": "-1\n",
        "proc/sys/kernel/kptr_restrict": "strange\n",
        "proc/sys/kernel/seccomp/actions_avail": "kill_process trap errno allow\n",
        "proc/kallsyms": "0000000000000000 A fixed\nffffffff81000000 T _text\n",
        "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
        "boot/config-1": "# CONFIG_FPROBE is not set\nCONFIG_BPF=y\nCONFIG_LSM=m\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_reading(tree: Path) -> None:
    read_tree = Tree(tree)
    bounding = UNIT | {"CAP_SYS_ADMIN"}
    assert read_tree.process() == Process(990, UNIT, bounding, user_namespace=True, seccomp=True)
    assert read_tree.options("1") == ({"BPF": "y", "LSM": "m"}, "/boot/config-1")
    assert read_tree.options("2") == (None, "")
    assert read_tree.sysctls() == {"kernel.perf_event_paranoid": -1}
    assert read_tree.lockdown() == "integrity"
    assert read_tree.addresses() is True
    assert read_tree.user_notif() is False


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    empty = Tree(tmp_path)
    assert empty.process() == Process()
    assert (empty.lockdown(), empty.addresses(), empty.user_notif()) == (None, None, None)
    assert empty.sysctls() == {}
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/config.gz").write_bytes(b"no gzip")
    assert empty.options("1") == (None, "")
    (tmp_path / "proc/config.gz").write_bytes(gzip.compress(b"CONFIG_BPF=y\n"))
    assert empty.options("1") == ({"BPF": "y"}, "/proc/config.gz")
    (tmp_path / "proc/kallsyms").write_text("0000000000000000 T _text\n")
    assert empty.addresses() is False
    (tmp_path / "sys/kernel/security").mkdir(parents=True)
    (tmp_path / "sys/kernel/security/lsm").write_text("capability")
    assert empty.lockdown() == ""


def test_this_machine(tmp_path: Path) -> None:
    """Whatever it is: the report comes, and libraries are there, as the tests need them."""
    machine = read(None, {"socket": tmp_path / "k.sock"})
    assert {each.name: each.level for each in findings(machine)}["libbpf"] == "ok"
    assert machine.libseccomp.startswith("2.")
    assert machine.service.listening is False
    assert set(machine.features) == set(SINCE)


def test_a_configuration_that_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "kpmd.toml"
    wrong.write_text("sockets = 1")
    service = read(wrong, {}, Tree(tmp_path)).service
    assert service.fault is not None
    assert "sockets" in service.fault


def test_libraries_that_are_not_there() -> None:
    version, fault = trial.libbpf_version("libbpf.so.77")
    assert version == ""
    assert fault is not None
    version, fault = trial.libseccomp_version("libc.so.6")
    assert version == ""
    assert fault is not None
    assert "libseccomp 2.5" in fault
