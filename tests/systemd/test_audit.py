"""The audit trail in a real journal: found by its fields, and not to be forged."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

from kpmd.runtime.audit import Audit, Record, destinations
from tests.kernel.rest import Rest
from tests.systemd.conftest import Kpmd
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


def test_no_record_is_dropped_for_being_one_of_many(kpmd: Kpmd, rest: Rest) -> None:
    """The limit of journald is by unit: who has many records made would have others' dropped.

    In a journal of kpmd's own, as docs/how-to/logs.md says, which leaves the other to other units.
    """
    own = Path("/etc/systemd/journald@kpmd.conf")
    own.write_text("[Journal]\nRateLimitIntervalSec=1h\nRateLimitBurst=2\n", encoding="utf-8")
    kpmd.service.add_drop_in("own", "[Service]\nLogNamespace=kpmd\n")
    made = [rest.ok("POST", "/leases", {"ttl": 600}) for _ in range(25)]
    pid = f"_PID={kpmd.service.main_pid}"
    shown = ("journalctl", "--namespace=kpmd", "--identifier=kpmd-audit", "--output=cat", pid)
    until(
        lambda: run(*shown).count(": POST /leases: ok") == len(made),
        f"{len(made)} records in the journal of its own",
    )
    assert entries(pid) == []
    own.unlink()
