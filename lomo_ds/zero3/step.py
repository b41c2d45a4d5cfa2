"""One optimizer step of an engine: what a loop, the planner, checkpoints and integrations build on.

A method either makes its step from forward, backward and ``step``, as DeepSpeed's users write them, or runs
the forwards itself, as often as it needs. ``train_batch`` is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol

from torch import Tensor

LossClosure = Callable[[], Tensor]
"""Runs the model on one micro-batch of this rank and returns its loss, a scalar. A method that needs several
forwards calls it several times, and expects the same data each time."""

Phase = Callable[[str], AbstractContextManager]
"""Called with "forward", "backward" or "update"; what it returns surrounds that part of the step."""


def no_phase(name: str) -> AbstractContextManager:
    """Surround a part of a step with nothing."""
    return nullcontext()


class StepEngine(Protocol):
    """An engine that makes optimizer steps; ``LomoEngine``, or another program's behind the same calls.

    Attributes:
        owns_forwards: the method runs the forwards itself: ``train_batch`` is the only way to make a step.
    """

    owns_forwards: ClassVar[bool]

    def train_batch(self, closures: Sequence[LossClosure], phase: Phase = no_phase) -> Tensor:
        """Make one step. Collective.

        Args:
            closures: one for each micro-batch of the step.
            phase: surrounds its parts.

        Returns:
            The mean of the micro-batches' losses on this rank: 0-dim, without a graph.
        """
        ...


def backward_and_step(engine: Any, closures: Sequence[LossClosure], phase: Phase = no_phase) -> Tensor:
    """``train_batch`` of an engine with DeepSpeed's ``backward`` and ``step``. Collective."""
    total: Tensor | None = None
    for closure in closures:
        with phase("forward"):
            loss = closure()
        with phase("backward"):
            engine.backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
        del loss
        with phase("update"):
            engine.step()
    assert total is not None, "a step has at least one micro-batch"
    return total / len(closures)
