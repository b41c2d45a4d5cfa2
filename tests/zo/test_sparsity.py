"""A share of the entries, exactly, in the order that is said; blocks by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.rules.noise import random_int32
from lomo_ds.zo.blocks import blocks_by_layer
from lomo_ds.zo.moves import Move, combination
from lomo_ds.zo.sparsity import Sparsity

CPU = torch.device("cpu")
KEY = (3, 5, 7)


def by_sorting(kind: str, values: Tensor, count: int) -> Tensor:
    """The mask, from a stable sort of all entries."""
    ranked = -values.double().abs()
    if kind == "random":
        ranked = random_int32(KEY, 0, values.numel(), CPU).double()
    return torch.zeros(values.numel()).index_fill(0, torch.argsort(ranked, stable=True)[:count], 1.0).bool()


@pytest.mark.parametrize("kind", ["random", "magnitude"])
@pytest.mark.parametrize("numel", [1, 6, 1000, 100_003])
@pytest.mark.parametrize("share", [1e-9, 0.1, 0.5, 0.999])
def test_the_share_is_exact(kind: Any, numel: int, share: float) -> None:
    """Of bf16 values with many ties, more than a chunk of them, wherever the parameter is cut."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = Sparsity(kind=kind, share=share).kept(values, KEY)
    mask = kept.mask(values, 0)
    count = max(1, round(share * numel))
    assert int(mask.sum()) == count and torch.equal(mask, by_sorting(kind, values, count))
    cut = numel // 3
    assert torch.equal(torch.cat([kept.mask(values[:cut], 0), kept.mask(values[cut:], cut)]), mask)


def test_equal_values_and_other_steps() -> None:
    equal = Sparsity(kind="magnitude", share=0.25)
    assert equal.kept(torch.zeros(8), KEY).mask(torch.zeros(8), 0).tolist() == [True] * 2 + [False] * 6
    values, random = torch.ones(1000), Sparsity(kind="random", share=0.5)
    masks = [random.kept(values, (3, step, 7)).mask(values, 0) for step in range(2)]
    assert 400 < int((masks[0] != masks[1]).sum()) < 600


def test_directions_are_0_elsewhere() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    kept = Sparsity(kind="magnitude", share=0.2).kept(values, KEY)
    moves = [Move(terms=[((1, 2, 3, 4), 2.0)], kept=only) for only in (None, kept)]
    dense, sparse = (combination(values, move, 0, out=torch.empty(500)) for move in moves)
    assert torch.equal(sparse, dense * kept.mask(values, 0)) and int((sparse != 0).sum()) == 100


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_shares_that_cannot_be_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share has to be above 0 and below 1"):
        Sparsity(kind="random", share=share)


def test_blocks_are_layers() -> None:
    names = [
        "model.embed.weight",
        "model.layers.0.q.weight",
        "model.layers.0.k.0.weight",
        "model.layers.11.q.bias",
    ]
    assert blocks_by_layer([*names, "head.weight"]) == [0, 1, 1, 2, 0]
    assert blocks_by_layer(["a", "b"]) == [0, 0]
