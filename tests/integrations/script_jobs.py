"""What the ranks do in the tests of unchanged scripts: run one, or the engine's own loop on its batches."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_llama
from tests.zero3.jobs import whole_params

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(kw_only=True)
class Run:
    """Each step's loss (mean over ranks), gradient norm and learning rate after it; weights by name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    params: dict[str, Tensor] = field(default_factory=dict)

    def add_step(self, engine: Any, loss: Tensor) -> None:
        """Note what the engine says after a step; ``loss`` is this rank's. Collective."""
        self.losses.append(mean_over_ranks(loss))
        self.grad_norms.append(engine.get_global_grad_norm())
        self.lrs.append(engine.get_lr()[0])

    def end(self, engine: Any) -> Run:
        """Note the weights and end the engine. Collective."""
        self.params = whole_params(engine.module)
        engine.destroy()
        return self


def run(name: str, *arguments: str) -> None:
    """Run a script as ``lomo_ds.run`` does on a rank, and forget what Accelerate keeps of it."""
    from lomo_ds.run import run_script

    try:
        run_script(str(SCRIPTS / f"{name}.py"), arguments)
    finally:
        reset_accelerate()


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()


def script_ids(num_rows: int) -> Tensor:
    """The tokens that the scripts train on: shape (num_rows, 9)."""
    return torch.randint(2, 299, (num_rows, 9), generator=torch.Generator().manual_seed(1))


def own_loop(ds_json: dict[str, Any], num_rows: int, model: Any = None, **arguments: Any) -> Run:
    """The loop that this project's documentation shows, on the script's batches."""
    import lomo_ds

    engine, *_ = lomo_ds.initialize(model=model or tiny_llama(), config=ds_json, **arguments)
    result = Run()
    for ids in script_ids(num_rows).split(2 * engine.gradient_accumulation_steps() * engine.world_size):
        total = torch.zeros(())
        for batch in rank_micro_batches(ids, engine):
            loss = engine(input_ids=batch, labels=batch).loss
            total += engine.backward(loss).detach()
            engine.step()
        result.add_step(engine, total)
    return result.end(engine)


def trainer_loop(ds_json: dict[str, Any]) -> Run:
    """What trainer.py trains: a mean over the tokens of the whole step, prompts left out."""
    import lomo_ds

    engine, *_ = lomo_ds.initialize(model=tiny_llama(), config=ds_json, lr_scheduler=linear_schedule)
    result = Run()
    ids = script_ids(36)[:32]
    labels = torch.where(torch.arange(9) <= torch.arange(32).unsqueeze(1) % 4, -100, ids)
    for step_ids, step_labels in zip(ids.split(8), labels.split(8), strict=True):
        num_tokens = (step_labels[:, 1:] != -100).sum()
        total = torch.zeros(())
        micro_batches = [rank_micro_batches(rows, engine) for rows in (step_ids, step_labels)]
        for batch, wanted in zip(*micro_batches, strict=True):
            loss = engine(input_ids=batch, labels=wanted, num_items_in_batch=num_tokens).loss
            total += engine.backward(loss * engine.world_size, scale_wrt_gas=False).detach()
            engine.step()
        result.add_step(engine, total)
    return result.end(engine)


def rank_micro_batches(rows: Tensor, engine: Any) -> list[Tensor]:
    """This rank's part of a step, as Accelerate deals batches of two to the ranks in turn."""
    return list(rows.split(2))[engine.global_rank :: engine.world_size]


def mean_over_ranks(value: Tensor) -> float:
    gathered = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, value)
    return torch.stack(gathered).mean().item()


def trainer_of(
    folder: str, ds_json: dict[str, Any], model: Any = None, optimizers: Any = (None, None), **settings: Any
) -> Any:
    """A Trainer of two steps."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in script_ids(8)]
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}} | ds_json,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        **{"save_strategy": "no"} | settings,
    )
    return Trainer(
        model or tiny_llama(), arguments, train_dataset=rows, eval_dataset=rows, optimizers=optimizers
    )


def trainer_with_own_optimizer(folder: str) -> None:
    """transformers drops ``optimizers=`` under DeepSpeed, and would train with AdamW."""
    import lomo_ds
    from lomo_ds.integrations import enable

    model = tiny_llama()
    optimizer = lomo_ds.Lomo(model.parameters(), lr=0.1)
    try:
        with enable():
            trainer_of(folder, {}, model, optimizers=(optimizer, None)).train()
    finally:
        reset_accelerate()


def train_with_trainer(folder: str, ds_json: dict[str, Any], **settings: Any) -> dict[str, Tensor]:
    """Train for two steps; returns the weights."""
    from lomo_ds.integrations import enable

    try:
        with enable():
            trainer = trainer_of(folder, ds_json, **settings)
            trainer.train()
        return whole_params(trainer.model)
    finally:
        del trainer
        reset_accelerate()


def accelerate_with_an_object(num_rows: int) -> dict[str, Tensor]:
    """Accelerate's loop with an optimizer of ours built in Python; returns the weights."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    import lomo_ds
    from lomo_ds.integrations import enable

    ds_json = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 3},
    }
    PartialState(cpu=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_json))
    model = tiny_llama()
    optimizer = lomo_ds.Lomo(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(script_ids(num_rows), batch_size=2)
    with enable():
        engine, optimizer, batches = accelerator.prepare(model, optimizer, loader)
    for batch in batches:
        accelerator.backward(engine(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    params = whole_params(engine.module)
    engine.destroy()
    reset_accelerate()
    return params


def policy_and_critic() -> tuple[str, str]:
    """Two engines in one process: the JSON of the second names DeepSpeed's own AdamW."""
    import deepspeed
    from deepspeed import DeepSpeedEngine

    from lomo_ds.integrations import enable
    from lomo_ds.zero3.engine import LomoEngine

    common = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    with enable():
        policy, *_ = deepspeed.initialize(
            model=tiny_llama(), config=common | {"optimizer": {"type": "lomo", "params": {"lr": 0.1}}}
        )
        critic, *_ = deepspeed.initialize(
            model=tiny_llama(),
            config=common | {"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}},
        )
    kinds = type(policy), type(critic)
    policy.destroy()
    critic.destroy()
    assert kinds == (LomoEngine, DeepSpeedEngine)
    return kinds[0].__name__, kinds[1].__name__


def peft_loop(ds_json: dict[str, Any], num_rows: int, **arguments: Any) -> Run:
    """``own_loop`` with the adapters of trainer_peft.py."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return own_loop(ds_json, num_rows, get_peft_model(tiny_llama(), lora), **arguments)


def linear_schedule(optimizer: Any) -> Any:
    """transformers' default, with the warm-up and the steps of trainer.py."""
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=4)
