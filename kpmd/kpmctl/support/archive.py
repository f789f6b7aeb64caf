"""The file of a support bundle: whole under its name, or not there at all."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path


def packed(folder: str, files: Mapping[str, bytes], when: int) -> bytes:
    """A tar.gz of files in a folder: the same bytes for the same content and time."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(files):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime, member.mode = len(files[name]), when, 0o600
            archive.addfile(member, io.BytesIO(files[name]))
    return gzip.compress(content.getvalue(), mtime=when)


def check(path: Path) -> None:
    """Raise OSError where ``path`` cannot be written: better before than after all the work."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} is there already: give another name with --output")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent} cannot be written to: give another place by --output")


def write(path: Path, data: bytes) -> None:
    """Make a file for its owner alone, in place of nothing that is there. Raises OSError.

    However that is broken off, by an exception say, nothing is left of it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    taken = written = False
    try:
        # The name is ours from now on; what it names is complete when it is not empty.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        taken = True
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        written = True
    finally:
        if taken and not written:
            for each in (part, path):
                with contextlib.suppress(OSError):
                    each.unlink()
