"""DeepSpeed's engine with LOMO's optimizer in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import torch
from deepspeed.utils import logger
from torch import Tensor

from lomo_ds.zero3._internals import EngineBase
from lomo_ds.zero3.activation_offload import checkpoints_on_host
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.optimizer import LomoZeroOptimizer
from lomo_ds.zero3.step import LossClosure, Phase, backward_and_step, no_phase
from lomo_ds.zero3.vocabulary.tiled_functions import TiledVocabularyConfig
from lomo_ds.zero3.vocabulary.tiled_modules import TiledVocabulary


class LomoEngine(EngineBase):
    """``DeepSpeedEngine`` whose gradients are applied shard by shard; used like DeepSpeed's.

    Args:
        choice: when gradient shards are applied.
        engine_arguments: of DeepSpeed's engine, by name.

    Attributes:
        tiles_vocabulary: whether a forward with labels returns a loss and no logits.
        owns_forwards: see ``StepEngine``.
        checkpointer: a ``lomo_ds.checkpoint.checkpointer.Checkpointer``, set by ``lomo_ds.initialize``.
    """

    tiles_vocabulary = False
    owns_forwards: ClassVar[bool] = False
    checkpointer: Any = None

    def __init__(self, choice: Choice, **engine_arguments: Any) -> None:
        self._choice = choice
        super().__init__(**engine_arguments)

    def make_sharded_optimizer(self, **stage3_arguments: Any) -> LomoZeroOptimizer:
        return LomoZeroOptimizer(self._choice, **stage3_arguments)

    def tile_vocabulary(self, config: TiledVocabularyConfig) -> None:
        """Train with the head and the embedding in tiles, where the JSON asks for it."""
        self.tiles_vocabulary = config.enabled
        if config.enabled:
            TiledVocabulary(self.module, self.optimizer, config)

    def train_batch(self, closures: Sequence[LossClosure], phase: Phase = no_phase) -> Tensor:
        """Make one step from forward, backward and ``step``; see ``StepEngine``. Collective.

        Raises:
            ValueError: not one closure for each micro-batch; nothing has changed then.
        """
        self._require_all_closures(closures)
        return backward_and_step(self, closures, phase)

    def _require_all_closures(self, closures: Sequence[LossClosure]) -> None:
        num_micro_batches = self.gradient_accumulation_steps()
        if len(closures) != num_micro_batches:
            raise ValueError(
                f"engine.train_batch: {len(closures)} closures for a step of {num_micro_batches} "
                'micro-batches ("gradient_accumulation_steps"): pass one for each'
            )

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model. Collective: ZeRO-3 gathers each layer on all ranks."""
        self.optimizer.admit_thawed()
        self.optimizer.refresh_gathered_params()
        with self.optimizer.accepting_gradients(in_forward=True), self._saving_activations():
            return super().forward(*inputs, **kwargs)

    def _saving_activations(self) -> AbstractContextManager:
        """Where activation checkpoints are kept: on the device, or on its host where the JSON says so."""
        if self.offloads_checkpoints() and self.device.type != "cpu" and torch.is_grad_enabled():
            return checkpoints_on_host(self.device)
        return nullcontext()

    def backward(
        self,
        loss: Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        learning_rate: float | None = None,
    ) -> Tensor:
        """Run backward; every gradient shard is applied or offloaded inside it. Collective.

        Args:
            loss: a scalar; each rank's mean over its own examples.
            retain_graph: as in torch.
            scale_wrt_gas: divide the loss by ``gradient_accumulation_steps``.
            learning_rate: not used; for ``optim="lomo"`` and ``"adalomo"`` transformers' Trainer passes the
                schedule's, which is the optimizer's.

        Returns:
            The loss, divided where ``scale_wrt_gas``.

        Raises:
            ValueError: no scalar with a gradient; nothing has changed then.
        """
        one_pass = partial(self._one_backward, scale_wrt_gas=scale_wrt_gas)
        with self._telling_of_failures():
            _require_differentiable_scalar(loss)
            return self.optimizer.run_backward(one_pass, loss, retain_graph)

    def coalesce_grad_reduction(self) -> AbstractContextManager:
        """Refused: a whole gradient would have to be kept on every rank.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "engine.coalesce_grad_reduction() keeps the whole gradient of all its backwards on every rank, "
            'which this engine is there to avoid: set "gradient_accumulation_steps", with '
            '"optimizer.params.apply" at "auto" or "deferred", and leave it out'
        )

    def _one_backward(self, loss: Tensor, retain_graph: bool, scale_wrt_gas: bool) -> Tensor:
        with self.optimizer.accepting_gradients():
            return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    @contextmanager
    def _telling_of_failures(self) -> Iterator[None]:
        """Log which rank failed in backward: the others cannot know, and wait."""
        try:
            yield
        except Exception as error:
            logger.error(
                f"rank {self.global_rank}: backward failed: {type(error).__name__}: {error}. Unless all "
                "ranks failed alike, the others now wait for this one: let the exception end the process"
            )
            raise

    def get_global_grad_norm(self) -> float | None:
        """The gradient's 2-norm over all parameters and ranks in the last step, before clipping.

        None before the first step. Waits for the device.
        """
        norm = super().get_global_grad_norm()
        return None if norm is None else float(norm)

    # Checkpoints -------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | PathLike,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        **options: Any,
    ) -> bool:
        """Save everything that the next step depends on; see ``Checkpointer.save``. Collective."""
        return self.checkpointer.save(
            save_dir, tag, client_state, save_latest, exclude_frozen_parameters, **options
        )

    def load_checkpoint(
        self,
        load_dir: str | PathLike,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable | None = None,
        **options: Any,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Resume from a checkpoint, on any number of ranks; see ``Checkpointer.load``. Collective."""
        return self.checkpointer.load(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
            **options,
        )

    def wait_for_checkpoint(self) -> None:
        """Wait for a checkpoint that is being written during training. Collective."""
        self.checkpointer.wait()


def _require_differentiable_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(
            f"engine.backward(loss): loss has to be a tensor of one element, not {given}: pass the mean over "
            "this rank's examples as the model returned it"
        )
    if loss.grad_fn is None:
        cause = (
            "it is a constant, was detached or computed under torch.no_grad(), or depends on nothing trained"
        )
        if not torch.is_grad_enabled():
            cause = "torch.no_grad() is in force"
        raise ValueError(f"engine.backward(loss): loss has no gradient: {cause}")
