"""DeepSpeed's engine with a ZeRO-3 optimizer of this project in it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import log_dist

from lomo_ds.zero3._internals.dtypes import Dtypes, convert
from lomo_ds.zero3._internals.params import cut_numbers_as_vectors, dtype_of, full_shape, numbers_as_vectors
from lomo_ds.zero3._internals.stage3 import Stage3Base
from lomo_ds.zero3.private_names import STAGE3_ARGUMENTS


class EngineBase(DeepSpeedEngine):
    """DeepSpeed's engine, with the ZeRO-3 optimizer that ``make_sharded_optimizer`` returns."""

    def __init__(self, **engine_arguments: Any) -> None:
        log_dist(f"DeepSpeed info: version={deepspeed.__version__}, engine=lomo_ds", ranks=[0])
        with numbers_as_vectors(engine_arguments["model"].parameters()):
            super().__init__(**engine_arguments)
        self._configure_python_gc()

    def make_sharded_optimizer(self, **stage3_arguments: Any) -> Stage3Base:
        raise NotImplementedError

    @property
    def dtypes(self) -> Dtypes:
        """What the JSON says of dtypes."""
        return Dtypes.of(self._config)

    def _cast_module_mixed_precision(self, param_dtype: torch.dtype | None, *others: Any) -> None:
        """Give every parameter its dtype; DeepSpeed would give all of them one, and converts buffers."""
        convert(self.dtypes.of_params(self.module))
        super()._cast_module_mixed_precision(None, *others)

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
        convert({param: dtype_of(param) for param in self.module.parameters()})
        arguments = {name: getattr(self, method)() for name, method in STAGE3_ARGUMENTS.items()}
        return self.make_sharded_optimizer(
            module=self.module,
            init_optimizer=optimizer,
            param_names=self.param_names,
            timers=_timers(self),
            ds_config=self.config,
            dp_process_group=self.seq_data_parallel_group,
            dtypes=self.dtypes,
            **arguments,
        )

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """As DeepSpeed's, also of parameters without dimensions. Collective."""
        with cut_numbers_as_vectors(self.module.parameters()):
            whole = super()._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)
        for name, param in self.module.named_parameters(remove_duplicate=False):
            if whole is not None and name in whole:
                whole[name] = whole[name].view(full_shape(param))
        return whole


def _timers(engine: DeepSpeedEngine) -> Any:
    noop = import_module("deepspeed.utils.timer").NoopTimer
    return engine.timers if engine.wall_clock_breakdown() else noop()
