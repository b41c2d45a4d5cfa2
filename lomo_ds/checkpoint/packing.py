"""Weights in bfloat16 in 12 bits each, without loss.

The exponents of a block of weights differ little. Each weight is stored as a byte of sign and mantissa and
as four bits that say how far its exponent is below the block's greatest; the few weights for which four bits
do not suffice are listed. Halves of a block stand in one byte's low and high bits, so that packing and
unpacking are a handful of operations on whole blocks, on any device. (That few bits of a network's exponents
carry information is well known: arXiv 2411.05239, 2504.11651. Those codes are shorter and slower to read.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 18
"""Elements that share a greatest exponent."""

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
    """Of the planes of so many elements."""
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
        bases, escapes, num_escaped = [], [], 0
        for number, bits in enumerate(flat.view(torch.int16).split(BLOCK_NUMEL)):
            block, base, index, exponents = self._scratch[flat.device].pack_block(bits)
            planes[at : at + block.numel()].copy_(block)
            at += block.numel()
            bases.append(base)
            escapes.append(torch.stack((index + number * BLOCK_NUMEL, exponents.long()), dim=1))
            num_escaped += index.numel()
            if num_escaped > _MAX_ESCAPED * flat.numel():
                return None
        return Packed(planes=planes, bases=torch.stack(bases).cpu(), escapes=torch.cat(escapes).cpu())


class _Scratch:
    """What packing a block takes on a device."""

    def __init__(self, device: torch.device) -> None:
        self._numbers = [torch.empty(BLOCK_NUMEL, dtype=torch.int16, device=device) for _ in range(2)]
        self._below = torch.empty(BLOCK_NUMEL, dtype=torch.uint8, device=device)
        self._is_escaped = torch.empty(BLOCK_NUMEL, dtype=torch.bool, device=device)
        self._planes = torch.empty(_block_bytes(BLOCK_NUMEL), dtype=torch.uint8, device=device)

    def pack_block(self, bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(planes, greatest exponent, index of each listed element, its exponent)."""
        numel, half = bits.numel(), (bits.numel() + 1) // 2
        kept, shifted = (numbers[:numel] for numbers in self._numbers)
        below, planes = self._below[:numel], self._planes[: _block_bytes(numel)]
        below.copy_(torch.bitwise_right_shift(bits, 7, out=shifted))  # the exponents
        base = below.max()
        torch.sub(base, below, out=below)
        index = torch.ge(below, _ESCAPE, out=self._is_escaped[:numel]).nonzero().squeeze(1)
        exponents = base - below[index]
        below.clamp_(max=_ESCAPE)
        torch.bitwise_and(bits, _SIGN_AND_MANTISSA, out=kept)
        planes[:numel].copy_(kept.bitwise_or_(torch.bitwise_right_shift(kept, 8, out=shifted)))
        pairs = planes[numel:].copy_(below[:half])
        pairs[: numel - half].bitwise_or_(below[half:].bitwise_left_shift_(4))
        return planes, base, index, exponents


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
