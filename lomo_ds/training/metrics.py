"""What a step reports, and the file it is written to."""

from __future__ import annotations

import json
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
        lr: the rate that the step used; the adapters' where they alone are trained.
        grad_norm: L2 norm of the whole gradient, before clipping.
        tokens_per_s: tokens read by all ranks (without padding) over the step's seconds.
        peak_memory_bytes: the most that any rank has held so far; see ``memory.peak_source``.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    peak_memory_bytes: int


def sums_and_peak(loss_sum: float, num_tokens: int, peak_bytes: int, device: Any) -> tuple[float, int, int]:
    """Loss and tokens summed over the ranks in fp64, the largest of the peaks. Collective."""
    own = torch.tensor([loss_sum, num_tokens, peak_bytes], dtype=torch.float64, device=device)
    everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, own)
    table = torch.stack(everyones).cpu()
    return table[:, 0].sum().item(), int(table[:, 1].sum()), int(table[:, 2].max())


def append_line(path: Path, metrics: StepMetrics) -> None:
    """Add one line to a metrics file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(metrics)) + "\n")
