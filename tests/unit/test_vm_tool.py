"""The VM tool's pure parts; nothing is booted or downloaded here."""

import gzip
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.vm import guest, kernels, qemu, sources, tree
from tests.vm.__main__ import split_command
from tests.vm.errors import VmError
from tests.vm.image import Cpio, extract_vmlinux, modules_to_load
from tests.vm.stream import Keys, Reader

DEB822 = """\
# the main archive
Types: deb deb-src
# URIs: http://old.example/debian
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites:
 bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://disabled.example/debian
Suites: trixie
Components: main
"""

ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb-src http://source.example/debian bookworm main
deb [arch=amd64 signed-by=/x.gpg] https://third.example/tools bookworm main
deb http://mirror.example/debian bookworm main non-free # the archive
deb\thttp://security.example/debian-security bookworm-security main
deb https://docker.example/linux/debian bookworm stable
"""


def test_mirror_from_deb822() -> None:
    found = sources.find_mirror(sources.parse_deb822(DEB822))
    assert found.main == "http://mirror.example/debian"
    assert found.security == "http://mirror.example/debian-security"


def test_mirror_from_one_line() -> None:
    found = sources.find_mirror(sources.parse_one_line(ONE_LINE))
    assert found.main == "http://mirror.example/debian"
    assert found.security == "http://security.example/debian-security"


def test_mirror_without_security() -> None:
    source = sources.Source("http://m.example/debian", ("trixie",), ("main",))
    assert sources.find_mirror([source]).security == "http://m.example/debian-security"


def test_mirror_file_is_kept_as_it_is() -> None:
    source = sources.Source("mirror+file:/etc/apt/mirrors/debian.list", ("trixie",), ("main",))
    assert sources.find_mirror([source]).main == source.uri


def test_no_mirror() -> None:
    other = sources.Source("http://u.example/ubuntu", ("noble",), ("main",))
    with pytest.raises(VmError, match="KPMD_VM_MIRROR"):
        sources.find_mirror([other])


def test_mirror_of_a_machine(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    with pytest.raises(VmError):
        sources.mirror({}, tmp_path)
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    assert sources.mirror({}, tmp_path).main == "http://mirror.example/debian"
    named = sources.mirror({"KPMD_VM_MIRROR": "http://mine.example/debian/"}, tmp_path)
    assert named.security == "http://mine.example/debian-security"


def test_sources_list(tmp_path: Path) -> None:
    mirror = sources.Mirror("http://a.example/debian", "http://b.example/debian-security")
    text = sources.sources_list(mirror, ["bookworm", "bookworm-security"], tmp_path / "none")
    assert text.splitlines() == [
        "deb http://a.example/debian bookworm main",
        "deb http://b.example/debian-security bookworm-security main",
    ]


@pytest.mark.parametrize(
    ("kernel", "names", "release"),
    [
        (
            "6.12",
            [
                "linux-image-6.12-cloud-amd64",
                "linux-image-6.12.9+deb12-cloud-amd64",
                "linux-image-6.12.117+deb12-cloud-amd64",
                "linux-image-6.12.118+deb12-cloud-amd64-unsigned",
                "linux-image-6.12.119+deb12-amd64",
            ],
            "6.12.117+deb12-cloud-amd64",
        ),
        (
            "6.1",
            ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-56-cloud-amd64"],
            "6.1.0-56-cloud-amd64",
        ),
        (
            "7.3",
            [
                "linux-binary-6.19.14+deb13-cloud-amd64",
                "linux-binary-7.3.4+deb13-cloud-amd64",
                "linux-binary-7.10.1+deb13-cloud-amd64",
                "linux-binary-unsigned-7.11.1+deb13-cloud-amd64",
            ],
            "7.10.1+deb13-cloud-amd64",
        ),
    ],
)
def test_newest(kernel: str, names: list[str], release: str) -> None:
    found = kernels.newest(names, kernels.KERNELS[kernel].pattern)
    assert found is not None
    assert found[1] == release
    assert found[0] in names


def test_nothing_newest() -> None:
    assert kernels.newest(["linux-image-amd64"], kernels.KERNELS["6.1"].pattern) is None


def test_command_line() -> None:
    words = ["run", "--user", "--", "sh", "-c", "x", "--", "y"]
    assert split_command(words) == (["run", "--user"], ("sh", "-c", "x", "--", "y"))
    assert split_command(["list"]) == (["list"], ())


def test_cache_folder() -> None:
    assert kernels.cache_folder({"KPMD_VM_CACHE": "/c"}) == Path("/c")
    assert kernels.cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/kpmd-vm")


def _machine(accel: str = "tcg", *, terminal: bool = False) -> qemu.Machine:
    return qemu.Machine(Path("/k/vmlinux"), 7, 8, 9, 10, accel, "2G", terminal)


def test_qemu_command() -> None:
    command = qemu.qemu_command(Path("/bin/qemu"), _machine())
    text = " ".join(command)
    assert command[0] == "/bin/qemu"
    assert "-accel tcg,thread=multi -cpu max" in text
    assert "-m 2G -object memory-backend-memfd,id=memory,size=2G,share=on" in text
    assert "-initrd /dev/fd/7" in text
    assert "path=/dev/fd/8" in text
    assert "socket,id=port,fd=9" in text
    assert "socket,id=root,fd=10" in text
    assert "virtserialport,chardev=port,nr=1" in command
    assert "-no-reboot" in command
    assert "panic=-1" in command[command.index("-append") + 1]


def test_qemu_command_variants() -> None:
    command = qemu.qemu_command(Path("/bin/qemu"), _machine("kvm", terminal=True))
    assert "-accel kvm -cpu host" in " ".join(command)
    assert "virtconsole,chardev=port" in command


def test_virtiofsd_commands() -> None:
    old = qemu.virtiofsd_command(Path("/usr/lib/qemu/virtiofsd"), 5)
    new = qemu.virtiofsd_command(Path("/usr/libexec/virtiofsd"), 5)
    assert "--fd=5" in old
    assert "--fd=5" in new
    assert any("cache=always" in word for word in old)
    assert "--cache=always" in new


def test_accelerator_is_checked() -> None:
    assert qemu.accelerator(Path("/none"), {"KPMD_VM_ACCEL": "tcg"}) == "tcg"
    with pytest.raises(VmError):
        qemu.accelerator(Path("/none"), {"KPMD_VM_ACCEL": "hvf"})
    assert not qemu.kvm_works(Path("/none"), "/nowhere/kvm")


def test_probe_rom_starts_where_a_processor_does() -> None:
    rom = qemu.probe_rom()
    assert len(rom) == 0x10000
    assert rom[0xFFF0:0xFFF5] == b"\xb0\x10\xe6\xf4\xf4"


def _task(**changes: object) -> guest.Task:
    values: dict[str, object] = {
        "command": ("printf", "%s", "it's"),
        "folder": "/work dir",
        "environment": {"HOME": "/tmp/home"},
        "nonce": "abc",
    }
    return guest.Task(**{**values, **changes})  # type: ignore[arg-type]


def test_first_script() -> None:
    lines = guest.first_script(["virtio.ko"], ["/tmp/a b"]).splitlines()
    assert lines.index("mount -t devtmpfs dev /dev") < lines.index("insmod /modules/virtio.ko")
    hides = lines.index("mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /root/tmp")
    assert hides < lines.index("mkdir -p /root'/tmp/a b'")
    assert "mount --bind /host'/tmp/a b' /root'/tmp/a b'" in lines
    assert lines[-1].startswith("exec switch_root")


@pytest.mark.parametrize("terminal", [None, (80, 24)])
@pytest.mark.parametrize("as_user", [False, True])
def test_second_script_is_shell(terminal: tuple[int, int] | None, as_user: bool) -> None:
    script = guest.second_script(_task(terminal=terminal, as_user=as_user))
    checked = subprocess.run(["/bin/sh", "-n"], input=script, text=True, check=False)
    assert checked.returncode == 0
    assert ("setpriv" in script) is as_user
    assert ("/dev/hvc0" in script) is (terminal is not None)


def test_environment() -> None:
    outside = {"TERM": "xterm", "CI": "true", "SECRET": "1"}
    inside = guest.default_environment("/p", outside, terminal=False)
    assert inside["PATH"].startswith("/p/.venv/bin:")
    assert inside["TERM"] == "dumb"
    assert inside["CI"] == "true"
    assert "SECRET" not in inside


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder like a home that only its owner may enter."""
    home = tmp_path / "home"
    (home / "project" / "kpmd").mkdir(parents=True)
    (home / "lib" / "modules").mkdir(parents=True)
    (home / "secret").write_text("x")
    home.chmod(0o700)
    return home


