"""What the ranks do in the tests of adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_llama, tiny_tokenizer
from tests.zero3.jobs import whole_params

NUM_STEPS = 5
LR, LORA_LR, LORA_DECAY, EPS = 0.05, 5e-3, 0.1, 1e-3
ADAPTERS = {"params": ["*.lora_*"], "type": "AdamW", "lr": LORA_LR, "weight_decay": LORA_DECAY, "eps": EPS}


@dataclass(kw_only=True)
class Run:
    """A run: parameters by name before and after it; losses, norms and learning rates of each step."""

    before: dict[str, Tensor]
    after: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lrs: list[list[float]] = field(default_factory=list)


def adapter_json(apply: str = "auto", clipping: float = 1.0, bf16: bool = False, **group: Any) -> dict:
    """A DeepSpeed JSON for Lomo with a group for adapters; ``group`` changes that group."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": clipping,
        "optimizer": {
            "type": "Lomo",
            "params": {"lr": LR, "apply": apply, "param_groups": [ADAPTERS | group]},
        },
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 500,
            "stage3_param_persistence_threshold": 50,
        },
    }


def step_ids(step: int, world_size: int) -> Tensor:
    """The tokens of all ranks: shape (2 * world_size, 9)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(2, 299, (2 * world_size, 9), generator=generator)


def build(train_base: bool | None, folder: str | None, ds_json: dict, checkpointing: bool) -> Any:
    """The tiny model, whole or from ``folder`` into shards, with adapters unless ``train_base`` is None."""
    from lomo_ds.integrations.peft import add_adapters
    from lomo_ds.model_io.load import load_pretrained
    from lomo_ds.recipe import LoraRecipe

    model = tiny_llama() if folder is None else load_pretrained(folder, ds_json)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    torch.manual_seed(100 + torch.distributed.get_rank())  # ranks that would draw differently
    return model if train_base is None else add_adapters(model, LoraRecipe(train_base=train_base), seed=3)


def train(
    ds_json: dict,
    train_base: bool | None = True,
    folder: str | None = None,
    checkpointing: bool = False,
    out: str | None = None,
) -> Run:
    """Train on this rank's part of each step; with ``out``, export the model and train one step more."""
    import lomo_ds

    model = build(train_base, folder, ds_json, checkpointing)
    engine, *_ = lomo_ds.initialize(model=model, config=ds_json)
    run = Run(before=whole_params(engine.module))
    for step in range(NUM_STEPS):
        _train_step(engine, step, run)
    run.after = whole_params(engine.module)
    if out is not None:
        _export(engine, out)
        _train_step(engine, NUM_STEPS, run)
    return run


def _train_step(engine: Any, step: int, run: Run) -> None:
    ids = step_ids(step, engine.world_size).chunk(engine.world_size)[engine.global_rank]
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    run.lrs.append(engine.get_lr())
    engine.step()
    run.losses.append(loss.item())
    run.grad_norms.append(engine.get_global_grad_norm())


def _export(engine: Any, out: str) -> None:
    from lomo_ds.integrations.peft import save_adapters
    from lomo_ds.model_io.export import export_pretrained

    export_pretrained(engine, f"{out}/model", tiny_tokenizer(), max_file_bytes=20_000)
    save_adapters(engine, f"{out}/adapters")


def with_peft_defaults(model: Any) -> Any:
    """Adapters in fp32, as ``get_peft_model`` makes them, on a model whose parameters are in bf16."""
    import peft

    for param in model.parameters():
        param.data = param.data.bfloat16()
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    for name, param in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(
                param, std=0.1
            )  # they would be zeros, and the first matrices would not move
    return adapted


def train_with_peft_defaults(ds_json: dict, folder: str | None) -> Run:
    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained
    from tests.zero3.mixed_jobs import torchs_own_linear

    same_attention = {"_attn_implementation": "eager"}
    model = tiny_llama() if folder is None else load_pretrained(folder, ds_json, settings=same_attention)
    engine, *_ = lomo_ds.initialize(model=with_peft_defaults(model), config=ds_json)
    run = Run(before=whole_params(engine.module))
    with torchs_own_linear():
        _train_step(engine, 0, run)
    run.after = whole_params(engine.module)
    return run
