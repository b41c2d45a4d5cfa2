"""Which dtype each parameter has in an engine, and in which its gradients are sent and add up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.keep_in_fp32 import KEEP_IN_FP32_AUTO, keep_in_fp32_pattern
from torch.nn import Module, Parameter

from lomo_ds.zero3._internals.params import dtype_of, is_sharded

KEEP_KEY = "data_types.keep_in_fp32_modules"

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that a trained parameter may have."""

_CONVERTED = (*TRAINABLE, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """What a DeepSpeed JSON says of dtypes.

    Attributes:
        model: of its "bf16" or "fp16" section; fp32 without them, where parameters keep their own dtype.
        communication: "communication_data_type", by default the model's.
        accumulation: "data_types.grad_accum_dtype", by default the model's.
        kept: ``KEEP_KEY``: "auto", or patterns as transformers reads them.
    """

    model: torch.dtype = torch.float32
    communication: torch.dtype = torch.float32
    accumulation: torch.dtype = torch.float32
    kept: str | list[str] = KEEP_IN_FP32_AUTO

    @classmethod
    def of(cls, ds_config: DeepSpeedConfig) -> Dtypes:
        """As DeepSpeed's engine derives them."""
        model = torch.float32
        if ds_config.float16_config.enabled:
            model = torch.float16
        elif ds_config.bfloat16_config.enabled:
            model = torch.bfloat16
        accumulation = ds_config.grad_accum_dtype
        return cls(
            model=model,
            communication=ds_config.communication_data_type or model,
            accumulation=model if accumulation is None else DtypeEnum(accumulation).value,
            kept=ds_config.keep_in_fp32_modules,
        )

    # Of parameters -----------------------------------------------------------------------------

    def of_params(self, model: Module) -> dict[Parameter, torch.dtype]:
        """The dtype that each parameter is to have.

        In bf16 and fp16 that is the model's, but for fp32 where ``kept`` names the parameter. "auto" names
        those of the model's own lists, ``_keep_in_fp32_modules_strict`` and under fp16
        ``_keep_in_fp32_modules``, and those that are in fp32 next to others in the model's dtype.

        Raises:
            ValueError: a pattern of ``kept`` that matches nothing.
        """
        own = {param: dtype_of(param) for param in model.parameters()}
        if self.model == torch.float32:
            return own
        if self.kept != KEEP_IN_FP32_AUTO:
            _require_matches(model, self.kept)
        keeps_fp32 = self.kept == KEEP_IN_FP32_AUTO and self.model in own.values()
        pattern = keep_in_fp32_pattern(model, self.kept, self.model)
        named = {
            param
            for name, param in model.named_parameters(remove_duplicate=False)
            if pattern is not None and pattern.search(name)
        }
        for param, dtype in own.items():
            # what ``zero.Init`` has cut DeepSpeed leaves as it is
            stays = dtype == torch.float32 and (keeps_fp32 or is_sharded(param))
            if dtype in _CONVERTED:
                own[param] = torch.float32 if stays or param in named else self.model
        return own

    # Of gradients ------------------------------------------------------------------------------

    def communicated(self, param_dtype: torch.dtype) -> torch.dtype:
        """In which dtype the gradient of such a parameter is reduced."""
        return _at_least(self.communication, param_dtype, self.model)

    def accumulated(self, param_dtype: torch.dtype) -> torch.dtype:
        """In which dtype the reduced gradient of such a parameter comes, waits and adds up."""
        return _at_least(self.accumulation, param_dtype, self.model)


def _at_least(asked: torch.dtype, param_dtype: torch.dtype, model: torch.dtype) -> torch.dtype:
    """What the JSON asks for; more where a parameter is of another dtype than the model."""
    return asked if param_dtype == model else torch.promote_types(asked, param_dtype)


def _require_matches(model: Module, patterns: Iterable[str]) -> None:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = [name for name, _ in tensors]
    for pattern in patterns:
        if not any(re.search(pattern.replace("*", ".*"), name) for name in names):
            some = ", ".join(names[:3])
            raise ValueError(f'"{KEEP_KEY}": {pattern!r} matches no name (names are like {some})')


def convert(dtypes: Mapping[Parameter, torch.dtype]) -> None:
    """Give parameters these dtypes, in place; those that are cut by ZeRO-3 must not be gathered."""
    for param, dtype in dtypes.items():
        if is_sharded(param):
            param.ds_tensor.data = param.ds_tensor.data.to(dtype)
        param.data = param.data.to(dtype)
