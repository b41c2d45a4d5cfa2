"""The norm of all gradients from sums over shards, and the factor that clips to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def sum_of_squares(grad_shard: Tensor) -> Tensor:
    """The sum of squares of a shard, accumulated in fp32 and returned as a 0-dim fp64 tensor.

    Sums over shards and ranks add up to the square of the global 2-norm. No host sync.
    """
    norm = torch.linalg.vector_norm(grad_shard, dtype=torch.float32)
    return norm.double().square()


def clip_factor(grad_norm: float, max_grad_norm: float) -> float:
    """The factor on every gradient that brings a global norm down to ``max_grad_norm``.

    This is DeepSpeed's formula, min(1, max_grad_norm / (grad_norm + 1e-6)); ``max_grad_norm`` 0 clips
    nothing.

    Args:
        grad_norm: finite 2-norm over all parameters and ranks, unscaled.
        max_grad_norm: ``gradient_clipping`` of the DeepSpeed JSON.
    """
    assert math.isfinite(grad_norm), "a step with a norm that is not finite is dropped, not clipped"
    if max_grad_norm <= 0:
        return 1.0
    return min(1.0, max_grad_norm / (grad_norm + 1e-6))
