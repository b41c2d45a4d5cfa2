"""Shards are laid side by side some at a time."""

from __future__ import annotations

import torch

from lomo_ds.zero3.piecewise import defragment_in_pieces, pieces_of


def test_pieces_keep_the_order_and_the_bound() -> None:
    shards = [torch.empty(numel, dtype=torch.uint8) for numel in (3, 4, 9, 1, 1, 5)]
    pieces = list(pieces_of(shards, max_bytes=7))
    assert [[one.numel() for one in piece] for piece in pieces] == [[3, 4], [9], [1, 1, 5]]
    assert sum(pieces, []) == shards


def test_every_shard_is_moved_once() -> None:
    shards, moved = [torch.empty(5) for _ in range(3)], []
    empty = defragment_in_pieces(moved.extend, shards)
    assert [id(one) for one in moved] == [id(one) for one in shards]
    assert empty.numel() == 0
