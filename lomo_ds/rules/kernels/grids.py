"""How a shard is cut into programs: runs of elements, or tiles of its matrices. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

from lomo_ds.shards import ShardSpec

_BLOCK, _SPAN = 1024, 16
_MAX_COLUMNS, _MIN_COLUMNS = 256, 16
_STEP_NUMEL, _SUM_NUMEL = 1024, 4096
"""Elements of a tile: as few as leave a thread's registers room for what a step does."""
_SUM_ROWS = 128
"""Rows that a program of sums adds up before it writes: of the gradient's bytes, sums are 1.6 %."""


def over_elements(numel: int) -> list[int]:
    """numel, BLOCK and the number of programs."""
    return [numel, _BLOCK, -(-numel // _BLOCK)]


def over_spans(numel: int) -> list[int]:
    """numel, BLOCK, SPAN and the number of programs."""
    return [numel, _BLOCK, _SPAN, -(-numel // (_BLOCK * _SPAN))]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Groups of rows times blocks of columns.

    Attributes:
        first_matrix, num_local_matrices: that the shard has parts of.
        first_local_row, num_local_rows: of the shard, whole or cut; rows are counted over all matrices.
        num_groups: of rows, of each matrix.
        num_blocks: of columns.
        numbers: the argument ``grid`` of operations.
    """

    first_matrix: int
    num_local_matrices: int
    first_local_row: int
    num_local_rows: int
    num_groups: int
    num_blocks: int
    numbers: list[int]


def tiles_of(spec: ShardSpec, for_sums: bool) -> Tiles:
    """The tiles of a shard of two or more dimensions.

    Args:
        spec: of the shard.
        for_sums: whether a program goes through many rows.
    """
    num_columns = spec.shape[-1]
    first_row, end_row = spec.start // num_columns, -(-spec.stop // num_columns)
    rows_of_matrix = spec.shape[-2]
    first_matrix = first_row // rows_of_matrix
    num_matrices = -(-end_row // rows_of_matrix) - first_matrix if spec.shard_numel else 0
    num_rows, before = (end_row - first_row, 0)
    if num_matrices > 1:
        num_rows, before = rows_of_matrix, first_matrix * rows_of_matrix - first_row
    columns = min(_MAX_COLUMNS, max(_MIN_COLUMNS, 1 << (num_columns - 1).bit_length()))
    rows = (_SUM_NUMEL if for_sums else _STEP_NUMEL) // columns
    group = max(rows, _SUM_ROWS) if for_sums else rows
    num_groups, num_blocks = -(-num_rows // group), -(-num_columns // columns)
    lead = spec.start - first_row * num_columns
    numbers = [before, num_rows, num_groups, num_blocks, num_columns, lead, spec.shard_numel]
    num_programs = num_matrices * num_groups * num_blocks
    return Tiles(
        first_matrix=first_matrix,
        num_local_matrices=num_matrices,
        first_local_row=first_row,
        num_local_rows=end_row - first_row,
        num_groups=num_groups,
        num_blocks=num_blocks,
        numbers=[*numbers, group, rows, columns, num_programs],
    )


def tiles_of_vector(numel: int) -> Tiles:
    """A vector shard as rows of ``_MAX_COLUMNS`` elements, where only elements and their total count."""
    shape = (-(-numel // _MAX_COLUMNS), _MAX_COLUMNS)
    of_padding = ShardSpec(shape=(1, 1), rank=1, world_size=2)
    spec = ShardSpec(shape=shape, rank=0, world_size=1) if numel else of_padding
    tiles = tiles_of(spec, for_sums=True)
    tiles.numbers[6] = numel
    return tiles
