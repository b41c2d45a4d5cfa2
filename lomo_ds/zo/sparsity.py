"""Directions that are 0 but for a share of a parameter's entries: as many as that share says, exactly.

Entries are put in an order, and the first ones are kept: by random numbers, which are other ones in each
step, or by size, the largest first. An entry of equal rank comes first where its index is lower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lomo_ds.rules.noise import random_int32
from lomo_ds.zo.noise import cuts

Kind = Literal["random", "magnitude"]
Order = Callable[[Tensor, int], Tensor]
"""Takes some of a parameter's values and the flat index of the first; returns int32 numbers, the lowest of
which come first."""
_BITS = 16
_LARGEST = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The entries of one parameter that are kept.

    Attributes:
        order: of its entries.
        last: number of the last one that is kept.
        stop: flat index from which entries with just that number are not kept.
    """

    order: Order
    last: int
    stop: int

    def mask(self, values: Tensor, start: int) -> Tensor:
        """Which of some values are kept: bool, shape (numel,).

        Args:
            values: as they were when the order was made.
            start: flat index of the first.
        """
        numbers = self.order(values, start)
        index = torch.arange(start, start + values.numel(), device=values.device)
        return (numbers < self.last) | (numbers == self.last) & (index < self.stop)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """``"optimizer.params.sparsity"``: which entries of each parameter a step perturbs and updates.

    Attributes:
        kind: "random", drawn anew in each step, or "magnitude", the largest weights.
        share: of the entries of each parameter that are kept, above 0 and below 1; rounded to whole entries,
            at least one.

    Reference: arXiv 2402.11592, section 5, ZO fine-tuning with gradient pruning.
    """

    kind: Kind
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(
                f"share has to be above 0 and below 1, not {self.share}: delete sparsity for all"
            )

    def kept(self, values: Tensor, key: tuple[int, int, int]) -> Kept:
        """The entries of a whole parameter that are kept.

        Args:
            values: 1-D, the weights.
            key: (seed, step, parameter).

        Cost: two passes over the parameter, three by size, and host syncs; temporaries of a block.
        """
        order = _by_size if self.kind == "magnitude" else _at_random(key)
        count = max(1, round(self.share * values.numel()))
        last, num_ties = _last_number(values, order, count)
        stop = (
            _index_after_ties(values, order, last, num_ties) if self.kind == "magnitude" else values.numel()
        )
        return Kept(order=order, last=last, stop=stop)


def _by_size(values: Tensor, start: int) -> Tensor:
    """The bits of an fp32 number's absolute value grow with it."""
    return _LARGEST - values.float().abs().view(torch.int32)


def _at_random(key: tuple[int, int, int]) -> Order:
    """All entries of a parameter draw different numbers."""
    return lambda values, start: random_int32(key, start, values.numel(), values.device)


def _last_number(values: Tensor, order: Order, count: int) -> tuple[int, int]:
    """The number of the ``count``-th entry, and how many with just that number are among the first."""
    high, left = _bin_of(values, order, count, lambda numbers: (numbers >> _BITS) + (1 << _BITS - 1))
    top = high - (1 << _BITS - 1)

    def low_bits(numbers: Tensor) -> Tensor:
        return numbers[numbers >> _BITS == top] & ((1 << _BITS) - 1)

    low, left = _bin_of(values, order, left, low_bits)
    return (top << _BITS) + low, left


def _bin_of(values: Tensor, order: Order, count: int, bins_of: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """The bin of the ``count``-th entry, and which of its bin it is."""
    histogram = torch.zeros(1 << _BITS, dtype=torch.int64, device=values.device)
    for at in cuts(0, values.numel()):
        bins = bins_of(order(values[at], at.start)).long()
        histogram += torch.zeros_like(histogram).scatter_add_(0, bins, torch.ones_like(bins))
    is_before = histogram.cumsum(0) < count
    return int(is_before.sum()), count - int((histogram * is_before).sum())


def _index_after_ties(values: Tensor, order: Order, last: int, num_ties: int) -> int:
    """The flat index after the ``num_ties``-th entry with the number ``last``."""
    stop = values.new_zeros((), dtype=torch.int64)
    seen = stop.clone()
    for at in cuts(0, values.numel()):
        found = (order(values[at], at.start) == last).cumsum(0) + seen
        stop += (found < num_ties).sum()
        seen = found[-1]
    return int(stop) + 1
