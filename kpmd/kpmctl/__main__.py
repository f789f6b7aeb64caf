"""``kpmctl``, also as ``python -m kpmd.kpmctl``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``kpmctl``."""
    if sys.argv[1:] == ["--version"]:
        # Scripts ask for it, and it is there before click would have been imported.
        from kpmd import __version__

        print(f"kpmctl, version {__version__}")
        return
    from kpmd.kpmctl.cli import main as run

    run(prog_name="kpmctl")


if __name__ == "__main__":
    main()
