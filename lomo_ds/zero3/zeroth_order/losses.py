"""The losses of a step on all ranks: checked together, and the same numbers on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

_FINE = 1.0
"""Begins the row of a rank whose closures returned one number each; that of another is all 0."""


def mean_losses(returned: Sequence[Sequence[Any]], device: torch.device) -> tuple[Tensor, list[float]]:
    """The mean over micro-batches and ranks of what the closures of a step returned. Collective.

    Args:
        returned: by micro-batch and point.
        device: of this rank.

    Returns:
        (this rank's mean over micro-batches at each point, fp64 on the device; the means over all ranks).
        Every rank adds up the same table in the same order, so that the means are equal to the bit.

    Raises:
        ValueError: a closure of any rank returned something other than one finite number; on every rank.

    Cost: one all-reduce of ranks x (points + 1) numbers, and one host sync.
    """
    values = [[_one_number(value, device) for value in of_points] for of_points in returned]
    is_fine = all(value is not None for of_points in values for value in of_points)
    own = torch.zeros(1 + len(values[0]), dtype=torch.float64, device=device)
    if is_fine:
        own[1:] = torch.stack([torch.stack(of_points) for of_points in values]).mean(0)
        own[0] = _FINE
    table = own.new_zeros(dist.get_world_size(), len(own))
    table[dist.get_rank()] = own
    dist.all_reduce(table)  # each element is one rank's, and 0 of all others: nothing is rounded
    rows = table.tolist()
    _refuse(rows, _first_strange(returned, values))
    return own[1:], [math.fsum(column) / len(rows) for column in list(zip(*rows, strict=True))[1:]]


def _one_number(value: Any, device: torch.device) -> Tensor | None:
    """A closure's loss as 0-dim fp64; None where it is no number."""
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and not value.is_complex()
        return value.detach().to(device, torch.float64).reshape(()) if is_number else None
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64, device=device)
    return None


def _first_strange(returned: Sequence[Sequence[Any]], values: Sequence[Sequence[Any]]) -> str:
    """What this rank's closures returned in place of a number, for the message."""
    for of_points, numbers in zip(returned, values, strict=True):
        for value, number in zip(of_points, numbers, strict=True):
            if number is None:
                return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return "another one"


def _refuse(rows: Sequence[Sequence[float]], own: str) -> None:
    for rank, (status, *losses) in enumerate(rows):
        if status != _FINE:
            given = f", not {own}" if rank == dist.get_rank() else ""
            raise ValueError(
                f"engine.train_batch: a closure on rank {rank} did not return one number{given}: return the "
                "mean over that rank's examples. Nothing has changed"
            )
        strange = [loss for loss in losses if not math.isfinite(loss)]
        if strange:
            raise ValueError(
                f"engine.train_batch: a loss on rank {rank} is {strange[0]}: nothing has changed. "
                'Try a lower "lr" or "eps" in "optimizer.params", and look at the data'
            )
