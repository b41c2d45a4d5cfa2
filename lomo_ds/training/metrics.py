"""The figures of a step, and the file that they are written to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Attributes:
        step: from 1.
        loss: mean over the answer tokens of the global batch, before the step's update.
        lr: learning rate of the step; that of the adapters where only they are trained.
        grad_norm: L2 norm of the whole gradient, before clipping.
        tokens_per_s: tokens of all ranks, without padding, divided by the step's seconds.
        peak_memory_bytes: largest peak of any rank so far; see ``memory.peak_source``.
        num_skipped_params: parameters that the step left as they were, since their gradients were not finite.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    peak_memory_bytes: int
    num_skipped_params: int = 0


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of a step's figures, or those of all ranks together.

    Attributes:
        loss_sum: negative log-likelihood, summed over the answer tokens.
        num_tokens: tokens of the inputs, without padding.
        peak_bytes: peak memory so far.
        stop_requested: whether a rank has been told to stop.
    """

    loss_sum: float
    num_tokens: int
    peak_bytes: int
    stop_requested: bool

    def of_all_ranks(self, device: Any) -> Share:
        """Sums in fp64, the largest peak, and whether any rank should stop. Collective: one small gather."""
        numbers = [self.loss_sum, self.num_tokens, self.peak_bytes, self.stop_requested]
        own = torch.tensor(numbers, dtype=torch.float64, device=device)
        everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, own)
        table = torch.stack(everyones).cpu()
        return Share(
            loss_sum=table[:, 0].sum().item(),
            num_tokens=int(table[:, 1].sum()),
            peak_bytes=int(table[:, 2].max()),
            stop_requested=bool(table[:, 3].any()),
        )


def append_line(path: Path, metrics: StepMetrics) -> None:
    """Add one line to a metrics file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(_line(metrics))


def write_lines(path: Path, history: Iterable[StepMetrics]) -> None:
    """Replace a metrics file."""
    scratch = path.with_name(f".{path.name}-new")
    scratch.write_text("".join(map(_line, history)), encoding="utf-8")
    os.replace(scratch, path)


def _line(metrics: StepMetrics) -> str:
    return json.dumps(asdict(metrics)) + "\n"
