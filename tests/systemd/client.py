"""A client process: does what it reads, an order of one line each, as the user that it runs as.

``python -m tests.systemd.client SOCKET``. ``["request", METHOD, PATH, BODY]`` is answered by
``["answer", STATUS, BODY]``, or ``["refused", ERRNO]`` where it may not connect;
``["getpid", TIMES]`` by ``["done"]``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tests.kernel.rest import Rest


def _do(rest: Rest, what: str, *arguments: Any) -> list[Any]:
    if what == "getpid":
        for _ in range(arguments[0]):
            os.getpid()
        return ["done"]
    try:
        return ["answer", *rest(*arguments)]
    except OSError as error:
        rest.close()  # else it takes the request for one that was sent
        return ["refused", error.errno]


def main() -> None:
    """Do what is asked until the input ends."""
    rest = Rest(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(_do(rest, *json.loads(line))), flush=True)
    rest.close()


if __name__ == "__main__":
    main()
