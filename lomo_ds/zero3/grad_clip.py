"""How ``gradient_clipping`` changes a step's gradients, and what it remembers from step to step."""

from __future__ import annotations

import math

from torch import Tensor

from lomo_ds.rules.clipping import Clipping, clip_factor


class GradClip:
    """Clipping in one of the ways of ``rules.clipping``.

    Args:
        clipping: what the bound is of.
        max_grad_norm: ``gradient_clipping`` of the DeepSpeed JSON; 0 for none.

    Attributes:
        last_norm: the last finite norm under ``lagged`` clipping; None before, and under other clipping.
    """

    def __init__(self, clipping: Clipping, max_grad_norm: float) -> None:
        self._clipping, self.max_grad_norm = clipping, max_grad_norm
        self.last_norm: float | None = None

    @property
    def is_global(self) -> bool:
        """Whether a step's whole gradient is clipped by its norm."""
        return self._clipping == "global" and self.max_grad_norm > 0

    @property
    def clip_value(self) -> float | None:
        """The bound on each element, under ``value``; else None."""
        return self.max_grad_norm if self._clipping == "value" and self.max_grad_norm > 0 else None

    @property
    def per_parameter(self) -> bool:
        """Whether each parameter is clipped to a norm of its own.

        Under ``lagged``, too, in the one step that has no norm before it.
        """
        first_lagged = self._clipping == "lagged" and self.last_norm is None
        return self.max_grad_norm > 0 and (self._clipping == "per_parameter" or first_lagged)

    def factor(self, norm: float | None) -> float:
        """The factor on every gradient.

        Args:
            norm: of the step's whole gradient, unscaled; None where it is applied before that is known.
        """
        norm = {"global": norm, "lagged": self.last_norm}.get(self._clipping)
        return 1.0 if norm is None else clip_factor(norm, self.max_grad_norm)

    def end_step(self, norm: float | Tensor) -> None:
        """Remember the norm of the step's gradient, if the next step needs it; waits for the device then."""
        if self._clipping == "lagged" and math.isfinite(norm := float(norm)):
            self.last_norm = norm
