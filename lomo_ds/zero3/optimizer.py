"""ZeRO-3 with each reduced gradient shard handed to a policy, which has it applied and released."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.config import first_few
from lomo_ds.zero3._internals import ReducedGradient, Stage3Base
from lomo_ds.zero3.admission import Admission
from lomo_ds.zero3.apply.base import OnePass, PolicyContext, StepOutcome
from lomo_ds.zero3.apply.build import make_policy
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.exact_weights import ExactWeights
from lomo_ds.zero3.frozen_params import FrozenParams
from lomo_ds.zero3.grad_clip import GradClip
from lomo_ds.zero3.gradient_gate import GradientGate
from lomo_ds.zero3.param_access import ParamAccess
from lomo_ds.zero3.param_checks import several_dtypes
from lomo_ds.zero3.param_specs import param_specs
from lomo_ds.zero3.updater import Updater


class LomoZeroOptimizer(Admission, ParamAccess, Stage3Base):
    """DeepSpeed's stage 3 with update rules in place of fp32 copies, states and a gradient buffer.

    Built by the engine. All ranks call every method together. A gradient shard goes from DeepSpeed's
    reduction to the policy, from the policy to the updater, and from its rule into the parameter's shard.

    Args:
        choice: when shards are applied, and why.
        stage3_arguments: of DeepSpeed's stage 3, by name.

    Attributes:
        choice: when shards are applied, and why.
        policy: applies them.
        updater: the rules, their state and what rounding keeps.
        clip: how gradients are clipped.
        stream: on which shards are written.
        frozen_params: those for which nothing is kept.
        exact_weights: reads and replaces weights; see ``ParamAccess``.
        overflow: whether the last step was dropped for a gradient norm that was not finite.
        num_skipped_params: parameters that the last step left as they were, under ``immediate``, since their
            gradients were not finite.
    """

    def __init__(self, choice: Choice, **stage3_arguments: Any) -> None:
        self.choice = choice
        super().__init__(**stage3_arguments)

    # Building ----------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Allocate the rules' states and the policy's buffer. Called by stage 3 when it has its shards."""
        self._gate = GradientGate()
        self.clip = GradClip(self.optimizer.clipping, self.clip_grad)
        self.stream = self.shard_stream()
        self.before_gathers(self.stream.let_gathers_follow)
        specs = param_specs(self.module, self.owned_params())
        self.updater = Updater(self.optimizer, self.clip, specs, self.group_index(), self.stream)
        context = PolicyContext(
            updater=self.updater, bucket_numel=self.reduce_bucket_size, name_of=self.name_of
        )
        self.policy = make_policy(self.choice, context, self)
        self.frozen_params = FrozenParams(self.module.parameters(), specs, self.param_names)
        self.admit([param for param in specs if param.requires_grad])
        self.exact_weights = ExactWeights(self.updater, self.optimizer.rounding)
        self.surround_edits(self.exact_weights.while_edited)
        self.num_skipped_params = 0
        if dist.get_rank() == 0:
            logger.info(f"lomo_ds: {type(self.optimizer).__name__}, {self.choice}")
            if found := several_dtypes(self.module):
                logger.info(f"lomo_ds: {found}")

    # Whose gradients ---------------------------------------------------------------------------

    @contextmanager
    def accepting_gradients(self, in_forward: bool = False) -> Iterator[None]:
        """Accept the gradients that arrive meanwhile as the engine's own; others are dropped.

        An exception leaves no gradient since the last step behind, but for one in a forward in which none
        had arrived: those of earlier micro-batches stay. What had been applied stays applied.

        Args:
            in_forward: gradients are not to be expected; a model may compute them as soon as its loss.
        """
        num_before = self._gate.num_received
        with self._gate.opened():
            try:
                yield
            except BaseException:
                self.stream.publish()
                self.forget_unfinished_backward()
                self.updater.forget_pending()
                if not in_forward or self._gate.num_received > num_before:
                    self.updater.stalled.forget()
                    self.zero_grad()
                raise

    def accepts_gradients(self) -> bool:
        return self._gate.is_open

    def backward_prologue(self) -> None:
        if self.policy.owns_backward and not self._gate.is_open:
            raise RuntimeError(
                f'"apply": "{self.choice.policy}" runs backward itself: call engine.backward(loss)'
            )
        self._gate.is_open = True  # a backward through the engine's outputs begins
        super().backward_prologue()

    def backward_epilogue(self) -> None:
        super().backward_epilogue()
        self._gate.is_open = False

    def on_stray_gradient(self, param: Parameter) -> None:
        """Drop a gradient that no engine asked for; say so once."""
        self._gate.warn_of_stray(self.name_of(param))

    # Inside backward ---------------------------------------------------------------------------

    def run_backward(self, one_pass: OnePass, loss: Tensor, retain_graph: bool) -> Tensor:
        """Run backward as often as the policy needs it."""
        return self.policy.run_backward(one_pass, loss, retain_graph, self.loss_scale)

    @torch.no_grad()
    def on_gradients(self, gradients: Sequence[ReducedGradient]) -> None:
        """Receive the shards of one reduce bucket. No host sync.

        Collective where a rule needs sums over shards: one small all-reduce.
        """
        self._gate.num_received += len(gradients)
        self.policy.on_gradients(gradients, self.loss_scale)

    def on_reduced_gradient(self, param: Parameter, grad_shard: Tensor) -> None:
        """Receive a gradient shard that was averaged over the ranks elsewhere, not by ZeRO-3. Collective.

        Args:
            param: whose it is.
            grad_shard: shape (shard_numel,), in its ``reduced_dtype``.
        """
        if not self.accepts_gradients():
            self.on_stray_gradient(param)
            return
        with self.stream.writing(grad_shard):
            self.on_gradients([ReducedGradient(param, grad_shard)])
            self.updater.finish()

    def independent_gradient_partition_epilogue(self) -> None:
        super().independent_gradient_partition_epilogue()
        with self.stream.writing():
            self.updater.finish()
        self.stream.publish()

    # The step boundary -------------------------------------------------------------------------

    @property
    def at_step_boundary(self) -> bool:
        """Whether no gradient has arrived since the last step."""
        return not self.policy.has_gradients

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """End the step: apply what the policy has not applied yet, and make gathered copies new.

        A norm that is not finite drops the whole step unless ``immediate`` has applied it already;
        ``overflow`` then is True and a dynamic loss scale falls.

        Raises:
            RuntimeError: no gradient has arrived since the last step.

        Cost: one all-reduce of a scalar; under ``deferred`` one copy of the gradient shards to the
            device, some at a time, and one host sync.
        """
        if self.at_step_boundary:
            raise RuntimeError("no gradient since the last step: call engine.backward(loss) first")
        self.begin_step()
        self.release_gathered_params()
        with self.stream.writing():
            outcome = self.policy.on_step(self.loss_scale)
            self.clip.end_step(outcome.grad_norm)
            self._note_skipped(self.updater.end_step())
        self.stream.publish()
        self._note_outcome(outcome)
        self.gather_persistent_params(self.updater.entries)
        self.zero_grad()
        self.warn_of_allocator_flushes()

    def _note_outcome(self, outcome: StepOutcome) -> None:
        """Keep the norm, and let a dynamic loss scale fall where the step was dropped."""
        self._global_grad_norm = outcome.grad_norm
        self.overflow = not outcome.applied
        if self.overflow:
            logger.warning(f"the gradient norm is {float(outcome.grad_norm)}: the whole step is dropped")
        self.scale_after(self.overflow)

    def _note_skipped(self, names: list[str]) -> None:
        """Say which parameters the step has left as they were."""
        self.num_skipped_params = len(names)
        if names and dist.get_rank() == 0:
            logger.warning(
                f"{len(names)} parameters were left as they are in this step, since their gradients are not "
                f"finite: {first_few(names)}"
            )

    def refresh_gathered_params(self) -> None:
        """Before a forward: make gathered copies new where shards changed and no step has ended."""
        if self.updater.shards_changed:
            self.release_gathered_params()
            self.gather_persistent_params(self.updater.entries)
            self.updater.shards_changed = False

    @contextmanager
    def replacing_shards(self) -> Iterator[None]:
        """Let the block write to the shards; gathered copies are made new and gradients forgotten after it.

        Collective.
        """
        self.release_gathered_params()
        self.zero_grad()
        with self.stream.writing():
            yield
        self.stream.publish()
        self.gather_persistent_params(self.module.parameters())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient that has arrived since the last step."""
        super().zero_grad(set_to_none)
        self.policy.forget()
        self.updater.forget_skipped()

    # What is saved -----------------------------------------------------------------------------

    def step_state(self) -> dict[str, Any]:
        """What the next step depends on apart from tensors: ``loss_scaler`` and ``last_norm``."""
        return {"loss_scaler": self.scaler_state(), "last_norm": self.clip.last_norm}

    def load_step_state(self, state: Mapping[str, Any]) -> None:
        """Continue from ``step_state``."""
        self.set_scaler_state(state["loss_scaler"])
        self.clip.last_norm = state["last_norm"]

    @property
    def gradient_host_bytes(self) -> int:
        """Host memory that this rank keeps for offloaded gradients, in bytes; 0 unless ``deferred``."""
        return self.policy.host_bytes

    @property
    def gradient_file_bytes(self) -> int:
        """Disk that this rank keeps for offloaded gradients, in bytes; 0 without ``nvme_path``."""
        return self.policy.file_bytes
