"""What one rank measures for the truth of dry runs."""

from __future__ import annotations

from benchmarks.resident import PeakMeter, resident_bytes
from lomo_ds.planner.job import Job
from lomo_ds.planner.observe import observe


def observe_resident(job: Job) -> tuple[int, int]:
    """(peak of live tensors, growth of resident memory) of this rank, in bytes. Collective."""
    before = resident_bytes()
    meter = PeakMeter()
    peak = observe(job).num_bytes
    return peak, meter.end_phase("all") - before
