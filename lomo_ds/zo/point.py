"""Points around the weights at which a step asks for the loss, and the directions that lead to them."""

from __future__ import annotations

from dataclasses import dataclass

from lomo_ds.zo.moves import Term

Sample = tuple[int, int]
"""(number of a block of parameters, number of a direction in it)."""


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
