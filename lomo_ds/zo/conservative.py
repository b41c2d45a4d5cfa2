"""ZO-SGD-Cons: of the weights, a step down the estimate and a step up, the point with the least loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lomo_ds.zo.point import Point


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point to compare: theta - sign * lr * estimate."""

    sign: float

    def estimate(self, estimate: Point) -> Point:
        """What a rule that steps down its gradient has to get to arrive here."""
        if self.sign == 0:
            return Point(coefficients={})
        return Point(coefficients={sample: self.sign * c for sample, c in estimate.coefficients.items()})

    def point(self, estimate: Point) -> Point:
        """Where the loss is asked for."""
        down = {sample: -c for sample, c in self.estimate(estimate).coefficients.items()}
        return Point(coefficients=down, times_lr=True)


CANDIDATES = (Candidate(sign=0), Candidate(sign=1), Candidate(sign=-1))
"""The weights come first: they are kept where nothing is better."""


def chosen(estimate: Point, losses: Sequence[float]) -> Point:
    """The estimate that leads to the best candidate.

    Args:
        estimate: of the gradient.
        losses: at ``CANDIDATES``.

    Reference: arXiv 2402.11592, section 3, ZO-SGD with conservative update.
    """
    best = min(range(len(CANDIDATES)), key=lambda index: losses[index])
    return CANDIDATES[best].estimate(estimate)
