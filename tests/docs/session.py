"""A page's commands, in the order in which they stand there, in a shell of each of its users."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.docs.pages import CONSOLE, CONTENT, PYTHON, ROOT, Block
from tests.docs.transcript import Step, pattern, steps

#: A wait in vain ends here. All takes some twenty times longer by emulation.
PATIENCE = 120

SOCKET = Path("/run/kpmd.sock")

_NOBODY_ELSE: Mapping[str, tuple[int, list[int]]] = {}

#: What commands may need of the environment: nothing of the tests'.
_ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "COLUMNS": "100",
    "PYTHONDONTWRITEBYTECODE": "1",
}


class Shell:
    """A bash that does what it is told, with all that it prints.

    A command that fails ends it, but for the last of what may fail.
    """

    def __init__(
        self, name: str, user: int, groups: list[int], folder: Path, scripts: Path
    ) -> None:
        """``folder`` is where it begins; ``scripts`` is a folder that this process can write to."""
        entry = pwd.getpwuid(user)
        self._scripts = scripts
        self._done = 0
        self._output = b""
        #: A file: a pipe that nobody empties meanwhile would stop a daemon, which writes its log.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        self._seen = 0
        self._process = subprocess.Popen(
            ["/bin/bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**_ENVIRONMENT, "HOME": str(scripts), "USER": name},
            user=user,
            group=entry.pw_gid,
            extra_groups=groups,
            start_new_session=True,
        )

    def run(self, text: str, may_fail: bool = False) -> tuple[int, str]:
        """The exit status of some commands, and what they printed."""
        self.begin(text, may_fail)
        return self.end()

    def begin(self, text: str, may_fail: bool = False) -> None:
        """Let the shell begin with commands."""
        self._output = b""
        self._done += 1
        script = self._scripts / f".commands-{self._process.pid}-{self._done}"
        script.write_text(text, encoding="utf-8")
        script.chmod(0o644)
        self._end = f"--- {self._process.pid} {self._done} ended: "
        how = "set +e" if may_fail else "set -e -o pipefail"
        self._tell(
            f"{how}; . {shlex.quote(str(script))} </dev/null; "
            f"printf '%s%d\\n' {shlex.quote(self._end)} $?\n"
        )

    def wait_for(self, wanted: re.Pattern[str]) -> None:
        """Wait until what is printed begins so, or the commands have ended."""
        while self._end.encode() not in self._output:
            if wanted.match(self._output.decode(errors="replace")) or not self._read():
                return

    def interrupt(self, since: set[int]) -> None:
        """Press Ctrl-C: for the processes that the shell has started beside these."""
        for process in self.children() - since:
            for each in (process, *_descendants(process)):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGINT)

    def children(self) -> set[int]:
        """The processes that the shell has started and that have not ended."""
        return set(_children(self._process.pid))

    def end(self) -> tuple[int, str]:
        """The exit status of what was begun, and all that it printed."""
        ended = re.compile(re.escape(self._end) + r"(\d+)\n")
        while not (found := ended.search(text := self._output.decode(errors="replace"))):
            if not self._read():
                return self._process.wait(), text
        return int(found[1]), text[: found.start()]

    def close(self) -> None:
        """End the shell, and with it all that it has started."""
        assert self._process.stdin is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()
            deadline = time.monotonic() + PATIENCE
            while True:
                os.killpg(self._process.pid, 0)
                assert time.monotonic() < deadline, "what the page has started does not end"
                time.sleep(0.05)
        self._process.wait()
        self._process.stdin.close()
        self._printed.close()

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def _read(self) -> bool:
        """Take what is printed next; False where the shell has ended, and nothing more can come."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ended = self._process.poll() is not None
            more = os.pread(self._printed.fileno(), 1 << 20, self._seen)
            self._seen += len(more)
            self._output += more
            if more or ended:
                return bool(more)
            assert time.monotonic() < deadline, f"in vain:\n{self._output.decode(errors='replace')}"
            time.sleep(0.02)


def _children(process: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        text = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
        return [int(each) for each in text.split()]
    return []


def _descendants(process: int) -> Iterator[int]:
    for each in _children(process):
        yield each
        yield from _descendants(each)


class Session:
    """A folder, and a shell in it for each user that the page's blocks name."""

    def __init__(self, folder: Path, users: Mapping[str, tuple[int, list[int]]]) -> None:
        """``users``: uid and groups of those who are not on the machine's own list."""
        self._folder = folder
        self._users = users
        self._shells: dict[tuple[str, bool], Shell] = {}

    def do(self, block: Block) -> None:
        """Write the block's file, or run it. Raises AssertionError where it is not as it says."""
        if block.file:
            path = self._folder / block.file
            path.write_text(block.text, encoding="utf-8")
            path.chmod(0o644)
        elif block.language in CONSOLE:
            for step in steps(block.text):
                self._converse(block, step)
        else:
            assert block.language not in CONTENT
            text = block.text
            if block.language in PYTHON:
                text = f"python3 - <<'END OF PYTHON'\n{text}END OF PYTHON\n"
            status, output = self._shell(block).run(text, may_fail=bool(block.status))
            assert status == block.status, f"{block}: status {status}\n{block.text}\n{output}"
        if block.daemon:
            deadline = time.monotonic() + PATIENCE
            while not SOCKET.exists():
                assert time.monotonic() < deadline, f"{block}: the daemon does not listen"
                time.sleep(0.1)

    def _converse(self, block: Block, step: Step) -> None:
        shell = self._shell(block)
        others = shell.children()
        shell.begin(step.command, may_fail=True)
        if step.before_interrupt is not None:
            shell.wait_for(pattern(step.before_interrupt))
            shell.interrupt(others)
        status, output = shell.end()
        if output and not output.endswith("\n"):
            output += "\n"
        wanted = pattern(step.printed)
        assert wanted.fullmatch(output), (
            f"{block}: {step.command}\nwanted {wanted.pattern}\ncame:\n{output}"
        )
        assert status == block.status, f"{block}: {step.command}: status {status}\n{output}"

    def _shell(self, block: Block) -> Shell:
        key = (block.user, block.in_project)
        if key not in self._shells:
            if block.user in self._users:
                user, groups = self._users[block.user]
            else:
                entry = pwd.getpwnam(block.user)
                user, groups = entry.pw_uid, os.getgrouplist(block.user, entry.pw_gid)
            folder = ROOT if block.in_project else self._folder
            self._shells[key] = Shell(block.user, user, groups, folder, self._folder)
        return self._shells[key]

    def close(self) -> None:
        """End the shells: that of root, which may have the daemon, last."""
        for key in sorted(self._shells, key=lambda each: each[0] == "root"):
            self._shells[key].close()


@contextmanager
def following(users: Mapping[str, tuple[int, list[int]]] = _NOBODY_ELSE) -> Iterator[Session]:
    """A session in a folder of its own. What its shells have started ends with it."""
    with tempfile.TemporaryDirectory(prefix="docs-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        session = Session(folder, users)
        try:
            yield session
        finally:
            session.close()
