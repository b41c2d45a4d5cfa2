"""The verdicts and the page of the step benchmark, on made-up measurements."""

from __future__ import annotations

import pytest


def rank_result(peak, build, parked, seconds, rank=0):
    steps = [
        {"seconds": s, "cpu_seconds": s, "loss": 2.0, "parts": {"forward": 1, "backward": 2, "update": 0}}
        for s in seconds
    ]
    return {
        "rank": rank,
        "phase_peak_bytes": {"model": build, "engine": build, "warm-up steps": peak, "steps": peak},
        "at_rest_bytes": build,
        "live_peak_bytes": peak,
        "parked_bytes": parked,
        "tokens_per_step": 512,
        "warmup": steps[:1],
        "steps": steps,
    }


def job(peak, seconds, parked=0, build=10):
    return [rank_result(peak, build, parked, seconds), rank_result(peak - 1, build, parked, seconds, rank=1)]


def test_targets_are_judged_by_the_median_of_each_rounds_ratio(benchmark_module):
    summary = benchmark_module("step_summary")
    jobs = {
        "lomo-immediate": [job(100, [7.0]), job(100, [8.0]), job(120, [7.0])],
        "adamw": [job(1000, [10.0]), job(1000, [10.0]), job(1000, [10.0])],
    }
    verdicts = summary.summarize(jobs)["targets"]
    ratios = {verdict["measure"]: verdict["ratio"] for verdict in verdicts}
    assert ratios["peak_less_parked_bytes"] == pytest.approx({"median": 0.1, "min": 0.1, "max": 0.12})
    assert ratios["step_s"] == pytest.approx({"median": 0.7, "min": 0.7, "max": 0.8})
    assert all(verdict["met"] for verdict in verdicts)


def test_a_missed_target_is_said_to_be_missed(benchmark_module):
    jobs = {"lomo-deferred": [job(500, [9.8], parked=100)], "sgd": [job(1000, [10.0])]}
    verdicts = benchmark_module("step_summary").summarize(jobs)["targets"]
    assert [verdict["met"] for verdict in verdicts] == [False, False]
    assert [verdict["ratio"]["median"] for verdict in verdicts] == pytest.approx([0.4, 0.98])


def test_parked_bytes_do_not_come_off_the_peak_of_building(benchmark_module):
    one = benchmark_module("step_summary").summarize_job(job(500, [1.0], parked=400, build=300))
    assert (one["peak_bytes"], one["peak_less_parked_bytes"]) == (500, 300)


def test_the_report_holds_a_row_per_variant_and_target(benchmark_module, tmp_path):
    jobs = {"lomo-immediate": [job(100, [7.0])], "sgd": [job(1000, [10.0])]}
    run = {"num_parameters": 1000, "micro_batch": 2, "sequence_length": 128, "num_ranks": 2, "rounds": 1}
    run |= {
        "warmup": 1,
        "steps": 1,
        "memory_source": "VmHWM",
        "command": "x",
        "zero_optimization": {"stage": 3},
    }
    report = benchmark_module("step_report")
    results = {
        "run": run,
        "summary": benchmark_module("step_summary").summarize(jobs),
        "machine": report.describe_machine(),
        "versions": report.describe_versions(),
        "jobs": jobs,
    }
    report.write_report(tmp_path, results)
    page = (tmp_path / "step.md").read_text()
    assert page.count("| LOMO, immediate") == 4  # figures, two targets, parts of the time
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert (tmp_path / "step.json").exists()