def _plan(home: Path, *folders: Path) -> list[tuple[str, str]]:
    steps = tree.plan(map(str, folders), "/cache/m", "6.1", lib=str(home / "lib"))
    assert steps[-1] == tree.Step("bind", f"{home}/lib/modules/6.1", "/cache/m")
    inside = [(step.do, step.path) for step in steps if str(home) in step.path]
    return inside[:-2]


def test_plan_opens_a_private_home(home: Path) -> None:
    project = home / "project"
    steps = _plan(home, project)
    assert steps[-1] == ("bind", str(project))
    # pytest's folder is private further up: then that one is what gets covered.
    assert steps[:-1] in ([], [("tmpfs", str(home))])


def test_plan_opens_a_private_project_whole(home: Path) -> None:
    project = home / "project"
    project.chmod(0o700)
    steps = _plan(home, project)
    assert ("tmpfs", str(project)) in steps
    assert ("bind", str(project / "kpmd")) in steps
    # A second folder inside of it must not cover it again.
    assert _plan(home, project, project / "kpmd").count(("tmpfs", str(project))) == 1


def test_plan_keeps_links_on_the_way(home: Path) -> None:
    (home / "link").symlink_to("project")
    steps = tree.plan([str(home / "link" / "kpmd")], "/m", "6.1", lib=str(home / "lib"))
    assert tree.Step("link", str(home / "link"), "project") in steps
    assert tree.Step("bind", f"{home}/project/kpmd", f"{home}/project/kpmd") in steps


