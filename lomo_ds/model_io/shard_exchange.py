"""Pieces of the ranks' shards, sent to rank 0 when it asks for them.

Rank 0 asks for one stretch of one tensor of one rank at a time, so that it never has more than a piece in
memory. A rank that cannot send a piece says so instead, and a rank 0 that cannot go through with its work
tells the others that it asks for nothing more: none of them is left waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lomo_ds.model_io.named_tensors import flat_part, is_cut, whole_shape
from lomo_ds.model_io.tensor_file import PIECE_BYTES, host_pieces
from lomo_ds.zero3._internals import process_group, shard_spec
from lomo_ds.zero3.host_group import new_host_group

_NOTHING_MORE = -1


@contextmanager
def host_group() -> Iterator[dist.ProcessGroup]:
    """A group of all ranks that sends what is in host memory. Collective."""
    group = new_host_group()
    yield group
    dist.barrier()  # nobody may leave while another rank still receives
    dist.destroy_process_group(group)


class ShardExchange:
    """All ranks' parts of some tensors, as rank 0 reads them.

    Rank 0 calls ``pieces`` and ``whole``, and ``end`` when it is done, whatever happened; every other rank
    calls ``serve`` meanwhile.

    Args:
        tensors: parameters, cut or whole, and buffers; the same on every rank.
        group: of ``host_group``.

    Cost: on rank 0 one piece of PIECE_BYTES of host memory; on the others one where shards are on a device.
    """

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._tensors, self._group = list(tensors), group
        self._numbers = {tensor: number for number, tensor in enumerate(self._tensors)}
        self._received = torch.empty(0, dtype=torch.uint8)

    # Rank 0 ------------------------------------------------------------------------------------

    def pieces(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Elements ``start`` to ``stop`` of a tensor, row-major, in 1-D tensors of at most PIECE_BYTES on the
        host. A piece is overwritten by the next one.

        Raises:
            RuntimeError: a rank could not send its part.
        """
        if not is_cut(tensor):
            yield from host_pieces(tensor.detach().reshape(-1)[start:stop])
            return
        spec = shard_spec(tensor)
        stop = spec.numel if stop is None else stop
        for rank, global_rank in enumerate(dist.get_process_group_ranks(process_group(tensor))):
            part = replace(spec, rank=rank)
            first, last = max(start, part.start) - part.start, min(stop, part.stop) - part.start
            if global_rank == dist.get_rank():
                yield from host_pieces(flat_part(tensor)[1][first : max(first, last)])
            else:
                yield from self._pieces_of(global_rank, tensor, first, last)

    def stretch(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor, row-major: 1-D, in host memory of their own.

        Raises:
            RuntimeError: a rank could not send its part.
        """
        flat, done = torch.empty(stop - start, dtype=tensor.dtype), 0
        for piece in self.pieces(tensor, start, stop):
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
        return flat

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor with all its elements, in host memory.

        Raises:
            RuntimeError: a rank could not send its part.
        """
        shape = whole_shape(tensor)
        return self.stretch(tensor, 0, torch.Size(shape).numel()).view(shape)

    def end(self) -> None:
        """Let the other ranks return from ``serve``."""
        for rank in range(dist.get_world_size()):
            if rank != dist.get_rank():
                self._send(torch.tensor([_NOTHING_MORE, 0, 0]), rank)

    def _pieces_of(self, rank: int, tensor: Tensor, start: int, stop: int) -> Iterator[Tensor]:
        """Elements ``start`` to ``stop`` of a rank's part of a tensor."""
        at_once = max(1, PIECE_BYTES // tensor.element_size())
        for first in range(start, stop, at_once):
            last = min(first + at_once, stop)
            self._send(torch.tensor([self._numbers[tensor], first, last]), rank)
            if not int(self._receive(torch.empty(1, dtype=torch.int64), rank)):
                raise RuntimeError(f"rank {rank} could not send its part of a tensor")
            yield self._receive(self._buffer((last - first) * tensor.element_size()), rank).view(tensor.dtype)

    def _buffer(self, num_bytes: int) -> Tensor:
        if self._received.numel() < num_bytes:
            self._received = torch.empty(PIECE_BYTES, dtype=torch.uint8)  # only what is used becomes resident
        return self._received[:num_bytes]

    # The other ranks ---------------------------------------------------------------------------

    def serve(self) -> None:
        """Send what rank 0 asks for, until it asks for nothing more.

        Raises:
            Exception: the first that a piece of this rank raised.
        """
        failure: Exception | None = None
        while (request := self._receive(torch.empty(3, dtype=torch.int64), 0).tolist())[0] != _NOTHING_MORE:
            try:
                piece = self._own_piece(*request)
            except Exception as error:
                failure, piece = failure or error, None
            self._send(torch.tensor([int(piece is not None)]), 0)
            if piece is not None:
                self._send(piece.view(torch.uint8), 0)
        if failure is not None:
            raise failure

    def _own_piece(self, number: int, first: int, last: int) -> Tensor:
        """Elements of this rank's part, on the host."""
        return flat_part(self._tensors[number])[1][first:last].detach().cpu()

    def _send(self, tensor: Tensor, rank: int) -> None:
        dist.send(tensor, rank, self._group)

    def _receive(self, tensor: Tensor, rank: int) -> Tensor:
        dist.recv(tensor, rank, self._group)
        return tensor
