"""Calls about what can be traced."""

from __future__ import annotations

from kpmd.api.answers import SymbolAnswer, SymbolsPage
from kpmd.api.bodies import SymbolsQuery
from kpmd.api.fields import address
from kpmd.api.paging import cursor, position
from kpmd.api.route import Call, Reply, Route
from kpmd.core.globs import Glob, GlobError
from kpmd.core.symbols import Function
from kpmd.errors import Gone, Invalid
from kpmd.runtime.executor import Lane


def symbol_answer(function: Function) -> SymbolAnswer:
    """A function as the API shows it."""
    return SymbolAnswer(
        symbol=function.symbol,
        module=function.module,
        address=address(function.address) if function.address else None,
        ambiguous=function.ambiguous,
    )


async def list_symbols(call: Call) -> Reply:
    """GET /symbols"""
    query: SymbolsQuery = call.query
    try:
        glob = Glob.parse(query.pattern)
    except GlobError as error:
        raise Invalid.at(["pattern"], str(error)) from None
    after = position(query.after)

    def find() -> SymbolsPage:
        if call.connection.closed:
            raise Gone("nobody waits for this any more")
        index = call.state.symbols.current().index
        found, more = index.page(glob, after, query.limit)
        return SymbolsPage(
            items=[symbol_answer(index.function(each)) for each in found], next=cursor(more)
        )

    return Reply(await call.state.executor.run(find, lane=Lane.PARSE, uid=call.caller.uid))


ROUTES = [
    Route(
        "GET",
        "/symbols",
        list_symbols,
        "Functions that can be traced",
        SymbolsPage,
        query=SymbolsQuery,
        right="symbols",
        tag="symbols",
    ),
]
