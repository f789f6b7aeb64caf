"""What systemd/kpmd.service takes from kpmd must leave it able to do its work."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from tests.kernel.conftest import Daemon, bpftool_links
from tests.kernel.rest import Rest

pytestmark = pytest.mark.multi

UNIT = Path(__file__).parents[2] / "systemd" / "kpmd.service"


def test_capabilities_of_the_unit_are_enough() -> None:
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    kept = ",".join("+" + name.removeprefix("CAP_").lower() for name in line.split())
    under = ("setpriv", "--no-new-privs", "--bounding-set", f"-all,{kept}")
    with tempfile.TemporaryDirectory(prefix="kpmd-") as folder:
        daemon = Daemon(Path(folder), under=under)
        rest = Rest(daemon.socket)
        loaded = rest.ok("POST", "/programs", {"source": {"kind": "builtin", "builtin": "count"}})
        link = rest.ok(
            "POST",
            "/links",
            {
                "program": loaded["programs"][0]["id"],
                "kind": "kprobe",
                "symbols": ["vprintk", "inet6_release"],
                "cookies": [1, 2],
            },
        )
        targets = rest.items(f"/links/{link['id']}/targets")
        # Names were resolved to addresses: kallsyms and tracefs could both be read.
        assert all(int(target["address"], 16) for target in targets)
        rest.close()
        assert daemon.stop() == 0
    assert bpftool_links() == []
