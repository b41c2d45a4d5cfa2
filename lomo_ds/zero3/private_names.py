"""The private names of DeepSpeed that ``_internals`` leans on, and how to check them.

Names only, as text: nothing here reaches into DeepSpeed but to read its source.
"""

from __future__ import annotations

from lomo_ds.zero3.name_checks import PrivateName, PrivateNameStatus, check_names

STAGE3_ARGUMENTS = {
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
    "zero_hpz_partition_size": "zero_hpz_partition_size",
    "zero_module_granularity_threshold": "zero_module_granularity_threshold",
    "log_trace_cache_warnings": "zero_log_trace_cache_warnings",
    "enable_sanity_checks": "is_sanity_checks_enabled",
}
"""Argument of stage 3's constructor -> the engine's method that reads it from the JSON."""

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's dynamic loss scaler that a checkpoint carries."""

_STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_BASE = "deepspeed.runtime.base_optimizer:ZeROOptimizer"
_PARAMS = "deepspeed.runtime.zero.partition_parameters"
_OFFLOAD = "deepspeed.runtime.zero.parameter_offload"
_COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"


def _methods(owner: str, used_for: str, **signatures: tuple[str, ...]) -> list[PrivateName]:
    return [
        PrivateName(owner=owner, name=name, used_for=used_for, parameters=parameters)
        for name, parameters in signatures.items()
    ]


def _attributes(owner: str, used_for: str, *names: str) -> list[PrivateName]:
    return [PrivateName(owner=owner, name=name, used_for=used_for) for name in names]


