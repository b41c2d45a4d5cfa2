"""DeepSpeed's stage 3 as this project uses it: without copies, states and a gradient buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from deepspeed.utils import logger
from torch.nn import Parameter

from lomo_ds.zero3._internals.reduction import ReducingStage3, drop_grad
from lomo_ds.zero3.piecewise import defragment_in_pieces
from lomo_ds.zero3.private_names import SCALER_STATE
from lomo_ds.zero3.shard_stream import ShardStream

Surrounding = Callable[[Sequence[Parameter]], AbstractContextManager]


class _SurroundedPartition:
    """``param.partition`` with what surrounds it where the parameters have been edited.

    Args:
        param: to which it belongs.
        partition: DeepSpeed's own.
        surrounding: called with the parameters that it writes.
    """

    def __init__(self, param: Parameter, partition: Callable[..., None], surrounding: Surrounding) -> None:
        self.partition = partition
        self.param, self.surrounding = param, surrounding

    def __call__(
        self,
        param_list: Any = None,
        hierarchy: int = 0,
        has_been_updated: bool = False,
        free_data: bool = True,
    ) -> None:
        params = [self.param] if param_list is None else param_list
        params = [params] if isinstance(params, Parameter) else list(params)
        with self.surrounding(params) if has_been_updated else nullcontext():
            self.partition(params, hierarchy, has_been_updated, free_data)


class Stage3Base(ReducingStage3):
    """Stage 3 without fp32 copies and without a gradient buffer; what it reduces goes to ``on_gradients``.

    A subclass implements what ``ReducingStage3`` asks for, and ``set_up``, which is called when the shards
    are allocated and before any gradient.
    """

    n_caching_allocator_flushes: int

    def set_up(self) -> None:
        raise NotImplementedError

    def _setup_for_real_optimizer(self) -> None:
        super()._setup_for_real_optimizer()
        self.set_up()

    def _create_fp16_partitions_with_defragmentation(self, fp16_param_groups: list[dict]) -> None:
        in_pieces = partial(defragment_in_pieces, stage3.defragment)
        with mock.patch.object(stage3, "defragment", in_pieces):
            super()._create_fp16_partitions_with_defragmentation(fp16_param_groups)

    def _set_fp16_partitioned_groups_flat(self) -> None:
        self.fp16_partitioned_groups_flat = [self.lp_param_buffer for _ in self.fp16_groups]

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "offload_states: there are no optimizer states here, and the shards stay on the device"
        )

    def group_index(self) -> dict[Parameter, int]:
        """For each owned parameter the index of its entry in ``optimizer.param_groups``."""
        return {
            param: self.sub_group_to_group_id[sub_group]
            for sub_group, params in enumerate(self.fp16_groups)
            for param in params
        }

    def name_of(self, param: Parameter) -> str:
        """As in ``model.named_parameters()``."""
        return self.param_names.get(param, "<unnamed>")

    def release_gathered_params(self) -> None:
        """Drop every gathered copy, so that the next use gathers the shards as they now are."""
        self._partition_all_parameters()

    def gather_persistent_params(self, changed: Iterable[Parameter]) -> None:
        """Gather again the small parameters that ZeRO-3 keeps whole.

        Args:
            changed: whose secondary copies (hpZ) are dropped.
        """
        for param in changed:
            param.ds_secondary_tensor = None
        if self.persistent_parameters:
            self.persistent_parameters[0].all_gather(self.persistent_parameters)

    @property
    def has_secondary_copies(self) -> bool:
        """Whether hpZ keeps more copies of the weights, made of what was gathered."""
        return self.zero_hpz_partition_size > 1

    def surround_edits(self, surrounding: Surrounding) -> None:
        """Let ``surrounding`` surround each write of parameters that the user has edited to their shards."""
        for param in self.owned_params():
            original = getattr(param.partition, "partition", param.partition)
            param.partition = _SurroundedPartition(param, original, surrounding)

    def shard_stream(self) -> ShardStream:
        """The streams of rules 1 to 3 at the top of ``updater``."""
        return ShardStream(
            updates=self.reduce_and_partition_stream,
            gathers=self.parameter_offload._DeepSpeedZeRoOffload__allgather_stream,
        )

    def before_gathers(self, action: Callable[[], None]) -> None:
        """Call ``action`` each time before a module's parameters are gathered, in forward and in backward."""
        coordinator = self.parameter_offload.get_param_coordinator()
        coordinator.fetch_sub_module = partial(_preceded, action, coordinator.fetch_sub_module)

    def warn_of_allocator_flushes(self) -> None:
        """Say, as DeepSpeed's own step does, that torch's allocator had to give memory back to find some."""
        retries = int(get_accelerator().memory_stats().get("num_alloc_retries") or 0)
        num_flushes = retries - self.n_caching_allocator_flushes
        if num_flushes > 0 and dist.get_rank() == 0:
            logger.warning(
                f"{num_flushes} flushes of the allocator's cache since the "
                "last step: memory is nearly full, and each flush waits for the device. Lower "
                '"zero_optimization.stage3_max_live_parameters", the micro-batch or the sequence length, or '
                "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
            )
        self.n_caching_allocator_flushes = retries

    def begin_step(self) -> None:
        self._pre_step()

    def scale_after(self, overflow: bool) -> None:
        """Let DeepSpeed's loss scaler fall after an overflow, or count towards growing."""
        self._update_scale(overflow)

    def scaler_state(self) -> dict[str, float]:
        """The numbers of DeepSpeed's loss scaler that change from step to step, by their names there."""
        scaler = vars(self.loss_scaler)
        return {name: scaler[name] for name in SCALER_STATE if name in scaler}

    def set_scaler_state(self, state: Mapping[str, float]) -> None:
        """Let the loss scaler continue from ``scaler_state``; a static scale stays what the JSON says."""
        if self.dynamic_loss_scale:
            self.loss_scaler.__dict__.update({name: state[name] for name in SCALER_STATE if name in state})

    def backward_counters(self) -> dict[torch.nn.Module, dict[str, int]]:
        """What ZeRO-3's module hooks count down in a backward."""
        names = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
        return {
            module: {name: module.__dict__[name] for name in names if name in module.__dict__}
            for module in self.module.modules()
        }

    def restore_backward_counters(self, counters: dict[torch.nn.Module, dict[str, int]]) -> None:
        """Let a second backward through the same graph find the hooks as the first one did."""
        for module, of_module in counters.items():
            module.__dict__.update(of_module)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what is left of full gradients; always to None. DeepSpeed's own fails on CPU ranks."""
        self.micro_step_id = 0
        self._epilogue_ran_this_backward = False
        for param in self.owned_params():
            drop_grad(param)

    def forget_unfinished_backward(self) -> None:
        """Empty the reduce buckets and the hook counters after a backward that raised."""
        self.forget_buckets()
        while self._backward_active_depth > 0:
            self.exit_backward()


def _preceded(action: Callable[[], None], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    action()
    return method(*args, **kwargs)
