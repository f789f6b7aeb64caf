"""From what a client names to what the kernel attaches to, and what becomes of each name."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from kpmd.core.deny import Denials
from kpmd.core.globs import Glob
from kpmd.core.model import Skipped, Targets
from kpmd.core.policy import Fence, forbidden
from kpmd.core.specs import TargetSpec
from kpmd.core.symbols import SymbolIndex
from kpmd.errors import (
    MAX_SYMBOLS,
    AddressNotTraceable,
    Forbidden,
    Invalid,
    KpmdError,
    SymbolNotFound,
)

#: Whether a name is on the kernel's own blacklist of functions that must not be probed.
Blacklisted = Callable[[str], bool]

#: What one request can have skipped at the most: more than any kernel has functions.
MAX_SKIPPED = 1 << 16

_UNKNOWN = "does not exist in this kernel or its loaded modules"
_UNTRACEABLE = "exists, but the kernel cannot trace it (see available_filter_functions in tracefs)"
_BLACKLISTED = "is on the kernel's blacklist of functions that must not be probed"
_NO_ADDRESS = "is not the start of a function that the kernel can trace"


@dataclass(frozen=True)
class Resolved:
    """Targets of a link, and what was asked for but is not among them.

    ``by_address``: the kernel gets addresses; else it looks the names up itself.
    """

    targets: Targets
    by_address: bool
    skipped: tuple[Skipped, ...]


def resolve(
    spec: TargetSpec,
    index: SymbolIndex,
    deny: Denials,
    blacklisted: Blacklisted,
    *,
    lenient: bool = False,
    fence: Fence | None = None,
) -> Resolved:
    """Find each target in the index: symbols and addresses in the order of the request.

    Raises SymbolNotFound, AddressNotTraceable, and Invalid where two names mean one function or a
    name means two and ``on_ambiguous`` is ``error``. ``lenient``, for a dry run: what would be an
    error is skipped, with its reason. ``fence``: what the caller may attach to, if not everything;
    what is outside is skipped where that is asked for, or raises Forbidden.
    """
    work = _Work(spec, index, blacklisted, lenient or spec.skips)
    if spec.patterns is not None:
        work.patterns(deny, lenient)
    elif spec.addresses is not None:
        work.addresses()
    else:
        work.symbols(lenient)
    if fence is not None:
        work.keep_inside(fence)
    work.leave_out_what_names_cannot_tell()
    if not lenient:
        work.check_any(fence)
    return work.resolved()


class _Work:
    """One resolution under way."""

    def __init__(
        self, spec: TargetSpec, index: SymbolIndex, blacklisted: Blacklisted, skips: bool
    ) -> None:
        self._spec, self._index, self._blacklisted, self._skips = spec, index, blacklisted, skips
        self._positions: list[int] = []
        self._names: list[str] | None = None
        self._raw: list[int] | None = None
        self._cookies = array("Q")
        #: Where in the request each position was named; None: at its own place.
        self._places: list[int] | None = None
        self._skipped: list[Skipped] = []
        #: Skipped functions by position: one may be a target under another name.
        self._left_out: dict[int, Skipped] = {}

    # Symbols

    def symbols(self, lenient: bool) -> None:
        """Each symbol, by name."""
        index, names = self._index, list(self._spec.symbols or ())
        cookies = self._spec.cookies
        if not index.knows_traceable:
            # Only the kernel can say, and it will.
            self._names = names
            self._cookies = array("Q", cookies or bytes(8 * len(names)))
            return
        found = index.first(names)
        self._names = []
        missing: list[str] = []
        unclear: list[str] = []
        several = index.repeated.keys() & set(names)
        if None not in found and (self._spec.on_ambiguous == "first" or not several):
            # All that most requests need, and quick for many names: what ``first`` gave is taken.
            for name in sorted(several):
                self._one_of(name, index.repeated[name], unclear)
            self._positions = cast(list[int], found)
            self._names = names
            self._cookies = array("Q", cookies or bytes(8 * len(names)))
            self._distinct()
            return
        places: list[int] = []
        self._places = places
        for at, (name, first) in enumerate(zip(names, found, strict=True)):
            positions = index.find(name) if first is None else index.repeated.get(name, [first])
            if not positions:
                missing.append(name)
                continue
            if len(positions) > 1:
                positions = self._one_of(name, positions, unclear)
            for position in positions:
                places.append(at)
                self._positions.append(position)
                # An alias as it was asked for; a compiler's variant by its own name.
                self._names.append(index.names[position] if first is None else name)
                self._cookies.append(cookies[at] if cookies is not None else 0)
        self._refuse(missing, unclear, lenient)
        self._distinct()

    def _absent(self, name: str) -> Skipped:
        if self._index.absence(name) == "unknown":
            return Skipped(name, None, "unknown", _UNKNOWN)
        if self._blacklisted(name):
            return Skipped(name, None, "blacklisted", _BLACKLISTED)
        return Skipped(name, None, "untraceable", _UNTRACEABLE)

    def _one_of(self, name: str, positions: list[int], unclear: list[str]) -> list[int]:
        """What ``on_ambiguous`` makes of several functions of one name."""
        if self._spec.on_ambiguous == "all":
            return positions
        if self._spec.on_ambiguous == "error":
            unclear.append(name)
            return []
        first, *others = positions
        address = self._index.addresses[first]
        where = f", at 0x{address:016x}" if address else ""
        for other in others:
            self._skip(other, "ambiguous", f"another function of this name is attached to{where}")
        return [first]

    def _refuse(self, missing: list[str], unclear: list[str], lenient: bool) -> None:
        if unclear and not lenient:
            raise Invalid(
                f"{len(unclear)} name(s) stand for several functions, the first of them "
                f"{unclear[0]!r}; give addresses, or on_ambiguous first or all",
                symbols=unclear[:MAX_SYMBOLS],
                symbols_total=len(unclear),
            )
        for name in unclear:
            self._skipped.append(Skipped(name, None, "ambiguous", "stands for several functions"))
        if missing and not self._skips:
            raise _not_found([self._absent(name) for name in missing[:MAX_SYMBOLS]], missing)
        self._check_skipped(len(missing))
        self._skipped += map(self._absent, missing)

    def _check_skipped(self, number: int) -> None:
        if number > MAX_SKIPPED:
            raise Invalid.at(
                [self._spec.which],
                f"{number} of them cannot be attached to; {MAX_SKIPPED} are the most to skip",
            )

    def _distinct(self) -> None:
        """Two names or addresses of one function are one target twice."""
        if len(set(self._positions)) == len(self._positions):
            return
        seen: dict[int, int] = {}
        repeated = []
        for at, position in enumerate(self._positions):
            place = at if self._places is None else self._places[at]
            if seen.setdefault(position, place) == place:
                continue
            repeated.append(at)
            # Asked for all of each name, names may well overlap: foo, and foo.isra.0.
            if self._spec.on_ambiguous != "all" or self._spec.symbols is None:
                raise Invalid.at(
                    [self._spec.which, place],
                    f"is the function that stands at {seen[position]} already, "
                    f"{self._index.names[position]}; name each function once",
                )
        self._drop(repeated)

    def _drop(self, places: list[int]) -> None:
        if not places:
            return
        gone = set(places)
        kept = [at for at in range(len(self._cookies)) if at not in gone]
        if self._positions:
            self._positions = [self._positions[at] for at in kept]
        self._cookies = array("Q", [self._cookies[at] for at in kept])
        if self._names is not None:
            self._names = [self._names[at] for at in kept]

    # Addresses

    def addresses(self) -> None:
        """Each address: a function's start, or the place behind its ENDBR that tracefs lists."""
        asked = self._spec.addresses or ()
        cookies = self._spec.cookies
        found = [self._index.at(address) for address in asked]
        if None in found and self._only_kernel_can_say(asked, found):
            self._raw = list(asked)
            self._cookies = array("Q", cookies or bytes(8 * len(asked)))
            return
        unknown = []
        places: list[int] = []
        self._places = places
        for at, (address, position) in enumerate(zip(asked, found, strict=True)):
            if position is None:
                unknown.append(address)
                continue
            places.append(at)
            self._positions.append(position)
            self._cookies.append(cookies[at] if cookies is not None else 0)
        if unknown and not self._skips:
            raise AddressNotTraceable(
                f"{len(unknown)} of {len(asked)} addresses are not the start of a function "
                "that the kernel can trace",
                unknown,
            )
        self._check_skipped(len(unknown))
        self._skipped += [
            Skipped(f"0x{address:016x}", None, "untraceable", _NO_ADDRESS) for address in unknown
        ]
        self._distinct()

    def _only_kernel_can_say(self, asked: Sequence[int], found: Sequence[int | None]) -> bool:
        """Whether an address that is not in the index may be good all the same."""
        index = self._index
        if not index.has_any_address:
            return True
        return all(
            position is not None or address in index.candidates
            for address, position in zip(asked, found, strict=True)
        )

    # Patterns

    def patterns(self, deny: Denials, lenient: bool) -> None:
        """Everything that the patterns match, but what is excluded or denied."""
        index, spec = self._index, self._spec
        if not index.knows_traceable:
            raise _nothing_to_match()
        globs = [Glob.parse(text) for text in spec.patterns or ()]
        matched: dict[int, None] = {}
        for glob in globs:
            found = index.glob(glob)
            if not found:
                self._no_match(glob, spec.patterns or (), lenient)
            matched.update(dict.fromkeys(found))
        for text in spec.exclude:
            for position in index.glob(Glob.parse(text)):
                matched.pop(position, None)
        self._deny(matched, deny)
        unclear: list[str] = []
        self._choose(matched, unclear)
        missing = self._untraceable(globs) if lenient or spec.on_untraceable == "error" else []
        self._refuse(missing, unclear, lenient)
        self._cookies = array("Q", bytes(8 * len(self._positions)))

    def _no_match(self, glob: Glob, texts: Iterable[str], lenient: bool) -> None:
        text = next(text for text in texts if Glob.parse(text) == glob)
        hidden = self._index.untraceable(glob)
        reason = (
            f"matches {len(hidden)} function(s), none of which the kernel can trace"
            if hidden
            else "matches no function of this kernel or its loaded modules"
        )
        if not lenient:
            raise SymbolNotFound(f"the pattern {text!r} {reason}", [text], [reason])
        if not hidden:  # else each of them is told of
            self._skipped.append(Skipped(text, None, "unknown", reason))

    def _deny(self, matched: dict[int, None], deny: Denials) -> None:
        for position in sorted(deny.keys() & matched.keys()):
            del matched[position]
            self._skip(position, "denied", f"is on the deny list: {deny[position]}")

    def _choose(self, matched: dict[int, None], unclear: list[str]) -> None:
        """Of functions of one name those that ``on_ambiguous`` takes."""
        if self._spec.on_ambiguous != "all":
            for name, positions in self._index.repeated.items():
                several = [position for position in positions if position in matched]
                if len(several) > 1:
                    for position in set(several).difference(self._one_of(name, several, unclear)):
                        del matched[position]
        self._positions = sorted(matched)

    def _untraceable(self, globs: list[Glob]) -> list[str]:
        names = dict.fromkeys(name for glob in globs for name in self._index.untraceable(glob))
        for text in self._spec.exclude:
            for name in self._index.untraceable(Glob.parse(text)):
                names.pop(name, None)
        return list(names)

    # What the caller may attach to

    def keep_inside(self, fence: Fence) -> None:
        """Leave out, or refuse, what is outside of the fence. Raises Forbidden."""
        if self._raw is not None:
            raise forbidden(
                fence.rule,
                "let you attach to an address of which kpmd cannot tell the function; give symbols",
            )
        index, which = self._index, self._spec.which
        names = self._names
        if names is not None and not index.knows_traceable:
            refused = {
                at: why for at, name in enumerate(names) if (why := fence.refused_name(name))
            }
            shown = {at: Skipped(names[at], None, "forbidden", why) for at, why in refused.items()}
        else:
            outside = fence.refused(self._positions)
            if not outside:
                return
            shown = {
                at: Skipped(
                    index.names[position], index.module(position), "forbidden", outside[position]
                )
                for at, position in enumerate(self._positions)
                if position in outside
            }
        if not shown:
            return
        if not self._skips:
            raise _outside(
                fence, list(shown.values()), f"let you attach to {len(shown)} of the {which}"
            )
        self._check_skipped(len(shown))
        self._skipped += [
            replace(each, detail=f"{each.detail} (rule {fence.rule.name})")
            for each in shown.values()
        ]
        self._drop(list(shown))

    # What came of it

    def _skip(self, position: int, reason: Literal["ambiguous", "denied"], detail: str) -> None:
        index = self._index
        self._left_out[position] = Skipped(
            index.names[position], index.module(position), reason, detail
        )

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What is not attached to."""
        attached = self._left_out.keys() & self._positions
        left_out = (each for at, each in self._left_out.items() if at not in attached)
        return (*self._skipped, *left_out)

    def leave_out_what_names_cannot_tell(self) -> None:
        """Where addresses are hidden, the kernel gets names, and takes the first of each.

        Another function of that name cannot be attached to then.
        """
        index = self._index
        if all(index.addresses[position] for position in self._positions):
            return
        other = [
            at for at, position in enumerate(self._positions) if not index.kernel_takes(position)
        ]
        missing = [
            Skipped(
                index.names[self._positions[at]],
                index.module(self._positions[at]),
                "ambiguous",
                "cannot be told from another function of its name, since its address is hidden",
            )
            for at in other
        ]
        if missing and not self._skips:
            raise _not_found(missing, [each.symbol for each in missing])
        self._skipped += missing
        self._drop(other)

    def check_any(self, fence: Fence | None) -> None:
        """Raise where nothing is left to attach to."""
        if self._positions or self._names or self._raw:
            return
        outside = [each for each in self.skipped if each.reason == "forbidden"]
        if outside and fence is not None:
            raise _outside(fence, outside, f"let you attach to any of the {self._spec.which}")
        if self._spec.addresses is not None:
            raise AddressNotTraceable(
                "none of the addresses is the start of a function that the kernel can trace",
                list(self._spec.addresses),
            )
        skipped = list(self.skipped)
        if skipped:
            raise _not_found(skipped[:MAX_SYMBOLS], [each.symbol for each in skipped])
        raise _nothing_left()

    def resolved(self) -> Resolved:
        """The targets found so far."""
        index = self._index
        if self._raw is not None:
            targets = Targets((), array("Q", self._raw), self._cookies, {})
            return Resolved(targets, True, self.skipped)
        if self._names is not None and not index.knows_traceable:
            targets = Targets(tuple(self._names), array("Q"), self._cookies, {})
            return Resolved(targets, False, self.skipped)
        names = self._names
        if names is None:
            names = index.pick(index.names, self._positions)
        addresses = array("Q", index.pick(index.addresses, self._positions))
        modules = index.modules(self._positions)
        by_address = 0 not in addresses
        if not by_address:
            addresses = array("Q")
        targets = Targets(tuple(names), addresses, self._cookies, modules)
        return Resolved(targets, by_address, self.skipped)


def _not_found(shown: list[Skipped], missing: list[str]) -> SymbolNotFound:
    """``shown``: the first of what is ``missing``, with reasons."""
    first = shown[0]
    return SymbolNotFound(
        f"{len(missing)} symbol(s) cannot be attached to, the first of them {first.symbol!r}: "
        f"it {first.detail}; nothing was attached",
        missing,
        [each.detail for each in shown],
    )


def _outside(fence: Fence, outside: list[Skipped], what: str) -> Forbidden:
    first = outside[0]
    return forbidden(
        fence.rule,
        f"{what}, the first of them {first.symbol!r}: it {first.detail}; nothing was attached",
        symbols=[each.symbol for each in outside[:MAX_SYMBOLS]],
        symbols_total=len(outside),
    )


def _nothing_left() -> SymbolNotFound:
    return SymbolNotFound("what the patterns match is all excluded: nothing is left", [], [])


def _nothing_to_match() -> KpmdError:
    return Invalid.at(
        ["patterns"],
        "this kernel does not tell what can be traced (tracefs cannot be read); give symbols",
    )
