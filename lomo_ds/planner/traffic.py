"""Bytes sent and arithmetic, counted while operations run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lomo_ds.planner.wire_bytes import sent_bytes

_KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "alltoall_base_": "all_to_all",
}
"""c10d's operation -> name of the collective; others are barriers and move nothing."""
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Traffic:
    """Counts of one or more steps.

    Args:
        world_size: ranks of the group; collectives within smaller groups are counted as if over all.

    Attributes:
        sent_bytes: collective -> bytes that a rank sends, see ``wire_bytes``.
        calls: collective -> number.
        host_bytes: copied between device and host.
        flops: floating point operations of matrix products and attention; a multiply-add is two.
        times: how often the next operations count, where one micro-batch is run in place of several.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self.sent_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.host_bytes = 0
        self.flops = 0
        self.times = 1

    def clear(self) -> None:
        """Set all counts to zero."""
        self.sent_bytes.clear()
        self.calls.clear()
        self.host_bytes = 0
        self.flops = 0

    def count(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Count one operation; a watcher of ``Ledger``."""
        if func.namespace == "c10d":
            self._count_collective(func, args)
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            self.flops += flops * self.times
        elif func in _COPIES:
            source = args[1] if func is _COPIES[0] else args[0]
            if isinstance(source, Tensor) and source.is_cpu != result.is_cpu:
                self.host_bytes += source.numel() * source.element_size() * self.times

    def _count_collective(self, func: Any, args: tuple) -> None:
        name = func._schema.name.partition("::")[2]
        kind = _KINDS.get(name)
        if kind is None or self._world_size == 1:
            return
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        whole = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
        self.calls[kind] += self.times
        self.sent_bytes[kind] += int(sent_bytes(kind, whole, self._world_size)) * self.times


def answers(host_memory_bytes: int) -> dict[Any, Any]:
    """Answers for operations that read a value, which fake tensors do not have.

    Floating point numbers are 1, so that a norm is finite. ``all`` of a mask is true, as without padding;
    other flags are false, so that nothing has overflowed. Integers are the host's free memory, the only
    integer that the engine makes the ranks agree on.

    Args:
        host_memory_bytes: free on the host, for this rank.

    Returns:
        Operation -> the function to call in its place; for ``Ledger``.
    """
    all_hold = torch.ops.aten.all.default

    def marked_all(*args: Any, **kwargs: Any) -> Tensor:
        flag = all_hold(*args, **kwargs)
        flag.planner_all_hold = True
        return flag

    def value_of(tensor: Tensor) -> Any:
        if tensor.dtype is torch.bool or tensor.dtype is torch.uint8:
            return hasattr(tensor, "planner_all_hold")
        return 1.0 if tensor.dtype.is_floating_point else host_memory_bytes

    return {torch.ops.aten._local_scalar_dense.default: value_of, all_hold: marked_all}
