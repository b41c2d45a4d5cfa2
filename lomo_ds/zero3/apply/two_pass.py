"""Two passes backward through one graph: the first measures the gradient, the second applies it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

from deepspeed import checkpointing
from torch import Tensor
from torch.autograd.graph import Node

from lomo_ds.zero3._internals import ReducedGradient
from lomo_ds.zero3.apply.base import ApplyPolicy, OnePass, PolicyContext, Promises, StepOutcome
from lomo_ds.zero3.apply.grad_norm import GradNorm


class BackwardCounters(Protocol):
    """What ZeRO-3's module hooks count down in a backward; of ``Stage3Base``."""

    def backward_counters(self) -> Any: ...

    def restore_backward_counters(self, counters: Any) -> None: ...


class TwoPass(ApplyPolicy):
    """Runs backward once to know the norm, and again to apply each shard inside it.

    The graph is kept between the passes. With activation checkpointing it is small, and what was random in
    the forward (dropout) is the same in both passes, since checkpointing restores the random state; without
    it, the graph holds what was drawn. The second pass is left out where the norm is not finite: the step
    is to be dropped.

    Args:
        context: of the engine.
        counters: of its hooks.

    Cost: with activation checkpointing (forward 1, backward 3 with its recomputation) 7 in place of 4.
    """

    promises: ClassVar[Promises] = Promises(global_clipping=True, accumulation=False, whole_steps=True)
    owns_backward: ClassVar[bool] = True

    def __init__(self, context: PolicyContext, counters: BackwardCounters) -> None:
        super().__init__(context)
        self._counters = counters
        self._norm = GradNorm()
        self._known_norm: float | None = None

    def run_backward(self, one_pass: OnePass, loss: Tensor, retain_graph: bool, loss_scale: float) -> Tensor:
        """Run ``one_pass`` on ``loss`` twice, the forward once.

        Returns:
            What the first pass returned.

        Raises:
            ValueError: the graph frees what it holds after one pass; nothing has changed then.
            RuntimeError: the step has had its two passes.
        """
        _refuse_single_use(loss)
        if self._known_norm is not None:
            self._note_arrival(next(iter(self._arrived)), "applied")
        counters = self._counters.backward_counters()
        returned = one_pass(loss, retain_graph=True)
        if self._arrived:
            with self._context.updater.stream.writing():
                self._known_norm = float(self._norm.total(loss_scale))
        if self._known_norm is not None and math.isfinite(self._known_norm):
            self._counters.restore_backward_counters(counters)
            one_pass(loss, retain_graph=retain_graph)
        return returned

    def on_gradients(self, gradients: Sequence[ReducedGradient], loss_scale: float) -> None:
        updater, norm = self._context.updater, self._known_norm
        for param, grad_shard in gradients:
            if norm is None:
                self._note_arrival(param, "measured")
                self._norm.measure(param, grad_shard)
            else:
                updater.begin(param, grad_shard, norm, loss_scale, is_view=True)
        updater.advance()

    def on_step(self, loss_scale: float) -> StepOutcome:
        assert self._known_norm is not None, "gradients arrive through run_backward alone"
        return StepOutcome(grad_norm=self._known_norm, applied=math.isfinite(self._known_norm))

    def forget(self) -> None:
        super().forget()
        self._norm.clear()
        self._known_norm = None


def _refuse_single_use(loss: Tensor) -> None:
    functions = {getattr(type(node), "_forward_cls", None) for node in _nodes_of(loss)}
    if checkpointing.CheckpointFunction in functions:
        raise ValueError(
            "engine.backward(loss): deepspeed.checkpointing.checkpoint frees what it has saved after one "
            "backward, and two_pass runs two: use torch.utils.checkpoint, or set "
            '"optimizer.params.apply" to "deferred"'
        )


def _nodes_of(loss: Tensor) -> Iterator[Node]:
    """Every node of the graph behind a loss."""
    found = {loss.grad_fn}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        yield node
        fresh = {following for following, _ in node.next_functions} - found - {None}
        found |= fresh
        waiting += fresh
