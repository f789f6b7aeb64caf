"""What runs in the guest before and after the command: two busybox scripts in an initramfs.

The first script mounts everything and moves to the shared root; the second is then process 1
there, runs the command and reports.  An initramfs (rather than files in the shared root) needs
no place on this machine, works for kernels whose virtio drivers are modules, and keeps busybox
in memory, which is quicker than through virtiofs.  Where process 1 is to be a real systemd, other
scripts made of the same parts take their places (``systemd.py``).

How the command's status gets out: the second script writes a mark with a random part and the
status at the end of the *same* channel that carries the command's output.  So the tool knows
that it has all of the output once it has the status, the status keeps its full range, and no
compiled helper is needed; isa-debug-exit has 7 bits, needs I/O ports (Debian's kernels have no
/dev/port) and ends qemu while output may still be under way.  Another mark says that the command
is about to run: only a boot that never got there may be tried again.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm.errors import VmError
from tests.vm.image import Cpio, modules_to_load, read_module

FOLDER = "/run/kpmd-vm"
MODULES = ("virtio_pci", "virtio_console", "virtiofs")
TAG = "rootfs"
USER = "nobody"
HOSTNAME = "kpmd-vm"
# What the first script calls, and what the second one does (it has no other busybox in PATH).
_FIRST = ("chmod", "cp", "insmod", "ln", "mkdir", "mount", "reboot", "sh", "switch_root", "usleep")
_SECOND = (
    "cat",
    "chmod",
    "chown",
    "mkdir",
    "mkfifo",
    "reboot",
    "setsid",
    "sleep",
    "stty",
    "usleep",
)


@dataclass(frozen=True)
class Task:
    """What to run in the guest."""

    command: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    nonce: str
    terminal: tuple[int, int] | None = None
    as_user: bool = False


def start_mark(nonce: str) -> bytes:
    """Return what the guest writes just before it runs the command."""
    return f"\0kpmd-vm {nonce} start\0".encode()


def end_mark(nonce: str) -> bytes:
    """Return what the guest writes after all output; the status and a NUL follow."""
    return f"\0kpmd-vm {nonce} status ".encode()


def show_host(modules: Iterable[str]) -> list[str]:
    """Return the start of the initramfs's init: this machine's root folder on /host, read-only."""
    return [
        "#!/bin/sh",
        "export PATH=/bin",
        # Before anything else: else what is written to /dev lands in the shared folder.
        "mount -t devtmpfs dev /dev",
        "mount -t proc proc /proc",
        *(f"insmod /modules/{shlex.quote(name)}" for name in modules),
        # The drivers find their devices on their own time.
        "tries=0",
        f"until mount -t virtiofs -o ro {TAG} /host 2>/dev/null; do",
        "  tries=$((tries + 1))",
        '  [ $tries -lt 500 ] || { echo "kpmd-vm: no root file system"; reboot -f; }',
        "  usleep 20000",
        "done",
    ]


def first_script(modules: Iterable[str], bring_back: Iterable[str]) -> str:
    """Return the initramfs's init; ``bring_back`` are folders that its tmpfs mounts hide."""
    lines = [
        *show_host(modules),
        # /host stays as it is, to bind from; /root becomes the guest's root.
        "mount --bind /host /root",
        "mount -t devtmpfs dev /root/dev",
        "mount -t proc proc /root/proc",
        "mount -t sysfs sys /root/sys",
        "mount -t bpf bpf /root/sys/fs/bpf",
        "mount -t tracefs tracefs /root/sys/kernel/tracing",
        "mount -t debugfs debugfs /root/sys/kernel/debug",
        "mount -t cgroup2 cgroup2 /root/sys/fs/cgroup",
        "mkdir -p /root/dev/pts /root/dev/shm",
        "mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts",
        "mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /root/dev/shm",
        "mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /root/run",
        "mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /root/tmp",
        "mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /root/var/tmp",
        "for link in fd: stdin:/0 stdout:/1 stderr:/2; do",
        "  ln -sfn /proc/self/fd${link#*:} /root/dev/${link%%:*}",
        "done",
        "mkdir -p /root/run/lock /root" + FOLDER,
        "chmod 1777 /root/run/lock",
        f"cp /bin/busybox /second /root{FOLDER}/",
    ]
    for folder in bring_back:
        quoted = shlex.quote(folder)
        lines += [f"mkdir -p /root{quoted}", f"mount --bind /host{quoted} /root{quoted}"]
    lines.append(f"exec switch_root -c /dev/console /root {FOLDER}/busybox sh {FOLDER}/second")
    return "\n".join(lines) + "\n"


def second_script(task: Task) -> str:
    """Return what is process 1 on the shared root."""
    lines = [
        f"{FOLDER}/busybox hostname {HOSTNAME}",
        f"{FOLDER}/busybox ip link set lo up",
        # Settings below /proc/sys stay the kernel's own, which are those of a running Debian:
        # unprivileged BPF off (2), perf_event_paranoid 3, kptr_restrict 0.
        # All processes but this one may be what the command left running.
        "others() { for each in /proc/[0-9]*; do echo ${each#/proc/}; done; }",
    ]
    return "\n".join(lines) + "\n" + command_script(task)


