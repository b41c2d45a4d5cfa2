"""Training in one process with plain torch: the oracle for what the shards have to become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Run:
    """What a training run left.

    Attributes:
        losses, grad_norms, lrs: of each step.
        params: at the end, by name.
        history: the parameters before the first step and after each, where it was asked for.
    """

    losses: list[float]
    grad_norms: list[float]
    lrs: list[float]
    params: dict[str, Tensor]
    history: list[dict[str, Tensor]] = field(default_factory=list)


def train_plain(
    model: nn.Module,
    batches: Sequence[Sequence[dict]],
    lr_of_step: Callable[[int], float],
    max_grad_norm: float = 0.0,
    weight_decay: float = 0.0,
) -> Run:
    """torch.optim.SGD on whole tensors, torch's own clipping; ``batches[step]`` are its micro-batches."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, weight_decay=weight_decay)
    run = Run([], [], [], {})
    for step, micro_batches in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr_of_step(step)
        losses = [model(**batch) / len(micro_batches) for batch in micro_batches]
        for loss in losses:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(sum(losses).item())
        run.grad_norms.append(float(norm))
        run.lrs.append(lr_of_step(step))
    run.params = {name: param.detach().clone() for name, param in model.named_parameters()}
    return run


def warmup_lr(step: int, least: float = 0.005, most: float = 0.03, num_steps: int = 4) -> float:
    """DeepSpeed's WarmupLR, linear: the first step and the second both take the least learning rate."""
    return least + (most - least) * min(1.0, max(0, step - 1) / num_steps)


FP32_UNIT = 2.0**-24
FP32_OPERATIONS = 20
"""On the longest way through the tests' models and an update; the order of sums differs with the alignment of
tensors, with the number of ranks, and with the kernels that a CPU has."""


def fp32_tolerance(num_steps: int) -> float:
    """What ``largest_relative_difference`` may be after ``num_steps`` steps in fp32.

    Each step's update is at most as large as the largest weight and comes from ``FP32_OPERATIONS``
    operations in another order, each of which rounds by ``FP32_UNIT``; errors of steps add up.
    """
    return num_steps * FP32_OPERATIONS * FP32_UNIT


def largest_relative_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """max |a - e| / max |e| of each parameter, the largest over all of them."""
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name].double() - whole.double()).abs().max() / whole.double().abs().max())
        for name, whole in expected.items()
    )
