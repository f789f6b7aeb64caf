"""What the guest is where its process 1 is a real systemd.

Its root is a Debian of its own (``debian.py``) below an overlay: all of it can be written, into the
guest's memory, and is gone with the guest.  This machine's root stands beside it on /host until
systemd starts; the folders that the project takes are bound from there, at the same paths.

systemd boots to a target of the tool's own.  That is a target of the system like any other, reached
by way of sysinit.target and basic.target; only what has nothing to do in such a guest and takes its
time by emulation is masked.  The command is one more service, so that it runs beside what it
starts and stops, and all it does to systemd is done as an administrator does it.
"""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from tests.vm import guest
from tests.vm.image import Cpio
from tests.vm.kernels import Cached
from tests.vm.tree import Step, route

MODULES = (*guest.MODULES, "overlay")
TARGET = "kpmd-vm.target"
SERVICE = "kpmd-vm.service"
# Any will do, but there must be one: without it systemd takes this for the first boot ever and
# enables everything that can be.
_MACHINE_ID = "6b706d642d766d000000000000000000"
_MASKED = (
    # Clocks, disks, consoles and passwords that the guest does not have.
    *("timers.target", "cryptsetup.target", "integritysetup.target", "veritysetup.target"),
    *("systemd-ask-password-console.path", "systemd-ask-password-wall.path"),
    *("systemd-pstore.service", "systemd-repart.service", "systemd-firstboot.service"),
    *("systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-initctl.socket"),
    # What would be kept for the next boot.
    *("systemd-random-seed.service", "systemd-machine-id-commit.service"),
    *("systemd-journal-flush.service", "systemd-update-utmp.service"),
    # Devices and modules: devtmpfs has made the ones, the first script has loaded the others.
    *("systemd-udevd.service", "systemd-udev-trigger.service", "kmod-static-nodes.service"),
    *("systemd-modules-load.service", "systemd-tmpfiles-setup-dev.service"),
    *("proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-config.mount"),
    "sys-fs-fuse-connections.mount",
    # Users of the packages were made with the root folder.
    "systemd-sysusers.service",
    # Nobody logs in, nor is there a network.
    *("systemd-logind.service", "systemd-networkd.service", "systemd-networkd.socket"),
)


def units() -> dict[str, str]:
    """Return the tool's own units."""
    return {
        TARGET: f"""\
[Unit]
Description=What the VM was booted for
Requires=basic.target
After=basic.target
Wants={SERVICE}
""",
        # What goes wrong before the command runs is told on the console, which the tool shows.
        SERVICE: f"""\
[Unit]
Description=The command that the VM was booted for

[Service]
Type=exec
ExecStart={guest.FOLDER}/busybox sh {guest.FOLDER}/second
StandardInput=null
StandardOutput=journal+console
OOMPolicy=continue
TasksMax=infinity
""",
    }


def first_script(modules: Iterable[str], root: str, steps: Iterable[Step]) -> str:
    """Return the initramfs's init; ``root`` is where the guest's root lies on this machine."""
    place = f"{route('/lib').real}/modules"
    options = "lowerdir=/lower,upperdir=/changes/upper,workdir=/changes/work"
    lines = [
        *guest.show_host(modules),
        # By another name, as an overlay's options take no path as it is.
        f"mount --bind /host{shlex.quote(root)} /lower",
        "mount -t tmpfs -o mode=755 tmpfs /changes",
        "mkdir /changes/upper /changes/work",
        f"mount -t overlay -o {options} overlay /root",
        # systemd mounts what is missing; these it would mount too late: folders are shown in them.
        "mount -t devtmpfs dev /root/dev",
        "mkdir /root/dev/shm",
        "mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /root/dev/shm",
        "mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /root/run",
        "mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /root/tmp",
        "cp -a /run/. /root/run/",
        f"cp /bin/busybox /second /root{guest.FOLDER}/",
        f"echo {guest.HOSTNAME} >/root/etc/hostname",
        f"echo {_MACHINE_ID} >/root/etc/machine-id",
        # Newer than /usr: nothing is to be brought up to date in /etc and /var.
        ": >/root/etc/.updated",
        ": >/root/var/.updated",
        "mkdir -p /root/usr/lib/modules",
        f"mount --bind /host{place} /root/usr/lib/modules",
        *(line for step in steps for line in _show(step)),
        # What it tells of the boot is shown where that fails.
        "export SYSTEMD_COLORS=0",
        f"exec switch_root -c /dev/console /root /lib/systemd/systemd --unit={TARGET}",
    ]
    return "\n".join(lines) + "\n"


def _show(step: Step) -> list[str]:
    path = shlex.quote(step.path)
    parents = shlex.join(f"/root{parent}" for parent in list(Path(step.path).parents)[:-1])
    if step.do == "link":
        quoted = shlex.quote(step.source)
        made = (
            f"mkdir -p /root{shlex.quote(os.path.dirname(step.path))} && ln -s {quoted} /root{path}"
        )
        # It is there already where it lies in a folder that was bound.
        return [f"[ -e /root{path} ] || [ -L /root{path} ] || {{ {made}; }}"]
    lines = [f"mkdir -p /root{path}"]
    if parents:
        lines.append(f"chmod a+x {parents}")  # /root, as a rule: nobody must get through
    return [*lines, f"mount --bind /host{path} /root{path}"]


def second_script(task: guest.Task) -> str:
    """Return what the command's service runs."""
    # What the command started through systemd has a cgroup of its own, and does not hold the pipe.
    processes = f"/sys/fs/cgroup/system.slice/{SERVICE}/cgroup.procs"
    return f"others() {{ cat {processes}; }}\n" + guest.command_script(task)


def generators(root: Path) -> list[str]:
    """Return the names of the programs that make units of fstab and the like."""
    return sorted(path.name for path in root.glob("usr/lib/systemd/system-generators/*"))


def initramfs(
    task: guest.Task, busybox: Path, kernel: Cached, root: Path, steps: Iterable[Step]
) -> bytes:
    """Return the archive to boot with; ``steps`` show this machine's folders (``tree.inside``)."""
    archive = Cpio()
    names = guest.add_tools(archive, busybox, kernel.modules, MODULES)
    archive.file("init", first_script(names, str(root), steps).encode(), 0o755)
    archive.file("second", second_script(task).encode())
    for folder in ("lower", "changes", "run", guest.FOLDER[1:], "run/systemd",
                   "run/systemd/system", "run/systemd/system-generators"):  # fmt: skip
        archive.folder(folder)
    for name, text in units().items():
        archive.file(f"run/systemd/system/{name}", text.encode())
    for name in _MASKED:
        archive.symlink(f"run/systemd/system/{name}", "/dev/null")
    # They have nothing to find here, and each daemon-reload would wait for all of them.
    for name in generators(root):
        archive.symlink(f"run/systemd/system-generators/{name}", "/dev/null")
    return archive.data()
