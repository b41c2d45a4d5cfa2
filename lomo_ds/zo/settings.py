"""What users set of zeroth order, in ``"optimizer.params"`` of the JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lomo_ds.zo.estimate import RandomGradientEstimator, Sides
from lomo_ds.zo.sparsity import Sparsity


@dataclass(frozen=True, kw_only=True)
class ZerothOrderSettings:
    """How a step makes its gradient estimate.

    Attributes:
        eps: how far from the weights the loss is asked for.
        num_samples: directions of a step.
        sides: 2 asks on both sides of the weights, 1 on one side and at the weights.
        block_wise: each layer has difference quotients of its own, from forwards of its own.
        sparsity: which entries of each parameter are perturbed and updated; None for all.
        paired: two forwards run through the model together, and share the gathered weights of each module.
    """

    eps: float = 1e-3
    num_samples: int = 1
    sides: Sides = 2
    block_wise: bool = False
    sparsity: Sparsity | None = None
    paired: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(
                f"eps has to be a finite number above 0, not {self.eps}: 1e-3 is usual, 1e-2 for float16"
            )
        if self.num_samples < 1:
            raise ValueError(f"num_samples has to be at least 1, not {self.num_samples}")

    def estimator(self, num_blocks: int) -> RandomGradientEstimator:
        """Of each step's gradient.

        Args:
            num_blocks: of parameters; 1 unless ``block_wise``.
        """
        return RandomGradientEstimator(
            eps=self.eps, num_samples=self.num_samples, sides=self.sides, num_blocks=num_blocks
        )
