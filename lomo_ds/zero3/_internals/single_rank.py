"""What a run without other ranks needs of DeepSpeed: checks left out, state forgotten, buffers listed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

DEEPSPEED_SOURCES = {
    "gathering": (
        "deepspeed/runtime/zero/partition_parameters.py",
        "deepspeed/runtime/zero/partitioned_param_coordinator.py",
    ),
    "linear": ("deepspeed/runtime/zero/linear.py",),
    "reducing": ("deepspeed/runtime/zero/stage3.py", "deepspeed/runtime/comm/coalesced_collectives.py"),
}
"""What DeepSpeed allocates memory for -> the files of it that do."""


@contextmanager
def ranks_not_compared() -> Iterator[None]:
    """Leave out DeepSpeed's checks that all ranks hold the same numbers: there are no other ranks."""
    with ExitStack() as stack:
        for module in (stage3, partition_parameters, partitioned_param_coordinator):
            stack.enter_context(
                mock.patch.object(module, "assert_ints_same_as_other_ranks", lambda ints: None)
            )
        yield


def forget_module_state() -> None:
    """Let a next engine in this process find DeepSpeed's modules as they were imported."""
    parameter_offload.FWD_MODULE_STACK.clear()
    partition_parameters.Init.param_id = 0
    partition_parameters.Init.num_persisted_parameters = 0
    partition_parameters.Init.num_persisted_elements = 0
    while partition_parameters.zero_init_context > 0:
        partition_parameters.shutdown_init_context()


def permanent_buffers(optimizer: DeepSpeedZeroOptimizer_Stage3) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of what stage 3 keeps in addition to the shards.

    "bucket" for the reduce buckets, "gradient" for the flat gradient buffer and "state" for fp32 copies
    and the states of a torch optimizer; the last two only in DeepSpeed's own.
    """
    yield from (
        ("bucket", bucket.buffer) for bucket in optimizer.ipg_buckets.values() if bucket.buffer is not None
    )
    if getattr(optimizer, "grad_partitions_flat_buffer", None) is not None:
        yield "gradient", optimizer.grad_partitions_flat_buffer
    yield from (("state", group) for group in optimizer.fp32_partitioned_groups_flat)
    for state in optimizer.optimizer.state.values():
        yield from (("state", value) for value in state.values() if isinstance(value, Tensor))
