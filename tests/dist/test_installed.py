"""kpmd as pip installs it: its commands, the daemon on this machine's own kernel, its library."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

import kpmd
from tests.dist.conftest import CLEAN, Built, pip
from tests.unit.test_client import short_directory

#: What only the daemon, or a part of kpmctl, is for.
HEAVY = {"aiohttp", "cryptography", "kpmd.daemon", "pydantic", "textual", "uvloop"}


@contextlib.contextmanager
def running(bin: Path) -> Iterator[str]:  # noqa: A002
    """The installed daemon on the kernel of this machine; its socket."""
    with (
        short_directory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        open(folder / "log", "wb") as log,
    ):
        ready.bind(str(folder / "notify"))
        ready.settimeout(30)
        process = subprocess.Popen(
            [bin / "kpmd", "--socket", folder / "kpmd.sock"],
            cwd="/",
            env=CLEAN | {"NOTIFY_SOCKET": str(folder / "notify")},
            stderr=log,
        )
        try:
            told = b""
            while b"READY=1" not in told:
                told = ready.recv(4096)
            yield str(folder / "kpmd.sock")
        except TimeoutError:
            pytest.fail((folder / "log").read_text())
        finally:
            process.terminate()
            assert process.wait(30) == 0, (folder / "log").read_text()


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd="/", env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_versions(bin: Path) -> None:  # noqa: A002
    for name in ("kpmd", "kpmctl"):
        assert run(bin / name, "--version") == f"{name}, version {kpmd.__version__}\n"


def test_the_daemon_serves(bin: Path) -> None:  # noqa: A002
    """What kpmctl, the library, and the builtins' objects need is all there."""
    with running(bin) as path:
        kpmctl = (bin / "kpmctl", "--socket", path, "--json")
        told = json.loads(run(*kpmctl, "capabilities"))
        assert told["kernel"]["release"] == os.uname().release
        code = (
            "import kpmd, sys\n"
            "from kpmd.client import Client\n"
            f"with Client({path!r}) as client, client.loaded_builtin('count') as loaded:\n"
            "    print(kpmd.__file__, client.version()['version'], loaded['programs'][0]['name'])\n"
        )
        file, version, name = run(bin / "python", "-I", "-c", code).split()
        assert Path(file).is_relative_to(bin.parent)
        assert (version, name) == (kpmd.__version__, "count")


def test_kpmctl_imports_nothing_of_the_daemon(bin: Path) -> None:  # noqa: A002
    with running(bin) as path:
        code = (
            "import sys\n"
            f"sys.argv[1:] = ['--socket', {path!r}, 'programs']\n"
            "from kpmd.kpmctl.__main__ import main\n"
            "try:\n    main()\n"
            "finally:\n    print(*sys.modules)\n"
        )
        programs, modules = run(bin / "python", "-I", "-c", code).strip().rsplit("\n", 1)
        assert programs.startswith("PROGRAM ")
        assert "kpmd.client" in modules.split()
        assert HEAVY & set(modules.split()) == set()


def test_what_an_administrator_puts_in_place(bin: Path) -> None:  # noqa: A002
    share = bin.parent / "share" / "kpmd"
    found = {each.relative_to(share).as_posix() for each in share.rglob("*") if each.is_file()}
    assert found >= {"kpmd.toml", "policy.toml", "systemd/kpmd.service", "systemd/kpmd.socket"}
    told = run(
        *(bin / "kpmd", "--check-config"),
        *("--config", share / "kpmd.toml", "--policy", share / "policy.toml"),
    )
    assert str(share / "policy.toml") in told


def test_uninstalling_leaves_nothing(built: Built, tmp_path: Path) -> None:
    venv.create(tmp_path, symlinks=True)
    before = set(tmp_path.rglob("*"))
    to = ("--python", tmp_path / "bin" / "python")
    pip(Path(sys.executable), *to, "install", "--no-index", "--no-deps", built.wheel)
    assert (tmp_path / "bin" / "kpmd").exists()
    pip(Path(sys.executable), *to, "uninstall", "--yes", "kpmd")
    left = {each for each in tmp_path.rglob("*") if each.name != "__pycache__"} - before
    assert {each.relative_to(tmp_path).as_posix() for each in left if each.is_file()} == set()
