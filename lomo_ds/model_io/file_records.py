"""Files as they were written: their size and checksum, and waiting until they are on the disk."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it was written.

    Attributes:
        num_bytes: its size.
        crc32: of its content, eight hexadecimal digits. It finds damage, not malice: whoever can write to a
            folder can also write the records of its files.
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
        """Size and checksum of everything written so far."""
        return FileRecord(num_bytes=self.num_bytes, crc32=f"{self._crc:08x}")


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as the file system gives it back. Reads the whole file."""
    crc, num_bytes, buffer = 0, 0, memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(buffer):
            crc = zlib.crc32(buffer[:length], crc)
            num_bytes += length
    return FileRecord(num_bytes=num_bytes, crc32=f"{crc:08x}")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
