"""What a kernel is worth to kpmd: options, feature tests, lockdown, sysctls. Pure.

Feature tests are the judge where they could be run; options and the release say why, or stand in.
What lockdown and the sysctls do was tried on kernels 5.10, 6.1, 6.12 and 7.3.
"""

from __future__ import annotations

from collections.abc import Iterator

from kpmd.core.machine import Finding, Level, Machine, Trial

_KERNEL, _SETTINGS = "Kernel", "Settings"

#: The oldest kernel whose seccomp(2) can do what the loader needs (SECCOMP_IOCTL_NOTIF_ADDFD).
_OLDEST = (5, 9)
#: Before this, BPF memory counts against RLIMIT_MEMLOCK.
_MEMORY_BY_CGROUP = (5, 11)
#: The oldest that kpmd is tested on.
_TESTED = (5, 10)

#: Options without which nothing works, and what each is for.
_VITAL = {
    "BPF_SYSCALL": "bpf(2)",
    "PERF_EVENTS": "programs on functions",
    "BPF_EVENTS": "programs on functions",
    "KALLSYMS": "the functions' names",
    "SECCOMP_FILTER": "the confinement of the processes that load programs",
}
#: What kprobe multi is made of.
_FPROBE = ("FUNCTION_TRACER", "DYNAMIC_FTRACE", "FPROBE")

_MULTI = "bpf_link_kprobe_multi"
_SESSION = "bpf_link_kprobe_session"
_PERF = "kprobe_perf_event"

_NEWER = (
    "take a kernel from 5.18 on that has CONFIG_FPROBE: docs/reference/distributions.md has a list"
)
_PARANOID = "sysctl -w kernel.perf_event_paranoid=2, and the same in /etc/sysctl.d/"


def judge_kernel(machine: Machine) -> Iterator[Finding]:
    """All findings about the kernel, in the order of the report."""
    yield _release(machine)
    yield _options(machine)
    yield _attach(machine)
    yield from _optional(machine)
    yield _trial(machine)
    yield _btf(machine)
    yield _functions(machine)
    yield _addresses(machine)
    yield _lockdown(machine)
    yield _lsms(machine)
    yield from _sysctls(machine)


def _test(machine: Machine, name: str) -> Trial:
    return machine.features.get(name, Trial(None, "not tested"))


def _new_enough(machine: Machine, test: Trial) -> bool:
    major, _, minor = test.min_kernel.partition(".")
    return not test.min_kernel or machine.version >= (int(major), int(minor))


def _release(machine: Machine) -> Finding:
    found = f"{machine.release} ({machine.machine})"
    if machine.version < _OLDEST:
        return Finding(
            _KERNEL,
            "release",
            "missing",
            found,
            "kpmd needs 5.9: older ones cannot confine what loads programs",
            _NEWER,
        )
    if machine.version < _TESTED:
        return Finding(_KERNEL, "release", "note", found, "kpmd is tested from 5.10 on")
    return Finding(_KERNEL, "release", "ok", found)


def _options(machine: Machine) -> Finding:
    if machine.options is None:
        return Finding(
            _KERNEL,
            "options",
            "note",
            "the kernel's configuration cannot be read",
            "the tests below tell what it can do",
        )
    gone = [name for name in _VITAL if not machine.has(name)]
    if gone:
        return Finding(
            _KERNEL,
            "options",
            "missing",
            f"{machine.options_from}: without {', '.join(f'CONFIG_{name}' for name in gone)}",
            f"needed for {', '.join(dict.fromkeys(_VITAL[name] for name in gone))}",
            "take a kernel that was built with them",
        )
    if not machine.has("BPF_JIT"):
        return Finding(
            _KERNEL,
            "options",
            "less",
            f"{machine.options_from}: without CONFIG_BPF_JIT",
            "programs are interpreted: each call of a traced function costs more",
            "take a kernel that was built with it",
        )
    return Finding(_KERNEL, "options", "ok", f"all that kpmd needs, by {machine.options_from}")


