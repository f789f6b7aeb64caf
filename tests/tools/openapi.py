"""``python -m tests.tools.openapi``: print what ``openapi.yaml`` must be."""

from __future__ import annotations

import sys

import yaml

from kpmd.api.app import routes
from kpmd.api.openapi import document


def main() -> None:
    """Print the document that the route table makes."""
    sys.stdout.write(
        "# Made by `make openapi` from the route table and the models; edit those.\n"
        + yaml.safe_dump(document(routes()), sort_keys=False, allow_unicode=True, width=100)
    )


if __name__ == "__main__":
    main()
