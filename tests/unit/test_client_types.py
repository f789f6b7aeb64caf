"""What a type checker makes of both clients, and what ``help`` shows of them.

What has types here is never called: mypy checks it with the rest of the tests.
"""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import assert_type

import pytest

import kpmd
from kpmd.client import AsyncClient, AsyncStream, Client, Stream, answers
from kpmd.client.calls import Calls


def blocking(client: Client) -> int:
    assert_type(client.link("lnk-1"), answers.Link)
    assert_type(client.links(program="prg-1"), Iterator[answers.Link])
    assert_type(client.detach(id="lnk-1"), None)
    assert_type(client.map_fd("map-1"), int)
    assert_type(client.events(since=None, on_gap=print), Stream[answers.Event])
    with client.records("map-1") as records:
        assert_type(next(records), answers.Record)
    with client.loaded_builtin("count", max_entries={"counts": 1}) as loaded:
        assert_type(loaded, answers.Loaded)
        with client.attached("prg-1", "kretprobe", symbols=["vfs_read"]) as link:
            assert_type(link, answers.Link)
            return link["count"]  # no block swallows errors: nothing is to be returned behind it


async def awaited(client: AsyncClient) -> int:
    assert_type(await client.link("lnk-1"), answers.Link)
    assert_type(client.links(program="prg-1"), AsyncIterator[answers.Link])
    assert_type([each async for each in client.programs()], list[answers.Program])
    assert_type(client.events(since=None, on_gap=print), AsyncStream[answers.Event])
    async with client.events() as events, client.leased(60) as lease:
        assert_type(await anext(events), answers.Event)
        assert_type(lease, answers.Lease)
    async with client.attached("prg-1", symbols=["vfs_read"]) as link:
        return link["count"]


def mistakes(client: Client) -> None:
    """Mypy says where one of these is no mistake any more."""
    client.link(1)  # type: ignore[arg-type]
    client.attach("prg-1", symbol=["a"])  # type: ignore[call-arg]
    client.attached("prg-1", "probe")  # type: ignore[arg-type]
    client.link("lnk-1")["number"]  # type: ignore[misc]


async def mistakes_with_await(client: AsyncClient) -> None:
    await client.links()  # type: ignore[misc]
    client.link("lnk-1")["id"]  # type: ignore[index]
    with client.attached("prg-1"):  # type: ignore[attr-defined]
        pass


METHODS = sorted(
    name
    for base in Client.__mro__
    if issubclass(base, Calls)
    for name, value in vars(base).items()
    if not name.startswith("_") and callable(getattr(value, "__get__", None)) and name != "address"
)


@pytest.mark.parametrize("name", METHODS)
def test_help(name: str) -> None:
    sync, asynchronous = getattr(Client, name), getattr(AsyncClient, name)
    assert inspect.isfunction(sync)
    assert inspect.isfunction(asynchronous)
    assert sync.__doc__ == asynchronous.__doc__ != None  # noqa: E711
    assert sync.__name__ == name
    ours, theirs = inspect.signature(sync), inspect.signature(asynchronous)
    assert ours.parameters == theirs.parameters
    assert "async" not in pydoc.render_doc(sync).splitlines()[2]


def test_the_package_has_types() -> None:
    assert Path(kpmd.__file__).with_name("py.typed").exists()


@pytest.mark.parametrize(
    ("name", "blocking", "awaited"),
    [
        ("link", "answers.Link", "answers.Link"),
        ("links", "Iterator[answers.Link]", "AsyncIterator[answers.Link]"),
        ("events", "Stream[answers.Event]", "AsyncStream[answers.Event]"),
        (
            "attached",
            "AbstractContextManager[answers.Link]",
            "AbstractAsyncContextManager[answers.Link]",
        ),
    ],
)
def test_help_says_what_is_returned(name: str, blocking: str, awaited: str) -> None:
    for client, returned in ((Client, blocking), (AsyncClient, awaited)):
        found = inspect.signature(getattr(client, name))
        assert found.return_annotation == returned


def test_what_the_clients_have_in_common() -> None:
    assert {"attach", "attached", "call", "close", "events", "links", "map_fd"} < set(METHODS)
    assert inspect.iscoroutinefunction(AsyncClient.link)
    assert not inspect.iscoroutinefunction(Client.link)
