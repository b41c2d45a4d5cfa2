"""The DeepSpeed JSON as used: the recipe's values replace the JSON's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lomo_ds.config import from_mapping
from lomo_ds.optimizers import optimizer_from_json
from lomo_ds.recipe import Recipe
from lomo_ds.training.ds_json import fill_ds_json, fill_scheduler, read_ds_json
from tests.training.test_recipe_file import MINIMAL

ZERO3 = {"zero_optimization": {"stage": 3}}


def recipe(**changes) -> Recipe:
    return from_mapping(Recipe, {**MINIMAL, "optimizer": {"lr": 0.5}, **changes}, "test")


def test_missing_and_auto_values_are_filled_in():
    autos = {
        "train_batch_size": "auto",
        "optimizer": {"type": "Lomo", "params": {"lr": "auto", "weight_decay": "auto", "apply": "auto"}},
    }
    filled = fill_ds_json(ZERO3 | autos, recipe(batch={"train_batch_size": 12, "micro_batch_size": 2}), 3)
    assert filled["train_batch_size"] == 12
    assert filled["train_micro_batch_size_per_gpu"] == 2
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["optimizer"] == {"type": "Lomo", "params": {"lr": 0.5, "apply": "auto"}}
    fill_scheduler(filled, recipe(), 3)
    assert fill_ds_json(ZERO3, recipe(), 1)["optimizer"] == {"type": "Lomo", "params": {"lr": 0.5}}


def test_the_json_keeps_what_the_recipe_does_not_set():
    optimizer = {"type": "Lomo", "params": {"lr": 0.25, "weight_decay": 0.1}}
    filled = fill_ds_json(ZERO3 | {"optimizer": optimizer}, recipe(optimizer={}), 2)
    assert filled["optimizer"] == optimizer


def test_the_recipe_replaces_values_of_the_json():
    ds_json = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Lomo", "params": {"lr": 0.1}}}
    filled = fill_ds_json(ZERO3 | ds_json, recipe(), 2)
    assert filled["train_micro_batch_size_per_gpu"] == 2 and filled["train_batch_size"] == 4
    assert filled["optimizer"]["params"]["lr"] == 0.5
    assert ds_json["optimizer"]["params"]["lr"] == 0.1, "the user's own mapping has changed"


@pytest.mark.parametrize(
    ("ds_json", "changes", "message"),
    [
        ({}, {"optimizer": {}}, "optimizer.lr is missing"),
        ({"scheduler": {"type": "WarmupLR"}}, {"schedule": {"type": "linear"}}, "both set the schedule"),
        ({}, {"schedule": {"type": "linear", "params": {"a": 1}}}, "schedule.params are for DeepSpeed"),
        ({}, {"batch": {"train_batch_size": 5}}, "does not divide over 2 ranks"),
    ],
)
def test_contradictions_are_refused(ds_json: dict, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        fill_ds_json(ZERO3 | ds_json, recipe(**changes), 2)


def test_auto_in_deepspeeds_scheduler_is_filled_in():
    params = {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_max_lr": "auto"}
    schedule = {"type": "WarmupDecayLR", "warmup_ratio": 0.25, "params": params}
    filled = fill_ds_json(ZERO3, recipe(schedule=schedule), 2)
    fill_scheduler(filled, recipe(schedule=schedule), 20)
    expected = {"total_num_steps": 20, "warmup_num_steps": 5, "warmup_max_lr": 0.5}
    assert filled["scheduler"] == {"type": "WarmupDecayLR", "params": expected}


ADAPTERS = {"params": ["*.lora_*"], "type": "AdamW", "lr": 5e-4, "weight_decay": 0.0}


def test_adapters_come_before_the_jsons_own_groups():
    norms = {"params": ["*norm*"], "weight_decay": 0.0}
    json_with_group = ZERO3 | {"optimizer": {"type": "Lomo", "params": {"param_groups": [norms]}}}
    filled = fill_ds_json(json_with_group, recipe(lora={}), 2)
    assert filled["optimizer"]["params"] == {"lr": 0.5, "param_groups": [ADAPTERS, norms]}
    optimizer_from_json(filled["optimizer"])
    assert fill_ds_json(filled, recipe(lora={}), 2) == filled
    assert "param_groups" not in fill_ds_json(ZERO3, recipe(), 2)["optimizer"]["params"]


def test_a_frozen_base_needs_no_learning_rate():
    filled = fill_ds_json(ZERO3, recipe(optimizer={}, lora={"lr": 0.25, "train_base": False}), 2)
    assert filled["optimizer"]["params"] == {"lr": 0.25, "param_groups": [ADAPTERS | {"lr": 0.25}]}
    with pytest.raises(ValueError, match="optimizer.lr is missing"):
        fill_ds_json(ZERO3, recipe(optimizer={}, lora={}), 2)


def test_a_classifiers_head_is_trained_with_the_adapters_of_a_frozen_base():
    """The last group has what no other group names; nothing is kept for what is frozen."""
    norms = {"params": ["*norm*"], "weight_decay": 0.0}
    ds_json = ZERO3 | {"optimizer": {"type": "Lomo", "params": {"param_groups": [norms]}}}
    changes = {"lora": {"train_base": False}, "model_class": "AutoModelForSequenceClassification"}
    filled = fill_ds_json(ds_json, recipe(**changes), 2)
    assert filled["optimizer"]["params"]["param_groups"] == [norms, ADAPTERS | {"params": ["*"]}]
    assert fill_ds_json(filled, recipe(**changes), 2) == filled
    changes["lora"] = {"train_base": True}
    filled = fill_ds_json(ds_json, recipe(**changes), 2)
    assert filled["optimizer"]["params"]["param_groups"] == [ADAPTERS, norms]


def test_each_group_keeps_its_peak_under_deepspeeds_scheduler():
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
    changes = {"schedule": schedule, "lora": {"lr": 0.25}}
    filled = fill_ds_json(ZERO3, recipe(**changes), 2)
    fill_scheduler(filled, recipe(**changes), 20)
    assert filled["scheduler"]["params"]["warmup_max_lr"] == [0.5, 0.25]


def test_an_auto_that_remains_is_refused():
    filled = fill_ds_json({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, recipe(), 2)
    with pytest.raises(ValueError, match='"zero_optimization.reduce_bucket_size" is "auto"'):
        fill_scheduler(filled, recipe(), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "JSON object"), (json.dumps({"zero_optimization": {"stage": 2}}), "stage")],
)
def test_unusable_files_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ds_json(tmp_path / "ds.json")
