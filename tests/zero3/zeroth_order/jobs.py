"""What the ranks do in the tests of zeroth order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.reference.model import rank_batch
from tests.reference.sgd import Run
from tests.zero3 import jobs


def zo_json(
    method: str = "ZO-SGD", lr: float = 1e-3, micro_batches: int = 1, **params: Any
) -> dict[str, Any]:
    """A DeepSpeed JSON; ``zero`` adds to "zero_optimization", ``top`` to the top level."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0} | params.pop("zero", {})
    top = params.pop("top", {})
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": method, "params": {"lr": lr, "rounding": "nearest", **params}},
        "zero_optimization": zero,
    } | top


def make_engine(ds_json: dict[str, Any], **model_arguments: Any) -> Any:
    import lomo_ds

    model = jobs.build_model(False, ds_json, **model_arguments)
    return lomo_ds.initialize(model=model, config=ds_json)[0]


def closures_of(engine: Any, step: int) -> list[Any]:
    """One for each micro-batch of this rank."""
    count = engine.gradient_accumulation_steps()
    numbers = range(step * count, (step + 1) * count)
    batches = [rank_batch(number, engine.global_rank, engine.world_size) for number in numbers]
    return [lambda batch=batch: engine(batch) for batch in batches]


def train(ds_json: dict[str, Any], steps: Sequence[int] = range(4), **model_arguments: Any) -> Run:
    """Make steps with ``train_batch``."""
    engine = make_engine(ds_json, **model_arguments)
    run = Run([], [], [], {})
    for step in steps:
        run.losses.append(engine.train_batch(closures_of(engine, step)).item())
        run.grad_norms.append(engine.get_global_grad_norm())
        run.lrs.append(engine.get_lr()[0])
        run.history.append(jobs.whole_params(engine.module))
    run.params = run.history[-1]
    return run
