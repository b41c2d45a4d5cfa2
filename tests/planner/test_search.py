"""The search finds the edge of what fits, and proves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from lomo_ds.byte_units import GIB
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.dry_run import DryRun, dry_run
from lomo_ds.planner.job import Job, default_ds_json
from lomo_ds.planner.presets import model_config
from lomo_ds.planner.replay import ReservedMemory
from lomo_ds.planner.search import last_near, last_that, search, with_limits
from tests.planner.child import in_child
from tests.planner.small_jobs import gpu_job, reserving


@dataclass
class Peak:
    num_bytes: int


@dataclass
class Run:
    """In place of a dry run: the formula's peak, and ``surplus`` more."""

    reserved: ReservedMemory
    host: Peak = field(default_factory=lambda: Peak(0))


def by_formula(surplus: int = 0, host_bytes_per_sequence: int = 0):
    def run(job: Job) -> Run:
        gathered = 2 * job.ds_json["zero_optimization"]["stage3_max_live_parameters"]
        reserved = reserving(closed_form(job).peak_bytes + gathered + surplus)
        return Run(reserved, Peak(job.micro_batch * host_bytes_per_sequence))

    return run


def llama_7b(**settings: object) -> Job:
    given = {"asked_reserve_bytes": 2 * GIB} | settings
    return Job(model=model_config("llama-7b"), ds_json=default_ds_json(), **given)


@pytest.mark.parametrize("num_fitting", [0, 1, 5, 6])
def test_bisection(num_fitting: int) -> None:
    assert last_that(-1, 6, lambda at: at < num_fitting) == num_fitting - 1


@pytest.mark.parametrize("start", [0, 1, 7, 19])
@pytest.mark.parametrize("num_fitting", [0, 1, 2, 6, 7, 8, 19, 20])
def test_steps_from_anywhere(start: int, num_fitting: int) -> None:
    asked: list[int] = []

    def holds(at: int) -> bool:
        asked.append(at)
        return at < num_fitting

    assert last_near(start, 20, holds) == num_fitting - 1
    assert len(asked) == len(set(asked)) <= 9
    assert {num_fitting - 1, num_fitting} & set(range(20)) <= set(asked)


EDGES = [("micro-batch", {"seq_len": 512}, "micro_batch", 1), ("seq-len", {"micro_batch": 8}, "seq_len", 64)]


@pytest.mark.parametrize(("goal", "given", "name", "step"), EDGES)
def test_one_more_would_not_fit(goal: str, given: dict, name: str, step: int) -> None:
    card = {"num_gpus": 2, "gpu_memory_bytes": 11 * GIB} | given
    job, result = search(llama_7b(**card), goal, by_formula())
    assert result.reserved.usual.peak_bytes <= job.usable_bytes
    more = llama_7b(**card | {name: getattr(job, name) + step})
    assert by_formula()(more).reserved.usual.peak_bytes > job.usable_bytes


def test_fewest_gpus() -> None:
    job, _ = search(llama_7b(gpu_memory_bytes=8 * GIB, seq_len=128), "gpus", by_formula())
    assert job.num_gpus == 3
    assert by_formula()(replace(job, num_gpus=2)).reserved.usual.peak_bytes > job.usable_bytes


UNKNOWN = {"checkpointing": "non_reentrant"}
"""What the closed form refuses."""


@pytest.mark.parametrize(("model_gib", "num_gpus"), [(20, 1), (100, 5), (170, 8), (180, 16), (1000, 48)])
def test_fewest_gpus_by_dry_runs_alone(model_gib: int, num_gpus: int) -> None:
    run = Counted(lambda job: model_gib * GIB // job.num_gpus)
    assert search(llama_7b(**UNKNOWN), "gpus", run)[0].num_gpus == num_gpus
    assert len(run.jobs) <= 10


@pytest.mark.parametrize("num_fitting", [1, 2, 22, 1000])
def test_most_sequences_by_dry_runs_alone(num_fitting: int) -> None:
    run = Counted(lambda job: 22 * GIB * job.micro_batch // num_fitting)
    assert search(llama_7b(**UNKNOWN), "micro-batch", run)[0].micro_batch == num_fitting
    assert len(run.jobs) <= 2 * num_fitting.bit_length() + 2


class Counted:
    """In place of dry runs; remembers its jobs."""

    def __init__(self, num_bytes: Callable[[Job], int]) -> None:
        self.num_bytes, self.jobs = num_bytes, []

    def __call__(self, job: Job) -> Run:
        self.jobs.append(job)
        return Run(reserving(self.num_bytes(job)))


@pytest.mark.parametrize("surplus", [-GIB, -GIB // 10, GIB // 10, GIB, 9 * GIB])
def test_the_edge_is_that_of_the_dry_runs(surplus: int) -> None:
    job, run = llama_7b(seq_len=512), by_formula(surplus=surplus)
    found, result = search(job, "micro-batch", run)
    assert result.reserved.usual.peak_bytes <= job.usable_bytes
    assert run(replace(job, micro_batch=found.micro_batch + 1)).reserved.usual.peak_bytes > job.usable_bytes


def test_the_host_bounds_the_micro_batch() -> None:
    job = llama_7b(seq_len=128, num_gpus=4, host_memory_bytes=20 * GIB)
    run = by_formula(host_bytes_per_sequence=GIB)
    assert search(job, "micro-batch", run)[0].micro_batch == 5
    assert search(replace(job, host_memory_bytes=None), "micro-batch", run)[0].micro_batch > 5


def search_and_one_more(job: Job) -> tuple[Job, DryRun, DryRun]:
    found, run = search(job, "micro-batch")
    return found, run, dry_run(replace(job, micro_batch=found.micro_batch + 1))


@pytest.mark.slow
def test_the_edge_of_real_dry_runs() -> None:
    job = gpu_job(gpu_memory_bytes=400 << 20, asked_reserve_bytes=0)
    ((found, run, more),) = in_child(search_and_one_more, [job])
    assert found.micro_batch > 1
    assert run.reserved.usual.peak_bytes <= job.usable_bytes < more.reserved.usual.peak_bytes
    live = "stage3_max_live_parameters"
    assert found.ds_json["zero_optimization"][live] > job.ds_json["zero_optimization"][live]


def test_nothing_fits() -> None:
    small = llama_7b(num_gpus=1, gpu_memory_bytes=12 * GIB)
    with pytest.raises(
        ValueError, match="nothing fits; with micro-batch 1 the peak takes 1.*10.00 GiB per card"
    ):
        search(small, "micro-batch", by_formula())
    with pytest.raises(ValueError, match="nothing fits; with gpus 4096 .* of 1.00 GiB of host memory"):
        search(llama_7b(host_memory_bytes=GIB), "gpus", by_formula(host_bytes_per_sequence=2 * GIB))


def test_limits_rise_and_nothing_else_changes() -> None:
    before = default_ds_json()
    after = with_limits(before, free_numel=10_000_000)["zero_optimization"]
    assert after["stage3_max_live_parameters"] == 40_000_000
    assert after["stage3_prefetch_bucket_size"] == 5_000_000
    unchanged = {key for key in after if after[key] == before["zero_optimization"][key]}
    assert {"stage", "reduce_bucket_size", "stage3_param_persistence_threshold"} <= unchanged
