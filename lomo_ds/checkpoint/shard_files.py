"""The tensors of a checkpoint, read across the ranks' files by one process, without a process group."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lomo_ds.checkpoint.packing import PACKED_KEY, PackedTensor, is_table
from lomo_ds.model_io.tensor_file import TensorFile, TensorRecord, read_tensor_file

SHARDING_KEY = "DCP_SHARDING_INFO"
"""Where torch's own reader of such files, too, finds in the header at which element their parts begin."""


def weight_key(name: str) -> str:
    """What a parameter is called in the checkpoint's files."""
    return f"weights/{name}"


def buffer_key(name: str) -> str:
    """What a buffer is called there."""
    return f"buffers/{name}"


@dataclass(frozen=True)
class _PlainTensor:
    """A tensor that is stored as it is; ``PackedTensor`` is the other kind."""

    file: TensorFile
    name: str

    @property
    def record(self) -> TensorRecord:
        return self.file.tensors[self.name]

    def check(self) -> None:
        """Its header is all there is to check."""

    def pieces(self) -> Iterator[Tensor]:
        return self.file.pieces(self.name)

    def read_into(self, start: int, out: Tensor) -> None:
        self.file.read_into(self.name, start, out)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A stretch of a tensor, taken row-major, that one file holds."""

    source: _PlainTensor | PackedTensor
    record: TensorRecord
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.record.numel


class ShardFiles:
    """A checkpoint's tensors by the names of ``weight_key`` and its like.

    Args:
        paths: of all safetensors files of the checkpoint.

    Raises:
        ValueError: a file is broken, or was not written by this package.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._parts: dict[str, list[_Part]] = {}
        for path in paths:
            file = read_tensor_file(path)
            offsets, packed = _offsets_of(file), _packed_in(file)
            for name in file.tensors:
                if is_table(name):
                    continue
                source = packed.get(name) or _PlainTensor(file, name)
                start = _flat_start(source, offsets.get(name))
                part = _Part(source=source, record=source.record, start=start)
                self._parts.setdefault(name, []).append(part)
        for parts in self._parts.values():
            parts.sort(key=lambda part: (part.start, part.stop))

    def record(self, name: str, shape: tuple[int, ...] | None = None) -> TensorRecord:
        """Dtype and shape of a tensor.

        Args:
            name: in the checkpoint.
            shape: that it has to have; None for one that is stored whole, whose own is taken.

        Raises:
            ValueError: it is not there, or its parts are not the whole.
        """
        parts = self._parts.get(name)
        if parts is None:
            raise ValueError(f"the files of the checkpoint have no tensor {name!r}")
        shape = parts[0].record.shape if shape is None else tuple(shape)
        numel, reached = math.prod(shape), 0
        for part in parts:
            if part.start != reached or part.record.dtype != parts[0].record.dtype:
                break
            reached = part.stop
            part.source.check()
        if reached != numel or parts[-1].stop != numel:
            raise ValueError(
                f"{parts[-1].source.file.path}: the parts of {name!r} do not make up {numel} elements"
            )
        return TensorRecord(dtype=parts[0].record.dtype, shape=shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """All elements of a tensor, row-major, in 1-D tensors of at most ``tensor_file.PIECE_BYTES``.

        A piece is overwritten by the next one.
        """
        for part in self._parts[name]:
            yield from part.source.pieces()

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, 1-D and of any dtype, with a tensor's elements from ``start``.

        Raises:
            ValueError: a file has become too short.
            OSError: a file cannot be read.
        """
        stop = start + out.numel()
        for part in self._parts[name]:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                part.source.read_into(first - part.start, out[first - start : last - start])

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in host memory."""
        record = self.record(name, shape)
        tensor = torch.empty(record.numel, dtype=record.dtype)
        self.read_into(name, 0, tensor)
        return tensor.view(shape)


def _offsets_of(file: TensorFile) -> dict[str, list[int]]:
    try:
        offsets = json.loads(file.metadata[SHARDING_KEY])
        return {name: list(entry["saved_offsets"]) for name, entry in offsets.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file.path}: does not say where its tensors begin") from None


def _packed_in(file: TensorFile) -> dict[str, PackedTensor]:
    try:
        numels = dict(json.loads(file.metadata.get(PACKED_KEY, "{}")))
        if not all(type(numel) is int and numel > 0 for numel in numels.values()):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{file.path}: does not say which of its tensors are packed") from None
    return {name: PackedTensor(file, name, numel) for name, numel in numels.items()}


def _flat_start(source: _PlainTensor | PackedTensor, offsets: list[int] | None) -> int:
    """The first element that a file holds of a tensor: cut ones are 1-D, others whole."""
    file, name, shape = source.file, source.name, source.record.shape
    given = [] if offsets is None else offsets
    valid = len(given) == len(shape) and all(type(offset) is int for offset in given)
    if offsets is None or not valid or (len(shape) != 1 and any(given)):
        raise ValueError(f"{file.path}: does not say where {name!r} begins")
    return offsets[0] if len(shape) == 1 else 0
