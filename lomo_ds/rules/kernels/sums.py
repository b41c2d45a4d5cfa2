"""Kernels that read alone: partial sums, which one more operation of torch adds up. No atomics: the same
order in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lomo_ds.rules.kernels.elements import load, load_grad
from lomo_ds.rules.kernels.steps import with_momentum
from lomo_ds.rules.kernels.tiles import block_of, columns_of, elements_of, group_of, normalized, rows_of

SPAN = 16
"""Blocks of a program in ``squares``."""


@triton.jit
def squares(values, partials, numel, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """``partials``: the sum of squares of each program's elements, in fp32."""
    total = tl.zeros((BLOCK,), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * BLOCK * SPAN
    for block in range(SPAN):
        at = begin + block * BLOCK + tl.arange(0, BLOCK)
        exact = load(values, at, at < numel)
        total += exact * exact
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def tile_sums(
    grad, grad_scale, scale, clip_value,
    variance, row, row_mean, column, ROW_FIRST: tl.constexpr, ROOT: tl.constexpr,
    momentum, size, weight, SQUARED: tl.constexpr, by_row, by_column,
    first_row, num_rows, num_groups, num_blocks, num_columns, lead, numel,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over a program's columns for each row, and over its rows for each column, as far as asked for.

    Of the gradient (with ``momentum``, of the momentum that it gives) times factors, squared or not.
    """
    columns = columns_of(num_blocks, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at_row in range(0, GROUP, ROWS):
        rows, is_row = rows_of(at_row, first_row, num_rows, num_groups, num_blocks, GROUP, ROWS)
        at, inside = elements_of(rows, is_row, columns, num_columns, lead, numel)
        values = load_grad(grad, grad_scale, scale, clip_value, at, inside)
        if momentum is not None:
            values = with_momentum(values, momentum, size, weight, rows, at, inside)
        values = normalized(
            values, variance, row, row_mean, column, ROW_FIRST, ROOT,
            rows, columns, at, inside, num_columns, num_groups, num_blocks,
        )  # fmt: skip
        if SQUARED:
            values = values * values
        values = tl.where(inside, values, 0.0)
        total += values
        if by_row is not None:
            is_local = is_row & (rows >= 0) & (rows * num_columns < numel + lead)
            tl.store(by_row + rows * num_blocks + block_of(num_blocks), tl.sum(values, 1), mask=is_local)
    if by_column is not None:
        of_group = by_column + group_of(num_blocks).to(tl.int64) * num_columns
        tl.store(of_group + columns, tl.sum(total, 0), mask=columns < num_columns)
