"""Learning-rate schedules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lomo_ds.training.schedule import Schedule, lr_factor, num_warmup_steps


def factors(num_steps: int, ratio: float, shape: str) -> list[float]:
    num_warmup = num_warmup_steps(num_steps, ratio)
    return [lr_factor(step, num_steps, num_warmup, shape) for step in range(num_steps)]


def test_linear_uses_every_step():
    assert factors(4, 0.0, "linear") == [1.0, 0.75, 0.5, 0.25]
    assert factors(6, 0.3, "linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_the_others():
    assert factors(3, 0.0, "constant") == [1.0, 1.0, 1.0]
    assert factors(4, 0.25, "cosine") == pytest.approx([1.0, 1.0, 0.75, 0.25])


def test_groups_keep_their_ratio_and_a_schedule_resumes():
    groups = [{"lr": 1.0}, {"lr": 0.1}]
    schedule = Schedule(SimpleNamespace(param_groups=groups), 4, 0, "linear")
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.75, 0.075])
    fresh_groups = [{"lr": 1.0}, {"lr": 0.1}]
    fresh = Schedule(SimpleNamespace(param_groups=fresh_groups), 4, 0, "linear")
    fresh.load_state_dict(schedule.state_dict())
    assert fresh_groups == groups
