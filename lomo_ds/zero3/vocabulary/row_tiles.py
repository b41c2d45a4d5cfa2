"""A matrix that is cut over the ranks, gathered and reduced some rows at a time.

ZeRO-3 gathers a parameter whole. For the embedding and the head of a large vocabulary the whole weight and
its whole gradient are the largest tensors of a step; by rows neither has to exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.shards import ShardSpec
from lomo_ds.zero3._internals import local_shard, process_group, shard_spec


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a tile that one rank stores.

    Attributes:
        rank: of the owner in the parameter's group.
        in_tile: its flat elements in the tile.
        in_shard: its flat elements in the owner's shard.
    """

    rank: int
    in_tile: slice
    in_shard: slice


def pieces_of_rows(spec: ShardSpec, rows: range) -> Iterator[Piece]:
    """Who stores ``rows`` of a matrix of shape ``spec.shape``; in the order of the elements."""
    num_columns = spec.shape[-1]
    start, stop = rows.start * num_columns, rows.stop * num_columns
    first, last = start // spec.partition_numel, (stop - 1) // spec.partition_numel
    for rank in range(first, last + 1):
        offset = rank * spec.partition_numel
        low, high = max(start, offset), min(stop, offset + spec.partition_numel)
        yield Piece(
            rank=rank, in_tile=slice(low - start, high - start), in_shard=slice(low - offset, high - offset)
        )


class RowTiles:
    """The rows of a cut matrix, some at a time. All ranks call every method together.

    Args:
        param: of shape (rows, columns), cut by ZeRO-3.
        tile_numel: elements of a tile, at least; whole rows.

    Cost: a pass over all tiles sends as many bytes as gathering the parameter whole does.
    """

    def __init__(self, param: Parameter, tile_numel: int) -> None:
        self.param = param
        self.spec = shard_spec(param)
        self._group = process_group(param)
        self._rows_at_once = max(1, tile_numel // self.spec.shape[-1])

    def __iter__(self) -> Iterator[range]:
        num_rows = self.spec.shape[0]
        for first in range(0, num_rows, self._rows_at_once):
            yield range(first, min(first + self._rows_at_once, num_rows))

    @torch.no_grad()
    def gather(self, rows: range) -> Tensor:
        """These rows on every rank: shape (len(rows), columns), a new tensor."""
        shard = local_shard(self.param)
        num_columns = self.spec.shape[-1]
        tile = torch.empty(len(rows) * num_columns, dtype=shard.dtype, device=shard.device)
        for piece in pieces_of_rows(self.spec, rows):
            part = tile[piece.in_tile]
            if piece.rank == self.spec.rank:
                part.copy_(shard[piece.in_shard])
            dist.broadcast(part, src=dist.get_global_rank(self._group, piece.rank), group=self._group)
        return tile.view(len(rows), num_columns)

    @torch.no_grad()
    def reduce(self, rows: range, grad: Tensor, grad_shard: Tensor) -> None:
        """Average a gradient of these rows over the ranks, each rank keeping what it stores.

        Args:
            rows: of the parameter.
            grad: shape (len(rows), columns), this rank's; overwritten.
            grad_shard: shape (shard_numel,), where this rank's part goes.
        """
        flat = grad.view(-1).div_(self.spec.world_size)
        for piece in pieces_of_rows(self.spec, rows):
            part = flat[piece.in_tile]
            dist.reduce(part, dst=dist.get_global_rank(self._group, piece.rank), group=self._group)
            if piece.rank == self.spec.rank:
                grad_shard[piece.in_shard].copy_(part)
