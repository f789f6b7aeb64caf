"""Calls that are written once, as coroutines, and made by both clients.

``Client`` and ``AsyncClient`` inherit the same methods. What these descriptors give depends on
whose they are: of a ``Sync`` what blocks, of an ``Async`` what is awaited.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from types import FunctionType, MethodType, TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from kpmd.client.errors import Gone, NotFound
from kpmd.client.net import run

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
S = TypeVar("S")
A = TypeVar("A")


class Sync:
    """Base of a client whose calls block."""


class Async:
    """Base of a client whose calls are awaited."""

    @staticmethod
    async def _finish(work: Coroutine[Any, Any, T]) -> tuple[T, BaseException | None]:
        """Bring ``work`` to its end, whoever cancels it meanwhile; the cancellation, if any."""
        raise NotImplementedError


class TwoFaced(Generic[P, S, A]):
    """A method, of which a ``Sync`` has one function and an ``Async`` another.

    Both have the parameters and the docstring of ``told``; ``forms``, if any, say what they return
    where ``told`` returns ``X`` or ``Something[X]``.
    """

    def __init__(
        self,
        told: Callable[..., Any],
        sync: Callable[..., Any],
        asynchronous: Callable[..., Any],
        forms: tuple[str, str] = ("", ""),
    ) -> None:
        self.__doc__ = told.__doc__
        self._sync = functools.wraps(_returning(told, forms[0]))(sync)
        self._async = functools.wraps(_returning(told, forms[1]))(asynchronous)

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, instance: Sync, owner: type) -> Callable[P, S]: ...
    @overload
    def __get__(self, instance: Async, owner: type) -> Callable[P, A]: ...
    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        function = self._async if issubclass(owner, Async) else self._sync
        return function if instance is None else MethodType(function, instance)


def _returning(told: Callable[..., Any], form: str) -> Callable[..., Any]:
    """A copy of ``told`` to show, which says that it returns something else."""
    if not form or not isinstance(told, FunctionType):
        return told
    shown = FunctionType(told.__code__, told.__globals__, argdefs=told.__defaults__)
    functools.update_wrapper(shown, told)
    vars(shown).pop("__wrapped__")
    shown.__kwdefaults__ = told.__kwdefaults__
    returned = told.__annotations__["return"]
    item = returned.partition("[")[2].removesuffix("]") or returned
    shown.__annotations__ = {**told.__annotations__, "return": f"{form}[{item}]"}
    return shown


class operation(TwoFaced[P, T, Coroutine[Any, Any, T]]):  # noqa: N801 - a decorator
    """A call that answers once."""

    def __init__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> None:
        self.function = function

        def sync(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
            return run(function(self, *args, **kwargs))

        async def asynchronous(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
            return await function(self, *args, **kwargs)

        super().__init__(function, sync, asynchronous)


# Lists


class Items(Protocol[T_co]):
    """A list that is asked for as it is read."""

    async def next(self) -> T_co:
        """The next of it. Raises StopAsyncIteration at its end."""


class _Iterator(Iterator[T]):
    def __init__(self, items: Items[T]) -> None:
        self._items = items

    def __next__(self) -> T:
        try:
            return run(self._items.next())
        except StopAsyncIteration:
            raise StopIteration from None


class _AsyncIterator(AsyncIterator[T]):
    def __init__(self, items: Items[T]) -> None:
        self._items = items

    async def __anext__(self) -> T:
        return await self._items.next()


class listing(TwoFaced[P, Iterator[T], AsyncIterator[T]]):  # noqa: N801 - a decorator
    """A call that gives a list: an iterator, or an asynchronous one."""

    def __init__(self, function: Callable[Concatenate[Any, P], Items[T]]) -> None:
        def sync(self: Any, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
            return _Iterator(function(self, *args, **kwargs))

        def asynchronous(self: Any, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
            return _AsyncIterator(function(self, *args, **kwargs))

        super().__init__(function, sync, asynchronous, ("Iterator", "AsyncIterator"))


# What is ended at the end of a block


class _Made(AbstractContextManager[T, None]):
    def __init__(
        self, make: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, None]]
    ) -> None:
        self._make = make
        self._undo = undo

    def __enter__(self) -> T:
        self._made = run(self._make)
        return self._made

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            run(_undone(self._undo(self._made)))
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"besides, what the block made was not ended: {failure}")

    def __del__(self) -> None:
        self._make.close()  # where it was never entered


class _Finish(Protocol):
    """``Async._finish``."""

    async def __call__(self, work: Coroutine[Any, Any, T]) -> tuple[T, BaseException | None]:
        """Bring ``work`` to its end."""


class _AsyncMade(AbstractAsyncContextManager[T, None]):
    def __init__(
        self,
        finish: _Finish,
        make: Coroutine[Any, Any, T],
        undo: Callable[[T], Coroutine[Any, Any, None]],
    ) -> None:
        self._finish = finish
        self._make = make
        self._undo = undo

    async def __aenter__(self) -> T:
        # Broken off, the daemon would make it and nobody know its id.
        self._made, cancelled = await self._finish(self._make)
        if cancelled is not None:
            await self.__aexit__(type(cancelled), cancelled, None)
            raise cancelled
        return self._made

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            _, cancelled = await self._finish(_undone(self._undo(self._made)))
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"besides, what the block made was not ended: {failure}")
        else:
            if cancelled is not None:
                raise cancelled

    def __del__(self) -> None:
        self._make.close()


async def _undone(work: Coroutine[Any, Any, None]) -> None:
    """Undo; what has ended already is undone."""
    with suppress(NotFound, Gone):
        await work


class _Managed(TwoFaced[P, AbstractContextManager[T, None], AbstractAsyncContextManager[T, None]]):
    """A context manager around a call that makes something."""

    def __init__(
        self, make: operation[P, T], undo: Callable[[Any, T], Coroutine[Any, Any, None]]
    ) -> None:
        function = make.function

        def sync(self: Any, *args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T, None]:
            return _Made(function(self, *args, **kwargs), functools.partial(undo, self))

        def asynchronous(
            self: Any, *args: P.args, **kwargs: P.kwargs
        ) -> AbstractAsyncContextManager[T, None]:
            return _AsyncMade(
                self._finish, function(self, *args, **kwargs), functools.partial(undo, self)
            )

        forms = ("AbstractContextManager", "AbstractAsyncContextManager")
        super().__init__(function, sync, asynchronous, forms)
        for each in (self, self._sync, self._async):
            each.__doc__ = undo.__doc__
        for function_ in (self._sync, self._async):
            function_.__name__, function_.__qualname__ = undo.__name__, undo.__qualname__


def managed(
    make: operation[P, T],
) -> Callable[[Callable[[Any, T], Coroutine[Any, Any, None]]], _Managed[P, T]]:
    """A context manager that begins with ``make``, whose parameters it has.

    What is decorated takes what was made and ends it; the docstring is the context manager's.
    """

    def decorate(undo: Callable[[Any, T], Coroutine[Any, Any, None]]) -> _Managed[P, T]:
        return _Managed(make, undo)

    return decorate
