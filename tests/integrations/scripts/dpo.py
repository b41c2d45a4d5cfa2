"""A script as users have it: trl's DPOTrainer with a reference model, unaware of lomo_ds."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tests.tiny import SENTENCES, tiny_llama, tiny_tokenizer

DS_JSON = {
    "optimizer": {"type": "AdaLomo", "params": {"lr": "auto"}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}
folder = sys.argv[1]
tokenizer = tiny_tokenizer()
tokenizer.pad_token = tokenizer.eos_token
arguments = DPOConfig(
    output_dir=folder,
    deepspeed=DS_JSON,
    max_length=32,
    per_device_train_batch_size=2,
    num_train_epochs=1,
    learning_rate=0.01,
    lr_scheduler_type="constant",
    train_sampling_strategy="sequential",
    gradient_checkpointing=False,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=False,
    use_cpu=True,
)
rows = [
    {"prompt": "say ", "chosen": f"{sentence} {number}", "rejected": f"no {number}"}
    for number, sentence in enumerate(SENTENCES * 2)
]
data = Dataset.from_list(rows)
trainer = DPOTrainer(tiny_llama(), tiny_llama(), arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()
trainer.save_model(f"{folder}/model")
if trainer.is_world_process_zero():
    Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
