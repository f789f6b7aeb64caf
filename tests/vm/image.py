"""Kernel images and initramfs archives: unpacking the one, making the other."""

import lzma
import stat
import struct
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

from tests.vm.errors import VmError

_ELF = b"\x7fELF"


def extract_vmlinux(vmlinuz: bytes) -> bytes:
    """Return the ELF kernel inside a bzImage.

    qemu boots it directly (PVH), which spares the guest unpacking it by emulated code.
    """
    if vmlinuz[:4] == _ELF:
        return vmlinuz
    if vmlinuz[0x202:0x206] != b"HdrS":
        raise VmError("this is not a Linux kernel image")
    # The boot protocol's header says where the compressed payload is.
    setup_sectors = vmlinuz[0x1F1] or 4
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    kernel = _decompress(vmlinuz[start : start + length])
    if kernel[:4] != _ELF:
        raise VmError("the kernel image's payload is not an ELF file")
    return kernel


def _decompress(payload: bytes) -> bytes:
    # The build appends the uncompressed size (4 bytes) to the stream, so each of these must
    # bear something after its end.
    if payload[:2] == b"\x1f\x8b":
        return zlib.decompressobj(wbits=31).decompress(payload)
    if payload[:6] == b"\xfd7zXZ\x00":
        return lzma.LZMADecompressor().decompress(payload)
    if payload[:4] == b"\x28\xb5\x2f\xfd":
        return _piped(["zstd", "-dcq"], payload[:-4])
    if payload[:4] == b"\x02\x21\x4c\x18":
        return _piped(["lz4", "-dcq"], payload[:-4])
    raise VmError(f"the kernel is compressed in an unknown way (starts {payload[:6].hex()})")


def _piped(command: list[str], data: bytes) -> bytes:
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise VmError(f"{command[0]} is missing; `make setup-vm` installs it") from error
    if done.returncode:
        raise VmError(f"{command[0]} can't unpack: {done.stderr.decode(errors='replace')}")
    return done.stdout


class Cpio:
    """An initramfs in the making: the "newc" format, kept in memory."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def folder(self, name: str) -> None:
        """Add a folder."""
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file."""
        self._add(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        """Add /dev/console, which the kernel opens for init before anything is mounted."""
        self._add("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))

    def data(self) -> bytes:
        """Return the finished archive."""
        return b"".join(self._parts) + _entry(0, "TRAILER!!!", 0, b"", (0, 0))

    def _add(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        self._parts.append(_entry(self._inode, name, mode, data, device))


def _entry(inode: int, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    encoded = name.encode() + b"\0"
    numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def modules_to_load(modules: Path, wanted: Iterable[str]) -> list[Path]:
    """Return the files of these modules and of what they need, in the order to load them.

    What is built into the kernel needs no file and is left out; so is what it doesn't have
    (older kernels lack some of the parts that newer ones are made of).
    """
    needs: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in (modules / "modules.dep").read_text(encoding="utf-8").splitlines():
        path, _, rest = line.partition(":")
        name = _module_name(path)
        paths[name] = path
        # modules.dep names what to load first last.
        needs[name] = [_module_name(need) for need in reversed(rest.split())]
    order: list[str] = []
    for name in wanted:
        if name in paths:
            order += [need for need in [*needs[name], name] if need not in order]
    return [modules / paths[name] for name in order]


def read_module(path: Path) -> bytes:
    """Return a module's ELF file: busybox's insmod must not have to unpack it."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return zlib.decompress(data, wbits=31)
    if path.suffix == ".zst":
        return _piped(["zstd", "-dcq"], data)
    return data


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")
