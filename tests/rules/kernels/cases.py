"""Shards and the functions of the rules that have kernels: what is compared, and what is compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lomo_ds.rules import adalomo, apollo_mini, clipping, lomo, matrices, momentum8, scale, sink_gd, vectors
from lomo_ds.rules.param_spec import ParamSpec, Role, role_of
from lomo_ds.rules.rounding import WriteBack, error_state
from lomo_ds.rules.rule import Shard, StepSettings
from lomo_ds.zo.moves import Move, add_, combination, part_
from lomo_ds.zo.noise import BLOCK, Normal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDINGS = ("nearest", "stochastic", "kahan", "compensated8")
CELLS = [("fp32", "nearest"), *itertools.product(("bf16", "fp16"), ROUNDINGS)]
"""Weights in fp32 are written as they are, whichever way of rounding is asked for."""
SETTINGS = StepSettings(lr=0.013, weight_decay=0.1, grad_scale=0.37, clip_value=1.5, step=3)
KEY = (11, 4, 3)

MATRIX, VECTOR = ((13, 37), 2, 1), ((3300,), 3, 1)
"""Shape, ranks and rank: a shard that begins and ends inside a row, and one of two programs' elements."""
SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    MATRIX,
    ((13, 37), 1, 0),
    ((1, 9), 2, 1),
    ((300, 5), 2, 1),
    ((3, 5, 7), 2, 1),
    ((3, 3, 300), 4, 1),
    ((3, 1), 4, 3),
    ((20, 300), 1, 0),
]
"""Narrow and wide, a shard with parts of two matrices, one of padding alone, and blocks of columns."""


def numbers(numel: int, seed: int, hard: bool = False) -> Tensor:
    """fp32; every ninth a number that is easily got wrong."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    if hard:
        special = [
            0.0,
            -0.0,
            1e-40,
            -3e-39,
            6e-8,
            7e4,
            -3.4e38,
            1e-30,
            float("inf"),
            -float("inf"),
            float("nan"),
        ]
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
        kept = numbers(numel, 3) * (40 if error.dtype == torch.int8 else 1e-3)
        error.copy_(kept.clamp(-127, 127))
    written = None if is_written is None else torch.tensor(is_written)
    write_back = WriteBack(rounding=rounding, key=KEY, start=spec.start, error=error, is_written=written)
    return Shard(param=param, grad=grad, spec=spec, write_back=write_back)


Call = tuple[Callable[..., Any], Shard, tuple[Any, ...]]
"""A ``fused`` function, its shard, and its other arguments."""


def steps_by_elements(shard: Shard) -> dict[str, Call]:
    """Those that know nothing of rows and columns."""
    numel = shard.param.numel()
    moments = {"exp_avg": numbers(numel, 5) * 0.1, "exp_avg_sq": numbers(numel, 6).square() * 0.1}
    master = {"param": shard.param.float() + numbers(numel, 7) * 1e-3}
    variance = {"variance": numbers(numel, 6).square() + 0.1}
    adam = (SETTINGS, (0.9, 0.95), 1e-8)
    return {
        "gradient": (lomo.step_by_gradient_, shard, (SETTINGS,)),
        "sign": (vectors.step_by_sign_, shard, (SETTINGS,)),
        "adam": (vectors.step_by_adam_, replace(shard, state=moments), adam),
        "master": (vectors.step_by_adam_, replace(shard, state=moments | master), adam),
        "variance": (adalomo.learn_variance_, replace(shard, state=variance), (SETTINGS, 1e-30, 0.6)),
        "by variance": (
            adalomo.step_by_second_moments_,
            replace(shard, state=variance),
            (SETTINGS, torch.tensor(0.03)),
        ),
    }


def steps_by_tiles(shard: Shard) -> dict[str, Call]:
    """Those of a shard of matrices, each with every argument that it may have."""
    at = matrices.Matrices(shard)
    row, column = numbers(at.num_local_rows, 8), numbers(at.num_matrices * at.num_columns, 9)
    column = column.view(at.num_matrices, at.num_columns)
    by_moments = with_second_moments(shard)
    by_momentum = with_momentum(shard)
    exponent = torch.arange(at.num_matrices * at.num_rows).mul(3).sub(50).to(torch.int8)
    all_rows = numbers(exponent.numel(), 5)
    along = momentum8.step_along_momentum_
    return {
        "rows": (matrices.step_by_factors_, shard, (SETTINGS, row)),
        "columns": (matrices.step_by_factors_, shard, (SETTINGS, None, column)),
        "rows and columns": (matrices.step_by_factors_, shard, (SETTINGS, row, column, 0.7)),
        "second moments": (adalomo.step_by_second_moments_, by_moments, (SETTINGS, torch.tensor(0.03))),
        "momentum by row": (along, by_momentum, (SETTINGS, 0.9, 0.02, exponent, all_rows)),
        "momentum by column": (along, by_momentum, (SETTINGS, 0.3, 0.02, exponent, None, column)),
    }


def with_second_moments(shard: Shard) -> Shard:
    at = matrices.Matrices(shard)
    row, column = numbers(at.num_matrices * at.num_rows, 3), numbers(at.num_matrices * at.num_columns, 4)
    return replace(shard, state={"row": row.square() + 0.1, "column": column.square() + 0.1})


def with_momentum(shard: Shard) -> Shard:
    """Every code of an 8-bit float, NaN included."""
    at = matrices.Matrices(shard)
    exponent = torch.arange(at.num_matrices * at.num_rows).mul(5).sub(60).to(torch.int8)
    kept = torch.arange(shard.param.numel()).mul(37).to(torch.int8)
    return replace(shard, state={"momentum": kept, "exponent": exponent})


def without_nan(shard: Shard) -> Shard:
    kept = shard.state["momentum"]
    return replace(
        shard, state=shard.state | {"momentum": torch.where(kept.bitwise_and(0x7F) == 0x7F, 1, kept)}
    )


def on_tensors(hard: bool) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions of tensors alone, with their arguments; the first is updated, or the result counts."""
    means, totals = numbers(1500, 12).square(), numbers(1500, 13, hard).square() * 40
    sums = [(0.3, 90.0), (90.0, 0.3), (0.0, 0.0), (float("inf"), 1.0), (1.0, float("nan"))]
    cases = {"means": (adalomo.learn_mean_, (means, totals, 40, 1e-30, 0.4))}
    for one, other in sums:
        numbers_of = (torch.tensor([one]), torch.tensor([other]), 37, 0.02, 1e-3, 0.9)
        cases[f"step size of {one} and {other}"] = (adalomo.bounded_step_size, numbers_of)
    return cases


