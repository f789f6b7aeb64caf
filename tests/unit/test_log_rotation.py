"""The audit file and logrotate: nothing is lost, whenever the file is moved."""

from __future__ import annotations

import json
from pathlib import Path

from kpmd.runtime.audit import Audit, Record
from kpmd.runtime.audit_writer import Lines
from tests.http.serving import until
from tests.unit.test_client import ROOT

ROTATION = (ROOT / "deploy/logrotate/kpmd").read_text(encoding="utf-8")


def requests(path: Path) -> list[str]:
    return [json.loads(line)["request"] for line in path.read_text().splitlines()]


async def test_no_record_is_lost_and_none_is_there_twice(tmp_path: Path) -> None:
    """Records come all the time, and the daemon is told of each rotation a few of them later."""
    path = tmp_path / "audit.jsonl"
    audit = Audit(Lines(path))
    names = [f"r{number}" for number in range(600)]
    rotated = 0
    for number, name in enumerate(names):
        audit.record(Record(request=name))
        if number % 100 == 50:
            await until(path.exists)
            path.rename(tmp_path / f"audit.jsonl.{rotated}")
            rotated += 1
        elif number % 100 == 55:
            audit.reopen()
    await audit.close()
    assert audit.lost == 0
    old = [tmp_path / f"audit.jsonl.{number}" for number in range(rotated)]
    assert [each for file in (*old, path) for each in requests(file)] == names


def test_logrotate_moves_the_file_and_tells_the_daemon() -> None:
    lines = [line.strip() for line in ROTATION.splitlines()]
    said = {line.split(" ")[0]: line for line in lines if line and not line.startswith("#")}
    assert {"delaycompress", "nocreate", "missingok", "postrotate"} <= said.keys()
    assert "copytruncate" not in said
    assert said["su"] == "su kpmd-daemon kpmd-daemon"
    # The folder is the one that the unit makes, and the file the one that kpmd.toml shows.
    assert "LogsDirectory=kpmd\n" in (ROOT / "systemd/kpmd.service").read_text()
    assert said["/var/log/kpmd/*.jsonl"]
    assert '# file = "/var/log/kpmd/audit.jsonl"' in (ROOT / "deploy/kpmd.toml").read_text()
    assert "reload kpmd.service" in said["!"]
    assert "ExecReload=/bin/kill -HUP $MAINPID\n" in (ROOT / "systemd/kpmd.service").read_text()
