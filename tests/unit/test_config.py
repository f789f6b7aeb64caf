"""The configuration file, and what is said of one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kpmd.config import Config, ConfigError, load


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "kpmd.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_without_a_file() -> None:
    config = load(None)
    assert config == Config()
    assert (str(config.socket), config.group, config.mode) == ("/run/kpmd.sock", None, 0o660)
    assert config.log_level == "info"
    assert config.limits.body_bytes == 32 << 20


def test_a_full_file(tmp_path: Path) -> None:
    config = load(
        written(
            tmp_path,
            """
            socket = "/tmp/k.sock"
            group = "adm"
            mode = "0600"
            log_level = "debug"
            [limits]
            body_bytes = 2000
            object_bytes = 3000
            load_seconds = 1
            load_memory_bytes = 100000000
            shutdown_seconds = 0.5
            """,
        )
    )
    assert (str(config.socket), config.group, config.mode) == ("/tmp/k.sock", "adm", 0o600)
    assert (config.limits.body_bytes, config.limits.object_bytes) == (2000, 3000)
    assert (config.limits.load_seconds, config.limits.shutdown_seconds) == (1.0, 0.5)


def test_arguments_win(tmp_path: Path) -> None:
    path = written(tmp_path, 'group = "adm"\nmode = "0600"\n')
    config = load(path, mode="0666", group=None, socket=Path("/tmp/other"))
    assert (config.group, config.mode, config.socket) == ("adm", 0o666, Path("/tmp/other"))


@pytest.mark.parametrize("mode", ['"0660"', '"660"', '"0o660"', "0o660"])
def test_modes_in_octal(tmp_path: Path, mode: str) -> None:
    assert load(written(tmp_path, f"mode = {mode}")).mode == 0o660


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('mode = "rw-rw----"', "mode"),
        ('mode = "0888"', "mode"),
        ("mode = 660", "mode"),
        ('mode = "1777"', "mode"),
        ('mode = "-1"', "mode"),
        ("mode = true", "mode"),
        ('log_level = "loud"', "log_level"),
        ("group = 4", "group"),
        ("socket = 4", "socket"),
        ("surprise = 1", "surprise"),
        ("[limits]\nsurprise = 1", "limits.surprise"),
        ("[limits]\nbody_bytes = 0", "limits.body_bytes"),
        ('[limits]\nbody_bytes = "many"', "limits.body_bytes"),
        ("[limits]\ntargets_per_link = 0", "limits.targets_per_link"),
        ("[limits]\ntargets_per_link = 1048577", "limits.targets_per_link"),
        ("deny_file = 4", "deny_file"),
        ("[limits]\nload_seconds = 0", "limits.load_seconds"),
        ("[limits]\nload_seconds = nan", "limits.load_seconds"),
        ("[limits]\nshutdown_seconds = inf", "limits.shutdown_seconds"),
        ("limits = 1", "limits"),
        ('[audit]\nfile = "audit.jsonl"', "audit.file"),
        ('[audit]\nfile = ""', "audit.file"),
        ('[audit]\njournal = "perhaps"', "audit.journal"),
        ("[audit]\nsurprise = 1", "audit.surprise"),
    ],
)
def test_an_error_names_file_and_field(tmp_path: Path, text: str, field: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(path) in str(error.value)
    assert f"{field}: " in str(error.value)


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(written(tmp_path, 'mode = "x"\nsurprise = 1\n'))
    assert "mode: " in str(error.value)
    assert "surprise: " in str(error.value)


@pytest.mark.parametrize("text", ["mode = ", "a = 1\na = 2", b"\xff\xfe", b"a = \0"])
def test_what_is_no_toml(tmp_path: Path, text: str | bytes) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=r"kpmd\.toml"):
        load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError) as error:
            load(path)
        assert str(path) in str(error.value)


def test_a_wrong_argument() -> None:
    with pytest.raises(ConfigError, match=r"arguments: mode: "):
        load(None, mode="x")


def test_where_the_audit_trail_goes(tmp_path: Path) -> None:
    silent = load(None).audit
    assert (silent.file, silent.journal) == (None, None)
    text = '[audit]\nfile = "/var/log/kpmd/audit.jsonl"\njournal = false\n'
    audit = load(written(tmp_path, text)).audit
    assert (audit.file, audit.journal) == (Path("/var/log/kpmd/audit.jsonl"), False)


def test_targets_of_a_link_and_the_deny_list(tmp_path: Path) -> None:
    assert load(None).limits.targets_per_link == 1 << 20
    assert load(None).deny_file is None
    text = 'deny_file = "/etc/kpmd/deny.txt"\n[limits]\ntargets_per_link = 1000\n'
    config = load(written(tmp_path, text))
    assert config.deny_file == Path("/etc/kpmd/deny.txt")
    assert config.limits.targets_per_link == 1000


def test_the_file_in_etc_counts_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpmd.config.DEFAULT_CONFIG", tmp_path / "kpmd.toml")
    assert load(None).group is None
    written(tmp_path, 'group = "tracers"')
    assert load(None).group == "tracers"
    assert load(None, group="others").group == "others"
