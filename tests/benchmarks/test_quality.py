"""The task-quality benchmark: slices, the choice of learning rates, the summary of cells, the baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.common.cells import Cell, finished, read_cell, run_cell
from benchmarks.quality import report, run
from benchmarks.quality.data import split
from benchmarks.quality.methods import ADAMW_JOB, METHODS
from benchmarks.quality.summary import best_lr, summarize
from lomo_ds.tasks.encoding import encode_right_answers
from lomo_ds.tasks.named import named_task
from lomo_ds.tasks.order import global_batches
from lomo_ds.training.recipe_file import parse_recipe
from tests.tiny import SENTENCES, tiny_tokenizer, write_tiny_folder

COMPARED = ("adamw", "lomo")


def cell(method: str, lr: float, seed: int, accuracy: float, tried: tuple | None = None) -> dict[str, Any]:
    return {
        "task": "sst2",
        "method": method,
        "lr": lr,
        "seed": seed,
        "accuracy": accuracy,
        "slice": None if tried is None else dict(zip(("accuracy", "loss"), tried, strict=True)),
        "peak_bytes": 2e9 if method == "adamw" else 1e9,
        "num_ranks": 2,
        "dtype": "bfloat16",
        "cell_s": 90.0 + seed,
        "cpu_s": None if seed else 120.0,
    }


def all_cells(lomo: tuple[float, float], adamw: tuple[float, float], adamw_low: float = 0.1) -> list[dict]:
    """The second learning rate is the best on the slice; ``adamw_low`` is AdamW's accuracy at the first."""
    cells = []
    for method, values in {"lomo": lomo, "adamw": adamw}.items():
        low, high = METHODS[method].learning_rates
        low_value = 0.99 if method == "lomo" else adamw_low
        cells += [cell(method, low, 0, low_value, (0.70, 0.4)), cell(method, high, 0, values[0], (0.75, 0.5))]
        cells += [cell(method, high, 1, values[1])]
    return [*cells, cell("adamw", low, 1, adamw_low)]


def results(cells: list[dict], zero: float | None = 0.5) -> dict[str, Any]:
    about = {
        "num_train": 900,
        "num_slice": 20,
        "num_validation": 100,
        "most_common": 0.5,
        "settings": ["a=1"],
    }
    run = {
        "command": "python -m benchmarks.quality.run",
        "tasks": {"sst2": about},
        "methods": list(COMPARED),
        "seeds": [0, 1],
        "environment": {"MALLOC_TRIM_THRESHOLD_": "262144"},
    }
    found: dict[str, Any] = {"run": run, "cells": cells, "machine": {"cpu": "a", "cores": "2", "memory": "8"}}
    found["zero_shot"] = [] if zero is None else [{"task": "sst2", "accuracy": zero}]
    return found | {"versions": {"torch": "2"}, "summary": summarize(found)}


def test_the_learning_rate_is_chosen_on_the_slice_alone():
    tried = [cell("lomo", 1.0, 0, 0.9, (0.7, 0.3)), cell("lomo", 2.0, 0, 0.1, (0.8, 0.6))]
    assert best_lr(tried) == 2.0
    assert best_lr([*tried, cell("lomo", 3.0, 0, 0.1, (0.8, 0.5))]) == 3.0, "of equals the lower loss"


@pytest.mark.parametrize(
    ("lomo", "difference", "verdict"),
    [
        ((0.86, 0.90), 0.03, "yes. Its mean minus that of AdamW at 0.0003 is +0.0300"),
        ((0.83, 0.79), -0.04, "**no**, it misses by 0.0400"),
        ((0.83, 0.83), 0.0, "yes. Its mean minus that of AdamW at 0.0003 is -0.0200"),
    ],
    ids=["more", "less than the spread allows", "less, within the spread"],
)
def test_lomo_is_judged_by_means_and_spread(lomo, difference, verdict):
    adamw = (0.84, 0.86) if difference else (0.83, 0.87)
    found = results(all_cells(lomo, adamw))
    assert found["summary"]["missing"] == []
    figures = found["summary"]["tasks"]["sst2"]
    assert figures["methods"]["lomo"]["lr"] == METHODS["lomo"].learning_rates[1]
    assert figures["methods"]["adamw"]["accuracy"]["mean"] == pytest.approx(0.85)
    assert figures["methods"]["adamw"]["accuracy"]["deviation"] == pytest.approx(
        abs(adamw[1] - adamw[0]) / 2**0.5
    )
    assert figures["chance_error"] == pytest.approx(0.05)
    page = report.markdown(found)
    assert f"LOMO at least matches AdamW on SST-2 within the spread: {verdict}" in page
    assert "more than two standard errors above" in page and "longest cell took 1.5 minutes" in page
    assert "2.0 minutes at most a cell, 8 in all" in page


def test_lomo_is_judged_against_the_better_of_adamws_learning_rates():
    """Even where the slice chose the other one."""
    found = results(all_cells((0.86, 0.90), (0.84, 0.86), adamw_low=0.95))
    page = report.markdown(found)
    assert "**no**, it misses by 0.0700. Its mean minus that of AdamW at 0.0001 is -0.0700" in page
    assert "| AdamW | 0.0003 | 0.850 (0.014) | 0.840, 0.860 |" in page
    assert "| the same, not chosen | 0.0001 | 0.950 (0.000) | 0.950, 0.950 |" in page


def test_methods_near_chance_are_named():
    page = report.markdown(results(all_cells((0.58, 0.60), (0.9, 0.9))))
    assert "score 0.500 here, with a standard error of 0.050" in page
    assert "so near chance: LOMO." in page


