"""Host memory where offloaded gradient shards wait for the step boundary."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

_PINNED_PIECE_BYTES = 1 << 28
"""Page-locked memory is taken in pieces of this size: torch rounds each up to a power of two, which for
one large buffer could be twice what is needed."""


class HostBuffer:
    """A place on the host for each parameter's gradient shard.

    The memory is allocated once, page-locked where there is an accelerator to copy from, and shards of
    the same step add up in it (micro-batches, or a parameter whose gradient comes in several parts).

    Args:
        shard_numel: for each parameter the real elements of this rank's shard.
        dtype: of the gradients, DeepSpeed's ``data_types.grad_accum_dtype``.
        device: where the gradients come from.
        max_numel_moving: elements that may be on their way to the host at a time, but for the latest shard.

    Cost: ``num_bytes`` of host memory per rank, for all ranks together one gradient of the model.
    """

    def __init__(
        self,
        shard_numel: Mapping[Parameter, int],
        dtype: torch.dtype,
        device: torch.device,
        max_numel_moving: int,
    ) -> None:
        self._pieces, self._places = _allocate(shard_numel, dtype, pinned=device.type != "cpu")
        self._device = device
        self._filled: set[Parameter] = set()
        self._copies: Any = None if get_accelerator().is_synchronized_device() else get_accelerator().Stream()
        self._max_numel_moving = max_numel_moving
        self._moving: deque[tuple[Any, int]] = deque()

    @property
    def num_file_bytes(self) -> int:
        """Disk that this rank uses: none."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank's buffers."""
        return sum(piece.numel() * piece.element_size() for piece in self._pieces)

    def add(self, param: Parameter, grad_shard: Tensor) -> Tensor:
        """Offload a shard, or add it to what is offloaded for ``param`` already.

        The copy runs on a stream of its own, after the current stream's work so far and in parallel to what
        follows; ``wait`` waits for it. The sum is done on the device. Where the link to the host is slower
        than backward, the call waits for older copies.

        Returns:
            What is offloaded for ``param`` now, on the device; valid until the next call.

        Cost: on an accelerator a copy of the shard until the transfer is over.
        """
        place = self._places[param]
        if param in self._filled:
            if self._copies is not None:
                get_accelerator().current_stream().wait_stream(self._copies)
            grad_shard = place.to(self._device, non_blocking=True).add_(grad_shard)
        self._filled.add(param)
        if self._copies is None:
            place.copy_(grad_shard)
        else:
            self._copy_in_parallel(grad_shard.clone(), place)
        return grad_shard

    def _copy_in_parallel(self, grad_shard: Tensor, place: Tensor) -> None:
        accelerator = get_accelerator()
        self._copies.wait_stream(accelerator.current_stream())
        with accelerator.stream(self._copies):
            place.copy_(grad_shard, non_blocking=True)
        grad_shard.record_stream(self._copies)
        copied = accelerator.Event()
        copied.record(self._copies)
        self._moving.append((copied, grad_shard.numel()))
        while len(self._moving) > 1 and sum(numel for _, numel in self._moving) > self._max_numel_moving:
            oldest, _ = self._moving.popleft()
            oldest.synchronize()

    def wait(self) -> None:
        """Wait until every copy to the host has ended."""
        if self._copies is not None:
            self._copies.synchronize()
            self._moving.clear()

    def fetch(self, param: Parameter) -> Tensor:
        """The offloaded shard on the device, shape (shard_numel,); on CPU the place itself, not a copy.

        Call ``wait`` first.
        """
        assert param in self._filled, "nothing is offloaded for this parameter"
        return self._places[param].to(self._device, non_blocking=True)

    def clear(self) -> None:
        """Forget what is offloaded; the memory stays."""
        self._filled.clear()


def _allocate(
    shard_numel: Mapping[Parameter, int], dtype: torch.dtype, pinned: bool
) -> tuple[list[Tensor], dict[Parameter, Tensor]]:
    """Pack the shards into pieces of host memory: (pieces, the place of each parameter)."""
    limit = _PINNED_PIECE_BYTES // dtype.itemsize if pinned else sum(shard_numel.values())
    batches: list[list[Parameter]] = []
    room = 0
    for param, numel in shard_numel.items():
        if not batches or numel > room:
            batches.append([])
            room = max(limit, numel)
        batches[-1].append(param)
        room -= numel
    pieces: list[Tensor] = []
    places: dict[Parameter, Tensor] = {}
    for params in batches:
        sizes = [shard_numel[param] for param in params]
        piece = torch.empty(sum(sizes), dtype=dtype, pin_memory=pinned)
        pieces.append(piece)
        places.update(zip(params, piece.split(sizes), strict=True))
    return pieces, places
