"""Weights in bfloat16 in 12 bits each, without loss.

The exponents of a block of weights differ little. Each weight is stored as a byte of sign and mantissa and
as four bits that say how far its exponent is below the block's greatest; the few weights for which four bits
do not suffice are listed. The two elements that share a byte are half a block apart, so that packing and
unpacking are a handful of operations on whole blocks, on any device. In a safetensors file three tensors take
the place of the one that is packed.

That few bits of a network's exponents carry information is well known: arXiv 2411.05239, 2504.11651. Those
codes are shorter and slower to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lomo_ds.model_io.tensor_file import TensorFile, TensorRecord

PACKED_KEY = "lomo_ds_packed"
"""Where a file's header says which tensors are packed: a JSON object from name to number of elements."""

_BASES, _ESCAPES = "packed-bases/", "packed-escapes/"

BLOCK_NUMEL = 1 << 18
"""Elements that share a greatest exponent."""

_BLOCKS_AT_ONCE = {"cpu": 1}
"""Kind of device -> blocks of a piece, 32 on others: the host waits for each piece; its caches hold one."""

_ESCAPE = 15
_MAX_ESCAPED = 1 / 64
"""Share of the elements; beyond it a tensor is stored as it is."""
_SIGN_AND_MANTISSA = -32641
"""0x807F as a signed number."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed tensor.

    Attributes:
        planes: uint8, shape (packed_bytes(numel),), on the host: block after block, first the bytes of sign
            and mantissa, then those of two elements' distances each.
        bases: uint8, shape (number of blocks,): each one's greatest exponent.
        escapes: int64, shape (count, 2): flat index, in rising order, and exponent of those that are listed.
    """

    planes: Tensor
    bases: Tensor
    escapes: Tensor


def packed_bytes(numel: int) -> int:
    """Of the planes of ``numel`` elements."""
    return numel // BLOCK_NUMEL * _block_bytes(BLOCK_NUMEL) + _block_bytes(numel % BLOCK_NUMEL)


def _block_bytes(numel: int) -> int:
    return numel + (numel + 1) // 2


