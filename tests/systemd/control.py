"""What an administrator does: systemctl, journalctl, drop-ins."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

#: Where `systemctl edit --runtime` puts drop-ins: before those in /etc in nothing but the place.
DROP_INS = Path("/run/systemd/system")

#: A wait in vain ends here; all takes some twenty times longer by emulation.
PATIENCE = 60


def run(*command: str) -> str:
    """Run a program that must succeed; what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what tells of itself in no other way than by being asked."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.1)


#: The event of a line that the service wrote and that is no record: a traceback, say.
NOT_JSON = "not JSON"


class Unit:
    """A unit of systemd; each method returns when systemd has done it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self) -> None:
        """Start it: of Type=notify, that is until it says that it is ready."""
        run("systemctl", "start", self.name)

    def stop(self) -> None:
        run("systemctl", "stop", self.name)

    def restart(self) -> None:
        run("systemctl", "restart", self.name)

    def kill(self, signal: str = "SIGKILL") -> None:
        """Send a signal to the main process; returns when it is gone."""
        pid = self.main_pid
        run("systemctl", "kill", "--kill-whom=main", f"--signal={signal}", self.name)
        until(lambda: self.main_pid != pid, f"{self.name} survives {signal}")

    def show(self, name: str) -> str:
        """One of its properties, as systemd has it now."""
        return run("systemctl", "show", f"--property={name}", "--value", self.name).rstrip("\n")

    def time(self, name: str) -> datetime:
        """One of its timestamps, to the microsecond."""
        shown = run(
            "systemctl", "show", "--timestamp=us+utc", f"--property={name}", "--value", self.name
        )
        return datetime.strptime(shown.strip(), "%a %Y-%m-%d %H:%M:%S.%f UTC").replace(tzinfo=UTC)

    @property
    def active(self) -> str:
        """Its state: active, inactive, activating, failed …."""
        return self.show("ActiveState")

    @property
    def main_pid(self) -> int:
        """The process id of the service's main process; 0 while there is none."""
        return int(self.show("MainPID"))

    @property
    def stored(self) -> int:
        """How many file descriptors systemd keeps for the service."""
        return int(self.show("NFileDescriptorStore"))

    def wait_until_active(self) -> None:
        """Wait for a start that somebody else asked for: Restart=, or a client of the socket."""
        until(lambda: self.active == "active", f"{self.name} does not become active")

    def add_drop_in(self, name: str, text: str) -> None:
        """Change the unit, until ``remove_drop_ins``."""
        path = DROP_INS / f"{self.name}.d" / f"{name}.conf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        run("systemctl", "daemon-reload")

    def remove_drop_ins(self) -> None:
        folder = DROP_INS / f"{self.name}.d"
        if folder.exists():
            shutil.rmtree(folder)
            run("systemctl", "daemon-reload")


class Journal:
    """What a service wrote to standard error, from now on: lines of JSON."""

    def __init__(self, unit: Unit) -> None:
        # systemd's own lines about the unit have other fields.
        self._match = (f"_SYSTEMD_UNIT={unit.name}", "_TRANSPORT=stdout")
        shown = run("journalctl", "--quiet", "--lines=0", "--show-cursor")
        self._first = self._next = shown.partition("-- cursor: ")[2].strip()
        assert self._first

    def records(self) -> list[dict[str, Any]]:
        """All of them up to now."""
        # What a process has written may still be on its way.
        run("journalctl", "--sync")
        entries = map(json.loads, run(*self._command(self._first)).splitlines())
        return [_record(entry) for entry in entries if entry["__CURSOR"] != self._first]

    def wait_for(self, event: str, **fields: object) -> dict[str, Any]:
        """The next record of ``event``, behind the one that was waited for before."""
        seen = []
        start = self._next
        with closing(self._follow()) as entries:
            for entry in entries:
                if entry["__CURSOR"] == start:
                    continue
                self._next = entry["__CURSOR"]
                record = _record(entry)
                seen.append(record)
                if record["event"] == event and fields.items() <= record.items():
                    return record
        raise AssertionError(f"the journal does not tell of {event}, but of {seen[-5:]}")

    def _follow(self) -> Generator[dict[str, Any], None, None]:
        command = ["timeout", str(PATIENCE), *self._command(self._next), "--follow", "--no-tail"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield json.loads(line)
            finally:
                process.terminate()

    def _command(self, start: str) -> list[str]:
        # Not --after-cursor: it leaves out one entry too many where the one at the cursor is of
        # another unit. So it may come again.
        return ["journalctl", "--quiet", "--output=json", f"--cursor={start}", *self._match]


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    """The record in an entry of the journal; what is no JSON is a record of its own kind."""
    try:
        record = json.loads(entry["MESSAGE"])
    except (TypeError, ValueError):
        record = None
    if not isinstance(record, dict):
        return {"level": "error", "event": NOT_JSON, "text": entry["MESSAGE"]}
    return record
