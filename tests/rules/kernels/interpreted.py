"""Kernels by Triton's interpreter, on a CPU, next to the functions of torch in whose place they run.

A program, in a process of its own, because Triton asks for ``TRITON_INTERPRET`` as it is imported. It prints
a JSON object, case -> what is wrong, "" for nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lomo_ds.rules import apollo_mini, matrices
from lomo_ds.rules.kernels import dispatch, operations
from lomo_ds.rules.rule import Shard
from lomo_ds.zo.moves import Move
from tests.reference.sgd import FP32_UNIT
from tests.rules.kernels import cases
from tests.rules.kernels.cases import Call


def torch_version(function: Callable[..., Any]) -> Callable[..., Any]:
    """A ``fused`` function's own code."""
    return function.__wrapped__  # type: ignore[attr-defined]


def copy_of(shard: Shard) -> Shard:
    error = shard.write_back.error
    return replace(
        shard,
        param=shard.param.clone(),
        state={name: tensor.clone() for name, tensor in shard.state.items()},
        write_back=replace(shard.write_back, error=None if error is None else error.clone()),
    )


def written(shard: Shard) -> dict[str, Tensor]:
    """Everything that a step may write."""
    error = shard.write_back.error
    return {"param": shard.param, **shard.state} | ({} if error is None else {"error": error})


def bits_differ(name: str, expected: Tensor, found: Tensor) -> str:
    """Nothing where both have the same bits, or are both NaN."""
    assert expected.dtype == found.dtype and expected.shape == found.shape, name
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    same = expected.contiguous().view(ints) == found.contiguous().view(ints)
    if expected.dtype.is_floating_point:
        same |= expected.isnan() & found.isnan()
    if same.all():
        return ""
    at = (~same).flatten().nonzero()[:3, 0].tolist()
    pairs = [(expected.flatten()[one].item(), found.flatten()[one].item()) for one in at]
    return f"{name}: {int((~same).sum())} of {same.numel()} differ, at {at}: {pairs}"


def step_differs(call: Call) -> str:
    """A step by torch and by the kernel write the same bits; where it may, the kernel writes something."""
    function, shard, args = call
    expected, found = copy_of(shard), copy_of(shard)
    torch_version(function)(expected, *args)
    function(found, *args)
    pairs = {name: (tensor, written(found)[name]) for name, tensor in written(expected).items()}
    problems = [bits_differ(name, *pair) for name, pair in pairs.items()]
    may_write = shard.write_back.is_written is None or bool(shard.write_back.is_written)
    before = written(shard)
    moved = any(bits_differ(name, before[name], now) for name, now in written(found).items())
    if may_write and shard.param.numel() > 100 and not moved:
        problems.append("nothing has moved")
    return "; ".join(filter(None, problems))


def sums_differ(expected: Tensor, found: Tensor, absolute: Tensor, num_terms: int) -> str:
    """Sums of the same terms in two orders, where ``absolute`` is the sum of the terms' sizes.

    A term is the same to 16 units of 2^-24: up to eight roundings in each of both. Each addition errs by
    a unit of what has been added up so far, in both.
    """
    assert expected.shape == found.shape, f"shapes {tuple(expected.shape)} and {tuple(found.shape)}"
    finite = expected.isfinite()
    problem = bits_differ("not finite", expected[~finite].float(), found[~finite].float())
    bound = (2 * num_terms + 16) * FP32_UNIT * absolute.double()[finite]
    off = (expected.double() - found.double())[finite].abs()
    if not (off <= bound).all():
        problem += f" {float((off / bound.clamp(min=1e-300)).max()):.1f} times the bound"
    return problem


def size_of_projection(shard: Shard, settings: Any, key: tuple[int, ...]) -> list[Tensor]:
    """Sums of the sizes of R's terms, and of squares, in fp64; what is not of the shard counts as 0."""
    at = matrices.Matrices(shard)
    whole = torch.zeros(shard.spec.numel, dtype=torch.float64)
    whole[shard.spec.start : shard.spec.stop] = shard.scaled_grad(slice(None), settings).double()
    whole = whole.view(at.num_matrices, at.num_rows, at.num_columns)
    by_row, by_column = apollo_mini.projection(shard, key)
    if by_column is not None:
        sizes = (whole * by_column[:, None]).abs().sum(2)
    else:
        rows = torch.zeros(at.num_matrices * at.num_rows, dtype=torch.float64)
        rows[at.first_row : at.first_row + at.num_local_rows] = by_row.double()
        sizes = (whole * rows.view(at.num_matrices, -1, 1)).abs().sum(1)
    return [sizes, whole.square().sum((1, 2))]


