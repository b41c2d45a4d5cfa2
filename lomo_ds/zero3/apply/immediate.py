"""Each shard is applied inside backward and released: nothing is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lomo_ds.zero3._internals import ReducedGradient
from lomo_ds.zero3.apply.base import ApplyPolicy, PolicyContext, Promises, StepOutcome
from lomo_ds.zero3.apply.grad_norm import GradNorm


class Immediate(ApplyPolicy):
    """Applies a shard as soon as it is reduced; the norm is measured for the log alone."""

    promises: ClassVar[Promises] = Promises(global_clipping=False, accumulation=False, whole_steps=False)

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._norm = GradNorm()

    def on_gradients(self, gradients: Sequence[ReducedGradient], loss_scale: float) -> None:
        updater = self._context.updater
        for param, grad_shard in gradients:
            self._note_arrival(param, "applied")
            squares = self._norm.measure(param, grad_shard)
            updater.begin(param, grad_shard, None, loss_scale, is_view=True, squares=squares)
        updater.advance()

    def on_step(self, loss_scale: float) -> StepOutcome:
        return StepOutcome(grad_norm=self._norm.total(loss_scale), applied=True)

    def forget(self) -> None:
        super().forget()
        self._norm.clear()
