"""The rounding benchmark: its cells' settings, and the summary of their losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rounding import report, run
from lomo_ds.training.recipe_file import parse_recipe

METHODS = {"fp32": "nearest", "stochastic": "stochastic", "nearest": "nearest"}
"""Method -> its rounding."""


def cell(method: str, seed: int, losses: list[float], held_out: float) -> dict:
    return {
        "method": method,
        "seed": seed,
        "losses": [9.0] * 5 + losses,
        "loss_before": 3.0,
        "loss_after": held_out,
        "accuracy_after": 0.8,
        "num_steps": 55,
        "num_ranks": 2,
        "num_eval_examples": 1200,
    }


def results(cells: list[dict]) -> dict:
    return {
        "run": {
            "command": "python -m benchmarks.rounding.run",
            "settings": ["steps=55"],
            "common_overrides": [],
            "num_seen": 880,
            "num_train": 9403,
            "moved": 800,
            "ds_json": {"gradient_clipping": 0.0},
        },
        "machine": {"cpu": "a cpu", "cores": "2", "memory": "8 GiB"},
        "versions": {"torch": "2"},
        "summary": report.summarize(cells),
        "cells": cells,
    }


def test_losses_are_compared_with_the_fp32_run_of_their_seed(tmp_path: Path):
    cells = [
        cell("fp32", 0, [0.5, 0.3] * 25, 0.40),
        cell("stochastic", 0, [0.51, 0.29] * 25, 0.402),
        cell("nearest", 0, [0.55, 0.35] * 25, 0.50),
        cell("fp32", 1, [0.4] * 50, 0.42),
    ]
    summary = report.summarize(cells)
    stochastic, nearest = (summary["verdicts"][method] for method in ("stochastic", "nearest"))
    assert stochastic["last_loss"] == {"ratio": pytest.approx(1.0), "within": True, "deviation": None}
    assert stochastic["loss_after"] == {"ratio": pytest.approx(1.005), "within": True, "deviation": None}
    assert nearest["last_loss"] == {"ratio": pytest.approx(1.125), "within": False, "deviation": None}
    assert summary["rows"][1]["last_loss_error"] == pytest.approx(0.01 / 7 / 0.4)  # +-0.01 over 49 degrees
    assert summary["rows"][2]["last_loss_error"] == pytest.approx(0.0)
    assert summary["rows"][2]["stretches"] == pytest.approx([1.125])
    assert summary["fp32_spread"]["loss_after"] == pytest.approx([0.05])
    report.write_report(tmp_path, results(cells))
    page = (tmp_path / "rounding.md").read_text()
    assert "| bf16, nearest | 0 | 0.4500 | 1.1250 \u00b1 0.0000 | 3.0000 | 0.5000 | 1.2500 | 0.8000 |" in page
    assert "| bf16, stochastic | yes (+0.00%) | yes (+0.50%) |" in page
    assert "| bf16, nearest | **no** (+12.50%) | **no** (+25.00%) |" in page and "by +5.00%" in page
    assert "- bf16, nearest, seed 0: +12.50%" in page
    assert json.loads((tmp_path / "rounding.json").read_text())["summary"]["rows"][0]["ratios"] == {}
    assert (tmp_path / "rounding.png").read_bytes().startswith(b"\x89PNG")


def test_several_seeds_have_a_mean_and_a_spread():
    cells = [cell("fp32", seed, [0.4] * 50, 0.40) for seed in (0, 1)]
    cells += [cell("stochastic", 0, [0.4] * 50, 0.402), cell("stochastic", 1, [0.4] * 50, 0.410)]
    verdict = report.summarize(cells)["verdicts"]["stochastic"]["loss_after"]
    assert verdict == {
        "ratio": pytest.approx(1.015),
        "within": False,
        "deviation": pytest.approx(0.0002**0.5),
    }
    page = report.markdown(results(cells))
    assert "| bf16, stochastic | yes (+0.00%; 0.00%) | **no** (+1.50%; 1.41%) |" in page


def test_without_fp32_there_is_no_verdict():
    cells = [cell("nearest", 0, [0.4] * 50, 0.4)]
    assert "No run to compare with fp32" in report.markdown(results(cells))


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    for name, rows in (("train", 9), ("held_out", 3)):
        lines = ["label\ttext", *(f"{row % 2}\t{name} {row}" for row in range(rows))]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    shipped = Path(__file__).resolve().parents[2] / "benchmarks" / "common" / "movie_reviews.yaml"
    text = shipped.read_text().replace("../../downloads/movie_reviews/", "")
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("method", METHODS)
def test_cells_differ_in_dtype_and_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, recipe_path: Path, tmp_path: Path, method: str
):
    arguments = ["--recipe", str(recipe_path), "--runs", str(tmp_path / "runs"), "--moved", "2"]
    monkeypatch.setattr("sys.argv", ["run.py", *arguments, "steps=7"])
    args = run.parse_arguments()
    own = run.make_cell(args, method, 5, run.split_again(args.recipe, args.runs, args.moved))
    recipe = parse_recipe(own.recipe, own.overrides)
    assert (recipe.seed, recipe.steps, recipe.optimizer.lr) == (5, 7, 5e-4)
    train, held_out = (
        Path(path).read_text().splitlines() for path in (recipe.data.train, recipe.data.evaluation)
    )
    assert train == ["label\ttext", *(f"{row % 2}\ttrain {row}" for row in range(7))]
    assert [line.partition("\t")[2] for line in held_out[1:]] == [
        "held_out 0",
        "held_out 1",
        "held_out 2",
        "train 7",
        "train 8",
    ]
    content = json.loads(Path(recipe.deepspeed).read_text())
    assert ("bf16" in content) is (method != "fp32")
    assert content["gradient_clipping"] == 0 and content["optimizer"]["params"]["seed"] == 5
    assert content["optimizer"]["params"]["rounding"] == METHODS[method]
