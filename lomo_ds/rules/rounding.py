"""Updating a low-precision shard with fp32 inside and one write-back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_CHUNK_NUMEL = {"cpu": 1 << 18}
_CHUNK_NUMEL_ACCELERATOR = 1 << 22


def chunk_numel(device: torch.device) -> int:
    """Elements that are updated at a time: small enough for a CPU's cache, large enough for a GPU."""
    return _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL_ACCELERATOR)


def chunks(param_shard: Tensor, grad_shard: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk a parameter shard and its gradient shard, both 1-D and equally long, piece by piece.

    This bounds the fp32 temporaries of an update, whatever the size of the shard.
    """
    size = chunk_numel(param_shard.device)
    yield from zip(param_shard.split(size), grad_shard.split(size), strict=True)


@contextmanager
def fp32_inside(param_chunk: Tensor) -> Iterator[Tensor]:
    """Give an fp32 tensor to update in place and write it back once, rounded to nearest.

    An fp32 chunk is given as it is. torch's own ``add_`` on bf16 rounds the factor as well as the sum
    on CPU, which is why the update is not left to it.

    Args:
        param_chunk: any floating dtype, updated in place.

    Cost: 4 bytes per element for dtypes other than fp32.
    """
    if param_chunk.dtype == torch.float32:
        yield param_chunk
        return
    exact = param_chunk.float()
    yield exact
    param_chunk.copy_(exact)
