"""A recipe with a classifier: head, losses and weights are those of transformers and torch in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lomo_ds.recipe import Recipe
from lomo_ds.tasks.order import global_batches
from lomo_ds.training.recipe_file import parse_recipe
from tests.harness import run_ranks
from tests.tiny import SENTENCES, tiny_tokenizer, write_reviews, write_tiny_folder

NUM_STEPS, LR, BATCH, SEED = 2, 0.2, 4, 5


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_tiny_folder(tmp_path / "model")
    write_reviews(tmp_path / "train.tsv", 10)
    ds_json = {
        "optimizer": {"type": "Lomo", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 0.0,
    }
    (tmp_path / "zero.json").write_text(json.dumps(ds_json))
    settings = {
        "model": "model",
        "model_class": "AutoModelForSequenceClassification",
        "data": {"train": "train.tsv", "evaluation": "train.tsv"},
        "task": {"prompt": "{text}", "options": [" bad", " good"]},
        "batch": {"train_batch_size": BATCH, "micro_batch_size": 1},
        "steps": NUM_STEPS,
        "optimizer": {"lr": LR},
        "deepspeed": "zero.json",
        "seed": SEED,
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return parse_recipe(tmp_path / "recipe.yaml")


def trained(recipe: Recipe, out: str) -> tuple[list[float], float, list[dict[str, Any]]]:
    """(losses, share that is right, each example's scores) of a run on this rank; it exports the model."""
    from lomo_ds.model_io.export import export_pretrained
    from lomo_ds.training.interruption import StopFlag
    from lomo_ds.training.job import set_up
    from lomo_ds.training.loop import train
    from lomo_ds.training.model import make_engine

    job = set_up(recipe, None, make_engine, 0.0, StopFlag())
    losses = [metrics.loss for metrics, _ in train(job.engine, job.training_set(), StopFlag())]
    found = job.data.held_out.evaluate(job.engine)
    export_pretrained(job.engine, out)
    job.engine.destroy()
    return losses, found.accuracy, found.lines


def test_a_classifier_is_trained_as_in_one_process(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    (losses, accuracy, lines), _ = run_ranks(2, trained, recipe, str(tmp_path / "trained"))
    torch.manual_seed(SEED)
    settings = {"num_labels": 2, "pad_token_id": 1}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", **settings)
    texts = [f"{SENTENCES[number % 6]} {number}" for number in range(10)]
    labels = [(number + 1) % 2 for number in range(10)]

    def log_likelihoods(number: int) -> torch.Tensor:
        ids = torch.tensor([tiny_tokenizer()(texts[number]).input_ids])
        return model(input_ids=ids).logits[0].log_softmax(-1)

    expected = []
    for indices in global_batches(10, BATCH, NUM_STEPS, SEED):
        loss = -sum(log_likelihoods(index)[labels[index]] for index in indices) / BATCH
        expected.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= LR * param.grad
    assert losses == pytest.approx(expected, rel=1e-5)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "trained", output_loading_info=True
    )
    assert not any(info.values())
    for name, param in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), param, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        scores = torch.stack([log_likelihoods(number) for number in range(10)])
    torch.testing.assert_close(
        torch.tensor([line["log_likelihoods"] for line in lines]), scores, rtol=1e-4, atol=1e-6
    )
    assert accuracy == (scores.argmax(1) == torch.tensor(labels)).double().mean().item()
    assert loaded.config.id2label == {0: "bad", 1: "good"}
