"""Updates by elements: of vectors (norms, biases), for rules whose maths is about matrices, and of rules
alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.rule import MASTER_WEIGHTS, Shard, StepSettings


@fused
def step_by_sign_(shard: Shard, settings: StepSettings) -> None:
    """p <- p * (1 - lr * weight_decay) - lr * sign(g). No state; free of the gradient's scale."""
    decay = 1.0 - settings.lr * settings.weight_decay
    for at in shard.chunks():
        exact = shard.write_back.read(shard.param, at)
        exact.mul_(decay).sub_(shard.scaled_grad(at, settings).sign(), alpha=settings.lr)
        shard.write_back.write(exact, shard.param, at)


def adam_state(param_shard: Tensor) -> dict[str, Tensor]:
    """Both moments, fp32 and cut like the parameter: 8 bytes an element."""
    return {name: torch.zeros_like(param_shard, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}


@fused
def step_by_adam_(shard: Shard, settings: StepSettings, betas: tuple[float, float], eps: float) -> None:
    """AdamW with ``adam_state``, and with master weights where the state has them as "param".

    Reference: Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2.
    """
    first, second = betas
    master = shard.state.get(MASTER_WEIGHTS)
    step_size = settings.lr / (1 - first**settings.step)
    root_correction = math.sqrt(1 - second**settings.step)
    for at in shard.chunks():
        grad = shard.scaled_grad(at, settings)
        exp_avg = shard.state["exp_avg"][at].lerp_(grad, 1 - first)
        exp_avg_sq = shard.state["exp_avg_sq"][at].mul_(second).addcmul_(grad, grad, value=1 - second)
        exact = shard.write_back.read(shard.param, at) if master is None else master[at]
        exact.mul_(1 - settings.lr * settings.weight_decay)
        exact.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / root_correction).add_(eps), value=-step_size)
        if master is None:
            shard.write_back.write(exact, shard.param, at)
        else:
            shard.write_back.copy(exact, shard.param, at)


def require_betas(betas: tuple[float, float], eps: float) -> None:
    """Refuse Adam's settings that cannot be.

    Raises:
        ValueError: a beta outside [0, 1), or an eps that is not above 0.
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas have to be at least 0 and below 1, not {list(betas)}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps has to be a finite number above 0, not {eps}")
