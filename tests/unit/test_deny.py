"""The deny list: its file, what it takes out of an index, and the one that ships with kpmd."""

from __future__ import annotations

from pathlib import Path

import pytest

from kpmd.config import ConfigError, load_deny_list
from kpmd.core.deny import DenyList, DenyListError
from kpmd.core.symbols import SymbolIndex


def index(*lines: str) -> SymbolIndex:
    """Of functions as tracefs lists them."""
    return SymbolIndex.build(b"", "".join(f"{line}\n" for line in lines).encode(), False)


def denied(text: str, *lines: str) -> dict[str, str]:
    """What a list denies, by name, and why."""
    functions = index(*lines)
    found = DenyList.parse(text).denials(functions)
    return {functions.names[position]: reason for position, reason in found.items()}


def test_a_line_is_a_glob_and_a_reason() -> None:
    text = "vfs_*   they are read  all day\n\n  # a comment\n#x y\n \t\n*_open\tand opened\n"
    lines = DenyList.parse(text).lines
    assert [(each.glob.name, each.reason) for each in lines] == [
        ("vfs_*", "they are read  all day"),
        ("*_open", "and opened"),
    ]


@pytest.mark.parametrize("text", ["", "\n\n", "# only\n#comments"])
def test_an_empty_list_denies_nothing(text: str) -> None:
    assert denied(text, "vfs_read") == {}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("vfs_*\n", 1),
        ("# comment\n\nvfs_* reason\nvfs_read\n", 4),
        ("vfs_*   \n", 1),
        ("a b\n[x] reason\n", 2),
        ("a b\na] reason", 2),
        ("\u00e9 reason", 1),
        ("a b\r\n" + "x" * 10_000 + " reason", 2),
    ],
)
def test_an_error_names_the_line(text: str, line: int) -> None:
    with pytest.raises(DenyListError) as error:
        DenyList.parse(text)
    assert f"line {line}: " in str(error.value)


def test_a_module_with_a_blank_before_it_is_not_taken_for_the_reason() -> None:
    """As kallsyms writes it, and as patterns may have it: else it would deny far too much."""
    try:
        deny = DenyList.parse("nft_* [nf_tables] slow\n")
    except DenyListError:
        return  # it may be refused as well
    assert deny.denials(index("nft_a", "nft_a [nf_tables]")) == {1: "slow"}


def test_the_first_line_that_matches_gives_the_reason() -> None:
    text = "vfs_read first\nvfs_* second\n*_read third\n"
    assert denied(text, "vfs_read", "vfs_open", "do_read", "other") == {
        "vfs_read": "first",
        "vfs_open": "second",
        "do_read": "third",
    }


def test_a_line_for_a_module_is_for_that_module() -> None:
    functions = index("f", "g", "f [mod_a]", "f [mod_b]", "g [mod_b]")
    found = DenyList.parse("f[mod_b] slow\ng[vmlinux] own\n").denials(functions)
    assert found == {1: "own", 3: "slow"}


def test_all_functions_of_a_name_are_denied() -> None:
    functions = index("f", "g", "f", "f [mod]")
    assert DenyList.parse("f no\n").denials(functions) == {0: "no", 2: "no", 3: "no"}


# The one that ships


@pytest.fixture(scope="module")
def shipped() -> DenyList:
    return load_deny_list(None)


def test_every_line_of_the_shipped_list_has_a_reason(shipped: DenyList) -> None:
    assert len(shipped.lines) > 10
    for line in shipped.lines:
        assert len(line.reason) > 5, line
    globs = [(line.glob.name, line.glob.module) for line in shipped.lines]
    assert len(set(globs)) == len(globs)


def test_no_line_of_the_shipped_list_takes_everything(shipped: DenyList) -> None:
    for line in shipped.lines:
        assert len(line.glob.name.strip("*?")) >= 4, line


DANGEROUS = [
    "migrate_disable",
    "migrate_enable",
    "__bpf_prog_enter",
    "__bpf_prog_exit_recur",
    "bpf_get_current_pid_tgid",
    "htab_map_update_elem",
    "htab_map_lookup_elem",
    "__htab_map_lookup_elem",
    "array_map_lookup_elem",
    "trace_call_bpf",
    "kprobe_multi_link_handler",
    "fprobe_handler",
    "ftrace_ops_list_func",
    "perf_event_output",
    "ring_buffer_lock_reserve",
    "rcu_read_unlock_strict",
    "__rcu_read_lock",
    "__rcu_read_unlock",
    "rcu_note_context_switch",
    "call_rcu",
    "__srcu_read_lock",
    "_raw_spin_lock",
    "_raw_spin_unlock_irqrestore",
    "queued_spin_lock_slowpath",
    "native_queued_spin_lock_slowpath",
    "preempt_count_add",
    "sched_clock",
    "ktime_get",
    "ktime_get_mono_fast_ns",
    "irq_enter_rcu",
    "irq_exit_rcu",
    "exc_page_fault",
    "native_sched_clock",
]

HARMLESS = [
    "vfs_read",
    "vfs_write",
    "tcp_sendmsg",
    "tcp_v4_connect",
    "__x64_sys_getpid",
    "__arm64_sys_getpid",
    "__do_sys_getpid",
    "do_sys_openat2",
    "schedule",
    "kmalloc_trace",
    "ext4_file_read_iter",
    "blk_mq_submit_bio",
    "security_file_open",
    "wake_up_new_task",
    "do_nanosleep",
    "mutex_lock",
]


@pytest.mark.parametrize("name", DANGEROUS)
def test_the_shipped_list_denies(shipped: DenyList, name: str) -> None:
    assert list(shipped.denials(index(name))) == [0]


@pytest.mark.parametrize("name", HARMLESS)
def test_the_shipped_list_leaves_alone(shipped: DenyList, name: str) -> None:
    assert shipped.denials(index(name)) == {}


# The configured one


def test_another_file_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "deny.txt"
    path.write_text("vfs_* too many\n", encoding="utf-8")
    functions = index("vfs_read", "migrate_disable")
    assert load_deny_list(path).denials(functions) == {0: "too many"}


@pytest.mark.parametrize("data", [b"vfs_*\n", b"\xff\xfe reason\n", b"[ reason\n"])
def test_a_file_that_is_no_deny_list(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "deny.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        load_deny_list(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.txt"):
        load_deny_list(tmp_path / "none.txt")
