"""A script as users have it: trl's GRPOTrainer with a reference model, unaware of lomo_ds."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import SENTENCES, tiny_tokenizer

DS_JSON = {
    "optimizer": {"type": "Lomo", "params": {"lr": "auto"}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}
folder = sys.argv[1]
tokenizer = tiny_tokenizer()
tokenizer.pad_token = tokenizer.eos_token


def many_letters_a(completions: list[str], **others: object) -> list[float]:
    """Reward: how many of a completion's letters are an a, and how short it is."""
    return [completion.count("a") - 0.1 * len(completion) for completion in completions]


arguments = GRPOConfig(
    output_dir=folder,
    deepspeed=DS_JSON,
    beta=0.1,
    num_generations=2,
    max_completion_length=6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    max_steps=3,
    learning_rate=0.1,
    lr_scheduler_type="constant",
    gradient_checkpointing=False,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=False,
    use_cpu=True,
)
data = Dataset.from_list(
    [{"prompt": f"{sentence} {number}"} for number, sentence in enumerate(SENTENCES * 2)]
)
trainer = GRPOTrainer(
    f"{folder}/start", many_letters_a, arguments, train_dataset=data, processing_class=tokenizer
)
trainer.train()
trainer.save_model(f"{folder}/model")
if trainer.is_world_process_zero():
    Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
