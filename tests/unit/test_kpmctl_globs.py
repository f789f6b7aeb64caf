"""``kpmctl`` with globs: what it asks for, and what it tells of what it was given."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from kpmd.client.client import Client
from kpmd.kpmctl import failures
from kpmd.kpmctl.counting import Counter
from kpmd.kpmctl.filters import Wanted
from tests.unit.test_client import running_daemon
from tests.unit.test_kpmctl import good, read_json, run


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


@pytest.fixture
def program(daemon: str) -> Iterator[str]:
    with Client(daemon) as client:
        made = client.load_builtin("count", lifetime="persistent")["programs"]
        yield made[0]["id"]
        for each in made:
            client.delete_program(each["id"], force=True)


def test_attach_by_glob_and_what_is_left_out(daemon: str, program: str) -> None:
    text = good(daemon, "attach", program, "vfs_*", "clean?p", "--exclude", "*_open")
    link = text.partition(":")[0]
    assert "attached to 3 function(s)" in text
    assert f"1 skipped: `kpmctl link {link} --skipped`" in text
    shown = good(daemon, "link", link, "--targets", "--skipped")
    assert "vfs_open" not in shown
    assert re.search(r"cleanup +- +ambiguous: ", shown)
    found = read_json(daemon, "link", link, "--skipped")
    assert found["skipped"] == len(found["skipped_items"]) == 1


def test_a_module_is_a_glob_too(daemon: str, program: str) -> None:
    made = read_json(daemon, "attach", program, "*[nf_tables]")
    targets = read_json(daemon, "link", made["id"], "--targets")["targets"]
    assert [each["symbol"] for each in targets] == ["nf_hook"]


def test_dry_run(daemon: str, program: str) -> None:
    text = good(daemon, "attach", program, "vfs_read", "no_such", "--dry-run")
    assert re.search(r"vfs_read +- +attach\n", text)
    assert re.search(r"no_such +- +unknown: ", text)
    assert "this request fails" in text
    plan = read_json(daemon, "attach", program, "vfs_*", "--dry-run")
    assert (plan["count"], plan["attachable"]) == (3, True)
    assert read_json(daemon, "links")["items"] == []


def test_symbols(daemon: str) -> None:
    assert re.search(r"nf_hook +nf_tables +0xffffffffc0001000 +-", good(daemon, "symbols", "nf_*"))
    found = read_json(daemon, "symbols", "cleanup")["items"]
    assert [each["ambiguous"] for each in found] == [True, True]
    assert len(read_json(daemon, "symbols")["items"]) > 8
    assert run(daemon, "symbols", "a[b").exit_code == failures.INVALID


def test_a_glob_that_matches_nothing(daemon: str, program: str) -> None:
    done = run(daemon, "attach", program, "no_such_*")
    assert done.exit_code == failures.INVALID
    assert "no_such_*" in done.stderr


def test_count_by_glob(daemon: str) -> None:
    text = good(daemon, "--json", "count", "--duration", "0", "vfs_*", "--exclude", "vfs_open")
    assert json.loads(text.splitlines()[-1])["attached"] == 2


def test_count_makes_room_for_more_than_it_guessed(
    daemon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpmd.kpmctl.counting._ROOM", 1)
    with Client(daemon) as client:
        counter = Counter(client)
        counter.start(Wanted(("vfs_*",)), "kprobe")
        (counts,) = client.maps()
        assert counts["max_entries"] == 3
        assert len(list(client.links())) == 1
        counter.close()
        assert list(client.links()) == []
        assert list(client.programs()) == []
