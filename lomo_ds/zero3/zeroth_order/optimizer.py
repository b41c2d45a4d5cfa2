"""ZeRO-3 whose shards change once a step, by an estimate of the gradient from losses alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3._internals import full_numel
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.optimizer import LomoZeroOptimizer
from lomo_ds.zero3.step import LossClosure
from lomo_ds.zero3.zeroth_order.forwards import Forwards
from lomo_ds.zero3.zeroth_order.losses import mean_losses
from lomo_ds.zo.conservative import CANDIDATES, chosen
from lomo_ds.zo.point import Directions, Point, Term, combination
from lomo_ds.zo.settings import ZerothOrderSettings
from lomo_ds.zo.table import CONSERVATIVE

HOW_TO_STEP = (
    "makes its steps from forwards alone: call engine.train_batch([closure]), where closure() runs the model "
    "and returns the loss, in place of engine.backward(loss) and engine.step()"
)


class ZerothOrderOptimizer(LomoZeroOptimizer):
    """Stage 3 that has no gradients: a step's estimate goes to the rules in their place.

    Args:
        settings: how the estimate is made.
        stage3_arguments: of DeepSpeed's stage 3, by name.
    """

    reduces_gradients = False

    def __init__(self, settings: ZerothOrderSettings, **stage3_arguments: Any) -> None:
        self._settings = settings
        sides = "one side" if settings.sides == 1 else "two sides"
        reason = f"{settings.num_samples} direction(s) a step, {sides}, eps {settings.eps}"
        super().__init__(Choice(policy="immediate", reason=reason), **stage3_arguments | {"clip_grad": 0.0})

    def set_up(self) -> None:
        super().set_up()
        self._forwards = Forwards(self, list(self.updater.entries), self._settings.paired)
        self._directions: Directions | None = None
        self._update = Point(coefficients={})

    # The forwards ------------------------------------------------------------------------------

    @torch.no_grad()
    def estimate(self, closures: Sequence[LossClosure], num_steps: int) -> Tensor:
        """Run the forwards of a step and decide on its update; ``step`` makes it. Collective.

        Args:
            closures: one for each micro-batch of this rank.
            num_steps: before this one; with the seed it gives the directions.

        Returns:
            The mean of this rank's losses, 0-dim fp32.

        Raises:
            ValueError: see ``mean_losses``; nothing has changed then.
        """
        self._directions = Directions(seed=self.optimizer.seed, step=num_steps)
        estimator = self._settings.estimator
        own, losses = self._losses(closures, estimator.points)
        self._update = Point(coefficients=estimator.coefficients(losses))
        if type(self.optimizer).__name__ == CONSERVATIVE:
            candidates = [candidate.point(self._update) for candidate in CANDIDATES]
            _, losses = self._losses(closures, candidates)
            self._update = chosen(self._update, losses)
        return own.mean().float()

    def _losses(self, closures: Sequence[LossClosure], points: Sequence[Point]) -> tuple[Tensor, list[float]]:
        terms = [partial(self._terms, point) for point in points]
        returned = [self._forwards.at(closure, terms) for closure in closures]
        return mean_losses(returned, torch.device(self.device))

    def _terms(self, point: Point, param: Parameter) -> list[Term]:
        """What leads one parameter to ``point``."""
        assert self._directions is not None, "the step has begun"
        entry = self.updater.entries[param]
        lr = float(self.optimizer.param_groups[entry.group_index]["lr"])
        return self._directions.terms(point, entry.index, lr)

    # The update --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every shard once, and make gathered copies new. Collective."""
        self.begin_step()
        self.release_gathered_params()
        for param, entry in self.updater.entries.items():
            terms = self._terms(self._update, param)
            if terms:
                spec, device = entry.spec, torch.device(self.device)
                grad_shard = combination(terms, spec.start, spec.shard_numel, device)
                self.updater.begin(param, grad_shard, norm=None, loss_scale=1.0)
        self.updater.finish()
        self.updater.end_step()
        self._global_grad_norm = self._expected_norm()
        self.gather_persistent_params()

    def _expected_norm(self) -> float:
        """The estimate's 2-norm, with the squares of the directions' elements at their mean of 1."""
        squares = sum(coefficient**2 for coefficient in self._update.coefficients.values())
        return math.sqrt(squares * sum(full_numel(param) for param in self.updater.entries))

    # What there is none of ---------------------------------------------------------------------

    @property
    def at_step_boundary(self) -> bool:
        """Always: no gradient waits."""
        return True

    def accepts_gradients(self) -> bool:
        return False

    def backward_prologue(self) -> NoReturn:
        raise RuntimeError(f"{type(self.optimizer).__name__} {HOW_TO_STEP}")
