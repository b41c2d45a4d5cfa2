"""A recipe of conversations with a chat template of its own: what is trained on, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from lomo_ds.model_io.export import export_pretrained
from lomo_ds.recipe import Recipe
from lomo_ds.training.recipe_file import load_recipe
from tests.harness import run_ranks
from tests.tiny import tiny_tokenizer, write_tiny_folder

VICUNA = Path(__file__).parents[2] / "recipes" / "chat_templates" / "vicuna.jinja"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_tiny_folder(tmp_path / "model")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    lines = [json.dumps({"messages": [{"role": "system", "content": str(n)}, *messages]}) for n in range(4)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    ds_json = {"optimizer": {"type": "ZO-SGD", "params": {"lr": 1e-4}}, "zero_optimization": {"stage": 3}}
    (tmp_path / "zero.json").write_text(json.dumps(ds_json))
    settings = {
        "model": "model",
        "data": {"train": "chat.jsonl"},
        "task": "chat",
        "chat_template_path": str(VICUNA),
        "batch": {"train_batch_size": 4},
        "steps": 1,
        "deepspeed": "zero.json",
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return load_recipe(tmp_path / "recipe.yaml")


def trained(recipe: Recipe) -> tuple[list[str], list[str]]:
    """(what is read, to the last token that is predicted, what of it is predicted); writes the model."""
    from lomo_ds.training.interruption import StopFlag
    from lomo_ds.training.job import set_up
    from lomo_ds.training.loop import train
    from lomo_ds.training.model import make_engine

    job = set_up(recipe, None, make_engine, 0.0, StopFlag())
    assert len(list(train(job.engine, job.training_set(), StopFlag()))) == 1
    export_pretrained(job.engine, job.output.model, job.tokenizer)
    job.engine.destroy()
    whole = [(*answer.input_ids, answer.target_ids[-1]) for answer in job.data.train]
    predicted = [answer.target_ids for answer in job.data.train]
    return job.tokenizer.batch_decode(whole), job.tokenizer.batch_decode(predicted)


def test_vicunas_prompt_is_trained_on_and_written(recipe: Recipe, tmp_path: Path) -> None:
    read, predicted = run_ranks(2, trained, recipe)[0]
    assert read[1] == "<s>1 USER: Hi ASSISTANT: Yo</s>"
    assert predicted == [" Yo</s>"] * 4
    written = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert written.chat_template == VICUNA.read_text() and not tiny_tokenizer().chat_template
