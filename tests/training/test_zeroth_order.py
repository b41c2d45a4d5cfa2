"""The loop, a whole run and a script, with nothing but the JSON changed to a zeroth-order method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lomo_ds.recipe import LoraRecipe
from lomo_ds.training.ds_json import _add_adapters, is_hybrid
from lomo_ds.training.metrics import StepMetrics
from tests.faults.job import run_to_end, write_inputs
from tests.harness import run_ranks
from tests.tiny import tiny_llama
from tests.training.test_loop import NUM_STEPS, training_set

EPS = 1e-3


def train_tiny(micro_batch_size: int, num_micro: int) -> list[StepMetrics]:
    import lomo_ds
    from lomo_ds.training.interruption import StopFlag
    from lomo_ds.training.loop import train

    ds_json = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro,
        "optimizer": {"type": "ZO-SGD", "params": {"lr": 1e-3, "eps": EPS}},
        "zero_optimization": {"stage": 3},
    }
    engine, *_ = lomo_ds.initialize(model=tiny_llama(), config=ds_json)
    return [metrics for metrics, _ in train(engine, training_set(micro_batch_size), StopFlag())]


def test_the_loop_makes_the_same_steps_on_any_ranks() -> None:
    """Losses are off by what fp32 sums are; a quotient of their differences by that over eps."""
    histories = [
        run_ranks(size, train_tiny, *batch)[0] for size, batch in ((1, (12, 1)), (2, (3, 2)), (3, (4, 1)))
    ]
    first = histories[0]
    assert [metrics.step for metrics in first] == list(range(1, NUM_STEPS + 1))
    assert len({metrics.loss for metrics in first}) == NUM_STEPS
    for history in histories[1:]:
        for metrics, expected in zip(history, first, strict=True):
            assert metrics.loss == pytest.approx(expected.loss, rel=1e-4)
            assert metrics.grad_norm == pytest.approx(expected.grad_norm, rel=2e-2)


def with_method(recipe: Path, **params: Any) -> Path:
    """The recipe, whose JSON names ZO-SGD and is otherwise the same but for what needs gradients."""
    ds_json = json.loads((recipe.parent / "zero.json").read_text())
    ds_json["optimizer"] = {"type": "ZO-SGD", "params": {"lr": "auto", **params}}
    del ds_json["gradient_clipping"]
    (recipe.parent / "zero.json").write_text(json.dumps(ds_json))
    return recipe


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_is_interrupted_and_resumed(tmp_path: Path) -> None:
    """Data, checkpoints, export: bit for bit the run that was not interrupted."""
    recipe = with_method(write_inputs(tmp_path / "inputs"))
    run_to_end(recipe, tmp_path / "whole", ["steps=4"])
    run_to_end(recipe, tmp_path / "cut", ["steps=4", "checkpoint.every=2"])
    (tmp_path / "cut" / "summary.json").unlink()
    for later in (tmp_path / "cut" / "checkpoints").glob("*4"):
        assert later.is_dir()
        (later / "manifest.json").unlink()
    run_to_end(recipe, tmp_path / "cut", ["steps=4", "checkpoint.every=2"])
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert models[0] == models[1]


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_trains_the_last_layer_by_its_gradients(tmp_path: Path) -> None:
    """With activation checkpoints, which may not be reentrant here; the last layer moves much farther."""
    group = {"params": ["*layers.1.*"], "type": "Lomo", "lr": 0.5}
    recipe = with_method(write_inputs(tmp_path / "inputs"), param_groups=[group])
    run_to_end(recipe, tmp_path / "run", ["steps=2", "activation_checkpointing=true", "optimizer.lr=1e-7"])
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "inputs" / "model", tmp_path / "run" / "model")
    )
    moved = [
        float((after[f"model.layers.{n}.mlp.up_proj.weight"] - value).float().abs().max())
        for n in range(2)
        for value in [before[f"model.layers.{n}.mlp.up_proj.weight"]]
    ]
    assert moved[0] < moved[1] / 10


@pytest.mark.parametrize(
    ("method", "group_type", "hybrid"),
    [
        ("ZO-SGD", "Lomo", True),
        ("ZO-SGD", "ZO-Adam", False),
        ("ZO-SGD", None, False),
        ("Lomo", "AdamW", False),
    ],
)
def test_it_is_known_from_the_json_whether_some_groups_need_gradients(
    method: str, group_type: str | None, hybrid: bool
) -> None:
    group = {"params": ["*"]} | ({} if group_type is None else {"type": group_type})
    assert is_hybrid({"optimizer": {"type": method, "params": {"param_groups": [group]}}}) == hybrid
    assert not is_hybrid({"optimizer": {"type": method}})


def test_adapters_take_the_method_of_the_rest() -> None:
    lora = LoraRecipe(lr=0.1)
    groups = {}
    for name in ("Lomo", "zo-sgd"):
        optimizer: dict[str, Any] = {"type": name, "params": {"lr": 0.2}}
        _add_adapters(optimizer, lora, has_classifier=False)
        groups[name] = optimizer["params"]["param_groups"][0]
    assert groups["Lomo"].get("type") == "AdamW" and "type" not in groups["zo-sgd"]


SCRIPT = """
import json, sys
import deepspeed, torch
from tests.tiny import tiny_llama
engine = deepspeed.initialize(model=tiny_llama(), config=json.load(open(sys.argv[1])))[0]
ids = torch.randint(2, 299, (2, 9), generator=torch.Generator().manual_seed(1))
closure = lambda: engine(input_ids=ids, labels=ids).loss
print("losses", [float(engine.train_batch([closure])) for _ in range(2)])
"""


def run_script_of(folder: Path) -> str:
    import contextlib
    import io

    from lomo_ds.run import run_script

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_script(str(folder / "script.py"), [str(folder / "zero.json")])
    return next(line for line in printed.getvalue().splitlines() if line.startswith("losses"))


def test_a_script_gets_the_engine_by_its_json(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ds_json = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "zo-adam", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3},
    }
    (tmp_path / "zero.json").write_text(json.dumps(ds_json))
    (line,) = set(run_ranks(2, run_script_of, tmp_path))
    first, second = json.loads(line.removeprefix("losses "))
    torch.manual_seed(0)
    ids = torch.randint(2, 299, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = tiny_llama()(input_ids=ids, labels=ids).loss.item()
    assert first == pytest.approx(plain, rel=1e-3) and second != first
