"""From what a client names to what the kernel attaches to."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from kpmd.core.model import Targets
from kpmd.core.specs import LinkSpec, check_distinct
from kpmd.core.symbols import Function, SymbolIndex
from kpmd.errors import AddressNotTraceable


@dataclass(frozen=True)
class Resolved:
    """Targets of a link. ``by_address``: the kernel gets addresses; else it looks up the names."""

    targets: Targets
    by_address: bool


class Unresolved(Exception):
    """Names that are not in the index."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"{len(names)} unknown")
        self.names = names


def resolve(spec: LinkSpec, index: SymbolIndex) -> Resolved:
    """Find each target in the index, in the order of the request.

    Raises Unresolved for names it does not have, AddressNotTraceable for addresses of which it
    knows that they are no traceable function, Invalid where two names mean one function.
    """
    cookies = array("Q", spec.cookies if spec.cookies is not None else [0] * _count(spec))
    if spec.symbols is not None:
        return _symbols(spec, index, cookies)
    return _addresses(spec, index, cookies)


def _count(spec: LinkSpec) -> int:
    return len(spec.symbols or spec.addresses or ())


def _symbols(spec: LinkSpec, index: SymbolIndex, cookies: array[int]) -> Resolved:
    names = tuple(spec.symbols or ())
    if not index.knows_traceable:
        # Only the kernel can say, and it will.
        return Resolved(Targets(names, array("Q"), cookies, {}), by_address=False)
    # Of several functions of one name the first, as the kernel itself would take.
    found = [next(iter(index.find(name)), None) for name in names]
    missing = [name for name, function in zip(names, found, strict=True) if function is None]
    if missing:
        raise Unresolved(missing)
    functions = [function for function in found if function is not None]
    if not all(function.address for function in functions):
        return Resolved(Targets(names, array("Q"), cookies, _modules(functions)), by_address=False)
    addresses = array("Q", [function.address for function in functions])
    check_distinct("symbols", addresses)  # two names of one function
    return Resolved(Targets(names, addresses, cookies, _modules(functions)), by_address=True)


def _modules(functions: list[Function]) -> dict[int, str]:
    return {
        position: function.module
        for position, function in enumerate(functions)
        if function.module is not None
    }


def _addresses(spec: LinkSpec, index: SymbolIndex, cookies: array[int]) -> Resolved:
    asked = spec.addresses or ()
    if not index.has_addresses:
        return Resolved(Targets((), array("Q", asked), cookies, {}), by_address=True)
    found = [index.at(address) for address in asked]
    unknown = [address for address, function in zip(asked, found, strict=True) if function is None]
    if unknown:
        raise AddressNotTraceable(
            f"{len(unknown)} of {len(asked)} addresses are not the start of a function "
            "that the kernel can trace",
            unknown,
        )
    functions = [function for function in found if function is not None]
    # The start, even where the place behind its ENDBR was asked for: by that the program would
    # read cookie 0.
    addresses = array("Q", [function.address for function in functions])
    check_distinct("addresses", addresses)
    names = tuple(function.symbol for function in functions)
    return Resolved(Targets(names, addresses, cookies, _modules(functions)), by_address=True)
