"""The audit trail in a real journal: found by its fields, and not to be forged."""

from __future__ import annotations

import asyncio
import json
import pwd
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kpmd.runtime.audit import Audit, Record, destinations
from tests.kernel.rest import Rest
from tests.kernel.test_service import COUNT
from tests.systemd.conftest import PROJECT, SOCKET, Client, Kpmd
from tests.systemd.control import run, until


def entries(*matches: str) -> list[dict[str, Any]]:
    """Entries of the audit trail that have all these fields."""
    run("journalctl", "--sync")
    shown = run("journalctl", "--quiet", "--output=json", "--identifier=kpmd-audit", *matches)
    # Not splitlines: there are more ends of lines in Unicode than in JSON.
    return [json.loads(text) for text in shown.split("\n") if text]


def found(*matches: str) -> dict[str, Any]:
    """The one entry that has all these fields; waits for it."""
    until(lambda: bool(entries(*matches)), f"an entry with {matches}")
    (entry,) = entries(*matches)
    return entry


def test_journald_takes_every_value_as_it_is() -> None:
    marker = secrets.token_hex(8)
    nasty = "a\nKPMD_UID=0\n\nMESSAGE=forged\u2028=\t\u00fc"
    record = Record(
        request=marker,
        call="POST /links",
        outcome="forbidden",
        status=403,
        uid=1000,
        command=nasty,
        rule=nasty,
        detail=nasty,
        what={"symbols": ["vfs_read", "vfs_write"], "labels": {"team": nasty}},
    )

    async def put_on_record() -> None:
        audit = Audit(*destinations(None, True, {}))
        audit.record(record)
        await audit.close()
        assert audit.lost == 0

    asyncio.run(put_on_record())
    entry = found(f"KPMD_REQUEST={marker}", "KPMD_UID=1000", "KPMD_OUTCOME=forbidden")
    assert {entry[name] for name in ("KPMD_COMMAND", "KPMD_RULE", "KPMD_DETAIL")} == {nasty}
    assert entry["KPMD_WHAT_LABELS"] == f"team={nasty}"
    assert entry["KPMD_WHAT_SYMBOLS"] == ["vfs_read", "vfs_write"]
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("5", "kpmd-audit")
    assert "\n" not in entry["MESSAGE"]
    assert entry["MESSAGE"].startswith("uid 1000: POST /links: forbidden (403) by rule ")
    assert entries("MESSAGE=forged") == []
    found(f"KPMD_REQUEST={marker}", "KPMD_WHAT_SYMBOLS=vfs_write")


def test_what_is_done_and_what_is_refused(
    kpmd: Kpmd, rest: Rest, client: Callable[[str], Client]
) -> None:
    program = rest.ok("POST", "/programs", COUNT)["programs"][0]
    pid = f"_PID={kpmd.service.main_pid}"
    done = found(pid, "KPMD_UID=0", "KPMD_CALL=POST /programs", "KPMD_OUTCOME=ok")
    assert done["KPMD_STATUS"] == "201"
    assert done["_SYSTEMD_UNIT"] == kpmd.service.name
    status, _ = client("inside")("DELETE", f"/programs/{program['id']}")
    assert status == 404
    uid = pwd.getpwnam("inside").pw_uid
    refused = found(pid, f"KPMD_UID={uid}", "KPMD_OUTCOME=not-found")
    assert refused["KPMD_CALL"] == f"DELETE /programs/{program['id']}"
    assert refused["PRIORITY"] == "5"


#: Takes a name of its own, and asks for what is not there.
_NAMED = """
import os, sys
from pathlib import Path
from tests.kernel.rest import Rest
Path("/proc/self/comm").write_text("a\\nKPMD_UID=7")
print(os.getpid(), Rest(sys.argv[1])("DELETE", "/programs/prg-none")[0])
"""


def test_a_process_forges_nothing_by_its_name(kpmd: Kpmd) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", _NAMED, SOCKET], cwd=PROJECT, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    pid, status = shown.split()
    assert status == "404"
    entry = found(f"_PID={kpmd.service.main_pid}", f"KPMD_PID={pid}")
    assert entry["KPMD_COMMAND"] == "a\nKPMD_UID=7"
    assert entry["KPMD_UID"] == "0"


def test_start_and_stop_are_on_record(kpmd: Kpmd) -> None:
    kpmd.service.start()
    pid = f"_PID={kpmd.service.main_pid}"
    found(pid, "KPMD_AUDIT=start", "KPMD_OUTCOME=ok")
    kpmd.service.stop()
    found(pid, "KPMD_AUDIT=stop", "KPMD_OUTCOME=ok")


def test_what_comes_while_journald_is_started_anew_is_not_lost(kpmd: Kpmd, rest: Rest) -> None:
    rest.ok("GET", "/healthz")
    run("systemctl", "restart", "systemd-journald.service")
    missing = f"/programs/prg-{secrets.token_hex(12)}"
    assert rest("DELETE", missing)[0] == 404
    found(f"KPMD_CALL=DELETE {missing}")
    assert Path("/run/systemd/journal/socket").is_socket()