def num_blocks(numel: int) -> int:
    """Blocks of a tensor, the last one of which may be short."""
    return -(-numel // BLOCK_NUMEL)


class Packer:
    """Packs tensors, in memory that is used again for each block."""

    def __init__(self) -> None:
        self._scratch: dict[torch.device, _Scratch] = {}

    def pack(self, flat: Tensor) -> Packed | None:
        """Pack a tensor.

        Args:
            flat: bfloat16, 1-D, contiguous.

        Returns:
            None where too many elements would have to be listed: it is better stored as it is.

        Cost: host memory for the result, three quarters of the tensor.
        """
        planes, at = torch.empty(packed_bytes(flat.numel()), dtype=torch.uint8), 0
        if flat.device not in self._scratch:
            self._scratch[flat.device] = _Scratch(flat.device)
        scratch = self._scratch[flat.device]
        bases, escapes, num_escaped, first = [], [], 0, 0
        for bits in _pieces(flat.view(torch.int16), scratch.num_blocks):
            packed, own_bases, index, exponents = scratch.pack_blocks(bits)
            planes[at : at + packed.numel()].copy_(packed)
            at += packed.numel()
            bases.append(own_bases)
            escapes.append(torch.stack((index + first, exponents.long()), dim=1))
            first += bits.numel()
            num_escaped += index.numel()
            if num_escaped > _MAX_ESCAPED * flat.numel():
                return None
        return Packed(planes=planes, bases=torch.cat(bases).cpu(), escapes=torch.cat(escapes).cpu())


def _pieces(bits: Tensor, num_blocks: int) -> Iterator[Tensor]:
    """Whole blocks, shape (blocks, BLOCK_NUMEL), some at a time; then what is left, shape (1, numel)."""
    num_whole = bits.numel() // BLOCK_NUMEL * BLOCK_NUMEL
    if num_whole:
        yield from bits[:num_whole].view(-1, BLOCK_NUMEL).split(num_blocks)
    if num_whole < bits.numel():
        yield bits[None, num_whole:]


class _Scratch:
    """What packing takes on a device: 7.5 bytes an element, 2 MB on a host and 63 MB on an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.num_blocks = _BLOCKS_AT_ONCE.get(device.type, 32)
        numel = self.num_blocks * BLOCK_NUMEL
        self._numbers = [torch.empty(numel, dtype=torch.int16, device=device) for _ in range(2)]
        self._below = torch.empty(numel, dtype=torch.uint8, device=device)
        self._is_escaped = torch.empty(numel, dtype=torch.bool, device=device)
        self._planes = torch.empty(packed_bytes(numel), dtype=torch.uint8, device=device)

    def pack_blocks(self, bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(planes of all blocks, greatest exponent of each, index of each listed element, its exponent)."""
        num_blocks, length = bits.shape
        half = (length + 1) // 2
        kept, shifted = (numbers[: bits.numel()].view_as(bits) for numbers in self._numbers)
        below = self._below[: bits.numel()].view_as(bits)
        planes = self._planes[: num_blocks * _block_bytes(length)].view(num_blocks, -1)
        below.copy_(torch.bitwise_right_shift(bits, 7, out=shifted))  # the exponents
        bases = below.amax(1)
        torch.sub(bases[:, None], below, out=below)
        is_escaped = torch.ge(below, _ESCAPE, out=self._is_escaped[: bits.numel()].view_as(bits))
        index = is_escaped.view(-1).nonzero().squeeze(1)
        exponents = bases[index // length] - below.view(-1)[index]
        below.clamp_(max=_ESCAPE)
        torch.bitwise_and(bits, _SIGN_AND_MANTISSA, out=kept)
        planes[:, :length].copy_(kept.bitwise_or_(torch.bitwise_right_shift(kept, 8, out=shifted)))
        pairs = planes[:, length:].copy_(below[:, :half])
        pairs[:, : length - half].bitwise_or_(below[:, half:].bitwise_left_shift_(4))
        return planes.view(-1), bases, index, exponents


class Unpacker:
    """Unpacks blocks, in memory that is used again for each.

    Args:
        bases, escapes: of ``Packed``, on the host.
        numel: of the tensor.

    Raises:
        ValueError: they are not of such a tensor.
    """

    def __init__(self, bases: Tensor, escapes: Tensor, numel: int) -> None:
        index = escapes[:, 0]
        inside = bool(((index >= 0) & (index < numel)).all()) and bool((index.diff() > 0).all())
        if bases.numel() != num_blocks(numel) or not inside or bool((escapes[:, 1] >> 8).any()):
            raise ValueError("the tables of a packed tensor are not of this tensor")
        self._bases, self._numel = bases, numel
        self._index, self._exponent = index.contiguous(), escapes[:, 1].to(torch.uint8)
        self._below = torch.empty(min(numel, BLOCK_NUMEL), dtype=torch.uint8)
        self._exponents = torch.empty(min(numel, BLOCK_NUMEL), dtype=torch.int16)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(number, first element, end) of the blocks that hold elements ``start`` to ``stop``."""
        for number in range(start // BLOCK_NUMEL, num_blocks(stop)):
            yield number, number * BLOCK_NUMEL, min((number + 1) * BLOCK_NUMEL, self._numel)

    def unpack(self, number: int, planes: Tensor, out: Tensor) -> None:
        """Unpack a block.

        Args:
            number: of the block.
            planes: uint8, its part of ``Packed.planes``.
            out: bfloat16, contiguous, on the host, of the block's elements.
        """
        numel, bits = out.numel(), out.view(torch.int16)
        half, first = (numel + 1) // 2, number * BLOCK_NUMEL
        below, exponents = self._below[:numel], self._exponents[:numel]
        kept, pairs = planes[:numel].view(torch.int8), planes[numel:]
        torch.bitwise_and(pairs, _ESCAPE, out=below[:half])
        torch.bitwise_right_shift(pairs[: numel - half], 4, out=below[half:])
        torch.sub(self._bases[number], below, out=below)
        own = slice(*torch.searchsorted(self._index, torch.tensor([first, first + numel])).tolist())
        below[self._index[own] - first] = self._exponent[own]
        exponents.copy_(below)
        bits.copy_(kept).bitwise_and_(_SIGN_AND_MANTISSA).add_(exponents, alpha=128)


# In a safetensors file ----------------------------------------------------------------------------


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
        """Fill ``out``, 1-D and of any dtype, with the elements from ``start``."""
        stop = start + out.numel()
        for first, block in self._blocks(start, stop, out):
            begin, end = max(start, first), min(stop, first + block.numel())
            target = out[begin - start : end - start]
            if target.data_ptr() != block.data_ptr():
                target.copy_(block[begin - first : end - first])

    def _blocks(self, start: int, stop: int, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first element, block), each unpacked into its place in ``out`` where it fits there."""
        direct = out if out is not None and _can_unpack_into(out) else None
        planes = torch.empty(packed_bytes(min(self.numel, BLOCK_NUMEL)), dtype=torch.uint8)
        spare = torch.empty(min(self.numel, BLOCK_NUMEL), dtype=torch.bfloat16)
        with self.file.path.open("rb", buffering=0) as stream:
            for number, first, end in self._unpacker.blocks(start, stop):
                own = planes[: packed_bytes(end - first)]
                self.file.read(stream, self.name, packed_bytes(first), own)
                if direct is not None and start <= first and end <= stop:
                    block = direct[first - start : end - start]
                else:
                    block = spare[: end - first]
                self._unpacker.unpack(number, own, block)
                yield first, block


def _can_unpack_into(out: Tensor) -> bool:
    return out.dtype == torch.bfloat16 and out.device.type == "cpu" and out.is_contiguous()
