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

from lomo_ds.rules import lomo
from lomo_ds.rules.clipping import clip_factor, sum_of_squares
from lomo_ds.zero3._internals import ReducedGradient, Stage3Seam, local_shard, process_group, shard_spec
from lomo_ds.zero3.parking import Parking
from lomo_ds.zero3.policy import Choice


class LomoZeroOptimizer(Stage3Seam):
    """DeepSpeed's stage 3 with LOMO's update in place of fp32 copies, states and a gradient buffer.

    Built by the engine. All ranks call every method together.

    Args:
        choice: when shards are applied, and why.
        stage3_arguments: of DeepSpeed's stage 3, by name.

    Attributes:
        overflow: whether the last step was dropped for a gradient norm that was not finite.
    """

    def __init__(self, choice: Choice, **stage3_arguments: Any) -> None:
        self.choice = choice
        super().__init__(**stage3_arguments)

    # Building ----------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Allocate the parking where shards are deferred. Called by stage 3 when the shards stand."""
        self._accepting = False
        self._warned_stray = False
        self._shards_changed = False
        self._group_index = self.group_index()
        self._squares: dict[Parameter, Tensor] = {}
        self._device = torch.device(get_accelerator().current_device_name())
        self._parking = None
        if self.choice.deferred:
            shard_numel = {param: shard_spec(param).shard_numel for param in self.trainable_params()}
            self._parking = Parking(shard_numel, self.gradient_accumulation_dtype, self._device)
        if dist.get_rank() == 0:
            logger.info(f"lomo_ds: {type(self.optimizer).__name__}, {self.choice}")

    @property
    def parked_host_bytes(self) -> int:
        """Host memory that this rank keeps for parked gradients, in bytes; 0 under ``immediate``."""
        return self._parking.num_bytes if self._parking else 0

    # Inside backward ---------------------------------------------------------------------------

    @contextmanager
    def accepting_gradients(self) -> Iterator[None]:
        """Take the gradients that arrive meanwhile as the engine's own; others are dropped.

        An exception leaves no gradient of the broken backward behind. What ``immediate`` had applied
        before it stays applied.
        """
        before, self._accepting = self._accepting, True
        try:
            yield
        except BaseException:
            self.forget_unfinished_backward()
            self.zero_grad()
            raise
        finally:
            self._accepting = before

    def accepts_gradients(self) -> bool:
        return self._accepting

    def backward_prologue(self) -> None:
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

    @torch.no_grad()
    def take(self, gradients: Sequence[ReducedGradient]) -> None:
        """Apply or park the shards of one reduce bucket and measure them. No host sync."""
        for param, grad_shard in gradients:
            if self._parking:
                grad_shard = self._parking.add(param, grad_shard)
            else:
                self._refuse_second_part(param)
                self._apply(param, grad_shard, grad_scale=1.0)
            self._squares[param] = sum_of_squares(grad_shard)

    def _refuse_second_part(self, param: Parameter) -> None:
        if param in self._squares:
            raise RuntimeError(
                f"a second gradient for {self.name_of(param)!r} since the last engine.step(): the first "
                'was applied already. Set "optimizer.params.apply" to "deferred", where they add up'
            )

    def _apply(self, param: Parameter, grad_shard: Tensor, grad_scale: float) -> None:
        group = self.optimizer.param_groups[self._group_index[param]]
        hyper = lomo.Hyper(
            lr=float(group["lr"]), weight_decay=float(group["weight_decay"]), grad_scale=grad_scale
        )
        lomo.apply_(local_shard(param), grad_shard, hyper)
        self._shards_changed = True

    # The step boundary -------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """End the step: measure the global norm, apply what is parked, make gathered copies new.

        A norm that is not finite drops the whole step under ``deferred``; ``overflow`` then is True.

        Raises:
            RuntimeError: no gradient has arrived since the last step.

        Cost: one all-reduce of a scalar; under ``deferred`` one copy of the gradient shards to the
            device, one at a time, and one host sync.
        """
        if not self._squares:
            raise RuntimeError("no gradient since the last step: call engine.backward(loss) first")
        self.begin_step()
        self.release_gathered_params()
        self._global_grad_norm = self._measure_norm()
        self.overflow = False
        if self._parking:
            self._apply_parked(float(self._global_grad_norm))
        self.gather_persistent_params()
        self._shards_changed = False
        self.zero_grad()

    def _measure_norm(self) -> Tensor:
        """The 2-norm of the gradient over all parameters and ranks: a 0-dim fp64 tensor on the device."""
        group = process_group(next(iter(self._squares)))
        total = torch.stack(list(self._squares.values())).sum()
        dist.all_reduce(total, group=group)
        return total.sqrt()

    def _apply_parked(self, grad_norm: float) -> None:
        self.overflow = not math.isfinite(grad_norm)
        if self.overflow:
            logger.warning(f"the gradient norm is {grad_norm}: the whole step is dropped")
            return
        grad_scale = clip_factor(grad_norm, self.clip_grad)
        for param in self._squares:
            self._apply(param, self._parking.fetch(param), grad_scale)

    def refresh_gathered_params(self) -> None:
        """Make gathered copies new where shards changed and no step has ended, as before an evaluation."""
        if self._shards_changed:
            self.release_gathered_params()
            self.gather_persistent_params()
            self._shards_changed = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient that has arrived since the last step."""
        super().zero_grad(set_to_none)
        self._squares.clear()
        if self._parking:
            self._parking.clear()
