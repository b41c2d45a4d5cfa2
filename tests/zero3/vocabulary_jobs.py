"""What the ranks do in the tests of the tiled vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import tiny_llama

VOCABULARY = 299


def step_json(optimizer: str, apply: str, bf16: bool, tile_numel: int | None) -> dict[str, Any]:
    """A DeepSpeed JSON; no ``tile_numel`` for the whole vocabulary at once."""
    ds_json = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": optimizer, "params": {"lr": 0.1, "apply": apply}},
        "gradient_clipping": 0.0 if apply == "immediate" else 1.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 100,
            "stage3_param_persistence_threshold": 0,
        },
    }
    if tile_numel is not None:
        ds_json["tiled_vocabulary"] = {"enabled": True, "tile_numel": tile_numel}
    return ds_json


def batch_of(step: int, rank: int) -> dict[str, torch.Tensor]:
    """Random tokens; the first labels do not count."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def train_with_labels(
    tile_numel: int | None,
    optimizer: str = "Lomo",
    tied: bool = False,
    apply: str = "deferred",
    bf16: bool = False,
    num_steps: int = 3,
) -> list[float]:
    """Losses and gradient norms of some steps, then the loss of an evaluation."""
    import lomo_ds

    model = tiny_llama(tied)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    engine, *_ = lomo_ds.initialize(model=model, config=step_json(optimizer, apply, bf16, tile_numel))
    figures = []
    for step in range(num_steps):
        output = engine(**batch_of(step, engine.global_rank))
        assert (output.logits is None) == (tile_numel is not None)
        engine.backward(output.loss)
        engine.step()
        figures += [float(output.loss), engine.get_global_grad_norm()]
    engine.eval()
    with torch.no_grad():
        output = engine(**batch_of(99, engine.global_rank))
    assert output.logits.shape[-1] == VOCABULARY
    return [*figures, float(output.loss)]


def logits_without_labels() -> tuple[int, ...]:
    """A training forward that is given no labels returns logits as ever."""
    import lomo_ds

    engine, *_ = lomo_ds.initialize(model=tiny_llama(False), config=step_json("Lomo", "deferred", False, 200))
    return tuple(engine(input_ids=batch_of(0, 0)["input_ids"]).logits.shape)


def refused(change: str) -> str:
    """The error for a model whose head is not a plain one."""
    import lomo_ds

    model = tiny_llama(False)
    if change == "bias":
        model.lm_head = torch.nn.Linear(20, VOCABULARY)
    elif change == "embedding":
        model.model.embed_tokens = torch.nn.Embedding(VOCABULARY, 20, max_norm=1.0)
    else:
        model = torch.nn.Linear(2, 2)
    try:
        lomo_ds.initialize(model=model, config=step_json("Lomo", "deferred", False, 200))
    except ValueError as error:
        return str(error)
    return ""


def train_shipped(path: str) -> tuple[float, float]:
    """The first and the last loss of some steps on one batch, with a JSON as it is shipped."""
    import lomo_ds

    model = tiny_llama(False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    engine, *_ = lomo_ds.initialize(model=model.bfloat16(), config=path)
    losses = []
    for _ in range(5):
        loss = engine(**batch_of(0, engine.global_rank)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses[0], losses[-1]
