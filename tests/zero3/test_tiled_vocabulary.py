"""Training with the vocabulary in tiles is the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lomo_ds.shards import ShardSpec
from lomo_ds.zero3.vocabulary.row_tiles import pieces_of_rows
from tests.harness import run_ranks
from tests.zero3.vocabulary_jobs import (
    logits_without_labels,
    refused,
    train_shipped,
    train_with_labels,
)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"tied": True, "apply": "immediate"},
        {"apply": "two_pass"},
        {"optimizer": "AdaLomo", "tied": True},
    ],
    ids=str,
)
def test_losses_and_norms_are_those_of_the_whole_vocabulary(world_size: int, case: dict) -> None:
    whole = run_ranks(world_size, train_with_labels, None, **case)
    tiled = run_ranks(world_size, train_with_labels, 200, **case)
    for ours, expected in zip(tiled, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_one_tile_and_tiles_of_one_row_agree() -> None:
    [one], [many] = run_ranks(1, train_with_labels, 10**6), run_ranks(1, train_with_labels, 1)
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


def test_bf16_differs_by_rounding_only() -> None:
    whole = run_ranks(2, train_with_labels, None, bf16=True)
    tiled = run_ranks(2, train_with_labels, 200, bf16=True)
    torch.testing.assert_close(tiled[0], whole[0], rtol=2e-3, atol=2e-3)


def test_without_labels_there_are_logits() -> None:
    assert run_ranks(1, logits_without_labels) == [(2, 9, 299)]


@pytest.mark.parametrize(
    ("change", "words"), [("bias", "bias"), ("embedding", "plain"), ("model", "linear head")]
)
def test_other_heads_are_refused(change: str, words: str) -> None:
    [message] = run_ranks(1, refused, change)
    assert "tiled_vocabulary" in message and words in message


def test_the_shipped_config_runs() -> None:
    path = Path(__file__).parents[2] / "ds_configs" / "lomo_bf16_low_memory.json"
    first, last = run_ranks(2, train_shipped, str(path))[0]
    assert last < first


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_pieces_cover_the_rows_once(world_size: int) -> None:
    specs = [ShardSpec(shape=(11, 3), rank=rank, world_size=world_size) for rank in range(world_size)]
    for rows in (range(0, 11), range(2, 3), range(4, 9), range(10, 11)):
        elements = []
        for piece in pieces_of_rows(specs[0], rows):
            owner = specs[piece.rank]
            assert 0 <= piece.in_shard.start < piece.in_shard.stop <= owner.shard_numel
            elements += range(owner.start + piece.in_shard.start, owner.start + piece.in_shard.stop)
            assert piece.in_tile.stop - piece.in_tile.start == piece.in_shard.stop - piece.in_shard.start
        assert elements == list(range(rows.start * 3, rows.stop * 3))