def one_by_one(machine: Machine) -> bool:
    """Whether kprobe multi is surely not there, so that functions are attached to one by one."""
    test = _test(machine, _MULTI)
    if test.supported is not None:
        return not test.supported
    # Its options before its release: RHEL 9 has CONFIG_FPROBE in a kernel that it calls 5.14.
    built = machine.has("FPROBE")
    return not _new_enough(machine, test) if built is None else not built


def _why_not_multi(machine: Machine) -> str:
    test = _test(machine, _MULTI)
    if not _new_enough(machine, test):
        return f"older than {test.min_kernel}, no kprobe multi"
    gone = [name for name in _FPROBE if machine.has(name) is False]
    if gone:
        return f"no kprobe multi: without {', '.join(f'CONFIG_{name}' for name in gone)}"
    return f"no kprobe multi: {test.reason or 'without CONFIG_FPROBE'}"


def _attach(machine: Machine) -> Finding:
    """How programs get to functions: without any way there is no use for kpmd."""
    multi, perf = _test(machine, _MULTI), _test(machine, _PERF)
    name = "attaching"
    if multi.supported:
        return Finding(_KERNEL, name, "ok", "kprobe multi: many functions a link (tested)")
    if not one_by_one(machine):
        return _untested(machine, name, multi, "kprobe multi is likely there, by the release")
    less = "at most 512 functions in a link, and slower; no sessions"
    why = _why_not_multi(machine)
    if machine.lockdown == "confidentiality":
        return Finding(_KERNEL, name, "missing", why, "lockdown forbids kprobes one by one", _NEWER)
    if perf.supported is False or machine.has("KPROBE_EVENTS") is False:
        means = "nor kprobes one by one, which need CONFIG_KPROBE_EVENTS: nothing can be attached"
        return Finding(_KERNEL, name, "missing", why, means, _NEWER)
    if machine.sysctls.get("kernel.perf_event_paranoid", 0) > 2:
        if perf.supported:
            return Finding(
                _KERNEL,
                name,
                "less",
                f"one by one, as root (tested); {why}",
                f"{less}; kpmd.service cannot attach, as it has no CAP_SYS_ADMIN and"
                " kernel.perf_event_paranoid is above 2",
                _PARANOID,
            )
        if machine.process.has("CAP_PERFMON"):
            means = "one by one takes CAP_SYS_ADMIN while kernel.perf_event_paranoid is above 2"
            return Finding(_KERNEL, name, "missing", why, means, _PARANOID)
    if perf.supported:
        return Finding(_KERNEL, name, "less", f"one by one (tested); {why}", less, _NEWER)
    return _untested(machine, name, perf, f"kprobes one by one may be there; {why}")


def _untested(machine: Machine, name: str, test: Trial, likely: str) -> Finding:
    """What a test left open: with the capabilities for it, something forbids it."""
    if not machine.process.has("CAP_BPF", "CAP_PERFMON"):
        return Finding(_KERNEL, name, "unknown", likely, "", "run this as root: it will be tested")
    if machine.process.seccomp:
        do = "let the container's seccomp profile allow bpf(2), perf_event_open(2) and seccomp(2)"
    else:
        do = "see whether a security module forbids it: journalctl -k --grep 'denied|lockdown'"
    return Finding(
        _KERNEL, name, "missing", test.reason or "refused", "nothing can be attached", do
    )


#: Features that kpmd can do without: what they are called here, and what is lost.
_OPTIONAL = {
    _SESSION: ("sessions", "entry and return take two programs instead of one"),
    "bpf_cookie": ("cookies", "links with cookies are refused"),
    "bpf_get_func_ip": (
        "function addresses",
        "the builtins count and stacks take entries alone, and all builtins x86-64",
    ),
}


