"""Host memory of a CPU rank where gradient shards wait for the step boundary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3.apply.grad_size import GradSize, by_dtype


class HostBuffer:
    """A place for each parameter's gradient shard, on a rank that computes on the host.

    A place is allocated once, and shards of the same step add up in it (micro-batches, or a parameter whose
    gradient comes in several parts).

    Attributes:
        num_bytes: memory of this rank.

    Cost: ``num_bytes`` of memory per rank, for all ranks together one gradient of the model.
    """

    num_file_bytes = 0

    def __init__(self) -> None:
        self.num_bytes = 0
        self._places: dict[Parameter, Tensor] = {}
        self._filled: dict[Parameter, None] = {}

    def admit(self, sizes: Mapping[Parameter, GradSize]) -> None:
        """Allocate places for parameters.

        Args:
            sizes: of each one's shard.
        """
        for dtype, numel in by_dtype(sizes).items():
            memory = torch.empty(sum(numel.values()), dtype=dtype)
            self._places |= zip(numel, memory.split(list(numel.values())), strict=True)
            self.num_bytes += memory.nbytes

    def add(self, param: Parameter, grad_shard: Tensor) -> Tensor:
        """Keep a shard, or add it to what is kept for ``param`` already; returns their sum."""
        place = self._places[param]
        if param in self._filled:
            return place.add_(grad_shard)
        self._filled[param] = None
        place.copy_(grad_shard)
        return grad_shard

    def read(self, param: Parameter) -> Tensor:
        """A copy of what is kept for ``param``."""
        return self._places[param].clone()

    def drop(self, param: Parameter) -> None:
        """Forget what is kept for ``param``."""
        del self._filled[param]

    def fetch_all(self) -> Iterator[tuple[Parameter, Tensor]]:
        """(parameter, its gradient's place), in the order in which they came."""
        for param in self._filled:
            yield param, self._places[param]

    def clear(self) -> None:
        """Forget what is kept; the memory stays."""
        self._filled.clear()
