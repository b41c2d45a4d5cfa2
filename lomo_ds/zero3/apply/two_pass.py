"""Two passes backward through one graph: the first measures the gradient, the second applies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deepspeed import checkpointing
from torch import Tensor
from torch.autograd.graph import Node

from lomo_ds.zero3.optimizer import LomoZeroOptimizer


def backward_twice(
    optimizer: LomoZeroOptimizer, backward: Callable[..., Tensor], loss: Tensor, retain_graph: bool
) -> Tensor:
    """Run ``backward`` on ``loss`` twice, the forward once.

    The graph is kept between the passes. With activation checkpointing it is small, and what was
    random in the forward (dropout) is the same in both passes, since checkpointing restores the
    random state; without it, what was drawn stands in the graph. The second pass is left out where the
    norm is not finite: the step is to be dropped.

    Args:
        optimizer: told which pass runs.
        backward: one pass; takes the loss and ``retain_graph``.
        loss: a scalar.
        retain_graph: whether the user wants the graph afterwards.

    Returns:
        What ``backward`` returned in the first pass.

    Raises:
        ValueError: the graph frees what it holds after one pass; nothing has changed then.

    Cost: with activation checkpointing (forward 1, backward 3 with its recomputation) 7 in place of 4.
    """
    _refuse_single_use(loss)
    counters = optimizer.backward_counters()
    with optimizer.measuring():
        returned = backward(loss, retain_graph=True)
    if optimizer.step_will_apply:
        optimizer.restore_backward_counters(counters)
        backward(loss, retain_graph=retain_graph)
    return returned


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
