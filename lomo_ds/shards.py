"""Where one rank's part of a parameter lies inside the whole. Integers only, nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


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
