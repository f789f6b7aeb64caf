"""The policy as it is written, and as it is understood; and what is wrong with a bad one."""

from __future__ import annotations

import contextlib
import grp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from kpmd import policy_file
from kpmd.bpf import helpers
from kpmd.core.globs import Glob
from kpmd.core.policy import USUAL, Policy
from kpmd.core.quotas import Limits
from kpmd.policy_file import PolicyError, built_in, load

SHIPPED = Path(__file__).parents[2] / "deploy" / "policy.toml"


def read(folder: Path, text: str) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text)
    path.chmod(0o644)
    return load(path)


def wrong(folder: Path, text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        read(folder, text)
    assert str(folder / "policy.toml") in str(caught.value)
    return str(caught.value)


RULE = '[[rules]]\nname = "one"\nusers = [7]\n'


class TestWhatItSays:
    def test_a_rule_that_says_nothing_lets_use_builtins_and_no_more(self, tmp_path: Path) -> None:
        rule = read(tmp_path, RULE).rules[0]
        assert rule.users == {7}
        assert rule.rights == set(USUAL)
        assert (rule.programs.builtin, rule.programs.anything) == (True, False)
        assert rule.functions.all_allowed
        assert not rule.functions.risky
        assert rule.helpers.allow == helpers.HARMLESS
        assert not any((rule.helpers.read_kernel, rule.helpers.read_user, rule.helpers.kfuncs))
        assert rule.map_types == policy_file.PLAIN_MAPS
        assert not rule.reads_others
        assert rule.limits == Limits()

    def test_everything_it_can_say(self, tmp_path: Path) -> None:
        key = Ed25519PrivateKey.generate().public_key()
        pem = tmp_path / "build.pem"
        pem.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        policy = read(
            tmp_path,
            f"""
            [administrators]
            users = ["nobody"]
            groups = [50]
            [limits]
            links = 9
            leases = 8
            [[rules]]
            name = "all.of-it_1"
            users = ["root", 1004]
            groups = ["{grp.getgrgid(0).gr_name}", 70]
            calls = ["load", "attach"]
            read_others = true
            programs = {{ builtin = false, sha256 = ["{"AB" * 32}"], keys = ["{pem}"] }}
            maps = {{ types = ["plain", "task_storage"] }}
            limits = {{ links = 3, load_seconds = 2.5 }}
            [rules.functions]
            allow = ["tcp_*", "nft_*[nf_tables]"]
            deny = ["tcp_md5*"]
            risky = true
            [rules.helpers]
            allow = ["bpf_get_current_comm", "ktime_get_ns"]
            probe_read_kernel = true
            probe_read_user = true
            kfuncs = ["bpf_task_from_pid"]
            """,
        )
        assert policy.admin_users == {0, 65534}
        assert policy.admin_groups == {50}
        (rule,) = policy.rules
        assert rule.name == "all.of-it_1"
        assert rule.users == {0, 1004}
        assert rule.groups == {0, 70}
        assert rule.rights == {"load", "attach"}
        assert rule.reads_others
        assert rule.functions.allow == (Glob("tcp_*"), Glob("nft_*", "nf_tables"))
        assert rule.functions.deny == (Glob("tcp_md5*"),)
        assert rule.functions.risky
        assert not rule.programs.builtin
        assert rule.programs.sha256 == {"ab" * 32}
        assert [each.raw for each in rule.programs.keys] == [key.public_bytes_raw()]
        assert rule.helpers.allow == frozenset({"get_current_comm", "ktime_get_ns"})
        assert rule.helpers.read_kernel
        assert rule.helpers.read_user
        assert rule.helpers.kfuncs == frozenset({"bpf_task_from_pid"})
        assert rule.map_types == policy_file.PLAIN_MAPS | {"task_storage"}
        assert (rule.limits.links, rule.limits.leases) == (3, 8)
        assert rule.limits.load_seconds == 2.5

    def test_words_for_sets(self, tmp_path: Path) -> None:
        rule = read(
            tmp_path,
            RULE + 'helpers = { allow = ["all"], kfuncs = ["all"] }\nmaps = { types = ["all"] }\n',
        ).rules[0]
        assert rule.helpers.allow is rule.helpers.kfuncs is rule.map_types is None

    def test_everyone(self, tmp_path: Path) -> None:
        rule = read(tmp_path, '[[rules]]\nname = "x"\nusers = ["*"]\n').rules[0]
        assert rule.everyone
        assert rule.fits(12345, [])

    def test_an_empty_one_leaves_administrators_alone(self, tmp_path: Path) -> None:
        policy = read(tmp_path, "")
        assert policy.rules == ()
        assert policy.is_admin(0, [])

    def test_names_that_are_not_there_are_told_and_fit_nobody(self, tmp_path: Path) -> None:
        policy = read(
            tmp_path,
            '[[rules]]\nname = "x"\nusers = ["no-such-user"]\ngroups = ["no-such-group"]\n',
        )
        assert not policy.rules[0].fits(0, [0])
        assert [word for each in policy.warnings for word in each.split("'")[1::2]] == [
            "no-such-user",
            "no-such-group",
        ]

    def test_the_one_that_ships_is_what_is_built_in(self, tmp_path: Path) -> None:
        text = SHIPPED.read_text().replace('"kpmd"', '"root"').replace('"kpmd-admin"', '"root"')
        shipped = read(tmp_path, text)
        own = built_in("root")
        assert [each.rights for each in shipped.rules] == [each.rights for each in own.rules]
        assert shipped.rules == own.rules

    def test_and_its_comments_are_a_rule_too(self, tmp_path: Path) -> None:
        """What the shipped file shows in comments can be used as it stands, but for the names."""
        lines = SHIPPED.read_text().splitlines()
        start = next(at for at, line in enumerate(lines) if line.startswith("# [[rules]]"))
        text = "\n".join(line.removeprefix("#") for line in lines[start:])
        text = text.replace("<64 hex digits>", "0" * 64).replace('keys = ["/etc', '# ["')
        policy = read(tmp_path, "\n".join(line.split("  # ")[0] for line in text.splitlines()))
        assert policy.rules[0].name == "observability"


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("rules = 3", "rules"),
            ("[[rules]]\nusers = [1]", "rules[0].name"),
            ('[[rules]]\nname = "a b"\nusers = [1]', "rules[0].name"),
            ('[[rules]]\nname = "administrators"\nusers = [1]', "administrators"),
            (RULE + RULE, "two rules"),
            ('[[rules]]\nname = "x"', "name users or groups"),
            (RULE + 'cals = ["load"]', "rules[0].cals"),
            (RULE + 'calls = ["destroy"]', "rules[0].calls[0]"),
            (RULE + 'functions = { allow = ["a b c"] }', "'a b c'"),
            (RULE + 'programs = { sha256 = ["abc"] }', "sha256[0]"),
            (RULE + 'programs = { keys = ["/nowhere/key.pem"] }', "/nowhere/key.pem"),
            (RULE + 'helpers = { allow = ["probe_reed"] }', "probe_reed"),
            (RULE + 'maps = { types = ["hush"] }', "hush"),
            (RULE + "limits = { links = -1 }", "limits.links"),
            (RULE + "limits = { targets_per_link = 2000000 }", "targets_per_link"),
            ("version = 2", "version"),
            ("[[rules", "]]"),
        ],
    )
    def test_it_says_where(self, tmp_path: Path, text: str, says: str) -> None:
        assert says in wrong(tmp_path, text)

    def test_a_file_that_others_can_write_is_not_believed(self, tmp_path: Path) -> None:
        path = tmp_path / "policy.toml"
        path.write_text(RULE)
        for mode in (0o664, 0o646):
            path.chmod(mode)
            with pytest.raises(PolicyError, match="chmod go-w"):
                load(path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
    def test_nor_one_that_is_another_user_s(self, tmp_path: Path) -> None:
        path = tmp_path / "policy.toml"
        path.write_text(RULE)
        os.chown(path, 65534, -1)
        with pytest.raises(PolicyError, match="chown root"):
            load(path)

    def test_a_key_of_another_kind(self, tmp_path: Path) -> None:
        key = generate_private_key(SECP256R1()).public_key()
        pem = tmp_path / "key.pem"
        pem.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        assert "Ed25519" in wrong(tmp_path, RULE + f'programs = {{ keys = ["{pem}"] }}')
        pem.write_text("no key")
        assert str(pem) in wrong(tmp_path, RULE + f'programs = {{ keys = ["{pem}"] }}')

    def test_a_file_that_was_named_and_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyError, match="No such file"):
            load(tmp_path / "policy.toml")

    @given(st.binary(max_size=200))
    def test_rubbish_is_told_and_nothing_else(self, raw: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(raw)
            file.flush()
            with contextlib.suppress(PolicyError):
                load(Path(file.name))


class TestWithoutAFile:
    def test_the_group_of_the_socket_may_use_builtins(self) -> None:
        group = grp.getgrgid(0).gr_name
        (rule,) = built_in(group).rules
        assert rule.groups >= {0}
        assert not rule.programs.anything

    def test_without_a_group_only_administrators_may_do_anything(self) -> None:
        assert built_in("no-such-group").rule_for(1000, [1000]) is None


class TestCheckConfig:
    @staticmethod
    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "kpmd", "--check-config", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        return done.returncode, done.stdout + done.stderr

    def test_a_good_one(self, tmp_path: Path) -> None:
        path = tmp_path / "policy.toml"
        path.write_text(RULE)
        status, said = self.run("--policy", str(path))
        assert status == 0, said
        assert "one: uids [7]" in said
        assert "builtins" in said

    def test_a_bad_one(self, tmp_path: Path) -> None:
        path = tmp_path / "policy.toml"
        path.write_text(RULE + "cals = 1")
        status, said = self.run("--policy", str(path))
        assert status == 1
        assert "rules[0].cals" in said
        assert "Traceback" not in said
