"""The same steps with data, for comparison with a dry run."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from lomo_ds.planner.dry_run import NUM_STEPS, DryRun, build_engine, run_step
from lomo_ds.planner.job import Job
from lomo_ds.planner.ledger import Ledger

_PATIENCE_S = 0.02
"""Gloo's threads keep a collective's tensors until they run again: on a busy machine for milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Peak bytes of one rank's live tensors, host and device together.

    Attributes:
        num_bytes: over all phases.
        by_phase: phase -> peak bytes in it.
    """

    num_bytes: int
    by_phase: dict[str, int]


def observe(job: Job) -> Peaks:
    """Load, initialize and step as a dry run does, on this rank of a real group of CPU ranks. Collective.

    Args:
        job: of CPU ranks, as many as the group has.

    Raises:
        ValueError: the job is for other ranks.
    """
    if job.device != "cpu" or job.num_gpus != dist.get_world_size():
        raise ValueError("observe runs a job of CPU ranks on a group of as many")
    ledger = Ledger(patience_s=_PATIENCE_S)
    with ledger:
        engine = build_engine(job, ledger)
        for step in range(NUM_STEPS):
            run_step(engine, job, ledger, f"step {step + 1}")
        del engine
    by_phase = {phase: peaks["host"].num_bytes for phase, peaks in ledger.peaks.items()}
    return Peaks(num_bytes=max(by_phase.values()), by_phase=by_phase)


def predicted(run: DryRun) -> Peaks:
    """The same figures of a dry run."""
    return Peaks(
        num_bytes=run.host.num_bytes, by_phase={phase: host for phase, (_, host) in run.phase_peaks.items()}
    )
