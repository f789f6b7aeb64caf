"""Boots a machine, carries the command's output out of it, and cleans up.

Nothing of a boot is a file: the initramfs and the console's log are memory files, the
connections are inherited sockets.  So a tool that is killed leaves nothing behind; its
processes die with it (``launch.py``).
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm import guest, qemu, systemd, tree
from tests.vm.errors import VmError
from tests.vm.kernels import Cached
from tests.vm.signals import Stopped
from tests.vm.stream import Keys, Reader

TIMED_OUT = 124  # as timeout(1) says it
NO_STATUS = 125
BOOT_LIMIT = 60.0
SYSTEMD_BOOT_LIMIT = 180.0
CONSOLE_LINES = 100


@dataclass(frozen=True)
class Job:
    """A command to run in a machine; ``system`` is the root of one with a real systemd."""

    kernel: Cached
    project: Path
    command: tuple[str, ...]
    memory: str = "1G"
    timeout: float | None = None
    as_user: bool = False
    terminal: bool = False
    shell: bool = False
    system: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a boot ended; ``status`` is None where the guest gave none."""

    status: int | None
    started: bool
    timed_out: bool
    console: str


def run(job: Job, report: Callable[[str], None]) -> int:
    """Run the job; return the command's status or one of the tool's own."""
    programs = qemu.find_programs()
    if os.geteuid() != 0:
        raise VmError("only root can share the machine's root folder with a guest; use sudo")
    accel = qemu.accelerator(programs.qemu)
    outcome = _boot(job, programs, accel)
    if outcome.status is None and not outcome.started:
        # An emulated machine panics in early boot now and then; the command hasn't run yet.
        report(f"the guest never reached the command; trying again\n{outcome.console}")
        outcome = _boot(job, programs, "tcg")
    if outcome.status is not None:
        return outcome.status
    if outcome.timed_out and outcome.started:
        report(f"{outcome.console}\nthe command ran for more than {job.timeout:g} s: killed")
        return TIMED_OUT
    where = "while the command ran" if outcome.started else "before the command could run"
    report(f"{outcome.console}\nthe guest ended {where}, without a status")
    return TIMED_OUT if outcome.timed_out else NO_STATUS


def _boot(job: Job, programs: qemu.Programs, accel: str) -> Outcome:
    with ExitStack() as stack:
        nonce = os.urandom(12).hex()
        needed = tree.needed_folders(job.project)
        task = guest.Task(
            command=job.command,
            folder=str(job.project),
            environment=guest.default_environment(str(job.project), os.environ, job.terminal),
            nonce=nonce,
            terminal=_terminal_size() if job.terminal else None,
            as_user=job.as_user,
        )
        initrd = _memory_file(stack, "initramfs")
        os.write(initrd, _initramfs(job, task, programs.busybox, needed))
        console = _memory_file(stack, "console")
        log = _memory_file(stack, "log")
        shown = [*needed, str(job.system)] if job.system else needed
        steps = tree.plan(shown, str(job.kernel.modules), job.kernel.release)
        plan = json.dumps([step.plain() for step in steps])
        root = _start_virtiofsd(stack, programs.virtiofsd, plan, log)
        port, port_in_qemu = socket.socketpair()
        stack.enter_context(port)
        stack.enter_context(port_in_qemu)
        machine = qemu.Machine(
            kernel=job.kernel.vmlinux,
            initrd_fd=initrd,
            console_fd=console,
            port_fd=port_in_qemu.fileno(),
            root_fd=root.fileno(),
            accel=accel,
            memory=job.memory,
            terminal=job.terminal,
        )
        inherited = [initrd, console, port_in_qemu.fileno(), root.fileno()]
        _start(stack, qemu.qemu_command(programs.qemu, machine), inherited, log)
        port_in_qemu.close()
        root.close()
        reader = Reader(nonce)
        timed_out = _carry(stack, job, port, reader)
        return Outcome(reader.status, reader.started, timed_out, _tail(log, console))


def _initramfs(job: Job, task: guest.Task, busybox: Path, needed: list[str]) -> bytes:
    if job.system is None:
        return guest.initramfs(task, busybox, job.kernel.modules, tree.hidden(needed))
    return systemd.initramfs(task, busybox, job.kernel, job.system, tree.inside(needed))


def _terminal_size() -> tuple[int, int]:
    size = os.get_terminal_size(sys.stdin.fileno())
    return size.columns, size.lines


def _memory_file(stack: ExitStack, name: str) -> int:
    fd = os.memfd_create(f"kpmd-vm-{name}")
    stack.callback(os.close, fd)
    return fd


def _start_virtiofsd(stack: ExitStack, program: Path, plan: str, log: int) -> socket.socket:
    """Start the daemon and return a connection to it."""
    with socket.socket(socket.AF_UNIX) as listener:
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        # The daemon serves the first one who connects, all of the root folder as root: connect
        # before it runs, in a private folder, and take the name away.
        with tempfile.TemporaryDirectory(prefix="kpmd-vm-") as folder:
            listener.bind(f"{folder}/socket")
            listener.listen(1)
            client.connect(f"{folder}/socket")
        command = qemu.virtiofsd_command(program, listener.fileno())
        _start(stack, command, [listener.fileno()], log, plan)
    return client


def _start(
    stack: ExitStack, command: list[str], inherited: list[int], log: int, plan: str = "null"
) -> None:
    process = subprocess.Popen(
        qemu.launched(command, plan),
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        # Ctrl-C on the terminal is for this process, which then ends the others.
        start_new_session=True,
    )
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _carry(stack: ExitStack, job: Job, port: socket.socket, reader: Reader) -> bool:
    """Pass output and keys until the guest gave its status or ended; tell if time ran out."""
    limit = SYSTEMD_BOOT_LIMIT if job.system else BOOT_LIMIT
    deadline: float | None = time.monotonic() + limit
    keys = Keys(impatient=not job.shell)
    watched: list[socket.socket | int] = [port]
    while reader.status is None:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(watched, [], [], wait)
        if not ready:
            _write(reader.rest())
            return True
        if port in ready:
            had_started = reader.started
            data = _receive(port)
            _write(reader.feed(data) if data else reader.rest())
            if not data:
                return False
            if reader.started and not had_started:
                deadline = None if job.timeout is None else time.monotonic() + job.timeout
                if job.terminal:
                    stack.enter_context(_raw_terminal())
                    watched.append(sys.stdin.fileno())
        if sys.stdin.fileno() in ready:
            port.sendall(keys.feed(os.read(sys.stdin.fileno(), 4096)))
            if keys.leave:
                raise Stopped(signal.SIGINT)
    return False


def _receive(port: socket.socket) -> bytes:
    try:
        return port.recv(1 << 16)
    except ConnectionResetError:
        return b""


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Give all keys to the guest (also Ctrl-C) for the time of the block."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _tail(log: int, console: int) -> str:
    """Return the last of what the processes and the guest's kernel said."""
    lines: list[str] = []
    for fd in (log, console):
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        lines += data.decode(errors="replace").replace("\r", "").splitlines()[-CONSOLE_LINES:]
    return "\n".join(lines) or "(the guest's kernel said nothing)"
