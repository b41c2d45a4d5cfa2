"""DeepSpeed's own engine with its states on the host: booked apart from the device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lomo_ds.planner.dry_run import DryRun, dry_run
from lomo_ds.planner.job import Job
from tests.planner.child import in_child
from tests.planner.small_jobs import gpu_job


def offloaded(optimizer: str) -> Job:
    job = gpu_job(optimizer=optimizer)
    zero = {**job.ds_json["zero_optimization"], "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    return replace(job, ds_json={**job.ds_json, "zero_optimization": zero})


@pytest.fixture(scope="module")
def runs() -> dict[str, DryRun]:
    names = ("AdamW", "SGD")
    return dict(zip(names, in_child(dry_run, map(offloaded, names)), strict=True))


@pytest.mark.parametrize(("optimizer", "bytes_per_param"), [("AdamW", 12), ("SGD", 4)])
def test_states_are_on_the_host(runs: dict[str, DryRun], optimizer: str, bytes_per_param: int) -> None:
    run = runs[optimizer]
    per_rank = run.num_params / 8
    assert run.at_rest["rule state"] == run.at_rest["gradients"] == 0
    assert run.at_rest["parameters"] == pytest.approx(2 * per_rank, abs=80)
    on_host = run.peaks["step 2: backward"]["host"].by_role()
    assert on_host["rule state"] == pytest.approx(bytes_per_param * per_rank, rel=1e-3)
    # one gradient in bf16 and one in fp32, for the update
    rest = run.peaks["step 2: backward"]["host"].num_bytes - on_host["rule state"]
    assert rest == pytest.approx((2 + 4) * per_rank, rel=1e-3)


def test_the_peak_is_below_what_was_offloaded(runs: dict[str, DryRun]) -> None:
    run = runs["AdamW"]
    assert run.device.num_bytes < (2 + 12) * run.num_params / 8
