"""The dtype to compute in: bf16, or fp32 where the machine has no instructions for bf16."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from lomo_ds.model_io.load import model_dtype
from lomo_ds.recipe import Recipe

DtypeName = Literal["bf16", "fp16", "fp32"]
_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SIZE = 384
"""Rows and columns of the matrices whose product is timed: a tenth of a second at 1 GFLOP/s."""

_NUM_TIMED = 3
_SLOW_BELOW = 0.8
"""Of fp32's speed. Above it bf16 is taken, which halves the memory."""


@dataclass(frozen=True, kw_only=True)
class MatmulSpeed:
    """How fast one thread of this CPU multiplies matrices.

    Attributes:
        gflops: in the dtype that is asked about, 1e9 operations a second.
        fp32_gflops: in fp32.
    """

    gflops: float
    fp32_gflops: float

    @property
    def is_slow(self) -> bool:
        """Whether fp32 is clearly faster, as on a CPU without instructions for the other dtype."""
        return self.gflops < _SLOW_BELOW * self.fp32_gflops

    def comparison(self, name: DtypeName) -> str:
        """One clause with both speeds."""
        times = self.fp32_gflops / self.gflops
        ratio = f"{times:.0f} times slower than" if times >= 1.5 else f"{1 / times:.1f} times as fast as"
        return (
            f"this CPU multiplies {name} {ratio} fp32 "
            f"({self.gflops:.1f} and {self.fp32_gflops:.1f} GFLOP/s on one thread)"
        )


def measure_cpu(name: DtypeName) -> MatmulSpeed:
    """Time products of square matrices on one thread of this CPU. Half a second at most on a slow one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return MatmulSpeed(
            gflops=_matmul_gflops(_TORCH_DTYPES[name]), fp32_gflops=_matmul_gflops(torch.float32)
        )
    finally:
        torch.set_num_threads(num_threads)


def _matmul_gflops(dtype: torch.dtype) -> float:
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    torch.mm(matrix, matrix)  # the first one sets the library up
    durations_s = []
    for _ in range(_NUM_TIMED):
        start_s = time.perf_counter()
        torch.mm(matrix, matrix)
        durations_s.append(time.perf_counter() - start_s)
    return 2e-9 * _SIZE**3 / min(durations_s)


def computes_on_cpu() -> bool:
    """Whether this rank's device is the CPU."""
    return get_accelerator().device_name() == "cpu"


def with_dtype(recipe: Recipe, on_cpu: bool) -> tuple[Recipe, str]:
    """Replace ``dtype: auto`` by what suits this machine.

    Args:
        recipe: of ``load_recipe``.
        on_cpu: whether ranks compute on the CPU.

    Returns:
        (the recipe with a dtype of its own, why), or (the same recipe, "") where it is not "auto".
    """
    if recipe.dtype != "auto":
        return recipe, ""
    if not on_cpu:
        name: DtypeName = "bf16" if get_accelerator().is_bf16_supported() else "fp32"
        return replace(recipe, dtype=name), f"computing in {name}: {_SUPPORT[name]}"
    speed = measure_cpu("bf16")
    name = "fp32" if speed.is_slow else "bf16"
    return replace(recipe, dtype=name), f"computing in {name}: {speed.comparison('bf16')}"


_SUPPORT = {"bf16": "this accelerator supports it", "fp32": "this accelerator has no bf16"}


def with_agreed_dtype(recipe: Recipe, on_cpu: bool) -> tuple[Recipe, str]:
    """``with_dtype`` as rank 0 finds it, on all ranks. Collective."""
    if recipe.dtype != "auto":
        return recipe, ""
    found = [with_dtype(recipe, on_cpu) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def note_on_slow_dtype(ds_json: Mapping[str, Any]) -> str:
    """A line for a CPU rank that is about to compute in a dtype that it is slow in; empty where it is not."""
    name = dtype_of_json(ds_json)
    if name == "fp32":
        return ""
    speed = measure_cpu(name)
    if not speed.is_slow:
        return ""
    return f'{speed.comparison(name)}: set "dtype: fp32" (or auto) in the recipe'


def dtype_of_json(ds_json: Mapping[str, Any]) -> DtypeName:
    """What a DeepSpeed JSON computes in."""
    dtype = model_dtype(ds_json)
    return next(name for name, torch_dtype in _TORCH_DTYPES.items() if torch_dtype == dtype)  # type: ignore[misc]
