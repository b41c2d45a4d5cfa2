"""The formula and the dry run agree."""

from __future__ import annotations

import time

import pytest

from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.dry_run import DryRun
from lomo_ds.planner.job import Job, default_ds_json
from lomo_ds.planner.presets import PRESETS, model_config
from tests.planner.small_jobs import gpu_job, gpu_jobs

JOBS = gpu_jobs()


@pytest.mark.parametrize("name", JOBS)
def test_peak_of_the_dry_run(dry_runs: dict[str, DryRun], name: str) -> None:
    formula, run = closed_form(JOBS[name]), dry_runs[name]
    assert formula.num_params == run.num_params
    assert formula.peak_bytes == pytest.approx(run.device.num_bytes, rel=0.04)


def test_every_preset_takes_milliseconds() -> None:
    jobs = [Job(model=model_config(name), ds_json=default_ds_json()) for name in PRESETS]
    start_s = time.perf_counter()
    assert all(closed_form(one).peak_bytes > 0 for one in jobs)
    assert time.perf_counter() - start_s < 0.05 * len(jobs)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="reentrant"):
        closed_form(gpu_job(checkpointing="non_reentrant"))
