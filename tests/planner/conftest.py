"""All dry runs of these tests, in one process of their own."""

from __future__ import annotations

import pytest

from lomo_ds.planner.dry_run import DryRun, dry_run
from tests.planner.child import in_child
from tests.planner.small_jobs import gpu_jobs, tracked_jobs, truth_jobs, zeroth_order_jobs


@pytest.fixture(scope="session")
def dry_runs() -> dict[str, DryRun]:
    """Of all ``small_jobs``, by name."""
    jobs = gpu_jobs() | truth_jobs() | tracked_jobs() | zeroth_order_jobs()
    return dict(zip(jobs, in_child(dry_run, jobs.values()), strict=True))
