"""Where kernels run: on CUDA devices with Triton. Everywhere else torch's operations do, and one line
says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_LOGGER = logging.getLogger(__name__)
_FAKE_DEVICE = "gpu"
"""Of the planner, which plans for a GPU with Triton."""


def fused(torch_version: Function) -> Function:
    """Let a function's kernel run in its place where there is one.

    Args:
        torch_version: its first argument is a shard, or a tensor. ``kernels.launch`` has the function of the
            same name and with the same arguments, which computes the same.
    """

    @functools.wraps(torch_version)
    def run(first: Any, *args: Any, **more: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first.param
        if not has_kernels(tensor.device.type):
            return torch_version(first, *args, **more)
        from lomo_ds.rules.kernels import launch

        return getattr(launch, torch_version.__name__)(first, *args, **more)

    return run  # type: ignore[return-value]


@functools.cache
def has_kernels(device_type: str) -> bool:
    """Whether kernels run on a type of device; tries one on the first call, and says if they do not."""
    if device_type in ("cpu", "meta"):
        return False
    if device_type == _FAKE_DEVICE:
        return True
    problem = _problem(device_type)
    if problem:
        _LOGGER.warning("lomo_ds: updates run as separate operations of torch, not as kernels: %s", problem)
    return not problem


def _problem(device_type: str) -> str:
    """Why kernels cannot run; "" if they do."""
    if device_type != "cuda":
        return f"they are for CUDA devices, not for {device_type}"
    from lomo_ds.rules.kernels import operations

    try:
        operations.implement("CUDA")
        values = torch.ones(1, device=device_type)
        torch.ops.lomo_ds.squares(values, torch.empty_like(values), [1, 1024, 16, 1])
    except Exception as error:  # whatever is missing: Triton, a compiler, a driver
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
