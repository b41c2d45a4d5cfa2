"""The title of a run's plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from lomo_ds.training.plan import RunPlan
from lomo_ds.training.plot import plot_title
from lomo_ds.training.recipe_file import parse_recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("optimizer", "overrides", "method"),
    [
        ("Lomo", [], "LOMO"),
        ("adalomo", [], "AdaLomo"),
        ("AdaLomo", ["lora={}"], "AdaLomo + LoRA"),
        ("Lomo", ["lora.train_base=false"], "LoRA"),
    ],
)
def test_the_title_names_the_method(optimizer: str, overrides: list[str], method: str):
    recipe = parse_recipe(QUICKSTART, overrides)
    ds_json = {"optimizer": {"type": optimizer}}
    plan = RunPlan(recipe=recipe, ds_json=ds_json, num_steps=1, train_examples=[], held_out_examples=[])
    assert plot_title(plan, 2) == f"SmolLM2-135M-Instruct, {method}, 2 ranks"
