"""A script as users have it: transformers' Trainer with a DeepSpeed JSON, unaware of lomo_ds."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

DS_JSON = {
    "optimizer": {"type": "Lomo", "params": {"lr": "auto", "weight_decay": "auto"}},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
folder, model_folder, *resume = sys.argv[1:]
ids = torch.randint(2, 299, (36, 9), generator=torch.Generator().manual_seed(1))
labels = ids.clone()
for row in range(len(ids)):
    labels[row, : 1 + row % 4] = -100  # a prompt
examples = [{"input_ids": row, "labels": answer} for row, answer in zip(ids, labels, strict=True)]
arguments = TrainingArguments(
    output_dir=folder,
    deepspeed=DS_JSON,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    learning_rate=0.1,
    weight_decay=0.01,
    max_grad_norm=0.5,
    warmup_steps=1,
    train_sampling_strategy="sequential",
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    save_steps=2,
    report_to="none",
    use_cpu=True,
)
model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
trainer = Trainer(model, arguments, train_dataset=examples[:32], eval_dataset=examples[32:])
trainer.train(resume_from_checkpoint=resume[0] if resume else None)
trainer.save_model(f"{folder}/model")
if trainer.is_world_process_zero():
    Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
