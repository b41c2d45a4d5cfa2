"""The benchmark of rules: what it runs next, its batches and updates, and what it makes of the results."""

from __future__ import annotations

import copy
from dataclasses import asdict
from statistics import stdev
from typing import Any

import pytest
import torch

from benchmarks.rules import report, summary
from benchmarks.rules.cells import best_lr, cell, finalists, grid_cells, methods_of, missing_lrs, seed_cells
from benchmarks.rules.data import pretraining
from benchmarks.rules.methods import BUDGETS, METHODS, SEEDS, neighbour
from benchmarks.rules.training import packed, schedule, token_losses
from benchmarks.rules.updates import updates_of
from lomo_ds.rules import momentum8, rounding
from lomo_ds.tasks.encoding import EncodedAnswer
from tests.tiny import tiny_llama

Found = dict[str, Any]


def run(task: str, method: str, lr: float, seed: int, loss: float | None, state_bytes: int = 0) -> Found:
    """A finished run of a model of 100 parameters."""
    part = "slice" if seed == 0 else "validation"
    about = asdict(cell(task, method, lr, seed)) | {"state_bytes": state_bytes, "num_params": 100}
    return about | {"loss": {part: loss}, "accuracy": {part: None}, "cpu_s": 4.0, "update_s": 1.0}


def grid(task: str, method: str, best: int, extra: tuple[int, ...] = (), **more: Any) -> list[Found]:
    """A grid whose losses rise from place ``best`` on both sides; ``extra`` places lie beyond its ends."""
    first = METHODS[method].grid(task)[0]
    places = sorted({*range(4), *extra})
    return [run(task, method, neighbour(first, at), 0, 1.0 + abs(at - best), **more) for at in places]


def test_learning_rates_are_ones_and_threes():
    assert [neighbour(3e-4, steps) for steps in (-2, -1, 0, 1, 2)] == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert METHODS["lomo"].grid("sst2") == (0.03, 0.1, 0.3, 1.0)


@pytest.mark.parametrize(
    ("best", "extra", "missing"),
    [
        (1, (), []),
        (0, (), [0.01]),
        (-1, (-1,), [0.003]),
        (-1, (-1, -2), []),
        (3, (), [3.0]),
        (9, (4, 5, 6), []),
    ],
)
def test_a_grid_grows_where_its_best_is_at_an_end(best: int, extra: tuple[int, ...], missing: list[float]):
    results = grid("sst2", "lomo", best, extra)
    assert missing_lrs("sst2", "lomo", results) == pytest.approx(missing)
    assert (best_lr("sst2", "lomo", results) is None) == bool(missing)


def test_a_learning_rate_that_diverged_is_not_the_best():
    results = grid("sst2", "lomo", 1)
    results[1]["loss"]["slice"] = None
    results[2]["loss"]["slice"] = 1.5
    assert best_lr("sst2", "lomo", results) == 0.3


TASKS = list(BUDGETS)


def test_grids_come_first_then_the_seeds_of_the_finalists():
    names = ["adamw", "lomo", "sink_gd", "scale", "sign_sgd", "adalomo", "rmnp", "lora", "sink_gd_5"]
    assert len(grid_cells("sst2", names, [])) == 4 * (len(names) - 1)
    assert [len(methods_of(task, names)) for task in TASKS] == [8, 8, 8]
    results = [found for task in TASKS for name in names[:-3] for found in grid(task, name, 1)]
    for found in results:
        found["state_bytes"] = 20 if found["method"] == "scale" else 0
    assert {one.method for one in grid_cells("sst2", names, results)} == {"rmnp", "lora"}
    results += [found for task in TASKS for found in grid(task, "rmnp", 1, state_bytes=101)]
    losses = {"sink_gd": (3, 1, 2), "scale": (1, 2, 1), "sign_sgd": (4, 4, 4), "adalomo": (2, 3, 3)}
    for found in results:
        found["loss"]["slice"] += losses.get(found["method"], (0, 0, 0))[TASKS.index(found["task"])]
    assert finalists(TASKS, names, results) == ["adamw", "lomo", "sink_gd", "adalomo"]
    assert finalists(["sst2"], names, results)[2:] == ["sink_gd", "adalomo"]
    todo = seed_cells("sst2", ["adamw", "lomo", "scale"], results)
    assert [(one.method, one.seed) for one in todo[:4]][-1] == ("adamw", 2) and len(todo) == 3 * len(SEEDS)
    results.append(run("sst2", "adamw", 1e-4, 1, 0.5))
    assert len(seed_cells("sst2", ["adamw", "lomo", "scale"], results)) == len(todo) - 1


