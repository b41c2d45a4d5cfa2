"""The one package that names what DeepSpeed keeps to itself.

Readers of the attributes that ZeRO-3 hangs on a parameter, what a run without other ranks needs, and the two
classes that override DeepSpeed's methods and call ours in the words of this project. Every private name used
is in the table of ``private_names``, which ``lomo-ds doctor`` and the tests compare with the installed
DeepSpeed.
"""

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

from lomo_ds.zero3._internals.cpu_comm import group_known_before_init, use_only_gloo_on_cpu
from lomo_ds.zero3._internals.dtypes import KEEP_KEY, TRAINABLE, Dtypes, convert
from lomo_ds.zero3._internals.engine import EngineBase
from lomo_ds.zero3._internals.forward import (
    ForwardHooks,
    gathered_for,
    hooked_modules,
    is_gathered,
    kept_gathered,
    modules_in_forward,
    num_external_params,
    set_modules_in_forward,
    without_backward_hooks,
)
from lomo_ds.zero3._internals.params import (
    CuttingInit,
    all_gathered,
    full_numel,
    full_shape,
    init_context_suspended,
    is_persistent,
    is_sharded,
    local_shard,
    process_group,
    process_group_size,
    shard_spec,
    stored_shard,
)
from lomo_ds.zero3._internals.reduction import ReducedGradient, ReducingStage3
from lomo_ds.zero3._internals.single_rank import (
    DEEPSPEED_SOURCES,
    forget_module_state,
    permanent_buffers,
    ranks_not_compared,
)
from lomo_ds.zero3._internals.stage3 import Stage3Base
from lomo_ds.zero3.private_names import CONTRACT, check_contract

__all__ = [
    "CONTRACT",
    "DEEPSPEED_SOURCES",
    "KEEP_KEY",
    "TRAINABLE",
    "CuttingInit",
    "DeepSpeedConfig",
    "Dtypes",
    "EngineBase",
    "ForwardHooks",
    "ReducedGradient",
    "ReducingStage3",
    "Stage3Base",
    "all_gathered",
    "check_contract",
    "convert",
    "forget_module_state",
    "full_numel",
    "full_shape",
    "gathered_for",
    "hooked_modules",
    "init_context_suspended",
    "is_gathered",
    "is_persistent",
    "is_sharded",
    "kept_gathered",
    "load_ds_config",
    "local_shard",
    "modules_in_forward",
    "num_external_params",
    "permanent_buffers",
    "process_group",
    "process_group_size",
    "ranks_not_compared",
    "set_modules_in_forward",
    "shard_spec",
    "stored_shard",
    "use_only_gloo_on_cpu",
    "group_known_before_init",
    "without_backward_hooks",
]
