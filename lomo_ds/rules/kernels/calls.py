"""What calls of operations have in common: a shard and settings as arguments, sums, factored steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lomo_ds.rules.kernels import operations  # noqa: F401  (defines torch.ops.lomo_ds)
from lomo_ds.rules.kernels.grids import Tiles
from lomo_ds.rules.noise import seeds_of
from lomo_ds.rules.rule import Shard, StepSettings

OPERATIONS: Any = torch.ops.lomo_ds


@dataclass(frozen=True, kw_only=True)
class Factors:
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
class Momentum:
    """The kept momentum, the size of its 8-bit numbers in each local row, and the new gradient's weight."""

    kept: Tensor
    size: Tensor
    weight: float


def weights_of(shard: Shard) -> list[Any]:
    write_back = shard.write_back
    noise_and_start = [*seeds_of(write_back.key), write_back.start]
    return [shard.param, write_back.error, write_back.is_written, write_back.rounding, noise_and_start]


def grad_of(shard: Shard, settings: StepSettings) -> list[Any]:
    scale, clip_value = settings.grad_scale, settings.clip_value
    bound = math.inf if clip_value is None else clip_value
    if isinstance(scale, Tensor):
        return [shard.grad, scale, 1.0, bound]
    return [shard.grad, None, scale, bound]


def decay_of(settings: StepSettings) -> float:
    return 1.0 - settings.lr * settings.weight_decay


def partial_sums(
    shard: Shard,
    settings: StepSettings,
    tiles: Tiles,
    factors: Factors,
    wanted: str,
    momentum: Momentum | None = None,
    squared: bool = True,
) -> list[Tensor]:
    """Sums over the shard's part of each row and column, in parts that remain to be added up.

    Args:
        wanted: "rows", "columns" or "rows and columns".

    Returns:
        Of those the first with shape (num_local_rows, parts), the second (num_local_matrices, parts,
        num_columns).
    """
    new = {"dtype": torch.float32, "device": shard.param.device}
    num_columns = shard.spec.shape[-1] if len(shard.spec.shape) > 1 else tiles.numbers[4]
    by_row = torch.empty(tiles.num_local_rows, tiles.num_blocks, **new) if "rows" in wanted else None
    shape = (tiles.num_local_matrices, tiles.num_groups, num_columns)
    by_column = torch.empty(shape, **new) if "columns" in wanted else None
    old = [None, None, 0.0] if momentum is None else [momentum.kept, momentum.size, momentum.weight]
    OPERATIONS.tile_sums(
        *grad_of(shard, settings), *factors.arguments, *old, squared, by_row, by_column, tiles.numbers
    )
    return [partials for partials in (by_row, by_column) if partials is not None]


def sums_over(*args: Any, **more: Any) -> list[Tensor]:
    """``partial_sums``, added up: shapes (num_local_rows,) and (num_local_matrices, num_columns)."""
    return [partials.sum(1) for partials in partial_sums(*args, **more)]


def whole_of(part: Tensor, first: int, length: int) -> Tensor:
    """A vector or a matrix of ``length`` rows, zeros but for ``part``."""
    if part.shape[0] == length:
        return part
    whole = part.new_zeros(length, *part.shape[1:])
    whole[first : first + part.shape[0]] = part
    return whole


def local_rows(tiles: Tiles, by_row: Tensor) -> Tensor:
    """Of a number for each row of the parameter, those of the shard."""
    return by_row[tiles.first_local_row : tiles.first_local_row + tiles.num_local_rows]


def local_matrices(tiles: Tiles, by_matrix: Tensor) -> Tensor:
    """Of something for each matrix, that for those that the shard has parts of."""
    return by_matrix[tiles.first_matrix : tiles.first_matrix + tiles.num_local_matrices]


def factored_step(
    shard: Shard,
    settings: StepSettings,
    tiles: Tiles,
    factors: Factors,
    step: float,
    step_size: Tensor | None = None,
) -> None:
    OPERATIONS.factored_step(
        *weights_of(shard),
        *grad_of(shard, settings),
        *factors.arguments,
        step_size,
        step,
        decay_of(settings),
        tiles.numbers,
    )
