"""Completion in real shells: bash, zsh and fish, with the ids and functions of a daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from kpmd.client.client import Client
from tests.unit.test_client import running_daemon

BIN = str(Path(sys.executable).parent)


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


def environment(socket: str, home: Path) -> dict[str, str]:
    path = f"{BIN}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(home), "KPMD_SOCKET": socket, "TERM": "xterm", "LANG": "C"}


def bash(socket: str, home: Path, line: str) -> set[str]:
    """What bash's own completion machinery comes to for a line."""
    words = line.split(" ")
    script = (
        'eval "$(kpmctl completion bash)"\n'
        f"COMP_WORDS=({' '.join(repr(each) for each in words)})\n"
        f"COMP_CWORD={len(words) - 1}\n"
        "_kpmctl_completion kpmctl\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return _lines(["bash", "--norc", "-c", script], socket, home)


def fish(socket: str, home: Path, line: str) -> set[str]:
    script = f"kpmctl completion fish | source; complete --do-complete '{line}'"
    # Behind a tab stands what each is.
    found = _lines(["fish", "--no-config", "-c", script], socket, home)
    return {each.partition("\t")[0] for each in found}


def _lines(command: list[str], socket: str, home: Path) -> set[str]:
    done = subprocess.run(
        command, env=environment(socket, home), capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


@pytest.mark.parametrize("shell", [bash, fish])
def test_commands_options_ids_and_functions(
    shell: Callable[[str, Path, str], set[str]], daemon: str, tmp_path: Path
) -> None:
    assert {"count", "links", "completion"} <= shell(daemon, tmp_path, "kpmctl ")
    assert shell(daemon, tmp_path, "kpmctl cap") == {"capabilities"}
    assert "--exclude" in shell(daemon, tmp_path, "kpmctl count --e")
    assert {"create", "renew", "end"} <= shell(daemon, tmp_path, "kpmctl lease ")
    with Client(daemon) as client:
        lease = client.create_lease(60)["id"]
        assert shell(daemon, tmp_path, "kpmctl lease renew lse-") == {lease}
        client.end_lease(lease)
    assert "vfs_read" in shell(daemon, tmp_path, "kpmctl symbols vfs_r")


@pytest.mark.parametrize("shell", [bash, fish])
def test_without_a_daemon_there_is_nothing_to_say(
    shell: Callable[[str, Path, str], set[str]], tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "no.sock")
    assert shell(nowhere, tmp_path, "kpmctl lease renew lse-") == set()
    assert shell(nowhere, tmp_path, "kpmctl symbols vfs_r") == set()
    assert shell(nowhere, tmp_path, "kpmctl cap") == {"capabilities"}


def test_zsh_which_completes_only_at_a_terminal(daemon: str, tmp_path: Path) -> None:
    child = pexpect.spawn(
        "zsh", ["-f", "-i"], env=environment(daemon, tmp_path), encoding="utf-8", timeout=20
    )
    try:
        child.sendline("autoload -U compinit; compinit -u -D")
        child.sendline('eval "$(kpmctl completion zsh)"; echo loa""ded')
        child.expect_exact("loaded\r\n")
        for begun, whole in (
            ("kpmctl cap", "capabilities"),
            ("kpmctl lease cr", "create"),
            ("kpmctl symbols vfs_r", "vfs_read"),
        ):
            child.send(f"\x15{begun}\t")  # what stood there goes
            child.expect_exact(whole)
    finally:
        child.close(force=True)
