"""What the ranks do in the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.reference.model import TinyModel, rank_batch
from tests.zero3 import jobs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def json_of(optimizer: str = "Lomo", dtype: str = "bf16", **params: Any) -> dict[str, Any]:
    """Accumulation-free and clipped; learning rates follow a schedule."""
    ds_json = jobs.lomo_json(gradient_clipping=1.0)
    ds_json["optimizer"] = {"type": optimizer, "params": {"lr": 0.003, "weight_decay": 0.1, **params}}
    return ds_json if dtype == "fp32" else ds_json | {dtype: {"enabled": True}}


class DropoutModel(TinyModel):
    """The tiny model with dropout on its loss, so that training draws random numbers."""

    def forward(self, batch: Any, **kwargs: Any) -> Any:
        return torch.nn.functional.dropout(super().forward(batch, **kwargs) * torch.ones(16), 0.5).mean()


def start(ds_json: dict[str, Any], seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    dtype = next((dtype for name, dtype in DTYPES.items() if name in ds_json), torch.float32)
    engine = jobs.initialize(ds_json, model=DropoutModel(dtype=dtype, names_head=True), **arguments)[0]
    torch.manual_seed(1000 * seed + engine.global_rank)
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    """The steps from ``first`` to before ``last``; returns their losses."""
    losses = []
    for step in range(first, last):
        loss = engine(rank_batch(step, engine.global_rank, engine.world_size))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def outcome(engine: Any) -> dict[str, Any]:
    """Whole weights, rule states as this rank holds them, counts and counters."""
    from lomo_ds.zero3._internals import shard_spec

    entries = engine.optimizer.updater.entries
    return {
        "params": jobs.whole_params(engine.module),
        "states": {
            f"{entry.index}.{key}": (tensor.clone(), shard_spec(param).shape)
            for param, entry in entries.items()
            for key, tensor in (entry.state | ({} if entry.error is None else {"error": entry.error})).items()
        },
        "num_updates": [entry.num_updates for entry in entries.values()],
        "steps": engine.global_steps,
        "lr": engine.get_lr(),
        "loss_scale": engine.optimizer.loss_scale,
        "samples": engine.global_samples,
    }


def straight(ds_json: dict[str, Any], num_steps: int, save_at: int, folder: Path, **options: Any) -> Any:
    """Train without interruption and save on the way; returns losses after the save and the outcome."""
    engine = start(ds_json)
    train(engine, 0, save_at)
    engine.save_checkpoint(folder, client_state={"step": save_at}, **options)
    at_save = outcome(engine)
    losses = train(engine, save_at, num_steps)
    engine.wait_for_checkpoint()
    return losses, outcome(engine), at_save


def resumed(ds_json: dict[str, Any], num_steps: int, folder: Path, **options: Any) -> Any:
    """Another model, brought to where the checkpoint was and trained on."""
    engine = start(ds_json, seed=7)
    train(engine, 40, 41)  # a step that has to leave no trace, and a backward without its step
    engine.backward(engine(rank_batch(41, engine.global_rank, engine.world_size)))
    path, client_state = engine.load_checkpoint(folder, **options)
    at_load = outcome(engine)
    losses = train(engine, client_state["step"], num_steps)
    return losses, outcome(engine), at_load