@pytest.mark.parametrize("number", range(8))
def test_any_part_of_the_cells_makes_a_page(tmp_path: Path, number: int):
    cells = all_cells((0.8, 0.8), (0.9, 0.9))[:number]
    found = results(cells, None if number == 0 else 0.5)
    assert len(found["summary"]["missing"]) == 7 - number + (number == 0)
    report.write_report(tmp_path / "new", found)
    page = (tmp_path / "new" / "quality.md").read_text()
    assert ("Not finished yet" in page) is (number < 7)
    assert ("are not both finished" in page) is (number < 7)
    assert (tmp_path / "new" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "new" / "quality.json").read_text())["cells"]) == number


def write_rows(path: Path, number: int, first: int = 0) -> None:
    rows = [
        {"sentence": f"{SENTENCES[row % 6]} {row}", "label": row % 2} for row in range(first, first + number)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_rows(tmp_path / "data" / "sst2" / "train.jsonl", 40)
    write_rows(tmp_path / "data" / "sst2" / "validation.jsonl", 9, first=100)
    return tmp_path / "data"


def test_the_slice_is_taken_out_of_the_training_file(data: Path, tmp_path: Path):
    files = split("sst2", data, 10, tmp_path / "runs")
    assert (files.num_train, files.num_slice, files.num_validation) == (30, 10, 9)
    assert files.most_common == pytest.approx(5 / 9)
    train, both = (path.read_text().splitlines() for path in (files.train, files.both))
    everything = (data / "sst2" / "train.jsonl").read_text().splitlines()
    validation = (data / "sst2" / "validation.jsonl").read_text().splitlines()
    assert set(train) | set(both[:10]) == set(everything) and not set(train) & set(both[:10])
    assert both[10:] == validation and both[:10] != everything[-10:]
    assert files == split("sst2", data, 10, tmp_path / "runs")
    assert files.train != split("sst2", data, 11, tmp_path / "runs").train
    with pytest.raises(ValueError, match="too few for a slice of 40"):
        split("sst2", data, 40, tmp_path / "runs")


def test_cells_of_a_task_differ_only_in_method_and_learning_rate(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
):
    assert len({len(method.learning_rates) for method in METHODS.values()}) == 1, "equal grids"
    monkeypatch.setattr("sys.argv", ["run.py", "--data", str(data), "--runs", str(tmp_path / "runs")])
    args = run.parse_arguments()
    files = split("sst2", data, 10, tmp_path / "runs")
    kept = set()
    for name, method in METHODS.items():
        own = run.make_cell(args, "sst2", files, name, method.learning_rates[0], 1)
        recipe = parse_recipe(own.recipe, own.overrides)
        assert recipe.data.evaluation == str(files.validation) and recipe.task == "sst2"
        assert method.learning_rates[0] == (recipe.lora.lr if name == "lora" else recipe.optimizer.lr)
        params = json.loads(Path(recipe.deepspeed).read_text())["optimizer"]["params"]
        assert params["rounding"] == "stochastic" and params["seed"] == 1
        kept.add(repr((recipe.steps, recipe.batch, recipe.schedule, recipe.seed, recipe.data)))
    assert len(kept) == 1
    first = run.make_cell(args, "sst2", files, "lomo", 0.1, 0)
    assert parse_recipe(first.recipe, first.overrides).data.evaluation == str(files.both)


# The baseline ------------------------------------------------------------------------------------------

NUM_STEPS, LEARNING_RATE = 3, 0.01


def adamw_of_torch(folder: Path, train: Path) -> list[float]:
    """Loss of each step in one process, one example at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    answers = encode_right_answers(tiny_tokenizer(), named_task("sst2").read(train), 64)
    losses = []
    for step, indices in enumerate(global_batches(len(answers), 8, NUM_STEPS, seed=5)):
        num_targets = sum(len(answers[index].target_ids) for index in indices)
        losses.append(0.0)
        for answer in (answers[index] for index in indices):
            logits = model(input_ids=torch.tensor([answer.input_ids])).logits[0, -len(answer.target_ids) :]
            targets = torch.tensor(answer.target_ids)
            part = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_targets
            part.backward()
            losses[-1] += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / NUM_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.slow
def test_the_baseline_is_adamw_on_the_same_batches(data: Path, tmp_path: Path):
    write_tiny_folder(tmp_path / "model")
    ds_json = {
        "optimizer": {"type": "Lomo", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 1.0,
    }
    (tmp_path / "zero.json").write_text(json.dumps(ds_json))
    recipe = {
        "model": "model",
        "data": {"train": str(data), "evaluation": str(data)},
        "task": "sst2",
        "batch": {"train_batch_size": 8, "micro_batch_size": 2},
        "steps": NUM_STEPS,
        "max_sequence_length": 64,
        "optimizer": {"lr": LEARNING_RATE},
        "schedule": {"type": "linear"},
        "deepspeed": "zero.json",
        "evaluation": {"before": False},
        "seed": 5,
        "save_model": False,
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    own = Cell(
        method="adamw",
        label="AdamW",
        seed=5,
        recipe=tmp_path / "recipe.yaml",
        overrides=("overwrite=true",),
        job=ADAMW_JOB,
    )
    run_cell(own, 2)
    found = read_cell(own)
    expected = adamw_of_torch(tmp_path / "model", data / "sst2" / "train.jsonl")
    assert found["losses"] == pytest.approx(expected, rel=1e-4)
    assert found["accuracy_before"] is None and found["cell_s"] > found["wall_s"]
    assert found["cpu_s"] > 1
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 9 and {len(one["log_likelihoods"]) for one in predictions} == {2}
    right = [one["label"] == one["predicted"] for one in predictions]
    assert found["accuracy_after"] == pytest.approx(sum(right) / 9)
    assert finished(own, 2)
