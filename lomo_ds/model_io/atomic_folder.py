"""Folders that are written where there is room, aside, and get their name when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

SPARE_BYTES = 16 << 20
"""Disk that the small files beside the weights may take."""


def require_room(path: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        path: of a folder that may not be there yet.
        num_bytes: of the weights; SPARE_BYTES are added.
        what: is to be written, for the message.

    Raises:
        OSError: ENOSPC.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = free_bytes(existing)
    if free < num_bytes + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{what} takes {num_bytes / 1e9:.3g} GB and {existing} has {free / 1e9:.3g} GB left",
        )


def free_bytes(folder: Path) -> int:
    """What the disk under a folder has left."""
    return shutil.disk_usage(folder).free


def make_scratch_folder(path: Path) -> Path:
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
