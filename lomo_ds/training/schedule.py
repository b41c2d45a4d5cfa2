"""Learning-rate schedules that use every step: the first step already moves, the last one still does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


SHAPES: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "constant": _constant}
"""Name in the recipe -> factor on the peak rate, from progress after the warm-up in [0, 1)."""


def num_warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    """Steps that the warm-up takes."""
    return math.ceil(num_steps * warmup_ratio)


def lr_factor(step: int, num_steps: int, num_warmup: int, shape: str) -> float:
    """The learning rate of step ``step`` (from 0), as a part of its peak."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    return SHAPES[shape](min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup)))


class Schedule:
    """Sets ``optimizer.param_groups[...]["lr"]``, in the form that DeepSpeed's engine steps and saves.

    DeepSpeed's WarmupLR and its kin run their first two steps at the minimal rate; this one does not.

    Args:
        optimizer: its groups hold the peak rates.
        num_steps: of the whole run.
        num_warmup: steps of linear warm-up.
        shape: key of ``SHAPES``.
    """

    def __init__(self, optimizer: Any, num_steps: int, num_warmup: int, shape: str) -> None:
        self._groups = optimizer.param_groups
        self._peaks = [group["lr"] for group in self._groups]
        self._arguments = (num_steps, num_warmup, shape)
        self._step = 0
        self._apply()

    def step(self) -> None:
        """Go to the next step's rate."""
        self._step += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """The rates of the step to come."""
        return [group["lr"] for group in self._groups]

    def state_dict(self) -> dict[str, int]:
        """Where the schedule is."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where ``state_dict`` was taken."""
        self._step = state["step"]
        self._apply()

    def _apply(self) -> None:
        factor = lr_factor(self._step, *self._arguments)
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor
