"""What the ranks do in the tests of exporting a checkpoint without them."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import tiny_tokenizer

IDS = torch.arange(2, 14).view(2, 6)
LORA = {"r": 3, "alpha": 6.0, "lr": 0.05}
FAR_APART = {"params": ["*.lora_*"], "type": "AdamW", "lr": 0.05}


def engine_of(folder: str, ds_json: dict[str, Any], lora: dict[str, Any] | None = None) -> Any:
    """An engine on the model in ``folder``, with adapters where asked for."""
    import deepspeed

    import lomo_ds
    from lomo_ds.integrations.peft import add_adapters
    from lomo_ds.model_io.load import load_pretrained
    from lomo_ds.recipe import LoraRecipe

    deepspeed.init_distributed()
    model = load_pretrained(folder, ds_json)
    if lora is not None:
        model = add_adapters(model, LoraRecipe(**lora), seed=0)
        params = ds_json["optimizer"]["params"] | {"param_groups": [FAR_APART]}
        ds_json = ds_json | {"optimizer": ds_json["optimizer"] | {"params": params}}
    return lomo_ds.initialize(model=model, config=ds_json)[0]


def step(engine: Any) -> None:
    """One training step."""
    loss = engine(input_ids=IDS + engine.global_rank, labels=IDS, use_cache=False).loss
    engine.backward(loss)
    engine.step()


def train_and_save(
    folder: str,
    ds_json: dict[str, Any],
    root: str,
    exported: str,
    lora: dict[str, Any] | None = None,
    max_file_bytes: int = 10**9,
    **options: Any,
) -> torch.Tensor:
    """Train three steps, save, export from the engine, too; returns the engine's own logits."""
    from lomo_ds.model_io.export import export_pretrained

    engine = engine_of(folder, ds_json, lora)
    for _ in range(3):
        step(engine)
    engine.save_checkpoint(root, tokenizer=tiny_tokenizer(), **options)
    export_pretrained(engine, exported, tiny_tokenizer(), max_file_bytes)
    engine.eval()
    with torch.no_grad():
        return engine(input_ids=IDS, use_cache=False).logits


def save_with_adapters(folder: str, ds_json: dict[str, Any], root: str, change: str, **settings: Any) -> None:
    """Save a model with adapters that peft made in another way, or that were switched off."""
    import peft
    from transformers import AutoModelForCausalLM

    import lomo_ds

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(**{"target_modules": ["q_proj"]} | settings)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    if change:
        getattr(model.base_model, change)()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    lomo_ds.initialize(model=model, config=ds_json)[0].save_checkpoint(root)
