"""The search for a learning rate: what it tries, what judges it, and that the run after it is unchanged."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lomo_ds.rules.table import RULES
from lomo_ds.training.lr_trials import best_of, is_at_end, search
from lomo_ds.training.plan import plan_run
from lomo_ds.training.recipe_file import load_recipe
from tests.faults.job import run_to_end, same_run, write_inputs
from tests.harness import run_ranks

GRID = [0.0032, 0.01, 0.032, 0.1, 0.32]


def bowl(best: float) -> Callable[[float], float]:
    """A loss with its minimum at ``best``, which diverges from ten times that on."""
    return lambda lr: math.log(lr / best) ** 2 if lr < 10 * best else math.nan


@pytest.mark.parametrize(
    ("best", "tried", "found"),
    [
        (0.04, GRID, 0.032),
        (0.002, [0.001, *GRID], 0.0032),
        (0.0009, [0.00032, 0.001, *GRID], 0.001),
        (1.1, [*GRID, 1.0, 3.2], 1.0),
        (1e-6, [0.00032, 0.001, *GRID], None),
    ],
)
def test_a_best_at_an_end_asks_for_one_more(best: float, tried: list[float], found: float | None):
    trials = search(0.032, bowl(best))
    assert [trial.lr for trial in trials] == pytest.approx(tried)
    if found is None:
        assert all(trial.loss == math.inf for trial in trials)
    else:
        assert best_of(trials).lr == found and not is_at_end(trials)


def test_a_search_that_ends_at_its_last_learning_rate_says_so():
    trials = search(0.032, lambda lr: 1 / lr)
    assert len(trials) == 7 and best_of(trials).lr == trials[-1].lr and is_at_end(trials)


SHORT = ("steps=3", "checkpoint.every=3", "seed=3")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a search, in ``out``, and of its inputs: dropout and stochastic rounding."""
    folder = tmp_path_factory.mktemp("lr_search")
    recipe = write_inputs(folder / "inputs")
    overrides = [*SHORT, "lr_search={steps: 2, num_examples: 6}", "optimizer.lr=7.0"]
    text = run_to_end(recipe, folder / "out", overrides)
    assert text.count("lr_search: ") == len(found_in(folder)["trials"]) + 1
    return folder


def found_in(folder: Path) -> dict:
    return json.loads((folder / "out" / "lr_search.json").read_text())


def test_a_search_leaves_its_table_its_plot_and_the_recipe_that_needs_no_search(searched: Path):
    found, out = found_in(searched), searched / "out"
    assert found["default_lr"] == RULES["AdaLomo"].lr
    assert (found["num_steps"], found["num_examples"]) == (2, 6) and len(found["trials"]) >= 5
    assert found["lr"] == min(found["trials"], key=lambda trial: trial["loss"])["lr"]
    assert (out / "lr_search.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "lr_search_start").exists()
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["optimizer"]["lr"] == found["lr"] and not written["lr_search"]


def test_the_run_after_a_search_is_the_run_at_the_learning_rate_found(searched: Path):
    """To the bit."""
    lr = found_in(searched)["lr"]
    run_to_end(searched / "inputs" / "recipe.yaml", searched / "plain", [*SHORT, f"optimizer.lr={lr}"])
    assert same_run(searched / "out", searched / "plain")


def test_a_try_is_a_short_run_without_the_examples_that_judge_it(searched: Path):
    """Its loss is the held-out loss of such a run from the folder, on files of those examples."""
    header, *rows = (searched / "inputs" / "train.tsv").read_text().splitlines()
    judging = random.Random(3).sample(range(60), 6)
    files = {"rest": [row for number, row in enumerate(rows) if number not in judging]}
    files["judging"] = [row for number, row in enumerate(rows) if number in judging]
    for name, kept in files.items():
        (searched / f"{name}.tsv").write_text("\n".join([header, *kept]) + "\n")
    trial = found_in(searched)["trials"][-1]
    own = [f"data.train={searched / 'rest.tsv'}", f"data.evaluation={searched / 'judging.tsv'}", "steps=2"]
    overrides = [*SHORT, *own, f"optimizer.lr={trial['lr']}"]
    run_to_end(searched / "inputs" / "recipe.yaml", searched / "try", overrides)
    assert json.loads((searched / "try" / "summary.json").read_text())["loss_after"] == trial["loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora={train_base: false}"], "lora.train_base: false does not use"),
        (["schedule={type: WarmupLR, params: {warmup_max_lr: auto}}"], "schedule.type to linear, cosine or"),
        (["batch.train_batch_size=54"], "60 training examples are too few"),
        (["lr_search={steps: 0}"], "lr_search"),
        (["lr_search={number: 3}"], "number"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(overrides: list[str], message: str, tmp_path: Path):
    path = write_inputs(tmp_path / "inputs")
    with pytest.raises(ValueError, match=message) as refusal:
        plan_run(load_recipe(path, ["lr_search=true", *overrides]), 2)
    assert "\n" not in str(refusal.value)


def found_by_ranks(path: Path, overrides: list[str]) -> object:
    from lomo_ds.training.lr_search import with_found_lr

    return with_found_lr(load_recipe(path, overrides), path.parent)


def test_a_run_that_is_resumed_keeps_the_learning_rate_of_its_search(tmp_path: Path):
    path, out = write_inputs(tmp_path / "inputs"), tmp_path / "out"
    overrides = [f"output={out}", "lr_search=true"]
    with pytest.raises(ValueError, match="there is no .*lr_search.json"):
        run_ranks(1, found_by_ranks, path, overrides)
    out.mkdir()
    (out / "lr_search.json").write_text('{"lr": 0.25}')
    (recipe,) = run_ranks(1, found_by_ranks, path, overrides)
    assert recipe.optimizer.lr == 0.25 and not recipe.lr_search
