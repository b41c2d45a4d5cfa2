"""What users set of zeroth order, in ``"optimizer.params"`` of the JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lomo_ds.zo.estimate import Estimator, ForwardGradEstimator, RandomGradientEstimator, Sides
from lomo_ds.zo.sparsity import Sparsity


@dataclass(frozen=True, kw_only=True)
class DirectionSettings:
    """Which directions a step looks along.

    Attributes:
        num_samples: directions of a step.
        block_wise: each layer has derivatives of its own, from forwards of its own.
        sparsity: which entries of each parameter move; None for all.
    """

    num_samples: int = 1
    block_wise: bool = False
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples has to be at least 1, not {self.num_samples}")

    def estimator(self, num_blocks: int) -> Estimator:
        """Of each step's gradient.

        Args:
            num_blocks: of parameters; 1 unless ``block_wise``.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ZerothOrderSettings(DirectionSettings):
    """How a step makes its gradient estimate from losses alone.

    Attributes:
        eps: how far from the weights the loss is asked for.
        sides: 2 asks on both sides of the weights, 1 on one side and at the weights.
        paired: two forwards run through the model together, and share the gathered weights of each module.
        blocks_at_once: with ``block_wise`` and ``paired``, of how many layers all forwards run together. They
            also share what comes before the first of their layers that a forward perturbs.
    """

    eps: float = 1e-3
    sides: Sides = 2
    paired: bool = True
    blocks_at_once: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks_at_once < 1:
            raise ValueError(f"blocks_at_once has to be at least 1, not {self.blocks_at_once}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(
                f"eps has to be a finite number above 0, not {self.eps}: 1e-3 is usual, 1e-2 for float16"
            )

    @property
    def forwards_at_once(self) -> int:
        """How many run in lockstep."""
        if not self.paired:
            return 1
        return max(2, self.blocks_at_once * self.sides * self.num_samples) if self.block_wise else 2

    def estimator(self, num_blocks: int) -> RandomGradientEstimator:
        return RandomGradientEstimator(
            eps=self.eps, num_samples=self.num_samples, sides=self.sides, num_blocks=num_blocks
        )

    def __str__(self) -> str:
        sides = "one side" if self.sides == 1 else "two sides"
        return f"{self.num_samples} direction(s) a step, {sides}, eps {self.eps}"


@dataclass(frozen=True, kw_only=True)
class ForwardGradientSettings(DirectionSettings):
    """The derivative along each direction is computed with the forward, exactly."""

    def estimator(self, num_blocks: int) -> ForwardGradEstimator:
        return ForwardGradEstimator(num_samples=self.num_samples, num_blocks=num_blocks)

    def __str__(self) -> str:
        return f"{self.num_samples} direction(s) a step, by forward-mode differentiation"
