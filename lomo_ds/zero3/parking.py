"""Host memory where gradient shards wait for the step boundary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


class Parking:
    """One host buffer with a place for each parameter's gradient shard.

    The buffer is allocated once, page-locked where there is an accelerator to copy from, and shards of
    the same step add up in it (micro-batches, or a parameter whose gradient comes in several parts).

    Args:
        shard_numel: for each parameter the real elements of this rank's shard.
        dtype: of the parked gradients, DeepSpeed's ``data_types.grad_accum_dtype``.
        device: where the gradients come from.

    Cost: ``num_bytes`` of host memory per rank, for all ranks together one gradient of the model.
    """

    def __init__(
        self, shard_numel: Mapping[Parameter, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        total = sum(shard_numel.values())
        self._buffer = torch.empty(total, dtype=dtype, pin_memory=device.type != "cpu")
        self._places = dict(zip(shard_numel, self._buffer.split(list(shard_numel.values())), strict=True))
        self._device = device
        self._parked: set[Parameter] = set()

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank's buffer."""
        return self._buffer.numel() * self._buffer.element_size()

    def add(self, param: Parameter, grad_shard: Tensor) -> Tensor:
        """Park a shard, or add it to what is parked for ``param`` already.

        Returns:
            What is parked for ``param`` now, on the device; valid until the next call.

        The copy is ordered after the current stream's work and does not wait for it; the caller
        synchronizes that stream before it reads. The sum is done on the device.
        """
        place = self._places[param]
        if param in self._parked:
            grad_shard = place.to(self._device, non_blocking=True).add_(grad_shard)
        place.copy_(grad_shard, non_blocking=True)
        self._parked.add(param)
        return grad_shard

    def fetch(self, param: Parameter) -> Tensor:
        """The parked shard on the device, shape (shard_numel,); on CPU the place itself, not a copy."""
        assert param in self._parked, "nothing is parked for this parameter"
        return self._places[param].to(self._device, non_blocking=True)

    def clear(self) -> None:
        """Forget what is parked; the buffer stays."""
        self._parked.clear()
