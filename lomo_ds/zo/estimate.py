"""Estimates of the gradient from losses alone: where to ask for the loss, and what to make of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lomo_ds.zo.point import Point, Sample

Sides = Literal[1, 2]
HERE = Point(coefficients={})


@dataclass(frozen=True, kw_only=True)
class RandomGradientEstimator:
    """The mean over ``num_samples`` directions z of a difference quotient along z, times z.

    Two sides: (f(theta + eps z) - f(theta - eps z)) / (2 eps), whose error is of order eps^2, from
    2 num_samples forwards. One side: (f(theta + eps z) - f(theta)) / eps, of order eps, from num_samples + 1.

    Attributes:
        eps: how far from the weights the loss is asked for.
        num_samples: directions of a step.
        sides: 1 or 2.
        num_blocks: of parameters, each of which has difference quotients of its own: as many times the
            forwards.

    Reference: arXiv 2305.17333, definition 1 (SPSA and n-SPSA); arXiv 2402.11592, section 3 (RGE).
    """

    eps: float
    num_samples: int = 1
    sides: Sides = 2
    num_blocks: int = 1

    @property
    def samples(self) -> list[Sample]:
        """Of all blocks."""
        return [(block, sample) for block in range(self.num_blocks) for sample in range(self.num_samples)]

    @property
    def points(self) -> list[Point]:
        """Where the loss is needed, in the order in which ``coefficients`` expects it."""
        ups = [Point(coefficients={sample: self.eps}) for sample in self.samples]
        if self.sides == 1:
            return [HERE, *ups]
        downs = [Point(coefficients={sample: -self.eps}) for sample in self.samples]
        return [point for pair in zip(ups, downs, strict=True) for point in pair]

    def coefficients(self, losses: Sequence[float]) -> dict[Sample, float]:
        """Sample -> the factor of its direction in the estimate, which is their sum.

        Args:
            losses: at ``points``.
        """
        if self.sides == 1:
            slopes = [(loss - losses[0]) / self.eps for loss in losses[1:]]
        else:
            slopes = [
                (up - down) / (2 * self.eps) for up, down in zip(losses[::2], losses[1::2], strict=True)
            ]
        return {sample: slope / self.num_samples for sample, slope in zip(self.samples, slopes, strict=True)}
