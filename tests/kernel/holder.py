"""A client process: makes what its argument says, tells what came of it, and waits to be killed.

``python -m tests.kernel.holder SOCKET '[["POST", "/programs", {…}], …]'``; the word ``$program`` in
a body stands for the first program that was made before.
"""

from __future__ import annotations

import json
import signal
import sys

from tests.kernel.rest import Rest


def main() -> None:
    """Make the requests, print the answers as one line of JSON, wait."""
    rest = Rest(sys.argv[1])
    answers: list[object] = []
    program = ""
    for method, path, body in json.loads(sys.argv[2]):
        text = json.dumps(body).replace("$program", program)
        status, answer = rest(method, path, json.loads(text))
        if status == 201 and "programs" in answer:
            program = answer["programs"][0]["id"]
        answers.append([status, answer])
    print(json.dumps(answers), flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
