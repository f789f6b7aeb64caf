"""What a shell completes with the daemon's help. Silent, and quick, where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from kpmd.client.errors import ClientError
from kpmd.kpmctl.output import clean

if TYPE_CHECKING:
    from kpmd.client.client import Client

#: Seconds to wait for the daemon: longer would feel as if the shell hung.
_PATIENCE = 1.0

#: Items that are offered at the most.
_MOST = 200


def _of_links(client: Client) -> Iterator[tuple[str, str]]:
    for each in client.links():
        yield each["id"], f"{each['kind']}, {each['count']} functions"


def _of_programs(client: Client) -> Iterator[tuple[str, str]]:
    for each in client.programs():
        yield each["id"], f"{each['name']}, {each['links']} links"


def _of_maps(client: Client) -> Iterator[tuple[str, str]]:
    for each in client.maps():
        yield each["id"], f"{each['name']}, {each['type']}"


def _of_leases(client: Client) -> Iterator[tuple[str, str]]:
    for each in client.leases():
        yield each["id"], f"until {each['expires_at']}"


def _of_clients(client: Client) -> Iterator[tuple[str, str]]:
    for each in client.clients():
        yield each["id"], f"{each['command']}[{each['pid']}]"


_IDS: dict[str, Callable[[Client], Iterator[tuple[str, str]]]] = {
    "lnk": _of_links,
    "prg": _of_programs,
    "map": _of_maps,
    "lse": _of_leases,
    "cli": _of_clients,
}


def ids(ctx: click.Context, prefixes: Iterable[str], begin: str) -> list[CompletionItem]:
    """Ids that begin so, of the kinds with these prefixes."""

    def find(client: Client) -> Iterator[CompletionItem]:
        for prefix in prefixes:
            for id_, help_ in _IDS[prefix](client):
                if id_.startswith(begin):
                    yield CompletionItem(clean(id_), help=clean(help_))

    return _asked(ctx, find)


def functions(ctx: click.Context, begin: str) -> list[CompletionItem]:
    """Functions that can be traced and whose names begin so; none for a glob, or for nothing."""
    if not begin or not all(each.isalnum() or each in "_." for each in begin):
        return []

    def find(client: Client) -> Iterator[CompletionItem]:
        for each in client.symbols(f"{begin}*"):
            yield CompletionItem(clean(each["symbol"]), help=each["module"])

    return _asked(ctx, find)


def _asked(
    ctx: click.Context, find: Callable[[Client], Iterator[CompletionItem]]
) -> list[CompletionItem]:
    from kpmd.client.client import Client

    try:
        with Client(ctx.find_root().params.get("socket"), timeout=_PATIENCE) as client:
            return list(itertools.islice(find(client), _MOST))
    except ClientError:
        return []
