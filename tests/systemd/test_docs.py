"""The commands in the documentation that are about kpmd as a service, page by page."""

from __future__ import annotations

import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import blocks, pages
from tests.docs.session import following
from tests.systemd.conftest import SHIPPED_POLICY, Kpmd
from tests.systemd.control import run

PAGES = {
    page: found
    for page in pages()
    if (found := [each for each in blocks(page) if each.place == "systemd"])
}
POLICY = Path("/etc/kpmd/policy.toml")


@pytest.fixture
def machine(installed: None, kpmd: Kpmd) -> Iterator[None]:
    """One where kpmd is installed, with the user whom the pages name, and no policy but kpmd's."""
    if "alice" not in {entry.pw_name for entry in pwd.getpwall()}:
        run("useradd", "--no-create-home", "alice")
    yield
    # The page about metrics has it ask kpmd every 15 seconds, which starts what a test has stopped.
    subprocess.run(["systemctl", "disable", "--now", "kpmd-metrics.timer"], capture_output=True)
    shutil.copy(SHIPPED_POLICY, POLICY)


@pytest.mark.parametrize("page", PAGES)
def test_page(machine: None, page: str) -> None:
    with following() as session:
        for each in PAGES[page]:
            session.do(each)
