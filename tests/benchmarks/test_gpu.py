"""`make gpu-check`: every part with data on a CPU rank, parts that fail, and what a GPU would get."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from benchmarks.common.contestants import CONTESTANTS
from benchmarks.common.paths import ROOT
from benchmarks.common.rank_processes import job_environment
from benchmarks.gpu import cases, check, kernels_job, memory_job, phases, report, speed_job
from benchmarks.gpu.card import Card
from benchmarks.gpu.parts import PARTS, Job, Part, Setup
from benchmarks.kernels import count
from lomo_ds.allocator_settings import VARIABLES
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.rules.kernels import dispatch, operations
from lomo_ds.rules.param_spec import ParamSpec
from tests.benchmarks import late_job

GIB = 1 << 30
ON_CPU = Setup(card=Card(name="CPU rank", total_bytes=20 * GIB), device="cpu", toy=True)


# Every part, and parts that fail --------------------------------------------------------------------


def raises(setup: Setup) -> list[Job]:
    raise RuntimeError("the part is broken")


def fails(setup: Setup) -> list[Job]:
    return [Job(name="no shape", module="benchmarks.gpu.kernels_job", arguments=("--shape", "null"))]


def late(folder: Path) -> Part:
    def jobs(setup: Setup) -> list[Job]:
        first = Job(name="late", module="tests.benchmarks.late_job", arguments=("--folder", str(folder)))
        return [first, dataclasses.replace(first, name="after it")]

    return Part(name="equality", title="Late", deadline_s=8, jobs=jobs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page of a check is in which a part is late and two fail; and what the late job left."""
    out = tmp_path_factory.mktemp("gpu")
    parts = [
        late(out),
        Part(name="broken", title="Broken", deadline_s=0, jobs=raises),
        Part(name="kernels", title="Fails", deadline_s=600, jobs=fails),
        *(dataclasses.replace(part, deadline_s=600) for part in PARTS),
    ]
    assert check.check(parts, ON_CPU, out) == 1
    return out


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {part["title"]: part for part in json.loads((folder / "gpu.json").read_text())["parts"]}


@pytest.mark.ranks
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_runs_on_a_cpu_rank(part: Part, folder: Path) -> None:
    found = results_of(folder)[part.title]
    assert not found["failures"]
    assert len(report.rows_of(found)) >= 1
    section = (folder / "gpu.md").read_text().partition(f"## {part.title}\n")[2].partition("\n## ")[0]
    assert section.count("\n| ") >= 3 and "Failed" not in section


@pytest.mark.ranks
def test_memory_is_that_of_the_plan(folder: Path) -> None:
    """Of live tensors on a CPU rank, byte for byte; but for what gloo has not released in time."""
    (row,) = report.rows_of(results_of(folder)["Memory"])
    assert row["allocated"] == pytest.approx(row["plan"]["allocated"], rel=0.02)
    assert row["phases"].keys() == row["plan"]["phases"].keys()
    assert row["plan"]["fits"]


