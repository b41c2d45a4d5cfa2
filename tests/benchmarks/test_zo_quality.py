"""The page of the zeroth-order methods' runs, and what a run is asked to do."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from benchmarks.zo_quality import report, run
from benchmarks.zo_quality.methods import METHODS, ds_json
from lomo_ds.optimizers import optimizer_from_json
from lomo_ds.training.recipe_file import parse_recipe


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_of_the_engine(name: str) -> None:
    content = ds_json(METHODS[name], 7)
    optimizer = content["optimizer"] | {"params": content["optimizer"]["params"] | {"lr": METHODS[name].lr}}
    optimizer_from_json(optimizer)
    with pytest.raises(ValueError, match="type"):
        optimizer_from_json(optimizer | {"type": "ZO-Something"})
    assert content["gradient_clipping"] == 0


def test_a_run_has_its_own_json_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "--runs", str(tmp_path), "--steps", "3", "max_sequence_length=9"]
    monkeypatch.setattr("sys.argv", words)
    cell = run.make_cell(run.parse_arguments(), "adam", 2)
    recipe = parse_recipe(cell.recipe, cell.overrides)
    assert (recipe.steps, recipe.seed, recipe.max_sequence_length) == (3, 2, 9)
    assert recipe.optimizer.lr == METHODS["adam"].lr and '"ZO-Adam"' in Path(recipe.deepspeed).read_text()


def one_run(method: str, seed: int, after: float) -> dict[str, Any]:
    about = {"dtype": "bf16", "num_steps": 20, "num_ranks": 2, "num_eval_examples": 100}
    scores = {"accuracy_before": 0.5, "accuracy_after": after, "loss_before": 2.0, "loss_after": 1.0}
    return about | scores | {"method": method, "seed": seed, "losses": [1.0] * 20, "wall_s": 60.0}


def test_the_page_has_the_spread_over_seeds(tmp_path: Path) -> None:
    runs = [one_run("sgd", seed, after) for seed, after in enumerate((0.6, 0.7, 0.8))] + [
        one_run("adam", 0, 0.4)
    ]
    machine = {"cores": "2", "cpu": "x", "memory": "1 GiB"}
    about = {"command": "python", "common_overrides": []}
    report.write_report(tmp_path, {"run": about, "machine": machine, "versions": {}, "runs": runs})
    page = (tmp_path / "zo_quality.md").read_text()
    assert f"accuracy 0.700 over 3 seeds, standard deviation {stdev([0.6, 0.7, 0.8]):.3f}" in page
    assert "| ZO-Adam | 0 | 0.500 | 0.400 | 2.000 | 1.000 | 1.0 |" in page and "at most 0.050" in page
    assert (tmp_path / "zo_quality.png").stat().st_size > 1000
