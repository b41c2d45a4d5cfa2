"""LOMO: stochastic gradient descent, applied to one shard as soon as its gradient is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.rules.rounding import chunks, fp32_inside


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What one update needs beside the tensors.

    Attributes:
        lr: learning rate of the parameter's group.
        weight_decay: L2 coefficient, added to the gradient as ``torch.optim.SGD`` does.
        grad_scale: factor on the gradient (clipping, loss scale); 1.0 leaves it as it is.
    """

    lr: float
    weight_decay: float = 0.0
    grad_scale: float = 1.0


@torch.no_grad()
def apply_(param_shard: Tensor, grad_shard: Tensor, hyper: Hyper) -> None:
    """p <- p - lr * (grad_scale * g + weight_decay * p), in fp32 inside, one rounding at the end.

    Args:
        param_shard: shape (shard_numel,), any floating dtype, updated in place.
        grad_shard: shape (shard_numel,), any floating dtype, on the same device; left as it is.
        hyper: learning rate, weight decay and gradient scale.

    Cost: fp32 temporaries of a few MiB (see ``rounding.chunk_numel``); no communication, no host sync.

    Reference: LOMO (arXiv 2306.09782), algorithm 1; weight decay as in torch.optim.SGD.
    """
    for param_chunk, grad_chunk in chunks(param_shard, grad_shard):
        with fp32_inside(param_chunk) as exact:
            grad = grad_chunk.float() * hyper.grad_scale
            exact.add_(grad.add_(exact, alpha=hyper.weight_decay), alpha=-hyper.lr)
