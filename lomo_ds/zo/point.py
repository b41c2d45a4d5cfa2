"""Points around the weights at which a step asks for the loss, and the directions that lead to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.zo.noise import chunks, normal
from lomo_ds.zo.sparsity import Kept

Term = tuple[tuple[int, ...], float]
"""(key of a direction in one parameter, coefficient)."""
Sample = tuple[int, int]
"""(number of a block of parameters, number of a direction in it)."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """What leads one parameter to a point.

    Attributes:
        terms: of the parameter; none where it stays.
        kept: its entries that move; None for all.
    """

    terms: list[Term]
    kept: Kept | None = None

    def direction(self, key: tuple[int, ...], values: Tensor, start: int) -> Tensor:
        """z of these entries: fp32, shape (numel,)."""
        z = normal(key, start, values.numel(), values.device)
        return z if self.kept is None else z.mul_(self.kept.mask(values, start))


@dataclass(frozen=True, kw_only=True)
class Point:
    """theta + sum over samples of coefficient * z.

    Attributes:
        coefficients: sample -> what its direction is multiplied by in its block; empty for theta itself.
        times_lr: each parameter's coefficients are multiplied by its learning rate.
    """

    coefficients: dict[Sample, float]
    times_lr: bool = False


@dataclass(frozen=True, kw_only=True)
class Directions:
    """The directions z of one step: standard normal, the same on every rank.

    Attributes:
        seed: of the run.
        step: number of steps before this one.
    """

    seed: int
    step: int

    def terms(self, point: Point, param_index: int, lr: float, block: int = 0) -> list[Term]:
        """What leads to ``point`` in one parameter.

        Args:
            point: of this step.
            param_index: among the trained parameters.
            lr: of the parameter.
            block: that it belongs to.
        """
        factor = lr if point.times_lr else 1.0
        return [
            ((self.seed, self.step, sample, param_index), factor * coefficient)
            for (of_block, sample), coefficient in point.coefficients.items()
            if of_block == block
        ]


def add_(values: Tensor, move: Move, start: int) -> Tensor:
    """values += sum of coefficient * z, in fp32 and rounded once to the nearest.

    Args:
        values: 1-D, of any floating dtype, contiguous; changed in place.
        move: of the parameter that ``values`` belong to.
        start: flat index of the first of them in the whole parameter.

    Returns:
        ``values``.

    Cost: temporaries of a chunk (``noise.chunks``).
    """
    for at in chunks(values.numel(), values.device):
        exact = values[at].to(torch.float32, copy=True)
        for key, coefficient in move.terms:
            exact.add_(move.direction(key, values[at], start + at.start).mul_(coefficient))
        values[at].copy_(exact)
    return values


def part_(values: Tensor, other: Tensor, of_other: Move, own: Move, start: int) -> None:
    """Two points at once, bit for bit as of ``add_``; a direction of both is drawn once.

    Args:
        values: 1-D, of any floating dtype, contiguous; becomes the point of ``own``.
        other: like it; becomes the point of ``of_other``, whatever it was.
        of_other, own: what leads from ``values`` to them, for the same entries.
        start: flat index of the first of them in the whole parameter.
    """
    factors, own_factors = dict(of_other.terms), dict(own.terms)
    for at in chunks(values.numel(), values.device):
        one = values[at].to(torch.float32, copy=True)
        two = one.clone()
        for key in factors | own_factors:
            z = own.direction(key, values[at], start + at.start)
            if key in factors:
                one.add_(z * factors[key])
            if key in own_factors:
                two.add_(z.mul_(own_factors[key]))
        other[at].copy_(one)
        values[at].copy_(two)


def combination(values: Tensor, move: Move, start: int) -> Tensor:
    """The sum of coefficient * z for some of a parameter's elements.

    Args:
        values: these elements, 1-D; not changed.
        move: of the parameter.
        start: flat index of the first of them in the whole parameter.

    Returns:
        fp32, shape (numel,).
    """
    total = torch.zeros_like(values, dtype=torch.float32)
    for at in chunks(values.numel(), values.device):
        for key, coefficient in move.terms:
            total[at] += move.direction(key, values[at], start + at.start).mul_(coefficient)
    return total
