"""DeepSpeed's engine for methods that train with forwards alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from lomo_ds.zero3._internals import EngineBase
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.engine import LomoEngine
from lomo_ds.zero3.step import LossClosure, Phase, no_phase
from lomo_ds.zero3.vocabulary.tiled_functions import TiledVocabularyConfig
from lomo_ds.zero3.zeroth_order.optimizer import HOW_TO_STEP, ZerothOrderOptimizer
from lomo_ds.zo.settings import DirectionSettings


class ZerothOrderEngine(LomoEngine):
    """``DeepSpeedEngine`` that makes its steps by ``train_batch``; a plain forward is an evaluation.

    Args:
        settings: how a step's gradient is estimated.
        choice: when gradient shards are applied, where some groups are trained by gradients; else None.
        engine_arguments: of DeepSpeed's engine, by name.
    """

    owns_forwards: ClassVar[bool] = True

    def __init__(self, settings: DirectionSettings, choice: Choice | None, **engine_arguments: Any) -> None:
        self._settings, self._choice_of_gradients = settings, choice
        self._builds_graph = False
        EngineBase.__init__(self, **engine_arguments)
        self.set_gradient_accumulation_boundary(True)

    def make_sharded_optimizer(self, **stage3_arguments: Any) -> ZerothOrderOptimizer:
        return ZerothOrderOptimizer(self._settings, self._choice_of_gradients, **stage3_arguments)

    def tile_vocabulary(self, config: TiledVocabularyConfig) -> None:
        """Nothing: a forward has no gradients of the vocabulary that could be in tiles."""
        assert not config.enabled, "refused before"

    def train_batch(self, closures: Sequence[LossClosure], phase: Phase = no_phase) -> Tensor:
        """Make one step; see ``StepEngine``. Collective.

        Each closure is called at several points around the weights, without a graph, on the same data and
        with the same random numbers. Its loss need not be differentiable: accuracy will do. Where some groups
        are trained by gradients, it has to be, and each closure is called once more with a graph.

        Args:
            closures: one for each micro-batch of the step, each returning one number: the mean over this
                rank's examples, as a tensor or a Python number.
            phase: surrounds its parts.

        Returns:
            The mean of the losses that the estimate was made of, on this rank: 0-dim.

        Raises:
            ValueError: not one closure for each micro-batch, or a loss that is not one finite number; on all
                ranks, and nothing has changed then.
        """
        self._require_all_closures(closures)
        with torch.no_grad(), phase("forward"):
            loss = self.optimizer.estimate(closures, self.global_steps)
        if self.optimizer.by_gradient:
            self._run_backwards(closures, phase)
        with phase("update"):
            EngineBase.step(self)
        return loss

    def _run_backwards(self, closures: Sequence[LossClosure], phase: Phase) -> None:
        """Forward and backward of each micro-batch on the weights, for what is trained by gradients."""
        self._builds_graph = True
        try:
            for closure, start in zip(closures, self.optimizer.random_states, strict=True):
                start.restore()
                with self.optimizer.others_frozen():
                    with phase("forward"):
                        loss = closure()
                    with phase("backward"):
                        LomoEngine.backward(self, loss)
        finally:
            self._builds_graph = False

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model: at a point of ``train_batch`` within it, else on the weights. Collective."""
        if self._builds_graph:
            return LomoEngine.forward(self, *inputs, **kwargs)
        self.optimizer.admit_thawed()
        self.optimizer.refresh_gathered_params()
        return EngineBase.forward(self, *inputs, **kwargs)

    def backward(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse.

        Raises:
            RuntimeError: always; says what to call.
        """
        raise RuntimeError(f"engine.backward: {self._method} {HOW_TO_STEP}")

    def step(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse.

        Raises:
            RuntimeError: always; says what to call.
        """
        raise RuntimeError(f"engine.step: {self._method} {HOW_TO_STEP}")

    @property
    def _method(self) -> str:
        return type(self.optimizer.optimizer).__name__
