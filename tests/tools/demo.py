"""``make run``: the daemon, and a live count of kernel functions through it.

Two steps, so that ``make`` installs qemu only where it is needed: ``--can-run-here`` says whether
this kernel has kprobe multi, and why not; without it the demonstration runs, on this very kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from kpmd.bpf.features import FEATURES
from kpmd.bpf.syscall import BpfError
from kpmd.errors import KpmdError

_NOBODY = 65534


def can_run_here() -> bool:
    """Test this machine's own kernel, and tell what came of it."""
    feature = FEATURES[0]
    answer = feature.test()
    if answer.supported:
        print(f"This machine's kernel {os.uname().release} has kprobe multi: using it.")
        return True
    print(
        f"This machine's kernel {os.uname().release} cannot: {answer.reason}.\n"
        f"{feature.name} needs kernel {feature.min_kernel} and CONFIG_FPROBE: using a VM."
    )
    return False


def _work(stop: threading.Event) -> None:
    """Something to count: a few hundred small reads and writes a second."""
    with tempfile.TemporaryFile() as scratch:
        while not stop.wait(0.01):
            with open("/proc/self/stat", "rb") as file:
                scratch.write(file.read())
            scratch.seek(0)
            scratch.truncate()


def _client_user(command: str) -> int | None:
    """The uid to run kpmctl with: nobody, where nobody can reach the interpreter."""
    if os.geteuid() != 0:
        return None
    tried = (
        subprocess.run(
            [command, "--version"],
            user=_NOBODY,
            group=_NOBODY,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
        if _reachable(command)
        else None
    )
    return _NOBODY if tried is not None and tried.returncode == 0 else None


def _reachable(command: str) -> bool:
    return all(
        parent.stat().st_mode & 0o001
        for path in (Path(command), Path(sys.executable).resolve())
        for parent in path.parents
    )


def demonstrate(seconds: int, symbols: list[str]) -> int:
    """Start kpmd, count through it as a user without privileges, stop it; kpmctl's status."""
    command = shutil.which("kpmctl", path=str(Path(sys.executable).parent)) or "kpmctl"
    with tempfile.TemporaryDirectory(prefix="kpmd-") as folder:
        os.chmod(folder, 0o755)
        socket = f"{folder}/kpmd.sock"
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kpmd", "--socket", socket, "--group", str(_NOBODY)],
            stderr=subprocess.PIPE,
        )
        stop = threading.Event()
        try:
            if not _wait_until_listening(daemon):
                return 1
            threading.Thread(target=_work, args=(stop,), daemon=True).start()
            user = _client_user(command)
            who = "nobody, without any capability" if user else f"uid {os.geteuid()}"
            print(f"kpmd (uid {os.geteuid()}) listens on {socket}; kpmctl runs as {who}.")
            arguments = [command, "--socket", socket, "count", "--duration", str(seconds), *symbols]
            print("$", "kpmctl", *arguments[3:], flush=True)
            as_user = {} if user is None else {"user": user, "group": user}
            return subprocess.run(arguments, check=False, **as_user).returncode  # type: ignore[call-overload, no-any-return]
        finally:
            stop.set()
            daemon.terminate()
            daemon.wait()


def _wait_until_listening(daemon: subprocess.Popen[bytes]) -> bool:
    assert daemon.stderr is not None
    for line in daemon.stderr:
        record = {}
        with suppress(ValueError):
            record = json.loads(line)
        if record.get("event") == "listening":
            # Read on, so that the daemon never waits for room in the pipe.
            threading.Thread(target=daemon.stderr.read, daemon=True).start()
            return True
        sys.stderr.write(line.decode(errors="replace"))
    print(f"kpmd ended with status {daemon.wait()} before it listened", file=sys.stderr)
    return False


def main() -> int:
    """Do what the arguments say; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--can-run-here", action="store_true")
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("symbols", nargs="*")
    arguments = parser.parse_args()
    if arguments.can_run_here:
        return 0 if can_run_here() else 1
    return demonstrate(arguments.seconds, arguments.symbols)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KpmdError, BpfError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(0)
