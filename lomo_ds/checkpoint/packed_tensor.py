"""A packed tensor in a safetensors file: three tensors that stand for one in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lomo_ds.checkpoint.packing import BLOCK_NUMEL, Packed, Unpacker, num_blocks, packed_bytes
from lomo_ds.model_io.tensor_file import TensorFile, TensorRecord

PACKED_KEY = "lomo_ds_packed"
"""Where a file's header says which tensors are packed: a JSON object from name to number of elements."""

_BASES, _ESCAPES = "packed-bases/", "packed-escapes/"


def parts_of(name: str, packed: Packed) -> dict[str, Tensor]:
    """What a file holds for a packed tensor, by name."""
    return {name: packed.planes, _BASES + name: packed.bases, _ESCAPES + name: packed.escapes}


def is_table(name: str) -> bool:
    """Whether a tensor of a file only serves to read a packed one."""
    return name.startswith((_BASES, _ESCAPES))


@dataclass(frozen=True)
class PackedTensor:
    """Reads a packed tensor as if it were stored plainly.

    Args:
        file: that holds it.
        name: of the tensor.
        numel: of the tensor.

    Raises:
        ValueError: the header has something else than such a tensor's parts.
    """

    file: TensorFile
    name: str
    numel: int

    def __post_init__(self) -> None:
        expected = {
            self.name: (torch.uint8, (packed_bytes(self.numel),)),
            _BASES + self.name: (torch.uint8, (num_blocks(self.numel),)),
        }
        escapes = self.file.tensors.get(_ESCAPES + self.name)
        fits = escapes is not None and escapes.dtype == torch.int64 and escapes.shape[1:] == (2,)
        for name, (dtype, shape) in expected.items():
            record = self.file.tensors.get(name)
            fits = fits and record is not None and (record.dtype, record.shape) == (dtype, shape)
        if not fits:
            raise self._broken

    @property
    def _broken(self) -> ValueError:
        return ValueError(f"{self.file.path}: the parts of the packed tensor {self.name!r} do not fit")

    @property
    def record(self) -> TensorRecord:
        """Of the tensor that is packed."""
        return TensorRecord(dtype=torch.bfloat16, shape=(self.numel,))

    def check(self) -> None:
        """Read the tables.

        Raises:
            ValueError: they are not of this tensor.
        """
        assert self._unpacker is not None

    @cached_property
    def _unpacker(self) -> Unpacker:
        try:
            return Unpacker(self._table(_BASES), self._table(_ESCAPES), self.numel)
        except ValueError:
            raise self._broken from None

    def _table(self, prefix: str) -> Tensor:
        record = self.file.tensors[prefix + self.name]
        table = torch.empty(record.numel, dtype=record.dtype)
        self.file.read_into(prefix + self.name, 0, table)
        return table.view(record.shape)

    def pieces(self) -> Iterator[Tensor]:
        """All elements in 1-D tensors; a piece is overwritten by the next one."""
        for _, block in self._blocks(0, self.numel):
            yield block

    def read_into(self, start: int, out: Tensor) -> None:
        """Fill ``out``, 1-D and of any dtype, from element ``start`` on."""
        stop = start + out.numel()
        for first, block in self._blocks(start, stop, out):
            begin, end = max(start, first), min(stop, first + block.numel())
            target = out[begin - start : end - start]
            if target.data_ptr() != block.data_ptr():
                target.copy_(block[begin - first : end - first])

    def _blocks(self, start: int, stop: int, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first element, block), each unpacked into its place in ``out`` where it fits there."""
        direct = out is not None and out.dtype == torch.bfloat16 and out.device.type == "cpu"
        direct = direct and out.is_contiguous()
        planes = torch.empty(packed_bytes(min(self.numel, BLOCK_NUMEL)), dtype=torch.uint8)
        spare = torch.empty(min(self.numel, BLOCK_NUMEL), dtype=torch.bfloat16)
        with self.file.path.open("rb", buffering=0) as stream:
            for number, first, end in self._unpacker.blocks(start, stop):
                own = planes[: packed_bytes(end - first)]
                self.file.read(stream, self.name, packed_bytes(first), own)
                inside = direct and start <= first and end <= stop
                block = out[first - start : end - start] if inside else spare[: end - first]
                self._unpacker.unpack(number, own, block)
                yield first, block
