"""The adapter benchmark: which cells are done, and what it makes of their figures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from benchmarks.adapters import report, run
from benchmarks.adapters.methods import METHODS
from benchmarks.common import cells as benchmark_cells
from lomo_ds.training.ds_json import fill_ds_json, read_ds_json
from lomo_ds.training.recipe_file import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "benchmarks" / "common" / "movie_reviews.yaml"


def cell(method: str, seed: int, accuracy: float) -> dict:
    return {
        "method": method,
        "seed": seed,
        "losses": [9.0] + [0.5, 0.7] * 4,
        "accuracy_before": 0.5,
        "accuracy_after": accuracy,
        "loss_after": 0.4,
        "num_eval_examples": 400,
        "num_steps": 9,
        "num_ranks": 2,
        "dtype": "bfloat16",
        "peak_device_bytes": 1.5e9,
        "gradient_host_bytes": 3e8,
    }


def results(cells: list[dict]) -> dict:
    methods = dict.fromkeys(entry["method"] for entry in cells)
    return {
        "run": {
            "command": "python -m benchmarks.adapters.run",
            "overrides": {method: METHODS[method].overrides for method in methods},
            "common_overrides": ["steps=9"],
            "environment": {"MALLOC_TRIM_THRESHOLD_": "262144"},
        },
        "machine": {"cpu": "a cpu", "cores": "2", "memory": "8 GiB"},
        "versions": {"torch": "2"},
        "summary": report.summarize(cells),
        "cells": cells,
    }


def test_means_spread_and_verdict():
    accuracies = {"lora": (0.6, 0.7), "lomo+lora": (0.7, 0.8)}
    cells = [cell(method, seed, values[seed]) for method, values in accuracies.items() for seed in (0, 1)]
    summary = report.summarize(cells)
    figures = summary["methods"]["lora"]
    assert figures["accuracy_after"]["mean"] == pytest.approx(0.65)
    assert figures["accuracy_after"]["deviation"] == pytest.approx(0.005**0.5)
    assert figures["last_loss"]["mean"] == pytest.approx(0.6)
    assert summary["lomo_lora_at_least_lora"] is True
    assert summary["lomo_lora_less_lora"]["values"] == pytest.approx([0.1, 0.1])
    page = report.markdown(results(cells))
    assert "| LOMO + LoRA | 0.500 (0.000) | 0.750 (0.071) | 0.400 (0.000) | 0.600 (0.000) |" in page
    assert "(means): yes. The difference is +0.1000" in page and "| LoRA alone | 0.6000 | 0.7000 |" in page
    assert "`lora.train_base=false`" in page and "`steps=9`" in page


def test_one_seed_and_one_method_make_a_page(tmp_path: Path):
    report.write_report(tmp_path / "new", results([cell("lomo", 0, 0.7)]))
    assert "not both in this run" in (tmp_path / "new" / "adapters.md").read_text()
    written = json.loads((tmp_path / "new" / "adapters.json").read_text())
    assert written["summary"]["lomo_lora_at_least_lora"] is None


@pytest.mark.parametrize("method", ["lora", "lomo+lora", "lomo"])
def test_a_cell_is_done_when_it_holds_this_recipes_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
):
    monkeypatch.setattr("sys.argv", ["run.py", "--runs", str(tmp_path)])
    own = run.make_cell(run.parse_arguments(), method, 3)
    recipe = parse_recipe(RECIPE, own.overrides)
    assert (recipe.lora is None) is (method == "lomo") and recipe.seed == 3
    assert not benchmark_cells.finished(own, 2)
    output = Path(recipe.output)
    output.mkdir()
    (output / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(recipe)))))
    (output / "ds_config.json").write_text(
        json.dumps(fill_ds_json(read_ds_json(recipe.deepspeed), recipe, 2))
    )
    (output / "summary.json").write_text("{}")
    assert benchmark_cells.finished(own, 2)
    assert not benchmark_cells.finished(own, 4)
    assert not benchmark_cells.finished(replace(own, overrides=(*own.overrides, "steps=2")), 2)