CONTRACT: tuple[PrivateName, ...] = (
    *_attributes(
        "deepspeed.comm.torch",
        "not compiling an operation for CPU ranks",
        "__compatible_ops__",
        "build_shm_op",
    ),
    *_methods(
        _STAGE3,
        "keeping only the reduce bucket, applying shards inside backward",
        _setup_for_real_optimizer=("self",),
        _get_trainable_parameter_groups=("self",),
        create_reduce_and_remove_grad_hooks=("self",),
        partition_grads=("self", "params_to_release", "grad_partitions"),
        reduce_ready_partitions_and_remove_grads=("self", "param"),
        independent_gradient_partition_epilogue=("self",),
        _DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads=("self", "communication_data_type"),
        _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads=(
            "self",
            "params_to_reduce",
            "communication_data_type",
        ),
        _gradient_averaging_world_size=("self", "params", "partition_world_size"),
    ),
    *_methods(
        _STAGE3,
        "starting without the whole model in host memory",
        _create_fp16_partitions_with_defragmentation=("self", "fp16_param_groups"),
        _set_fp16_partitioned_groups_flat=("self",),
        offload_states=(
            "self",
            "include",
            "device",
            "pin_memory",
            "non_blocking",
        ),
    ),
    *_methods(
        _STAGE3,
        "the step boundary",
        _pre_step=("self",),
        _partition_all_parameters=("self",),
        _update_scale=("self", "has_overflow"),
        backward_prologue=("self",),
        backward_epilogue=("self",),
    ),
    *_methods(
        _STAGE3,
        "DeepSpeed's safe_get_* and safe_set_* functions",
        get_fp32_grad_for_param=("self", "param"),
        set_fp32_grad_for_param=("self", "value", "param"),
        get_local_fp32_grad_for_param=("self", "param"),
        set_local_grad_for_param=("self", "value", "param"),
        update_fp32_grad_for_param_vectorized=("self", "update_func", "param_list"),
        get_full_hp_param=("self", "param", "optim_state_key"),
        set_full_hp_param=("self", "value", "param", "optim_state_key"),
        get_local_fp32_param=("self", "param", "optim_state_key"),
        set_local_hp_param=("self", "value", "param", "optim_state_key"),
        get_hp_param_device=("self", "param", "optim_state_key"),
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
        "dtype",
        "_global_grad_norm",
        "clip_grad",
        "overflow",
        "contiguous_gradients",
        "n_caching_allocator_flushes",
        "parameter_offload",
    ),
    *_attributes(
        _OFFLOAD + ":DeepSpeedZeRoOffload",
        "letting gathers wait for updates",
        "_DeepSpeedZeRoOffload__allgather_stream",
    ),
    *_attributes(_STAGE3, "carrying the loss scale in a checkpoint", "loss_scaler", "dynamic_loss_scale"),
    *_attributes(
        "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
        "carrying the loss scale in a checkpoint",
        "cur_iter",
        "last_overflow_iter",
        "cur_hysteresis",
    ),
    *_methods(_BASE, "recovering from a backward that raised", exit_backward=("self",)),
    *_methods(_BASE, "reducing a gradient that fills the bucket", get_param_comm_dtype=("self", "param")),
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
        _cast_module_mixed_precision=(
            "self",
            "param_dtype",
            "buffer_dtype",
            "is_zero_init_model",
            "keep_pattern",
        ),
        **{method: ("self",) for method in STAGE3_ARGUMENTS.values()},
    ),
    *_methods(
        _ENGINE,
        "saving a parameter without dimensions",
        _zero3_consolidated_16bit_state_dict=("self", "exclude_frozen_parameters"),
    ),
    *_attributes(
        _ENGINE,
        "building our optimizer in DeepSpeed's engine",
        "_config",
        "seq_data_parallel_group",
        "param_names",
    ),
    *_attributes(
        "deepspeed.runtime.keep_in_fp32",
        "knowing what a model keeps in fp32",
        "keep_in_fp32_pattern",
    ),
    *_attributes(
        _OFFLOAD,
        "running backward twice through one graph",
        "applied_pre_backward_ref_cnt",
        "ds_grads_remaining",
    ),
    *_attributes(
        _PARAMS,
        "knowing a parameter's shard",
        "ds_id",
        "ds_shape",
        "ds_tensor",
        "ds_numel",
        "ds_process_group",
        "ds_secondary_tensor",
        "all_gather",
        "partition",
        "shutdown_init_context",
        "restore_init_context",
    ),
    *_methods(
        f"{_PARAMS}:Init",
        "cutting parameters without dimensions",
        _zero_init_param=("self", "param"),
    ),
    *_attributes(
        _PARAMS,
        "perturbing gathered parameters",
        "ds_status",
        "ds_persist",
        "ds_active_sub_modules",
        "ds_external_parameters",
    ),
    *_attributes(_STAGE3, "perturbing gathered parameters", "zero_hpz_partition_size", "parameter_offload"),
    *_methods(
        f"{_OFFLOAD}:DeepSpeedZeRoOffload",
        "running two forwards in lockstep",
        pre_sub_module_forward_function=("self", "sub_module"),
        post_sub_module_forward_function=("self", "sub_module"),
        get_param_coordinator=("self",),
    ),
    *_methods(
        f"{_COORDINATOR}:PartitionedParameterCoordinator",
        "running two forwards in lockstep",
        reset_step=("self",),
    ),
    *_attributes(_COORDINATOR, "perturbing gathered parameters", "iter_params"),
    *_attributes(_OFFLOAD, "forward-mode differentiation", "pre_bwd_fn", "post_bwd_fn"),
    *_attributes(
        "deepspeed.runtime.zero.stage3",
        "planning: one rank without the others, and what it keeps; a bucket for each dtype",
        "IPGBucketZ3",
        "assert_ints_same_as_other_ranks",
        "grad_partitions_flat_buffer",
        "fp32_partitioned_groups_flat",
    ),
    *_attributes(
        _PARAMS,
        "planning: one rank without the others",
        "assert_ints_same_as_other_ranks",
        "zero_init_context",
        "num_persisted_parameters",
        "num_persisted_elements",
        "param_id",
    ),
    *_attributes(_COORDINATOR, "planning: one rank without the others", "assert_ints_same_as_other_ranks"),
    *_attributes(_OFFLOAD, "planning: one engine after another", "FWD_MODULE_STACK"),
)


def check_contract() -> list[PrivateNameStatus]:
    """Compare every private name of this file with the installed DeepSpeed."""
    return check_names(CONTRACT)
