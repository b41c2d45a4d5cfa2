"""Recipes: overrides, paths, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lomo_ds.recipe import BatchRecipe
from lomo_ds.training.recipe_file import load_recipe, parse_recipe, require_free_output

MINIMAL = {
    "model": "org/name",
    "data": {"train": "train.tsv"},
    "task": {"prompt": "{text}", "options": [" no", " yes"]},
    "batch": {"train_batch_size": 4},
    "steps": 3,
    "deepspeed": "zero.json",
    "output": "out",
}


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(MINIMAL))
    for name in ("train.tsv", "zero.json"):
        (folder / name).touch()
    return folder / "recipe.yaml"


def test_overrides_replace_keys_at_every_depth(recipe_path: Path):
    overrides = ["optimizer.lr=3e-2", "seed=7", "steps=null", "epochs=2", "task.options=[a, b, c]"]
    recipe = parse_recipe(recipe_path, [*overrides, "schedule.params={warmup_type: linear}"])
    assert recipe.optimizer.lr == 0.03 and recipe.seed == 7
    assert (recipe.steps, recipe.epochs) == (None, 2)
    assert recipe.task.options == ("a", "b", "c")
    assert recipe.schedule.params == {"warmup_type": "linear"}
    assert recipe.lora is None
    lora = parse_recipe(recipe_path, ["lora.train_base=false", "lora.target_modules=[k_proj]"]).lora
    assert (lora.r, lora.train_base, lora.target_modules) == (2, False, ("k_proj",))


def test_paths_are_relative_to_the_recipe_and_in_overrides_to_the_working_directory(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    recipe = parse_recipe(recipe_path)
    assert recipe.data.train == str(recipe_path.parent / "train.tsv")
    assert (recipe.model, recipe.output) == ("org/name", "out")
    recipe = parse_recipe(recipe_path, ["data.train=other.tsv", "model=model", "deepspeed=/d.json"])
    assert recipe.data.train == str(tmp_path / "other.tsv")
    assert (recipe.model, recipe.deepspeed) == (str(tmp_path / "model"), "/d.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "unknown key 'stpes'; did you mean 'steps'"),
        ("optimizer.learning_rate=3", "optimizer: unknown key 'learning_rate'"),
        ("epochs=3", "give exactly one of epochs and steps"),
        ("steps=0", "steps has to be at least 1"),
        ("steps=many", "steps has to be a whole number, not 'many'"),
        ("optimizer.lr=-1", "optimizer.lr has to be at least 0, not -1"),
        ("task.options=[a]", "at least two different answers"),
        ("task.label_names=[a]", "label_names has 1 entries, options 2"),
        ("task.options=null", "give exactly one of options"),
        ("task.response=text", "give exactly one of options"),
        ("task={prompt: x, response: y, label_names: [a]}", "label_names are for options"),
        ("schedule.warmup_ratio=1", "schedule.warmup_ratio has to be below 1, not 1"),
        ("schedule.warmup_ratio=.nan", "schedule.warmup_ratio has to be a finite number, not nan"),
        ("evaluation.batch_size=0", "evaluation.batch_size has to be at least 1, not 0"),
        ("data.format=csv", "data.format has to be 'tsv' or 'jsonl', not 'csv'"),
        ("steps", "write key=value"),
        ("steps.x=3", "'steps' is a value, not a section"),
        ("seed={", "not YAML"),
        ("lora.rank=4", "lora: unknown key 'rank'"),
        ("lora.r=0", "lora.r has to be at least 1, not 0"),
        ("lora.target_modules=[]", "lora.target_modules has to be a list of at least 1"),
        ("lora.lr=.inf", "lora.lr has to be a finite number, not inf"),
    ],
)
def test_mistakes_are_named(recipe_path: Path, override: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe_path, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deepspeed=gone.json", "deepspeed: there is no file"),
        ("data.train=gone.tsv", "data.train: there is no file"),
        ("data.evaluation=gone.tsv", "data.evaluation: there is no file"),
        ("weights=gone", "weights: there is no folder"),
        ("task=chat chat_template_path=gone", "chat_template_path: there is no file"),
        ("model=./gone", "model: there is no folder"),
        ("model=/gone/too", "model: there is no folder"),
    ],
)
def test_missing_inputs_are_named(recipe_path: Path, override: str, message: str):
    load_recipe(recipe_path)
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_path, override.split())


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "mapping"), ("a: [", "not YAML"), (None, "cannot read")]
)
def test_files_that_are_not_recipes(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_recipe(tmp_path / "r.yaml")


def test_results_are_not_mixed(recipe_path: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    override = f"output={tmp_path / 'out'}"
    require_free_output(parse_recipe(recipe_path, [override]))
    (tmp_path / "out" / "something").touch()
    with pytest.raises(ValueError, match="overwrite: true"):
        require_free_output(parse_recipe(recipe_path, [override]))
    require_free_output(parse_recipe(recipe_path, [override, "overwrite=true"]))
    with pytest.raises(ValueError, match="is a file"):
        require_free_output(parse_recipe(recipe_path, [f"output={tmp_path / 'out' / 'something'}"]))


def test_a_batch_is_split_or_refused():
    assert BatchRecipe(train_batch_size=24).per_rank(3) == (8, 1)
    assert BatchRecipe(train_batch_size=24, micro_batch_size=2).per_rank(3) == (2, 4)
    with pytest.raises(ValueError, match="24 does not divide over 5 ranks"):
        BatchRecipe(train_batch_size=24).per_rank(5)
    with pytest.raises(ValueError, match="micro_batch_size 3 does not divide a rank's share of 8"):
        BatchRecipe(train_batch_size=24, micro_batch_size=3).per_rank(3)