def sums(shard: Shard) -> dict[str, Call]:
    """Those whose results are sums of squares over a shard of matrices."""
    at = matrices.Matrices(shard)
    column = numbers(at.num_matrices * at.num_columns, 9).view(at.num_matrices, at.num_columns)
    cut_rows = {row: torch.tensor(2.0 + row) for row in at.cut_rows()}
    by_momentum = without_nan(with_momentum(shard))
    numel = shard.param.numel()
    by_variance = replace(shard, state={"variance": numbers(numel, 6).square() + 0.1})
    return {
        "all": (clipping.sum_of_squares, shard, ()),
        "rows and columns": (adalomo.sums_to_learn_from, with_second_moments(shard), (SETTINGS,)),
        "updates": (adalomo.sum_of_update_squares, with_second_moments(shard), (SETTINGS,)),
        "updates by variance": (adalomo.sum_of_update_squares, by_variance, (SETTINGS,)),
        "columns": (matrices.squares_by_column, shard, (SETTINGS,)),
        "sweep": (sink_gd.rows_then_columns, shard, (SETTINGS, None, cut_rows)),
        "second sweep": (sink_gd.rows_then_columns, shard, (SETTINGS, column, cut_rows)),
        "momentum by row": (momentum8.momentum_squares, by_momentum, (SETTINGS, 0.9, False)),
        "momentum by column": (momentum8.momentum_squares, by_momentum, (SETTINGS, 0.3, True)),
        "projection": (apollo_mini.projected, shard, (SETTINGS, KEY)),
        "normalised rows": (scale.step_by_rows_, shard, (SETTINGS, cut_rows)),
    }


def moves(dtype: str, hard: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """Zeroth order: values of two blocks moved along directions; what is written."""
    normal, numel, start = Normal(), 3300, 5 * BLOCK - 1001
    values, other = (numbers(numel, seed, hard).to(DTYPES[dtype]) for seed in (14, 15))

    def move(*factors: float) -> Move:
        keys = ((3, 7, sample, 11) for sample in range(len(factors)))
        return Move(terms=list(zip(keys, factors, strict=True)), normal=normal)

    def two_points(of_other: Move, own: Move) -> list[Tensor]:
        part_(one := values.clone(), two := other.clone(), of_other, own, start)
        return [one, two]

    return {
        "one point": lambda: [add_(values.clone(), move(0.3), start)],
        "by two directions": lambda: [add_(values.clone(), move(0.3, -0.7), start)],
        "two points": lambda: two_points(move(1e-3), move(-1e-3)),
        "two points by two directions": lambda: two_points(move(0.2), move(0.1, 0.7)),
        "weights and a point": lambda: two_points(move(), move(0.2)),
        "sum": lambda: [combination(values, move(0.3, 0.4), start, torch.empty(numel))],
    }
