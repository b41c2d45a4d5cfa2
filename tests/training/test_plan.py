"""Where a run's examples come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from lomo_ds.training.plan import RunPlan, plan_run
from lomo_ds.training.recipe_file import load_recipe
from tests.tasks.test_hub import FakeDatasets
from tests.tasks.test_named import ROWS, write

RTE = ROWS["rte"][0]
ON_THE_HUB = {"dataset": "super_glue", "name": "rte", "split": "train"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([RTE | {"label": n % 2} for n in range(6)]))
    named = ("entailment", "not_entailment")
    write(tmp_path / "RTE" / "train.jsonl", *(RTE | {"label": named[n % 2]} for n in range(6)))
    write(tmp_path / "RTE" / "val.jsonl", *(RTE | {"label": named[n % 2]} for n in range(6)))
    ds_json = {"optimizer": {"type": "Lomo", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 3}}
    (tmp_path / "zero.json").write_text(json.dumps(ds_json))
    return tmp_path


def plan(folder: Path, **changes: object) -> RunPlan:
    recipe = {
        "model": "org/name",
        "data": {"train": ON_THE_HUB, "evaluation": ON_THE_HUB | {"split": "validation"}},
        "task": "rte",
        "batch": {"train_batch_size": 2},
        "steps": 3,
        "deepspeed": "zero.json",
        "output": "out",
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return plan_run(load_recipe(folder / "recipe.yaml"), 2)


def test_a_named_task_is_the_same_from_hub_and_files(folder: Path):
    from_hub, from_files = plan(folder), plan(folder, data={"train": ".", "evaluation": "."})
    assert from_hub.train_examples == from_files.train_examples
    assert from_hub.held_out_examples == from_files.held_out_examples
    asked = [args + (kwargs["split"],) for args, kwargs in sys.modules["datasets"].asked]
    assert asked == [("super_glue", "rte", "train"), ("super_glue", "rte", "validation")]


def test_the_recipes_own_prompt_takes_the_hubs_columns(folder: Path):
    task = {"prompt": "{premise} So {hypothesis}", "options": [" yes", " no"]}
    first, second, *_ = plan(folder, task=task).train_examples
    assert first.prompt == "It rains. So It is wet." and (first.label, second.label) == (0, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ON_THE_HUB | {"spilt": "train"}}, "train: unknown key 'spilt'; did you mean 'split'"),
        ({"train": {"split": "train"}}, "data.train.dataset is missing"),
        (
            {"train": ON_THE_HUB | {"dataset": "/nowhere"}},
            r"data\.train\.dataset: there is no folder /nowhere",
        ),
        (
            {"train": ".", "evaluation": ON_THE_HUB | {"dataset": "./x"}},
            "data.evaluation.dataset: there is no",
        ),
        ({"train": ON_THE_HUB, "format": "tsv"}, "format is for files"),
    ],
)
def test_mistakes_in_the_section_are_named(folder: Path, data: dict, message: str):
    with pytest.raises(ValueError, match=message):
        plan(folder, data=data)


def test_a_folder_is_relative_to_the_recipe(folder: Path):
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_info.json").touch()
    plan(folder, data={"train": {"dataset": "saved"}})
    assert sys.modules["datasets"].asked == [str(folder / "saved")]


@pytest.mark.parametrize("key", ["train", "evaluation"])
def test_an_error_in_loading_names_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=rf"^data\.{key}: needs the package datasets"):
        plan(folder, data={"train": ".", key: ON_THE_HUB})