def _optional(machine: Machine) -> Iterator[Finding]:
    for feature, (name, without) in _OPTIONAL.items():
        test = _test(machine, feature)
        old = not _new_enough(machine, test)
        if feature == _SESSION and (one_by_one(machine) or old):
            test = Trial(False, test.reason, test.min_kernel)
        if test.supported:
            yield Finding(_KERNEL, name, "ok", "there (tested)")
        elif test.supported is False:
            found = f"not there: since {test.min_kernel}" if old else "not there"
            yield Finding(_KERNEL, name, "less", found, without, "a newer kernel has it")
        else:
            yield _unseen(name, old, test, without)


def _unseen(name: str, old: bool, test: Trial, without: str) -> Finding:
    found = f"not there: since {test.min_kernel}" if old else "likely there, by the release"
    return Finding(_KERNEL, name, "less" if old else "unknown", found, without if old else "")


def _trial(machine: Machine) -> Finding:
    name = "loading"
    if machine.trial.supported:
        return Finding(_KERNEL, name, "ok", "an object, in confined processes (tested)")
    if machine.user_notif is False:
        return Finding(
            _KERNEL,
            name,
            "missing",
            "seccomp(2) has no user notification",
            "what clients send is not loaded without",
            "take a kernel with CONFIG_SECCOMP_FILTER",
        )
    if machine.trial.supported is None:
        return Finding(
            _KERNEL, name, "unknown", machine.trial.reason or "not tried", "", "run this as root"
        )
    do = "see what stands above and below, and journalctl -k"
    if machine.version < _MEMORY_BY_CGROUP:
        do = "first raise the limit of locked memory: ulimit -l unlimited; LimitMEMLOCK=infinity"
    return Finding(
        _KERNEL,
        name,
        "missing",
        machine.trial.reason or "refused",
        "nothing that clients send can be loaded",
        do,
    )


def _btf(machine: Machine) -> Finding:
    if machine.btf:
        return Finding(_KERNEL, "types (BTF)", "ok", "/sys/kernel/btf/vmlinux")
    return Finding(
        _KERNEL,
        "types (BTF)",
        "less",
        "no /sys/kernel/btf/vmlinux",
        "objects with CO-RE relocations cannot be loaded; the builtins have none",
        "take a kernel with CONFIG_DEBUG_INFO_BTF",
    )


def _functions(machine: Machine) -> Finding:
    name = "list of functions"
    if machine.functions:
        return Finding(_KERNEL, name, "ok", "tracefs's")
    mounted = any(each.kind == "tracefs" for each in machine.mounts)
    means = "kpmd cannot tell which functions can be traced: patterns are refused"
    if machine.lockdown == "confidentiality":
        do = "boot without lockdown=confidentiality"
        return Finding(_KERNEL, name, "less", "lockdown closes tracefs", means, do)
    if not mounted:
        do = "mount -t tracefs tracefs /sys/kernel/tracing; in a container, mount the host's"
        return Finding(_KERNEL, name, "less", "tracefs is not mounted", means, do)
    if machine.process.uid:
        found = "only root may open tracefs; kpmd.service hands it over"
        return Finding(_KERNEL, name, "unknown", found, "", "run this as root")
    do = "mount it so that root can read available_filter_functions"
    return Finding(_KERNEL, name, "less", "tracefs cannot be read", means, do)


def _addresses(machine: Machine) -> Finding:
    name = "addresses"
    if machine.addresses:
        return Finding(_KERNEL, name, "ok", "/proc/kallsyms shows them")
    if machine.addresses is None:
        return Finding(
            _KERNEL,
            name,
            "missing",
            "/proc/kallsyms cannot be read",
            "kpmd knows no function",
            "mount /proc without subset=pid; take a kernel with CONFIG_KALLSYMS",
        )
    means = "functions of the same name cannot be told apart, and addresses are not shown"
    if machine.sysctls.get("kernel.kptr_restrict", 0) > 1:
        do = "sysctl -w kernel.kptr_restrict=1"
        return Finding(_KERNEL, name, "less", "hidden: kernel.kptr_restrict is 2", means, do)
    if machine.process.has("CAP_SYSLOG"):
        return Finding(_KERNEL, name, "less", "hidden", means)
    if "CAP_SYSLOG" in machine.process.bounding and machine.process.uid:
        return Finding(_KERNEL, name, "unknown", "hidden from this user", "", "run this as root")
    return Finding(_KERNEL, name, "less", "hidden", means, "give kpmd CAP_SYSLOG")


