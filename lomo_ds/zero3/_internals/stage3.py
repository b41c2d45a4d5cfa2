"""DeepSpeed's stage 3 with its gradients handed to this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import logger
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3._internals.params import process_group, shard_spec
from lomo_ds.zero3.piecewise import defragment_in_pieces
from lomo_ds.zero3.private_names import SCALER_STATE
from lomo_ds.zero3.shard_stream import ShardStream


class ReducedGradient(NamedTuple):
    """A gradient that has been averaged over the ranks and cut like its parameter.

    Attributes:
        param: the parameter it belongs to.
        shard: this rank's real elements, shape (shard_numel,), in the accumulation dtype; empty on a
            rank that holds only padding. A view of a buffer that is used again: copy what is to be kept.
    """

    param: Parameter
    shard: Tensor


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


class Stage3Base(DeepSpeedZeroOptimizer_Stage3):
    """Stage 3 without fp32 copies and without a gradient buffer; what it reduces goes to ``on_gradients``.

    A subclass implements ``set_up`` (called when the shards are allocated and before any gradient),
    ``accepts_gradients``, ``on_gradients`` (called inside backward, once a reduce bucket) and
    ``on_stray_gradient`` (a gradient came while none was accepted).
    """

    n_caching_allocator_flushes: int

    def set_up(self) -> None:
        raise NotImplementedError

    def accepts_gradients(self) -> bool:
        raise NotImplementedError

    def on_gradients(self, gradients: Sequence[ReducedGradient]) -> None:
        raise NotImplementedError

    def on_stray_gradient(self, param: Parameter) -> None:
        raise NotImplementedError

    reduces_gradients = True
    """Whether there are gradients at all, and with them a reduce bucket."""

    def _setup_for_real_optimizer(self) -> None:
        if self.contiguous_gradients and self.reduces_gradients:
            for dtype, bucket in self.ipg_buckets.items():
                bucket.buffer = torch.empty(
                    self.reduce_bucket_size, dtype=dtype, device=get_accelerator().current_device_name()
                )
        self.set_up()

    def reduce_ready_partitions_and_remove_grads(self, param: Parameter) -> None:
        if self.accepts_gradients():
            super().reduce_ready_partitions_and_remove_grads(param)
            self.reduce_full_bucket(self.get_param_comm_dtype(param))
        else:
            self.on_stray_gradient(param)
            _drop_grad(param)

    def reduce_full_bucket(self, dtype: torch.dtype) -> None:
        """Reduce a gradient that fills the bucket at once; DeepSpeed would keep it until the next comes."""
        if self.ipg_buckets[dtype].elements >= self.reduce_bucket_size:
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)

    def partition_grads(self, params_to_release: list[Parameter], grad_partitions: list[Tensor]) -> None:
        self.on_gradients(
            [_reduced(param, part) for param, part in zip(params_to_release, grad_partitions, strict=True)]
        )
        for param in params_to_release:
            _drop_grad(param)

    def independent_gradient_partition_epilogue(self) -> None:
        """End a backward. The host waits for R, not for order's sake: what R has released is free then."""
        for dtype in list(self.ipg_buckets):
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()
        self._epilogue_ran_this_backward = True

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Parameter], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """Reduce a gradient that comes alone in its own memory; else as DeepSpeed does.

        The same sums; DeepSpeed also cuts each gradient into a view for every rank, which takes long where
        there are many.
        """
        param = params_to_reduce[0]
        if len(params_to_reduce) > 1 or not self.can_reduce_in_place(param, communication_data_type):
            return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
                params_to_reduce, communication_data_type
            )
        group = process_group(param)
        flat = param.grad.view(-1).div_(dist.get_world_size(group))
        own = flat.narrow(0, dist.get_rank(group) * param.ds_tensor.ds_numel, param.ds_tensor.ds_numel)
        dist.reduce_scatter_fn(own, flat, group=group)
        return [own.to(self.gradient_accumulation_dtype)]

    def can_reduce_in_place(self, param: Parameter, communication_data_type: torch.dtype) -> bool:
        world_size = dist.get_world_size(process_group(param))
        plain = (
            communication_data_type == self.dtype == param.grad.dtype and self.all2all_process_group is None
        )
        predivides = self.postscale_gradients and self.gradient_predivide_factor != 1.0
        averages = self._gradient_averaging_world_size([param], world_size) == world_size
        return plain and not predivides and averages and param.grad.numel() % world_size == 0

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

    def trainable_params(self) -> list[Parameter]:
        """The parameters that are trained, in the order in which ZeRO-3 keeps them."""
        return [param for group in self.fp16_groups for param in group]

    def group_index(self) -> dict[Parameter, int]:
        """For each trained parameter the index of its entry in ``optimizer.param_groups``."""
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

    def gather_persistent_params(self) -> None:
        """Drop secondary copies (hpZ), and gather again the small parameters that ZeRO-3 keeps whole."""
        self.invalidate_secondary_tensor()
        if self.persistent_parameters:
            self.persistent_parameters[0].all_gather(self.persistent_parameters)

    @property
    def has_secondary_copies(self) -> bool:
        """Whether hpZ keeps more copies of the weights, made of what was gathered."""
        return self.zero_hpz_partition_size > 1

    def surround_edits(self, surrounding: Surrounding) -> None:
        """Let ``surrounding`` surround each write of parameters that the user has edited to their shards."""
        for param in self.trainable_params():
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
        coordinator.fetch_sub_module = _Preceded(action, coordinator.fetch_sub_module)

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
        for param in self.trainable_params():
            _drop_grad(param)

    def forget_unfinished_backward(self) -> None:
        """Empty the reduce buckets and the hook counters after a backward that raised."""
        for bucket in self.ipg_buckets.values():
            bucket.clear_params()
        while self._backward_active_depth > 0:
            self.exit_backward()


def _drop_grad(param: Parameter) -> None:
    """Release a full gradient, which the current stream may still be reading."""
    if param.grad is not None and not get_accelerator().is_synchronized_device():
        param.grad.record_stream(get_accelerator().current_stream())
    param.grad = None


def _reduced(param: Parameter, partition: Tensor) -> ReducedGradient:
    real = partition.view(-1).narrow(0, 0, shard_spec(param).shard_numel)
    return ReducedGradient(param, real)


class _Preceded:
    """A method before which an action is done."""

    def __init__(self, action: Callable[[], None], method: Callable[..., Any]) -> None:
        self._action, self._method = action, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._action()
        return self._method(*args, **kwargs)
