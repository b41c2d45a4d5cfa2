"""Shards side by side in memory, without sending all of them through the host at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_PIECE_BYTES = 1 << 28


def defragment_in_pieces(defragment: Callable[[list[Tensor]], Tensor], shards: Sequence[Tensor]) -> Tensor:
    """Lay shards side by side, some at a time, so that what was freed between them is of use again.

    DeepSpeed moves all of a rank's shards through host memory at once: for the ranks of a node together,
    the whole model.

    Args:
        defragment: DeepSpeed's, which moves a list of tensors into one buffer.
        shards: of one device; a buffer holds those of one dtype.

    Returns:
        An empty tensor in place of DeepSpeed's one buffer.

    Cost: host memory of 256 MiB, or of the largest shard.
    """
    for dtype in dict.fromkeys(shard.dtype for shard in shards):
        for piece in pieces_of((shard for shard in shards if shard.dtype == dtype), _PIECE_BYTES):
            defragment(piece)
    return torch.empty(0, dtype=shards[0].dtype, device=shards[0].device)


def pieces_of(
    items: Iterable[T], max_bytes: int, num_bytes_of: Callable[[T], int] = attrgetter("nbytes")
) -> Iterator[list[T]]:
    """Cut tensors, or items of other sizes, into runs of at most ``max_bytes``; a larger one is alone."""
    piece: list[T] = []
    total = 0
    for item in items:
        num_bytes = num_bytes_of(item)
        if piece and total + num_bytes > max_bytes:
            yield piece
            piece, total = [], 0
        piece.append(item)
        total += num_bytes
    if piece:
        yield piece
