"""``kpmctl stacks``: text, folded lines and flame graphs of who calls what."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.unit.oneliners import FakeBuiltin, parsed, u64
from tests.unit.test_client import scripted
from tests.unit.test_kpmctl import Terminal, good, plain, run

PROGRAM = {"stack": "kprobe_multi", "other": "kprobe_multi"}


def caller(function: int, stack: int, pid: int = 0, command: str = "") -> str:
    return struct.pack("=QiI16s", function, stack, pid, command.encode()).hex()


def trace(id_: int, *names: str | None) -> dict[str, Any]:
    frames = [
        {"address": f"0x{0x1000 + 16 * at:016x}", "symbol": name, "offset": at, "module": None}
        for at, name in enumerate(names)
    ]
    return {
        "key": struct.pack("=I", id_).hex(),
        "value": "",
        "decoded": {"value": {"frames": frames}},
    }


def fake(by_process: bool = False, **more: Any) -> FakeBuiltin:
    cat, dd = ((7, "cat"), (8, "dd;\x1b x")) if by_process else ((0, ""), (0, ""))
    stacks = [
        {"key": caller(0x1000, 1, *cat), "value": u64(2)},
        {"key": caller(0x1000, 2, *dd), "value": u64(97)},
        {"key": caller(0x2000, -17, *dd), "value": u64(1)},
    ]
    traces = [
        trace(1, "vfs_read", "ksys_read", "do_syscall_64"),
        trace(2, "vfs_read", None, "do_syscall_64"),
    ]
    return FakeBuiltin(PROGRAM, {"stacks": stacks, "traces": traces}, **more)


def test_stacks_of_most_calls_first() -> None:
    script = fake(missed=2, variables={"collisions": 1})
    with scripted(script) as server:
        done = run(server.path, "stacks", "vfs_read", "nf_hook", "--duration", "0")
    assert done.exit_code == 0
    assert done.stdout == (
        "  vfs_read\n    0x0000000000001010\n    do_syscall_64\n97 calls, 97.0%\n\n"
        "  vfs_read\n    ksys_read\n    do_syscall_64\n2 calls, 2.0%\n\n"
        "  nf_hook\n    [stack not kept]\n1 call, 1.0%\n\n"
    )
    assert "2 calls were missed" in done.stderr
    assert "1 calls are counted without their stack" in done.stderr
    assert script.loads[0]["source"]["globals"] == {"by_process": 0}
    assert [each["program"] for each in script.links] == ["prg-stack"]
    assert script.deleted == [
        "/links/lnk-kprobe",
        "/programs/prg-stack",
        "/programs/prg-other",
    ]


def test_the_rest_is_told_of() -> None:
    with scripted(fake()) as server:
        text = good(server.path, "stacks", "f", "--duration", "0", "--top", "1", "--kretprobe")
    assert text.endswith("97 calls, 97.0%\n\n… and 2 more stacks with 3 calls\n")


def test_where_in_a_function_makes_no_difference() -> None:
    stacks = [{"key": caller(0x1000, id_), "value": u64(id_)} for id_ in (1, 2, 3)]
    traces = [trace(1, "f", "g"), trace(2, "f", "h"), trace(3, "f", "g")]
    traces[2]["decoded"]["value"]["frames"][1]["offset"] = 77
    with scripted(FakeBuiltin(PROGRAM, {"stacks": stacks, "traces": traces})) as server:
        text = good(server.path, "stacks", "f", "--duration", "0")
        report = json.loads(good(server.path, "--json", "stacks", "f", "--duration", "0"))
    assert text == "  f\n    g\n4 calls, 66.7%\n\n  f\n    h\n2 calls, 33.3%\n\n"
    assert [each["calls"] for each in report["stacks"]] == ["3", "2", "1"]


def test_no_calls() -> None:
    with scripted(FakeBuiltin(PROGRAM, {"stacks": [], "traces": []})) as server:
        assert good(server.path, "stacks", "f", "--duration", "0") == "no calls\n"


def test_by_process() -> None:
    script = fake(by_process=True)
    with scripted(script) as server:
        text = good(server.path, "stacks", "f", "--duration", "0", "--by-process")
    assert script.loads[0]["source"]["globals"] == {"by_process": 1}
    assert "97 calls by dd;\\x1b x[8], 97.0%" in text


def test_json() -> None:
    with scripted(fake(by_process=True)) as server:
        asked = ["--json", "stacks", "f", "--duration", "0", "--by-process"]
        report = json.loads(good(server.path, *asked))
    assert [(each["calls"], each["pid"]) for each in report["stacks"]] == [
        ("97", 8),
        ("2", 7),
        ("1", 8),
    ]
    assert report["stacks"][0]["frames"][1] == {
        "address": "0x0000000000001010",
        "symbol": None,
        "offset": 1,
        "module": None,
    }
    assert report["stacks"][2]["frames"] is None
    assert report["stacks"][2]["function"]["symbol"] == "nf_hook"


def test_folded() -> None:
    with scripted(fake(by_process=True)) as server:
        asked = ["stacks", "f", "--duration", "0", "--by-process", "--folded", "-"]
        lines = good(server.path, *asked).splitlines()
    assert lines == [
        # Between two frames is a semicolon, and nowhere else.
        "dd:\\x1b x[8];do_syscall_64;0x0000000000001010;vfs_read 97",
        "cat[7];do_syscall_64;ksys_read;vfs_read 2",
        "dd:\\x1b x[8];[stack not kept];nf_hook 1",
    ]


def test_files(tmp_path: Path) -> None:
    lines, picture = tmp_path / "f.folded", tmp_path / "f.svg"
    with scripted(fake()) as server:
        asked = ["stacks", "f", "--duration", "0", "--folded", str(lines), "--flame", str(picture)]
        done = run(server.path, *asked)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == f"100 calls in 3 stacks: {lines}, {picture}\n"
    assert lines.read_text().splitlines()[1] == "do_syscall_64;ksys_read;vfs_read 2"
    root = parsed(picture.read_bytes())
    assert "Who calls f: 100 calls" in "".join(root.itertext())


@pytest.mark.parametrize("name", ["", "no-such-folder/file"])
def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path, name: str) -> None:
    done = run("/none", "stacks", "f", "--flame", str(tmp_path / name))
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def test_ctrl_c_shows_what_there_was() -> None:
    script = fake()
    with scripted(script) as server:
        terminal = Terminal(server.path, ["stacks", "f"], 60, 20)
        terminal.read_until("2 functions attached, Ctrl-C ends it")
        os.write(terminal.master, b"\x03")
        text = plain(terminal.end())
        assert terminal.process.wait(20) == 0
    assert "97 calls, 97.0%" in text
    assert script.deleted[0] == "/links/lnk-kprobe"
