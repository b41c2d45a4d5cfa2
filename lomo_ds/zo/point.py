"""Points around the weights at which a step asks for the loss, and the directions that lead to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.zo.noise import chunks, normal

Term = tuple[tuple[int, ...], float]
"""(key of a direction in one parameter, coefficient)."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """theta + sum over samples of coefficient * z.

    Attributes:
        coefficients: sample -> what its direction is multiplied by; empty for theta itself.
        times_lr: each parameter's coefficients are multiplied by its learning rate.
    """

    coefficients: dict[int, float]
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

    def terms(self, point: Point, param_index: int, lr: float) -> list[Term]:
        """What leads to ``point`` in one parameter.

        Args:
            point: of this step.
            param_index: among the trained parameters.
            lr: of the parameter.
        """
        factor = lr if point.times_lr else 1.0
        return [
            ((self.seed, self.step, sample, param_index), factor * coefficient)
            for sample, coefficient in point.coefficients.items()
        ]


def add_terms_(values: Tensor, terms: Sequence[Term], start: int) -> Tensor:
    """values += sum of coefficient * z, in fp32 and rounded once to the nearest.

    Args:
        values: 1-D, of any floating dtype, contiguous; changed in place.
        terms: of the parameter that ``values`` belong to.
        start: flat index of the first of them in the whole parameter.

    Returns:
        ``values``.

    Cost: temporaries of a chunk (``noise.chunks``).
    """
    for at in chunks(values.numel(), values.device):
        exact = values[at].float()
        for key, coefficient in terms:
            exact.add_(normal(key, start + at.start, exact.numel(), values.device).mul_(coefficient))
        values[at].copy_(exact)
    return values


def part_(values: Tensor, first: Sequence[Term], second: Sequence[Term], start: int) -> Tensor:
    """Both of two points at once, bit for bit as of ``add_terms_``; a direction of both is drawn once.

    Args:
        values, start: as of ``add_terms_``; ``values`` becomes the second point.
        first, second: what leads to them.

    Returns:
        The first point: a new tensor like ``values``.
    """
    other, factors, own = torch.empty_like(values), dict(first), dict(second)
    for at in chunks(values.numel(), values.device):
        one = values[at].to(torch.float32, copy=True)
        two = values[at].float()
        for key in factors | own:
            z = normal(key, start + at.start, one.numel(), values.device)
            if key in factors:
                one.add_(z * factors[key])
            if key in own:
                two.add_(z.mul_(own[key]))
        other[at].copy_(one)
        values[at].copy_(two)
    return other


def combination(terms: Sequence[Term], start: int, numel: int, device: torch.device) -> Tensor:
    """The sum of coefficient * z for the elements ``start`` to ``start + numel``: fp32, shape (numel,)."""
    return add_terms_(torch.zeros(numel, dtype=torch.float32, device=device), terms, start)
