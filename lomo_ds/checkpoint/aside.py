"""Folders that are written aside and get their name when they are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def make_aside(path: Path) -> Path:
    """An empty hidden folder beside ``path``, to be filled and given to ``put_in_place``.

    Raises:
        OSError: it cannot be made there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))


def put_in_place(scratch: Path, path: Path) -> None:
    """Give the whole folder its name and ordinary permissions; what had the name goes."""
    ordinary = 0o777 & ~_umask()
    scratch.chmod(ordinary)
    for file in _files(scratch):
        file.chmod(ordinary & 0o666)
    old = scratch.with_name(scratch.name + "-old")
    if path.exists():
        os.replace(path, old)
    os.replace(scratch, path)
    shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.rglob("*") if entry.is_file())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