def test_differences_are_those_of_equal_seeds():
    losses = {"adamw": (0.5, 0.7, 0.6), "lomo": (0.9, 1.1, 1.0), "sink_gd": (0.52, 0.71, 0.63)}
    results = [found for name in losses for found in grid("sst2", name, 1)]
    for name, of_seeds in losses.items():
        lr = METHODS[name].grid("sst2")[1]
        results += [run("sst2", name, lr, seed, loss) for seed, loss in zip((1, 2, 3), of_seeds, strict=True)]
    found = summary.summarize(results)["tasks"]["sst2"]["sink_gd"]
    assert found["to_baseline"]["mean"] == pytest.approx(0.02)
    assert found["to_baseline"]["error"] == pytest.approx(stdev([0.02, 0.01, 0.03]) / 3**0.5)
    assert not summary.matches_baseline(found) and summary.beats_floor(found)
    assert found["seeds"] == [1, 2, 3]


def test_a_page_of_unfinished_runs_says_what_is_missing():
    results = grid("sst2", "adamw", 1) + [run("sst2", "adamw", 1e-4, 1, 0.5)]
    about = {"machine": {"cores": "2", "cpu": "x", "memory": "1 GiB"}, "versions": {"torch": "2"}}
    sizes = {"train": 10, "slice": 2, "validation": 2, "train_tokens": 50}
    page = report.markdown(about | {"sizes": dict.fromkeys(BUDGETS, sizes)}, summary.summarize(results))
    assert "**Not finished yet**" in page and "**0.0001**: 1.000" in page and "0.5000 (0.0000)" in page


def test_packed_examples_do_not_see_each_other():
    model = tiny_llama()
    answers = [
        EncodedAnswer(input_ids=tuple(range(5, 5 + length)), target_ids=(7,) * targets)
        for length, targets in ((6, 2), (9, 1), (3, 3))
    ]
    alone = torch.cat([token_losses(model, packed([one])) for one in answers])
    together = packed(answers)
    assert together.input_ids.shape == (1, 18)
    torch.testing.assert_close(token_losses(model, together), alone)


@pytest.mark.parametrize(("name", "reference"), [("lomo", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_updates_are_those_of_torch(
    name: str, reference: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
):
    """fp32, clipped; of AdamW the copies change nothing then."""
    for module in (rounding, momentum8):
        monkeypatch.setattr(module, "random_int32", module.random_int32)  # put back afterwards
    model = tiny_llama()
    whole = copy.deepcopy(model)
    more = {"weight_decay": 0.0} if name == "adamw" else {}
    optimizer = reference(whole.parameters(), lr=0.1, **more)
    updates = updates_of(model, METHODS[name], 0, (0.9, 0.999))
    batch = packed([EncodedAnswer(input_ids=(2, 3, 4, 5), target_ids=(6, 7))])
    for _ in range(3):
        (20 * token_losses(model, batch).mean()).backward()
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        updates.step(0.1)
        assert torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0) > 1
        optimizer.step()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_schedule_warms_up_and_ends_above_zero():
    factors = [schedule(step, 40) for step in range(40)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and 0 < factors[-1] < 0.03


def test_text_is_split_into_three_parts_without_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr("benchmarks.rules.data.works", lambda folder: ["to be or not to be " * 400])
    found = pretraining(tmp_path, vocabulary=260, length=8)
    parts = [found.train, found.slice, found.validation]
    assert [len(part) for part in parts[1:]] == [len(found.train) // 18] * 2
    assert all(one.input_ids[1:] == one.target_ids[:-1] for part in parts for one in part)
