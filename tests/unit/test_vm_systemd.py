"""The VM tool's guests with a real systemd, the pure parts; nothing is booted or downloaded."""

import subprocess
from pathlib import Path

import pytest

from tests.vm import __main__, debian, guest, systemd, tree
from tests.vm.errors import VmError

STEPS = [tree.Step("bind", "/srv/a b", "/srv/a b"), tree.Step("link", "/opt/py", "../srv/a b")]


def _system(**changes: tuple[str, ...]) -> debian.System:
    values = {"suites": ("bookworm",), "packages": ("systemd", "dbus"), "options": ("--x",)}
    return debian.System(**{**values, **changes})


def test_another_debian_has_another_name() -> None:
    keys = {
        _system().key,
        _system(suites=("trixie",)).key,
        _system(packages=("systemd",)).key,
        _system(options=()).key,
    }
    assert len(keys) == 4
    assert _system().key == _system().key
    assert _system().key.startswith("bookworm-")


def test_debians_to_choose_from() -> None:
    assert debian.SYSTEMS[debian.DEFAULT].suites[0] == "bookworm"
    for name, release in (("12", "bookworm"), ("13", "trixie")):
        system = debian.SYSTEMS[name]
        assert system.suites == (release, f"{release}-updates", f"{release}-security")
        assert {"systemd", "python3", "libbpf1"} <= set(system.packages)
    assert len({system.key for system in debian.SYSTEMS.values()}) == len(debian.SYSTEMS)


@pytest.mark.parametrize("action", [["run", "--systemd"], ["shell", "--systemd"], ["fetch"]])
def test_which_debian(action: list[str]) -> None:
    parse = __main__._parser().parse_args
    assert parse(action).debian == debian.DEFAULT
    assert parse([*action, "--debian", "13"]).debian == "13"


def test_cached_debian(tmp_path: Path) -> None:
    assert debian.cached(_system(), tmp_path) is None
    folder = tmp_path / "systems" / _system().key
    folder.mkdir(parents=True)
    assert debian.cached(_system(), tmp_path) == folder
    assert debian.make(_system(), tmp_path) == folder
    assert debian.cached(_system(packages=()), tmp_path) is None


def test_command_that_makes_a_debian() -> None:
    command = debian.command(_system(), Path("/c/root"), Path("/c/sources.list"))
    assert command[-3:] == ["bookworm", "/c/root", "/c/sources.list"]
    assert "--include=systemd,dbus" in command
    assert "--x" in command
    # What it mounts must be gone with it.
    assert command[0] == "unshare"
    assert {"--mount", "--kill-child"} <= set(command)


def test_first_script() -> None:
    script = systemd.first_script(["overlay.ko"], "/c/it's", STEPS)
    assert subprocess.run(["/bin/sh", "-n"], input=script, text=True, check=False).returncode == 0
    lines = script.splitlines()
    assert lines.index("insmod /modules/overlay.ko") < lines.index(
        "mount --bind /host'/c/it'\"'\"'s' /lower"
    )
    # The guest's own mounts would hide what is shown before them.
    shown = lines.index("mount --bind /host'/srv/a b' /root'/srv/a b'")
    assert max(at for at, line in enumerate(lines) if "-t tmpfs" in line) < shown
    assert lines[shown - 2 : shown] == ["mkdir -p /root'/srv/a b'", "chmod a+x /root/srv"]
    assert "ln -s '../srv/a b' /root/opt/py" in lines[shown + 1]
    assert lines[-1].endswith(f"systemd --unit={systemd.TARGET}")


@pytest.mark.parametrize("terminal", [None, (80, 24)])
def test_second_script_ends_what_is_the_services(terminal: tuple[int, int] | None) -> None:
    task = guest.Task(("true",), "/work dir", {"HOME": "/tmp/home"}, "abc", terminal)
    script = systemd.second_script(task)
    assert subprocess.run(["/bin/sh", "-n"], input=script, text=True, check=False).returncode == 0
    assert script.startswith("others() {")
    assert "/proc/[0-9]*" not in script


def test_units_name_each_other() -> None:
    units = systemd.units()
    assert set(units) == {systemd.TARGET, systemd.SERVICE}
    assert f"Wants={systemd.SERVICE}\n" in units[systemd.TARGET]
    assert f"{guest.FOLDER}/second\n" in units[systemd.SERVICE]


def test_generators(tmp_path: Path) -> None:
    assert systemd.generators(tmp_path) == []
    folder = tmp_path / "usr" / "lib" / "systemd" / "system-generators"
    folder.mkdir(parents=True)
    (folder / "systemd-fstab-generator").touch()
    assert systemd.generators(tmp_path) == ["systemd-fstab-generator"]


def test_inside_shows_what_is_not_the_systems(tmp_path: Path) -> None:
    (tmp_path / "project" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "python").symlink_to("python3.11")
    (tmp_path / "python3.11").mkdir()
    steps = tree.inside(
        [
            f"{tmp_path}/project",
            f"{tmp_path}/project/.venv/bin",
            f"{tmp_path}/python",
            "/",
            "/usr",
            "/usr/bin",
            "/bin",
            "/usr/local",
        ]
    )
    real = str(tmp_path.resolve())
    assert [(step.do, step.path) for step in steps if step.do == "bind"] == [
        ("bind", path) for path in sorted([f"{real}/project", f"{real}/python3.11", "/usr/local"])
    ]
    assert tree.Step("link", f"{real}/python", "python3.11") in steps
    assert not any(step.path in ("/bin", "/usr/bin") for step in steps)


def test_the_systems_python_must_be_the_guests(tmp_path: Path) -> None:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to("/usr/bin/python9.99")
    root = tmp_path / "root"
    with pytest.raises(VmError, match=r"python9\.99"):
        tree.check_python(tmp_path, root)
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "usr" / "bin" / "python9.99").touch()
    tree.check_python(tmp_path, root)
    (folder / "python").unlink()
    (folder / "python").symlink_to("/opt/python/bin/python9.99")
    tree.check_python(tmp_path, Path("/nowhere"))
