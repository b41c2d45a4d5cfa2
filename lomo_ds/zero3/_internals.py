"""The one file that names what DeepSpeed keeps to itself.

Three kinds of things stand here: readers of the attributes that ZeRO-3 hangs on a parameter, the two
classes that override DeepSpeed's methods and hand on to ours in the words of this project, and the
contract: a table of every private name used, which ``lomo-ds doctor`` and the tests hold against the
installed DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.shards import ShardSpec
from lomo_ds.zero3.contract import PrivateName, PrivateNameStatus, check_names

__all__ = [
    "DeepSpeedConfig",
    "EngineSeam",
    "Stage3Seam",
    "accumulation_dtype",
    "check_contract",
    "full_numel",
    "init_context_suspended",
    "is_sharded",
    "load_ds_config",
    "local_shard",
    "process_group",
    "shard_spec",
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
    return torch.bfloat16 if ds_config.bfloat16_config.enabled else torch.float32


@contextmanager
def init_context_suspended():
    """Leave a surrounding ``deepspeed.zero.Init`` for a while, as deepspeed.initialize does."""
    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


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


class Stage3Seam(DeepSpeedZeroOptimizer_Stage3):
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
        else:
            self.refuse(param)
            _drop_grad(param)

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
        """Gather again the small parameters that ZeRO-3 keeps whole, and drop secondary copies."""
        if self.persistent_parameters:
            self.persistent_parameters[0].all_gather(self.persistent_parameters)
        self.invalidate_secondary_tensor()

    def begin_step(self) -> None:
        self._pre_step()

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


_STAGE3_ARGUMENTS = {
    "static_loss_scale": "loss_scale",
    "dynamic_loss_scale": "dynamic_loss_scale",
    "dynamic_loss_args": "dynamic_loss_scale_args",
    "clip_grad": "gradient_clipping",
    "contiguous_gradients": "zero_contiguous_gradients",
    "reduce_bucket_size": "zero_reduce_bucket_size",
    "prefetch_bucket_size": "zero_prefetch_bucket_size",
    "max_reuse_distance": "zero_max_reuse_distance",
    "max_live_parameters": "zero_max_live_parameters",
    "param_persistence_threshold": "zero_param_persistence_threshold",
    "model_persistence_threshold": "zero_model_persistence_threshold",
    "reduce_scatter": "zero_reduce_scatter",
    "overlap_comm": "zero_overlap_comm",
    "sub_group_size": "zero_sub_group_size",
    "postscale_gradients": "postscale_gradients",
    "gradient_predivide_factor": "gradient_predivide_factor",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "zero_module_granularity_threshold": "zero_module_granularity_threshold",
    "log_trace_cache_warnings": "zero_log_trace_cache_warnings",
    "enable_sanity_checks": "is_sanity_checks_enabled",
}
"""Argument of stage 3's constructor -> the engine's method that reads it from the JSON."""


class EngineSeam(DeepSpeedEngine):
    """DeepSpeed's engine, with the ZeRO-3 optimizer that ``make_sharded_optimizer`` returns."""

    def __init__(self, **engine_arguments: Any) -> None:
        super().__init__(**engine_arguments)
        self._configure_python_gc()

    def make_sharded_optimizer(self, **stage3_arguments: Any) -> Stage3Seam:
        raise NotImplementedError

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        return "zero_optimization"  # DeepSpeed's own check would call our optimizer untested

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return True  # the name in the JSON has been checked against ours before

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Stage3Seam:
        if self.zero_allgather_sequential():
            self._config.zero_config.prefetch_bucket_size = 1
        arguments = {name: getattr(self, method)() for name, method in _STAGE3_ARGUMENTS.items()}
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


# The contract -----------------------------------------------------------------------------------


_STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_BASE = "deepspeed.runtime.base_optimizer:ZeROOptimizer"
_PARAMS = "deepspeed.runtime.zero.partition_parameters"


def _methods(owner: str, used_for: str, **signatures: tuple[str, ...]) -> list[PrivateName]:
    return [
        PrivateName(owner=owner, name=name, used_for=used_for, parameters=parameters)
        for name, parameters in signatures.items()
    ]


def _attributes(owner: str, used_for: str, *names: str) -> list[PrivateName]:
    return [PrivateName(owner=owner, name=name, used_for=used_for) for name in names]


CONTRACT: tuple[PrivateName, ...] = (
    *_methods(
        _STAGE3,
        "keeping only the reduce bucket, applying shards inside backward",
        _setup_for_real_optimizer=("self",),
        partition_grads=("self", "params_to_release", "grad_partitions"),
        reduce_ready_partitions_and_remove_grads=("self", "param"),
        independent_gradient_partition_epilogue=("self",),
        _DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads=("self", "communication_data_type"),
    ),
    *_methods(
        _STAGE3,
        "the step boundary",
        _pre_step=("self",),
        _partition_all_parameters=("self",),
        invalidate_secondary_tensor=("self",),
        backward_prologue=("self",),
        backward_epilogue=("self",),
    ),
    *_attributes(
        _STAGE3,
        "reading what stage 3 built",
        "ipg_buckets",
        "fp16_groups",
        "sub_group_to_group_id",
        "persistent_parameters",
        "reduce_and_partition_stream",
        "gradient_accumulation_dtype",
        "_global_grad_norm",
        "clip_grad",
        "overflow",
        "contiguous_gradients",
    ),
    *_methods(_BASE, "recovering from a backward that raised", exit_backward=("self",)),
    *_attributes(
        _BASE,
        "recovering from a backward that raised",
        "_backward_active_depth",
        "_epilogue_ran_this_backward",
    ),
    *_methods(
        _ENGINE,
        "building our optimizer in DeepSpeed's engine",
        _configure_zero_optimizer=("self", "optimizer"),
        _do_optimizer_sanity_check=("self", "basic_optimizer"),
        _is_supported_optimizer=("self", "optimizer_name"),
        _configure_python_gc=("self",),
        **{method: ("self",) for method in _STAGE3_ARGUMENTS.values()},
    ),
    *_attributes(
        _ENGINE,
        "building our optimizer in DeepSpeed's engine",
        "_config",
        "seq_data_parallel_group",
        "param_names",
    ),
    *_attributes(
        _PARAMS,
        "knowing a parameter's shard",
        "ds_id",
        "ds_shape",
        "ds_tensor",
        "ds_numel",
        "ds_process_group",
        "shutdown_init_context",
        "restore_init_context",
    ),
)


def check_contract() -> list[PrivateNameStatus]:
    """Hold every private name of this file against the installed DeepSpeed."""
    return check_names(CONTRACT)
