"""Estimates of the gradient from losses alone: where to ask for the loss, and what to make of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lomo_ds.zo.point import Point, Sample

Sides = Literal[1, 2]
HERE = Point(coefficients={})


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """The mean over ``num_samples`` directions z of a derivative along z, times z.

    Attributes:
        num_samples: directions of a step.
        num_blocks: of parameters, each of which has derivatives of its own: as many times the forwards.
    """

    num_samples: int = 1
    num_blocks: int = 1

    @property
    def samples(self) -> list[Sample]:
        """Of all blocks."""
        return [(block, sample) for block in range(self.num_blocks) for sample in range(self.num_samples)]

    @property
    def points(self) -> list[Point]:
        """Where a forward is needed, in the order in which ``coefficients`` expects what they return."""
        raise NotImplementedError

    def coefficients(self, returned: Sequence[float]) -> dict[Sample, float]:
        """Sample -> the factor of its direction in the estimate, which is their sum.

        Args:
            returned: by the forwards at ``points``.
        """
        slopes = self.slopes(returned)
        return {sample: slope / self.num_samples for sample, slope in zip(self.samples, slopes, strict=True)}

    def slopes(self, returned: Sequence[float]) -> list[float]:
        """The derivative along each direction."""
        raise NotImplementedError

    def losses(self, returned: Tensor) -> Tensor:
        """Of what the forwards returned, the losses."""
        return returned


@dataclass(frozen=True, kw_only=True)
class RandomGradientEstimator(Estimator):
    """By difference quotients.

    Two sides: (f(theta + eps z) - f(theta - eps z)) / (2 eps), whose error is of order eps^2, from
    2 num_samples forwards. One side: (f(theta + eps z) - f(theta)) / eps, of order eps, from num_samples + 1.

    Attributes:
        eps: how far from the weights the loss is asked for.
        sides: 1 or 2.

    Reference: arXiv 2305.17333, definition 1 (SPSA and n-SPSA); arXiv 2402.11592, section 3 (RGE).
    """

    eps: float
    sides: Sides = 2

    @property
    def points(self) -> list[Point]:
        ups = [Point(coefficients={sample: self.eps}) for sample in self.samples]
        if self.sides == 1:
            return [HERE, *ups]
        downs = [Point(coefficients={sample: -self.eps}) for sample in self.samples]
        return [point for pair in zip(ups, downs, strict=True) for point in pair]

    def slopes(self, returned: Sequence[float]) -> list[float]:
        if self.sides == 1:
            return [(loss - returned[0]) / self.eps for loss in returned[1:]]
        pairs = zip(returned[::2], returned[1::2], strict=True)
        return [(up - down) / (2 * self.eps) for up, down in pairs]


@dataclass(frozen=True, kw_only=True)
class ForwardGradEstimator(Estimator):
    """By forward-mode differentiation: a forward returns the loss and its derivative along z, exactly.

    A point stands for its direction; the forward is at the weights.

    Reference: arXiv 2402.11592, section 3 (Forward-Grad); arXiv 2202.08587, definition 1.
    """

    @property
    def points(self) -> list[Point]:
        return [Point(coefficients={sample: 1.0}) for sample in self.samples]

    def slopes(self, returned: Sequence[float]) -> list[float]:
        return list(returned[1::2])

    def losses(self, returned: Tensor) -> Tensor:
        return returned[::2]
