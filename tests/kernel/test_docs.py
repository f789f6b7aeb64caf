"""The commands in the documentation, page by page, with a real daemon on a real kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.pages import Block, blocks, pages
from tests.docs.session import SOCKET, following
from tests.kernel.wire import NOBODY

pytestmark = pytest.mark.once

#: Debian's group adm, which the pages let use kpmd.
ADM = 4

PAGES = {
    page: found
    for page in pages()
    if (found := [each for each in blocks(page) if each.place == "vm"])
}
README, TUTORIAL = "README.md", "docs/tutorial.md"

#: Who does what the pages leave to a user without privileges.
USERS = {"user": (NOBODY, [NOBODY, ADM])}


def test_readme() -> None:
    with following(USERS) as session:
        for each in PAGES[README]:
            session.do(each)
    assert not SOCKET.exists()


@pytest.fixture(scope="module")
def rest_of_tutorial() -> Iterator[list[Block]]:
    """The tutorial's beginning, which starts the daemon of all pages but README; and the rest."""
    rest = list(PAGES[TUTORIAL])
    with following(USERS) as session:
        while not rest[0].daemon:
            session.do(rest.pop(0))
        session.do(rest.pop(0))
        yield rest
    assert not SOCKET.exists()


def test_tutorial(rest_of_tutorial: list[Block]) -> None:
    with following(USERS) as session:
        for each in rest_of_tutorial:
            session.do(each)


@pytest.mark.parametrize("page", [each for each in PAGES if each not in (README, TUTORIAL)])
def test_page(rest_of_tutorial: list[Block], page: str) -> None:
    with following(USERS) as session:
        for each in PAGES[page]:
            session.do(each)
