"""A dry run, and what it costs the process that makes it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.common.resident import high_water_bytes
from lomo_ds.planner.dry_run import DryRun, dry_run
from lomo_ds.planner.job import Job


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A dry run and its cost.

    Attributes:
        run: the dry run.
        cpu_s: processor seconds of the whole process, imports included.
        resident_bytes: peak resident memory of the process (VmHWM).
    """

    run: DryRun
    cpu_s: float
    resident_bytes: int


def plan_measured(job: Job) -> Planned:
    """Dry-run a job as the only work of this process."""
    run = dry_run(job)
    return Planned(run=run, cpu_s=time.process_time(), resident_bytes=high_water_bytes())
