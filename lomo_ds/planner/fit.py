"""Whether a job fits: one definition for plans and for the search."""

from __future__ import annotations

from lomo_ds.planner.dry_run import DryRun
from lomo_ds.planner.job import Job


def fits(job: Job, run: DryRun) -> bool:
    """Whether the peak leaves the card's reserve free, and the host has room where its size is given."""
    return missing_device_bytes(job, run) <= 0 and missing_host_bytes(job, run) <= 0


def missing_device_bytes(job: Job, run: DryRun) -> int:
    """How much the peak and the reserve exceed the card; negative for what is free."""
    return run.device.num_bytes - job.usable_bytes


def host_peak_bytes_per_node(job: Job, run: DryRun) -> int:
    """Peak of tensors on the host, if all ranks of a node reach theirs at the same time."""
    return run.host.num_bytes * job.num_local


def missing_host_bytes(job: Job, run: DryRun) -> int:
    """Host memory that a node lacks; 0 where it suffices, or where its size is not given."""
    if job.host_memory_bytes is None:
        return 0
    return max(0, host_peak_bytes_per_node(job, run) - job.host_memory_bytes)
