"""Which parameters an engine can have, and what is said where they are of several dtypes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Module, Parameter

from lomo_ds.config import first_few
from lomo_ds.zero3._internals import KEEP_KEY, TRAINABLE, DeepSpeedConfig, Dtypes, full_numel, full_shape


def refuse_params(model: Module, trained: Iterable[Parameter], ds_config: DeepSpeedConfig) -> None:
    """Check parameters and the dtypes that they are to have, before any is converted.

    Args:
        model: cut by ZeRO-3 or whole.
        trained: those of its parameters that are trained.
        ds_config: of the JSON.

    Raises:
        ValueError: a parameter without an element, or one that cannot be trained in its dtype; or gathers
            cannot have several dtypes.
    """
    for name, param in model.named_parameters():
        if not full_numel(param):
            raise ValueError(
                f"{name!r} has no element (shape {full_shape(param)}), and DeepSpeed's ZeRO-3 cannot gather "
                "such a parameter: make it a buffer, or leave it out of the model"
            )
    dtypes = Dtypes.of(ds_config).of_params(model)
    names = {param: name for name, param in model.named_parameters()}
    for param in trained:
        if (dtype := dtypes.get(param, param.dtype)) not in TRAINABLE:
            raise ValueError(
                f"{names.get(param, '<unnamed>')!r} is {_shown(dtype)}: what is trained has to be "
                "float32, bfloat16 or float16: convert it, or freeze it"
            )
    different = sorted({_shown(dtype) for dtype in dtypes.values()})
    if len(different) > 1 and ds_config.zero_config.use_all_reduce_for_fetch_params:
        raise ValueError(
            '"zero_optimization.stage3_use_all_reduce_for_fetch_params" gathers parameters of one dtype '
            f"alone, and these are {' and '.join(different)}: delete the key, or set "
            f'"{KEEP_KEY}" to []'
        )


def several_dtypes(model: Module) -> str | None:
    """For the log: which parameters are of another dtype than most of them; None where there are none."""
    named: dict[torch.dtype, list[str]] = {}
    for name, param in model.named_parameters():
        named.setdefault(param.dtype, []).append(name)
    if len(named) < 2:
        return None
    most, *others = sorted(named, key=lambda dtype: -len(named[dtype]))
    parts = [f"{len(named[dtype])} in {_shown(dtype)} ({first_few(named[dtype])})" for dtype in others]
    return f"parameters are in {_shown(most)}, but for {' and '.join(parts)}"


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
