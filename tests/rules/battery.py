"""What is asked of every rule that normalises gradients: shards against the whole, scale, zeros, padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lomo_ds.rules.param_spec import Role
from lomo_ds.rules.rule import Rule, StepSettings
from tests.reference.normalized import Whole
from tests.reference.sgd import FP32_UNIT
from tests.reference.shards import CutParameter

SHAPES: list[tuple[int, ...]] = [(), (1,), (13,), (7, 5), (1, 9), (9, 1), (1, 1), (3, 5, 7), (2, 3, 4, 5)]
"""On 2 to 4 ranks they have cut rows, rows over three ranks, and ranks of padding alone."""

DTYPES = [torch.float32, torch.bfloat16]
WORLD_SIZES = [1, 2, 3, 4]
NUM_STEPS = 4
LR, WEIGHT_DECAY = 0.02, 0.1


def start(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def grads(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One for each step, each ten times as large as the one before."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(shape, generator=generator) * 10.0 ** (step - 2)).to(dtype) for step in range(NUM_STEPS)
    ]


def assert_equals_whole(
    cut: CutParameter, whole: Whole, shape: tuple[int, ...], dtype: torch.dtype, num_operations: int
) -> None:
    """Each step from the cut parameter's own values, which may differ from the whole by one rounding.

    Args:
        cut: before its first step.
        whole: of the same parameter.
        shape, dtype: of parameter and gradients.
        num_operations: fp32 roundings on the longest way from a gradient to the update, sums included.
    """
    for step, grad in enumerate(grads(shape, dtype), start=1):
        before = cut.whole().double()
        update = LR * whole.direction(grad.double())
        expected = before * (1 - LR * WEIGHT_DECAY) - update
        cut.update(grad, StepSettings(lr=LR, weight_decay=WEIGHT_DECAY, step=step))
        rounding = (torch.finfo(dtype).eps / 2 + 3 * FP32_UNIT) * expected.abs()
        tolerance = rounding + num_operations * FP32_UNIT * update.abs().max()
        off = (cut.whole().double() - expected).abs()
        assert (off <= tolerance).all(), f"step {step}: {float((off / tolerance).max()):.2f} tolerances off"
        moved = (cut.whole().double() - before).abs().max()
        assert moved >= 0.3 * update.abs().max(), "the tolerance hides no update"


def run(
    rule: Rule,
    whole_grads: list[Tensor],
    world_size: int = 3,
    role: Role | None = None,
    factor: float = 1.0,
    grad_scale: float = 1.0,
) -> Tensor:
    """The parameter after a step with each gradient, multiplied by a factor."""
    cut = CutParameter(start(tuple(whole_grads[0].shape)), rule, world_size, role=role)
    for step, grad in enumerate(whole_grads, start=1):
        cut.update(grad * factor, StepSettings(lr=LR, grad_scale=grad_scale, step=step))
    return cut.whole()


def assert_free_of_scale(rule: Rule, shape: tuple[int, ...], role: Role, num_operations: int) -> None:
    """Powers of two change no bit; other factors round each element of the gradient once more.

    No element of a step exceeds the learning rate times the root of the number of elements.
    """
    expected = run(rule, grads(shape), role=role)
    for factor in (2.0**10, 2.0**-10):
        assert torch.equal(run(rule, grads(shape), role=role, factor=factor), expected)
        assert torch.equal(run(rule, grads(shape), role=role, grad_scale=factor), expected)
    largest = (expected - start(shape)).abs().max()
    for factor in (1000.0, 1e-3):
        other = run(rule, grads(shape), role=role, factor=factor)
        of_step = num_operations * LR * math.prod(shape) ** 0.5
        tolerance = NUM_STEPS * FP32_UNIT * (of_step + expected.abs().max())
        assert (other - expected).abs().max() <= tolerance
        assert largest >= 100 * tolerance


def assert_zeros_are_left(rule: Rule, role: Role | None = None) -> None:
    """Rows, columns and gradients of zeros, elements and ranks alike, give finite updates: none."""
    grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    grad[2], grad[:, 3] = 0, 0
    for world_size in WORLD_SIZES:
        cut = CutParameter(start((7, 5)), rule, world_size, role=role)
        for step in (1, 2):
            cut.update(grad, StepSettings(lr=LR, step=step))
        moved = cut.whole() - start((7, 5))
        assert moved.isfinite().all()
        assert (moved[grad == 0] == 0).all() and (moved[grad != 0] != 0).all()
    for shape in SHAPES:
        assert torch.equal(run(rule, [torch.zeros(shape)] * 2, world_size=4), start(shape))
