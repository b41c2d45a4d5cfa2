"""Launches and bytes of memory of one step's updates, counted by dispatch on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lomo_ds.rules.clipping import sum_of_squares
from lomo_ds.rules.finite import finite_or_unchanged
from lomo_ds.rules.kernels import dispatch
from lomo_ds.rules.kernels.operations import traffic_bytes
from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rounding import Rounding, WriteBack, error_state
from lomo_ds.rules.rule import Rule, Shard, StepSettings

_NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias")


class CountLaunches(TorchDispatchMode):
    """Counts every operation that is more than a view or an allocation.

    Attributes:
        launches: kernels.
        num_bytes: read and written by them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in _NO_LAUNCH:
            return result
        self.launches += 1
        if func.namespace == "lomo_ds":
            self.num_bytes += traffic_bytes(func, args)
        else:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


@contextmanager
def kernels_on_meta(fused: bool) -> Iterator[None]:
    """Let rules run on the meta device as on a GPU with Triton, or without."""
    with mock.patch.object(dispatch, "has_kernels", lambda device_type: fused):
        yield


def make_shard(rule: Rule, spec: ParamSpec, rounding: Rounding, device: str) -> Shard:
    """A bf16 shard with a gradient, the rule's state and what rounding keeps."""
    param = torch.empty(spec.shard_numel, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    state, error = rule.init_state(spec, param), error_state(rounding, param)
    write_back = WriteBack(rounding=rounding, key=(0, 1, 1), start=spec.start, error=error)
    grad = torch.empty_like(param).normal_(std=1e-3)
    return Shard(param=param, grad=grad, spec=spec, state=state, write_back=write_back)


def update(rule: Rule, shard: Shard, is_guarded: bool) -> None:
    """A parameter's update on one rank, with the measuring of its gradient.

    As the engine does it for a bucket of one parameter: a gradient that has to outlive the bucket is copied,
    and an update's sums are all-reduced as they are. The all-reduce itself is left out.

    Args:
        rule, shard: of the parameter.
        is_guarded: it is applied inside backward, and left out where a gradient is not finite.
    """
    settings = StepSettings(lr=1e-3, weight_decay=0.1, grad_scale=0.5)
    squares = sum_of_squares(shard.grad)
    if is_guarded and rule.needs_sums(shard.spec):
        shard = replace(shard, grad=shard.grad.clone())
    start = partial(rule.update_, settings=settings)
    running = finite_or_unchanged(start, shard, squares, lambda flag: None) if is_guarded else start(shard)
    totals = None
    with suppress(StopIteration):
        while True:
            totals = running.send(totals)


def count_update(rule: Rule, spec: ParamSpec, rounding: Rounding, is_guarded: bool) -> CountLaunches:
    """What the update of one bf16 parameter launches, reads and writes; see ``update``."""
    shard = make_shard(rule, spec, rounding, "meta")
    with CountLaunches() as counter:
        update(rule, shard, is_guarded)
    return counter
