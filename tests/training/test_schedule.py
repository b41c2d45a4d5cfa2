"""Learning-rate schedules."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import lomo_ds
from lomo_ds.training.schedule import lr_factor, make_schedule, num_warmup_steps

PEAKS = (0.3, 0.07)


def factors(num_steps: int, ratio: float, shape: str) -> list[float]:
    num_warmup = num_warmup_steps(num_steps, ratio)
    return [lr_factor(step, num_steps, num_warmup, shape) for step in range(num_steps)]


def scheduled(num_warmup: int = 2, shape: str = "cosine") -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Two parameter groups with a peak each, under a schedule of 7 steps."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in PEAKS]
    optimizer = lomo_ds.Lomo(groups, lr=1.0)
    return optimizer, make_schedule(optimizer, 7, num_warmup, shape)


def test_linear_uses_every_step():
    assert factors(4, 0.0, "linear") == [1.0, 0.75, 0.5, 0.25]
    assert factors(6, 0.3, "linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_constant_and_cosine():
    assert factors(3, 0.0, "constant") == [1.0, 1.0, 1.0]
    assert factors(4, 0.25, "cosine") == pytest.approx([1.0, 1.0, 0.75, 0.25])


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("num_warmup", [0, 3])
def test_each_group_has_its_peak_times_the_factor_to_the_bit(shape: str, num_warmup: int):
    optimizer, schedule = scheduled(num_warmup, shape)
    for step in range(9):
        factor = lr_factor(step, 7, num_warmup, shape)
        assert [group["lr"] for group in optimizer.param_groups] == [peak * factor for peak in PEAKS]
        assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        schedule.step()


def test_it_steps_without_a_step_of_the_optimizer_and_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, schedule = scheduled()
        schedule.step()


def test_it_continues_where_its_state_was_saved():
    optimizer, schedule = scheduled()
    for _ in range(3):
        schedule.step()
    state = schedule.state_dict()
    other_optimizer, other = scheduled()
    for group, saved in zip(other_optimizer.param_groups, optimizer.param_groups, strict=True):
        group["lr"] = saved["lr"]  # as a checkpoint does
    other.load_state_dict(state)
    for _ in range(3):
        assert other.get_last_lr() == schedule.get_last_lr()
        schedule.step()
        other.step()
    assert [group["lr"] for group in other_optimizer.param_groups] == schedule.get_last_lr()
