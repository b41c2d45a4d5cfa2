"""Moving some of a parameter's values to one or two points: each block is read, drawn and written once.

On CUDA devices with Triton a kernel does so, and draws in registers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lomo_ds.rules.kernels import dispatch, operations  # noqa: F401  (operations: torch.ops.lomo_ds)
from lomo_ds.rules.kernels.grids import over_elements
from lomo_ds.rules.noise import seeds_of
from lomo_ds.zo.noise import BLOCK, Draw, Normal, cuts
from lomo_ds.zo.sparsity import Kept

Key = tuple[int, ...]
Term = tuple[Key, float]
"""(key of a direction in one parameter, coefficient)."""
_OPERATIONS: Any = torch.ops.lomo_ds


@dataclass(frozen=True, kw_only=True)
class Move:
    """What leads one parameter to a point.

    Attributes:
        terms: of the parameter; none where it stays.
        kept: its entries that move; None for all.
        normal: makes the directions.
    """

    terms: list[Term]
    kept: Kept | None = None
    normal: Normal = field(default_factory=Normal)

    def mask(self, values: Tensor, start: int) -> Tensor | None:
        return None if self.kept is None else self.kept.mask(values, start)

    def is_by_kernel(self, values: Tensor) -> bool:
        return self.kept is None and dispatch.has_kernels(values.device.type)


def add_(values: Tensor, move: Move, start: int) -> Tensor:
    """values += sum of coefficient * z, in fp32 and rounded once to the nearest.

    Args:
        values: 1-D, of any floating dtype, contiguous; changed in place.
        move: of the parameter that ``values`` belong to.
        start: flat index of the first of them in the whole parameter.

    Returns:
        ``values``.

    Cost: temporaries of a block (``noise.BLOCK``); by kernels none for one term or in fp32, else 4 bytes
        an element.
    """
    if move.is_by_kernel(values):
        exact = values if len(move.terms) == 1 else values.float()
        for key, coefficient in move.terms:
            _perturb(exact, None, key, (coefficient, 0.0), move.normal, start)
        return values.copy_(exact)
    draw, buffer = Draw.of(move.normal, values.numel(), values.device), _block_like(values)
    for at in cuts(start, values.numel()):
        exact, mask = _in_fp32(values[at], buffer), move.mask(values[at], start + at.start)
        exact.copy_(values[at])
        for key, coefficient in move.terms:
            exact.add_(_masked(draw(key, start + at.start, exact.numel()), mask), alpha=coefficient)
        values[at].copy_(exact)
    return values


def part_(values: Tensor, other: Tensor, of_other: Move, own: Move, start: int) -> None:
    """Two points at once, drawing each direction once: ``add_`` of both moves to ``values``.

    Args:
        values: 1-D, of any floating dtype, contiguous; becomes the point of ``own``.
        other: like it; becomes the point of ``of_other``, whatever it was.
        of_other, own: what leads from ``values`` to them, for the same entries.
        start: flat index of the first of them in the whole parameter.

    Cost: as of ``add_``; by kernels 8 bytes an element for directions of which not both need the same.
    """
    factors, own_factors = dict(of_other.terms), dict(own.terms)
    both = {key: (own_factors.get(key, 0.0), factors.get(key, 0.0)) for key in factors | own_factors}
    if own.is_by_kernel(values):
        return _part_by_kernels(values, other, both, own.normal, start)
    draw = Draw.of(own.normal, values.numel(), values.device)
    buffer, other_buffer = _block_like(values), _block_like(values)
    for at in cuts(start, values.numel()):
        two, mask = _in_fp32(values[at], buffer), own.mask(values[at], start + at.start)
        one = _in_fp32(other[at], other_buffer).copy_(two.copy_(values[at]))
        for key, (factor, of_one) in both.items():
            z = _masked(draw(key, start + at.start, one.numel()), mask)
            one.add_(z, alpha=of_one)
            two.add_(z, alpha=factor)
        other[at].copy_(one)
        values[at].copy_(two)


def combination(values: Tensor, move: Move, start: int, out: Tensor) -> Tensor:
    """The sum of coefficient * z for some of a parameter's elements.

    Args:
        values: these elements, 1-D; not changed.
        move: of the parameter.
        start: flat index of the first of them in the whole parameter.
        out: fp32, shape (numel,), where the sum is written.

    Returns:
        ``out``.
    """
    if move.is_by_kernel(values):
        return add_(out.zero_(), move, start)
    draw = Draw.of(move.normal, values.numel(), values.device)
    for at in cuts(start, values.numel()):
        total, mask = out[at].zero_(), move.mask(values[at], start + at.start)
        for key, coefficient in move.terms:
            total.add_(_masked(draw(key, start + at.start, total.numel()), mask), alpha=coefficient)
    return out


def _part_by_kernels(
    values: Tensor, other: Tensor, both: dict[Key, tuple[float, float]], normal: Normal, start: int
) -> None:
    if len(both) == 1:
        ((key, factors),) = both.items()
        _perturb(values, other, key, factors, normal, start)
        return
    one, two = (values.to(torch.float32, copy=True) for _ in range(2))
    for key, (factor, of_one) in both.items():
        _perturb(one, None, key, (of_one, 0.0), normal, start)
        _perturb(two, None, key, (factor, 0.0), normal, start)
    other.copy_(one)
    values.copy_(two)


def _perturb(
    values: Tensor, other: Tensor | None, key: Key, factors: tuple[float, float], normal: Normal, start: int
) -> None:
    """other = values + second factor * z, where there is another; values += first factor * z."""
    noise_and_start = [*seeds_of(key), start]
    _OPERATIONS.perturb(
        values,
        other,
        normal.table(values.device),
        *factors,
        noise_and_start,
        over_elements(values.numel()),
    )


def _block_like(values: Tensor) -> Tensor:
    """Room for a block in fp32."""
    return values.new_empty(min(BLOCK, values.numel()), dtype=torch.float32)


def _in_fp32(part: Tensor, buffer: Tensor) -> Tensor:
    """Where a part of some values is computed: in its own place where that is in fp32."""
    return part if part.dtype == torch.float32 else buffer[: part.numel()]


def _masked(z: Tensor, mask: Tensor | None) -> Tensor:
    return z if mask is None else z.mul_(mask)
