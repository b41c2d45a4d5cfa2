"""A parameter as matrices of its last two dimensions: sums over their rows and columns, shard by shard.

A shard has whole rows, but for its first and its last, which other ranks may hold parts of. The sums of whole
rows need no other rank; those of the few cut rows, and the sums of columns, are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from math import prod

import torch
from torch import Tensor

from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.rounding import chunk_numel
from lomo_ds.rules.rule import Shard, StepSettings
from lomo_ds.shards import Block


class Matrices:
    """Where a shard's rows and columns lie.

    Args:
        shard: of a parameter of two or more dimensions.

    Attributes:
        num_rows, num_columns: of each matrix.
        num_matrices: the product of the leading dimensions.
        first_row: of the shard, whole or cut; rows are counted over all matrices.
        num_local_rows: of the shard, whole or cut; 0 where it is padding alone.
    """

    def __init__(self, shard: Shard) -> None:
        spec = shard.spec
        self._spec, self._device = spec, shard.param.device
        self.num_rows, self.num_columns = spec.shape[-2:]
        self.num_matrices = prod(spec.shape[:-2])
        self.first_row = spec.start // self.num_columns
        self.num_local_rows = -(-spec.stop // self.num_columns) - self.first_row

    def blocks(self) -> Iterator[Block]:
        """The shard in rectangles that bound the fp32 temporaries of an update."""
        return self._spec.blocks(max_numel=chunk_numel(self._device))

    def cut_rows(self) -> list[int]:
        """``ShardSpec.cut_rows``."""
        return self._spec.cut_rows()

    def is_cut(self, block: Block) -> bool:
        """Whether the block is a part of one row."""
        return block.num_columns < self.num_columns

    def local_rows(self, block: Block) -> slice:
        """The block's rows among those of the shard."""
        return slice(block.rows.start - self.first_row, block.rows.stop - self.first_row)

    def zeros(self, *shape: int) -> Tensor:
        """fp32, on the shard's device."""
        return torch.zeros(shape, dtype=torch.float32, device=self._device)

    def zeros_by_row(self) -> Tensor:
        """fp32, shape (num_local_rows,)."""
        return self.zeros(self.num_local_rows)

    def zeros_by_column(self) -> Tensor:
        """fp32, shape (num_matrices, num_columns)."""
        return self.zeros(self.num_matrices, self.num_columns)

    def columns_of(self, by_column: Tensor, block: Block) -> Tensor:
        """What each row of the block has to be combined with: shape (1 or the block's rows, its columns)."""
        if self.num_matrices == 1:
            return by_column[:, block.columns]
        return by_column[self._matrix_of(block)][:, block.columns]

    def add_columns_(self, by_column: Tensor, values: Tensor, block: Block) -> None:
        """Add a block's values, shape (rows, columns), to the sums of their columns."""
        if self.num_matrices == 1:
            by_column[0, block.columns] += values.sum(0)
        else:
            by_column[:, block.columns].index_add_(0, self._matrix_of(block), values)

    def matrix_of_local_rows(self) -> Tensor:
        """The matrix of each of the shard's rows: shape (num_local_rows,)."""
        rows = torch.arange(self.first_row, self.first_row + self.num_local_rows, device=self._device)
        return rows // self.num_rows

    def add_rows_(self, by_matrix: Tensor, values: Tensor, block: Block) -> None:
        """Add a number for each row of the block to its matrix's."""
        if self.num_matrices == 1:
            by_matrix += values.sum()
        else:
            by_matrix.index_add_(0, self._matrix_of(block), values)

    def _matrix_of(self, block: Block) -> Tensor:
        """The matrix of each row of the block."""
        return torch.arange(block.rows.start, block.rows.stop, device=self._device) // self.num_rows


def grad_of(shard: Shard, settings: StepSettings, block: Block) -> Tensor:
    """The scaled gradient of a block: fp32, shape (rows, columns). Not to be written to."""
    return shard.scaled_grad(block.at, settings).view(block.num_rows, block.num_columns)


def cut_row_totals(
    matrices: Matrices, values_of: Callable[[Block], Tensor]
) -> Generator[Tensor, Tensor, dict[int, Tensor]]:
    """Ask for the sums of squares of cut rows; nothing is asked for where no rank has a cut row.

    Args:
        matrices: of the shard.
        values_of: what is squared, fp32, shape (rows, columns) of a block.

    Returns:
        Row -> total over all ranks, 0-dim.
    """
    numbers = {row: number for number, row in enumerate(matrices.cut_rows())}
    if not numbers:
        return {}
    own = matrices.zeros(len(numbers))
    for block in filter(matrices.is_cut, matrices.blocks()):
        own[numbers[block.rows.start]] += values_of(block).square().sum()
    totals = yield own
    return {row: totals[number] for row, number in numbers.items()}


def row_sums(matrices: Matrices, block: Block, values: Tensor, cut_rows: dict[int, Tensor]) -> Tensor:
    """Sums of squares over whole rows: shape (the block's rows,); those of cut rows are in ``cut_rows``."""
    if matrices.is_cut(block):
        return cut_rows[block.rows.start][None]
    return values.square().sum(1)


def inverse_rms(sums: Tensor, num: int) -> Tensor:
    """1 / root of the mean of ``num`` squares, given their sums; 0 where they are all 0.

    No eps is added, so that multiplying what was squared by a number divides the result by it. (Squares
    below fp32's range, of numbers below about 1e-19, count as 0.)
    """
    return (sums / num).rsqrt().masked_fill(sums == 0, 0.0)


@fused
def step_by_factors_(
    shard: Shard,
    settings: StepSettings,
    row: Tensor | None = None,
    column: Tensor | None = None,
    step: float = 1.0,
) -> None:
    """p <- p * (1 - lr * weight_decay) - step * diag(row) G diag(column).

    Args:
        shard: of a parameter of two or more dimensions.
        settings: of the step.
        row: factors of the shard's rows, fp32, shape (num_local_rows,); None for 1.
        column: of all columns, fp32, shape (num_matrices, num_columns); None for 1.
        step: factor on all of them.
    """
    matrices = Matrices(shard)
    for block in matrices.blocks():
        update = grad_of(shard, settings, block)
        if column is not None:
            update = update * matrices.columns_of(column, block)
        if row is not None:
            update = update * row[matrices.local_rows(block), None]
        if step != 1.0:
            update = update * step
        write_block(shard, settings, block, update)


@fused
def squares_by_column(shard: Shard, settings: StepSettings) -> Tensor:
    """This shard's part of the sums of squares of columns: fp32, shape (num_matrices, num_columns)."""
    matrices = Matrices(shard)
    sums = matrices.zeros_by_column()
    for block in matrices.blocks():
        matrices.add_columns_(sums, grad_of(shard, settings, block).square(), block)
    return sums


def write_block(shard: Shard, settings: StepSettings, block: Block, update: Tensor) -> None:
    """p <- p * (1 - lr * weight_decay) - update for a block; ``update`` has any shape."""
    exact = shard.write_back.read(shard.param, block.at)
    exact.mul_(1.0 - settings.lr * settings.weight_decay).sub_(update.flatten())
    shard.write_back.write(exact, shard.param, block.at)
