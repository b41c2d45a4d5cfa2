"""The dtype to compute in: what is measured decides, and slow dtypes are told of."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from lomo_ds.config import from_mapping
from lomo_ds.recipe import Recipe
from lomo_ds.training import compute_dtype
from lomo_ds.training.compute_dtype import (
    MatmulSpeed,
    dtype_of_json,
    measure_cpu,
    note_on_slow_dtype,
    with_agreed_dtype,
    with_dtype,
)
from lomo_ds.training.ds_json import fill_ds_json
from tests.harness import run_ranks
from tests.training.test_recipe_file import MINIMAL

AS_FAST = MatmulSpeed(gflops=90.0, fp32_gflops=100.0)
SLOW = MatmulSpeed(gflops=0.85, fp32_gflops=23.5)


def recipe(**changes) -> Recipe:
    return from_mapping(Recipe, {**MINIMAL, "optimizer": {"lr": 0.5}, **changes}, "test")


@pytest.mark.parametrize(("speed", "dtype"), [(AS_FAST, "bf16"), (SLOW, "fp32")])
def test_auto_takes_what_this_cpu_is_fast_in(speed: MatmulSpeed, dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute_dtype, "measure_cpu", lambda name: speed)
    changed, reason = with_dtype(recipe(dtype="auto"), on_cpu=True)
    assert changed.dtype == dtype
    assert reason.startswith(f"computing in {dtype}: this CPU multiplies bf16 ")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_what_the_recipe_says_is_not_measured(dtype: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(compute_dtype, "measure_cpu")
    given = recipe(dtype=dtype)
    assert with_dtype(given, on_cpu=True) == (given, "")


def test_the_reason_has_both_speeds():
    assert SLOW.comparison("bf16") == (
        "this CPU multiplies bf16 28 times slower than fp32 (0.8 and 23.5 GFLOP/s on one thread)"
    )
    assert "0.9 times as fast as fp32 (90.0 and 100.0" in AS_FAST.comparison("bf16")


def test_measuring_leaves_the_number_of_threads():
    before = torch.get_num_threads()
    speed = measure_cpu("bf16")
    assert speed.gflops > 0 and speed.fp32_gflops > 0
    assert torch.get_num_threads() == before


def agreed_dtype() -> str | None:
    import deepspeed.comm as dist

    own = SLOW if dist.get_rank() == 0 else AS_FAST
    with mock.patch.object(compute_dtype, "measure_cpu", lambda name: own):
        return with_agreed_dtype(recipe(dtype="auto"), on_cpu=True)[0].dtype


def test_ranks_take_what_rank_0_has_measured():
    assert run_ranks(2, agreed_dtype) == ["fp32", "fp32"]


@pytest.mark.parametrize(
    ("ds_json", "note"),
    [
        ({}, ""),
        ({"bf16": {"enabled": True}}, 'GFLOP/s on one thread): set "dtype: fp32" (or auto) in the recipe'),
        ({"fp16": {"enabled": True}}, "this CPU multiplies fp16 28 times slower"),
    ],
)
def test_a_slow_dtype_is_told_of(ds_json: dict, note: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute_dtype, "measure_cpu", lambda name: SLOW)
    assert note in note_on_slow_dtype(ds_json) and bool(note) == bool(note_on_slow_dtype(ds_json))
    monkeypatch.setattr(compute_dtype, "measure_cpu", lambda name: AS_FAST)
    assert note_on_slow_dtype(ds_json) == ""


@pytest.mark.parametrize("section", ["bf16", "bfloat16", "fp16"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_the_recipes_dtype_replaces_the_jsons(section: str, dtype: str | None):
    ds_json = {"zero_optimization": {"stage": 3}, section: {"enabled": True}}
    filled = fill_ds_json(ds_json, recipe(dtype=dtype), 2)
    assert dtype_of_json(filled) == (dtype or {"bfloat16": "bf16"}.get(section, section))
    assert ds_json[section] == {"enabled": True}, "the user's own mapping has changed"


def test_settings_of_the_loss_scale_stay():
    ds_json = {"zero_optimization": {"stage": 3}, "fp16": {"enabled": False, "initial_scale_power": 8}}
    assert fill_ds_json(ds_json, recipe(dtype="fp16"), 2)["fp16"] == {
        "enabled": True,
        "initial_scale_power": 8,
    }
