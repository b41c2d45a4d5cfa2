"""What the ranks do in the tests of the engine."""

from __future__ import annotations

from typing import Any

import torch

from lomo_ds.rules.table import OWN_OPTIMIZERS
from tests.reference.model import TinyModel, rank_batch
from tests.reference.sgd import Run

SCHEDULE = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 0.005, "warmup_max_lr": 0.03, "warmup_num_steps": 4, "warmup_type": "linear"},
}


def lomo_json(apply: str = "auto", weight_decay: float = 0.0, **more: Any) -> dict[str, Any]:
    """A DeepSpeed JSON for Lomo; ``zero`` adds to "zero_optimization", other keys to the top level."""
    zero = {"stage": 3, "reduce_bucket_size": 60, "stage3_param_persistence_threshold": 0} | more.pop(
        "zero", {}
    )
    params = {"lr": 0.03, "weight_decay": weight_decay, "apply": apply, "rounding": "nearest"}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Lomo", "params": params},
        "scheduler": SCHEDULE,
        "zero_optimization": zero,
    } | more


def sgd_json(ds_json: dict[str, Any]) -> dict[str, Any]:
    """The same JSON for ZeRO-3 with torch.optim.SGD."""
    params = {key: ds_json["optimizer"]["params"][key] for key in ("lr", "weight_decay")}
    return ds_json | {"optimizer": {"type": "SGD", "params": params}, "zero_allow_untested_optimizer": True}


def build_model(zero_init: bool, ds_json: dict[str, Any], **model_arguments: Any) -> torch.nn.Module:
    """The seeded model, whole or cut at birth; both start from the same values."""
    import deepspeed

    torch.manual_seed(0)
    whole = TinyModel(**model_arguments)
    if not zero_init:
        return whole
    with deepspeed.zero.Init(config_dict_or_path=ds_json):
        cut = TinyModel(**model_arguments)
    for ours, source in zip(cut.parameters(), whole.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours], modifier_rank=0), torch.no_grad():
            if ours.numel():
                ours.copy_(source)
    return cut


def initialize(ds_json: dict[str, Any], **arguments: Any) -> Any:
    """lomo_ds.initialize, or DeepSpeed's own where the JSON names another optimizer."""
    import deepspeed

    import lomo_ds

    ours = ds_json["optimizer"]["type"] in OWN_OPTIMIZERS
    return (lomo_ds if ours else deepspeed).initialize(config=ds_json, **arguments)


def whole_params(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, gathered. Collective."""
    import deepspeed

    params = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: param.detach().clone() for name, param in params.items()}


def train(
    ds_json: dict[str, Any],
    num_steps: int = 10,
    zero_init: bool = False,
    skip_branch_every: int = 0,
    evaluate: bool = False,
    keep_history: bool = False,
    **model_arguments: Any,
) -> Run:
    """The user's loop on this rank's part of the reference batches."""
    model = build_model(zero_init, ds_json, **model_arguments)
    engine, *_ = initialize(ds_json, model=model)
    run = Run([], [], [], {})
    micro_batches = engine.gradient_accumulation_steps()
    if keep_history:
        run.history.append(whole_params(model))
    for step in range(num_steps):
        use_branch = not skip_branch_every or step % skip_branch_every != 0
        run.lrs.append(engine.get_lr()[0])
        total = 0.0
        for micro in range(micro_batches):
            batch = rank_batch(step * micro_batches + micro, engine.global_rank, engine.world_size)
            loss = engine(batch, use_branch=use_branch)
            engine.backward(loss)
            engine.step()
            total += loss.item() / micro_batches
        run.losses.append(total)
        run.grad_norms.append(float(engine.get_global_grad_norm()))
        if evaluate:
            evaluate_once(engine)
        if keep_history:
            run.history.append(whole_params(model))
    run.params = whole_params(model)
    return run


def allow_fp16_on_cpu() -> None:
    """DeepSpeed takes fp16 on CPU only where it is fast; for a test it has to be right alone."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def evaluate_once(engine: Any) -> float:
    engine.eval()
    with torch.no_grad():
        loss = float(engine(rank_batch(999, engine.global_rank, engine.world_size)))
    engine.train()
    return loss
