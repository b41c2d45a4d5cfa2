"""Kernels called with a shard: for each ``fused`` function of the rules the one that runs in its place.

Arguments and results are those of the function of the same name, which documents them. Elements are the same to
the bit, given the same sums; sums differ by the order in which they are added up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lomo_ds.rules.apollo_mini import projection
from lomo_ds.rules.kernels import operations  # noqa: F401  (defines torch.ops.lomo_ds)
from lomo_ds.rules.kernels.grids import Tiles, over_elements, over_spans, tiles_of, tiles_of_vector
from lomo_ds.rules.matrices import Matrices, inverse_rms
from lomo_ds.rules.momentum8 import noise_key, power_of_two
from lomo_ds.rules.noise import seeds_of
from lomo_ds.rules.rule import Shard, StepSettings

_OPERATIONS: Any = torch.ops.lomo_ds


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """What the elements of a shard are multiplied by: each part of it or None. See ``tiles.normalized``."""

    variance: Tensor | None = None
    row: Tensor | None = None
    row_mean: Tensor | None = None
    column: Tensor | None = None
    row_first: bool = True
    are_second_moments: bool = False

    @property
    def arguments(self) -> list[Any]:
        parts = [self.variance, self.row, self.row_mean, self.column]
        return [*parts, self.row_first, self.are_second_moments]


@dataclass(frozen=True, kw_only=True)
class _Momentum:
    """The kept momentum, the size of its 8-bit numbers in each local row, and the new gradient's weight."""

    kept: Tensor
    size: Tensor
    weight: float


def _weights(shard: Shard) -> list[Any]:
    write_back = shard.write_back
    noise_and_start = [*seeds_of(write_back.key), write_back.start]
    return [shard.param, write_back.error, write_back.is_written, write_back.rounding, noise_and_start]


def _grad(shard: Shard, settings: StepSettings) -> list[Any]:
    scale, clip_value = settings.grad_scale, settings.clip_value
    bound = math.inf if clip_value is None else clip_value
    if isinstance(scale, Tensor):
        return [shard.grad, scale, 1.0, bound]
    return [shard.grad, None, scale, bound]


def _decay(settings: StepSettings) -> float:
    return 1.0 - settings.lr * settings.weight_decay


# Sums ---------------------------------------------------------------------------------------------


def sum_of_squares(shard: Tensor) -> Tensor:
    grid = over_spans(shard.numel())
    partials = torch.empty(grid[-1], dtype=torch.float32, device=shard.device)
    _OPERATIONS.squares(shard, partials, grid)
    return partials.sum(dtype=torch.float64)


def _sums(
    shard: Shard,
    settings: StepSettings,
    tiles: Tiles,
    factors: _Factors,
    wanted: str,
    momentum: _Momentum | None = None,
    squared: bool = True,
) -> list[Tensor]:
    """Sums over the shard's part of each row and column.

    Args:
        wanted: "rows", "columns" or "rows and columns".

    Returns:
        Of those the first with shape (num_local_rows,), the second (num_local_matrices, num_columns).
    """
    new = {"dtype": torch.float32, "device": shard.param.device}
    num_columns = shard.spec.shape[-1] if len(shard.spec.shape) > 1 else tiles.numbers[4]
    by_row = torch.empty(tiles.num_local_rows, tiles.num_blocks, **new) if "rows" in wanted else None
    shape = (tiles.num_local_matrices, tiles.num_groups, num_columns)
    by_column = torch.empty(shape, **new) if "columns" in wanted else None
    old = [None, None, 0.0] if momentum is None else [momentum.kept, momentum.size, momentum.weight]
    _OPERATIONS.tile_sums(
        *_grad(shard, settings), *factors.arguments, *old, squared, by_row, by_column, tiles.numbers
    )
    return [partials.sum(1) for partials in (by_row, by_column) if partials is not None]


def _whole(part: Tensor, first: int, length: int) -> Tensor:
    """A vector or a matrix of ``length`` rows, zeros but for ``part``."""
    if part.shape[0] == length:
        return part
    whole = part.new_zeros(length, *part.shape[1:])
    whole[first : first + part.shape[0]] = part
    return whole


