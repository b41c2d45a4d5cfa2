"""A dry run predicts the peaks of the same steps with data."""

from __future__ import annotations

import pytest

from lomo_ds.planner.dry_run import DryRun
from tests.harness import run_ranks
from tests.planner.observe import observe, predicted
from tests.planner.small_jobs import truth_jobs

JOBS = truth_jobs()


@pytest.mark.parametrize("name", JOBS)
def test_peak_of_live_tensors(dry_runs: dict[str, DryRun], name: str) -> None:
    job, expected = JOBS[name], predicted(dry_runs[name])
    observed = run_ranks(job.num_gpus, observe, job)[0]
    assert expected.num_bytes == pytest.approx(observed.num_bytes, rel=0.02)
    assert list(expected.by_phase) == list(observed.by_phase)
    for phase, num_bytes in observed.by_phase.items():
        assert expected.by_phase[phase] == pytest.approx(num_bytes, rel=0.05), phase
