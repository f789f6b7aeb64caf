"""What the loader's process tells of its progress, and who lists what is under way."""

from __future__ import annotations

import contextlib
import socket

import pytest

from kpmd.bpf.loader_answer import Answer
from kpmd.bpf.progress import Progress
from kpmd.core.model import Client
from kpmd.runtime.work import Board


def told(*pieces: bytes) -> tuple[Answer, Progress]:
    """What is known after these pieces came from the process, one after the other."""
    progress = Progress("parsing", total=3)
    answer = Answer(8, progress)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for piece in pieces:
            theirs.sendall(piece)
            answer.receive(ours)
    return answer, progress


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        ([b"0 first\n"], Progress("verifying", 0, 3, "first")),
        ([b"0 first\n1 sec", b"ond\n"], Progress("verifying", 1, 3, "second")),
        ([b"0 first\n1 second\n{}"], Progress("verifying", 1, 3, "second")),
        ([b"0 " + b"x" * 300 + b"\n"], Progress("verifying", 0, 3, "x" * 255)),
        # Nothing that an honest process says.
        ([b"first\n"], Progress("parsing", None, 3)),
        ([b"-1 first\n"], Progress("parsing", None, 3)),
        ([b"1" * 5000 + b" first\n"], Progress("parsing", None, 3)),
        ([b"0 \x1b[2J\n"], Progress("parsing", None, 3)),
        ([b"\n\n\n"], Progress("parsing", None, 3)),
        ([b"0 first"], Progress("parsing", None, 3)),
    ],
)
def test_lines_before_the_answer(pieces: list[bytes], found: Progress) -> None:
    _, progress = told(*pieces)
    assert progress == found


def test_the_answer_is_what_comes_behind_them() -> None:
    answer, _ = told(b"0 first\n1 second\n{", b'"a": 1}')
    assert answer.raw == b'{"a": 1}'
    assert answer.fault is None


def test_lines_without_an_end() -> None:
    answer, _ = told(*[b"0 first\n" * 8000] * 20)
    assert answer.fault == "it is too long"


def test_work_ends_where_it_fails() -> None:
    board = Board(lambda: 5.0)
    client = Client("cli-1", 1, 7, 7, "sh", 0.0)
    progress = Progress()
    with contextlib.suppress(KeyError), board.showing("load", client, progress):
        (work,) = board.shelf
        assert (work.client, work.uid, work.since, work.progress) == ("cli-1", 7, 5.0, progress)
        raise KeyError
    assert list(board.shelf) == []
