"""What one rank measures for comparison with a dry run."""

from __future__ import annotations

from benchmarks.common.resident import PeakMeter, resident_bytes
from lomo_ds.planner.job import Job
from tests.planner.observe import observe


def observe_resident(job: Job) -> tuple[int, int]:
    """(peak of live tensors, growth of resident memory) of this rank, in bytes. Collective."""
    before = resident_bytes()
    meter = PeakMeter()
    peak = observe(job).num_bytes
    return peak, meter.end_phase("all") - before
