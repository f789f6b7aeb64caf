"""Packages, installed in a guest of their own by its own Python (``make test-deb``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vm.guest import HOSTNAME


def pytest_configure() -> None:
    if not Path("/run/systemd/system").is_dir() or os.uname().nodename != HOSTNAME:
        pytest.exit("these tests change the system: run them by `make test-deb`", 3)
