"""Instructions: a run's losses are those of a plain loop of transformers with -100 on the prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lomo_ds.tasks.order import global_batches
from tests.faults.job import run_to_end
from tests.tiny import SENTENCES, tiny_tokenizer, write_tiny_folder

NUM_STEPS, LR, BATCH, MAX_LENGTH = 3, 0.2, 8, 30
ROWS = [
    {"question": f"{SENTENCES[n % 6]} {n}", "reply": f" {SENTENCES[(n * n + 1) % 6]}{'!' * (n % 5)}"}
    for n in range(20)
]


def write_recipe(folder: Path, **changes: object) -> Path:
    write_tiny_folder(folder / "model")
    for name, rows in (("train", ROWS), ("held_out", ROWS[:7])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ds_json = {
        "optimizer": {"type": "Lomo", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 0.0,
    }
    (folder / "zero.json").write_text(json.dumps(ds_json))
    recipe = {
        "model": "model",
        "data": {"train": "train.jsonl", "evaluation": "held_out.jsonl"},
        "task": {"prompt": "{question}:", "response": "reply"},
        "max_sequence_length": MAX_LENGTH,
        "batch": {"train_batch_size": BATCH, "micro_batch_size": 2},
        "steps": NUM_STEPS,
        "optimizer": {"lr": LR},
        "deepspeed": "zero.json",
        "output": str(folder / "out"),
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def launch(recipe: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "lomo_ds.cli.train", str(recipe), "--num-ranks", "2"]
    return subprocess.run(
        command, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=300
    )


def labelled(row: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) as a user of transformers makes them; a text that is too long loses its end."""
    tokenizer = tiny_tokenizer()
    prompt = f"{row['question']}:"
    ids = torch.tensor([tokenizer(prompt + row["reply"] + tokenizer.eos_token).input_ids[: MAX_LENGTH + 1]])
    labels = ids.clone()
    labels[0, : len(tokenizer(prompt).input_ids)] = -100
    return ids, labels


def mean_loss(model: torch.nn.Module, rows: list[dict[str, str]], train: bool) -> float:
    """Over the response tokens of all rows; gradients are left where ``train``."""
    batch = [labelled(row) for row in rows]
    num_targets = sum(int((labels != -100).sum()) for _, labels in batch)
    total = 0.0
    for ids, labels in batch:
        part = model(input_ids=ids, labels=labels).loss * int((labels != -100).sum()) / num_targets
        if train:
            part.backward()
        total += part.item()
    return total


def test_losses_are_those_of_plain_transformers(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    output = run_to_end(write_recipe(tmp_path), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = [mean_loss(model, ROWS[:7], train=False)]
    for indices in global_batches(len(ROWS), BATCH, NUM_STEPS, seed=0):
        expected.append(mean_loss(model, [ROWS[index] for index in indices], train=True))
        with torch.no_grad():
            for param in model.parameters():
                param -= LR * param.grad
                param.grad = None
    expected.append(mean_loss(model, ROWS[:7], train=False))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = [summary["loss_before"], *(json.loads(line)["loss"] for line in lines), summary["loss_after"]]
    assert found == pytest.approx(expected, rel=1e-5)
    assert summary["accuracy_before"] is None and summary["accuracy_after"] is None
    num_cut = [len(f"{row['question']}:{row['reply']}") + 1 > MAX_LENGTH + 1 for row in [*ROWS, *ROWS[:7]]]
    assert summary["num_cut_answers"] == sum(num_cut) > 0
    assert f"{sum(num_cut)} answers lose their end to max_sequence_length" in output
    assert f"loss on 7 held-out examples: {expected[0]:.3f} before" in output
    first = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert first["num_tokens"] == int((labelled(ROWS[0])[1] != -100).sum())


def test_prompts_that_leave_no_room_end_the_run_before_it_begins(tmp_path: Path):
    done = launch(write_recipe(tmp_path, max_sequence_length=10))
    assert done.returncode == 2, done.stderr
    message = done.stderr.partition("error: ")[2]  # another process's last line may lack its end
    assert "error: " not in message, "more than one rank complains"
    assert message.startswith("data.train: max_sequence_length 10 leaves no room"), done.stderr
    assert not (tmp_path / "out").exists()
