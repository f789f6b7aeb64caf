"""A queue in which users take turns, and whether there are several of them."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Turns(Generic[U, T]):
    """Items of several users: each gets its turn, and its own in the order they came."""

    def __init__(self) -> None:
        self._users: OrderedDict[U, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._users.values()))

    def count(self, user: U) -> int:
        """How many items of this user wait."""
        return len(self._users.get(user, ()))

    def push(self, user: U, item: T) -> None:
        """Put an item behind all others of its user."""
        self._users.setdefault(user, deque()).append(item)

    def pop(self, may: Callable[[U], bool] = lambda user: True) -> T | None:
        """The item whose turn it is, of the users who ``may`` have one; None: there is none."""
        for user, items in self._users.items():
            if may(user):
                item = items.popleft()
                if items:
                    self._users.move_to_end(user)
                else:
                    del self._users[user]
                return item
        return None

    def remove(self, user: U, item: T) -> bool:
        """Take an item away; False where it is not there any more."""
        items = self._users.get(user)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._users[user]
        return True


class Gate:
    """Lets one piece of work through in each round of the event loop, users in turn.

    For what is never done with: streams that are always ready. All else gets its time in between.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: Turns[int, asyncio.Future[None]] = Turns()
        self._taken = False

    async def enter(self, uid: int) -> None:
        """Return when it is this user's turn; until ``leave`` it is nobody else's."""
        if not self._taken:
            self._taken = True
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.push(uid, turn)
        try:
            await turn
        except BaseException:
            if not self._waiting.remove(uid, turn):
                self.leave()  # it had just come
            raise

    def leave(self) -> None:
        """The next one may enter in the next round."""
        self._loop.call_soon(self._next)

    def _next(self) -> None:
        turn = self._waiting.pop()
        while turn is not None and turn.done():
            turn = self._waiting.pop()
        if turn is None:
            self._taken = False
        else:
            turn.set_result(None)


class Crowd:
    """Whether several users came lately. For the event loop only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last: int | None = None
        self._changed_at = -math.inf

    def came(self, uid: int) -> None:
        """A user came."""
        if uid != self._last:
            if self._last is not None:
                self._changed_at = self._loop.time()
            self._last = uid

    def within(self, seconds: float) -> bool:
        """Whether one user followed another in the last so many seconds."""
        return self._loop.time() - self._changed_at < seconds