def _local(tiles: Tiles, by_row: Tensor) -> Tensor:
    """Of a number for each row of the parameter, those of the shard."""
    return by_row[tiles.first_local_row : tiles.first_local_row + tiles.num_local_rows]


def _of_matrices(tiles: Tiles, by_matrix: Tensor) -> Tensor:
    """Of something for each matrix, that for those that the shard has parts of."""
    return by_matrix[tiles.first_matrix : tiles.first_matrix + tiles.num_local_matrices]


# Steps by elements --------------------------------------------------------------------------------


def step_by_gradient_(shard: Shard, settings: StepSettings) -> None:
    grid = over_elements(shard.param.numel())
    numbers = [settings.lr, settings.weight_decay]
    _OPERATIONS.gradient_step(*_weights(shard), *_grad(shard, settings), *numbers, grid)


def step_by_sign_(shard: Shard, settings: StepSettings) -> None:
    grid = over_elements(shard.param.numel())
    numbers = [settings.lr, _decay(settings)]
    _OPERATIONS.sign_step(*_weights(shard), *_grad(shard, settings), *numbers, grid)


def step_by_adam_(shard: Shard, settings: StepSettings, betas: tuple[float, float], eps: float) -> None:
    first, second = betas
    root_correction = math.sqrt(1 - second**settings.step)
    step_size = settings.lr / (1 - first**settings.step)
    numbers = [1 - first, second, 1 - second, root_correction, eps, step_size, _decay(settings)]
    state = [shard.state[name] for name in ("exp_avg", "exp_avg_sq")]
    _OPERATIONS.adam_step(
        *_weights(shard),
        *_grad(shard, settings),
        *state,
        shard.state.get("param"),
        numbers,
        over_elements(shard.param.numel()),
    )


# AdaLomo ------------------------------------------------------------------------------------------


def learn_variance_(shard: Shard, settings: StepSettings, eps: float, weight: float) -> None:
    grid = over_elements(shard.param.numel())
    _OPERATIONS.learn_variance(*_grad(shard, settings), shard.state["variance"], eps, weight, grid)


def squares_by_row_and_column(shard: Shard, settings: StepSettings) -> tuple[Tensor, Tensor]:
    tiles = tiles_of(shard.spec, for_sums=True)
    row, column = _sums(shard, settings, tiles, _Factors(), "rows and columns")
    num_matrices = math.prod(shard.spec.shape[:-2])
    whole_row = _whole(row, tiles.first_local_row, shard.state["row"].numel())
    return whole_row, _whole(column, tiles.first_matrix, num_matrices).flatten()


def _second_moments(shard: Shard, for_sums: bool) -> tuple[Tiles, _Factors]:
    if "variance" in shard.state:
        factors = _Factors(variance=shard.state["variance"], are_second_moments=True)
        return tiles_of_vector(shard.param.numel()), factors
    tiles = tiles_of(shard.spec, for_sums)
    num_rows, num_columns = shard.spec.shape[-2:]
    row, column = shard.state["row"], shard.state["column"].view(-1, num_columns)
    factors = _Factors(
        row=_local(tiles, row),
        row_mean=_of_matrices(tiles, row.view(-1, num_rows).mean(-1)),
        column=_of_matrices(tiles, column),
        are_second_moments=True,
    )
    return tiles, factors


def sum_of_update_squares(shard: Shard, settings: StepSettings) -> Tensor:
    tiles, factors = _second_moments(shard, for_sums=True)
    (by_row,) = _sums(shard, settings, tiles, factors, "rows")
    return by_row.sum()


def step_by_second_moments_(shard: Shard, settings: StepSettings, step_size: Tensor) -> None:
    tiles, factors = _second_moments(shard, for_sums=False)
    _step(shard, settings, tiles, factors, 1.0, step_size)


