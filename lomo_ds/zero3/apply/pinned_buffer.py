"""Page-locked host memory where an accelerator's gradient shards wait for the step boundary.

Copies run on a stream of their own, C, in the order in which they are asked for. C waits for what it copies,
and who reads a copy waits for that one alone; the host waits only where too much is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3.apply.grad_size import GradSize, by_dtype

_LARGEST_PIECE_BYTES = 1 << 28
_SMALLEST_PIECE_BYTES = 1 << 16
_NUM_AHEAD = 2
"""Shards that are on their way to the device at the step while one is applied."""


def piece_bytes(num_bytes: int) -> list[int]:
    """Sizes of the pieces in which ``num_bytes`` of page-locked memory are taken.

    torch rounds each piece up to a power of two. These are powers of two, so that what is lost is less
    than the smallest one, 64 KiB.
    """
    pieces = [_LARGEST_PIECE_BYTES] * (num_bytes // _LARGEST_PIECE_BYTES)
    rest, size = num_bytes % _LARGEST_PIECE_BYTES, _LARGEST_PIECE_BYTES
    while size > _SMALLEST_PIECE_BYTES:
        size //= 2
        if rest >= size:
            pieces.append(size)
            rest -= size
    return pieces + [_SMALLEST_PIECE_BYTES] * (rest > 0)


class _Coming(NamedTuple):
    """A shard on its way to the device, and the event at which it is there."""

    param: Parameter
    shard: Tensor
    arrived: Any


class PinnedBuffer:
    """A place on the host for each parameter's gradient shard.

    A place is allocated once, and shards of the same step add up in it (micro-batches, or a parameter whose
    gradient comes in several parts).

    Args:
        device: where the gradients come from.
        bucket_numel: elements of a reduce bucket.

    Cost: ``num_bytes`` of host memory per rank, for all ranks together one gradient of the model. On the
        device copies of what is on its way, at most ``max_moving_bytes``; at the step three shards.
    """

    num_file_bytes = 0

    def __init__(self, device: torch.device, bucket_numel: int) -> None:
        self._device, self._bucket_numel = device, bucket_numel
        self._sizes: dict[Parameter, GradSize] = {}
        self._pieces: list[Tensor] = []
        self._places: dict[Parameter, list[Tensor]] = {}
        self._copies = get_accelerator().Stream()
        self._offloaded: dict[Parameter, Any] = {}
        """Parameter -> the event at which its place is filled."""
        self._moving: deque[tuple[Any, int]] = deque()
        self._moving_bytes = self.max_moving_bytes = 0

    def admit(self, sizes: Mapping[Parameter, GradSize]) -> None:
        """Allocate places for parameters.

        Args:
            sizes: of each one's shard.
        """
        self._sizes |= sizes
        for dtype, numel in by_dtype(sizes).items():
            pieces, places = _allocate(numel, dtype)
            self._pieces += pieces
            self._places |= places
        for dtype, numel in by_dtype(self._sizes).items():
            of_bucket = min(self._bucket_numel, sum(numel.values()))
            bound = max(of_bucket, 2 * max(numel.values())) * dtype.itemsize
            self.max_moving_bytes = max(self.max_moving_bytes, bound)

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank's pieces, as torch allocates them."""
        return sum(piece.nbytes for piece in self._pieces)

    def add(self, param: Parameter, grad_shard: Tensor) -> Tensor:
        """Offload a shard, or add it to what is offloaded for ``param`` already.

        The copy runs in parallel to what follows. The sum is done on the device. Where the link to the host
        is slower than backward, the call waits for older copies.

        Returns:
            What is offloaded for ``param`` now, on the device; valid until the next call.

        Cost: a copy of the shard until the transfer is over.
        """
        if param in self._offloaded:
            grad_shard = self.read(param).add_(grad_shard)
        self._offloaded[param] = self._copy_out(grad_shard, param)
        return grad_shard

    def _copy_out(self, grad_shard: Tensor, param: Parameter) -> Any:
        """Copy to the place; returns the event that ends it. What is given may change afterwards."""
        accelerator = get_accelerator()
        self._make_room(grad_shard.nbytes)
        moving = grad_shard.clone()
        self._copies.wait_stream(accelerator.current_stream())
        moving.record_stream(self._copies)
        with accelerator.stream(self._copies):
            for place, part in self._parts(param, moving):
                place.copy_(part, non_blocking=True)
            return self._event_of(moving.nbytes)

    def _event_of(self, num_bytes: int) -> Any:
        """An event at the end of C, from which on ``num_bytes`` are no longer on their way."""
        event = get_accelerator().Event()
        event.record()
        self._moving.append((event, num_bytes))
        self._moving_bytes += num_bytes
        return event

    def _make_room(self, num_bytes: int) -> None:
        """Let the host wait until ``num_bytes`` more may be on their way."""
        while self._moving and self._moving_bytes + num_bytes > self.max_moving_bytes:
            event, done_bytes = self._moving.popleft()
            event.synchronize()
            self._moving_bytes -= done_bytes

    def read(self, param: Parameter) -> Tensor:
        """A copy of what is offloaded for ``param``, on the device."""
        get_accelerator().current_stream().wait_event(self._offloaded[param])
        shard = self._new_shard(param)
        return self._copy_in(param, shard)

    def drop(self, param: Parameter) -> None:
        """Forget what is offloaded for ``param``."""
        del self._offloaded[param]

    def fetch_all(self) -> Iterator[tuple[Parameter, Tensor]]:
        """(parameter, its offloaded shard on the device), in the order in which they were offloaded.

        While one is in use, the next two are on their way. Who has used one releases it before the next.
        """
        to_come = iter(self._offloaded)
        coming = deque(self._start_fetch(param) for param in islice(to_come, 1 + _NUM_AHEAD))
        while coming:
            get_accelerator().current_stream().wait_event(coming[0].arrived)
            yield coming[0].param, coming.popleft().shard
            coming.extend(self._start_fetch(param) for param in islice(to_come, 1))

    def _start_fetch(self, param: Parameter) -> _Coming:
        accelerator = get_accelerator()
        shard = self._new_shard(param)
        self._copies.wait_stream(accelerator.current_stream())  # it may have just used this memory
        arrived = accelerator.Event()
        with accelerator.stream(self._copies):
            self._copy_in(param, shard)
            arrived.record()
        return _Coming(param, shard, arrived)

    def _new_shard(self, param: Parameter) -> Tensor:
        size = self._sizes[param]
        return torch.empty(size.numel, dtype=size.dtype, device=self._device)

    def _copy_in(self, param: Parameter, shard: Tensor) -> Tensor:
        for place, part in self._parts(param, shard):
            part.copy_(place, non_blocking=True)
        return shard

    def _parts(self, param: Parameter, shard: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of the place, part of the shard): a place may lie in several pieces of memory."""
        places = self._places[param]
        return zip(places, shard.split([place.numel() for place in places]), strict=True)

    def clear(self) -> None:
        """Forget what is offloaded; the memory stays."""
        self._offloaded.clear()


def _allocate(
    shard_numel: Mapping[Parameter, int], dtype: torch.dtype
) -> tuple[list[Tensor], dict[Parameter, list[Tensor]]]:
    """(pieces of host memory, the place of each parameter in them)."""
    sizes = piece_bytes(sum(shard_numel.values()) * dtype.itemsize)
    pieces = [torch.empty(size // dtype.itemsize, dtype=dtype, pin_memory=True) for size in sizes]
    free = deque(pieces)
    places: dict[Parameter, list[Tensor]] = {}
    for param, numel in shard_numel.items():
        places[param] = []
        while numel:
            piece = free.popleft()
            places[param].append(piece[:numel])
            if piece.numel() > numel:
                free.appendleft(piece[numel:])
            numel -= places[param][-1].numel()
    return pieces, places