def _lockdown(machine: Machine) -> Finding:
    if machine.lockdown is None:
        found = "/sys/kernel/security is not mounted, or closed to this user"
        return Finding(_KERNEL, "lockdown", "note", found, "the tests tell what it forbids")
    if machine.lockdown == "confidentiality":
        return Finding(
            _KERNEL,
            "lockdown",
            "less",
            "confidentiality",
            "programs cannot read kernel memory, functions are not listed, and kprobes one by one"
            " are refused",
            "boot with lockdown=integrity, or without",
        )
    means = "it forbids nothing that kpmd needs" if machine.lockdown == "integrity" else ""
    return Finding(_KERNEL, "lockdown", "ok", machine.lockdown or "none", means)


def _lsms(machine: Machine) -> Finding:
    if "selinux" in machine.lsms:
        means = "where its policy refuses bpf or perf_event, the tests above fail"
        return Finding(_KERNEL, "security modules", "note", ", ".join(machine.lsms), means)
    return Finding(_KERNEL, "security modules", "ok", ", ".join(machine.lsms) or "not known")


def _sysctls(machine: Machine) -> Iterator[Finding]:
    values = machine.sysctls
    multi = not one_by_one(machine)
    yield from _switch(values.get("kernel.ftrace_enabled"), "ftrace_enabled", "missing")
    # Kprobes one by one only: kprobe multi was called all the same.
    level: Level = "note" if multi else "missing"
    yield from _switch(values.get("kprobes"), "kprobes/enabled", level)
    paranoid = values.get("kernel.perf_event_paranoid")
    if paranoid is not None:
        name = "perf_event_paranoid"
        if paranoid <= 2:
            yield Finding(_SETTINGS, name, "ok", str(paranoid))
        else:
            means = "kpmd.service cannot read perf buffers; ring buffers it can"
            yield Finding(_SETTINGS, name, "note", str(paranoid), means, _PARANOID)
    jit = values.get("net.core.bpf_jit_enable")
    if jit is not None:
        name, means = "bpf_jit_enable", "programs are interpreted, and slower"
        if jit:
            yield Finding(_SETTINGS, name, "ok", str(jit))
        else:
            yield Finding(_SETTINGS, name, "less", "0", means, f"sysctl -w net.core.{name}=1")
    if values.get("net.core.bpf_jit_harden") == 2:
        means = "programs are somewhat slower; 1 hardens those of unprivileged users alone"
        yield Finding(_SETTINGS, "bpf_jit_harden", "note", "2", means)
    if values.get("kernel.unprivileged_bpf_disabled") == 0:
        means = "users can load BPF programs of their own; kpmd does not need that"
        do = "sysctl -w kernel.unprivileged_bpf_disabled=2"
        yield Finding(_SETTINGS, "unprivileged_bpf", "note", "0", means, do)


def _switch(value: int | None, name: str, off: Level) -> Iterator[Finding]:
    if value is None:
        return
    if value:
        yield Finding(_SETTINGS, name, "ok", str(value))
        return
    by_hand = "echo 1 > /sys/kernel/debug/kprobes/enabled"
    do = by_hand if name.startswith("kprobes") else f"sysctl -w kernel.{name}=1"
    only = "kprobes one by one" if off == "note" else "programs"
    yield Finding(_SETTINGS, name, off, "0", f"{only} are attached, and never called", do)
