"""``kpmctl``: in this process by click's runner, and as a process with pipes and terminals."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kpmd import __version__
from kpmd.client.client import Client
from kpmd.client.errors import ApiError, ConnectionFailed, ProtocolError
from kpmd.kpmctl import failures
from kpmd.kpmctl.cli import main
from kpmd.kpmctl.output import Column, Table, clean
from tests.unit.test_client import (
    ELF,
    ROOT,
    VFS_READ,
    Answer,
    Script,
    always,
    http,
    problem,
    running_daemon,
    scripted,
    short_directory,
)

KPMCTL = [sys.executable, "-m", "kpmd.kpmctl"]


def run(socket_: str, *arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(
        main, ["--socket", socket_, *arguments], input=stdin, prog_name="kpmctl"
    )


def good(socket_: str, *arguments: str, stdin: bytes | None = None) -> str:
    done = run(socket_, *arguments, stdin=stdin)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return done.stdout


def read_json(socket_: str, *arguments: str) -> Any:
    return json.loads(good(socket_, "--json", *arguments))


def environment(socket_: str, **more: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return {**kept, "KPMD_SOCKET": socket_, **more}


class Started(subprocess.Popen[bytes]):
    """``kpmctl`` as a process that writes into pipes."""

    def __init__(self, socket_: str, *arguments: str) -> None:
        super().__init__(
            [*KPMCTL, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=ROOT,
            env=environment(socket_),
        )

    def first_line(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().decode()

    def end(self) -> tuple[str, str]:
        """The rest of what it wrote to stdout, and to stderr."""
        out, err = self.communicate(timeout=20)
        return (out or b"").decode(), err.decode()


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


@pytest.fixture
def daemon(shared: str) -> Iterator[str]:
    yield shared
    with Client(shared) as client:
        for program in client.programs():
            client.delete_program(program["id"], force=True)


@pytest.fixture
def program(daemon: str) -> str:
    with Client(daemon) as client:
        made = client.load_object(ELF, programs=["count"], lifetime="persistent")
        return made["programs"][0]["id"]


def nothing_left(socket_: str) -> None:
    with Client(socket_) as client:
        assert list(client.links()) == []
        assert list(client.programs()) == []


# The commands


@pytest.mark.alone
def test_version_imports_nothing_but_click() -> None:
    code = (
        "import sys\n"
        "from kpmd.kpmctl.cli import main\n"
        "main(['--version'], standalone_mode=False)\n"
        "strange = {n.partition('.')[0] for n in sys.modules} - sys.stdlib_module_names\n"
        "strange -= {'sitecustomize'}\n"  # the machine's own, not ours
        "print(sorted(n for n in strange if not n.startswith('_')))\n"
        "print([n for n in ('rich', 'http.client', 'asyncio', 'ssl') if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    version, packages, heavy = done.stdout.splitlines()
    assert version.endswith(f"version {__version__}")
    assert packages == "['click', 'kpmd']"
    assert heavy == "[]"


def test_help_tells_every_command_and_status() -> None:
    text = good("/none", "-h")
    for word in ("attach", "capabilities", "count", "detach", "entries", "links", "load", "policy"):
        assert f"\n  {word} " in text
    for status in (0, 1, 2, 3, 4, 5, 6, 7, 8, 130):
        assert f"\n    {status} " in text
    for command in ("load", "attach"):
        assert "persistent" in good("/none", command, "--help")


def test_the_wheel_names_the_entry_point() -> None:
    assert 'kpmctl = "kpmd.kpmctl.__main__:main"' in (ROOT / "pyproject.toml").read_text()


def test_capabilities(daemon: str) -> None:
    text = good(daemon, "capabilities", "--refresh")
    assert "6.12.0-fake (x86_64)" in text
    assert re.search(r"bpf_link_kprobe_session +yes +6.10 +-\n", text)
    assert re.search(r"targets_per_link +1048576\n", text)
    assert "restart   survived by nothing" in text
    assert "policy    you are an administrator, and may do everything" in text
    assert read_json(daemon, "capabilities")["builtins"] == ["count", "latency", "stacks", "trace"]


def test_capabilities_that_are_missing() -> None:
    features = {
        "a": {"supported": False, "min_kernel": "9.1", "reason": "too old", "checked_at": "x"},
        "b": {"supported": None, "min_kernel": "9.1", "reason": "ENOMEM", "checked_at": "x"},
    }
    answer = {
        "kernel": {"release": "5.4\x1b[31m", "machine": "m"},
        "features": features,
        "api": {"version": "1", "extensions": []},
        "builtins": [],
        "limits": {"programs": None, "links": 3, "load_seconds": 2.5},
        "policy": {"administrator": False, "rule": None, "calls": []},
        "survives_restart": True,
    }
    with scripted(always(http(answer))) as server:
        text = good(server.path, "capabilities")
    assert re.search(r"a +no +9.1 +too old\nb +unknown +9.1 +ENOMEM\n", text)
    assert "5.4\\x1b[31m" in text
    assert "restart   survived by persistent things, leases, and" in text
    assert "policy    no rule is about you: you may do nothing but" in text
    assert re.search(r"programs +unlimited\nlinks +3\nload_seconds +2\.5\n", text)


def test_load_says_that_it_stays_and_how_it_goes(daemon: str, tmp_path: Path) -> None:
    (tmp_path / "p.o").write_bytes(ELF)
    text = good(daemon, "load", str(tmp_path / "p.o"), "--max-entries", "counts=12")
    ids = re.findall(r"^prg-\w+", text, re.MULTILINE)
    assert len(ids) == 2
    assert f"Persistent: loaded until `kpmctl detach {' '.join(ids)}`." in text
    assert re.search(r"counts +hash +8 +8 +12 ", text)
    listed = read_json(daemon, "programs")["items"]
    assert [(each["id"], each["lifetime"]["kind"]) for each in listed] == [
        (id_, "persistent") for id_ in ids
    ]
    good(daemon, "detach", *ids)
    nothing_left(daemon)


def test_load_from_standard_input_with_everything(tmp_path: Path) -> None:
    seen: list[Any] = []

    def script(method: str, target: str, body: Any) -> bytes:
        seen.append(body)
        return http({"programs": [], "maps": []}, 201)

    text = (
        "load - --program p --program q --attach kprobe_session --signature {} "
        "--global a=0x10 --global b=-1 --global c=hex:00ff --max-entries m=2"
    )
    (tmp_path / "sig").write_bytes(b"sig")
    with scripted(script) as server:
        good(server.path, *text.format(tmp_path / "sig").split(), stdin=b"elf")
    assert seen[0]["source"] == {
        "kind": "object",
        "elf": "ZWxm",
        "signature": "c2ln",
        "programs": ["p", "q"],
        "globals": {"a": 16, "b": -1, "c": "AP8="},
        "max_entries": {"m": 2},
    }
    assert (seen[0]["attach"], seen[0]["lifetime"]) == ("kprobe_session", {"kind": "persistent"})


def test_load_builtin(daemon: str) -> None:
    made = read_json(daemon, "load", "--builtin", "count")
    assert made["maps"][0]["name"] == "counts"
    assert run(daemon, "load", "--builtin", "nope").exit_code == failures.INVALID


def test_attach_link_and_detach(daemon: str, program: str) -> None:
    text = good(
        daemon, "attach", program, "vfs_read", "nf_hook", "--cookie", "7", "--cookie", "0x8"
    )
    link = text.partition(":")[0]
    assert "attached to 2 function(s) as kprobe" in text
    assert f"until `kpmctl detach {link}`" in text
    shown = good(daemon, "link", link, "--targets")
    assert re.search(
        rf"{VFS_READ} +7 +vfs_read +-\n0xffffffffc0001000 +8 +nf_hook +nf_tables", shown
    )
    assert re.search(
        rf"{link} +\d+ +{program} +kprobe +2 +0 +persistent +attached", good(daemon, "links")
    )
    found = read_json(daemon, "link", link, "--targets")
    assert [each["cookie"] for each in found["targets"]] == ["7", "8"]
    assert read_json(daemon, "link", link)["id"] == link
    assert read_json(daemon, "links", "--program", program)["items"][0]["id"] == link
    refused = run(daemon, "detach", program)
    assert refused.exit_code == failures.REFUSED
    assert read_json(daemon, "detach", program, "--force") == {"deleted": [program]}
    nothing_left(daemon)


def test_attach_by_address_at_the_return(daemon: str, program: str) -> None:
    link = read_json(daemon, "attach", program, "--address", VFS_READ, "--kretprobe")
    assert (link["kind"], link["lifetime"]) == ("kretprobe", {"kind": "persistent"})
    link = read_json(daemon, "attach", program, "vfs_open", "--kind", "kprobe")
    assert link["kind"] == "kprobe"


def test_the_kind_is_what_the_program_is_for(daemon: str) -> None:
    with Client(daemon) as client:
        made = client.load_object(ELF, ["count"], "kprobe_session", lifetime="persistent")
    assert read_json(daemon, "attach", made["programs"][0]["id"], "vfs_read")["kind"] == "session"


def test_detach_goes_on_behind_a_failure(daemon: str, program: str) -> None:
    link = read_json(daemon, "attach", program, "vfs_read")["id"]
    done = run(daemon, "--json", "detach", "lnk-none", link, program)
    assert done.exit_code == failures.NOT_FOUND
    assert json.loads(done.stdout) == {"deleted": [link, program]}
    assert "lnk-none" in done.stderr
    done = run(daemon, "detach", link, "lnk-none")
    assert [each in done.stderr for each in (link, "lnk-none")] == [True, True]


def test_maps_and_entries(daemon: str, program: str) -> None:
    text = good(daemon, "maps")
    map_ = re.findall(r"map-\w+", text)[0]
    assert re.search(rf"counts +hash +8 +8 +16384 +{program}", text)
    shown = good(daemon, "entries", map_)
    assert "00100081ffffffff  2900000000000000\n" in shown
    assert good(daemon, "entries", map_, "--key", "00200081ffffffff").splitlines()[1:] == [
        "00200081ffffffff  0700000000000000"
    ]
    assert len(read_json(daemon, "entries", map_)["items"]) == 2
    assert (
        read_json(daemon, "entries", map_, "--key", "00200081ffffffff")["value"] == "07" + 14 * "0"
    )
    assert run(daemon, "entries", map_, "--key", 16 * "0").exit_code == failures.NOT_FOUND


def test_entries_of_each_cpu() -> None:
    page = {"items": [{"key": "00", "value": ["01", "02"]}], "next": None}
    with scripted(always(http(page))) as server:
        assert good(server.path, "entries", "map-1").splitlines() == ["KEY  VALUE", "00   01 02"]


@pytest.mark.parametrize(
    "arguments",
    [
        "load",
        "load --builtin count pyproject.toml",
        "load --builtin count --program p",
        "load no-such-file.o",
        "load --builtin count --signature pyproject.toml",
        "load pyproject.toml --signature no-such-file",
        "load --builtin count --global a",
        "load --builtin count --global a=b",
        "load --builtin count --global a=hex:0",
        "load --builtin count --max-entries a=-1",
        "attach prg-1",
        "attach prg-1 f --address 1",
        "attach prg-1 --address x",
        "attach prg-1 --address 0x10000000000000000",
        "attach prg-1 f --kretprobe --kind session",
        "detach",
        "detach map-1",
        "detach lse-1",
        "links --program lnk-1",
        "entries map-1 --key 0",
        "count",
        "count f --interval 0",
        "count f --interval nan",
        "count f --duration inf",
        "count f --duration -1",
        "count f --pid 0",
        "count f --top 0",
        "policy explain",
        "policy explain ada --call nope",
        "policy explain ada --object no-such-file.o",
        "policy explain ada --object pyproject.toml --builtin count",
        "policy explain ada --signature pyproject.toml",
        "nope",
    ],
)
def test_wrong_usage(arguments: str) -> None:
    done = run("/none", *arguments.split())
    assert done.exit_code == 2
    assert "Traceback" not in done.output


# Failures

KINDS = {
    "malformed": (400, 7),
    "invalid": (422, 7),
    "bad-object": (422, 7),
    "verifier-rejected": (422, 7),
    "symbol-not-found": (422, 7),
    "address-not-traceable": (422, 7),
    "wrong-attach-type": (422, 7),
    "forbidden": (403, 4),
    "not-found": (404, 5),
    "conflict": (409, 8),
    "gone": (410, 8),
    "too-large": (413, 8),
    "quota": (429, 8),
    "not-supported": (501, 6),
    "shutting-down": (503, 3),
    "kernel": (500, 1),
    "internal": (500, 1),
    "from-the-future": (499, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_statuses(kind: str) -> None:
    status, code = KINDS[kind]
    with scripted(always(problem(kind, status))) as server:
        for arguments in (
            ["links"],
            ["count", "f"],
            ["load", "--builtin", "x"],
            ["detach", "lnk-1"],
        ):
            done = run(server.path, *arguments)
            assert done.exit_code == code
            assert done.stderr.startswith(f"kpmctl: it is {kind}\n")
            assert done.stdout == ""


def said(capsys: pytest.CaptureFixture[str], kind: str, **more: Any) -> str:
    failures.report(ApiError(kind, 400, "told", {"detail": "told", **more}))
    return capsys.readouterr().err


def test_symbols_are_named_with_their_reasons(daemon: str, program: str) -> None:
    done = run(daemon, "attach", program, "vfs_read", "nope", "do_idle_loop")
    assert done.exit_code == failures.INVALID
    assert "\n  nope: does not exist" in done.stderr
    assert "\n  do_idle_loop: exists, but" in done.stderr


def test_what_else_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    errors = [{"loc": ["symbols"], "msg": "f: no"}]
    text = said(capsys, "symbol-not-found", errors=errors, symbols_total=5)
    assert text == "kpmctl: told\n  f: no\n  … and 4 more\n"
    errors = [{"loc": ["a", 1], "msg": "bad"}, {"loc": [], "msg": "worse"}, 7]  # type: ignore[list-item]
    assert said(capsys, "invalid", errors=errors) == "kpmctl: told\n  a.1: bad\n  : worse\n"
    text = said(capsys, "not-supported", needs="kernel 6.10 for kprobe_session")
    assert "needs: kernel 6.10 for kprobe_session" in text
    assert "--kind kretprobe" in text
    assert "errno: ENOMEM" in said(capsys, "kernel", errno="ENOMEM")
    assert VFS_READ in said(capsys, "address-not-traceable", addresses=[VFS_READ])
    assert "\x1b" not in said(capsys, "invalid", errno="\x1b[31m")


def test_what_the_policy_refused_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    hint = "  `kpmctl policy show` tells what the policy lets you do\n"
    assert said(capsys, "forbidden", rule="r1") == f"kpmctl: told\n  rule: r1\n{hint}"
    text = said(capsys, "forbidden", rule="told", refused=["bpf_override_return", "bpf_x"])
    assert text == f"kpmctl: told\n  refused: bpf_override_return, bpf_x\n{hint}"
    names = [f"f{number}" for number in range(100)]
    text = said(capsys, "forbidden", rule="told", symbols=names, symbols_total=2000)
    assert "\n  refused: f0, f1, f2, f3, f4, f5, f6, f7, f8, f9 and 1990 more\n" in text
    # Where the one sentence says it all.
    assert said(capsys, "forbidden", symbols=["f"], refused=["g"]) == "kpmctl: told\n"
    assert said(capsys, "forbidden", symbols=[1, 2], refused="x") == "kpmctl: told\n"


def test_which_quota_is_used_up(capsys: pytest.CaptureFixture[str]) -> None:
    hint = "`kpmctl policy show` tells how much you may have, and what of it is used"
    text = said(capsys, "quota", limit="links", used=7, most=8, asked=2)
    assert text == f"kpmctl: told\n  links: 7 used of 8\n  {hint}\n"
    assert said(capsys, "quota", limit="told", used=7, most=8) == f"kpmctl: told\n  {hint}\n"
    assert said(capsys, "quota") == "kpmctl: told\n"


def test_the_end_of_the_verifiers_log(capsys: pytest.CaptureFixture[str]) -> None:
    log = "".join(f"line {number}\n" for number in range(100))
    text = said(capsys, "verifier-rejected", verifier_log=log)
    assert "line 99\n" in text
    assert "line 79" not in text
    assert "the end of the verifier's log:" in text
    assert "the verifier's log:\n    one\n" in said(capsys, "x", verifier_log="one\n")


def test_statuses_of_other_errors() -> None:
    assert failures.status(ConnectionFailed("x", "permission")) == failures.FORBIDDEN
    assert failures.status(ConnectionFailed("x", "lost")) == failures.UNREACHABLE
    assert failures.status(ProtocolError("x")) == failures.OTHER
    assert failures.report(ValueError("a bug")) is None


def test_no_socket() -> None:
    done = subprocess.run(
        [*KPMCTL, "--socket", "/nowhere/kpmd.sock", "links"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == failures.UNREACHABLE
    assert done.stderr.startswith("kpmctl: no socket at /nowhere/kpmd.sock")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_permission_denied(daemon: str) -> None:
    run(daemon, "links")  # what the child cannot import any more must be there already
    run("/none", "links")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(write_end, 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            main(["--socket", daemon, "links"], prog_name="kpmctl")
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 98
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write_end)
    with open(read_end) as told:
        text = told.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == failures.FORBIDDEN, text
    assert text.startswith(f"kpmctl: permission denied: {daemon} is for")


def test_an_answer_that_is_cut() -> None:
    answer = http({"items": []}, extra="Connection: close\r\n")[:-5]
    with scripted(always(answer)) as server:
        done = run(server.path, "links")
    assert done.exit_code == failures.UNREACHABLE
    assert "in the middle of its answer" in done.stderr


def test_an_answer_that_is_no_json() -> None:
    with scripted(always(http(b"hello"))) as server:
        done = run(server.path, "links")
    assert (done.exit_code, done.stderr.count("\n")) == (failures.OTHER, 1)


# count


class FakeCount:
    """Answers as the daemon does for the builtin count with ``many`` functions."""

    def __init__(self, many: int, *, known: bool = True, missed: int | None = None) -> None:
        self.known = known
        self.many = many
        self.missed = missed
        self.deleted: list[str] = []

    def __call__(self, method: str, target: str, body: Any) -> bytes:
        path = target.partition("?")[0]
        if method == "DELETE":
            self.deleted.append(target)
            return b"HTTP/1.1 204 No Content\r\n\r\n"
        if method == "POST" and path == "/programs":
            assert body["source"]["max_entries"] == {"counts": 1}
            assert body["source"]["globals"] == {"target_pid": 5}
            assert body["lifetime"] == {"kind": "process"}
            maps = [{"id": "map-1", "name": "counts"}]
            return http({"programs": [{"id": "prg-1", "name": "count"}], "maps": maps}, 201)
        if path in ("/links", "/links/lnk-1"):
            return http({"id": "lnk-1", "count": self.many, "missed": self.missed})
        return http({"items": self.items(path), "next": None})

    def items(self, path: str) -> list[Any]:
        if path == "/programs/prg-1/globals":
            value = (3).to_bytes(8, sys.byteorder).hex()
            return [{"name": "dropped", "section": ".bss", "size": 8, "value": value}]
        if path == "/maps/map-1/entries":
            return [
                {
                    "key": (4096 + n).to_bytes(8, sys.byteorder).hex(),
                    "value": [each.to_bytes(8, sys.byteorder).hex() for each in (n, 0, 1 << 40)],
                }
                for n in range(self.many)
            ]
        return [
            {
                "address": f"0x{4096 + n:016x}" if self.known else None,
                "symbol": f"function_{n}_with_a_name_that_no_terminal_has_any_room_for_ever",
                "module": "nf_tables" if n == 1 else None,
                "cookie": "0",
            }
            for n in range(self.many)
        ]


def test_count_of_each_cpu_with_modules_and_losses() -> None:
    fake = FakeCount(3, missed=9)
    with scripted(fake) as server:
        text = good(server.path, "count", "f", "--pid", "5", "--duration", "0", "--top", "2")
        assert fake.deleted == ["/links/lnk-1", "/programs/prg-1?force=true"]
    lines = text.splitlines()
    assert re.fullmatch(
        r"3 functions attached, attach took [\d.]+ ms, missed calls 9, elapsed 0\.\d s, "
        r"3 calls not counted",
        lines[0],
    )
    assert lines[1].split() == ["CALLS", "CALLS/s", "FUNCTION"]
    assert [line.split()[0] for line in lines[2:4]] == [str((1 << 40) + 2), str((1 << 40) + 1)]
    assert lines[3].endswith("ever [nf_tables]")
    assert lines[4:] == ["… and 1 more"]


def test_count_without_known_addresses() -> None:
    with scripted(FakeCount(2, known=False)) as server:
        text = good(server.path, "count", "f", "--pid", "5", "--duration", "0")
        assert "missed calls unknown" in text
        assert "  0x0000000000001001\n" in text


def test_count_nothing() -> None:
    with scripted(FakeCount(0)) as server:
        text = good(server.path, "count", "f", "--pid", "5", "--duration", "0")
        assert text.endswith("FUNCTION\nno calls yet\n")


def test_count_for_a_duration(daemon: str) -> None:
    process = Started(
        daemon, "count", "vfs_read", "vfs_write", "--interval", ".1", "--duration", ".35"
    )
    out, err = process.end()
    assert (process.returncode, err) == (0, "")
    tables = out.split("\n\n")
    assert len(tables) >= 2
    for each in tables:
        assert each.startswith("2 functions attached, attach took ")
        assert re.search(r"\n +41 +[\d.]+  vfs_read\n +7 +[\d.]+  vfs_write", each)
    assert "\x1b" not in out
    nothing_left(daemon)


def test_count_as_json(daemon: str) -> None:
    text = good(daemon, "--json", "count", "vfs_read", "--interval", ".05", "--duration", ".12")
    reports = [json.loads(line) for line in text.splitlines()]
    assert [each["last"] for each in reports] == [False] * (len(reports) - 1) + [True]
    first = reports[-1]["functions"][0]
    assert (first["symbol"], first["address"], first["calls"]) == ("vfs_read", VFS_READ, "41")
    assert reports[-1]["attached"] == 1


def test_count_of_what_does_not_exist(daemon: str) -> None:
    done = run(daemon, "count", "vfs_read", "nope")
    assert done.exit_code == failures.INVALID
    assert "nope: does not exist" in done.stderr
    nothing_left(daemon)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_count_ends_with_a_signal(daemon: str, number: signal.Signals) -> None:
    process = Started(daemon, "count", "vfs_read", "--interval", "0.2")
    assert process.first_line().startswith("1 function attached")
    process.send_signal(number)
    out, err = process.end()
    assert (process.returncode, err) == (0, "")
    assert out.count("1 function attached") == 1
    assert out.count("41 ") == 2
    nothing_left(daemon)


def test_count_into_a_broken_pipe(daemon: str) -> None:
    command = f"{' '.join(KPMCTL)} count vfs_read --interval .1 | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment(daemon),
    )
    first, status = done.stdout.splitlines()
    assert first.startswith("1 function attached")
    assert (status, done.stderr) == ("0", "")
    nothing_left(daemon)


def test_a_list_into_a_broken_pipe() -> None:
    page = {"items": [{"key": "00" * 4096, "value": "00"}] * 200, "next": None}
    with scripted(always(http(page))) as server:
        process = Started(server.path, "entries", "map-1")
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        assert process.end() == ("", "")
        assert process.returncode == 0


def test_count_while_the_daemon_dies() -> None:
    with running_daemon() as (path, daemon_):
        process = Started(path, "count", "vfs_read", "--interval", "0.1")
        process.first_line()
        daemon_.kill()
        out, err = process.end()
    assert process.returncode == failures.UNREACHABLE
    assert err.startswith("kpmctl: ")
    assert len(err.splitlines()) == 1
    assert "41 " in out


def test_count_where_the_program_was_deleted(daemon: str) -> None:
    process = Started(daemon, "count", "vfs_read", "--interval", "0.1")
    process.first_line()
    with Client(daemon) as client:
        for each in client.programs():
            client.delete_program(each["id"], force=True)
    _, err = process.end()
    assert process.returncode == failures.NOT_FOUND
    assert "no longer knows what was being counted" in err


class Stuck:
    """Answers as another script does, but to one call only when it is let go on."""

    def __init__(self, script: Script, method: str, path: str) -> None:
        self.script = script
        self.at = (method, path)
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, method: str, target: str, body: Any) -> Answer:
        if (method, target.partition("?")[0]) == self.at:
            self.reached.set()
            self.go_on.wait(20)
        return self.script(method, target, body)


@pytest.mark.parametrize(
    ("call", "arguments", "signals", "status"),
    [
        (("GET", "/links"), "links", 1, 130),
        (("POST", "/links"), "count f --pid 5", 1, 130),
        # Detaching is not broken off, until the user insists.
        (("DELETE", "/links/lnk-1"), "count f --pid 5 --duration 0", 1, 0),
        (("DELETE", "/links/lnk-1"), "count f --pid 5 --duration 0", 2, -signal.SIGINT),
    ],
)
def test_interrupted_while_the_daemon_is_slow(
    call: tuple[str, str], arguments: str, signals: int, status: int
) -> None:
    stuck = Stuck(FakeCount(1), *call)
    with scripted(stuck) as server:
        process = Started(server.path, *arguments.split())
        assert stuck.reached.wait(20)
        process.send_signal(signal.SIGINT)
        while signals == 2 and process.poll() is None:
            # Two that come before the first was handled are one, so as often as it takes.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        if status in (130, -signal.SIGINT):
            assert process.wait(20) == status
        stuck.go_on.set()
        _, err = process.end()
    assert (process.returncode, err) == (status, "")


# On a terminal


class Terminal:
    """``kpmctl`` on a terminal of its own, which is its controlling one."""

    def __init__(self, socket_: str, arguments: Sequence[str], width: int, height: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        # The first terminal that it opens becomes its controlling one.
        self.process = subprocess.Popen(
            ["sh", "-c", ': <>"$0"; exec "$@"', os.ttyname(slave), *KPMCTL, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=environment(socket_, TERM="xterm-256color"),
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""
        # What is read ends anywhere, also within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read_until(self, text: str) -> None:
        while text not in self.seen:
            self.seen += self._decoder.decode(os.read(self.master, 65536))

    def end(self) -> str:
        """Everything it wrote."""
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while more := os.read(self.master, 65536):
                self.seen += self._decoder.decode(more)
        os.close(self.master)
        return self.seen


def plain(text: str) -> str:
    """The text without its control sequences; what was erased ends with its line."""
    text = re.sub(r"\r\x1b\[2K", "\n", text).replace("^C", "")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def test_ctrl_c_on_a_terminal(daemon: str) -> None:
    terminal = Terminal(daemon, ["count", "vfs_read", "vfs_write", "--interval", "0.2"], 60, 20)
    terminal.read_until("vfs_write")
    os.write(terminal.master, b"\x03")
    text = terminal.end()
    assert terminal.process.wait(20) == 0
    # Behind what erased the live table stands the last one, once, and the cursor is back.
    last = text[text.rindex("\x1b[2K") :]
    assert plain(last).count("CALLS/s") == 1
    assert re.search(r"\n +41 +[\d.]+  vfs_read *\n +7 +[\d.]+  vfs_write", plain(last))
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert max(len(line) for line in plain(text).splitlines()) <= 60
    nothing_left(daemon)


def test_a_narrow_and_low_terminal() -> None:
    with scripted(FakeCount(40)) as server:
        arguments = ["count", "f", "--pid", "5", "--interval", "0.1", "--duration", "0.25"]
        terminal = Terminal(server.path, arguments, 60, 12)
        text = terminal.end()
        assert terminal.process.wait(20) == 0
    frames = [plain(frame) for frame in re.split(r"\x1b\[2K", text) if "CALLS/s" in frame]
    assert len(frames) >= 2
    for frame in frames[:-1]:
        assert len(frame.splitlines()) <= 12
        assert "more" in frame
    assert len([line for line in frames[-1].splitlines() if "function_" in line]) == 40
    for line in plain(text).splitlines():
        assert len(line) <= 60
        if "function_" in line:
            assert re.match(r" *\d{13} ", line)
            assert line.rstrip().endswith("…")


def test_tables_on_a_terminal_are_never_cut(daemon: str, program: str) -> None:
    terminal = Terminal(daemon, ["programs"], 40, 12)
    text = terminal.end()
    assert terminal.process.wait(20) == 0
    assert program in text
    assert len(plain(text).strip().splitlines()) == 2


def test_failures_on_a_terminal() -> None:
    with short_directory() as directory:
        terminal = Terminal(str(directory / "none"), ["count", "f"], 60, 12)
        assert "\x1b" not in terminal.end()
        assert terminal.process.wait(20) == failures.UNREACHABLE


# Tables


def test_tables() -> None:
    table = Table([Column("N", right=True), Column("NAME", cut=True), Column("X")])
    table.add(1, "a" * 20, None)
    table.add(22222, "b\n\x1b", "x")
    assert table.lines() == [
        "    N  NAME                  X",
        "    1  aaaaaaaaaaaaaaaaaaaa  -",
        "22222  b\\n\\x1b               x",
    ]
    assert [len(line) for line in table.lines(20)] == [20, 20, 20]
    assert table.lines(20)[1] == "    1  aaaaaaaaa…  -"
    # Counts are not cut, however narrow it is.
    assert table.lines(3)[2] == "22222  b\\n…  x"


def test_clean() -> None:
    assert clean("plain ä …") == "plain ä …"
    assert clean("a\x1b]0;x\x07\u202e\nb", keep="\n") == "a\\x1b]0;x\\x07\\u202e\nb"
