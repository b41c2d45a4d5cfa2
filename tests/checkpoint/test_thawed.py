"""Checkpoints of runs in which parameters are frozen and thawed, resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import jobs
from tests.checkpoint.test_resume import same_tree
from tests.harness import run_ranks

NUM_STEPS, SAVE_AT = 7, 4


def set_flags(model: torch.nn.Module, step: int) -> None:
    """A layer is thawed before the save and frozen again; another one is thawed after it."""
    model.blocks[1].requires_grad_(2 <= step < 4 or step >= 6)
    model.blocks[0].up.requires_grad_(step >= 5)
    model.branch.requires_grad_(step < 3)


def train(engine: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        set_flags(engine.module, step)
        losses += jobs.train(engine, step, step + 1)
    return losses


def start(ds_json: dict[str, Any], flags_of_step: int | None, seed: int = 0) -> Any:
    """``flags_of_step``: how the model is frozen when the engine is built; None for not at all."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if "bf16" in ds_json else torch.float32
    model = jobs.DropoutModel(dtype=dtype)
    if flags_of_step is not None:
        set_flags(model, flags_of_step)
    engine = jobs.jobs.initialize(ds_json, model=model)[0]
    torch.manual_seed(1000 * seed + engine.global_rank)
    return engine


def straight(ds_json: dict[str, Any], folder: Path) -> Any:
    engine = start(ds_json, 0)
    train(engine, 0, SAVE_AT)
    engine.save_checkpoint(folder)
    losses = train(engine, SAVE_AT, NUM_STEPS)
    return losses, outcome(engine)


def resumed(ds_json: dict[str, Any], folder: Path, flags_of_step: int | None) -> Any:
    engine = start(ds_json, flags_of_step, seed=7)
    jobs.train(engine, 40, 41)  # a step that has to leave no trace
    engine.load_checkpoint(folder)
    losses = train(engine, SAVE_AT, NUM_STEPS)
    return losses, outcome(engine)


def outcome(engine: Any) -> dict[str, Any]:
    """Weights, and what is kept for each parameter, by name, on this rank; state of no update left out."""
    names = {param: name for name, param in engine.module.named_parameters()}
    kept = {}
    for param, entry in engine.optimizer.updater.entries.items():
        if entry.num_updates:
            tensors = {key: tensor.clone() for key, tensor in entry.state.items()}
            kept[names[param]] = [entry.num_updates, entry.index, tensors, entry.error]
    return {"params": jobs.jobs.whole_params(engine.module), "kept": kept}


@pytest.mark.parametrize(
    ("optimizer", "dtype", "params", "flags_of_step"),
    [
        ("AdaLomo", "bf16", {"rounding": "stochastic"}, 0),
        ("AdaLomo", "bf16", {"rounding": "stochastic"}, None),
        ("Lomo", "bf16", {"rounding": "kahan"}, 6),
        ("Lomo", "fp32", {"param_groups": [{"params": ["*"], "type": "AdamW"}]}, 0),
    ],
)
def test_it_resumes_to_the_bit_however_the_engine_was_frozen_when_it_was_built(
    optimizer: str, dtype: str, params: dict[str, Any], flags_of_step: int | None, tmp_path: Path
) -> None:
    ds_json = jobs.json_of(optimizer, dtype, **params)
    expected = run_ranks(2, straight, ds_json, tmp_path)
    actual = run_ranks(2, resumed, ds_json, tmp_path, flags_of_step)
    for (losses, end), (expected_losses, expected_end) in zip(actual, expected, strict=True):
        assert losses == expected_losses
        assert "blocks.1.up.weight" in end["kept"] and "blocks.0.up.bias" in end["kept"]
        assert same_tree(end, expected_end)
