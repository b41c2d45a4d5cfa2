"""Folders that appear whole or not at all: filled under a hidden name, brought to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lomo_ds.byte_units import shown_bytes
from lomo_ds.model_io.file_records import sync

SPARE_BYTES = 16 << 20
"""Disk that the small files next to the weights may take."""


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
        message = f"{what} takes {shown_bytes(num_bytes)} and {existing} has {shown_bytes(free)} left"
        raise OSError(errno.ENOSPC, message)


def free_bytes(folder: Path) -> int:
    """What the disk under a folder has left."""
    return shutil.disk_usage(folder).free


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A hidden empty folder next to ``path`` for the block to fill, which then takes the place of ``path``.

    Everything in it is on the disk before it gets its name. Where the block raises, nothing is left of it,
    and what was at ``path`` stays.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield scratch
        _put_in_place(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(scratch: Path, path: Path) -> None:
    """Give the whole folder its name and ordinary permissions; what had the name is removed."""
    ordinary = 0o777 & ~_umask()
    for entry in (*scratch.rglob("*"), scratch):
        entry.chmod(ordinary if entry.is_dir() else ordinary & 0o666)
        sync(entry)
    old = scratch.with_name(scratch.name + "-old")
    if path.exists():
        os.replace(path, old)
    os.replace(scratch, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
