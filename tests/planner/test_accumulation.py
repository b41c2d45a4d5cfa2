"""A step of several micro-batches: offloaded, and counted whole though not all of them run."""

from __future__ import annotations

from unittest import mock

import pytest

from lomo_ds.planner import dry_run as module
from lomo_ds.planner.dry_run import DryRun, dry_run, micro_batch_weights
from lomo_ds.planner.hardware import find_hardware
from lomo_ds.planner.job import Job
from lomo_ds.planner.time_estimate import estimate_time
from tests.planner.child import in_child
from tests.planner.small_jobs import gpu_job

OPTIMIZERS = ("Lomo", "SGD")


def accumulating(optimizer: str, num_micro_batches: int) -> Job:
    """Without clipping, so that nothing but accumulation asks for deferring."""
    top = {"gradient_clipping": 0.0, "gradient_accumulation_steps": num_micro_batches}
    return gpu_job(top=top, optimizer=optimizer)


def run_every_micro_batch(job: Job) -> DryRun:
    with mock.patch.object(module, "MAX_MICRO_BATCHES", 100):
        return dry_run(job)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, int], DryRun]:
    keys = [("Lomo", 1), ("Lomo", 2), *((optimizer, 6) for optimizer in OPTIMIZERS)]
    return dict(zip(keys, in_child(dry_run, [accumulating(*key) for key in keys]), strict=True))


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, DryRun]:
    jobs = [accumulating(optimizer, 6) for optimizer in OPTIMIZERS]
    return dict(zip(OPTIMIZERS, in_child(run_every_micro_batch, jobs), strict=True))


def test_all_micro_batches_are_counted() -> None:
    assert [micro_batch_weights(count) for count in (1, 2, 3, 4, 64)] == [
        [1], [1, 1], [1, 1, 1], [1, 2, 1], [1, 62, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_figures_are_those_of_every_micro_batch(
    runs: dict, whole_runs: dict[str, DryRun], optimizer: str
) -> None:
    few, every = runs[optimizer, 6], whole_runs[optimizer]
    assert len(every.phase_starts) == len(few.phase_starts) + 2 * 3 * 3
    names = ("sent_bytes", "calls", "flops", "host_traffic_bytes", "phase_peaks", "at_rest", "policy")
    for name in (*names, "gradient_host_bytes"):
        assert getattr(few, name) == getattr(every, name), name


def test_accumulation_offloads_gradients(runs: dict) -> None:
    once, twice, often = (runs["Lomo", count] for count in (1, 2, 6))
    assert "immediate" in once.policy and once.gradient_host_bytes == 0
    assert "deferred" in often.policy and '"gradient_accumulation_steps": 6' in often.policy
    for run in (twice, often):
        # page-locked memory is rounded up by less than 64 KiB; parts that do not divide by 8 are padded
        assert 0 <= run.gradient_host_bytes - 2 * run.num_params / 8 < 1.01 * (64 << 10)


def test_a_step_is_all_of_its_micro_batches(runs: dict) -> None:
    once, often = runs["Lomo", 1], runs["Lomo", 6]
    assert often.flops == 6 * once.flops
    assert often.sent_bytes["reduce_scatter"] == 6 * once.sent_bytes["reduce_scatter"]
    # offloaded once, fetched and offloaded again by five more micro-batches, and fetched by the update
    assert often.host_traffic_bytes == pytest.approx(12 * 2 * often.num_params / 8, rel=0.01)
    tokens = estimate_time(accumulating("Lomo", 6), often, find_hardware("3090")).tokens
    assert tokens == 6 * 128