def _step(
    shard: Shard,
    settings: StepSettings,
    tiles: Tiles,
    factors: _Factors,
    step: float,
    step_size: Tensor | None = None,
) -> None:
    _OPERATIONS.factored_step(
        *_weights(shard),
        *_grad(shard, settings),
        *factors.arguments,
        step_size,
        step,
        _decay(settings),
        tiles.numbers,
    )


# Rows and columns of equal size -------------------------------------------------------------------


def step_by_factors_(
    shard: Shard,
    settings: StepSettings,
    row: Tensor | None = None,
    column: Tensor | None = None,
    step: float = 1.0,
) -> None:
    tiles = tiles_of(shard.spec, for_sums=False)
    column = None if column is None else _of_matrices(tiles, column)
    _step(shard, settings, tiles, _Factors(row=row, column=column, row_first=False), step)


def squares_by_column(shard: Shard, settings: StepSettings) -> Tensor:
    tiles = tiles_of(shard.spec, for_sums=True)
    (sums,) = _sums(shard, settings, tiles, _Factors(), "columns")
    return _whole(sums, tiles.first_matrix, math.prod(shard.spec.shape[:-2]))


def _inverse_rms_of_rows(
    shard: Shard, settings: StepSettings, column: Tensor | None, cut_rows: dict[int, Tensor]
) -> Tensor:
    tiles = tiles_of(shard.spec, for_sums=True)
    factors = _Factors(column=None if column is None else _of_matrices(tiles, column))
    (sums,) = _sums(shard, settings, tiles, factors, "rows")
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
    of_columns = None if column is None else _of_matrices(tiles, column)
    factors = _Factors(row=row, column=of_columns, row_first=False)
    (sums,) = _sums(shard, settings, tiles, factors, "columns")
    return row, _whole(sums, tiles.first_matrix, math.prod(shard.spec.shape[:-2]))


# Projections and momentum -------------------------------------------------------------------------


def projected(shard: Shard, settings: StepSettings, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    tiles, matrices = tiles_of(shard.spec, for_sums=True), Matrices(shard)
    (row_sq,) = _sums(shard, settings, tiles, _Factors(), "rows")
    by_row, by_column = projection(shard, key)
    if by_column is None:
        (sums,) = _sums(shard, settings, tiles, _Factors(row=by_row), "columns", squared=False)
        whole = _whole(sums, tiles.first_matrix, matrices.num_matrices)
    else:
        factors = _Factors(column=_of_matrices(tiles, by_column))
        (sums,) = _sums(shard, settings, tiles, factors, "rows", squared=False)
        num_rows = matrices.num_matrices * matrices.num_rows
        whole = _whole(sums, tiles.first_local_row, num_rows).view(matrices.num_matrices, -1)
    squares = matrices.zeros(matrices.num_matrices)
    return whole, squares.index_add_(0, matrices.matrix_of_local_rows(), row_sq)


def _momentum(shard: Shard, tiles: Tiles, momentum: float) -> _Momentum:
    size = power_of_two(_local(tiles, shard.state["exponent"]))
    return _Momentum(kept=shard.state["momentum"], size=size, weight=1 - momentum)


def momentum_squares(
    shard: Shard, settings: StepSettings, momentum: float, by_column: bool
) -> tuple[Tensor, Tensor]:
    tiles = tiles_of(shard.spec, for_sums=True)
    wanted = "rows and columns" if by_column else "rows"
    row, *column = _sums(shard, settings, tiles, _Factors(), wanted, _momentum(shard, tiles, momentum))
    row = _whole(row, tiles.first_local_row, shard.state["exponent"].numel())
    if not column:
        return row, row.new_zeros(0)
    return row, _whole(column[0], tiles.first_matrix, math.prod(shard.spec.shape[:-2]))


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
    _OPERATIONS.momentum_step(
        *_weights(shard),
        *_grad(shard, settings),
        old.kept,
        old.size,
        old.weight,
        power_of_two(_local(tiles, exponent)),
        [*seeds_of(noise_key(shard))],
        None if row is None else _local(tiles, row),
        None if column is None else _of_matrices(tiles, column),
        step,
        _decay(settings),
        tiles.numbers,
    )
