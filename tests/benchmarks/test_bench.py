"""The schedule, the verdicts and the page of `make bench`, on made-up measurements."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.bench import kept_rounds, report, run, schedule, summary
from benchmarks.common import machine


def rank_result(peak, build, offloaded, seconds, rank=0, parameters=1000):
    steps = [
        {"seconds": s, "cpu_seconds": s, "loss": 2.0, "parts": {"forward": 1, "backward": 2, "update": 0}}
        for s in seconds
    ]
    return {
        "rank": rank,
        "num_parameters": parameters,
        "phase_peak_bytes": {"model": build, "engine": build, "warm-up steps": peak, "steps": peak},
        "at_rest_bytes": build,
        "live_peak_bytes": peak,
        "offloaded_bytes": offloaded,
        "sent_bytes": {"all_gather_into_tensor": 30.0, "all_reduce": 10.0 * rank},
        "tokens_per_step": 512,
        "warmup": steps[:1],
        "steps": steps,
    }


def job(peak, seconds, offloaded=0, build=10, parameters=1000):
    return [
        rank_result(peak - rank, build, offloaded, seconds, rank=rank, parameters=parameters)
        for rank in range(2)
    ]


def record(contestant, ranks, round_="round 1", num_layers=12, num_ranks=2):
    place = {"round": round_, "contestant": contestant, "num_layers": num_layers, "num_ranks": num_ranks}
    return place | ({"failure": ranks} if isinstance(ranks, str) else {"ranks": ranks})


def test_targets_are_judged_by_the_median_of_each_rounds_ratio():
    ours = [job(100, [7.0]), job(100, [8.0]), job(120, [7.0])]
    records = [record("lomo-immediate", ranks, f"round {n}") for n, ranks in enumerate(ours)]
    records += [record("adamw", job(1000, [10.0]), f"round {n}") for n in range(3)]
    verdicts = summary.summarize(records)["targets"]
    ratios = {verdict["measure"]: verdict["ratio"] for verdict in verdicts}
    assert ratios["peak_less_offloaded_bytes"] == pytest.approx({"median": 0.1, "min": 0.1, "max": 0.12})
    assert ratios["step_s"] == pytest.approx({"median": 0.7, "min": 0.7, "max": 0.8})
    assert all(verdict["met"] for verdict in verdicts)


def test_a_missed_target_is_reported():
    records = [record("lomo-deferred", job(500, [9.8], offloaded=100)), record("sgd", job(1000, [10.0]))]
    verdicts = summary.summarize(records)["targets"]
    assert [verdict["met"] for verdict in verdicts] == [False, False]
    assert [verdict["ratio"]["median"] for verdict in verdicts] == pytest.approx([0.4, 0.98])


def test_ratios_stay_within_a_round_and_a_number_of_ranks():
    records = [
        record("lomo-immediate", job(100, [1.0]), "round 1"),
        record("lomo-immediate", job(400, [1.0]), "round 1", num_ranks=1),
        record("torch-in-backward", job(200, [1.0]), "round 1", num_ranks=1),
        record("adamw", job(1000, [1.0]), "round 2"),
        record("adamw", job(1000, [1.0]), "growth", num_layers=3),
        record("lomo-immediate", job(100, [1.0]), "growth", num_layers=3),
    ]
    found = summary.summarize(records)
    assert found["targets"] == []  # no round has both
    ratios = {one["against"]: one["ratio"]["median"] for one in found["comparisons"]}
    assert ratios.keys() == {"torch-in-backward"}
    assert found["comparisons"][0]["ratio"]["median"] == 2.0


def test_offloaded_bytes_are_not_subtracted_from_the_peak_of_building():
    one = summary.summarize_job(job(500, [1.0], offloaded=400, build=300))
    assert (one["peak_bytes"], one["peak_less_offloaded_bytes"]) == (500, 300)
    assert one["sent_bytes"] == 40.0  # of the rank that sends most


def test_growth_is_the_line_through_the_sizes():
    records = [
        record(
            "sgd", job(100 + 4 * parameters, [1.0], parameters=parameters), "growth", num_layers=parameters
        )
        for parameters in (10, 20, 40)
    ]
    (line,) = summary.summarize(records)["bytes_per_parameter"]
    assert (line["contestant"], line["num_ranks"], line["num_sizes"]) == ("sgd", 2, 3)
    assert line["peak_bytes"] == pytest.approx(4.0)
    assert line["sent_bytes"] == pytest.approx(0.0)


def test_each_round_runs_every_contestant_and_growth_measures_nothing_twice():
    sizes = schedule.Sizes(
        num_layers=12, num_ranks=2, growth_layers=(6, 3, 12), growth_ranks=(1, 2, 4), rank_growth_layers=3
    )
    names = ("lomo-immediate", "sgd", "lomo-optim")
    first, second, growth = (
        [dataclasses.astuple(job) for job in one.jobs] for one in schedule.schedule(names, 2, sizes)
    )
    main = [("lomo-immediate", 12, 2), ("sgd", 12, 2), ("lomo-immediate", 12, 1), ("lomo-optim", 12, 1)]
    assert first == second == main
    shapes = [(3, 2), (6, 2), (3, 1), (3, 4)]
    assert growth == [(name, *shape) for shape in shapes for name in ("lomo-immediate", "sgd")]


def test_whole_rounds_are_kept_for_the_same_identity_only(tmp_path):
    path = tmp_path / "runs" / "rounds.json"
    kept_rounds.KeptRounds(path, {"steps": (3,)}).add("round 1", [{"ranks": []}])
    again = kept_rounds.KeptRounds(path, {"steps": (3,)})
    assert (again.rounds, again.num_starts) == ({"round 1": [{"ranks": []}]}, 2)
    assert kept_rounds.KeptRounds(path, {"steps": (4,)}).rounds == {}
    again.forget()
    assert kept_rounds.KeptRounds(path, {"steps": (3,)}).num_starts == 1


def test_the_last_error_of_a_rank_is_the_reason(monkeypatch):
    log = "rank 0 ended with 1:\n[rank0]: ValueError: first\n[rank0]: AssertionError: no CUDA\nwarning\n"

    def fail(*_):
        raise RuntimeError(log)

    monkeypatch.setattr(run, "run_job", fail)
    theirs, ours = (
        run.Job(contestant=name, num_layers=1, num_ranks=1) for name in ("lomo-optim", "lomo-immediate")
    )
    assert run.attempt(theirs, None)["failure"] == "AssertionError: no CUDA"
    with pytest.raises(RuntimeError, match="no CUDA"):
        run.attempt(ours, None)


def test_the_report_has_tables_targets_failures_and_growth(tmp_path):
    records = [
        record("lomo-immediate", job(100, [7.0])),
        record("sgd", job(1000, [10.0])),
        record("lomo-immediate", job(100, [7.0]), num_ranks=1),
        record("lomo-optim-adalomo", "AssertionError: no CUDA", num_ranks=1),
        record("lomo-immediate", job(50, [2.0], parameters=300), "growth", num_layers=3),
        record("lomo-immediate", job(40, [2.0], parameters=300), "growth", num_layers=3, num_ranks=4),
    ]
    about = {"num_parameters": 1000, "micro_batch": 2, "sequence_length": 128, "num_ranks": 2, "rounds": 1}
    about |= {"num_layers": 12, "rank_growth_layers": 3, "num_starts": 2, "wall_s": 60.0}
    about |= {"warmup": 1, "steps": 1, "memory_source": "VmHWM", "command": "x", "zero_optimization": {}}
    results = {
        "run": about,
        "machine": machine.describe_machine() | {"cores": "2"},
        "versions": machine.describe_versions(),
        "summary": summary.summarize(records),
        "records": records,
    }
    report.write_report(tmp_path, results)
    page = (tmp_path / "bench.md").read_text()
    assert page.count("\n| LOMO, immediate: ") == 2  # targets
    assert page.count("\n| LOMO, immediate | ") == 1 + 2 + 2 * 4 + 1 + 1  # short, all, growth, slopes, parts
    assert "- lomo-optim, AdaLomo: `AssertionError: no CUDA`" in page
    assert "started 2 times" in page and "4 ranks share 2 cores" in page
    for name in ("bench.png", "bench_growth.png", "bench.json"):
        assert (tmp_path / name).stat().st_size > 500
