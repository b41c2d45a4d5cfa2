"""A dry run foresees what the same steps take with data."""

from __future__ import annotations

import pytest

from lomo_ds.planner.child import in_child
from lomo_ds.planner.observe import Peaks, foresee, observe
from tests.harness import run_ranks
from tests.planner.small_jobs import truth_jobs

JOBS = truth_jobs()


@pytest.fixture(scope="module")
def foreseen() -> dict[str, Peaks]:
    return dict(zip(JOBS, in_child(foresee, JOBS.values()), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_peak_of_live_tensors(foreseen: dict[str, Peaks], name: str) -> None:
    job = JOBS[name]
    observed = run_ranks(job.num_gpus, observe, job)[0]
    assert foreseen[name].num_bytes == pytest.approx(observed.num_bytes, rel=0.02)
    assert list(foreseen[name].by_phase) == list(observed.by_phase)
    for phase, num_bytes in observed.by_phase.items():
        assert foreseen[name].by_phase[phase] == pytest.approx(num_bytes, rel=0.05), phase
