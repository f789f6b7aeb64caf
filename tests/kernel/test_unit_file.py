"""What systemd/kpmd.service takes from kpmd must leave it able to do its work, on each kernel.

The unit itself is tried under a real systemd (tests/systemd).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kernel.conftest import Daemon, bpftool_links
from tests.kernel.rest import Rest
from tests.kernel.wire import NOBODY

pytestmark = pytest.mark.multi


def test_a_user_with_the_capabilities_of_the_unit_and_files_of_root() -> None:
    under = (sys.executable, "-m", "tests.kernel.as_unit", str(NOBODY))
    with tempfile.TemporaryDirectory(prefix="kpmd-") as folder:
        os.chown(folder, NOBODY, NOBODY)
        daemon = Daemon(Path(folder), under=under)
        assert os.stat(f"/proc/{daemon.pid}").st_uid == NOBODY
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
