"""ZeRO-3 with each reduced gradient shard applied and released, at once or at the step boundary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.byte_units import shown_bytes
from lomo_ds.optimizers import rule_of
from lomo_ds.rules.clipping import clip_factor, clipped_per_parameter, sum_of_squares
from lomo_ds.rules.rule import Rule, Shard, ShardUpdate, StepSettings
from lomo_ds.zero3._internals import ReducedGradient, Stage3Base, local_shard, process_group, shard_spec
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.apply.host_buffer import HostBuffer
from lomo_ds.zero3.apply.nvme_buffer import NvmeBuffer
from lomo_ds.zero3.collective_errors import failing_together
from lomo_ds.zero3.stalled_updates import StalledUpdates
from lomo_ds.zero3.updater import Updater


class LomoZeroOptimizer(Stage3Base):
    """DeepSpeed's stage 3 with an update rule in place of fp32 copies, states and a gradient buffer.

    Built by the engine. All ranks call every method together.

    Args:
        choice: when shards are applied, and why.
        stage3_arguments: of DeepSpeed's stage 3, by name.

    Attributes:
        choice: when shards are applied, and why.
        overflow: whether the last step was dropped for a gradient norm that was not finite.
        last_norm: the last finite norm under ``lagged`` clipping; None before, and under other clipping.
        updater: the rules, their state and what rounding keeps.
    """

    def __init__(self, choice: Choice, **stage3_arguments: Any) -> None:
        self.choice = choice
        super().__init__(**stage3_arguments)

    # Building ----------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Allocate rule states and the parking. Called by stage 3 when the shards stand."""
        self._accepting = False
        self._measuring = False
        self._warned_stray = False
        self._shards_changed = False
        self._num_taken = 0
        self._group_index = self.group_index()
        self._squares: dict[Parameter, Tensor] = {}
        self._norm: float | None = None
        self.last_norm: float | None = None
        rules = {param: rule_of(self._group(param)) for param in self.trainable_params()}
        self.updater = Updater(rules, self.optimizer.rounding, self.optimizer.seed)
        nearest = self.optimizer.rounding == "nearest"
        self._stalled_updates = StalledUpdates(enabled=nearest and dist.get_rank() == 0)
        self._parking = self._make_parking() if self.choice.policy == "deferred" else None
        if dist.get_rank() == 0:
            logger.info(f"lomo_ds: {type(self.optimizer).__name__}, {self.choice}")

    def _make_parking(self) -> HostBuffer | NvmeBuffer:
        shard_numel, dtype = self._shard_numel(), self.gradient_accumulation_dtype
        device = torch.device(get_accelerator().current_device_name())
        if self.choice.nvme is None:
            return HostBuffer(shard_numel, dtype, device, max_numel_moving=self.reduce_bucket_size)
        with failing_together():
            return NvmeBuffer(shard_numel, dtype, device, self.choice.nvme)

    def _shard_numel(self) -> dict[Parameter, int]:
        return {param: shard_spec(param).shard_numel for param in self.trainable_params()}

    @property
    def gradient_host_bytes(self) -> int:
        """Host memory that this rank keeps for parked gradients, in bytes; 0 unless ``deferred``."""
        return self._parking.num_bytes if self._parking else 0

    @property
    def gradient_file_bytes(self) -> int:
        """Disk that this rank keeps for parked gradients, in bytes; 0 without ``park_to``."""
        return self._parking.num_file_bytes if isinstance(self._parking, NvmeBuffer) else 0

    # Whose gradients ---------------------------------------------------------------------------

    @contextmanager
    def accepting_gradients(self, in_forward: bool = False) -> Iterator[None]:
        """Take the gradients that arrive meanwhile as the engine's own; others are dropped.

        An exception leaves no gradient since the last step behind, but for one in a forward in which none
        had arrived: those of earlier micro-batches stay. What had been applied stays applied.

        Args:
            in_forward: gradients are not to be expected; a model may compute them as soon as its loss.
        """
        before, self._accepting = self._accepting, True
        num_taken = self._num_taken
        try:
            yield
        except BaseException:
            self.forget_unfinished_backward()
            self.updater.forget_pending()
            if not in_forward or self._num_taken > num_taken:
                self._stalled_updates.forget()
                self.zero_grad()
            raise
        finally:
            self._accepting = before

    def accepts_gradients(self) -> bool:
        return self._accepting

    def backward_prologue(self) -> None:
        if self.choice.policy == "two_pass" and not self._accepting:
            raise RuntimeError('"apply": "two_pass" runs backward twice: call engine.backward(loss)')
        self._accepting = True  # a backward through the engine's outputs begins
        super().backward_prologue()

    def backward_epilogue(self) -> None:
        super().backward_epilogue()
        self._accepting = False

    def refuse(self, param: Parameter) -> None:
        """Drop a gradient that no engine asked for; say so once."""
        if not self._warned_stray and dist.get_rank() == 0:
            logger.warning(
                f"a backward that is not the engine's gave a gradient to {self.name_of(param)!r}; such "
                "gradients are dropped and the model is left as it is. Use engine.backward(loss)"
            )
        self._warned_stray = True

    # Inside backward ---------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, gradients: Sequence[ReducedGradient]) -> None:
        """Measure the shards of one reduce bucket and apply or park them. No host sync.

        Collective where a rule needs sums over shards: one small all-reduce.
        """
        self._num_taken += len(gradients)
        for param, grad_shard in gradients:
            if self._parking:
                grad_shard = self._parking.add(param, grad_shard)
            elif self._norm is None:
                self._refuse_second_part(param)
            if self._norm is None:
                self._squares[param] = sum_of_squares(grad_shard)
            if not self._parking and not self._measuring:
                self._begin_update(param, grad_shard.clone() if self._needs_sums(param) else grad_shard)
        self.updater.advance()

    def on_reduced_gradient(self, param: Parameter, grad_shard: Tensor) -> None:
        """Take a gradient shard that was averaged over the ranks elsewhere, not by ZeRO-3. Collective."""
        if not self.accepts_gradients():
            self.refuse(param)
            return
        self.take([ReducedGradient(param, grad_shard)])
        self.updater.finish()

    @property
    def reduced_dtype(self) -> torch.dtype:
        """Of the gradients that ``take`` gets: DeepSpeed's ``data_types.grad_accum_dtype``."""
        return self.gradient_accumulation_dtype

    def independent_gradient_partition_epilogue(self) -> None:
        super().independent_gradient_partition_epilogue()
        self.updater.finish()

    def _refuse_second_part(self, param: Parameter) -> None:
        if param in self._squares:
            numel = sum(self._shard_numel().values())
            parked = shown_bytes(numel * self.gradient_accumulation_dtype.itemsize)
            raise RuntimeError(
                f"a second gradient for {self.name_of(param)!r} since the last engine.step(): the first "
                f'was {"measured" if self._measuring else "applied"} already. Set "optimizer.params.apply" '
                f'to "deferred", where they add up; it takes {parked} of host memory on this rank'
            )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The first of two passes: gradients are measured and dropped, then their norm is known."""
        if self._norm is not None:
            self._refuse_second_part(next(iter(self._squares)))
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
        if self._squares:
            self._norm = float(self._measure_norm())

    @property
    def step_will_apply(self) -> bool:
        """Whether a norm has been measured and is finite, so that the second pass is worth running."""
        return self._norm is not None and math.isfinite(self._norm)

    # One update --------------------------------------------------------------------------------

    def _group(self, param: Parameter) -> dict[str, Any]:
        return self.optimizer.param_groups[self._group_index[param]]

    def _needs_sums(self, param: Parameter) -> bool:
        return self.updater.entries[param].rule.needs_sums or self._clips_per_parameter

    @property
    def _clips_per_parameter(self) -> bool:
        """Also ``lagged`` does, in the one step that has no norm before it."""
        first_lagged = self.optimizer.clipping == "lagged" and self.last_norm is None
        return self.clip_grad > 0 and (self.optimizer.clipping == "per_parameter" or first_lagged)

    def _begin_update(self, param: Parameter, grad_shard: Tensor) -> None:
        self._shards_changed = True
        group = self._group(param)
        if group["lr"] > 0 and not self.updater.entries[param].rule.keeps_master_weights:
            self._stalled_updates.before_update(local_shard(param), grad_shard)

        def update(rule: Rule, shard: Shard, num_updates: int) -> ShardUpdate:
            settings = StepSettings(
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                grad_scale=self._grad_scale(),
                clip_value=self.clip_grad
                if self.optimizer.clipping == "value" and self.clip_grad > 0
                else None,
                step=num_updates,
            )
            if self._clips_per_parameter:
                return clipped_per_parameter(rule, shard, settings, self.clip_grad)
            return rule.update_(shard, settings)

        self.updater.begin(param, grad_shard, update)

    def _grad_scale(self) -> float:
        """The factor on every gradient: the loss scale taken back, and the clipping by a global norm."""
        norm = {"global": self._norm, "lagged": self.last_norm}.get(self.optimizer.clipping)
        return (1.0 if norm is None else clip_factor(norm, self.clip_grad)) / self.loss_scale

    # The step boundary -------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """End the step: measure the global norm, apply what is parked, make gathered copies new.

        A norm that is not finite drops the whole step unless ``immediate`` has applied it already;
        ``overflow`` then is True and a dynamic loss scale falls.

        Raises:
            RuntimeError: no gradient has arrived since the last step.

        Cost: one all-reduce of a scalar; under ``deferred`` one copy of the gradient shards to the
            device, some at a time, and one host sync.
        """
        if not self._squares:
            raise RuntimeError("no gradient since the last step: call engine.backward(loss) first")
        self.begin_step()
        self.release_gathered_params()
        self._global_grad_norm = self._measure_norm() if self._norm is None else self._norm
        self.overflow = False
        if self.choice.policy != "immediate":
            self._norm = float(self._global_grad_norm)
            self.overflow = not self.step_will_apply
        if self.overflow:
            logger.warning(f"the gradient norm is {self._norm}: the whole step is dropped")
        elif self._parking:
            self._apply_parked()
        self._end_step()

    def _apply_parked(self) -> None:
        self._parking.wait()
        numel = 0
        for param in self._squares:
            self._begin_update(param, self._parking.fetch(param))
            numel += shard_spec(param).numel
            if numel >= self.reduce_bucket_size:
                self.updater.advance()
                numel = 0
        self.updater.finish()

    def _end_step(self) -> None:
        if self.optimizer.clipping == "lagged" and math.isfinite(norm := float(self._global_grad_norm)):
            self.last_norm = norm
        self.scale_after(self.overflow)
        self._stalled_updates.end_step()
        self.gather_persistent_params()
        self._shards_changed = False
        self.zero_grad()

    def _measure_norm(self) -> Tensor:
        """The unscaled gradient's 2-norm over all parameters and ranks: 0-dim fp64, on the device."""
        group = process_group(next(iter(self._squares)))
        total = torch.stack(list(self._squares.values())).sum()
        dist.all_reduce(total, group=group)
        return total.sqrt() / self.loss_scale

    def refresh_gathered_params(self) -> None:
        """Make gathered copies new where shards changed and no step has ended, as before an evaluation."""
        if self._shards_changed:
            self.release_gathered_params()
            self.gather_persistent_params()
            self._shards_changed = False

    @property
    def at_step_boundary(self) -> bool:
        """Whether no gradient has arrived since the last step."""
        return not self._squares

    @contextmanager
    def replacing_shards(self) -> Iterator[None]:
        """Let the block write to the shards; gathered copies are made new and gradients forgotten after it.

        Collective.
        """
        self.release_gathered_params()
        self.zero_grad()
        yield
        self.gather_persistent_params()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient that has arrived since the last step."""
        super().zero_grad(set_to_none)
        self._squares.clear()
        self._norm = None
        if self._parking:
            self._parking.clear()
