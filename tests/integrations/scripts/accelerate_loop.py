"""A script as users have it: Accelerate's plain loop with a DeepSpeed JSON, unaware of lomo_ds."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DummyOptim, DummyScheduler
from torch.utils.data import DataLoader

from tests.tiny import tiny_llama

DS_JSON = {
    "optimizer": {"type": "AdaLomo", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}
folder, *resume = sys.argv[1:]
PartialState(cpu=True)
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=DS_JSON))
ids = torch.randint(2, 299, (32, 9), generator=torch.Generator().manual_seed(1))
model = tiny_llama()
optimizer = DummyOptim(model.parameters(), lr=0.01, weight_decay=0.1)
model, optimizer, data, scheduler = accelerator.prepare(
    model, optimizer, DataLoader(ids, batch_size=2), DummyScheduler(optimizer, warmup_num_steps=3)
)
if resume:
    accelerator.load_state(resume[0])
    data = accelerator.skip_first_batches(data, 4)
log = []
for number, batch in enumerate(data, start=5 if resume else 1):
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0) if accelerator.sync_gradients else None
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    mean = accelerator.gather(loss.detach()).mean().item()
    log.append({"loss": mean, "grad_norm": norm, "learning_rate": scheduler.get_last_lr()[0]})
    with torch.no_grad():  # an evaluation between steps
        assert model(input_ids=ids[:2], labels=ids[:2]).loss.isfinite()
    if number == 4:
        accelerator.save_state(f"{folder}/checkpoint-2")
state = accelerator.get_state_dict(model)
accelerator.unwrap_model(model).save_pretrained(
    f"{folder}/model", state_dict=state, is_main_process=accelerator.is_main_process
)
if accelerator.is_main_process:
    Path(folder, "log.json").write_text(json.dumps(log))