def sum_differs(name: str, call: Call) -> str:
    """Sums by torch and by kernels agree to what the order of additions allows."""
    function, shard, args = call
    first = shard.param if name == "all" else shard
    if name == "normalised rows":
        return step_by_sums_differs(call)
    expected, found = torch_version(function)(first, *args), function(first, *args)
    expected, found = ([one] if isinstance(one, Tensor) else list(one) for one in (expected, found))
    sizes = size_of_projection(shard, *args) if name == "projection" else expected
    triples = zip(expected, found, sizes, strict=True)
    return "; ".join(filter(None, (sums_differ(*one, shard.param.numel()) for one in triples)))


def step_by_sums_differs(call: Call) -> str:
    """fp32 weights after a step by a factor that differs by half as much as the sum of its row."""
    function, shard, args = call
    expected, found = copy_of(shard), copy_of(shard)
    torch_version(function)(expected, *args)
    function(found, *args)
    if not shard.param.numel():
        return ""
    before = shard.param * (1 - args[0].lr * args[0].weight_decay)
    finite = expected.param.isfinite()
    update = (expected.param - before).abs()
    unit = FP32_UNIT * (shard.spec.shape[-1] + 12)
    bound = unit * update + 2 * FP32_UNIT * (before.abs() + expected.param.abs())
    off = (expected.param - found.param).abs()
    if not (off <= bound)[finite].all() or not torch.equal(finite, found.param.isfinite()):
        return "weights differ by more than the sums allow"
    return ""


def result_differs(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """A function of tensors: the first argument afterwards, or what is returned, to the bit."""
    expected, found = ([arg.clone() if isinstance(arg, Tensor) else arg for arg in args] for _ in range(2))
    results = torch_version(function)(*expected), function(*found)
    pair = (expected[0], found[0]) if results[0] is None else results
    return bits_differ("result", *pair)


def move_differs(run: Callable[[], list[Tensor]]) -> str:
    """What torch and kernels write, to the bit."""
    found, by_kernel = run(), Move.is_by_kernel
    Move.is_by_kernel = lambda move, values: False  # type: ignore[method-assign]
    expected = run()
    Move.is_by_kernel = by_kernel  # type: ignore[method-assign]
    return "; ".join(
        filter(None, (bits_differ("values", *pair) for pair in zip(expected, found, strict=True)))
    )


def all_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """Name -> what compares."""
    for (dtype, rounding), is_written in itertools.product(cases.CELLS, (None, True, False)):
        hard = is_written is not False
        shard = cases.shard_of(cases.VECTOR, dtype, rounding, hard, 1 if hard else 7, is_written)
        for name, call in cases.steps_by_elements(shard).items():
            yield f"{name}, {dtype} {rounding}, {is_written=}", partial(step_differs, call)
    for dtype, rounding in cases.CELLS:
        shard = cases.shard_of(cases.MATRIX, dtype, rounding, hard=True, offset=1)
        for name, call in cases.steps_by_tiles(shard).items():
            yield f"{name}, {dtype} {rounding}", partial(step_differs, call)
    for hard in (False, True):
        for name, call in cases.on_tensors(hard).items():
            yield f"{name}, {hard=}", partial(result_differs, *call)
    for dtype, hard in itertools.product(cases.DTYPES, (False, True)):
        for name, run in cases.moves(dtype, hard).items():
            yield f"moves: {name}, {dtype}, {hard=}", partial(move_differs, run)
    for shape in cases.SHAPES:
        for name, call in cases.steps_by_tiles(cases.shard_of(shape, "bf16", "stochastic")).items():
            yield f"{name}, {shape}", partial(step_differs, call)
        for hard in (False, True):
            shard = cases.shard_of(shape, "fp32", "nearest", hard, offset=2)
            for name, call in cases.sums(shard).items():
                if name != "projection" or not hard:  # which may overflow in one order alone
                    yield f"sums: {name}, {shape}, {hard=}", partial(sum_differs, name, call)


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of numbers that are not finite
    operations.implement("CPU")
    dispatch.has_kernels = lambda device_type: True  # type: ignore[assignment]
    root = torch.Tensor.sqrt
    torch.Tensor.sqrt = lambda values: root(values.double()).to(values.dtype)  # torch's own may be a unit off
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    results = {}
    for name, case in all_cases():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
