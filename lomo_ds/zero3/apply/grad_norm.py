"""The norm of a step's gradient, of which no rank ever holds more than a shard."""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.rules.clipping import sum_of_squares
from lomo_ds.zero3._internals import process_group


class GradNorm:
    """Adds up the squares of gradient shards, parameter by parameter."""

    def __init__(self) -> None:
        self._squares: dict[Parameter, Tensor] = {}

    def measure(self, param: Parameter, grad_shard: Tensor) -> Tensor:
        """Count a parameter's gradient, in place of what was counted for it before. No host sync.

        Returns:
            The sum of this shard's squares: 0-dim fp64.
        """
        self._squares[param] = sum_of_squares(grad_shard)
        return self._squares[param]

    def total(self, loss_scale: float) -> Tensor:
        """The unscaled gradient's 2-norm over all parameters and ranks: 0-dim fp64, on the device.

        Collective: one all-reduce of a number.
        """
        group = process_group(next(iter(self._squares)))
        total = torch.stack(list(self._squares.values())).sum()
        dist.all_reduce(total, group=group)
        return total.sqrt() / loss_scale

    def clear(self) -> None:
        """Begin the next step."""
        self._squares.clear()
