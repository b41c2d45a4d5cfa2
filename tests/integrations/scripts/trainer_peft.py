"""A script as users have it: peft's adapters, trained by transformers' Trainer with a DeepSpeed JSON."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.tiny import tiny_llama

ADAPTERS = {"params": ["*.lora_*"], "type": "AdamW", "lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}
DS_JSON = {
    "optimizer": {"type": "Lomo", "params": {"lr": "auto", "param_groups": [ADAPTERS]}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 50,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
folder, *resume = sys.argv[1:]
ids = torch.randint(2, 299, (16, 9), generator=torch.Generator().manual_seed(1))
arguments = TrainingArguments(
    output_dir=folder,
    deepspeed=DS_JSON,
    per_device_train_batch_size=2,
    num_train_epochs=1,
    learning_rate=0.1,
    max_grad_norm=0.5,
    lr_scheduler_type="constant",
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_steps=2,
    report_to="none",
    use_cpu=True,
)
torch.manual_seed(0)
lora = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(tiny_llama(), lora)
examples = [{"input_ids": row, "labels": row} for row in ids]
trainer = Trainer(model, arguments, train_dataset=examples)
trainer.train(resume_from_checkpoint=resume[0] if resume else None)
trainer.save_model(f"{folder}/model")
if trainer.is_world_process_zero():
    Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
