"""Safetensors files, read by ranges and written tensor after tensor.

The safetensors package maps a file into memory to read it, and writes tensors that are all in memory at
once: it has no streaming writer. The format is plain enough to do both in small pieces: 8 bytes with the
header's length (little-endian), a JSON header, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lomo_ds.model_io.file_records import FileRecord, RecordingWriter

METADATA_KEY = "__metadata__"
PIECE_BYTES = 16 << 20
"""Host memory that reading and writing take."""

_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """A tensor of a file.

    Attributes:
        dtype: of its elements.
        shape: row-major.
        start: of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file of which the header has been read and checked.

    Attributes:
        path: of the file.
        tensors: by name.
        metadata: the header's texts.
    """

    path: Path
    tensors: dict[str, TensorRecord]
    metadata: dict[str, str]

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Elements ``start`` to ``stop`` of a tensor taken row-major, in 1-D tensors of at most PIECE_BYTES.

        A piece is overwritten by the next one.

        Raises:
            ValueError: the file ends before.
            OSError: it cannot be read.
        """
        record = self.tensors[name]
        stop = record.numel if stop is None else stop
        at_once = min(PIECE_BYTES // record.dtype.itemsize, stop - start)
        buffer = torch.empty(max(at_once, 0), dtype=record.dtype)
        with self.path.open("rb", buffering=0) as stream:
            for first in range(start, stop, max(at_once, 1)):
                piece = buffer[: min(at_once, stop - first)]
                self.read(stream, name, first, piece)
                yield piece

    def read(self, stream: BinaryIO, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, 1-D, on the host and of the tensor's dtype, with the elements from ``start``.

        Args:
            stream: the file, opened without a buffer.

        Raises:
            ValueError: the file ends before.
            OSError: it cannot be read.
        """
        record = self.tensors[name]
        offset, done = record.start + start * record.dtype.itemsize, 0
        view = memoryview(out.view(torch.uint8).numpy())
        while done < len(view):
            num_bytes = os.preadv(stream.fileno(), [view[done:]], offset + done)
            if num_bytes == 0:
                raise ValueError(f"{self.path}: ends too early")
            done += num_bytes

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, 1-D and of any dtype, with a tensor's elements from ``start``."""
        if out.device.type == "cpu" and out.dtype == self.tensors[name].dtype and out.is_contiguous():
            self.fill(name, start, out)
            return
        done = 0
        for piece in self.pieces(name, start, start + out.numel()):
            out[done : done + piece.numel()].copy_(piece)
            done += piece.numel()

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """``read_into`` for a contiguous tensor on the host, of the stored dtype: nothing is copied."""
        with self.path.open("rb", buffering=0) as stream:
            self.read(stream, name, start, out)


def read_tensor_file(path: Path) -> TensorFile:
    """Read a file's header.

    Raises:
        ValueError: it cannot be read, or is no safetensors file of known dtypes; the message names it.

    Cost: the header's bytes; the tensors are not looked at.
    """
    try:
        header, data_start, num_bytes = _read_header(path)
        metadata = header.pop(METADATA_KEY, {})
        tensors = {name: _record(entry, data_start, num_bytes) for name, entry in header.items()}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path}: is not a safetensors file, or a broken one") from None
    texts = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    return TensorFile(path=path, tensors=tensors, metadata=metadata if texts else {})


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the data begin, bytes of the file)."""
    with path.open("rb") as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError
        return dict(json.loads(stream.read(length))), 8 + length, num_bytes


def _record(entry: Mapping[str, Any], data_start: int, num_bytes: int) -> TensorRecord:
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError
    record = TensorRecord(dtype=_DTYPES[entry["dtype"]], shape=tuple(shape), start=data_start + start)
    if record.num_bytes != stop - start or data_start + stop > num_bytes:
        raise ValueError
    return record


def host_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements, row-major, in 1-D tensors of at most PIECE_BYTES on the host.

    Args:
        tensor: on any device; it is not copied as a whole.
    """
    for piece in tensor.detach().reshape(-1).split(max(1, PIECE_BYTES // tensor.element_size())):
        yield piece.cpu()


def write_tensor_file(
    path: Path,
    tensors: Mapping[str, TensorRecord],
    pieces_of: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> FileRecord:
    """Write a safetensors file, without waiting until it is on the disk.

    Args:
        path: of the new file.
        tensors: what it holds, in any order: the file's is that of the safetensors package.
        pieces_of: name -> its elements, row-major, as contiguous tensors of the record's dtype. Called once
            for each tensor, in the file's order; each piece is written before the next is asked for.
        metadata: texts for the header; ``{"format": "pt"}`` for transformers.

    Returns:
        Size and checksum of what was handed to the file system.

    Raises:
        OSError: the file cannot be written.

    Cost: host memory for the header and one piece.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with path.open("xb") as stream:
        writer = RecordingWriter(stream)
        writer.write(memoryview(_header({name: tensors[name] for name in order}, metadata)))
        for name in order:
            before = writer.num_bytes
            for piece in pieces_of(name):
                writer.write(memoryview(piece.reshape(-1).view(torch.uint8).numpy()))
            num_bytes = writer.num_bytes - before
            assert num_bytes == tensors[name].num_bytes, f"{name}: {num_bytes} bytes"
    return writer.record


def _header(tensors: Mapping[str, TensorRecord], metadata: Mapping[str, str]) -> bytes:
    """Length and header as the safetensors package writes them, padded to a multiple of 8 bytes."""
    content: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    start = 0
    for name, record in tensors.items():
        offsets = [start, start + record.num_bytes]
        content[name] = {
            "dtype": _NAMES[record.dtype],
            "shape": list(record.shape),
            "data_offsets": offsets,
        }
        start = offsets[1]
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
