"""Packing gives back every bit, or declines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lomo_ds.checkpoint import packing
from lomo_ds.checkpoint.packing import BLOCK_NUMEL, Packed, Packer, Unpacker, packed_bytes


def pack(flat: Tensor) -> Packed | None:
    return Packer().pack(flat)


def unpacked(packed: Packed, numel: int) -> Tensor:
    unpacker, at = Unpacker(packed.bases, packed.escapes, numel), 0
    out = torch.empty(numel, dtype=torch.bfloat16)
    for number, first, end in unpacker.blocks(0, numel):
        num_bytes = packed_bytes(end - first)
        unpacker.unpack(number, packed.planes[at : at + num_bytes], out[first:end])
        at += num_bytes
    return out


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("numel", [1, 2, 7, 1000, BLOCK_NUMEL - 1, BLOCK_NUMEL, 2 * BLOCK_NUMEL + 3])
def test_weights_come_back_in_three_quarters(numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    weights = (torch.randn(numel, generator=generator) * 0.02).bfloat16()
    packed = pack(weights)
    assert packed is not None and same_bits(unpacked(packed, numel), weights)
    if numel >= 1000:
        num_bytes = sum(part.numel() * part.element_size() for part in vars(packed).values())
        assert num_bytes < 0.8 * 2 * numel


def test_every_bit_pattern_comes_back() -> None:
    """Zeros of both signs, subnormals, infinities and every NaN."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for part in patterns.split(1 << 9):  # of four exponents each
        packed = pack(part)
        assert packed is not None and same_bits(unpacked(packed, part.numel()), part)


def test_listed_elements_keep_their_places() -> None:
    weights = torch.full((BLOCK_NUMEL + 1000,), 1.0).bfloat16()
    special = torch.tensor([0, 1, 500, BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + 999])
    weights[special] = torch.tensor([0.0, -0.0, 1e-30, -1e-38, 1e-39, 2.0**-20]).bfloat16()
    packed = pack(weights)
    assert packed.escapes[:, 0].tolist() == special.tolist()
    assert same_bits(unpacked(packed, weights.numel()), weights)


def test_exponents_that_differ_too_much_are_left_alone() -> None:
    assert pack((2.0 ** torch.arange(-100.0, 100.0)).bfloat16()) is None
    one_infinity = torch.full((1000,), 0.5).bfloat16()
    one_infinity[3] = float("inf")
    assert pack(one_infinity) is None


def test_tables_are_checked() -> None:
    bases, escapes = torch.zeros(1, dtype=torch.uint8), torch.tensor([[3, 5]])
    Unpacker(bases, escapes, 10)
    for wrong in ([[10, 5]], [[-1, 5]], [[3, 256]], [[3, -1]], [[3, 5], [3, 6]]):
        with pytest.raises(ValueError, match="not of this tensor"):
            Unpacker(bases, torch.tensor(wrong), 10)
    with pytest.raises(ValueError, match="not of this tensor"):
        Unpacker(torch.zeros(2, dtype=torch.uint8), escapes, 10)


@pytest.mark.parametrize("numel", [1000, BLOCK_NUMEL, 3 * BLOCK_NUMEL, 7 * BLOCK_NUMEL + 5])
def test_many_blocks_at_once_are_packed_to_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, numel: int
) -> None:
    """As on an accelerator, where the host waits for each piece of many blocks."""
    generator = torch.Generator().manual_seed(numel)
    weights = (torch.randn(numel, generator=generator) * 0.02).bfloat16()
    weights[:: numel // 7] = 2.0**-30  # listed
    one_by_one = pack(weights)
    monkeypatch.setitem(packing._BLOCKS_AT_ONCE, "cpu", 3)
    together = pack(weights)
    for name, part in vars(one_by_one).items():
        assert torch.equal(part, vars(together)[name]), name
    assert same_bits(unpacked(together, numel), weights)
