"""``python -m tests.tools.man FOLDER``: the manual pages, kpmctl's from the commands themselves.

sphinx-click reads the commands, and Sphinx's own writer makes the pages, with warnings as errors.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from docutils import nodes
from sphinx.application import Sphinx

from kpmd import __version__
from kpmd.kpmctl.cli import main as kpmctl
from tests.tools import man_daemon


def commands(
    command: click.Command = kpmctl, parent: click.Context | None = None
) -> Iterator[click.Context]:
    """A context for each command, groups and what is in them."""
    settings = command.context_settings
    context = click.Context(command, info_name=command.name, parent=parent, **settings)
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is None:
                raise LookupError(f"{name} is listed, and no command")
            if not found.hidden:
                yield from commands(found, context)


def page_name(context: click.Context) -> str:
    """``kpmctl-lease-create``."""
    return context.command_path.replace(" ", "-")


def _what(command: click.Command) -> str:
    """What a page's NAME section says."""
    return command.get_short_help_str(200).rstrip(".")


def source(context: click.Context) -> str:
    """A page's reStructuredText."""
    name, command = page_name(context), context.command
    others = [page_name(context.parent)] if context.parent else []
    if isinstance(command, click.Group):
        others += [f"{name}-{each}" for each in command.list_commands(context)]
    return "\n".join(
        [
            name,
            "=" * len(name),
            "",
            f".. click:: tests.tools.man:{name.replace('-', '_')}",
            f"   :prog: {context.command_path}",
            "   :nested: none",
            "",
            "See also",
            "--------",
            "",
            ", ".join(f":manpage:`{each}(1)`" for each in others),
            "",
        ]
    )


def __getattr__(name: str) -> click.Command:
    """The command of a page, as sphinx-click imports it: ``kpmctl_lease_create``."""
    for context in commands():
        if page_name(context).replace("-", "_") == name:
            return context.command
    raise AttributeError(name)


def _rename(app: Sphinx, doctree: nodes.document) -> None:
    """A manual page has a section DESCRIPTION, where sphinx-click has one of the command's name."""
    _, made_by_click, *_ = doctree.findall(nodes.section)
    title = made_by_click.next_node(nodes.title)
    if title is not None and title.astext().startswith("kpmctl"):
        title.replace_self(nodes.title("", "Description"))


def write(folder: Path) -> list[Path]:
    """Write the pages into ``folder``. Returns them. Raises what Sphinx does at a warning."""
    folder.mkdir(parents=True, exist_ok=True)
    contexts = list(commands())
    with tempfile.TemporaryDirectory() as scratch:
        for context in contexts:
            Path(scratch, f"{page_name(context)}.rst").write_text(source(context))
        listed = [
            (page_name(each), page_name(each), _what(each.command), list[str](), 1)
            for each in contexts
        ]
        for page in man_daemon.pages():
            Path(scratch, f"{page.name}.rst").write_text(page.text, encoding="utf-8")
            listed.append((page.name, page.name, page.what, [], page.section))
        app = Sphinx(
            scratch,
            None,
            str(folder),
            str(Path(scratch, "doctrees")),
            "man",
            confoverrides={
                "project": "kpmd",
                "release": __version__,
                "version": __version__,
                "extensions": ["sphinx_click"],
                "root_doc": "kpmctl",
                "man_pages": listed,
                # Every page but the first is one of its own, in no table of contents.
                "suppress_warnings": ["toc.not_included"],
                "today": "",
            },
            status=None,
            warning=sys.stderr,
            warningiserror=True,
        )
        app.connect("doctree-read", _rename)
        app.build()
        if app.statuscode:
            raise RuntimeError("Sphinx found something to warn about, see above")
    return sorted(folder.glob("*.[158]"))


if __name__ == "__main__":
    for each in write(Path(sys.argv[1])):
        print(each)
