"""A shard as tiles of the matrices that it is a part of: no division for an element, and cut rows like
others.

A program has a group of rows of one matrix and a block of columns. Rows are counted from the shard's first,
cut or not; what a tile has before the shard's beginning or after its end is left out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_of(num_blocks):
    """This program's group of rows."""
    return tl.program_id(0) // num_blocks


@triton.jit
def block_of(num_blocks):
    """This program's block of columns."""
    return tl.program_id(0) % num_blocks


@triton.jit
def rows_of(at_row, first_row, num_rows, num_groups, num_blocks, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a tile, of which row ``at_row`` of the program's group is the first: int64 and bool."""
    group = group_of(num_blocks)
    matrix = group // num_groups
    in_matrix = (group % num_groups) * GROUP + at_row + tl.arange(0, ROWS)
    return (first_row + matrix * num_rows + in_matrix).to(tl.int64), in_matrix < num_rows


@triton.jit
def columns_of(num_blocks, COLUMNS: tl.constexpr):
    """Columns of a tile."""
    return block_of(num_blocks) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def elements_of(rows, is_row, columns, num_columns, lead, numel):
    """Where a tile's elements lie in the shard, and which of them do: (rows, columns), int64 and bool."""
    at = rows[:, None] * num_columns + columns[None, :] - lead
    inside = is_row[:, None] & (columns[None, :] < num_columns)
    return at, inside & (at >= 0) & (at < numel)


@triton.jit
def normalized(
    values,
    variance,
    row,
    row_mean,
    column,
    ROW_FIRST: tl.constexpr,
    ROOT: tl.constexpr,
    rows,
    columns,
    at,
    inside,
    num_columns,
    num_groups,
    num_blocks,
):
    """Values of a tile, times a factor for each element, row and column, of those that are not None.

    With ``ROOT`` what is given is divided by its root, rows after their matrix's mean.
    """
    if variance is not None:
        values = values * _inverse_root(tl.load(variance + at, mask=inside, other=1.0))
    matrix = group_of(num_blocks) // num_groups
    if row is not None:
        of_row = tl.load(row + rows, mask=tl.max(inside.to(tl.int32), 1) > 0, other=1.0)
        if ROOT:
            of_row = _inverse_root(tl.div_rn(of_row, tl.load(row_mean + matrix)))
        if ROW_FIRST:
            values = values * of_row[:, None]
    if column is not None:
        of_column = tl.load(column + matrix * num_columns + columns, mask=columns < num_columns, other=1.0)
        if ROOT:
            of_column = _inverse_root(of_column)
        values = values * of_column[None, :]
    if row is not None and not ROW_FIRST:
        values = values * of_row[:, None]
    return values


@triton.jit
def _inverse_root(values):
    """``rsqrt``, correctly rounded twice as on a CPU."""
    return tl.div_rn(1.0, tl.sqrt_rn(values))
