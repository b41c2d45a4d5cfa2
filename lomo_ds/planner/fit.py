"""Whether a job fits: one definition for plans and for the search.

It fits where what torch's allocator reserves with expandable segments leaves the card's reserve free, and
where even a device that lags as far as the program permits does not run out of memory: the allocator then
waits for it and gives its cache back, which is slow and loses nothing.
"""

from __future__ import annotations

from lomo_ds.planner.dry_run import DryRun
from lomo_ds.planner.job import Job


def fits(job: Job, run: DryRun) -> bool:
    """Whether the card and, where its size is given, the host have room."""
    return missing_device_bytes(job, run) <= 0 and missing_host_bytes(job, run) <= 0


def missing_device_bytes(job: Job, run: DryRun) -> int:
    """How much the reserved memory and the reserve exceed the card; negative for what is free.

    Where only a device that lags runs out of memory, what the worst case exceeds the card by.
    """
    missing = run.reserved.usual.peak_bytes - job.usable_bytes
    if missing <= 0 and run.reserved.worst_on_card.is_out_of_memory:
        return run.reserved.worst.peak_bytes - job.usable_bytes
    return missing


def host_peak_bytes_per_node(job: Job, run: DryRun) -> int:
    """Peak of tensors on the host, if all ranks of a node reach theirs at the same time."""
    return run.host.num_bytes * job.num_local


def missing_host_bytes(job: Job, run: DryRun) -> int:
    """Host memory that a node lacks; 0 where it suffices, or where its size is not given."""
    if job.host_memory_bytes is None:
        return 0
    return max(0, host_peak_bytes_per_node(job, run) - job.host_memory_bytes)
