"""The one file that names what DeepSpeed keeps to itself.

Two kinds of things stand here: readers of the attributes that ZeRO-3 hangs on a parameter, and the two
classes that override DeepSpeed's methods and hand on to ours in the words of this project. Every private
name used is in the table of ``private_names``, which ``lomo-ds doctor`` and the tests hold against the
installed DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.shards import ShardSpec
from lomo_ds.zero3.piecewise import defragment_in_pieces
from lomo_ds.zero3.private_names import CONTRACT, SCALER_STATE, STAGE3_ARGUMENTS, check_contract

__all__ = [
    "CONTRACT",
    "DeepSpeedConfig",
    "EngineBase",
    "Stage3Base",
    "accumulation_dtype",
    "check_contract",
    "forget_module_state",
    "full_numel",
    "init_context_suspended",
    "is_sharded",
    "load_ds_config",
    "local_shard",
    "process_group",
    "ranks_not_compared",
    "shard_spec",
    "permanent_buffers",
    "stored_shard",
]


# What ZeRO-3 hangs on a parameter ---------------------------------------------------------------


def is_sharded(param: Parameter) -> bool:
    """Whether ZeRO-3 has taken the parameter over."""
    return hasattr(param, "ds_id")


def shard_spec(param: Parameter) -> ShardSpec:
    """Shape of the whole parameter and this rank's place in it (rank of the parameter's own group)."""
    group = process_group(param)
    spec = ShardSpec(
        shape=tuple(param.ds_shape), rank=dist.get_rank(group), world_size=dist.get_world_size(group)
    )
    assert spec.partition_numel == param.ds_tensor.ds_numel, "ZeRO-3 cuts its shards otherwise"
    return spec


def local_shard(param: Parameter) -> Tensor:
    """This rank's real elements of ``param``: a 1-D view, shape (shard_numel,), without the padding."""
    return param.ds_tensor.view(-1).narrow(0, 0, shard_spec(param).shard_numel)


def stored_shard(param: Parameter) -> Tensor:
    """What this rank stores of ``param``: 1-D, shape (partition_numel,), padding included."""
    return param.ds_tensor


def process_group(param: Parameter) -> Any:
    """The group over which ``param`` is cut."""
    return param.ds_process_group


def full_numel(param: Parameter) -> int:
    """Elements of the whole parameter, cut or not yet cut."""
    return prod(param.ds_shape) if is_sharded(param) else param.numel()


def accumulation_dtype(ds_config: DeepSpeedConfig) -> torch.dtype:
    """The dtype in which reduced gradients come and add up, as DeepSpeed's engine derives it."""
    if ds_config.grad_accum_dtype is not None:
        return DtypeEnum(ds_config.grad_accum_dtype).value
    if ds_config.float16_config.enabled:
        return torch.float16
    return torch.bfloat16 if ds_config.bfloat16_config.enabled else torch.float32


@contextmanager
def init_context_suspended():
    """Leave a surrounding ``deepspeed.zero.Init`` for a while, as deepspeed.initialize does."""
    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


# For runs without other ranks ---------------------------------------------------------------------


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
    """(kind, tensor) of what stage 3 keeps beside the shards.

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


# The seams --------------------------------------------------------------------------------------


class ReducedGradient(NamedTuple):
    """A gradient that has been averaged over the ranks and cut like its parameter.

    Attributes:
        param: the parameter it belongs to.
        shard: this rank's real elements, shape (shard_numel,), in the accumulation dtype; empty on a
            rank that holds only padding. A view of a buffer that is used again: copy what is to stay.
    """

    param: Parameter
    shard: Tensor


class Stage3Base(DeepSpeedZeroOptimizer_Stage3):
    """Stage 3 without fp32 copies and without a gradient buffer; what it reduces goes to ``take``.

    A subclass implements ``set_up`` (called when the shards stand and before any gradient), ``take``
    (called inside backward, once a reduce bucket) and ``accepts_gradients``.
    """

    def set_up(self) -> None:
        raise NotImplementedError

    def accepts_gradients(self) -> bool:
        raise NotImplementedError

    def take(self, gradients: Sequence[ReducedGradient]) -> None:
        raise NotImplementedError

    def refuse(self, param: Parameter) -> None:
        raise NotImplementedError

    def _setup_for_real_optimizer(self) -> None:
        if self.contiguous_gradients:
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
            self.refuse(param)
            _drop_grad(param)

    def reduce_full_bucket(self, dtype: torch.dtype) -> None:
        """Reduce a gradient that fills the bucket at once; DeepSpeed would keep it until the next comes."""
        if self.ipg_buckets[dtype].elements >= self.reduce_bucket_size:
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)

    def partition_grads(self, params_to_release: list[Parameter], grad_partitions: list[Tensor]) -> None:
        self.take(
            [_reduced(param, part) for param, part in zip(params_to_release, grad_partitions, strict=True)]
        )
        for param in params_to_release:
            _drop_grad(param)

    def independent_gradient_partition_epilogue(self) -> None:
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
        return self.param_names.get(param, "<unnamed>")

    def release_gathered_params(self) -> None:
        """Drop every gathered copy, so that the next use gathers the shards as they now are."""
        self._partition_all_parameters()

    def gather_persistent_params(self) -> None:
        """Drop secondary copies (hpZ), and gather again the small parameters that ZeRO-3 keeps whole."""
        self.invalidate_secondary_tensor()
        if self.persistent_parameters:
            self.persistent_parameters[0].all_gather(self.persistent_parameters)

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
        """Let the loss scaler go on from ``scaler_state``; a static scale stays what the JSON says."""
        if self.dynamic_loss_scale:
            vars(self.loss_scaler).update({name: state[name] for name in SCALER_STATE if name in state})

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


class EngineBase(DeepSpeedEngine):
    """DeepSpeed's engine, with the ZeRO-3 optimizer that ``make_sharded_optimizer`` returns."""

    def __init__(self, **engine_arguments: Any) -> None:
        super().__init__(**engine_arguments)
        self._configure_python_gc()

    def make_sharded_optimizer(self, **stage3_arguments: Any) -> Stage3Base:
        raise NotImplementedError

    def offloads_checkpoints(self) -> bool:
        """Whether "activation_checkpointing.cpu_checkpointing" of the JSON is set."""
        return bool(self._config.activation_checkpointing_config.cpu_checkpointing)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        return "zero_optimization"  # DeepSpeed's own check would call our optimizer untested

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return True  # the name in the JSON has been checked against ours before

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Stage3Base:
        if self.zero_allgather_sequential():
            self._config.zero_config.prefetch_bucket_size = 1
        arguments = {name: getattr(self, method)() for name, method in STAGE3_ARGUMENTS.items()}
        return self.make_sharded_optimizer(
            module=self.module,
            init_optimizer=optimizer,
            param_names=self.param_names,
            timers=_timers(self),
            ds_config=self.config,
            dp_process_group=self.seq_data_parallel_group,
            gradient_accumulation_dtype=self.get_data_types()[1],
            communication_data_type=self.communication_data_type,
            **arguments,
        )


def _timers(engine: DeepSpeedEngine) -> Any:
    noop = import_module("deepspeed.utils.timer").NoopTimer
    return engine.timers if engine.wall_clock_breakdown() else noop()
