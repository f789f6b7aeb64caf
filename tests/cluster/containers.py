"""Containers of one image, run by crun as a node's runtime runs them."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster.podspec import Json, Node, container, written

#: Seconds. Python takes some to start where the processor is emulated.
PATIENCE = 120.0

_CRUN = ("crun", "--cgroup-manager=cgroupfs")


class Container:
    """A running container; its standard output and error come line by line."""

    def __init__(self, name: str, pod: Json, which: str, node: Node) -> None:
        """``name``: for crun; ``which`` of the pod's containers."""
        self.name = name
        self.config = container(pod, node, which)
        self._bundle = tempfile.TemporaryDirectory(prefix=f"{name}-")
        folder = written(self.config, Path(self._bundle.name))
        self.process = subprocess.Popen(
            [*_CRUN, "run", "--bundle", str(folder), name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, text: str) -> str:
        """The next line that has it; fails where the container ends, or takes too long."""
        deadline = time.monotonic() + PATIENCE
        with suppress(queue.Empty):
            while (
                line := self._lines.get(timeout=max(0, deadline - time.monotonic()))
            ) is not None:
                self.said.append(line)
                if text in line:
                    return line
        raise AssertionError(f"{self.name} did not say {text!r}: {self.said}")

    def end(self) -> tuple[int, str]:
        """Wait for its end; its exit status, and all that it said."""
        status = self.process.wait(PATIENCE)
        self._reader.join()
        while (line := self._lines.get()) is not None:
            self.said.append(line)
        self.close()
        return status, "".join(self.said)

    @property
    def pid(self) -> int:
        """Of its first process, once that is there."""
        deadline = time.monotonic() + PATIENCE
        while True:
            shown = subprocess.run(
                [*_CRUN, "state", self.name], check=False, capture_output=True, text=True
            )
            if shown.returncode == 0:
                found: dict[str, Any] = json.loads(shown.stdout)
                if found["status"] == "running":
                    return int(found["pid"])
            assert time.monotonic() < deadline, shown.stderr
            time.sleep(0.1)

    def execute(self, *command: str) -> tuple[int, str]:
        """Run a command in it, as ``kubectl exec`` and probes do."""
        process = self.config["process"] | {"args": list(command)}
        file = Path(self._bundle.name) / "exec.json"
        file.write_text(json.dumps(process), encoding="utf-8")
        done = subprocess.run(
            [*_CRUN, "exec", "--process", str(file), self.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def kill(self, signal: str = "KILL", *options: str) -> None:
        """Send a signal to its first process; with ``--all``, to all of its processes."""
        command = [*_CRUN, "kill", *options, self.name, signal]
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """Kill it, if it runs still, and forget it."""
        if self.process.poll() is None:
            self.kill("KILL", "--all")  # without a PID namespace none ends with the first
            self.process.wait(PATIENCE)
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._bundle.cleanup()