def command_script(task: Task) -> str:
    """Return what runs the command and reports; ``others`` must be defined before it.

    That is a shell function that prints the processes to end when the command has ended.
    """
    port = "/dev/hvc0" if task.terminal else "/dev/vport0p1"
    lines = [
        *(f'{name}() {{ {FOLDER}/busybox {name} "$@"; }}' for name in _SECOND),
        "mkdir -m 700 /tmp/home",
        f"chown {USER} /tmp/home" if task.as_user else ":",
        "tries=0",
        f"until [ -c {port} ]; do",
        "  tries=$((tries + 1))",
        '  [ $tries -lt 500 ] || { echo "kpmd-vm: no port for output"; reboot -f; }',
        "  usleep 20000",
        "done",
        *(_on_terminal(task, port) if task.terminal else _on_pipe(task, port)),
        # The tool ends the machine as soon as it has read the status.
        "sleep 30",
        "reboot -f",
    ]
    return "\n".join(lines) + "\n"


def _on_pipe(task: Task, port: str) -> list[str]:
    # The command writes to a pipe as it would outside a VM: unlike the port, it isn't a
    # terminal and can be opened again (/dev/stdout, by any user).
    pipe = f"{FOLDER}/output"
    return [
        f"exec 3>{port}",
        _print_start(task),
        f"mkfifo {pipe} && chmod 666 {pipe}",
        f"{FOLDER}/busybox cat <{pipe} >&3 & reader=$!",
        f"exec 4>{pipe}",
        f"{_run(task)} </dev/null >&4 2>&1 3>&- 4>&-",
        "status=$?",
        "exec 4>&-",
        # What the command left running would keep the pipe open for ever; more than one round,
        # as a process may start another while it is being killed.  A limit, as one may also
        # be stuck in the kernel: its output is through by then.
        "rounds=0",
        "while usleep 10000; kill -0 $reader 2>/dev/null && [ $rounds -lt 1000 ]; do",
        "  rounds=$((rounds + 1))",
        "  for process in $(others); do",
        "    [ $process = $$ ] || [ $process = $reader ] || kill -9 $process 2>/dev/null",
        "  done",
        "done",
        _print_status(task),
    ]


def _on_terminal(task: Task, port: str) -> list[str]:
    columns, rows = task.terminal or (80, 24)
    stty = f"{FOLDER}/busybox stty -F {port}"
    # All of it happens inside the terminal's session: when the session's first process ends, the
    # kernel hangs up the terminal and what was not yet sent is lost.
    session = [
        # Ctrl-C is for the command; a handler (unlike ignoring) is not inherited by it.
        "trap : INT QUIT",
        f"{stty} raw -echo",
        _print_start(task),
        f"{stty} sane rows {rows} cols {columns}",
        f"{_run(task)} 3>&-",
        "status=$?",
        f"{stty} raw -echo",
        _print_status(task),
        f"{FOLDER}/busybox sleep 30",
    ]
    leader = f"{FOLDER}/busybox sh -c {shlex.quote('; '.join(session))}"
    return [
        f"chown {USER} {port}" if task.as_user else ":",
        f"{FOLDER}/busybox setsid -c {leader} <>{port} >&0 2>&0 3>&0",
    ]


def _print_start(task: Task) -> str:
    return f"printf {shlex.quote(_octal(start_mark(task.nonce)))} >&3"


def _print_status(task: Task) -> str:
    return f"printf {shlex.quote(_octal(end_mark(task.nonce)))}$status'\\0' >&3"


def _run(task: Task) -> str:
    words = ["env", "-i", *(f"{name}={value}" for name, value in task.environment.items())]
    inner = f"cd {shlex.quote(task.folder)} && exec {shlex.join([*words, *task.command])}"
    outer = ["/bin/sh", "-c", inner]
    if task.as_user:
        # -c would end at a folder that only root may enter: by then it is nobody who enters.
        outer = ["/usr/bin/setpriv", "--reuid", USER, "--regid", "nogroup", "--clear-groups",
                 "--inh-caps=-all", *outer]  # fmt: skip
    return shlex.join(outer)


def _octal(data: bytes) -> str:
    return "".join(f"\\{byte:03o}" for byte in data)


def initramfs(task: Task, busybox: Path, modules: Path, bring_back: Iterable[str]) -> bytes:
    """Return the archive to boot with."""
    archive = Cpio()
    names = add_tools(archive, busybox, modules, MODULES)
    archive.file("init", first_script(names, bring_back).encode(), 0o755)
    archive.file("second", second_script(task).encode())
    return archive.data()


def add_tools(archive: Cpio, busybox: Path, modules: Path, wanted: Iterable[str]) -> list[str]:
    """Add what a first script takes; return the modules' names in the order to load them."""
    for name in ("bin", "dev", "proc", "host", "root", "modules"):
        archive.folder(name)
    archive.console()
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for name in _FIRST:
        archive.symlink(f"bin/{name}", "busybox")
    names = []
    for path in modules_to_load(modules, wanted):
        name = path.name.partition(".ko")[0] + ".ko"
        archive.file(f"modules/{name}", read_module(path))
        names.append(name)
    return names


def default_environment(project: str, outside: Mapping[str, str], terminal: bool) -> dict[str, str]:
    """Return the command's environment."""
    if "\0" in project:
        raise VmError("a path with NUL")
    environment = {
        "PATH": f"{project}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp/home",
        "TERM": outside.get("TERM", "dumb") if terminal else "dumb",
        "LANG": "C.UTF-8",
        # The project is read-only in the guest.
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        # By emulation it takes half a minute to import all that is installed for tests outside.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "pytest_asyncio.plugin,pytest_timeout",
        # Importing aiohttp reads all authorities' certificates; nothing here speaks TLS.
        "SSL_CERT_FILE": "/dev/null",
    }
    for name in ("CI", "PYTEST_ADDOPTS", "COLUMNS"):
        if name in outside:
            environment[name] = outside[name]
    return environment
