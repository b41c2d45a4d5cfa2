"""Kernels as operations of torch: what each reads and writes is in its schema, for whoever watches
operations.

On tensors without data they do nothing. ``implement`` gives them their kernels on a device.
"""

from __future__ import annotations

from ctypes import c_float
from itertools import chain
from typing import Any

import torch
from torch import Tensor

_WEIGHTS = "Tensor(a!) param, Tensor(b!)? error, Tensor? is_written, str rounding, int[] noise_and_start"
_GRAD = "Tensor grad, Tensor? grad_scale, float scale, float clip_value"
_FACTORS = "Tensor? variance, Tensor? row, Tensor? row_mean, Tensor? column, bool row_first, bool root"

SCHEMAS = {
    "gradient_step": f"{_WEIGHTS}, {_GRAD}, float lr, float weight_decay, int[] grid",
    "sign_step": f"{_WEIGHTS}, {_GRAD}, float lr, float decay, int[] grid",
    "adam_step": f"{_WEIGHTS}, {_GRAD}, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!)? master, "
    "float[] numbers, int[] grid",
    "learn_mean": "Tensor(a!) means, Tensor sums, float num, float eps, float weight, int[] grid",
    "step_size": "Tensor param_sq, Tensor update_sq, float[] numbers, Tensor(a!) size, int[] grid",
    "learn_variance": f"{_GRAD}, Tensor(a!) variance, float eps, float weight, int[] grid",
    "factored_step": f"{_WEIGHTS}, {_GRAD}, {_FACTORS}, Tensor? step_size, float step, float decay, "
    "int[] grid",
    "momentum_step": f"{_WEIGHTS}, {_GRAD}, Tensor(c!) momentum, Tensor size, float weight, Tensor new_size, "
    "int[] noise, Tensor? row, Tensor? column, float step, float decay, int[] grid",
    "perturb": "Tensor(a!) values, Tensor(b!)? other, Tensor table, float factor, float of_other, "
    "int[] noise_and_start, int[] grid",
    "squares": "Tensor values, Tensor(a!) partials, int[] grid",
    "tile_sums": f"{_GRAD}, {_FACTORS}, Tensor? momentum, Tensor? size, float weight, bool squared, "
    "Tensor(a!)? by_row, Tensor(b!)? by_column, int[] grid",
}
"""Kernel -> its arguments, in the kernel's order, lists flattened. The last number of ``grid`` is how many
programs run; the kernel does not see it."""

ONLY_WRITTEN = frozenset({"partials", "by_row", "by_column", "size", "other"})
"""Arguments that a kernel writes and does not read. What else it writes it also reads."""

_LIBRARY = torch.library.Library("lomo_ds", "DEF")
for _name, _arguments in SCHEMAS.items():
    _LIBRARY.define(f"{_name}({_arguments}) -> ()")
    torch.library.register_fake(f"lomo_ds::{_name}", lambda *args: None, lib=_LIBRARY)


def implement(dispatch_key: str) -> None:
    """Give every operation its kernel on a device. Once a process and key.

    Args:
        dispatch_key: of torch, such as "CUDA".

    Raises:
        ImportError: there is no Triton.
    """
    from lomo_ds.rules.kernels import directions, steps, sums

    for name in SCHEMAS:
        kernel = next(getattr(module, name) for module in (steps, sums, directions) if hasattr(module, name))
        _LIBRARY.impl(name, _launcher(kernel), dispatch_key)


def _launcher(kernel: Any) -> Any:
    def launch(*args: Any) -> None:
        *flat, num_programs = chain.from_iterable(arg if isinstance(arg, list) else [arg] for arg in args)
        if num_programs:
            kernel[(num_programs,)](*map(_as_fp32, flat), enable_fp_fusion=False)

    return launch


def _as_fp32(value: Any) -> Any:
    """A number as a kernel on a GPU gets it; Triton's interpreter would keep its 64 bits."""
    return c_float(value).value if isinstance(value, float) else value


def traffic_bytes(operation: Any, args: tuple[Any, ...]) -> int:
    """Bytes that one call reads from memory and writes to it, each element once.

    Args:
        operation: of ``torch.ops.lomo_ds``.
        args: of the call.
    """
    total = 0
    for argument, value in zip(operation._schema.arguments, args, strict=True):
        if isinstance(value, Tensor):
            is_updated = argument.is_write and argument.name not in ONLY_WRITTEN
            total += value.numel() * value.element_size() * (2 if is_updated else 1)
    return total
