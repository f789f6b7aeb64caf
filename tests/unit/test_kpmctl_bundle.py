"""``kpmctl support-bundle``: what is in it, what is not, and what comes of things that go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpmd.client.client import Client
from kpmd.client.errors import ApiError
from kpmd.kpmctl import failures
from kpmd.kpmctl.support import archive, machine, parts, programs
from kpmd.kpmctl.support.redact import Redactor
from tests.unit.test_client import (
    ELF,
    ROOT,
    Answer,
    always,
    http,
    problem,
    running_daemon,
    scripted,
)
from tests.unit.test_kpmctl import KPMCTL, Terminal, environment, read_json, run

NASTY = "se\ncret\x1b[31m\u2028\u00fc"


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        with Client(path) as client:
            made = client.load_object(ELF, programs=["count"], lifetime="persistent")
            client.attach(
                made["programs"][0]["id"],
                symbols=["vfs_read"],
                lifetime="persistent",
                labels={"team": NASTY, "project": "osprey"},
            )
        yield path


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of which nothing is known but what a test says."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for name in ("kpmd", "systemctl", "journalctl", "bpftool"):
        program(tmp_path, name, "echo nothing here >&2; exit 9")
    monkeypatch.setattr(machine, "_CONFIG", tmp_path / "kpmd.toml")
    monkeypatch.setattr(machine, "_POLICY", tmp_path / "policy.toml")


def program(folder: Path, name: str, text: str) -> None:
    """Put a shell script in front of all programs of that name."""
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def bundle(socket_: str, *arguments: str) -> dict[str, str]:
    """The files of a bundle, by their names in its folder."""
    done = run(socket_, "support-bundle", "--output", "b.tar.gz", *arguments)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert "Look at it before you send it:\n  tar -xOzf b.tar.gz | less\n" in done.stdout
    found = unpacked(Path("b.tar.gz"))
    Path("b.tar.gz").unlink()
    return found


def unpacked(path: Path) -> dict[str, str]:
    found = {}
    with tarfile.open(path) as packed:
        for member in packed:
            content = packed.extractfile(member)
            assert content is not None
            folder, _, name = member.name.partition("/")
            assert folder == path.name.removesuffix(".tar.gz")
            found[name] = content.read().decode()
    return found


def outcomes(files: dict[str, str]) -> dict[str, tuple[str, str | None]]:
    return {
        each["file"]: (each["outcome"], each["detail"])
        for each in json.loads(files["manifest.json"])["parts"]
    }


def nothing_left() -> None:
    assert list(Path().iterdir()) == []


def silent(seconds: float) -> Answer:
    """In place of an answer nothing, for a time."""

    def wait(sock: socket.socket) -> bool:
        time.sleep(seconds)
        return False

    return wait


# What is in it


def test_all_that_a_daemon_tells(daemon: str) -> None:
    files = bundle(daemon)
    told = outcomes(files)
    got = {name for name, (outcome, _) in told.items() if outcome == "got"}
    assert got | {"manifest.json", "README.txt"} == set(files)
    assert {name for name in told if name.startswith("daemon/")} <= got
    (link,) = json.loads(files["daemon/links.json"])["items"]
    targets = json.loads(files["daemon/targets.json"])
    assert [each["symbol"] for each in targets[link["id"]]["items"]] == ["vfs_read"]
    assert json.loads(files["daemon/contract.json"])["info"]["title"]
    assert json.loads(files["daemon/explain.json"])["allowed"] is True
    assert "# HELP " in files["daemon/metrics.txt"]
    assert json.loads(files["machine/kernel.json"])["release"] == os.uname().release
    manifest = json.loads(files["manifest.json"])
    assert (manifest["format"], manifest["redacted"]) == (1, True)
    for name, text in files.items():
        assert text.replace("\n", "").replace("\t", "").isprintable(), name
        if name.endswith(".json"):
            json.loads(text)


def test_metrics_are_text(daemon: str) -> None:
    with Client(daemon) as client:
        assert client.metrics().startswith("# HELP ")
    with (
        scripted(always(problem("forbidden", 403))) as server,
        Client(server.path) as client,
        pytest.raises(ApiError) as caught,
    ):
        client.metrics()
    assert caught.value.kind == "forbidden"


def test_it_is_for_its_owner_and_takes_nothings_place(daemon: str) -> None:
    assert read_json(daemon, "support-bundle", "--no-lists")["redacted"] is True
    (path,) = Path().iterdir()
    assert path.name.startswith("kpmd-support-2")
    assert path.stat().st_mode & 0o7777 == 0o600
    before = path.read_bytes()
    done = run(daemon, "support-bundle", "--output", path.name)
    assert done.exit_code == failures.OTHER
    assert "is there already: give another name with --output" in done.stderr
    assert path.read_bytes() == before
    assert list(Path().iterdir()) == [path]


def test_who_came_first_keeps_the_name(tmp_path: Path) -> None:
    path = tmp_path / "here" / "b"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        archive.check(path)
    with pytest.raises(FileExistsError):
        archive.write(path, b"data")
    assert path.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def test_the_same_content_makes_the_same_file() -> None:
    files = {"b": b"2", "a": b"1"}
    first = archive.packed("f", files, 1_700_000_000)
    assert first == archive.packed("f", dict(sorted(files.items())), 1_700_000_000)
    assert first != archive.packed("f", files, 1_700_000_001)


def test_what_is_not_wanted(daemon: str, tmp_path: Path) -> None:
    (tmp_path / "kpmd.toml").write_text("")
    files = bundle(daemon, "--no-lists", "--no-config", "--no-journal")
    assert not {"daemon/links.json", "daemon/targets.json"} & files.keys()
    assert not {"config/kpmd.json", "unit/journal.json"} & outcomes(files).keys()


# Names


def test_nobody_is_named(daemon: str, tmp_path: Path) -> None:
    uid = 4242
    (tmp_path / "kpmd.toml").write_text('group = "falconers"\n')
    program(tmp_path, "kpmd", """echo '{"findings": [{"group": "kernel"}], "uid": 4242}'""")
    (tmp_path / "policy.toml").write_text(
        '# asked for by margarethe\n[[rules]]\nname = "some"\nusers = ["margarethe", 4242]\n'
        'groups = ["falconers", "kpmd"]\n[rules.programs]\nkeys = ["/srv/margarethe/build.pem"]\n'
    )
    entry = {
        "__REALTIME_TIMESTAMP": "1700000000000000",
        "MESSAGE": f"uid {uid} (margarethe): POST /links: ok",
        "KPMD_UID": str(uid),
        "KPMD_USER": "margarethe",
        "KPMD_COMMAND": "falconry",
        "KPMD_WHAT_LABELS": ["team=osprey"],
        "_HOSTNAME": os.uname().nodename,
        "_CMDLINE": "kpmd --secret",
    }
    line = json.dumps({"event": "bug", "uid": uid, "exception": 'File "/home/margarethe/x.py"'})
    plain = f"falconry of margarethe@{os.uname().nodename} failed, uid={uid}"
    entries = [entry, entry | {"KPMD_UID": "0", "KPMD_USER": "root"}]
    entries += [{"MESSAGE": text, "_PID": "7"} for text in (line, plain)]
    (tmp_path / "entries").write_text("".join(f"{json.dumps(each)}\n" for each in entries))
    program(tmp_path, "journalctl", f"cat {tmp_path}/entries")
    files = bundle(daemon)
    everything = "".join(files.values())
    for word in ("margarethe", "falconers", "falconry", "osprey", "cret", "4242", "/srv", "/home"):
        assert word not in everything, word
    assert os.uname().nodename not in files["unit/journal.json"]
    assert "secret" not in everything
    assert json.loads(files["machine/check.json"])["findings"] == [{"group": "kernel"}]
    audit, by_root, bug, failed = json.loads(files["unit/journal.json"])
    rule = json.loads(files["config/policy.json"])["content"]["rules"][0]
    user, number = rule["users"][0], rule["users"][1].rpartition("-")[2]
    assert rule["groups"][1] == "kpmd"
    assert (audit["audit"]["user"], audit["audit"]["uid"]) == (user, f"uid-{number}")
    assert user == f"user-{number}"
    assert (by_root["audit"]["user"], by_root["audit"]["uid"]) == ("root", "0")
    assert bug["message"]["uid"] == f"uid-{number}"
    command = audit["audit"]["command"]
    assert failed["message"] == f"{command} of {user}@host failed, uid=uid-{number}"
    assert "vfs_read" in everything


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("of ada: no", "of user-1: no"),
        ("ada@box.example.org, then box", "user-1@host, then host"),
        (r"EXAMPLE\grace did", "user-2 did"),
        ("canada and adamant", "canada and adamant"),
        ("uid 7 (ada), gid=9, pid 7", "uid uid-3 (user-1), gid=group-1, pid 7"),
        ("uid 0 and gid 0 (root)", "uid 0 and gid 0 (root)"),
        ("in /home/ada/x.o: bad", "in path-1: bad"),
        ("~/x.o, ~/x.o", "path-1, path-1"),
        ("GET /links/lnk-1/targets", "GET /links/lnk-1/targets"),
        (
            "/usr/bin/kpmd reads /etc/kpmd/policy.toml.",
            "/usr/bin/kpmd reads /etc/kpmd/policy.toml.",
        ),
        ("/usr/local/ada/bin", "path-1"),
        ("https://www.debian.org/support", "https://www.debian.org/support"),
        ("1/2 of vfs_read and/or 0xffff", "1/2 of vfs_read and/or 0xffff"),
    ],
)
def test_sentences(text: str, told: str) -> None:
    redactor = Redactor({"box", "box.example.org"}, ["ada", r"EXAMPLE\grace"])
    assert redactor.text(text) == told


def test_labels_and_commands_have_the_same_placeholder_everywhere(daemon: str) -> None:
    files = bundle(daemon)
    (link,) = json.loads(files["daemon/links.json"])["items"]
    assert len(link["labels"]) == 2
    assert all(name.startswith("label-") for pair in link["labels"].items() for name in pair)
    again = json.loads(bundle(daemon)["daemon/links.json"])["items"][0]["labels"]
    assert again == link["labels"]


def test_names_where_they_are_wanted(daemon: str, tmp_path: Path) -> None:
    text = "# asked for by margarethe\nversion = 1\n"
    (tmp_path / "elsewhere.toml").write_text(text)
    (tmp_path / "kpmd.toml").write_text(f'policy = "{tmp_path}/elsewhere.toml"\n')
    files = bundle(daemon, "--no-redact")
    assert json.loads(files["config/policy.json"])["text"] == text
    (link,) = json.loads(files["daemon/links.json"])["items"]
    assert link["labels"] == {"team": NASTY, "project": "osprey"}
    assert json.loads(files["manifest.json"])["redacted"] is False


def test_a_broken_file_is_no_secret_either(daemon: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("users = [margarethe]")
    os.mkfifo(tmp_path / "kpmd.toml")
    files = bundle(daemon)
    found = json.loads(files["config/policy.json"])
    assert found["content"] is None
    assert found["error"].startswith("it is no TOML: ")
    assert "margarethe" not in "".join(files.values())
    assert "is no regular file" in str(outcomes(files)["config/kpmd.json"])


# Other programs


def test_what_other_programs_say(daemon: str, tmp_path: Path) -> None:
    program(tmp_path, "kpmd", "echo '{\"ready\": false}'; exit 1")
    program(tmp_path, "bpftool", 'echo \'[{"id": 7, "name": "count", "uid": 5}]\'')
    program(
        tmp_path,
        "systemctl",
        "[ $1 = show ] || { echo systemd 252; exit; }\n"
        "printf 'Id=kpmd.service\\nResult=success\\n\\nId=kpmd.socket\\nListen=a=b\\n'",
    )
    program(tmp_path, "journalctl", "echo 'Hint: You are not in the group adm.' >&2")
    files = bundle(daemon)
    assert json.loads(files["machine/check.json"]) == {"ready": False}
    units = json.loads(files["unit/systemctl.json"])
    assert units["systemd"] == "systemd 252"
    assert units["units"]["kpmd.socket"]["Listen"] == "a=b"
    told = outcomes(files)
    assert told["unit/journal.json"][0] == "refused"
    assert "the group adm" in str(told["unit/journal.json"][1])
    if os.geteuid() == 0:
        (listed,) = json.loads(files["machine/bpftool-prog.json"])
        assert (listed["name"], listed["uid"][:4]) == ("count", "uid-")
    else:
        assert told["machine/bpftool-prog.json"][0] == "refused"


def test_programs_that_fail_hang_and_never_stop(daemon: str, tmp_path: Path) -> None:
    program(tmp_path, "kpmd", "echo usage >&2; exit 2")
    program(tmp_path, "systemctl", f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
    program(tmp_path, "journalctl", "exec yes")
    files = bundle(daemon, "--timeout", "0.5")
    told = outcomes(files)
    assert told["machine/check.json"] == ("failed", "kpmd ended with 2: usage")
    assert told["unit/systemctl.json"] == ("timeout", "there was no answer within 0.5 seconds")
    assert told["unit/journal.json"][0] in ("failed", "timeout")
    assert told["daemon/links.json"] == ("got", None)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "what it started runs on"
        time.sleep(0.01)


def test_a_program_that_writes_too_much(
    daemon: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "MOST_BYTES", 1000)
    program(tmp_path, "journalctl", "exec yes")
    outcome = outcomes(bundle(daemon))["unit/journal.json"]
    assert outcome == ("failed", "journalctl writes more than 1000 bytes")


# Daemons that are none


def test_without_a_daemon(tmp_path: Path) -> None:
    done = run(str(tmp_path / "none"), "support-bundle", "--output", "b.tar.gz")
    assert done.exit_code == 0
    assert f"  failed: no socket at {tmp_path}/none: is the daemon running?" in done.stdout
    files = unpacked(Path("b.tar.gz"))
    assert str(tmp_path) not in "".join(files.values())
    assert {told[0] for name, told in outcomes(files).items() if name[:6] == "daemon"} == {"failed"}
    assert "machine/kernel.json" in files


DEEP = b'{"items": ' + b"[" * 5000 + b"]" * 5000 + b"}"


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"\x16\x03\x01 nonsense\r\n\r\n", "failed"),
        (http(b"{"), "failed"),
        (http(DEEP), "failed"),
        (http([NASTY]), "got"),
        (None, "failed"),
        (problem("forbidden", 403), "refused"),
        (problem("not-found", 404), "absent"),
        (silent(0.5), "timeout"),
    ],
    ids=["garbage", "no JSON", "deep", "another shape", "cut", "refused", "older", "silent"],
)
def test_a_daemon_that_answers_strangely(answer: Answer, outcome: str) -> None:
    with scripted(always(answer)) as server:
        files = bundle(server.path, "--timeout", "0.3" if outcome == "timeout" else "20")
    assert outcomes(files)["daemon/version.json"][0] == outcome
    assert ("daemon/version.json" in files) == (outcome == "got")


def test_a_daemon_that_answers_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpmd.kpmctl.support.collect.MOST_BYTES", 1000)
    with scripted(always(http({"version": "x" * 2000}))) as server:
        told = outcomes(bundle(server.path))["daemon/version.json"]
    assert told == ("failed", "the answer is over the 1000 bytes that are read")


def test_one_part_costs_no_other(daemon: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise LookupError("oh")

    monkeypatch.setattr(machine, "_kernel", broken)
    told = outcomes(bundle(daemon))
    assert told["machine/kernel.json"] == ("failed", "LookupError: oh")
    assert told["machine/sysctls.json"][0] == "got"


def test_a_daemon_elsewhere_tells_nothing_of_this_machine(tmp_path: Path) -> None:
    program(tmp_path, "ssh", "exit 255")
    files = bundle("ssh://nowhere.invalid")
    told = outcomes(files)
    assert told["daemon/links.json"][0] == "failed"
    assert told["machine/kernel.json"][0] == told["unit/journal.json"][0] == "left-out"
    assert "machine/kernel.json" not in files


# Places to write to, and ends


@pytest.mark.parametrize("output", ["none/b.tar.gz", "file/b.tar.gz"])
def test_no_folder(daemon: str, output: str) -> None:
    Path("file").write_text("")
    done = run(daemon, "support-bundle", "--output", output)
    assert done.exit_code == failures.OTHER
    assert "kpmctl: no bundle was made: " in done.stderr
    assert "is no directory" in done.stderr


@pytest.mark.alone
def test_a_full_disk(daemon: str) -> None:
    done = subprocess.run(
        [*KPMCTL, "support-bundle"],
        env=environment(daemon, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert (done.returncode, done.stdout) == (failures.OTHER, "")
    assert done.stderr == "kpmctl: no bundle was made: File too large\n"
    nothing_left()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str
)
def test_a_signal_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    program(tmp_path, "journalctl", f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    with scripted(always(lambda sock: bool(sock.recv(1)))) as server:
        process = subprocess.Popen(
            [*KPMCTL, "support-bundle"],
            env=environment(server.path, PYTHONPATH=str(ROOT)),
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 20
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (status, b"")
    nothing_left()
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_a_terminal_is_told_what_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with scripted(always(silent(1))) as server:
        output = str(tmp_path / "b.tar.gz")
        arguments = ["support-bundle", "--timeout", "0.8", "--output", output]
        terminal = Terminal(server.path, arguments, 60, 20)
        text = terminal.end()
        assert terminal.process.wait(20) == 0
    drawn, erased, rest = text.rpartition("\r\x1b[K")
    assert erased
    assert drawn.startswith("\rwaiting for daemon/version.json, ")
    assert max(len(line) for line in drawn.replace("\x1b[K", "").split("\r")) < 60
    assert rest.startswith(output)


def test_a_part_may_have_a_limit_of_its_own() -> None:
    async def never() -> object:
        return await asyncio.get_running_loop().create_future()

    result = asyncio.run(parts.take(parts.Part("f", "a", never, 0.01), 1000))
    assert result.outcome == "timeout"


def test_help_says_what_is_in_it() -> None:
    text = run("/none", "support-bundle", "--help").stdout
    for word in ("functions", "policy", "audit trail", "placeholder", "--no-redact"):
        assert word in text
    assert "support-bundle" in run("/none", "--help").stdout
