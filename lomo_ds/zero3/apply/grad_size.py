"""Number and dtype of the elements of gradient shards that wait in a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.nn import Parameter


class GradSize(NamedTuple):
    """This rank's shard of a parameter's gradient.

    Attributes:
        numel: its real elements.
        dtype: in which it adds up.
    """

    numel: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def by_dtype(sizes: Mapping[Parameter, GradSize]) -> dict[torch.dtype, dict[Parameter, int]]:
    """For each dtype its parameters in their order, with their numbers of elements."""
    sorted_sizes: dict[torch.dtype, dict[Parameter, int]] = {}
    for param, size in sizes.items():
        sorted_sizes.setdefault(size.dtype, {})[param] = size.numel
    return sorted_sizes
