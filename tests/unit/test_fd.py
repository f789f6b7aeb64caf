"""File descriptors and their owners."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kpmd.bpf.fd import Closed, OwnedFd, tracer


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_it_closes_what_it_owns_once() -> None:
    number = os.eventfd(0)
    owned = OwnedFd(number, "a thing")
    assert owned.fileno() == number
    assert not os.get_inheritable(number)
    owned.close()
    assert owned.closed
    assert not is_open(number)
    # The number is given out again; a second close must not touch it.
    again = os.eventfd(0)
    assert again == number
    owned.close()
    assert is_open(again)
    os.close(again)


def test_a_closed_one_has_no_number() -> None:
    owned = OwnedFd(os.eventfd(0), "a thing")
    owned.close()
    with pytest.raises(Closed, match="a thing"):
        owned.fileno()
    with pytest.raises(Closed), owned.borrow():
        pytest.fail("borrowed after close")
    with pytest.raises(Closed):
        owned.detach()


def test_as_a_context() -> None:
    with OwnedFd(os.eventfd(0), "x") as owned:
        number = owned.fileno()
    assert owned.closed
    assert not is_open(number)


def test_detach_hands_it_over() -> None:
    owned = OwnedFd(os.eventfd(0), "x")
    number = owned.detach()
    assert owned.closed
    owned.close()
    assert is_open(number)
    os.close(number)


def test_inheritance_is_taken_away() -> None:
    number = os.eventfd(0, 0)
    os.set_inheritable(number, True)
    with OwnedFd(number, "x"):
        assert not os.get_inheritable(number)


def test_low_numbers_are_moved_up() -> None:
    """To bpf(2) FD 0 means absent."""
    script = """
import os
from kpmd.bpf.fd import OwnedFd
for number in (0, 1, 2):
    os.close(number)
owned = [OwnedFd(os.eventfd(0), "x") for _ in range(3)]
good = all(each.fileno() >= 3 and not os.get_inheritable(each.fileno()) for each in owned)
for number in (0, 1, 2):
    try:
        os.fstat(number)
        good = False
    except OSError:
        pass
os._exit(0 if good else 7)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_dropped_one_is_closed_but_told_as_a_leak() -> None:
    owned = OwnedFd(os.eventfd(0), "leaked on purpose")
    number, key = owned.fileno(), id(owned)
    del owned
    assert not is_open(number)
    assert "leaked on purpose" in tracer.held()
    del tracer._open[key]


def test_the_tracer_knows_what_is_open() -> None:
    before = tracer.held()
    with OwnedFd(os.eventfd(0), "zzz"), OwnedFd(os.eventfd(0), "aaa") as other:
        assert tracer.held() == sorted([*before, "aaa", "zzz"])
        os.close(other.detach())
        assert tracer.held() == sorted([*before, "zzz"])
    assert tracer.held() == before


def test_a_borrowed_one_is_closed_only_after_it_was_given_back() -> None:
    owned = OwnedFd(os.eventfd(0), "x")
    closed = threading.Event()

    def close() -> None:
        owned.close()
        closed.set()

    with owned.borrow() as number, owned.borrow() as same:
        assert number == same
        thread = threading.Thread(target=close)
        thread.start()
        # As soon as the closing has begun, nobody borrows it any more.
        while not owned.closed:
            pass
        with pytest.raises(Closed), owned.borrow():
            pytest.fail("borrowed while it is being closed")
        assert not closed.wait(0.05)
        assert is_open(number)
    thread.join(10)
    assert closed.is_set()
    assert not is_open(number)


def test_an_error_while_it_is_borrowed_gives_it_back() -> None:
    owned = OwnedFd(os.eventfd(0), "x")
    with pytest.raises(RuntimeError), owned.borrow():
        raise RuntimeError
    owned.close()
    assert owned.closed


def test_many_threads_close_it_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(200):
            owned = OwnedFd(os.eventfd(0), "x")
            list(pool.map(lambda each: each.close(), [owned] * 8))
            assert owned.closed


def test_borrowers_never_see_another_object_under_the_number() -> None:
    """One thread closes and others open and borrow: what is borrowed is what was meant."""
    stop = threading.Event()
    wrong: list[str] = []

    def churn() -> None:
        while not stop.is_set():
            os.close(os.open("/dev/null", os.O_RDONLY))

    def look(owned: OwnedFd) -> None:
        try:
            with owned.borrow() as number:
                if "eventfd" not in os.readlink(f"/proc/self/fd/{number}"):
                    wrong.append("another object")
        except Closed:
            return

    churner = threading.Thread(target=churn)
    churner.start()
    with ThreadPoolExecutor(6) as pool:
        for _ in range(150):
            owned = OwnedFd(os.eventfd(0), "x")
            looks = [pool.submit(look, owned) for _ in range(4)]
            closes = [pool.submit(owned.close) for _ in range(2)]
            for future in (*looks, *closes):
                future.result(10)
    stop.set()
    churner.join(10)
    assert wrong == []
