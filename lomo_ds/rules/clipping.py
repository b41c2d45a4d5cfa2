"""Clipping: by the global norm, by value, or each parameter by its own norm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.rounding import chunk_numel
from lomo_ds.rules.rule import Rule, Shard, ShardUpdate, StepSettings

Clipping = Literal["global", "value", "per_parameter", "lagged"]
"""What ``gradient_clipping`` bounds: the norm over all parameters, each element, each parameter's norm, or
the global norm by the factor that the step before would have needed."""

_NORM_EPS = 1e-6


@fused
@torch.no_grad()
def sum_of_squares(shard: Tensor) -> Tensor:
    """The sum of squares of a gradient or parameter shard, as a 0-dim fp64 tensor.

    Sums over shards and ranks add up to the square of the global 2-norm. fp32 within a chunk, fp64 over
    chunks; no host sync.
    """
    total = torch.zeros((), dtype=torch.float64, device=shard.device)
    for chunk in shard.split(chunk_numel(shard.device)):
        exact = chunk.float()
        total += torch.dot(exact, exact)
    return total


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
    return min(1.0, max_grad_norm / (grad_norm + _NORM_EPS))


def clipped_per_parameter(
    rule: Rule, shard: Shard, settings: StepSettings, max_grad_norm: float
) -> ShardUpdate:
    """``rule``'s update with the parameter's gradient clipped to a norm of its own. Asks for one sum more."""
    own = torch.zeros(1, dtype=torch.float32, device=shard.grad.device)
    for at in shard.chunks():
        own += shard.scaled_grad(at, settings).square().sum()
    norm = (yield own).sqrt().squeeze(0)
    factor = (max_grad_norm / (norm + _NORM_EPS)).clamp(max=1.0)
    yield from rule.update_(shard, replace(settings, grad_scale=factor * settings.grad_scale))