def test_plan_of_an_open_folder_mounts_only_modules() -> None:
    steps = tree.plan(["/usr/bin"], "/m", "6.1", lib="/")
    assert [step for step in steps if step.path.startswith("/usr/")] == []


def test_route_follows_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a/../a")
    found = tree.route(f"{tmp_path}/b/./c")
    assert found.real == f"{tmp_path.resolve()}/a/c"
    assert (f"{tmp_path.resolve()}/b", "a/../a") in found.links
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(VmError, match="links"):
        tree.route(f"{tmp_path}/loop")


def test_hidden() -> None:
    assert tree.hidden(["/tmp/foo", "/tmp/foo/.venv", "/srv/x", "/tmpfoo"]) == ["/tmp/foo"]


def test_reader_holds_back_what_may_be_a_mark() -> None:
    start, end = guest.start_mark("n"), guest.end_mark("n")
    whole = b"noise" + start + b"out\0put\xff" + end + b"77\0"
    for size in (1, 2, 3, 7, len(whole)):
        reader = Reader("n")
        output = b"".join(reader.feed(whole[at : at + size]) for at in range(0, len(whole), size))
        assert output == b"out\0put\xff"
        assert reader.status == 77


@pytest.mark.parametrize("status", [0, 1, 77, 255])
def test_reader_decodes_status(status: int) -> None:
    reader = Reader("n")
    assert reader.feed(guest.start_mark("n")) == b""
    assert reader.started
    assert reader.status is None
    reader.feed(guest.end_mark("n") + str(status).encode() + b"\0")
    assert reader.status == status


def test_reader_gives_the_rest_when_the_guest_dies() -> None:
    reader = Reader("n")
    assert reader.feed(b"boot " + guest.start_mark("n") + b"half\0kpmd") == b"half"
    assert reader.rest() == b"\0kpmd"
    assert reader.status is None
    assert Reader("n").rest() == b""


def test_another_runs_mark_is_output() -> None:
    reader = Reader("n")
    other = guest.end_mark("other") + b"0\0"
    assert reader.feed(guest.start_mark("n") + other) + reader.rest() == other
    assert reader.status is None


def test_keys() -> None:
    keys = Keys(impatient=True)
    assert keys.feed(b"a\x03b", 1.0) == b"a\x03b"
    assert keys.feed(b"\x03", 5.0) == b"\x03"
    assert not keys.leave
    assert keys.feed(b"\x03", 5.5) == b""
    assert keys.leave


def test_escape_key() -> None:
    keys = Keys(impatient=False)
    assert keys.feed(b"\x03\x03\x01\x01\x01y", 1.0) == b"\x03\x03\x01\x01y"
    assert not keys.leave
    assert keys.feed(b"\x01") == b""
    assert keys.feed(b"x") == b""
    assert keys.leave


def test_vmlinux_must_be_a_kernel() -> None:
    assert extract_vmlinux(b"\x7fELF...") == b"\x7fELF..."
    with pytest.raises(VmError, match="not a Linux kernel"):
        extract_vmlinux(bytes(4096))


def test_vmlinux_from_bzimage() -> None:
    payload = gzip.compress(b"\x7fELF kernel") + b"\x0b\0\0\0"
    image = bytearray(2048)
    image[0x202:0x206] = b"HdrS"
    image[0x1F1] = 1
    image[0x248:0x250] = (64).to_bytes(4, "little") + len(payload).to_bytes(4, "little")
    image[1024 + 64 : 1024 + 64 + len(payload)] = payload
    assert extract_vmlinux(bytes(image)) == b"\x7fELF kernel"
    image[1024 + 64] = 0
    with pytest.raises(VmError, match="unknown way"):
        extract_vmlinux(bytes(image))


def test_cpio_is_understood(tmp_path: Path) -> None:
    archive = Cpio()
    archive.folder("bin")
    archive.file("bin/tool", b"#!x", 0o755)
    archive.symlink("bin/alias", "tool")
    command = ["cpio", "-idm", "--quiet"]
    subprocess.run(command, input=archive.data(), cwd=tmp_path, check=True)
    assert (tmp_path / "bin" / "tool").read_bytes() == b"#!x"
    assert stat.S_IMODE((tmp_path / "bin" / "tool").stat().st_mode) == 0o755
    assert os.readlink(tmp_path / "bin" / "alias") == "tool"


def test_modules_in_order(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz kernel/v/virtio.ko.xz\n"
        "kernel/fs/fuse/fuse.ko.xz:\n"
        "kernel/v/virtio-pci.ko: kernel/v/virtio.ko.xz kernel/v/virtio_ring.ko\n"
        "kernel/v/virtio.ko.xz:\n"
        "kernel/v/virtio_ring.ko:\n"
    )
    found = modules_to_load(tmp_path, ["virtio_pci", "virtio_console", "virtiofs"])
    names = [path.name for path in found]
    assert names == [
        "virtio_ring.ko",
        "virtio.ko.xz",
        "virtio-pci.ko",
        "fuse.ko.xz",
        "virtiofs.ko.xz",
    ]
