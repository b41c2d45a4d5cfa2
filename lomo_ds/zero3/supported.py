"""What of a DeepSpeed JSON this engine refuses, by key, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lomo_ds.config import shown


class Refusal(NamedTuple):
    """A key of the JSON, the values of it that are refused, and what the user can do."""

    key: str
    refused: Callable[[Any], bool]
    remedy: str


def _uses_device(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("device", "none") not in (None, "none")


def _above_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 1


def _above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _enabled(section: Any) -> bool:
    return bool(section.get("enabled", False)) if isinstance(section, Mapping) else bool(section)


_NOT_YET = "this version does not support it: delete the key"
_NO_STATE = "there are no fp32 copies and no optimizer states here that could be elsewhere: delete the key"
_ONE_GROUP = "only data parallelism over all ranks is supported: delete the key"

REFUSALS = (
    Refusal("zero_optimization.offload_optimizer", _uses_device, _NO_STATE),
    Refusal("zero_optimization.cpu_offload", bool, _NO_STATE),
    Refusal("zero_optimization.zenflow", bool, _NO_STATE),
    Refusal("zero_optimization.offload_param", _uses_device, _NOT_YET),
    Refusal("zero_optimization.cpu_offload_params", bool, _NOT_YET),
    Refusal("zero_optimization.zero_quantized_weights", bool, _NOT_YET),
    Refusal("zero_optimization.zero_quantized_nontrainable_weights", bool, _NOT_YET),
    Refusal("zero_optimization.zero_quantized_gradients", bool, _NOT_YET),
    Refusal("zero_optimization.mics_shard_size", _above_zero, _NOT_YET),
    Refusal("zero_optimization.mics_hierarchical_params_gather", bool, _NOT_YET),
    Refusal("torch_autocast", _enabled, 'use "bf16" or "fp16", or neither for fp32'),
    Refusal("bf16.bf16_master_weights_and_grads", bool, _NO_STATE),
    Refusal("bf16.bf16_optimizer_states", bool, _NO_STATE),
    Refusal("fp16.fp16_master_weights_and_grads", bool, _NO_STATE),
    Refusal("compile.deepcompile", bool, _NOT_YET),
    Refusal(
        "checkpoint.load_universal",
        bool,
        "start from a universal checkpoint by load_pretrained(..., weights=FOLDER): delete the key",
    ),
    Refusal(
        "checkpoint.use_node_local_storage",
        bool,
        "checkpoints have to be on storage that every rank sees: delete the key",
    ),
    Refusal("hybrid_engine", _enabled, _NOT_YET),
    Refusal("managed_gradient_accumulation", lambda managed: managed is False, _NOT_YET),
    Refusal("sequence_parallel_size", _above_one, _ONE_GROUP),
    Refusal("tensor_parallel.autotp_size", _above_one, _ONE_GROUP),
    Refusal("expert_parallel", _enabled, _ONE_GROUP),
)


SECTIONS: tuple[str, ...] = (
    "zero_optimization",
    "optimizer",
    "optimizer.params",
    "scheduler",
    "scheduler.params",
)
SECTIONS += ("bf16", "bfloat16", "fp16", "activation_checkpointing", "tiled_vocabulary", "data_types")
SECTIONS += ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
"""Keys of the JSON that hold an object."""

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def refuse_unsupported(ds_json: Mapping[str, Any]) -> None:
    """Check the keys that change how parameters and gradients are kept.

    Raises:
        ValueError: as ``refuse_malformed``, or a refused key is set; says which and what to do.
    """
    refuse_malformed(ds_json)
    for key, refused, remedy in REFUSALS:
        value = _look_up(ds_json, key)
        if value is not None and refused(value):
            raise ValueError(f'"{key}": {shown(value)} is refused: {remedy}')


def refuse_malformed(ds_json: Mapping[str, Any]) -> None:
    """Check what a JSON has to be for any optimizer, DeepSpeed's own included.

    Raises:
        ValueError: the stage is not 3, a section is none, or the bound on the norm is no number.
    """
    for key in SECTIONS:
        above, _, name = key.rpartition(".")
        place = _look_up(ds_json, above) if above else ds_json
        value = place.get(name) if isinstance(place, Mapping) else None
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f'"{key}" has to be an object, not {shown(value)}: correct or delete it')
    clipping = ds_json.get("gradient_clipping")
    if clipping is not None and not (type(clipping) in (int, float) and 0 <= clipping < math.inf):
        raise ValueError(f'"gradient_clipping" has to be a number of at least 0, not {shown(clipping)}')
    stage = _look_up(ds_json, "zero_optimization.stage")
    if stage != 3:
        raise ValueError(
            f'"zero_optimization.stage" is {shown(stage)}: lomo_ds works on ZeRO-3\'s shards, set it to 3'
        )


def check_ranks(ds_json: Mapping[str, Any], world_size: int) -> None:
    """Check the batch and the groups of ranks against the number of ranks.

    Raises:
        ValueError: they do not go together; says which key to change.
    """
    check_batch(ds_json, world_size)
    check_secondary_partitions(ds_json, world_size)


def check_batch(ds_json: Mapping[str, Any], world_size: int) -> None:
    """Check the three batch keys against each other and the number of ranks.

    Raises:
        ValueError: they do not multiply up, or none of the two batch sizes is given.
    """
    check_batch_numbers(ds_json)
    names = BATCH_KEYS
    total, micro, steps = (ds_json.get(name) for name in names)
    if total is None and micro is None:
        raise ValueError(f'the JSON gives no batch: set "{names[0]}" or "{names[1]}"')
    factor = (micro or 1) * (steps or 1) * world_size
    whole = total is None or (total == factor if micro and steps else total % factor == 0)
    if not whole:
        given = " x ".join(f'"{name}" {ds_json[name]}' for name in names[1:] if ds_json.get(name))
        raise ValueError(
            f'"train_batch_size": {total} is not made of {world_size} ranks{" x " + given if given else ""}: '
            f"set it to a multiple of {factor}"
            if not (micro and steps)
            else f'"train_batch_size": {total} is not {world_size} ranks x {given}: set it to {factor}'
        )


def check_batch_numbers(ds_json: Mapping[str, Any]) -> None:
    """Check each of the three batch keys by itself.

    Raises:
        ValueError: one is given and no whole number of at least 1.
    """
    for name in BATCH_KEYS:
        value = ds_json.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f'"{name}" has to be a whole number of at least 1, not {shown(value)}')


def check_secondary_partitions(ds_json: Mapping[str, Any], world_size: int) -> None:
    """Check hpZ's groups against the number of ranks.

    Raises:
        ValueError: the ranks do not divide into groups of that size.
    """
    key = "zero_optimization.zero_hpz_partition_size"
    size = _look_up(ds_json, key)
    size = 1 if size is None else size
    if type(size) is not int or size < 1:
        raise ValueError(f'"{key}" has to be a whole number of at least 1, not {shown(size)}')
    if size > 1 and world_size % min(size, world_size):
        raise ValueError(f'"{key}": {size} does not divide {world_size} ranks into groups')


def _look_up(ds_json: Mapping[str, Any], key: str) -> Any:
    value: Any = ds_json
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
