"""``kpmctl events``: as a process, since it goes on until somebody ends it."""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from kpmd.client.client import Client
from kpmd.kpmctl import failures
from kpmd.kpmctl.commands.events import line
from tests.unit.test_client import ROOT, always, http, running_daemon, scripted
from tests.unit.test_client_events import END, HEAD, chunk, cut, event
from tests.unit.test_client_lifetimes import until
from tests.unit.test_kpmctl import KPMCTL, Started, environment, good, run

TIME = r"\d{4}-\d\d-\d\dT[\d:.]+Z"


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


@contextlib.contextmanager
def listening(socket_: str, *arguments: str) -> Iterator[Started]:
    """``kpmctl events`` as a process; it listens already, for it has told of something."""
    with Client(socket_) as client, Started(socket_, *arguments) as process:
        assert process.stdout is not None
        made = client.create_lease(60)["id"]
        until(lambda: any(each["pid"] == process.pid for each in client.clients()))
        # It is connected; once it listens, what happens to the next lease is told.
        while not _readable(process):
            client.end_lease(made)
            made = client.create_lease(60)["id"]
        client.end_lease(made)
        while made not in (text := process.first_line()) or "ended" not in text:
            pass
        try:
            yield process
        finally:
            process.kill()


def _readable(process: Started) -> bool:
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0.02)[0])


def make_and_end(socket_: str) -> tuple[str, str, str]:
    """A link under a lease: the ids of lease, program and link."""
    with Client(socket_) as client:
        lease = client.create_lease(60)["id"]
        program = client.load_object(b"\x7fELF" + bytes(60), ["count"])["programs"][0]["id"]
        link = client.attach(program, symbols=["vfs_read"], lifetime=lease)["id"]
        client.end_lease(lease)
        client.delete_program(program)
    return lease, program, link


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_life_of_a_link(daemon: str, number: signal.Signals) -> None:
    with listening(daemon, "events") as process:
        lease, program, link = make_and_end(daemon)
        lines: list[str] = []
        # Each line comes when it happens, and not when a buffer is full.
        while not lines or "  program  ended" not in lines[-1]:
            lines.append(process.first_line())
        process.send_signal(number)
        out, err = process.end()
    assert (process.returncode, out, err) == (0, "", "")
    lines = [each for each in lines if "  client   " not in each]
    client = r"cli-\w+"
    for text, pattern in zip(
        lines,
        [
            rf"lease    created    {lease}  \S+  {client}",
            rf"program  created    {program}  \S+  count, {client}",
            rf"link     created    {link}  \S+  kprobe of 1 function, {program}, {client}",
            rf"link     detaching  {link}  \S+  lease-ended: kprobe of 1 function, .*",
            rf"lease    ended      {lease}  \S+  lease-ended: {client}",
            rf"link     ended      {link}  \S+  lease-ended: kprobe of 1 function, .*",
            rf"program  ended      {program}  \S+  deleted: count, {client}",
        ],
        strict=True,
    ):
        assert re.fullmatch(rf"{TIME}  {pattern}\n", text), text


def test_as_json_and_since(daemon: str) -> None:
    with listening(daemon, "--json", "events") as process:
        lease, program, _ = make_and_end(daemon)
        found: list[Any] = []
        while not found or (found[-1]["id"], found[-1]["event"]) != (program, "ended"):
            found.append(json.loads(process.first_line()))
    found = [each for each in found if each["what"] != "client"]
    assert [each["event"] for each in found if each["id"] == lease] == ["created", "ended"]
    assert found[0].keys() == {"seq", "time", "what", "event", "id", "uid", "client"}
    assert found[3].keys() - found[0].keys() == {"reason", "program", "kind", "count"}
    with Started(daemon, "--json", "events", "--since", found[2]["seq"]) as process:
        assert json.loads(process.first_line()) == found[3]
        process.send_signal(signal.SIGINT)
        _, err = process.end()
    assert (process.returncode, err) == (0, "")


def test_what_cannot_be_resumed(daemon: str) -> None:
    done = run(daemon, "events", "--since", "00000000-1")
    assert (done.exit_code, done.stdout) == (failures.REFUSED, "")
    assert "not kept any more" in done.stderr
    assert run(daemon, "events", "--since", "yesterday").exit_code == failures.INVALID
    assert run(daemon, "events", "yesterday").exit_code == 2


def test_the_daemon_dies() -> None:
    with running_daemon() as (path, daemon), listening(path, "--json", "events") as process:
        daemon.kill()
        _, err = process.end()
    assert process.returncode == failures.UNREACHABLE
    assert err.startswith(f"kpmctl: the daemon at {path} closed the connection in the middle of")
    assert len(err.splitlines()) == 1


def test_the_daemon_stops() -> None:
    with running_daemon() as (path, daemon), listening(path, "events") as process:
        daemon.terminate()
        _, err = process.end()
    assert process.returncode == failures.UNREACHABLE
    assert err == "kpmctl: the daemon has ended the events: it is stopping\n"


def test_cut_before_any_event() -> None:
    with scripted(always(cut(HEAD))) as server:
        done = run(server.path, "events")
    assert (done.exit_code, done.stdout) == (failures.UNREACHABLE, "")


def test_there_is_no_daemon_or_another() -> None:
    done = run("/nowhere/kpmd.sock", "events")
    assert (done.exit_code, len(done.stderr.splitlines())) == (failures.UNREACHABLE, 1)
    with scripted(always(http({"items": []}))) as server:
        assert run(server.path, "events").exit_code == failures.OTHER


def test_into_a_broken_pipe() -> None:
    stream = HEAD + chunk(b"".join(full_event(f"a-{number}") for number in range(5000)))
    with scripted(always(stream)) as server:
        command = f"{' '.join(KPMCTL)} events | head -1; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=environment(server.path),
        )
    first, status = done.stdout.splitlines()
    assert first.endswith("  lease    created    lse-1                         root  cli-1")
    assert (status, done.stderr) == ("0", "")


def full_event(seq: str, **more: Any) -> bytes:
    told = {**json.loads(event(seq)), "time": "T", "id": "lse-1", "uid": 0, "client": "cli-1"}
    return json.dumps(told | more).encode() + b"\n"


def test_lines() -> None:
    told: Any = json.loads(full_event("a-1"))
    assert line(told) == "T  lease    created    lse-1                         root  cli-1"
    del told["client"]
    told |= {"what": "client", "event": "ended", "reason": "client-gone", "uid": 4_000_000_000}
    told |= {"pid": 7, "command": "a\x1b[31m\n"}
    assert line(told).endswith("  uid 4000000000  client-gone: a\\x1b[31m\\n[7]")


def test_events_from_the_future() -> None:
    """What a later daemon tells more is passed on, and harms nobody."""
    stream = HEAD + chunk(full_event("a-1", what="map", event="renamed", new={"x": 1})) + END
    with scripted(always(stream)) as server:
        done = run(server.path, "events")
        assert "  map      renamed    lse-1" in done.stdout
        assert json.loads(run(server.path, "--json", "events").stdout)["new"] == {"x": 1}


def test_interrupted_while_the_daemon_is_slow() -> None:
    with scripted(always(HEAD)) as server:
        process = Started(server.path, "events")
        until(lambda: bool(server.seen))
        process.send_signal(signal.SIGINT)
        assert process.end() == ("", "")
        assert process.returncode == 0


def test_help() -> None:
    assert "--since SEQ" in good("/none", "events", "-h")
