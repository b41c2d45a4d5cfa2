"""Which files make a checkpoint, and whether they still are what was written."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lomo_ds.config import from_mapping
from lomo_ds.model_io.json_file import read_json, write_json

MANIFEST_FILE = "manifest.json"
_FORMAT = "lomo_ds checkpoint 1"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it was written.

    Attributes:
        num_bytes: its size.
        crc32: of its content, eight hexadecimal digits. It finds damage, not malice: whoever can write to a
            checkpoint can also write its manifest.
    """

    num_bytes: int
    crc32: str


class RecordingWriter:
    """Writes to a binary stream and keeps the record of what it wrote."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._crc = stream, 0
        self.num_bytes = 0

    def write(self, content: memoryview) -> None:
        """Write bytes, in portions that are still in the processor's cache for the checksum."""
        for first in range(0, len(content), _PIECE_BYTES):
            piece = content[first : first + _PIECE_BYTES]
            self._crc = zlib.crc32(piece, self._crc)
            self._stream.write(piece)
        self.num_bytes += len(content)

    @property
    def record(self) -> FileRecord:
        return FileRecord(num_bytes=self.num_bytes, crc32=f"{self._crc:08x}")


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
        *(f"{record.crc32} {record.num_bytes} {name}" for name, record in files.items()),
    ]
    text = "\n".join(lines)
    return f"{zlib.crc32(text.encode()):08x}"


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name == str(path) and "\\" not in name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and name != "."


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as the file system gives it back. Reads the whole file."""
    crc, num_bytes, buffer = 0, 0, memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(buffer):
            crc = zlib.crc32(buffer[:length], crc)
            num_bytes += length
    return FileRecord(num_bytes=num_bytes, crc32=f"{crc:08x}")


def write_manifest(folder: Path, global_steps: int, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest of ``folder`` and wait until it is on the disk."""
    files = dict(sorted(files.items()))
    manifest = Manifest(global_steps=global_steps, files=files, checksum=checksum(global_steps, files))
    sync(write_json(folder / MANIFEST_FILE, asdict(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``; the files are not looked at.

    Raises:
        ValueError: there is none, or it is broken, or one of the two is a link; the message names the file.
    """
    path = folder / MANIFEST_FILE
    for place in (folder, path):
        if place.is_symlink():
            raise ValueError(f"{place}: is a symbolic link, which may lead out of the checkpoints")
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
            links = (path for path in _folders_between(folder, name) if path.is_symlink())
            if (link := next(links, None)) is not None:
                return f"{link}: is a symbolic link"
            if (problem := check(folder / name, record)) is not None:
                return f"{folder / name}: {problem}"
    return None


def _folders_between(folder: Path, name: str) -> list[Path]:
    """The folders inside ``folder`` that lead to its file ``name``."""
    return [folder / part for part in PurePosixPath(name).parents if part != PurePosixPath(".")]


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files in ``folder`` that the manifest does not name; a reader might take them for a part of it."""
    present = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(folder).as_posix() for path in present}
    return sorted(names - set(manifest.files) - {MANIFEST_FILE})


def _wrong_size(path: Path, record: FileRecord) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is missing" if not path.exists() else "is not an ordinary file"
    num_bytes = path.stat().st_size
    return None if num_bytes == record.num_bytes else f"has {num_bytes} bytes instead of {record.num_bytes}"


def _wrong_content(path: Path, record: FileRecord) -> str | None:
    try:
        same = record_of(path).crc32 == record.crc32
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
