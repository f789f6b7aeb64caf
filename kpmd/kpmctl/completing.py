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


#: By the prefix of ids: the client's call that lists such things, and what is told of each.
_IDS = {
    "lnk": ("links", "{kind}, {count} functions"),
    "prg": ("programs", "{name}, {links} links"),
    "map": ("maps", "{name}, {type}"),
    "lse": ("leases", "until {expires_at}"),
    "cli": ("clients", "{command}[{pid}]"),
}


def ids(ctx: click.Context, prefixes: Iterable[str], begin: str) -> list[CompletionItem]:
    """Ids that begin so, of the kinds with these prefixes."""

    def find(client: Client) -> Iterator[CompletionItem]:
        for prefix in prefixes:
            call, told = _IDS[prefix]
            for each in getattr(client, call)():
                if each["id"].startswith(begin):
                    yield CompletionItem(clean(each["id"]), help=clean(told.format_map(each)))

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
