"""``kpmctl trace``: calls as lines, what is lost, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from typing import Any

import pytest

from kpmd.client.errors import ProtocolError
from kpmd.kpmctl.call_lines import Call, CallLines, number, returned
from tests.unit.oneliners import FakeBuiltin
from tests.unit.test_client import ROOT, scripted
from tests.unit.test_kpmctl import KPMCTL, Started, Terminal, environment, good, plain, run

SESSION = {"trace": "kprobe_session"}
PAIR = {"trace_entry": "kprobe_multi", "trace_return": "kprobe_multi"}


def decoded(**more: Any) -> dict[str, Any]:
    return {
        "time_ns": "5000000000",
        "duration_ns": "1780",
        "function": "0x0000000000001000",
        "arguments": ["18446619871040372992", "77", "0", "9223372036854775807", "0", "0"],
        "return_value": "77",
        "pid": 4711,
        "tid": 4712,
        "uid": 1000,
        "gid": 1000,
        "cpu": 0,
        "kind": "CALL_RETURNED",
        "command": "cat",
        **more,
    }


def record(**more: Any) -> dict[str, Any]:
    return {"data": "00", "decoded": decoded(**more)}


def fake(*records: object, programs: dict[str, str] = SESSION, **more: Any) -> FakeBuiltin:
    return FakeBuiltin(programs, {"events": []}, records, **more)


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (77, "77"),
        (-1, "-1"),
        ((1 << 64) - 100, "-100"),
        ((1 << 32) - 100, "-100"),
        (1 << 20, "0x100000"),
        (1 << 63, "0x8000000000000000"),
        (-(1 << 40), "0xffffff0000000000"),
    ],
)
def test_numbers(value: int, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3, "3"),
        (-2, "-2 ENOENT"),
        ((1 << 32) - 2, "-2 ENOENT"),  # an int: the register's upper half is nobody's
        (-512, "-512 ERESTARTSYS"),
        (-4000, "-4000"),
        (-0x7777_0000_0000, "0xffff888900000000"),
    ],
)
def test_what_was_returned(value: int, text: str) -> None:
    assert returned(value) == text


def test_lines() -> None:
    call = Call(decoded())
    lines = CallLines(3, None, entry_only=False, unicode=True)
    assert lines.heading().split() == [
        "SECONDS", "TOOK", "PROCESS[THREAD]", "FUNCTION", "=", "RETURNED",
    ]  # fmt: skip
    assert lines.line(call, "vfs_read") == (
        "0.000000         1.78 µs  cat[4712]        vfs_read(0xffff888a4de9d000, 77, 0) = 77"
    ).replace("0xffff888a4de9d000", number(18446619871040372992))
    later = Call(decoded(time_ns="6500000000", return_value="-2"))
    assert lines.line(later, "f").startswith("1.500000   ")
    assert lines.line(later, "f").endswith(" = -2 ENOENT")
    hostile = Call(decoded(command="\x1b[31m"))
    assert "\x1b" not in lines.line(hostile, "f\x1b")


def test_the_time_of_day() -> None:
    lines = CallLines(0, 10**18, entry_only=False, unicode=False)
    text = lines.line(Call(decoded(time_ns="1500")), "f")
    assert re.match(r"\d\d:\d\d:40\.000001  1\.78 us  cat", text)
    assert text.endswith("f() = 77")


def test_a_record_that_is_no_call() -> None:
    with pytest.raises(ProtocolError):
        Call(decoded(pid=None))
    with pytest.raises(ProtocolError):
        Call({})


# The command


def test_calls_until_the_map_ends() -> None:
    script = fake(record(), record(function="0x2000", return_value="-2"), None)
    with scripted(script) as server:
        text = good(server.path, "trace", "vfs_read", "--pid", "5", "--command", "cat")
    heading, first, second = text.splitlines()
    assert heading.startswith("TIME ")
    assert first.endswith(" = 77")
    assert second.endswith(", 77, 0) = -2 ENOENT")
    assert "nf_hook[nf_tables](" in second
    source = script.loads[0]["source"]
    assert source["globals"] == {"target_pid": 5, "target_command": "Y2F0AAAAAAAAAAAAAAAAAA=="}
    assert script.links[0]["kind"] == "session"
    assert script.deleted == ["/links/lnk-session", "/programs/prg-trace"]


def test_slow_calls_and_no_more_than_wanted() -> None:
    durations = ["999", "1000", "5000000", "2000", "3000"]
    script = fake(*(record(duration_ns=each) for each in durations))
    with scripted(script) as server:
        asked = ["--json", "trace", "f", "--slower-than", "1us", "--max", "3", "--args", "2"]
        calls = [json.loads(line) for line in good(server.path, *asked).splitlines()]
    assert [each["duration_ns"] for each in calls] == ["1000", "5000000", "2000"]
    assert calls[0] == {
        "time_ns": "5000000000",
        "symbol": "vfs_read",
        "module": None,
        "address": "0x0000000000001000",
        "arguments": ["18446619871040372992", "77"],
        "pid": 4711,
        "tid": 4712,
        "uid": 1000,
        "gid": 1000,
        "cpu": 0,
        "command": "cat",
        "duration_ns": "1000",
        "return_value": "77",
    }
    assert script.deleted[0] == "/links/lnk-session"


def test_entries_alone() -> None:
    entered = record(kind="CALL_ENTERED", duration_ns="0", return_value="0")
    script = fake(entered, None, programs=PAIR)
    with scripted(script) as server:
        text = good(server.path, "trace", "f", "--entry-only", "--elapsed")
    assert script.loads[0]["source"]["globals"] == {"entry_only": 1}
    assert [each["program"] for each in script.links] == ["prg-trace_entry"]
    assert (
        text.splitlines()[1]
        == f"0.000000         cat[4712]        vfs_read({number(18446619871040372992)}, 77, 0)"
    )
    with scripted(fake(entered, None)) as server:
        call = json.loads(good(server.path, "--json", "trace", "f", "--entry-only"))
    assert "return_value" not in call


def test_what_is_lost_is_told() -> None:
    lost = {"lost": 12, "reason": "the reader is too slow"}
    script = fake(lost, record(), None, variables={"dropped": 7}, missed=1)
    with scripted(script) as server:
        done = run(server.path, "trace", "f")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 2
    assert "12 calls lost: the reader is too slow\n" in done.stderr
    assert "7 calls are not told of, for lack of room" in done.stderr
    assert "1 calls were missed" in done.stderr


def test_a_daemon_that_was_restarted() -> None:
    script = fake(record(), None, more=[record(), None])
    with scripted(script) as server:
        done = run(server.path, "trace", "f")
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 3)
    assert done.stderr.startswith("kpmctl: the connection was lost: records that were on their way")


def test_the_end_of_a_duration() -> None:
    script = fake(record())
    with scripted(script) as server:
        text = good(server.path, "trace", "f", "--duration", ".1")
    assert len(text.splitlines()) == 2
    assert script.deleted == ["/links/lnk-session", "/programs/prg-trace"]


@pytest.mark.parametrize("number_", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(number_: signal.Signals) -> None:
    script = fake(record())
    with scripted(script) as server:
        process = Started(server.path, "trace", "f")
        process.first_line()
        assert "vfs_read" in process.first_line()
        process.send_signal(number_)
        out, err = process.end()
    assert (process.returncode, out, err) == (0, "", "")
    assert script.deleted == ["/links/lnk-session", "/programs/prg-trace"]


def test_a_broken_pipe_ends_it() -> None:
    script = fake(*(record() for _ in range(20_000)))
    with scripted(script) as server:
        done = subprocess.run(
            ["bash", "-c", f"{' '.join(KPMCTL)} trace f | head -2; echo ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=environment(server.path),
        )
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0", "")
    assert script.deleted == ["/links/lnk-session", "/programs/prg-trace"]


def test_on_a_terminal() -> None:
    with scripted(fake(record(), record(), None)) as server:
        terminal = Terminal(server.path, ["trace", "vfs_read"], 60, 20)
        text = terminal.end()
        assert terminal.process.wait(20) == 0
    assert "2 functions attached, Ctrl-C ends it" in text
    assert "\x1b[1mTIME" in text
    assert plain(text).count(" = 77") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        "f --slower-than 5",
        "f --slower-than 5h",
        "f --slower-than ms",
        "f --args 7",
        "f --max 0",
        "f --entry-only --slower-than 1ms",
        "f --uid no-such-user-at-all",
        "f --uid -1",
        "f --uid 4294967295",
        "f --command ''",
        "f --command a-name-that-is-too-long",
        "f --cgroup /no/such/cgroup",
        "f --cgroup-alone",
        "",
    ],
)
def test_wrong_usage(arguments: str) -> None:
    given = [each.strip("'") for each in arguments.split()]
    done = run("/none", "trace", *given)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
