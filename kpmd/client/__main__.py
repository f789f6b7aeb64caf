"""``python -m kpmd.client``: the same as ``kpmctl``."""

from __future__ import annotations

from kpmd.client.cli import main

if __name__ == "__main__":
    main(prog_name="kpmctl")
