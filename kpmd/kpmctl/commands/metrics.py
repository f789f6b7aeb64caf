"""``kpmctl metrics``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from kpmd.kpmctl.output import Settings, clean

#: Who reads the file is another user: node_exporter, say.
_MODE = 0o644


@click.command()
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write them there instead: beside it, and then in its place, so that it is always whole.",
)
@click.pass_obj
def metrics(settings: Settings, output: Path | None) -> None:
    """Write the daemon's numbers as Prometheus reads them.

    For administrators, and for those to whom the policy grants "metrics".
    """
    with settings.client() as client:
        text = client.metrics()
    if output is None:
        click.echo(clean(text, keep="\n"), nl=False)
        return
    try:
        _write(output, text)
    except OSError as error:
        raise click.FileError(str(output), hint=error.strerror) from error


def _write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.chmod(_MODE)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