@pytest.mark.ranks
def test_a_late_job_is_ended_with_all_that_it_started_and_its_rows_count(folder: Path) -> None:
    found = results_of(folder)["Late"]
    assert found["failures"] == [
        "late: no result within 8 s",
        "after it: not started: the time of this part is over",
    ]
    assert report.rows_of(found) == [late_job.ROW]
    assert not (folder / "lock").exists(), "it was interrupted before it was killed"
    child = int((folder / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.ranks
def test_parts_that_fail_are_named_and_the_others_are_there(folder: Path) -> None:
    found = results_of(folder)
    assert found["Broken"]["failures"] == ["RuntimeError: the part is broken"]
    assert found["Fails"]["failures"] == ["no shape: TypeError: 'NoneType' object is not iterable"]
    page = (folder / "gpu.md").read_text()
    assert page.startswith("# On a GPU: CPU rank\n")
    assert page.count("**failed**") == 3 and page.count("| done |") == len(PARTS)
    assert "- `late: no result within 8 s`" in page and "| Lomo | 0.12 |" in page
    assert (folder / "gpu.png").stat().st_size > 10_000


def test_a_page_is_written_without_plots_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> bool:
        raise OSError("no fonts")

    monkeypatch.setattr(report, "plot", fails)
    parts: list[dict[str, Any]] = []
    path = report.write_report(tmp_path, ON_CPU, parts, 1.0)
    assert parts[0]["failures"] == ["OSError: no fonts"] and "- `OSError: no fonts`" in path.read_text()
    assert "gpu.png" not in path.read_text()


# What is run on a GPU ------------------------------------------------------------------------------------


def on_gpu(memory_gib: float) -> Setup:
    return Setup(card=Card(name="a GPU", total_bytes=int(memory_gib * GIB)))


def test_all_deadlines_are_within_ten_minutes() -> None:
    assert sum(part.deadline_s for part in PARTS) <= 585, "the page takes some seconds"
    assert set(report.SECTIONS) == {part.name for part in PARTS}
    page = (ROOT / "docs" / "gpu-check.md").read_text()
    assert [part.name for part in PARTS if f"\n| {part.title} | {part.deadline_s:.0f} |" not in page] == []


def test_a_rank_on_cuda_has_nothing_of_the_environment_of_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    environment = job_environment("cuda")
    assert environment["DS_ACCELERATOR"] == "cuda", "a rank that cannot use the GPU fails"
    assert "OMP_NUM_THREADS" not in environment
    assert environment[VARIABLES[0]] == "expandable_segments:True"
    assert job_environment("cpu")["DS_ACCELERATOR"] == "cpu"


def test_each_part_has_its_jobs_on_a_gpu() -> None:
    jobs = {part.name: part.jobs(on_gpu(80)) for part in PARTS}
    assert [job.environment for job in jobs["sanitizer"]] == [{"TORCH_CUDA_SANITIZER": "1"}]
    runs = [job.name for job in jobs["memory"] if not job.meanwhile]
    assert len(runs) == 3 and str(cases.TABLE_1) in runs
    plans = [job for job in jobs["memory"] if job.meanwhile]
    assert [job.name for job in plans] == [f"plan of {name}" for name in runs]
    assert all(job.environment["DS_ACCELERATOR"] == "cpu" for job in plans)
    assert [job.arguments[1] for job in jobs["speed"]][-1] == "adamw-offload", "it may compile for long"


@pytest.mark.parametrize(
    ("memory_gib", "models"),
    [
        (139.8, ["llama-13b", "llama-7b", "qwen2.5-3b"]),
        (23.6, ["llama-7b", "qwen2.5-3b", "qwen2.5-1.5b"]),
        (14.7, ["qwen2.5-3b", "qwen2.5-1.5b", "qwen2.5-0.5b"]),
        (2.0, []),
    ],
)
def test_jobs_are_chosen_by_the_cards_memory(memory_gib: float, models: list[str]) -> None:
    assert [case.model for case in cases.cases_for(on_gpu(memory_gib).card)] == models


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_a_case_needs_what_the_closed_form_says(case: cases.Case) -> None:
    job = memory_job.job_of(case, int(case.needs_gib * GIB), on_cpu=False)
    spare = case.needs_gib * GIB - closed_form(job).peak_bytes - job.reserve_bytes
    assert 0 <= spare <= 1.5 * GIB


def test_no_more_is_offloaded_than_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    speed_job.require_host_memory(CONTESTANTS["lomo-immediate"], cases.LARGE)
    with pytest.raises(MemoryError, match=r"needs 23\.\d+ GiB of host memory, 8.00 GiB are available"):
        speed_job.require_host_memory(CONTESTANTS["adamw-offload"], cases.LARGE)


def test_a_part_without_a_job_has_failed() -> None:
    found = check.run_part(PARTS[2], on_gpu(2), time.monotonic() + 60, lambda line: None)
    assert found["failures"] == ["none of its jobs fits this card"]


def test_the_allocators_peak_is_that_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(live=5, peak=9)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(now, "peak", now.live))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now.peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * now.peak)
    measured = phases.CudaPhases()
    with measured.phase("quiet"):
        pass
    with measured.phase("busy"):
        now.peak = 7
    assert measured.phase_peaks() == {"quiet": [5, 10], "busy": [7, 14]}


def test_kernels_that_do_not_run_are_a_failure_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_triton(dispatch_key: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(operations, "implement", no_triton)
    dispatch.has_kernels.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="No module named 'triton'"):
            kernels_job.check_kernels("cuda:0")
        assert kernels_job.check_kernels("cpu") == {}
    finally:
        dispatch.has_kernels.cache_clear()


@pytest.mark.parametrize(
    ("name", "off", "is_right"), [("Lomo", 1, False), ("SinkGD", 1, True), ("SinkGD", 9, False)]
)
def test_updates_by_kernels_are_compared_with_torchs(
    name: str, off: int, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A "kernel" whose first weight is off by some roundings."""
    updates = []

    def wrong_update(rule: Any, shard: Any, is_guarded: bool) -> None:
        count.update(rule, shard, is_guarded)
        if not updates:
            shard.param.view(torch.int16)[0] += off
        updates.append(rule)

    monkeypatch.setattr(kernels_job, "update", wrong_update)
    spec = ParamSpec(shape=(64, 32), rank=0, world_size=1, role="matrix")
    if is_right:
        found = kernels_job.compare_with_torch(name, "stochastic", spec, "cpu")
        assert found["differing"] == pytest.approx(1 / spec.numel)
    else:
        with pytest.raises(AssertionError, match="weights differ"):
            kernels_job.compare_with_torch(name, "stochastic", spec, "cpu")
