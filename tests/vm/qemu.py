"""Finds the host's programs and builds qemu's and virtiofsd's command lines."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm.errors import VmError
from tests.vm.guest import TAG

ACCEL_VARIABLE = "KPMD_VM_ACCEL"
# virtiofsd lies in no PATH; where it does lie depends on the release.
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
_PROBE_STATUS = 0x21


@dataclass(frozen=True)
class Programs:
    """The host's programs that a boot takes."""

    qemu: Path
    virtiofsd: Path
    busybox: Path


def find_programs() -> Programs:
    """Return the programs or say what is missing."""
    virtiofsd = next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), None)
    virtiofsd = virtiofsd or shutil.which("virtiofsd")
    found = {
        "qemu-system-x86_64": shutil.which("qemu-system-x86_64"),
        "virtiofsd": virtiofsd,
        "busybox": shutil.which("busybox"),
    }
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise VmError(f"{', '.join(missing)} missing; `make setup-vm` installs what is needed")
    # Resolved, as the newer daemon has a link where the older one was.
    qemu, daemon, busybox = (Path(path).resolve() for path in found.values() if path)
    return Programs(qemu, daemon, busybox)


def probe_rom() -> bytes:
    """Return a firmware image that ends qemu with a known status and does nothing else.

    A processor starts 16 bytes before the end of its address space; the code there is
    ``mov al, 0x10; out 0xf4, al; hlt``, and isa-debug-exit turns that into 2 * 0x10 + 1.
    """
    code = bytes((0xB0, _PROBE_STATUS >> 1, 0xE6, 0xF4, 0xF4))
    return (b"\xf4" * 0xFFF0 + code).ljust(0x10000, b"\xf4")


def kvm_works(qemu: Path, device: str = "/dev/kvm") -> bool:
    """Tell whether KVM runs code: some machines have the device and yet can't."""
    if not os.access(device, os.R_OK | os.W_OK):
        return False
    rom = os.memfd_create("kpmd-vm-probe")
    try:
        os.write(rom, probe_rom())
        command = [str(qemu), "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "16M",
                   "-nodefaults", "-display", "none", "-no-reboot", "-bios", f"/dev/fd/{rom}",
                   "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]  # fmt: skip
        done = subprocess.run(
            command,
            pass_fds=[rom],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=5,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        os.close(rom)
    return done.returncode == _PROBE_STATUS


def accelerator(qemu: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Return "kvm" where it works, else "tcg"; the variable decides where it is set."""
    asked = environ.get(ACCEL_VARIABLE, "")
    if asked not in ("", "kvm", "tcg"):
        raise VmError(f"{ACCEL_VARIABLE} is kvm or tcg, not {asked}")
    return asked or ("kvm" if kvm_works(qemu) else "tcg")


@dataclass(frozen=True)
class Machine:
    """Everything that decides qemu's command line; the numbers are inherited descriptors."""

    kernel: Path
    initrd_fd: int
    console_fd: int
    port_fd: int
    root_fd: int
    accel: str
    memory: str
    terminal: bool


def qemu_command(qemu: Path, machine: Machine) -> list[str]:
    """Return qemu's command line."""
    # Without erms and fsrm memory is copied by loads and stores: TCG makes `rep movsb` byte by
    # byte, which is four to six times as slow.
    speed = {
        "kvm": ["-accel", "kvm", "-cpu", "host"],
        "tcg": ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"],
    }[machine.accel]
    # A terminal must be a console; anything else goes through a plain port, which changes no
    # byte.  The number of the port gives it its name, /dev/vport0p1.
    port = "virtconsole,chardev=port" if machine.terminal else "virtserialport,chardev=port,nr=1"
    # Warnings (a WARN's trace among them) belong in the log; what is less would cost time.
    kernel_words = ["console=ttyS0", "loglevel=5", "panic=-1", "random.trust_cpu=on"]
    return [
        str(qemu),
        "-nodefaults",
        "-no-user-config",
        *["-machine", "q35", *speed],
        # One processor: two are no quicker here and panic in early boot now and then.
        *["-smp", "1", "-m", machine.memory],
        *["-object", f"memory-backend-memfd,id=memory,size={machine.memory},share=on"],
        *["-numa", "node,memdev=memory"],
        *["-nic", "none", "-vga", "none", "-display", "none", "-no-reboot"],
        *["-kernel", str(machine.kernel), "-initrd", f"/dev/fd/{machine.initrd_fd}"],
        *["-append", " ".join(kernel_words)],
        *["-chardev", f"file,id=console,path=/dev/fd/{machine.console_fd}"],
        *["-serial", "chardev:console"],
        *["-chardev", f"socket,id=port,fd={machine.port_fd}"],
        *["-device", "virtio-serial-pci", "-device", port],
        *["-chardev", f"socket,id=root,fd={machine.root_fd}"],
        *["-device", f"vhost-user-fs-pci,chardev=root,tag={TAG}"],
    ]


def virtiofsd_command(virtiofsd: Path, listener_fd: int) -> list[str]:
    """Return the command line of the daemon that serves the root folder."""
    if virtiofsd.parent.name == "qemu":  # the older one, in C
        options = ["-o", "source=/,cache=always,sandbox=chroot,log_level=err", "-f"]
    else:
        options = ["--shared-dir=/", "--cache=always", "--sandbox=chroot", "--log-level=error"]
    return [str(virtiofsd), f"--fd={listener_fd}", *options]


def launched(command: Sequence[str], plan: str = "null") -> list[str]:
    """Wrap a command line so that the process dies with this one (see ``launch.py``)."""
    script = Path(__file__).with_name("launch.py")
    return [sys.executable, "-IS", str(script), str(os.getpid()), plan, *command]
