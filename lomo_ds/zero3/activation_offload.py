"""Activation checkpoints that wait for backward in host memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

_FEWEST_DIMENSIONS = 3
"""Hidden states have a batch, a sequence and a width; losses and norms have fewer."""


class _Offloaded(NamedTuple):
    """A saved tensor on the host and the device that it came from."""

    host: Tensor
    device: torch.device


def checkpoints_on_host(device: torch.device) -> AbstractContextManager:
    """Within the block, what autograd saves of hidden states goes to page-locked host memory.

    With reentrant activation checkpointing that is the input of each layer and little else; they come back
    one by one as backward reaches their layers. Copies run on the current stream, in order with the
    computation.

    Args:
        device: of the computation; only tensors on it are moved.

    Cost: host memory of the checkpoints; each is copied twice over the link between device and host.
    """

    def pack(tensor: Tensor) -> Tensor | _Offloaded:
        return _to_host(tensor) if _is_hidden_state(tensor, device) else tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, _from_host)


def _is_hidden_state(tensor: Tensor, device: torch.device) -> bool:
    moves = tensor.requires_grad and not tensor.is_leaf and tensor.is_floating_point()
    return moves and tensor.dim() >= _FEWEST_DIMENSIONS and tensor.device == device


def _to_host(tensor: Tensor) -> _Offloaded:
    pinned = tensor.device.type != "cpu"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    host.copy_(tensor.detach(), non_blocking=pinned)
    return _Offloaded(host, tensor.device)


def _from_host(saved: Tensor | _Offloaded) -> Tensor:
    if not isinstance(saved, _Offloaded):
        return saved
    if saved.device.type == "cpu":
        return saved.host.clone()
    return saved.host.to(saved.device, non_blocking=True)
