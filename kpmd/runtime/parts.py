"""One kpmd link of several kernel links, where the kernel cannot make it in one piece."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence

from kpmd.bpf.objects import LinkDetails
from kpmd.runtime.kernel import Handle, Kernel

Made = tuple[Handle, LinkDetails]


class Parts:
    """The handles of several kernel links, closed together."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = tuple(handles)

    def close(self) -> None:
        """Close all, in reverse, whatever one of them says; raises the first error."""
        failed: OSError | None = None
        for handle in reversed(self.handles):
            try:
                handle.close()
            except OSError as error:
                failed = failed or error
        if failed is not None:
            raise failed


def create(make: Callable[[slice], Made], count: int) -> Made:
    """Make a link to ``count`` targets: in one piece, else in halves of halves; all or none.

    ENOMEM asks for that: kernels 6.7 to 6.11 want the memory for all targets in one piece.

    ``make`` makes the kernel link of a slice of the targets, or raises OSError.
    """
    todo = [slice(0, count)]
    made: list[Made] = []
    try:
        while todo:
            part = todo.pop()
            try:
                made.append(make(part))
            except OSError as error:
                size = part.stop - part.start
                if error.errno != errno.ENOMEM or size < 2:
                    raise
                middle = part.start + size // 2
                todo += [slice(middle, part.stop), slice(part.start, middle)]
    except BaseException:
        # What went wrong first is what is told.
        with contextlib.suppress(OSError):
            Parts([handle for handle, _ in made]).close()
        raise
    if len(made) == 1:
        return made[0]
    return Parts([handle for handle, _ in made]), total([details for _, details in made])


def details_of(kernel: Kernel, handle: Handle) -> LinkDetails:
    """What the kernel tells of a link now, of all its parts together."""
    if isinstance(handle, Parts):
        return total([kernel.link_details(each) for each in handle.handles])
    return kernel.link_details(handle)


def total(parts: Sequence[LinkDetails]) -> LinkDetails:
    """The details of several kernel links as those of one, under the first one's id."""
    counts = [each.count for each in parts if each.count is not None]
    missed = [each.missed for each in parts if each.missed is not None]
    return LinkDetails(
        kernel_id=parts[0].kernel_id,
        program_kernel_id=parts[0].program_kernel_id,
        count=sum(counts) if len(counts) == len(parts) else None,
        missed=sum(missed) if len(missed) == len(parts) else None,
    )
