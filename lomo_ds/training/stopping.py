"""Stopping in the middle of scoring, on all ranks at the same batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from lomo_ds.training.interruption import StopFlag

Batch = TypeVar("Batch")


class Stopped(Exception):
    """A rank has been told to stop; raised on every rank."""


def until_stopped(batches: Iterable[Batch], stop: StopFlag, device: torch.device) -> Iterator[Batch]:
    """The batches, as long as no rank has been told to stop; every rank has equally many. Collective.

    Raises:
        Stopped: a rank has.

    Cost: an all-reduce of one number for each batch, and one after the last.
    """
    for batch in batches:
        _raise_together(stop, device)
        yield batch
    _raise_together(stop, device)


def _raise_together(stop: StopFlag, device: torch.device) -> None:
    requested = torch.tensor(stop.requested, dtype=torch.int32, device=device)
    dist.all_reduce(requested, dist.ReduceOp.MAX)
    if requested:
        raise Stopped
