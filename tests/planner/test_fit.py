"""One definition of what fits; and the key to change is for what fills the host."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from lomo_ds.byte_units import GIB
from lomo_ds.planner.fit import fits, missing_device_bytes, missing_host_bytes
from lomo_ds.planner.job import Job
from lomo_ds.planner.plan import Plan
from lomo_ds.planner.remedy import remedy
from lomo_ds.planner.replay import Reserved, ReservedMemory
from tests.planner.small_jobs import gpu_job, reserving


@dataclass
class StubPeak:
    """In place of a peak."""

    num_bytes: int
    checkpoints: int = 0

    def by_role(self) -> dict[str, int]:
        return {"checkpoints": self.checkpoints}


@dataclass
class StubRun:
    """In place of a dry run of one rank."""

    host: StubPeak
    gradient_host_bytes: int = 0
    reserved: ReservedMemory = field(default_factory=lambda: reserving(GIB))


def on_host(offloaded: int = 0, checkpoints: int = 0, other: int = 0) -> StubRun:
    return StubRun(StubPeak(offloaded + checkpoints + other, checkpoints), offloaded)


def job_with_host(gib: int | None, **settings: object) -> Job:
    return gpu_job(num_gpus=8, host_memory_bytes=None if gib is None else gib * GIB, **settings)


@pytest.mark.parametrize(
    ("gib", "gpu_gib", "expected"), [(None, 24, True), (32, 24, True), (31, 24, False), (32, 2, False)]
)
def test_device_and_host_both_count(gib: int | None, gpu_gib: int, expected: bool) -> None:
    job = replace(job_with_host(gib), gpu_memory_bytes=gpu_gib * GIB, asked_reserve_bytes=GIB + 1)
    run = on_host(checkpoints=4 * GIB)
    assert fits(job, run) is expected
    assert Plan(job=job, model_name="small", run=run).fits is expected


@pytest.mark.parametrize(("is_out_of_memory", "missing"), [(False, -GIB), (True, 27 * GIB)])
def test_the_worst_case_counts_where_it_runs_out_of_memory(is_out_of_memory: bool, missing: int) -> None:
    """Waiting for the device and emptying the cache is allowed; running out of memory is not."""
    job = replace(job_with_host(None), gpu_memory_bytes=4 * GIB, asked_reserve_bytes=GIB)
    on_card = Reserved(num_flushes=3, is_out_of_memory=is_out_of_memory)
    worst = Reserved(peak_bytes=30 * GIB)
    reserved = ReservedMemory(usual=Reserved(peak_bytes=2 * GIB), worst=worst, worst_on_card=on_card)
    run = replace(on_host(), reserved=reserved)
    assert missing_device_bytes(job, run) == missing
    assert fits(job, run) is not is_out_of_memory


def test_what_a_node_lacks() -> None:
    assert missing_host_bytes(job_with_host(31), on_host(checkpoints=4 * GIB)) == GIB
    assert missing_host_bytes(job_with_host(33), on_host(checkpoints=4 * GIB)) == 0


@pytest.mark.parametrize(
    ("run", "settings", "words"),
    [
        (on_host(offloaded=4 * GIB), {}, '"two_pass"'),
        (on_host(offloaded=4 * GIB, checkpoints=GIB), {}, '"two_pass"'),
        (on_host(checkpoints=4 * GIB), {}, 'lower --seq-len, or set "activation_checkpointing'),
        (on_host(checkpoints=4 * GIB), {"micro_batch": 2}, "lower --micro-batch"),
        (on_host(offloaded=GIB, checkpoints=4 * GIB), {}, "cpu_checkpointing"),
        (on_host(other=4 * GIB), {}, "16.00 GiB more host memory"),
        (on_host(offloaded=4 * GIB), {"top": {"gradient_accumulation_steps": 2}}, "offload_gradients"),
        (on_host(other=GIB), {}, ""),
    ],
)
def test_the_remedy_is_for_what_fills_the_host(run: StubRun, settings: dict, words: str) -> None:
    text = remedy(job_with_host(16, **settings), run)
    assert words in text and bool(text) == bool(words)
