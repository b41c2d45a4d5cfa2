"""Kernels by Triton's interpreter, on a CPU, next to the functions of torch that they stand for.

Run as a program, in a process of its own, because Triton asks for ``TRITON_INTERPRET`` as it is imported:
prints a JSON object, case -> what is wrong, "" for nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lomo_ds.rules import adalomo, apollo_mini, clipping, lomo, matrices, momentum8, scale, sink_gd, vectors
from lomo_ds.rules.kernels import dispatch, operations
from lomo_ds.rules.param_spec import ParamSpec, Role, role_of
from lomo_ds.rules.rounding import WriteBack, error_state
from lomo_ds.rules.rule import Shard, StepSettings
from tests.reference.sgd import FP32_UNIT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDINGS = ("nearest", "stochastic", "kahan", "compensated8")
CELLS = [("fp32", "nearest"), *itertools.product(("bf16", "fp16"), ROUNDINGS)]
"""Weights in fp32 are written as they are, whichever way of rounding is asked for."""
SETTINGS = StepSettings(lr=0.013, weight_decay=0.1, grad_scale=0.37, clip_value=1.5, step=3)
KEY = (11, 4, 3)

MATRIX, VECTOR = ((13, 37), 2, 1), ((2500,), 3, 1)
"""Shape, ranks and rank: a shard that begins and ends inside a row, and one of two programs' elements."""
SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    MATRIX,
    ((13, 37), 1, 0),
    ((1, 9), 2, 1),
    ((300, 5), 2, 1),
    ((3, 5, 7), 2, 1),
    ((5, 4, 300), 3, 1),
    ((3,), 4, 3),
    ((40, 600), 1, 0),
]
"""Narrow and wide, a shard with parts of two matrices, one of padding alone, and several blocks of columns."""


def numbers(numel: int, seed: int, hard: bool) -> Tensor:
    """fp32; every ninth a number that is easily got wrong."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    if hard:
        special = [0.0, -0.0, 1e-40, -3e-39, 6e-8, 7e4, -3.4e38, 1e-30, float("inf"), -float("inf"), float("nan")]
        at = torch.arange(0, numel, 9)
        values[at] = torch.tensor(special)[torch.randint(len(special), (at.numel(),), generator=generator)]
    return values


def shard_of(
    case: tuple[tuple[int, ...], int, int], dtype: str = "bf16", rounding: str = "nearest",
    hard: bool = False, offset: int = 0, is_written: bool | None = None, role: Role | None = None,
) -> Shard:  # fmt: skip
    """A shard of a parameter, with gradient and rounding error; ``offset`` elements into their storages."""
    shape, world_size, rank = case
    spec = ParamSpec(shape=shape, rank=rank, world_size=world_size, role=role or role_of(shape))
    numel = spec.shard_numel
    param = numbers(numel + offset, 1, hard).to(DTYPES[dtype])[offset:]
    grad = (numbers(numel + offset, 2, hard) * 2).to(DTYPES[dtype])[offset:]
    error = error_state(rounding, param)
    if error is not None:
        kept = numbers(numel, 3, False) * (40 if error.dtype == torch.int8 else 1e-3)
        error.copy_(kept.clamp(-127, 127))
    written = None if is_written is None else torch.tensor(is_written)
    write_back = WriteBack(rounding=rounding, key=KEY, start=spec.start, error=error, is_written=written)
    return Shard(param=param, grad=grad, spec=spec, write_back=write_back)


def copy_of(shard: Shard) -> Shard:
    error = shard.write_back.error
    return replace(
        shard,
        param=shard.param.clone(),
        state={name: tensor.clone() for name, tensor in shard.state.items()},
        write_back=replace(shard.write_back, error=None if error is None else error.clone()),
    )


def torch_version(function: Callable[..., Any]) -> Callable[..., Any]:
    """A ``fused`` function's own code."""
    return function.__wrapped__  # type: ignore[attr-defined]


def bits_differ(name: str, expected: Tensor, found: Tensor) -> str:
    """"" where both have the same bits, or are both NaN."""
    assert expected.dtype == found.dtype and expected.shape == found.shape, name
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    same = expected.contiguous().view(ints) == found.contiguous().view(ints)
    if expected.dtype.is_floating_point:
        same |= expected.isnan() & found.isnan()
    if same.all():
        return ""
    at = (~same).flatten().nonzero()[:3, 0].tolist()
    pairs = [(expected.flatten()[one].item(), found.flatten()[one].item()) for one in at]
    return f"{name}: {int((~same).sum())} of {same.numel()} differ, at {at}: {pairs}"


def step_differs(function: Callable[..., Any], shard: Shard, *args: Any) -> str:
    """One step by torch and by the kernel: weights, error and state to the bit, and something has moved."""
    expected, found = copy_of(shard), copy_of(shard)
    torch_version(function)(expected, *args)
    function(found, *args)
    pairs = {"param": (expected.param, found.param)}
    pairs |= {name: (expected.state[name], found.state[name]) for name in shard.state}
    if shard.write_back.error is not None:
        pairs["error"] = (expected.write_back.error, found.write_back.error)
    problems = [bits_differ(name, *pair) for name, pair in pairs.items()]
    is_written = shard.write_back.is_written is None or bool(shard.write_back.is_written)
    if shard.param.numel() and not torch.equal(found.param.isnan(), shard.param.isnan()) and not is_written:
        problems.append("written though it must not be")
    if is_written and shard.param.numel() and bits_differ("", shard.param, found.param) == "":
        problems.append("nothing has moved")
    return "; ".join(filter(None, problems))


def sums_differ(name: str, expected: Tensor, found: Tensor, absolute: Tensor, num_terms: int) -> str:
    """Sums of ``num_terms`` products of fp32 numbers in another order: each term errs by 8 units at most (three
    factors that are rounded, one a root and a quotient; square; product), each addition by one.
    """
    assert expected.shape == found.shape, f"{name}: {expected.shape} and {found.shape}"
    bound = 2 * (num_terms + 8) * FP32_UNIT * absolute
    off = (expected.double() - found.double()).abs()
    if (off <= bound).all():
        return ""
    return f"{name}: {float((off / bound.clamp(min=1e-300)).max()):.1f} times the bound"


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    operations.implement("CPU")
    dispatch.has_kernels = lambda device_type: True
    results = {}
    for name, case in cases():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))
