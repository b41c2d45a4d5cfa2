"""Kernels called with a shard: for each ``fused`` function of the rules the one that runs in its place.

Arguments and results are those of the function of the same name, which documents them. Elements are the same
to the bit, given the same sums; sums differ by the order in which they are added up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lomo_ds.rules.apollo_mini import projection
from lomo_ds.rules.kernels.calls import (
    OPERATIONS,
    Factors,
    Momentum,
    decay_of,
    factored_step,
    grad_of,
    local_matrices,
    local_rows,
    partial_sums,
    sums_over,
    weights_of,
    whole_of,
)
from lomo_ds.rules.kernels.grids import Tiles, over_elements, over_spans, tiles_of, tiles_of_vector
from lomo_ds.rules.matrices import Matrices, inverse_rms
from lomo_ds.rules.momentum8 import noise_key, power_of_two
from lomo_ds.rules.noise import seeds_of
from lomo_ds.rules.rule import MASTER_WEIGHTS, Shard, StepSettings


def sum_of_squares(shard: Tensor) -> Tensor:
    return _partial_squares(shard).sum(dtype=torch.float64)


def _partial_squares(values: Tensor) -> Tensor:
    grid = over_spans(values.numel())
    partials = torch.empty(grid[-1], dtype=torch.float32, device=values.device)
    OPERATIONS.squares(values, partials, grid)
    return partials


# Steps by elements --------------------------------------------------------------------------------


def step_by_gradient_(shard: Shard, settings: StepSettings) -> None:
    grid = over_elements(shard.param.numel())
    numbers = [settings.lr, settings.weight_decay]
    OPERATIONS.gradient_step(*weights_of(shard), *grad_of(shard, settings), *numbers, grid)


def step_by_sign_(shard: Shard, settings: StepSettings) -> None:
    grid = over_elements(shard.param.numel())
    numbers = [settings.lr, decay_of(settings)]
    OPERATIONS.sign_step(*weights_of(shard), *grad_of(shard, settings), *numbers, grid)


def step_by_adam_(shard: Shard, settings: StepSettings, betas: tuple[float, float], eps: float) -> None:
    first, second = betas
    root_correction = math.sqrt(1 - second**settings.step)
    step_size = settings.lr / (1 - first**settings.step)
    numbers = [1 - first, second, 1 - second, root_correction, eps, step_size, decay_of(settings)]
    state = [shard.state[name] for name in ("exp_avg", "exp_avg_sq")]
    OPERATIONS.adam_step(
        *weights_of(shard),
        *grad_of(shard, settings),
        *state,
        shard.state.get(MASTER_WEIGHTS),
        numbers,
        over_elements(shard.param.numel()),
    )


# AdaLomo ------------------------------------------------------------------------------------------


def learn_variance_(shard: Shard, settings: StepSettings, eps: float, weight: float) -> None:
    grid = over_elements(shard.param.numel())
    OPERATIONS.learn_variance(*grad_of(shard, settings), shard.state["variance"], eps, weight, grid)


def learn_mean_(state: Tensor, sums: Tensor, num: int, eps: float, weight: float) -> None:
    OPERATIONS.learn_mean(state, sums, float(num), eps, weight, over_elements(state.numel()))


def bounded_step_size(
    param_sq: Tensor, update_sq: Tensor, numel: int, lr: float, least_rms: float, clip_threshold: float
) -> Tensor:
    size = torch.empty_like(update_sq)
    numbers = [float(numel), lr, least_rms, clip_threshold]
    OPERATIONS.step_size(param_sq, update_sq, numbers, size, [1, 1])
    return size


def sums_to_learn_from(shard: Shard, settings: StepSettings) -> Tensor:
    tiles = tiles_of(shard.spec, for_sums=True)
    num_rows, num_columns = (shard.state[name].numel() for name in ("row", "column"))
    whole = torch.zeros(num_rows + num_columns + 1, dtype=torch.float32, device=shard.param.device)
    row, column, param_sq = whole.split([num_rows, num_columns, 1])
    by_row, by_column = partial_sums(shard, settings, tiles, Factors(), "rows and columns")
    torch.sum(by_row, 1, out=local_rows(tiles, row))
    torch.sum(by_column, 1, out=local_matrices(tiles, column.view(-1, shard.spec.shape[-1])))
    torch.sum(_partial_squares(shard.param), 0, out=param_sq[0])
    return whole


def _second_moments(shard: Shard, for_sums: bool) -> tuple[Tiles, Factors]:
    if "variance" in shard.state:
        factors = Factors(variance=shard.state["variance"], are_second_moments=True)
        return tiles_of_vector(shard.param.numel()), factors
    tiles = tiles_of(shard.spec, for_sums)
    num_rows, num_columns = shard.spec.shape[-2:]
    row, column = shard.state["row"], shard.state["column"].view(-1, num_columns)
    factors = Factors(
        row=local_rows(tiles, row),
        row_mean=local_matrices(tiles, row.view(-1, num_rows).mean(-1)),
        column=local_matrices(tiles, column),
        are_second_moments=True,
    )
    return tiles, factors


def sum_of_update_squares(shard: Shard, settings: StepSettings) -> Tensor:
    tiles, factors = _second_moments(shard, for_sums=True)
    (by_row,) = partial_sums(shard, settings, tiles, factors, "rows")
    return by_row.sum()


def step_by_second_moments_(shard: Shard, settings: StepSettings, step_size: Tensor) -> None:
    tiles, factors = _second_moments(shard, for_sums=False)
    factored_step(shard, settings, tiles, factors, 1.0, step_size)


# Rows and columns of equal size -------------------------------------------------------------------


def step_by_factors_(
    shard: Shard,
    settings: StepSettings,
    row: Tensor | None = None,
    column: Tensor | None = None,
    step: float = 1.0,
) -> None:
    tiles = tiles_of(shard.spec, for_sums=False)
    column = None if column is None else local_matrices(tiles, column)
    factored_step(shard, settings, tiles, Factors(row=row, column=column, row_first=False), step)


def squares_by_column(shard: Shard, settings: StepSettings) -> Tensor:
    tiles = tiles_of(shard.spec, for_sums=True)
    (sums,) = sums_over(shard, settings, tiles, Factors(), "columns")
    return whole_of(sums, tiles.first_matrix, math.prod(shard.spec.shape[:-2]))


def _inverse_rms_of_rows(
    shard: Shard, settings: StepSettings, column: Tensor | None, cut_rows: dict[int, Tensor]
) -> Tensor:
    tiles = tiles_of(shard.spec, for_sums=True)
    factors = Factors(column=None if column is None else local_matrices(tiles, column))
    (sums,) = sums_over(shard, settings, tiles, factors, "rows")
    for row, total in cut_rows.items():
        if 0 <= row - tiles.first_local_row < tiles.num_local_rows:
            sums[row - tiles.first_local_row] = total
    return inverse_rms(sums, shard.spec.shape[-1])


def step_by_rows_(shard: Shard, settings: StepSettings, cut_rows: dict[int, Tensor]) -> None:
    factor = _inverse_rms_of_rows(shard, settings, None, cut_rows)
    step_by_factors_(shard, settings, row=factor * settings.lr)


def rows_then_columns(
    shard: Shard, settings: StepSettings, column: Tensor | None, cut_rows: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    row = _inverse_rms_of_rows(shard, settings, column, cut_rows)
    tiles = tiles_of(shard.spec, for_sums=True)
    of_columns = None if column is None else local_matrices(tiles, column)
    factors = Factors(row=row, column=of_columns, row_first=False)
    (sums,) = sums_over(shard, settings, tiles, factors, "columns")
    return row, whole_of(sums, tiles.first_matrix, math.prod(shard.spec.shape[:-2]))


# Projections and momentum -------------------------------------------------------------------------


def projected(shard: Shard, settings: StepSettings, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    tiles, matrices = tiles_of(shard.spec, for_sums=True), Matrices(shard)
    (row_sq,) = sums_over(shard, settings, tiles, Factors(), "rows")
    by_row, by_column = projection(shard, key)
    if by_column is None:
        (sums,) = sums_over(shard, settings, tiles, Factors(row=by_row), "columns", squared=False)
        whole = whole_of(sums, tiles.first_matrix, matrices.num_matrices)
    else:
        factors = Factors(column=local_matrices(tiles, by_column))
        (sums,) = sums_over(shard, settings, tiles, factors, "rows", squared=False)
        num_rows = matrices.num_matrices * matrices.num_rows
        whole = whole_of(sums, tiles.first_local_row, num_rows).view(matrices.num_matrices, -1)
    squares = matrices.zeros(matrices.num_matrices)
    return whole, squares.index_add_(0, matrices.matrix_of_local_rows(), row_sq)


def _momentum(shard: Shard, tiles: Tiles, momentum: float) -> Momentum:
    size = power_of_two(local_rows(tiles, shard.state["exponent"]))
    return Momentum(kept=shard.state["momentum"], size=size, weight=1 - momentum)


def momentum_squares(
    shard: Shard, settings: StepSettings, momentum: float, by_column: bool
) -> tuple[Tensor, Tensor]:
    tiles = tiles_of(shard.spec, for_sums=True)
    wanted = "rows and columns" if by_column else "rows"
    row, *column = sums_over(shard, settings, tiles, Factors(), wanted, _momentum(shard, tiles, momentum))
    row = whole_of(row, tiles.first_local_row, shard.state["exponent"].numel())
    if not column:
        return row, row.new_zeros(0)
    return row, whole_of(column[0], tiles.first_matrix, math.prod(shard.spec.shape[:-2]))


def step_along_momentum_(
    shard: Shard,
    settings: StepSettings,
    momentum: float,
    step: float,
    exponent: Tensor,
    row: Tensor | None = None,
    column: Tensor | None = None,
) -> None:
    tiles = tiles_of(shard.spec, for_sums=False)
    old = _momentum(shard, tiles, momentum)
    OPERATIONS.momentum_step(
        *weights_of(shard),
        *grad_of(shard, settings),
        old.kept,
        old.size,
        old.weight,
        power_of_two(local_rows(tiles, exponent)),
        [*seeds_of(noise_key(shard))],
        None if row is None else local_rows(tiles, row),
        None if column is None else local_matrices(tiles, column),
        step,
        decay_of(settings),
        tiles.numbers,
    )
