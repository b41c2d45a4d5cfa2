"""Which files make a checkpoint, and whether they still are what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from lomo_ds.checkpoint.json_file import read_json, write_json
from lomo_ds.config import from_mapping

MANIFEST_FILE = "manifest.json"
_FORMAT = "lomo_ds checkpoint 1"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it was written.

    Attributes:
        num_bytes: its size.
        sha256: of its content, in hexadecimal digits.
    """

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a checkpoint. Its own file is written last: where it is, all the others are.

    Attributes:
        format: name and version of the format.
        global_steps: optimizer steps that had been made.
        files: name inside the folder, with "/" between parts -> what was written.
        checksum: of everything else here, so that a damaged manifest does not accuse whole files.
    """

    global_steps: int
    files: dict[str, FileRecord]
    checksum: str
    format: str = _FORMAT

    def __post_init__(self) -> None:
        if self.format != _FORMAT:
            raise ValueError(f"the format is {self.format!r}, this version reads {_FORMAT!r}")
        if self.checksum != checksum(self.global_steps, self.files):
            raise ValueError("its content is another than was written (its checksum differs)")
        for name in self.files:
            if not _stays_inside(name):
                raise ValueError(f"{name!r} is not the name of a file inside the checkpoint")


def checksum(global_steps: int, files: Mapping[str, FileRecord]) -> str:
    """What a manifest of these says of itself."""
    lines = [
        f"{global_steps}",
        *(f"{record.sha256} {record.num_bytes} {name}" for name, record in files.items()),
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name == str(path) and "\\" not in name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and name != "."


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as the file system gives it back. Reads the whole file."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
            num_bytes += len(piece)
    return FileRecord(num_bytes=num_bytes, sha256=digest.hexdigest())


def write_manifest(folder: Path, global_steps: int, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest of ``folder`` and wait until it is on the disk."""
    files = dict(sorted(files.items()))
    manifest = Manifest(global_steps=global_steps, files=files, checksum=checksum(global_steps, files))
    sync(write_json(folder / MANIFEST_FILE, asdict(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``; the files are not looked at.

    Raises:
        ValueError: there is none, or it is broken; the message names the file.
    """
    path = folder / MANIFEST_FILE
    return from_mapping(Manifest, read_json(path), str(path))


def find_damage(folder: Path, files: Mapping[str, FileRecord]) -> str | None:
    """Hold files against their records, sizes before contents.

    Args:
        folder: of the checkpoint.
        files: all of a manifest's records or a part of them.

    Returns:
        The first damaged file and what is wrong with it, or None. Reads every file whole.
    """
    for check in (_wrong_size, _wrong_content):
        for name, record in files.items():
            if (problem := check(folder / name, record)) is not None:
                return f"{folder / name}: {problem}"
    return None


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files in ``folder`` that the manifest does not name; a reader might take them for a part of it."""
    present = (path for path in folder.rglob("*") if not path.is_dir())
    names = {path.relative_to(folder).as_posix() for path in present}
    return sorted(names - set(manifest.files) - {MANIFEST_FILE})


def _wrong_size(path: Path, record: FileRecord) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is missing" if not path.exists() else "is not an ordinary file"
    num_bytes = path.stat().st_size
    return None if num_bytes == record.num_bytes else f"has {num_bytes} bytes instead of {record.num_bytes}"


def _wrong_content(path: Path, record: FileRecord) -> str | None:
    try:
        same = record_of(path).sha256 == record.sha256
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "has another content than was written (its checksum differs)"


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
