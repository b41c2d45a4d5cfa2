"""Learning-rate schedules without wasted steps: the first step already learns, and so does the last."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


SHAPES: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "constant": _constant}
"""Name in the recipe -> factor on the peak learning rate, from progress after the warm-up in [0, 1)."""


def num_warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    """Number of warm-up steps of a run of ``num_steps`` steps."""
    return math.ceil(num_steps * warmup_ratio)


def lr_factor(step: int, num_steps: int, num_warmup: int, shape: str) -> float:
    """Learning rate of step ``step`` (from 0), relative to its peak."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    return SHAPES[shape](min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup)))


def make_schedule(optimizer: Optimizer, num_steps: int, num_warmup: int, shape: str) -> LambdaLR:
    """A scheduler that DeepSpeed's engine steps after each step that is not dropped.

    DeepSpeed's own (WarmupLR, ...) run their first two steps at the lowest learning rate; this one does not.

    Args:
        optimizer: the learning rates of its groups are their peaks.
        num_steps: of the whole run.
        num_warmup: steps of linear warm-up.
        shape: key of ``SHAPES``.
    """
    return LambdaLR(optimizer, lambda step: lr_factor(step, num_steps, num_warmup, shape))
