"""Noticing that a run does not move because its updates are smaller than the weights' spacing."""

from __future__ import annotations

import torch
from deepspeed.utils import logger
from torch import Tensor

_SAMPLE_NUMEL = 1024


class StalledUpdates:
    """Says once when most of a step's updates were rounded away.

    Looks at the first elements of every shard, in the steps 1, 2, 4, 8 and so on: an element whose
    gradient is not 0 and whose weight is as before was rounded away.

    Args:
        enabled: whether to look at all; only rounding to nearest loses updates.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._num_steps = 0
        self._samples: list[tuple[Tensor, Tensor, Tensor]] = []

    def before_update(self, param_shard: Tensor, grad_shard: Tensor) -> None:
        """Remember a sample of a shard that is about to be updated at a learning rate above 0."""
        step = self._num_steps + 1
        if self._enabled and step & (step - 1) == 0 and param_shard.dtype != torch.float32:
            sample = param_shard[:_SAMPLE_NUMEL]
            self._samples.append((sample, sample.clone(), grad_shard[: sample.numel()] != 0))

    def end_step(self) -> None:
        """Compare the samples, and warn. Waits for the device in the steps that are looked at."""
        self._num_steps += 1
        if not self._samples:
            return
        asked = sum(moves.sum() for _, _, moves in self._samples)
        lost = sum(((now == then) & moves).sum() for now, then, moves in self._samples)
        self._samples.clear()
        share = float(lost) / max(1, int(asked))
        if share > 0.5:
            self._enabled = False
            logger.warning(
                f"{share:.0%} of the updates of step {self._num_steps} were rounded away: they are smaller "
                'than half the spacing of the weights. Set "optimizer.params.rounding" to "stochastic" '
                '(no memory), "compensated8" (1 byte per parameter) or "kahan" (2), or raise the learning '
                "rate"
            )

    def forget(self) -> None:
        """Drop the samples of a step that was not applied."""
        self._samples.clear()
