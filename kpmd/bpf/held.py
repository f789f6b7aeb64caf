"""Whether an open file is held by anybody at all, whoever and wherever they are."""

from __future__ import annotations

import select

from kpmd.bpf.fd import OwnedFd


class Held:
    """Looks after an open file that is about to be closed here, and does not keep it open.

    An epoll instance has a file on its list until the last file descriptor of it is closed, in
    whatever process (epoll(7), questions and answers, 6); ``/proc/PID/fdinfo`` shows the list
    (proc(5)). A file in memory that is mapped, or on its way through a socket, is open too.
    """

    def __init__(self, fd: OwnedFd) -> None:
        """Raises OSError: there are no file descriptors left, say. Maps can be on it from 5.8."""
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        try:
            with fd.borrow() as number:
                self._epoll.register(number, 0)
        except BaseException:
            self._epoll.close()
            raise

    def still(self) -> bool:
        """Whether it is open somewhere."""
        with open(f"/proc/self/fdinfo/{self._epoll.fileno()}", "rb") as file:
            return b"\ntfd:" in file.read()

    def close(self) -> None:
        """Look no more."""
        self._epoll.close()
