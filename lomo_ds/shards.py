"""Where one rank's part of a parameter lies inside the whole. Integers only, nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, kw_only=True)
class Block:
    """A rectangle of a shard: whole rows, or a part of one row.

    Attributes:
        at: its elements in the shard.
        rows: of the parameter as a matrix of its last dimension's rows.
        columns: of that matrix.
    """

    at: slice
    rows: slice
    columns: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_columns(self) -> int:
        return self.columns.stop - self.columns.start


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """One rank's partition of a parameter, as ZeRO-3 cuts it.

    The parameter is flattened (row-major) and cut into ``world_size`` chunks of ``partition_numel``
    elements, the ceiling of numel / world_size. The last chunks may be partly or wholly padding.

    Attributes:
        shape: of the whole parameter.
        rank: in the parameter's own process group, not the global rank.
        world_size: of that group.
    """

    shape: tuple[int, ...]
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in a group of {self.world_size}")

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    @property
    def partition_numel(self) -> int:
        """Elements that every rank stores, padding included."""
        return -(-self.numel // self.world_size)

    @property
    def start(self) -> int:
        """Flat index of the shard's first element; ``numel`` where the rank holds only padding."""
        return min(self.rank * self.partition_numel, self.numel)

    @property
    def stop(self) -> int:
        """Flat index after the shard's last real element."""
        return min(self.start + self.partition_numel, self.numel)

    @property
    def shard_numel(self) -> int:
        """Real elements on this rank; 0 where it holds only padding."""
        return self.stop - self.start

    @property
    def padding(self) -> int:
        """Stored elements that belong to no parameter."""
        return self.partition_numel - self.shard_numel

    def cut_rows(self) -> list[int]:
        """The rows of the last dimension that lie on more than one rank, at most ranks - 1.

        The same list on every rank.
        """
        cuts = range(self.partition_numel, self.numel, self.partition_numel)
        return sorted({at // self.shape[-1] for at in cuts if at % self.shape[-1]})

    def blocks(self, max_numel: int) -> Iterator[Block]:
        """Cut the shard into rectangles: a row's end, whole rows, a row's beginning.

        Args:
            max_numel: whole rows come in blocks of at most ``max_numel`` elements, but at least one row.
        """
        num_columns = self.shape[-1]
        rows_at_once = max(1, max_numel // num_columns)
        index = self.start
        while index < self.stop:
            row, column = divmod(index, num_columns)
            if column == 0 and self.stop - index >= num_columns:
                num_rows = min(rows_at_once, (self.stop - index) // num_columns)
                columns = slice(0, num_columns)
            else:
                num_rows = 1
                columns = slice(column, min(num_columns, column + self.stop - index))
            numel = num_rows * (columns.stop - columns.start)
            offset = index - self.start
            yield Block(at=slice(offset, offset + numel), rows=slice(row, row + num_rows), columns=columns)
            index += numel
