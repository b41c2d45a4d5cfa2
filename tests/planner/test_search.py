"""The search finds the edge of what fits, and proves it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from lomo_ds.planner.child import in_child
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.dry_run import DryRun, dry_run
from lomo_ds.planner.job import GIB, Job, default_ds_json
from lomo_ds.planner.presets import model_config
from lomo_ds.planner.search import last_that_fits, search, with_limits
from tests.planner.small_jobs import gpu_job


@dataclass
class Peak:
    num_bytes: int


@dataclass
class Run:
    """Stands in for a dry run: as the formula, and more by ``surplus``."""

    device: Peak
    host: Peak = field(default_factory=lambda: Peak(0))


def by_formula(surplus: int = 0, host_bytes_per_sequence: int = 0):
    def run(job: Job) -> Run:
        gathered = 2 * job.ds_json["zero_optimization"]["stage3_max_live_parameters"]
        device = Peak(closed_form(job).peak_bytes + gathered + surplus)
        return Run(device, Peak(job.micro_batch * host_bytes_per_sequence))

    return run


def llama_7b(**settings: object) -> Job:
    return Job(model=model_config("llama-7b"), ds_json=default_ds_json(), **settings)


@pytest.mark.parametrize("num_fitting", [0, 1, 5, 6])
def test_bisection(num_fitting: int) -> None:
    assert last_that_fits(-1, 6, lambda at: at < num_fitting) == num_fitting - 1


EDGES = [("micro-batch", {"seq_len": 512}, "micro_batch", 1), ("seq-len", {"micro_batch": 8}, "seq_len", 64)]


@pytest.mark.parametrize(("goal", "given", "name", "step"), EDGES)
def test_one_more_would_not_fit(goal: str, given: dict, name: str, step: int) -> None:
    card = {"num_gpus": 2, "gpu_memory_bytes": 11 * GIB} | given
    job, result = search(llama_7b(**card), goal, by_formula())
    assert result.device.num_bytes <= job.usable_bytes
    more = llama_7b(**card | {name: getattr(job, name) + step})
    assert by_formula()(more).device.num_bytes > job.usable_bytes


def test_fewest_gpus() -> None:
    job, _ = search(llama_7b(gpu_memory_bytes=8 * GIB, seq_len=128), "gpus", by_formula())
    assert job.num_gpus == 4


@pytest.mark.parametrize("surplus", [GIB // 10, GIB, 9 * GIB])
def test_a_dry_run_that_takes_more_steps_back(surplus: int) -> None:
    job, run = llama_7b(seq_len=512), by_formula(surplus=surplus)
    found, result = search(job, "micro-batch", run)
    assert result.device.num_bytes <= job.usable_bytes
    assert run(replace(job, micro_batch=found.micro_batch + 1)).device.num_bytes > job.usable_bytes


def test_the_host_bounds_the_micro_batch() -> None:
    job = llama_7b(seq_len=128, num_gpus=4, host_memory_bytes=20 * GIB)
    run = by_formula(host_bytes_per_sequence=GIB)
    assert search(job, "micro-batch", run)[0].micro_batch == 5
    assert search(replace(job, host_memory_bytes=None), "micro-batch", run)[0].micro_batch > 5


def search_and_one_more(job: Job) -> tuple[Job, DryRun, DryRun]:
    found, run = search(job, "micro-batch")
    return found, run, dry_run(replace(job, micro_batch=found.micro_batch + 1))


def test_the_edge_of_real_dry_runs() -> None:
    job = gpu_job(gpu_memory_bytes=40 << 20, reserve_bytes=0)
    ((found, run, more),) = in_child(search_and_one_more, [job])
    assert found.micro_batch > 1
    assert run.device.num_bytes <= job.usable_bytes < more.device.num_bytes
    live = "stage3_max_live_parameters"
    assert found.ds_json["zero_optimization"][live] > job.ds_json["zero_optimization"][live]


def test_nothing_fits() -> None:
    with pytest.raises(ValueError, match="nothing fits"):
        search(llama_7b(num_gpus=1, gpu_memory_bytes=12 * GIB), "micro-batch", by_formula())


def test_limits_rise_and_nothing_else_changes() -> None:
    before = default_ds_json()
    after = with_limits(before, free_numel=10_000_000)["zero_optimization"]
    assert after["stage3_max_live_parameters"] == 40_000_000
    assert after["stage3_prefetch_bucket_size"] == 5_000_000
    unchanged = {key for key in after if after[key] == before["zero_optimization"][key]}
    assert {"stage", "reduce_bucket_size", "stage3_param_persistence_threshold"} <= unchanged
